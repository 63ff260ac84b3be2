"""The store: merging, revisions, windows, taking turns with other processes, crashes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

import polars as pl
import pytest

from recur.storage.schema import VERSION
from recur.storage.store import CANDLE_SCHEMA, FUNDING_SCHEMA, PutResult, Store, WindowRows
from recur.vocabulary import HOUR_MS, DataMissing, Series, StoreBusy, StoreCorrupt, UsageError, parse_time

T0 = parse_time("2025-07-01")
BTC = Series("linear", "BTCUSDT", "1h")


def bars(
    series: Series, opens: list[int], close: float = 100.0, turnover: float | None = 1000.0
) -> pl.DataFrame:
    return pl.DataFrame(
        {
            "category": series.category,
            "symbol": series.symbol,
            "interval": series.interval,
            "kind": series.kind,
            "open_time": pl.Series(opens, dtype=pl.Int64).cast(pl.Datetime("ms", "UTC")),
            "open": 100.0,
            "high": 110.0,
            "low": 90.0,
            "close": close,
            "volume": 10.0,
            "turnover": turnover,
        },
        schema=CANDLE_SCHEMA,
    )


def hours(count: int, first: int = 0) -> list[int]:
    return [T0 + HOUR_MS * i for i in range(first, first + count)]


def window(count: int, first: int = 0, close: float = 100.0) -> WindowRows:
    since = T0 + HOUR_MS * first
    return WindowRows(BTC, since, since + HOUR_MS * count, bars(BTC, hours(count, first), close), count)


def child(code: str, *args: object) -> subprocess.Popen[str]:
    """A second Python process running ``code``; it prints one line when it is ready."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)], stdout=subprocess.PIPE, text=True, env=os.environ
    )


def test_reading_before_anything_was_fetched_says_what_to_run(tmp_path: Path) -> None:
    store = Store(tmp_path / "new")
    with pytest.raises(DataMissing) as caught:
        store.candles()
    assert caught.value.hint == "Run `recur fetch` first."
    assert store.windows(BTC) == []
    assert store.last_open(BTC) is None
    assert not (tmp_path / "new").exists()


def test_a_window_is_stored_with_its_record_and_read_back_exactly(tmp_path: Path) -> None:
    store = Store(tmp_path / "deep" / "home")
    assert store.put_windows([window(3)], source="bybit", now_ms=T0) == PutResult(new=3, changed=0, same=0)
    assert store.candles("linear", ["BTCUSDT"], "1h").equals(bars(BTC, hours(3)))
    assert store.candles().schema == CANDLE_SCHEMA
    assert store.windows(BTC) == [(1751328000000, 1751338800000)]
    assert store.last_open(BTC) == 1751335200000
    with store.read() as con:
        assert con.execute(
            "SELECT expected, rows, missing, status, source FROM fetch_windows"
        ).fetchall() == [(3, 3, 0, "done", "bybit")]


