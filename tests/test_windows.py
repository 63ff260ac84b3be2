"""Ranges, windows, verification of answers, and the token bucket: pure parts of fetching."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recur.connectors.ratelimit import RateLimiter
from recur.connectors.windows import Window, missing_ranges, plan_windows, verify
from recur.vocabulary import HOUR_MS, Series, VenueError, parse_time

HOURLY = Series("linear", "BTCUSDT", "1h")
START = parse_time("2025-07-01")
REAL = Path(__file__).resolve().parents[2] / "shared" / "data"


def bars(hours: list[int], **columns: list[float | None]) -> pl.DataFrame:
    """A candle frame of flat bars at 100, ``hours`` after START."""
    n = len(hours)
    values: dict[str, list[float | None]] = {name: [100.0] * n for name in ("open", "high", "low", "close")}
    values.update(volume=[1.0] * n, turnover=[100.0] * n)
    values.update(columns)
    opens = pl.Series([START + hour * HOUR_MS for hour in hours], dtype=pl.Int64)
    return pl.DataFrame(
        {
            "open_time": opens.cast(pl.Datetime("ms", "UTC")),
            **{k: pl.Series(v, dtype=pl.Float64) for k, v in values.items()},
        }
    )


def test_missing_ranges_are_what_done_leaves_even_when_done_overlaps_and_is_unsorted() -> None:
    assert missing_ranges(0, 100, [(50, 60), (-10, 10), (55, 70), (95, 120)]) == [(10, 50), (70, 95)]
    assert missing_ranges(0, 100, []) == [(0, 100)]
    assert missing_ranges(0, 100, [(0, 100)]) == []
    assert missing_ranges(0, 100, [(200, 300)]) == [(0, 100)]
    assert missing_ranges(100, 100, []) == []


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50))), st.integers(0, 50), st.integers(0, 50))
def test_missing_and_done_together_cover_each_instant_of_the_range_once(
    done: list[tuple[int, int]], since: int, until: int
) -> None:
    done = [(min(r), max(r)) for r in done]
    covered = {at for start, end in done for at in range(start, end)}
    missing = [at for start, end in missing_ranges(since, until, done) for at in range(start, end)]
    assert missing == [at for at in range(since, until) if at not in covered]


def test_windows_hold_at_most_a_page_and_lie_on_the_grid() -> None:
    since, until = START - 1, START + 2500 * HOUR_MS + 1
    assert plan_windows(HOURLY, since, until) == [
        Window(HOURLY, START, START + 1000 * HOUR_MS, 1000),
        Window(HOURLY, START + 1000 * HOUR_MS, START + 2000 * HOUR_MS, 1000),
        Window(HOURLY, START + 2000 * HOUR_MS, START + 2501 * HOUR_MS, 501),
    ]


def test_windows_leave_out_what_is_done() -> None:
    done = [(START + HOUR_MS, START + 3 * HOUR_MS)]
    found = plan_windows(HOURLY, START, START + 5 * HOUR_MS, done)
    assert [(w.since_ms, w.until_ms, w.expected) for w in found] == [
        (START, START + HOUR_MS, 1),
        (START + 3 * HOUR_MS, START + 5 * HOUR_MS, 2),
    ]


def test_month_windows_follow_the_calendar() -> None:
    monthly = Series("linear", "BTCUSDT", "1M")
    found = plan_windows(monthly, parse_time("2024-01-15"), parse_time("2024-04-02"), limit=2)
    assert found == [
        Window(monthly, parse_time("2024-02-01"), parse_time("2024-04-01"), 2),
        Window(monthly, parse_time("2024-04-01"), parse_time("2024-05-01"), 1),
    ]


def test_week_windows_open_on_monday() -> None:
    weekly = Series("linear", "BTCUSDT", "1w")
    found = plan_windows(weekly, parse_time("2025-07-01"), parse_time("2025-07-21"))
    assert found == [Window(weekly, parse_time("2025-07-07"), parse_time("2025-07-21"), 2)]


def test_verify_sorts_and_names_the_missing_opens() -> None:
    window = Window(HOURLY, START, START + 4 * HOUR_MS, 4)
    rows, missing = verify(window, bars([3, 0, 1]))
    assert rows["open_time"].dt.epoch("ms").to_list() == [START, START + HOUR_MS, START + 3 * HOUR_MS]
    assert missing == [START + 2 * HOUR_MS]


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        (bars([0, 4]), "lies outside what was asked"),
        (bars([-1, 0]), "lies outside what was asked"),
        (bars([0, 1, 1]), "comes twice"),
        (bars([0], high=[99.0]), "has impossible values"),
        (bars([0], low=[101.0]), "has impossible values"),
        (bars([0], close=[None]), "has impossible values"),
        (bars([0], open=[0.0], low=[0.0]), "has impossible values"),
        (bars([0], high=[float("inf")]), "has impossible values"),
        (bars([0], volume=[-1.0]), "has impossible values"),
        (bars([0]).with_columns(pl.col("open_time").dt.offset_by("1m")), "is not on the grid"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_verify_refuses_what_cannot_be(rows: pl.DataFrame, why: str) -> None:
    with pytest.raises(VenueError, match=why):
        verify(Window(HOURLY, START, START + 4 * HOUR_MS, 4), rows)


def test_verify_accepts_flat_bars_without_volume_and_premiums_below_zero() -> None:
    assert (
        verify(Window(HOURLY, START, START + HOUR_MS, 1), bars([0], volume=[0.0], turnover=[None]))[1] == []
    )
    premium = Series("linear", "BTCUSDT", "1h", "premium")
    rows = bars([0], open=[-0.1], high=[0.1], low=[-0.2], close=[0.0], volume=[None], turnover=[None])
    assert verify(Window(premium, START, START + HOUR_MS, 1), rows)[1] == []


@pytest.mark.skipif(not REAL.is_dir(), reason="real candles are not on this machine")
def test_verify_accepts_real_candles_of_the_venue() -> None:
    columns = ["open", "high", "low", "close", "volume"]
    real = pl.read_parquet(REAL / "candles_bybit_perp_1h.parquet")
    time = "open_time" if "open_time" in real.columns else "ts"
    real = real.filter(pl.col("symbol") == real["symbol"][0]).sort(time).head(1000)
    rows = real.select(
        pl.col(time).cast(pl.Datetime("ms")).dt.replace_time_zone("UTC").alias("open_time"),
        *columns,
        pl.lit(None, pl.Float64).alias("turnover"),
    )
    opens = rows["open_time"].dt.epoch("ms")
    window = Window(HOURLY, opens[0], opens[-1] + HOUR_MS, (opens[-1] - opens[0]) // HOUR_MS + 1)
    assert verify(window, rows)[0].height == 1000


class Clock:
    """Seconds that pass only by sleeping."""

    def __init__(self) -> None:
        self.now = 0.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(round(seconds, 6))
        self.now += seconds


def test_the_bucket_gives_a_burst_and_then_the_rate() -> None:
    clock = Clock()
    bucket = RateLimiter(10.0, burst=3, clock=clock, sleep=clock.sleep)
    waits = [round(bucket.take(), 6) for _ in range(6)]
    assert waits == [0.0, 0.0, 0.0, 0.1, 0.1, 0.1]


def test_the_default_bucket_stays_below_600_requests_in_any_5_seconds() -> None:
    clock = Clock()
    bucket = RateLimiter(clock=clock, sleep=clock.sleep)
    sent = []
    for _ in range(2000):
        bucket.take()
        sent.append(clock.now)
    assert max(sum(at <= other < at + 5 for other in sent) for at in sent[::50]) <= 520


def test_a_pause_holds_everyone_back_and_gives_no_burst_afterwards() -> None:
    clock = Clock()
    bucket = RateLimiter(10.0, burst=3, clock=clock, sleep=clock.sleep)
    bucket.pause(2.0)
    assert round(bucket.take(), 6) == 2.1
    assert round(bucket.take(), 6) == 0.1


def test_slowing_down_halves_the_rate_to_a_floor() -> None:
    bucket = RateLimiter(3.0, burst=1)
    bucket.slow_down()
    assert bucket.rate_per_s == 1.5
    bucket.slow_down()
    assert bucket.rate_per_s == 1.0
