"""The write path: add rows that are not stored yet, revise those whose values changed, leave the rest alone.

What arrives is laid beside what is stored of the same series in the same time range, and one search by key decides all
three; values are compared only where keys meet. It keeps the key unique without an index (see ``storage/schema.py``), so
it must run inside the store's single writing transaction.

A key is one integer: the number of the series within the batch, then the time. NaN means "absent" throughout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import overload

import duckdb
import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray

from recur.storage.frames import READ_ROWS
from recur.storage.schema import Table

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

_TIME_BITS = 43  # milliseconds until the year 2248
_SMALL = 10_000
_ONE = "incoming"  # name under which rows are shown to DuckDB


@dataclass(frozen=True, slots=True)
class PutResult:
    """Rows by what became of them: ``new`` appended, ``changed`` revised, ``same`` known already."""

    new: int = 0
    changed: int = 0
    same: int = 0

    def __add__(self, other: PutResult) -> PutResult:
        return PutResult(self.new + other.new, self.changed + other.changed, self.same + other.same)


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of several series, keys ascending and unique. ``series`` (S, K) names, ``at`` (N,) keys, ``values`` V × (N,)."""

    series: list[tuple[str, ...]]
    at: Ints
    values: Sequence[Floats]

    @property
    def time_ms(self) -> Ints:
        return self.at & ((1 << _TIME_BITS) - 1)

    @property
    def number(self) -> Ints:
        return self.at >> _TIME_BITS

    @classmethod
    def none(cls, table: Table) -> Rows:
        return cls([], np.empty(0, np.int64), [np.empty(0) for _ in table.values])

    def take(self, mask: Bools) -> Rows:
        return Rows(self.series, self.at[mask], [column[mask] for column in self.values])


class _Columns(Sequence[Floats]):
    """Columns of a frame in another order of rows (None: as they are), each made only while it is looked at: all of them at
    once would need as much new memory again as the frame has."""

    def __init__(self, frame: pl.DataFrame, names: Sequence[str], order: Ints | None) -> None:
        self._frame, self._names, self._order = frame, names, order

    def __len__(self) -> int:
        return len(self._names)

    @overload
    def __getitem__(self, place: int) -> Floats: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[Floats]: ...
    def __getitem__(self, place: int | slice) -> Floats | Sequence[Floats]:
        if isinstance(place, slice):
            return _Columns(self._frame, self._names[place], self._order)
        column: Floats = self._frame.get_column(self._names[place]).to_numpy()
        return column if self._order is None else column[self._order]


def constant(frame: pl.DataFrame, names: tuple[str, ...]) -> tuple[str, ...] | None:
    """The one value of each column, None when one of them has several (or the frame is empty)."""
    if frame.is_empty():
        return None
    first = frame.row(0)
    wanted = [first[frame.get_column_index(name)] for name in names]
    if frame.height <= _SMALL:  # a query of polars costs more than to look
        columns = [frame.get_column(name) for name in names]
        if any(column.has_nulls() for column in columns):
            return None
        alike = all((column == value).all() for column, value in zip(columns, wanted, strict=True))
        return tuple(wanted) if alike else None
    same = (
        frame.lazy()
        .select(pl.col(n).eq_missing(v).all() for n, v in zip(names, wanted, strict=True))
        .collect()
    )
    return tuple(wanted) if all(same.row(0)) else None


def rows_of(frame: pl.DataFrame, table: Table) -> Rows:
    """``frame`` in the shape that is merged: sorted, of equal keys the last one."""
    time = frame.get_column(table.time).dt.timestamp("ms").to_numpy()
    names = constant(frame, table.series)
    if names is not None:
        series, at = [names], time.astype(np.int64, copy=False)
    else:
        first = frame.select(table.series).unique().sort(table.series).with_row_index("number")
        number = frame.join(first, on=list(table.series), how="left", maintain_order="left").get_column(
            "number"
        )
        series = list(first.drop("number").iter_rows())
        at = (number.to_numpy().astype(np.int64) << _TIME_BITS) | time
    return _ordered(series, at, _floats(frame, table))


