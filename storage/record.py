"""Writing the record of what was asked, and keeping it short: ``fetch_windows`` grows by what happens, not by time.

A window that touches the newest record of its series and means the same (status, reason, source) extends it, and the
newest records that a window covers wholly give way to it. Neither changes an answer: an instant is explained by the
last window asked that covers it, and the record's extent is the union of all windows. Where there is no grid (funding)
every gap stays a record of its own, since the certificate lists them one by one. ``asked_at`` is the newest request's;
the order of asking is that of the rows, since the venue's clock may go back. A long record is shortened whole by the
first write to its series.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import duckdb
import polars as pl

from recur.storage.fetched import Asked, bars_between, names_of, table_of
from recur.vocabulary import Series

_FEW = 3  # so many rows are written one by one, which costs less than handing over a frame
_SERIES = ("category", "symbol", "interval", "kind")
_NUMBERS = ("since_ms", "until_ms", "expected", "rows", "missing", "asked_ms", "place")
_TEXTS = ("status", "reason", "source")


@dataclass(frozen=True, slots=True)
class Entry:
    """One record. ``rows`` None: to be counted. ``place``: its row in the table, None for a new one."""

    since_ms: int
    until_ms: int
    expected: int | None
    rows: int | None
    status: str
    reason: str
    source: str
    asked_ms: int
    place: int | None = None

    @property
    def missing(self) -> int | None:
        return None if self.expected is None or self.rows is None else self.expected - self.rows

    @property
    def is_complete(self) -> bool:
        return self.rows is not None and self.rows == self.expected


def folded(chain: Sequence[Entry], new: Entry, interval: str) -> list[Entry]:
    """The records of a series, in the order of asking, once ``new`` was asked after all in ``chain``."""
    left = list(chain)
    while left:
        last = left[-1]
        alike = (last.status, last.reason, last.source) == (new.status, new.reason, new.source)
        touching = last.since_ms <= new.until_ms and new.since_ms <= last.until_ms
        covered = new.since_ms <= last.since_ms < last.until_ms <= new.until_ms
        if alike and touching and (interval or new.status == "done"):
            new = _joined(last, new, interval)
        elif not (covered and interval):
            break
        new = replace(new, place=new.place if last.place is None else last.place)
        left.pop()
    return [*left, new]


def _joined(last: Entry, new: Entry, interval: str) -> Entry:
    since_ms, until_ms = min(last.since_ms, new.since_ms), max(last.until_ms, new.until_ms)
    if last.until_ms == new.since_ms or new.until_ms == last.since_ms:  # nothing is counted twice
        expected, rows = _sum(last.expected, new.expected), _sum(last.rows, new.rows)
    else:
        expected = bars_between(since_ms, until_ms, interval)
        rows = expected if last.is_complete and new.is_complete else None
    return replace(new, since_ms=since_ms, until_ms=until_ms, expected=expected, rows=rows)


def _sum(a: int | None, b: int | None) -> int | None:
    return None if a is None or b is None else a + b


def record(con: duckdb.DuckDBPyConnection, asked: Sequence[Asked], source: str, now_ms: int) -> None:
    """Write down which ranges were asked and what came of it, after their rows and in the same transaction."""
    if not asked:
        return
    known = _known(con, list(dict.fromkeys(window[0] for window in asked)))
    chains: dict[Series, list[Entry]] = {}
    for series, entries in known.items():
        chain: list[Entry] = []
        for entry in entries:
            chain = folded(chain, entry, series.interval)
        chains[series] = chain
    for series, since_ms, until_ms, expected, rows, status, reason in asked:
        new = Entry(since_ms, until_ms, expected, rows, status, reason, source, now_ms)
        chains[series] = folded(chains[series], new, series.interval)
    changed = [
        (series, _counted(con, series, entry))
        for series, chain in chains.items()
        for entry in chain
        if entry not in known[series]
    ]
    _update(con, [entry for _, entry in changed if entry.place is not None])
    _insert(con, [(series, entry) for series, entry in changed if entry.place is None])
    kept = {entry.place for chain in chains.values() for entry in chain}
    gone = [e.place for entries in known.values() for e in entries if e.place not in kept]
    if gone:
        con.execute("DELETE FROM fetch_windows WHERE rowid IN (SELECT unnest(?::BIGINT[]))", [gone])


def _known(con: duckdb.DuckDBPyConnection, wanted: Sequence[Series]) -> dict[Series, list[Entry]]:
    """All records of each series, in the order of asking."""
    columns = """epoch_ms(since), epoch_ms(until), expected, "rows", status, reason, source, epoch_ms(asked_at), w.rowid"""
    names = [(s.category, s.symbol, s.interval, s.kind) for s in wanted]
    if len(wanted) == 1:
        where = " AND ".join(f"{name} = ?" for name in _SERIES)
        found = con.execute(f"SELECT {columns} FROM fetch_windows w WHERE {where}", names[0]).fetchall()
    else:
        con.register("wanted", pl.DataFrame(names, schema=dict.fromkeys(_SERIES, pl.String), orient="row"))
        joined = f"fetch_windows w JOIN wanted USING ({', '.join(_SERIES)})"
        found = con.execute(f"SELECT {columns}, {', '.join(_SERIES)} FROM {joined}").fetchall()
        con.unregister("wanted")
    known: dict[Series, list[Entry]] = {series: [] for series in wanted}
    for row in found:
        known[Series(*row[9:]) if row[9:] else wanted[0]].append(Entry(*row[:9]))
    return {series: sorted(entries, key=lambda e: e.place or 0) for series, entries in known.items()}


def _counted(con: duckdb.DuckDBPyConnection, series: Series, entry: Entry) -> Entry:
    if entry.rows is not None:
        return entry
    table = table_of(series)
    ((n,),) = con.execute(
        f"""SELECT count(*) FROM {table.name} WHERE {" AND ".join(f"{column} = ?" for column in table.series)}
        AND {table.time} >= make_timestamp_ms(?) AND {table.time} < make_timestamp_ms(?)""",
        [*names_of(series), entry.since_ms, entry.until_ms],
    ).fetchall()
    return replace(entry, rows=n)


def _frame(entries: Sequence[Entry]) -> pl.DataFrame:
    columns = {name: [getattr(entry, name) for entry in entries] for name in (*_NUMBERS, *_TEXTS)}
    schema = dict.fromkeys(_NUMBERS, pl.Int64()) | dict.fromkeys(_TEXTS, pl.String())
    return pl.DataFrame(columns, schema=schema)


def _insert(con: duckdb.DuckDBPyConnection, rows: Sequence[tuple[Series, Entry]]) -> None:
    into = "INSERT INTO fetch_windows"
    if len(rows) <= _FEW:
        times, numbers = "make_timestamp_ms(?), make_timestamp_ms(?)", "?, ?, ?"
        for series, e in rows:
            con.execute(
                f"{into} VALUES (?, ?, ?, ?, {times}, {numbers}, ?, ?, ?, make_timestamp_ms(?))",
                [
                    *(series.category, series.symbol, series.interval, series.kind, e.since_ms, e.until_ms),
                    *(e.expected, e.rows, e.missing, e.status, e.reason, e.source, e.asked_ms),
                ],
            )
        return
    names = [
        pl.Series(name, [getattr(series, name) for series, _ in rows], dtype=pl.String) for name in _SERIES
    ]
    con.register("asked", _frame([entry for _, entry in rows]).with_columns(names))
    con.execute(
        f"""{into} SELECT category, symbol, interval, kind, make_timestamp_ms(since_ms), make_timestamp_ms(until_ms),
            expected, "rows", missing, status, reason, source, make_timestamp_ms(asked_ms) FROM asked"""
    )
    con.unregister("asked")


def _update(con: duckdb.DuckDBPyConnection, entries: Sequence[Entry]) -> None:
    if len(entries) <= _FEW:
        for e in entries:
            con.execute(
                """UPDATE fetch_windows SET since = make_timestamp_ms(?), until = make_timestamp_ms(?), expected = ?,
                "rows" = ?, missing = ?, status = ?, reason = ?, source = ?, asked_at = make_timestamp_ms(?)
                WHERE rowid = ?""",
                [
                    *(e.since_ms, e.until_ms, e.expected, e.rows, e.missing, e.status, e.reason, e.source),
                    *(e.asked_ms, e.place),
                ],
            )
        return
    con.register("asked", _frame(entries))
    con.execute(
        """UPDATE fetch_windows SET since = make_timestamp_ms(a.since_ms), until = make_timestamp_ms(a.until_ms),
            expected = a.expected, "rows" = a."rows", missing = a.missing, status = a.status,
            reason = a.reason, source = a.source, asked_at = make_timestamp_ms(a.asked_ms)
        FROM asked a WHERE fetch_windows.rowid = a.place"""
    )
    con.unregister("asked")
