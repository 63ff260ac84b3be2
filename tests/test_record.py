"""The record of what was asked stays short, and every answer that is drawn from it stays the same."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recur.pipeline.certificate import certify, holes
from recur.storage.fetched import merged_ranges
from recur.storage.record import Entry, folded
from recur.storage.store import CANDLE_SCHEMA, Store, WindowRows
from recur.vocabulary import HOUR_MS, MINUTE_MS, Series, parse_time
from tests.market import funding_frame

T0 = parse_time("2025-07-01")
BTC = Series("linear", "BTCUSDT", "1h")
FUNDING = Series("linear", "BTCUSDT", "", "funding")
Ask = tuple[int, int, str, str, str]

ASKS = st.lists(
    st.tuples(
        st.integers(0, 12),
        st.integers(0, 8),
        st.sampled_from([("done", ""), ("gap", "venue empty"), ("gap", "delisted")]),
        st.sampled_from(["bybit", "file"]),
    ).map(lambda a: (a[0], a[0] + a[1], *a[2], a[3])),
    max_size=10,
)


def hour(n: int) -> int:
    return T0 + n * HOUR_MS


def bars(symbol: str, hours: Iterable[int]) -> pl.DataFrame:
    """Candles of those hours, all alike."""
    opens = pl.Series([hour(n) for n in hours], dtype=pl.Int64).cast(pl.Datetime("ms", "UTC"))
    names = {"category": "linear", "symbol": symbol, "interval": "1h", "kind": "trade"}
    values = {name: 100.0 for name in ("open", "high", "low", "close", "volume", "turnover")}
    columns = [
        *(pl.lit(name).alias(column) for column, name in names.items()),
        "open_time",
        *(pl.lit(value).alias(column) for column, value in values.items()),
    ]
    return pl.DataFrame({"open_time": opens}).select(columns)


def entry(ask: Ask) -> Entry:
    since, until, status, reason, source = ask
    n = until - since
    return Entry(hour(since), hour(until), n, n if status == "done" else 0, status, reason, source, 0)


def chain_of(asks: list[Ask], interval: str = "1h") -> list[Entry]:
    chain: list[Entry] = []
    for ask in asks:
        chain = folded(chain, entry(ask), interval)
    return chain


def answers(present: set[int], asked: list[tuple[int, int, str, str]]) -> tuple[object, object]:
    """What is drawn from the record: the extent of what was asked, and every hole with its reason."""
    times = np.array(sorted(hour(n) for n in present), dtype=np.int64)
    return merged_ranges(sorted((a[0], a[1]) for a in asked)), holes(times, "1h", asked)


@given(st.sets(st.integers(0, 20), min_size=1), ASKS)
def test_a_short_record_answers_as_the_whole_one(present: set[int], asks: list[Ask]) -> None:
    whole = [(hour(a), hour(b), status, reason) for a, b, status, reason, _ in asks]
    short = [(e.since_ms, e.until_ms, e.status, e.reason) for e in chain_of(asks)]
    assert answers(present, short) == answers(present, whole)
    assert len(short) <= len(whole)


@given(ASKS)
def test_where_there_is_no_grid_every_gap_stays_a_record_of_its_own(asks: list[Ask]) -> None:
    chain = chain_of(asks, "")
    gaps = [(e.since_ms, e.until_ms, e.reason) for e in chain if e.status == "gap"]
    assert gaps == [(hour(a), hour(b), why) for a, b, status, why, _ in asks if status == "gap"]
    whole = merged_ranges(sorted((hour(a), hour(b)) for a, b, *_ in asks))
    assert merged_ranges(sorted((e.since_ms, e.until_ms) for e in chain)) == whole


@given(
    st.sets(st.integers(0, 20), min_size=1),
    st.lists(st.tuples(ASKS.filter(bool), st.integers(-2, 3)), max_size=5),
)
@settings(max_examples=25, deadline=None)
def test_a_store_answers_as_if_it_had_kept_every_request(
    present: set[int], batches: list[tuple[list[Ask], int]]
) -> None:
    whole = [(T0, T0, "done", "")]
    now_ms = hour(100)
    with tempfile.TemporaryDirectory() as home:
        store = Store(Path(home))
        nothing = CANDLE_SCHEMA.to_frame()
        store.put_windows([WindowRows(BTC, T0, T0, nothing, 0)], source="bybit", now_ms=0)
        for asks, later in batches:
            now_ms += later  # the clock of the venue may stand still, and go back
            for source in ("bybit", "file"):
                own = [ask for ask in asks if ask[4] == source]
                windows = [
                    WindowRows(BTC, hour(a), hour(b), nothing, b - a, status, reason)
                    for a, b, status, reason, _ in own
                ]
                store.put_windows(windows, source=source, now_ms=now_ms)
                whole += [(hour(a), hour(b), status, why) for a, b, status, why, _ in own]
        assert answers(present, store.asked(BTC)) == answers(present, whole)
        assert store.windows(BTC) == merged_ranges(sorted((a[0], a[1]) for a in whole))


def records(store: Store) -> list[tuple[object, ...]]:
    with store.read() as con:
        return con.execute(
            """SELECT (epoch_ms(since) - ?) // 3600000, (epoch_ms(until) - ?) // 3600000, expected, "rows", missing,
            status, reason, epoch_ms(asked_at) FROM fetch_windows ORDER BY rowid""",
            [T0, T0],
        ).fetchall()


def put(store: Store, first: int, end: int, now_ms: int, absent: tuple[int, ...] = ()) -> None:
    """An answer to the request for the hours ``[first, end)``, in which some are absent."""
    frame = bars("BTCUSDT", (n for n in range(first, end) if n not in absent))
    status = ("gap", "venue empty") if absent else ("done", "")
    window = WindowRows(BTC, hour(first), hour(end), frame, end - first, *status)
    store.put_windows([window], source="bybit", now_ms=now_ms)


def test_a_series_followed_for_days_has_one_record(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for n in range(6, 60):  # each new hour, and the five before it again
        put(store, n - 6, n, now_ms=hour(n))
    assert records(store) == [(0, 59, 59, 59, 0, "done", "", hour(59))]


def test_a_bar_that_came_late_leaves_no_gap_in_the_record_and_one_that_never_came_does(
    tmp_path: Path,
) -> None:
    store = Store(tmp_path)
    put(store, 0, 6, now_ms=1)
    put(store, 1, 7, now_ms=2, absent=(6,))
    assert [row[5:7] for row in records(store)] == [("done", ""), ("gap", "venue empty")]
    put(store, 1, 8, now_ms=3)
    assert records(store) == [(0, 8, 8, 8, 0, "done", "", 3)]
    put(store, 4, 9, now_ms=4, absent=(8,))
    put(store, 4, 10, now_ms=5, absent=(8,))
    put(store, 9, 12, now_ms=6)
    assert records(store) == [
        (0, 8, 8, 8, 0, "done", "", 3),
        (4, 10, 6, 5, 1, "gap", "venue empty", 5),
        (9, 12, 3, 3, 0, "done", "", 6),
    ]
    (row,) = certify(store, hour(12))["series"]
    assert [(h["bars"], h["reason"]) for h in row["holes"]] == [(1, "venue empty")]


def test_gaps_that_overlap_are_counted_by_what_is_stored(tmp_path: Path) -> None:
    store = Store(tmp_path)
    put(store, 0, 6, now_ms=1, absent=(2, 3))
    put(store, 4, 10, now_ms=2, absent=(8,))
    assert records(store) == [(0, 10, 10, 7, 3, "gap", "venue empty", 2)]


def test_the_last_request_counts_even_when_the_clock_went_back(tmp_path: Path) -> None:
    store = Store(tmp_path)
    put(store, 0, 6, now_ms=10, absent=(5,))
    put(store, 5, 8, now_ms=9)
    put(store, 8, 9, now_ms=8)
    assert [row[:2] + row[-3:] for row in records(store)] == [
        (0, 6, "gap", "venue empty", 10),
        (5, 9, "done", "", 8),
    ]
    assert store.asked(BTC)[-1] == (hour(5), hour(9), "done", "")


def test_a_long_record_of_an_older_store_is_shortened_by_the_next_write(tmp_path: Path) -> None:
    store = Store(tmp_path)
    put(store, 0, 6, now_ms=1)
    with store.write() as con:
        for n in range(1, 200):
            con.execute(
                """INSERT INTO fetch_windows SELECT category, symbol, interval, kind, since + to_hours(?), until + to_hours(?),
                expected, "rows", missing, status, reason, source, asked_at FROM fetch_windows LIMIT 1""",
                [n, n],
            )
    assert len(records(store)) == 200
    put(store, 205, 206, now_ms=2)
    assert records(store) == [(0, 206, 206, 206, 0, "done", "", 2)]


def test_series_of_one_batch_keep_records_of_their_own(tmp_path: Path) -> None:
    store = Store(tmp_path)
    ether = Series("linear", "ETHUSDT", "1h")
    for n in range(3):
        windows = [WindowRows(s, hour(n), hour(n + 1), bars(s.symbol, [n]), 1) for s in (BTC, ether)]
        store.put_windows(windows, source="bybit", now_ms=n)
    assert [row[:4] for row in records(store)] == [(0, 3, 3, 3), (0, 3, 3, 3)]
    assert store.windows(ether) == [(T0, hour(3))]


@pytest.mark.parametrize("step", [4, 8])
def test_payments_without_a_grid_are_counted_by_what_is_stored(tmp_path: Path, step: int) -> None:
    store = Store(tmp_path)
    payments = funding_frame("BTCUSDT", hour(8), 2)
    for end in range(8, 33, step):
        known = payments.filter(pl.col("funding_time").dt.epoch("ms") < hour(end))
        store.put_funding(known, source="bybit", now_ms=end, windows=[(FUNDING, T0, hour(end))])
    assert records(store)[-1] == (0, 32, None, 2, None, "done", "", 32)
    assert [row[5] for row in records(store)] == ["gap", "done"]


def test_the_record_outlives_minutes_of_a_series_that_is_no_longer_there(tmp_path: Path) -> None:
    store, minute = Store(tmp_path), Series("linear", "BTCUSDT", "1m")
    for n in range(20):
        window = WindowRows(
            minute, T0, T0 + (n + 1) * MINUTE_MS, CANDLE_SCHEMA.to_frame(), n + 1, "gap", "delisted"
        )
        store.put_windows([window], source="bybit", now_ms=n)
    assert store.asked(minute) == [(T0, T0 + 20 * MINUTE_MS, "gap", "delisted")]
