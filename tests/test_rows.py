"""Forecasts in the public long form."""

from __future__ import annotations

import json
from datetime import UTC, datetime

import numpy as np
import polars as pl
import pytest

from recur.pipeline.dataset import SeriesArrays
from recur.pipeline.inference import Forecast
from recur.pipeline.rows import QUANTILE_NAMES, SCHEMA, forecast_rows, json_rows, prob_up
from recur.vocabulary import HOUR_MS, parse_time

START = parse_time("2025-01-01")
GRID = np.arange(-9.0, 10.0)


def _forecast(close_ms: list[int], index: list[int]) -> Forecast:
    n = len(close_ms)
    closes = np.array(close_ms, dtype=np.int64)
    series = SeriesArrays(
        unique_id="bybit:linear:BTCUSDT:1h",
        symbol="BTCUSDT",
        open_ms=closes - HOUR_MS,
        close_ms=closes,
        close=np.arange(n, dtype=np.float64) + 100,
        observed=np.ones(n, dtype=np.bool_),
        r=np.zeros(n),
        gk=np.zeros(n),
        season=np.ones(n),
        season_ahead=np.ones((n, 2)),
        x=np.zeros((n, 1), dtype=np.float32),
        scale=np.ones((n, 2)),
        target=np.where(np.arange(n)[:, None] < n - 1, [0.25, 0.5], np.nan),
    )
    k = len(index)
    quantiles = np.stack([np.tile(0.01 * GRID, (k, 1)), np.tile(0.02 * GRID + 0.01, (k, 1))], axis=1)
    return Forecast(
        series,
        np.array(index, dtype=np.int64),
        quantiles,
        np.tile([0.0, 0.01], (k, 1)),
        np.tile([0.06, 0.12], (k, 1)),
    )


def test_quantile_columns_are_named_by_their_percent() -> None:
    assert QUANTILE_NAMES[:3] == ("q05", "q10", "q15") and QUANTILE_NAMES[-1] == "q95"
    assert len(QUANTILE_NAMES) == 19


def test_one_row_per_series_cutoff_and_horizon_with_every_column() -> None:
    made = _forecast([START, START + HOUR_MS, START + 2 * HOUR_MS], [1, 2])
    frame = forecast_rows([made], (1, 6), "1h", "gru", "run-1")
    assert frame.schema == SCHEMA
    rows = json_rows(frame)
    assert [(r["cutoff"], r["horizon"], r["ds"]) for r in rows] == [
        ("2025-01-01T01:00:00Z", 1, "2025-01-01T02:00:00Z"),
        ("2025-01-01T02:00:00Z", 1, "2025-01-01T03:00:00Z"),
        ("2025-01-01T01:00:00Z", 6, "2025-01-01T07:00:00Z"),
        ("2025-01-01T02:00:00Z", 6, "2025-01-01T08:00:00Z"),
    ]
    assert [r["actual"] for r in rows] == [0.25, None, 0.5, None]
    assert [r["close"] for r in rows] == [101.0, 102.0, 101.0, 102.0]
    assert [r["vol"] for r in rows] == [0.06, 0.06, 0.12, 0.12]
    assert [r["mean"] for r in rows] == [0.0, 0.0, 0.01, 0.01]
    assert [round(r["q05"], 9) for r in rows] == [-0.09, -0.09, -0.17, -0.17]
    assert [round(r["q95"], 9) for r in rows] == [0.09, 0.09, 0.19, 0.19]
    assert [round(r["prob_up"], 9) for r in rows] == [0.5, 0.5, 0.525, 0.525]
    assert {(r["unique_id"], r["model"], r["run_id"]) for r in rows} == {
        ("bybit:linear:BTCUSDT:1h", "gru", "run-1")
    }


def test_month_bars_end_on_calendar_months() -> None:
    made = _forecast([parse_time("2024-02-01"), parse_time("2024-12-01")], [0, 1])
    frame = forecast_rows([made], (1, 3), "1M", "gru", "run-1")
    assert [r["ds"] for r in json_rows(frame)] == [
        "2024-03-01T00:00:00Z",
        "2025-01-01T00:00:00Z",
        "2024-05-01T00:00:00Z",
        "2025-03-01T00:00:00Z",
    ]


@pytest.mark.parametrize("made", [[], [_forecast([START], [])]])
def test_no_forecast_gives_an_empty_frame_of_the_same_columns(made: list[Forecast]) -> None:
    frame = forecast_rows(made, (1, 6), "1h", "gru", "run-1")
    assert frame.height == 0 and frame.schema == SCHEMA
    some = forecast_rows([_forecast([START], [0])], (1, 6), "1h", "gru", "run-1")
    assert pl.concat([frame, some]).height == 2


def test_prob_up_is_one_minus_the_law_at_zero() -> None:
    quantiles = np.stack([GRID, GRID + 1, GRID - 0.5, GRID + 9, GRID + 9.5, GRID - 9.5])
    assert prob_up(quantiles) == pytest.approx([0.5, 0.55, 0.475, 0.95, 0.975, 0.025])


def test_prob_up_of_a_law_that_is_all_zero_is_a_half() -> None:
    assert prob_up(np.zeros((1, 19))) == pytest.approx([0.5])


def test_json_rows_hold_iso_times_and_null_for_what_json_has_no_number() -> None:
    frame = pl.DataFrame(
        {
            "time": [datetime(2025, 7, 1, 12, 0, 0, 250_000, tzinfo=UTC)],
            "nan": [float("nan")],
            "infinite": [float("inf")],
            "number": [1.5],
            "count": [3],
            "name": ["x"],
            "absent": pl.Series([None], dtype=pl.Float64),
        },
        schema_overrides={"time": pl.Datetime("ms", "UTC")},
    )
    rows = json_rows(frame)
    assert json.loads(json.dumps(rows, allow_nan=False)) == [
        {
            "time": "2025-07-01T12:00:00.250Z",
            "nan": None,
            "infinite": None,
            "number": 1.5,
            "count": 3,
            "name": "x",
            "absent": None,
        }
    ]
