"""Features are causal, named, and the same in training and serving."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recur.pipeline.dataset import (
    RawSeries,
    arrays,
    fit_transform,
    label_mask,
    make_split,
    raw_series,
    realised_inside,
    regular_frame,
)
from recur.pipeline.features import FeatureTransform, catalogue, week_positions
from recur.vocabulary import DAY_MS, HOUR_MS, from_ms, parse_time
from tests.market import candles, funding_frame

HORIZONS = (1, 6, 24)
START = parse_time("2025-01-01")


def _series(bars: int = 900, seed: int = 3, holes: bool = True) -> list[RawSeries]:
    frame = pl.concat(
        [candles("BTCUSDT", START, bars, seed=seed), candles("ETHUSDT", START, bars, seed=seed + 1)]
    )
    if holes:
        opens = pl.col("open_time").dt.epoch("ms")
        frame = frame.filter(~opens.is_between(START + 300 * HOUR_MS, START + 309 * HOUR_MS))
    return raw_series(frame, "store", funding_frame("BTCUSDT", START, 40))


@pytest.fixture(scope="module")
def fitted() -> tuple[list[RawSeries], FeatureTransform]:
    series = _series()
    return series, fit_transform(series, "1h", HORIZONS, START + 600 * HOUR_MS)


def test_there_are_at_least_24_features_each_with_a_lookback() -> None:
    features = catalogue("1h", HORIZONS, np.ones(168), has_fine=False)
    assert len(features) == 54
    assert len({f.name for f in features}) == 54
    assert all(f.lookback >= 1 for f in features)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(min_value=30, max_value=880), poison=st.booleans())
def test_truncating_or_poisoning_what_comes_after_a_bar_leaves_every_feature_up_to_it_bit_identical(
    fitted: tuple[list[RawSeries], FeatureTransform], cut: int, poison: bool
) -> None:
    series, transform = fitted
    until = from_ms(START + cut * HOUR_MS)
    values = ("open", "high", "low", "close", "volume", "turnover", "funding")
    changed = []
    for s in series:
        if poison:
            late = pl.col("close_time") > until
            frame = s.frame.with_columns(
                *(pl.when(late).then(pl.col(c) * 1e3 + 7).otherwise(pl.col(c)).alias(c) for c in values)
            )
        else:
            frame = s.frame.filter(pl.col("close_time") <= until)
        changed.append(RawSeries(s.unique_id, s.symbol, s.group, frame))
    whole, other = arrays(series, transform), arrays(changed, transform)
    for a, b in zip(whole, other, strict=True):
        rows = int((a.close_ms <= START + cut * HOUR_MS).sum())
        assert rows == int((b.close_ms <= START + cut * HOUR_MS).sum())
        assert np.array_equal(a.x[:rows], b.x[:rows])
        assert np.array_equal(a.scale[:rows], b.scale[:rows], equal_nan=True)


def test_season_and_scaler_do_not_see_what_comes_after_the_training_span() -> None:
    series = _series()
    until = START + 600 * HOUR_MS
    poisoned = [
        RawSeries(
            s.unique_id,
            s.symbol,
            s.group,
            s.frame.with_columns(
                *(
                    pl.when(pl.col("close_time") > from_ms(until))
                    .then(pl.col(c) * 50)
                    .otherwise(pl.col(c))
                    .alias(c)
                    for c in ("open", "high", "low", "close", "volume")
                )
            ),
        )
        for s in series
    ]
    a = fit_transform(series, "1h", HORIZONS, until)
    b = fit_transform(poisoned, "1h", HORIZONS, until)
    assert np.array_equal(a.season, b.season)
    assert np.array_equal(a.mean, b.mean)
    assert np.array_equal(a.std, b.std)


def test_a_missing_bar_stays_missing_and_is_masked(fitted: tuple[list[RawSeries], FeatureTransform]) -> None:
    series, transform = fitted
    data = arrays(series, transform)[0]
    assert not data.observed[300:310].any()
    assert data.observed[:300].all()
    assert np.isnan(data.close[300:310]).all()
    assert np.isfinite(data.x).all()
    assert np.isnan(data.target[299, 0])  # the bar one ahead is missing
    assert np.isnan(data.target[300:310]).all()


def test_the_features_of_a_transform_read_back_from_json_are_identical(
    fitted: tuple[list[RawSeries], FeatureTransform],
) -> None:
    series, transform = fitted
    again = FeatureTransform.from_dict(transform.as_dict())
    for a, b in zip(arrays(series, transform), arrays(series, again), strict=True):
        assert np.array_equal(a.x, b.x)


def test_the_newest_row_does_not_depend_on_history_older_than_the_declared_lookback() -> None:
    series = _series(bars=6000, holes=False)
    transform = fit_transform(series, "1h", HORIZONS, START + 3000 * HOUR_MS)
    keep = transform.lookback
    short = [RawSeries(s.unique_id, s.symbol, s.group, s.frame.tail(keep)) for s in series]
    for a, b in zip(arrays(series, transform), arrays(short, transform), strict=True):
        np.testing.assert_allclose(a.x[-1], b.x[-1], atol=2e-4)


def test_funding_is_known_from_its_settlement_on_and_not_before() -> None:
    frame = raw_series(
        candles("BTCUSDT", START, 48), "store", funding_frame("BTCUSDT", START + 8 * HOUR_MS, 3)
    )[0].frame
    # The bar that opens at 07:00 closes at 08:00, the instant of settlement.
    assert frame["funding"][6] is None
    assert frame["funding"][7] == pytest.approx(0.0001)
    assert frame["funding"][15] == pytest.approx(0.0002)


def test_targets_are_log_returns_over_the_horizon() -> None:
    series = raw_series(candles("BTCUSDT", START, 60), "store")
    transform = fit_transform(series, "1h", (1, 6), START + 60 * HOUR_MS)
    data = arrays(series, transform)[0]
    close = series[0].frame["close"].to_numpy()
    assert data.target[10, 0] == pytest.approx(np.log(close[11] / close[10]), abs=1e-15)
    assert data.target[10, 1] == pytest.approx(np.log(close[16] / close[10]), abs=1e-15)
    assert np.isnan(data.target[-1, 0])


def test_a_label_counts_only_when_it_ends_inside_its_span() -> None:
    series = raw_series(candles("BTCUSDT", START, 100), "store")
    data = arrays(series, fit_transform(series, "1h", (1, 24), START + 100 * HOUR_MS))[0]
    until = START + 50 * HOUR_MS
    mask = label_mask(data, (1, 24), START + 10 * HOUR_MS, until)
    closes = data.close_ms
    assert closes[mask[:, 0]].min() == START + 10 * HOUR_MS
    assert closes[mask[:, 0]].max() == until - HOUR_MS
    assert closes[mask[:, 1]].max() == until - 24 * HOUR_MS


def test_train_validation_and_test_are_in_order_with_a_gap_of_one_longest_horizon_between_them() -> None:
    split = make_split(parse_time("2025-07-01"), parse_time("2025-08-01"), 60, DAY_MS)
    assert split.as_dict() == {
        "train_until": "2025-04-30T00:00:00Z",
        "val_since": "2025-05-01T00:00:00Z",
        "val_until": "2025-06-30T00:00:00Z",
        "test_since": "2025-07-01T00:00:00Z",
        "test_until": "2025-08-01T00:00:00Z",
    }


def test_finer_bars_give_realised_variance_inside_the_bar_and_an_incomplete_bar_gives_none() -> None:
    fine = candles("BTCUSDT", START, 8, interval="15m")
    made = realised_inside(fine.head(7), "1h")
    assert made.height == 1
    r = np.log(fine["close"].to_numpy()[:4] / fine["open"].to_numpy()[:4])
    assert made["fine_rv"][0] == pytest.approx(float((r**2).sum()), rel=1e-12)


def test_a_series_may_have_finer_bars_as_inputs() -> None:
    coarse, fine = candles("BTCUSDT", START, 200), candles("BTCUSDT", START, 800, interval="15m")
    series = raw_series(coarse, "store", None, fine)
    transform = fit_transform(series, "1h", (1,), START + 200 * HOUR_MS, has_fine=True)
    assert {"fine_1", "fine_6", "fine_24", "fine_down_share", "fine_jump_share"} <= set(transform.names)
    assert np.isfinite(arrays(series, transform)[0].x).all()


@pytest.mark.parametrize(
    ("interval", "positions"), [("1h", 168), ("15m", 672), ("1d", 7), ("1w", 1), ("1M", 1)]
)
def test_the_week_has_this_many_positions(interval: str, positions: int) -> None:
    assert week_positions(interval) == positions


@pytest.mark.parametrize("interval", ["5m", "4h", "1d", "1w", "1M"])
def test_every_interval_has_features(interval: str) -> None:
    series = raw_series(candles("BTCUSDT", parse_time("2018-01-01"), 90, interval=interval), "store")
    transform = fit_transform(series, interval, (1, 3), parse_time("2025-06-01"))
    data = arrays(series, transform)[0]
    assert data.x.shape == (90, len(transform.names))
    assert np.isfinite(data.x).all()


def test_a_market_that_does_not_move_has_finite_features_and_a_positive_scale() -> None:
    frame = candles("BTCUSDT", START, 300).with_columns(
        *(pl.lit(100.0).alias(c) for c in ("open", "high", "low", "close")), pl.lit(0.0).alias("volume")
    )
    series = raw_series(frame, "store")
    data = arrays(series, fit_transform(series, "1h", HORIZONS, START + 300 * HOUR_MS))[0]
    assert np.isfinite(data.x).all()
    assert (data.scale > 0).all()


def test_the_grid_of_a_series_is_regular_whatever_is_missing() -> None:
    frame = candles("BTCUSDT", START, 50)
    holed = frame.filter(pl.int_range(pl.len()) % 7 != 3)
    out = regular_frame(holed, "1h")
    assert out.height == 50
    assert out["observed"].sum() == holed.height
