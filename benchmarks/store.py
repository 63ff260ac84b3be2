"""The store: pages into it with their bookkeeping, the same rows again, one more page, and a year of 1m bars out of it.

On a busy machine read the figures per second of processor time: they leave out what others take. Peers in the same run: an upsert into a DuckDB table with a primary key, one transaction per page (what a careful
first version does), and for reading a plain copy of its columns. What is read and what is copied is kept until the end,
as a program keeps what it reads, so both go into memory that is new to the process: to get that from the system is most
of what a copy costs. Into memory that was used before a copy takes a third of the time; that is printed too.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import duckdb
import polars as pl
from common import START_MS, Results, bars, goal, interleaved, main, show

from recur.pipeline.certificate import certify
from recur.storage.store import Store, WindowRows
from recur.vocabulary import MINUTE_MS, Series

PAGE, BATCH, YEAR = 1000, 50, 525_600
SERIES = Series("linear", "BTCUSDT", "1m")


def pages(frame: pl.DataFrame, first: int = 0) -> list[WindowRows]:
    step = PAGE * MINUTE_MS
    return [
        WindowRows(SERIES, since := START_MS + k * step, since + step, frame[k * PAGE : (k + 1) * PAGE], PAGE)
        for k in range(first, frame.height // PAGE)
    ]


def stream(home: Path, windows: list[WindowRows]) -> None:
    """Pages as a fetch delivers them: buffered, each batch one transaction together with its windows."""
    store = Store(home)
    with store.session():
        for at in range(0, len(windows), BATCH):
            store.put_windows(windows[at : at + BATCH], source="venue", now_ms=START_MS)


def upsert(path: Path, windows: list[WindowRows]) -> None:
    """The peer: a primary key and ``ON CONFLICT``, one transaction per page, no bookkeeping."""
    with duckdb.connect(str(path)) as con:
        con.execute(
            """CREATE TABLE candles (category VARCHAR, symbol VARCHAR, interval VARCHAR, kind VARCHAR,
            open_time TIMESTAMP_MS, open DOUBLE, high DOUBLE, low DOUBLE, close DOUBLE, volume DOUBLE,
            turnover DOUBLE, PRIMARY KEY (category, symbol, interval, kind, open_time))"""
        )
        for window in windows:
            con.register(
                "incoming", window.frame.with_columns(pl.col("open_time").dt.replace_time_zone(None))
            )
            con.execute(
                """INSERT INTO candles SELECT * FROM incoming ON CONFLICT DO UPDATE SET open = excluded.open,
                high = excluded.high, low = excluded.low, close = excluded.close, volume = excluded.volume,
                turnover = excluded.turnover"""
            )


def copied(frame: pl.DataFrame) -> object:
    """Time and values copied once; the four columns of names are constants, which cost nothing here and in a read."""
    return [frame.get_column(name).to_physical().to_numpy().copy() for name in frame.columns[4:]]


def seconds(job: Callable[[], object]) -> float:
    start = time.perf_counter()
    job()
    return time.perf_counter() - start


def kept(jobs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each job, taking turns; no result is given back before the end."""
    taken: dict[str, list[float]] = {name: [] for name in jobs}
    results = []
    for _ in range(rounds):
        for name, job in jobs.items():
            start = time.perf_counter()
            results.append(job())
            taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in taken.items()}