def rows_of_parts(
    frame: pl.DataFrame, table: Table, parts: list[tuple[tuple[str, ...], int]]
) -> tuple[Rows, Ints]:
    """As ``rows_of`` for a frame known to be parts of one series each, in order: (names, height). Also the keys as
    they came, unsorted.
    """
    series = sorted({names for names, _ in parts})
    place = {names: i for i, names in enumerate(series)}
    number = np.repeat([place[names] for names, _ in parts], [height for _, height in parts]).astype(np.int64)
    at = (number << _TIME_BITS) | frame.get_column(table.time).dt.timestamp("ms").to_numpy()
    return _ordered(series, at, _floats(frame, table)), at


def _floats(frame: pl.DataFrame, table: Table) -> list[Floats]:
    return [frame.get_column(name).cast(pl.Float64).to_numpy() for name in table.values]


def _ordered(series: list[tuple[str, ...]], at: Ints, values: list[Floats]) -> Rows:
    if len(at) > 1 and not bool((at[1:] > at[:-1]).all()):
        order = np.argsort(at, kind="stable")
        ordered = at[order]
        last = np.append(ordered[1:] != ordered[:-1], True)
        order = order[last]
        at, values = at[order], [column[order] for column in values]
    return Rows(series, at, values)


def compare(new: Rows, old: Rows) -> tuple[Bools, Bools, Ints]:
    """What of ``new`` is not in ``old``, what is there with other values, and the place in ``old`` of each known row.

    A NaN in ``new`` is no other value: what is absent says nothing.
    """
    if len(new.at) == len(old.at) and bool((new.at == old.at).all()):
        place, known = np.arange(len(new.at)), np.ones(len(new.at), dtype=bool)
        differs = np.zeros(len(new.at), dtype=bool)
        for mine, theirs in zip(new.values, old.values, strict=True):
            other = mine != theirs
            if other.any():
                differs |= other & ~np.isnan(mine)
        return ~known, differs, place
    place = np.searchsorted(old.at, new.at)
    inside = place < len(old.at)
    known = np.zeros(len(new.at), dtype=bool)
    known[inside] = old.at[place[inside]] == new.at[inside]
    differs = np.zeros(len(new.at), dtype=bool)
    at = place[known]
    for mine, theirs in zip(new.values, old.values, strict=True):
        came = mine[known]
        differs[known] |= (came != theirs[at]) & ~np.isnan(came)
    return ~known, differs, place


def merge(con: duckdb.DuckDBPyConnection, rows: Rows, table: Table, *, source: str, now_ms: int) -> PutResult:
    """Merge ``rows`` into ``table``. A null never erases a stored value. A row whose values differ updates the stored
    one, whose ``first_seen`` stays, and leaves old and new values in the table of revisions.
    """
    if not len(rows.at):
        return PutResult()
    old = _stored(con, rows, table)
    fresh, differs, place = compare(rows, old)
    if fresh.all():
        _append(con, rows, table, source, now_ms)
        return PutResult(new=len(rows.at))
    n_new, n_changed = int(fresh.sum()), int(differs.sum())
    if n_new:
        _append(con, rows.take(fresh), table, source, now_ms)
    if n_changed:
        changed, at = rows.take(differs), place[differs]
        before = [column[at] for column in old.values]
        after = [np.where(np.isnan(n), o, n) for n, o in zip(changed.values, before, strict=True)]
        _revise(con, changed, before, after, table, source, now_ms)
    return PutResult(n_new, n_changed, len(rows.at) - n_new - n_changed)


def _stored(con: duckdb.DuckDBPyConnection, rows: Rows, table: Table) -> Rows:
    """What is stored of the same series between the first and the last time of each."""
    time = rows.time_ms
    single = len(rows.series) == 1
    if single:
        source = f"{table.name} c WHERE {' AND '.join(f'c.{k} = ?' for k in table.series)} AND"
    else:
        con.register("spans", _spans(rows, table))
        same = " AND ".join(f"c.{k} = s.{k}" for k in table.series)
        source = f"{table.name} c JOIN spans s ON {same} AND c.{table.time} BETWEEN s.since AND s.until WHERE"
    source += f" c.{table.time} BETWEEN make_timestamp_ms(?) AND make_timestamp_ms(?)"
    params = [*(rows.series[0] if single else ()), int(time.min()), int(time.max())]
    ((n,),) = con.execute(f"SELECT count(*) FROM {source}", params).fetchall()
    if n:  # most of what arrives is new, and to see that costs half of reading nothing
        names = ", ".join(
            [*(f"c.{name}" for name in (table.time, *table.values)), *(["s.number"] if not single else [])]
        )
        found: pl.DataFrame = con.sql(f"SELECT {names} FROM {source}", params=params).pl(READ_ROWS)
    if not single:
        con.unregister("spans")
    if not n:
        return replace(Rows.none(table), series=rows.series)
    at = found.get_column(table.time).dt.timestamp("ms").to_numpy()
    if not single:
        at = (found.get_column("number").to_numpy() << _TIME_BITS) | at
    order: Ints | None = None
    if len(at) > 1 and not bool((at[1:] > at[:-1]).all()):
        order = np.argsort(at, kind="stable")
        at = at[order]
    return Rows(rows.series, at, _Columns(found, table.values, order))


