"""Writing the record of what was asked, and keeping it short: ``fetch_windows`` grows by what happens, not by time.

A window that touches the newest record of its series and means the same (status, reason, source) extends it, and the
newest records that a window covers wholly give way to it. Neither changes an answer: an instant is explained by the
last window asked that covers it, and the record's extent is the union of all windows. Where there is no grid (funding)
every gap stays a record of its own, since the certificate lists them one by one. ``asked_at`` is the newest request's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import duckdb
import polars as pl

from recur.storage.fetched import Asked, bars_between, names_of, table_of
from recur.vocabulary import Series

_TAIL = 8  # newest records of a series that are looked at
_SERIES = ("category", "symbol", "interval", "kind")


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
    place: int | None = None

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
        new = replace(new, place=last.place if last.place is not None else new.place)
        left.pop()
    return [*left, new]


def _joined(last: Entry, new: Entry, interval: str) -> Entry:
    since_ms, until_ms = min(last.since_ms, new.since_ms), max(last.until_ms, new.until_ms)
    if last.until_ms == new.since_ms or new.until_ms == last.since_ms:  # nothing is counted twice
        expected = None if None in (last.expected, new.expected) else last.expected + new.expected  # type: ignore[operator]
        rows = None if None in (last.rows, new.rows) else last.rows + new.rows  # type: ignore[operator]
    else:
        expected = bars_between(since_ms, until_ms, interval)
        rows = expected if last.is_complete and new.is_complete else None
    return replace(new, since_ms=since_ms, until_ms=until_ms, expected=expected, rows=rows)


def record(con: duckdb.DuckDBPyConnection, asked: Sequence[Asked], source: str, now_ms: int) -> None:
    """Write down which ranges were asked and what came of it, after their rows and in the same transaction."""
    if not asked:
        return
    tails = _tails(con, list(dict.fromkeys(window[0] for window in asked)), now_ms)
    chains = {series: list(tail) for series, tail in tails.items()}
    for series, since_ms, until_ms, expected, rows, status, reason in asked:
        new = Entry(since_ms, until_ms, expected, rows, status, reason, source)
        chains[series] = folded(chains[series], new, series.interval)
    written = [
        (series, _counted(con, series, entry))
        for series, chain in chains.items()
        for entry in chain
        if entry not in tails[series]
    ]
    _insert(con, [(series, entry) for series, entry in written if entry.place is None], now_ms)
    _update(con, [entry for _, entry in written if entry.place is not None], now_ms)
    kept = {entry.place for chain in chains.values() for entry in chain}
    gone = [e.place for tail in tails.values() for e in tail if e.place not in kept]
    if gone:
        con.execute("DELETE FROM fetch_windows WHERE rowid IN (SELECT unnest(?::BIGINT[]))", [gone])


def _tails(
    con: duckdb.DuckDBPyConnection, wanted: Sequence[Series], now_ms: int
) -> dict[Series, list[Entry]]:
    """The newest records of each series, in the order of asking; none when one was asked later than ``now_ms``."""
    columns = """epoch_ms(w.since), epoch_ms(w.until), w.expected, w."rows", w.status, w.reason, w.source, w.rowid,
        epoch_ms(w.asked_at)"""
    names = [(s.category, s.symbol, s.interval, s.kind) for s in wanted]
    if len(names) == 1:
        found = con.execute(
            f"""SELECT {columns}, w.category, w.symbol, w.interval, w.kind FROM fetch_windows w
            WHERE {" AND ".join(f"w.{name} = ?" for name in _SERIES)}
            ORDER BY w.asked_at DESC, w.rowid DESC LIMIT {_TAIL}""",
            names[0],
        ).fetchall()
    else:
        con.register("wanted", pl.DataFrame(names, schema=dict.fromkeys(_SERIES, pl.String), orient="row"))
        found = con.execute(
            f"""SELECT {columns}, category, symbol, interval, kind FROM fetch_windows w
            JOIN wanted USING (category, symbol, interval, kind)
            QUALIFY row_number() OVER (PARTITION BY category, symbol, interval, kind
                ORDER BY w.asked_at DESC, w.rowid DESC) <= {_TAIL} ORDER BY w.asked_at DESC, w.rowid DESC"""
        ).fetchall()
        con.unregister("wanted")
    tails: dict[Series, list[Entry]] = {series: [] for series in wanted}
    later: set[Series] = set()
    for row in found:
        series = Series(*row[9:])
        tails[series].insert(0, Entry(*row[:8]))
        if row[8] > now_ms:
            later.add(series)
    return {series: [] if series in later else tail for series, tail in tails.items()}


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
    numbers, texts = ("since_ms", "until_ms", "expected", "rows", "place"), ("status", "reason", "source")
    return pl.DataFrame(
        [
            *(pl.Series(n, [getattr(e, n) for e in entries], dtype=pl.Int64) for n in numbers),
            *(pl.Series(n, [getattr(e, n) for e in entries], dtype=pl.String) for n in texts),
        ]
    )


def _insert(con: duckdb.DuckDBPyConnection, rows: Sequence[tuple[Series, Entry]], now_ms: int) -> None:
    if not rows:
        return
    names = [
        pl.Series(name, [getattr(series, name) for series, _ in rows], dtype=pl.String) for name in _SERIES
    ]
    con.register("asked", _frame([entry for _, entry in rows]).with_columns(names))
    con.execute(
        """INSERT INTO fetch_windows
        SELECT category, symbol, interval, kind, make_timestamp_ms(since_ms), make_timestamp_ms(until_ms), expected,
            "rows", expected - "rows", status, reason, source, make_timestamp_ms(?) FROM asked""",
        [now_ms],
    )
    con.unregister("asked")


def _update(con: duckdb.DuckDBPyConnection, entries: Sequence[Entry], now_ms: int) -> None:
    if not entries:
        return
    con.register("asked", _frame(entries))
    con.execute(
        """UPDATE fetch_windows SET since = make_timestamp_ms(a.since_ms), until = make_timestamp_ms(a.until_ms),
            expected = a.expected, "rows" = a."rows", missing = a.expected - a."rows", status = a.status,
            reason = a.reason, source = a.source, asked_at = make_timestamp_ms(?)
        FROM asked a WHERE fetch_windows.rowid = a.place""",
        [now_ms],
    )
    con.unregister("asked")