def measure(quick: bool) -> Results:
    n, extra = (200_000 if quick else 1_580_000), 14
    frame = bars("BTCUSDT", n + 2 * extra * PAGE, "1m")
    windows, some = pages(frame[:n]), 100
    later = pages(frame, n // PAGE)
    ours, theirs, again, warm, alone, within, busy, busy_again = ([] for _ in range(8))
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        for turn in range(5):
            start = time.process_time()
            ours.append(len(windows) / seconds(lambda k=turn: stream(home / str(k), windows)))
            busy.append(len(windows) / (time.process_time() - start))
            theirs.append(some / seconds(lambda k=turn: upsert(home / f"{k}.duckdb", windows[:some])))
            store = Store(home / str(turn))
            start = time.process_time()
            took = seconds(lambda s=store: s.put_candles(frame[:n], source="file", now_ms=START_MS))
            again.append(n / took)
            busy_again.append(n / (time.process_time() - start))
            once_more = seconds(lambda s=store: s.put_candles(frame[:n], source="file", now_ms=START_MS))
            warm.append(n / once_more)
        size = store.path.stat().st_size / n
        hashed = n / seconds(lambda: certify(store, START_MS))
        for page in later[:extra]:
            alone.append(seconds(lambda p=page: store.put_windows([p], source="venue", now_ms=START_MS)))
        with store.session():
            for page in later[extra:]:
                within.append(seconds(lambda p=page: store.put_windows([p], source="venue", now_ms=START_MS)))
        until = START_MS + min(YEAR, n) * MINUTE_MS
        year = store.candles("linear", ["BTCUSDT"], "1m", "trade", START_MS, until).rechunk()
        jobs: dict[str, Callable[[], object]] = {
            "store": lambda: store.candles("linear", ["BTCUSDT"], "1m", "trade", START_MS, until),
            "copy": lambda: copied(year),
        }
        read, again_read = kept(jobs, 15), interleaved(jobs, 15)
        assert year.height == min(YEAR, n) and year.equals(frame[: year.height])
    rate, peer, reload, reread = (statistics.median(values) for values in (ours, theirs, again, warm))
    page_ms, session_ms = (1e3 * statistics.median(values) for values in (alone, within))
    ratio = read["store"] / read["copy"]
    show(
        f"Store, {len(windows):,} pages of {PAGE:,} bars of 1m (medians)",
        ("", "recur", "peer", "ratio", "goal"),
        [
            (
                "new pages/s, with bookkeeping (peer: upsert per page)",
                f"{rate:,.0f}",
                f"{peer:,.0f}",
                f"{rate / peer:.1f}",
                goal(rate, 1000),
            ),
            ("new pages per second of processor time", f"{statistics.median(busy):,.0f}", "", "", ""),
            ("the same rows again, rows/s", f"{reread:,.0f}", "", "", goal(reread, 1e7)),
            ("the first time after they were written", f"{reload:,.0f}", "", "", ""),
            ("the same, per second of processor time", f"{statistics.median(busy_again):,.0f}", "", "", ""),
            ("one more page in a session, ms", f"{session_ms:.1f}", "", "", goal(session_ms, 10, False)),
            ("one more page alone, ms", f"{page_ms:.1f}", "", "", ""),
            (
                f"{year.height:,} bars into polars, ms (peer: column copy)",
                f"{1e3 * read['store']:.0f}",
                f"{1e3 * read['copy']:.0f}",
                f"{ratio:.1f}",
                goal(ratio, 2, False),
            ),
            (
                "the same into memory used before, ms",
                f"{1e3 * again_read['store']:.0f}",
                f"{1e3 * again_read['copy']:.0f}",
                f"{again_read['store'] / again_read['copy']:.1f}",
                "",
            ),
            ("certificate with content hash, rows/s", f"{hashed:,.0f}", "", "", ""),
            ("file, MB per million bars", f"{size:.0f}", "", "", ""),
        ],
    )
    return {
        "pages": len(windows),
        "pages_per_s": rate,
        "peer_upsert_pages_per_s": peer,
        "pages_per_cpu_s": statistics.median(busy),
        "reload_rows_per_s": reread,
        "first_reload_rows_per_s": reload,
        "reload_rows_per_cpu_s": statistics.median(busy_again),
        "one_page_in_session_ms": session_ms,
        "one_page_alone_ms": page_ms,
        "year_read_ms": 1e3 * read["store"],
        "year_copy_ms": 1e3 * read["copy"],
        "year_read_reused_ms": 1e3 * again_read["store"],
        "year_copy_reused_ms": 1e3 * again_read["copy"],
        "certificate_rows_per_s": hashed,
        "mb_per_million_bars": size,
    }


if __name__ == "__main__":
    main(measure, __doc__)