def test_storing_the_same_window_again_changes_nothing_but_the_record(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.put_windows([window(3)], source="bybit", now_ms=T0)
    again = store.put_windows([window(2), window(3, first=1)], source="bybit", now_ms=T0 + 1)
    assert again == PutResult(new=1, changed=0, same=3)
    assert store.candles().get_column("open_time").dt.epoch("ms").to_list() == hours(4)
    assert store.windows(BTC) == [(T0, T0 + 4 * HOUR_MS)]


def test_a_changed_bar_keeps_its_first_sight_and_leaves_a_revision(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.put_windows([window(2)], source="bybit", now_ms=T0)
    result = store.put_windows([window(1, first=1, close=105.0)], source="later", now_ms=T0 + 7000)
    assert result == PutResult(new=0, changed=1, same=0)
    assert store.candles().get_column("close").to_list() == [100.0, 105.0]
    with store.read() as con:
        rows = con.execute("SELECT epoch_ms(first_seen), source FROM candles ORDER BY open_time").fetchall()
        revised = con.execute(
            "SELECT epoch_ms(open_time), epoch_ms(seen_at), old_close, new_close, old_high, new_high FROM candle_revisions"
        ).fetchall()
    assert rows == [(T0, "bybit"), (T0, "later")]
    assert revised == [(T0 + HOUR_MS, T0 + 7000, 100.0, 105.0, 110.0, 110.0)]


def test_an_absent_value_never_erases_a_stored_one_and_nan_counts_as_absent(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.put_candles(bars(BTC, hours(1)), source="bybit", now_ms=T0)
    assert store.put_candles(bars(BTC, hours(1), turnover=None), source="file", now_ms=T0) == PutResult(
        same=1
    )
    store.put_candles(bars(BTC, hours(1, first=1), turnover=float("nan")), source="file", now_ms=T0)
    assert store.candles().get_column("turnover").to_list() == [1000.0, None]


def test_a_bar_that_stands_twice_in_one_batch_is_stored_once(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store.put_windows([window(2), window(2, close=101.0)], source="x", now_ms=T0) == PutResult(new=2)
    assert store.candles().get_column("close").to_list() == [101.0, 101.0]


def test_several_series_in_one_batch_do_not_mix(tmp_path: Path) -> None:
    store = Store(tmp_path)
    spot = Series("spot", "BTCUSDT", "1h")
    mark = Series("linear", "BTCUSDT", "1h", "mark")
    batch = [WindowRows(s, T0, T0 + HOUR_MS, bars(s, hours(1)), 1) for s in (BTC, spot, mark)]
    assert store.put_windows(batch, source="x", now_ms=T0) == PutResult(new=3)
    assert store.put_windows([*batch, window(1, first=1)], source="x", now_ms=T0) == PutResult(new=1, same=3)
    assert store.candles(category="spot").equals(bars(spot, hours(1)))
    assert store.candles(kind="mark").equals(bars(mark, hours(1)))
    assert store.candles(category="linear").height == 2


def test_a_window_with_rows_from_outside_is_refused_whole(tmp_path: Path) -> None:
    store = Store(tmp_path)
    stray = WindowRows(BTC, T0, T0 + HOUR_MS, bars(BTC, hours(2)), 1)
    with pytest.raises(ValueError, match="outside its window"):
        store.put_windows([window(1), stray], source="x", now_ms=T0)
    assert not store.path.exists()


def test_reading_is_half_open_and_an_unknown_symbol_gives_an_empty_frame(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.put_windows([window(5)], source="x", now_ms=T0)
    some = store.candles("linear", ["BTCUSDT"], "1h", since_ms=T0 + HOUR_MS, until_ms=T0 + 3 * HOUR_MS)
    assert some.get_column("open_time").dt.epoch("ms").to_list() == hours(2, first=1)
    assert store.candles(symbols=["NOUSDT"]).schema == CANDLE_SCHEMA
    assert store.candles(symbols=[]).is_empty()


def test_a_gap_and_an_empty_window_are_recorded_with_their_reason(tmp_path: Path) -> None:
    store = Store(tmp_path)
    empty = WindowRows(BTC, T0, T0 + 2 * HOUR_MS, CANDLE_SCHEMA.to_frame(), 2, "gap", "before listing")
    assert store.put_windows([empty], source="bybit", now_ms=T0) == PutResult()
    assert store.windows(BTC) == [(T0, T0 + 2 * HOUR_MS)]
    with store.read() as con:
        found = con.execute("SELECT expected, rows, missing, status, reason FROM fetch_windows").fetchall()
    assert found == [(2, 0, 2, "gap", "before listing")]


def test_merged_windows_join_only_where_they_touch(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.put_windows([window(2, first=4), window(1), window(1, first=1)], source="x", now_ms=T0)
    assert store.windows(BTC) == [(T0, T0 + 2 * HOUR_MS), (T0 + 4 * HOUR_MS, T0 + 6 * HOUR_MS)]


def test_the_summary_counts_holes_and_missing_bars(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.put_candles(bars(BTC, [*hours(2), *hours(1, first=4), *hours(1, first=6)]), source="x", now_ms=T0)
    months = Series("linear", "BTCUSDT", "1M")
    opens = [parse_time(day) for day in ("2025-01-01", "2025-02-01", "2025-05-01")]
    store.put_candles(bars(months, opens), source="x", now_ms=T0)
    summary = store.series_summary()
    assert summary.select("series", "rows", "gaps", "missing").rows() == [
        ("bybit:linear:BTCUSDT:1M", 3, 1, 2),
        ("bybit:linear:BTCUSDT:1h", 4, 2, 3),
    ]
    assert summary.select("first", "last").row(1) == (
        datetime(2025, 7, 1, 0, tzinfo=UTC),
        datetime(2025, 7, 1, 6, tzinfo=UTC),
    )


def test_a_file_with_holes_is_recorded_as_a_gap_of_the_file(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.put_candles(bars(BTC, [*hours(2), *hours(1, first=4)]), source="candles.csv", now_ms=T0)
    with store.read() as con:
        found = con.execute(
            "SELECT epoch_ms(since), epoch_ms(until), expected, rows, missing, status, reason FROM fetch_windows"
        ).fetchall()
    assert found == [(T0, T0 + 5 * HOUR_MS, 5, 3, 2, "gap", "absent in file")]


def test_funding_is_merged_and_its_window_recorded(tmp_path: Path) -> None:
    store = Store(tmp_path)
    times = pl.Series([T0, T0 + 8 * HOUR_MS], dtype=pl.Int64).cast(pl.Datetime("ms", "UTC"))
    frame = pl.DataFrame(
        {"category": "linear", "symbol": "BTCUSDT", "funding_time": times, "rate": [0.0001, -0.0002]}
    )
    series = Series("linear", "BTCUSDT", "", "funding")
    asked = [(series, T0, T0 + 9 * HOUR_MS)]
    assert store.put_funding(frame, source="bybit", now_ms=T0, windows=asked) == PutResult(new=2)
    assert store.put_funding(frame, source="bybit", now_ms=T0) == PutResult(same=2)
    empty = FUNDING_SCHEMA.to_frame()
    later = [(series, T0 + 9 * HOUR_MS, T0 + 10 * HOUR_MS)]
    assert store.put_funding(empty, source="bybit", now_ms=T0, windows=later) == PutResult()
    assert store.windows(series) == [(T0, T0 + 10 * HOUR_MS)]
    assert store.last_open(series) == T0 + 8 * HOUR_MS
    assert store.funding("linear", ["BTCUSDT"], since_ms=T0 + 1).get_column("rate").to_list() == [-0.0002]
    assert store.funding().schema == FUNDING_SCHEMA


def test_an_error_inside_a_transaction_leaves_nothing_behind(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.put_windows([window(1)], source="x", now_ms=T0)
    with pytest.raises(KeyboardInterrupt), store.write() as con:
        con.execute("DELETE FROM candles")
        raise KeyboardInterrupt
    assert store.candles().height == 1


def test_threads_of_one_process_take_turns_reading_and_writing(tmp_path: Path) -> None:
    store, other = Store(tmp_path), Store(tmp_path)
    store.put_windows([window(1)], source="x", now_ms=T0)
    seen: list[int] = []

    def write(first: int) -> None:
        store.put_windows([window(1, first=first)], source="x", now_ms=T0)
        seen.append(other.candles().height)

    threads = [threading.Thread(target=write, args=(i,)) for i in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.candles().height == 5
    assert max(seen) == 5


def test_a_connection_inside_a_connection_is_an_error_and_not_a_deadlock(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with store.write(), pytest.raises(RuntimeError, match="close it first"):
        store.candles()


HOLD = """
import sys, time
from pathlib import Path
from recur.storage.store import Store
with Store(Path(sys.argv[1])).write():
    print("ready", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def test_a_store_held_by_another_process_is_busy_and_names_it(tmp_path: Path) -> None:
    Store(tmp_path).put_windows([window(1)], source="x", now_ms=T0)
    holder = child(HOLD, tmp_path, 60)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "ready\n"
        started = time.monotonic()
        for attempt in (Store(tmp_path, wait_s=0.3).candles, Store(tmp_path, wait_s=0.3).write().__enter__):
            with pytest.raises(StoreBusy, match=rf"held by process {holder.pid} ") as caught:
                attempt()
            assert caught.value.exit_code == 75
        assert 0.6 <= time.monotonic() - started < 5
    finally:
        holder.kill()
        holder.communicate()


def test_a_reader_waits_until_the_other_process_lets_go(tmp_path: Path) -> None:
    Store(tmp_path).put_windows([window(1)], source="x", now_ms=T0)
    holder = child(HOLD, tmp_path, 0.5)
    assert holder.stdout is not None and holder.stdout.readline() == "ready\n"
    assert Store(tmp_path, wait_s=20).candles().height == 1
    holder.communicate()
    assert holder.returncode == 0


STREAM = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_storage import window
from recur.storage.store import Store
store = Store(Path(sys.argv[1]))
for i in range(100000):
    store.put_windows([window(20, first=20 * i)], source="child", now_ms=1)
    print(20 * (i + 1), flush=True)
"""


@pytest.mark.parametrize("acknowledged", [1, 4, 9])
def test_a_writer_killed_mid_stream_loses_no_acknowledged_window(tmp_path: Path, acknowledged: int) -> None:
    writer = child(STREAM, tmp_path, Path(__file__).parent)
    assert writer.stdout is not None
    for _ in range(acknowledged):
        told = int(writer.stdout.readline())
    time.sleep(0.013 * acknowledged)  # somewhere inside a later transaction
    writer.send_signal(signal.SIGKILL)
    rest, _ = writer.communicate()
    told = int(rest.split()[-1]) if rest.split() else told
    assert writer.returncode == -signal.SIGKILL
    store = Store(tmp_path)
    rows = store.candles().height
    assert rows in (told, told + 20)
    assert store.windows(BTC) == [(T0, T0 + rows * HOUR_MS)]
    store.put_windows([window(rows + 20)], source="x", now_ms=T0)
    assert store.candles().get_column("open_time").dt.epoch("ms").to_list() == hours(rows + 20)


@pytest.mark.parametrize("content", [b"not a database at all" * 1000, b""])
def test_a_file_that_is_no_store_is_reported_as_corrupt_with_a_remedy(tmp_path: Path, content: bytes) -> None:
    store = Store(tmp_path, wait_s=0.1)
    store.path.write_bytes(content)
    for attempt in (store.candles, store.write().__enter__):
        with pytest.raises(StoreCorrupt, match=r"market\.duckdb cannot be read") as caught:
            attempt()
        assert "restore a copy" in caught.value.hint
    assert store.path.read_bytes() == content


def test_a_truncated_store_is_reported_as_corrupt(tmp_path: Path) -> None:
    store = Store(tmp_path, wait_s=0.1)
    store.put_windows([window(5000)], source="x", now_ms=T0)
    os.truncate(store.path, 30_000)
    with pytest.raises(StoreCorrupt):
        store.candles()


def test_a_store_of_a_newer_program_is_refused_and_left_alone(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with store.write() as con:
        con.execute("INSERT INTO schema_version VALUES (99, make_timestamp_ms(0))")
    message = re.escape(f"schema version 99, this program knows versions up to {VERSION}")
    for attempt in (store.candles, store.write().__enter__):
        with pytest.raises(UsageError, match=message):
            attempt()


def test_a_store_whose_making_was_cut_short_is_completed_by_a_reader(tmp_path: Path) -> None:
    import duckdb

    store = Store(tmp_path)
    duckdb.connect(str(store.path)).close()
    assert store.candles().is_empty()


def test_a_workspace_that_cannot_be_made_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="Cannot make the workspace folder"):
        Store(tmp_path / "file" / "home").put_windows([window(1)], source="x", now_ms=T0)


def test_a_write_in_a_session_takes_over_what_a_read_has_attached(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.put_candles(bars(BTC, hours(3)), source="test", now_ms=1)
    with store.session():
        assert store.candles().height == 3
        store.put_candles(bars(BTC, hours(2, 3)), source="test", now_ms=2)
        assert store.candles().height == 5