def _spans(rows: Rows, table: Table) -> pl.DataFrame:
    """For each series of ``rows``: its names, its number and its first and last time."""
    time = rows.time_ms
    starts = np.searchsorted(rows.number, np.arange(len(rows.series)))
    ends = np.append(starts[1:], len(time)) - 1
    spans = pl.DataFrame(rows.series, schema=dict.fromkeys(table.series, pl.String), orient="row")
    return spans.with_columns(
        pl.Series("number", np.arange(len(starts))),
        pl.Series("since", time[starts]).cast(pl.Datetime("ms")),
        pl.Series("until", time[ends]).cast(pl.Datetime("ms")),
    )


def _columns(rows: Rows, table: Table, named: bool) -> dict[str, pa.Array]:
    """``rows`` as the tables want them: naive UTC times, absent values null; series names where they differ."""
    columns = {table.time: pa.array(rows.time_ms).view(pa.timestamp("ms"))}
    columns |= {n: pa.array(c, from_pandas=True) for n, c in zip(table.values, rows.values, strict=True)}
    if named:
        number = pa.array(rows.number.astype(np.int32))
        for i, name in enumerate(table.series):
            columns[name] = pa.DictionaryArray.from_arrays(number, pa.array([s[i] for s in rows.series]))
    return columns


def _append(con: duckdb.DuckDBPyConnection, rows: Rows, table: Table, source: str, now_ms: int) -> None:
    single = len(rows.series) == 1
    con.register(_ONE, pa.table(_columns(rows, table, named=not single)))
    names = ", ".join("?" for _ in table.series) if single else ", ".join(table.series)
    con.execute(
        f"""INSERT INTO {table.name} ({", ".join((*table.key, *table.values))}, source, first_seen)
        SELECT {names}, {", ".join((table.time, *table.values))}, ?, make_timestamp_ms(?) FROM {_ONE}""",
        [*(rows.series[0] if single else ()), source, now_ms],
    )
    con.unregister(_ONE)


def _revise(
    con: duckdb.DuckDBPyConnection,
    rows: Rows,
    before: list[Floats],
    after: list[Floats],
    table: Table,
    source: str,
    now_ms: int,
) -> None:
    columns = _columns(Rows(rows.series, rows.at, after), table, named=True)
    olds_of = zip(table.values, before, strict=True)
    columns |= {f"old_{name}": pa.array(column, from_pandas=True) for name, column in olds_of}
    con.register(_ONE, pa.table(columns))
    keys = ", ".join(table.key)
    olds, news = (", ".join(f"{side}_{v}" for v in table.values) for side in ("old", "new"))
    con.execute(
        f"""INSERT INTO {table.revisions} ({keys}, seen_at, source, {olds}, {news})
        SELECT {keys}, make_timestamp_ms(?), ?, {olds}, {", ".join(table.values)} FROM {_ONE}""",
        [now_ms, source],
    )
    con.execute(
        f"""UPDATE {table.name} SET {", ".join(f"{v} = d.{v}" for v in table.values)}, source = ?
        FROM {_ONE} d WHERE {" AND ".join(f"{table.name}.{k} = d.{k}" for k in table.key)}
        AND {table.name}.{table.time} BETWEEN make_timestamp_ms(?) AND make_timestamp_ms(?)""",
        [source, int(rows.time_ms.min()), int(rows.time_ms.max())],
    )
    con.unregister(_ONE)
