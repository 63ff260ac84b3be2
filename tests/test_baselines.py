"""The naive forecasters: causal, fitted on the past alone, and equal to slow loops."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from recur.pipeline.baselines import (
    BASELINES,
    HAR_WINDOWS,
    LAMBDAS,
    ewma_variance,
    fit_ewma,
    fit_har,
    fit_random_walk,
    har_regressors,
    symmetric_quantiles,
)
from recur.pipeline.dataset import SeriesArrays
from recur.vocabulary import DAY_MS, HOUR_MS, DataMissing

Floats = NDArray[np.float64]
HORIZONS = (1, 6)
ABS_LEVELS = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]


def _series(
    returns: Floats,
    gk: Floats | None = None,
    *,
    horizons: Sequence[int] = HORIZONS,
    missing: Sequence[int] = (),
    step: int = HOUR_MS,
) -> SeriesArrays:
    """A series whose bar t returns ``returns[t]``; no season, unit scale, bars at ``missing`` absent."""
    n = len(returns)
    level = np.cumsum(returns)
    level[list(missing)] = np.nan
    variance = returns**2 if gk is None else gk.copy()
    variance[list(missing)] = np.nan
    target = np.full((n, len(horizons)), np.nan)
    for i, h in enumerate(horizons):
        for t in range(n - h):
            target[t, i] = level[t + h] - level[t]
    opens = np.arange(n, dtype=np.int64) * step
    return SeriesArrays(
        unique_id="s",
        symbol="BTCUSDT",
        open_ms=opens,
        close_ms=opens + step,
        close=np.exp(level),
        observed=np.isfinite(level),
        r=np.concatenate([[np.nan], np.diff(level)]),
        gk=variance,
        season=np.ones(n),
        season_ahead=np.tile(np.array(horizons, dtype=np.float64), (n, 1)),
        x=np.zeros((n, 1), dtype=np.float32),
        scale=np.ones((n, len(horizons))),
        target=target,
    )


def _market(n: int = 600, seed: int = 0, missing: Sequence[int] = (100, 101, 250)) -> SeriesArrays:
    rng = np.random.default_rng(seed)
    sigma = 0.01 * np.exp(np.cumsum(rng.normal(0, 0.05, n)) * 0.5)
    return _series(rng.normal(0, sigma), sigma**2 * rng.chisquare(4, n) / 4, missing=missing)


def _poisoned(series: SeriesArrays, after: int) -> SeriesArrays:
    """Everything that is known only after the close of bar ``after`` is replaced by something wild."""
    rng = np.random.default_rng(9)
    n = len(series.close)
    late = np.arange(n) > after
    target = series.target.copy()
    for i, h in enumerate(HORIZONS):
        target[np.arange(n) + h > after, i] = 1e3
    wild = rng.uniform(10, 1000, n)
    return replace(
        series,
        close=np.where(late, wild, series.close),
        r=np.where(late, wild, series.r),
        gk=np.where(late, wild, series.gk),
        target=target,
    )


def test_symmetric_quantiles_mirror_the_quantiles_of_the_size_about_zero() -> None:
    got = symmetric_quantiles(np.arange(1.0, 10.0))
    assert got.tolist() == [-9, -8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9]


@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(st.floats(0, 10), min_size=1, max_size=40))
def test_symmetric_quantiles_never_cross(sizes: list[float]) -> None:
    got = symmetric_quantiles(np.quantile(np.array(sizes), ABS_LEVELS)[None])
    assert (np.diff(got, axis=-1) >= 0).all()
    assert (got == -got[:, ::-1]).all()


@settings(max_examples=60, deadline=None)
@given(
    r=st.lists(st.one_of(st.floats(-0.1, 0.1), st.just(float("nan"))), max_size=40),
    decay=st.sampled_from(LAMBDAS),
)
def test_ewma_variance_equals_a_slow_loop_that_skips_missing_bars(r: list[float], decay: float) -> None:
    total = weight = 0.0
    expected = []
    for value in r:
        if math.isfinite(value):
            total, weight = decay * total + value**2, decay * weight + 1
        expected.append(max(total / weight, 1e-10) if weight else math.nan)
    assert ewma_variance(np.array(r, dtype=np.float64), decay) == pytest.approx(
        expected, nan_ok=True, rel=1e-9
    )


@pytest.mark.parametrize("name", BASELINES)
@settings(max_examples=12, deadline=None)
@given(after=st.integers(50, 590))
def test_nothing_after_a_bar_alters_a_forecast_up_to_it_by_a_bit(name: str, after: int) -> None:
    series = _market()
    forecast = BASELINES[name]([series], HORIZONS, 500 * HOUR_MS)
    clean, dirty = forecast(series), forecast(_poisoned(series, after))
    assert clean.quantiles[: after + 1].tobytes() == dirty.quantiles[: after + 1].tobytes()
    assert clean.vol[: after + 1].tobytes() == dirty.vol[: after + 1].tobytes()


@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_is_fitted_only_on_labels_that_end_by_the_end_of_the_training_span(name: str) -> None:
    series, other = _market(), _market(seed=1)
    last = 399  # closes at 400 h
    clean = BASELINES[name]([series], HORIZONS, 400 * HOUR_MS)(other)
    dirty = BASELINES[name]([_poisoned(series, last)], HORIZONS, 400 * HOUR_MS)(other)
    assert clean.quantiles.tobytes() == dirty.quantiles.tobytes()
    assert clean.vol.tobytes() == dirty.vol.tobytes()
    if name != "random_walk":  # the label that ends just at the end does count
        touched = BASELINES[name]([_poisoned(series, last - 1)], HORIZONS, 400 * HOUR_MS)(other)
        assert clean.quantiles.tobytes() != touched.quantiles.tobytes()


@pytest.mark.parametrize("name", BASELINES)
def test_quantiles_are_finite_ordered_symmetric_and_of_the_documented_shape(name: str) -> None:
    series = _market()
    got = BASELINES[name]([series, _market(seed=2)], HORIZONS, 500 * HOUR_MS)(series)
    assert got.quantiles.shape == (600, 2, 19) and got.vol.shape == (600, 2)
    late = got.quantiles[300:]
    assert np.isfinite(late).all() and (got.vol[300:] > 0).all()
    assert (np.diff(late, axis=-1) >= 0).all()
    assert (late == -late[..., ::-1]).all()


@pytest.mark.parametrize("name", ["ewma", "har"])
def test_fitted_bands_hold_their_share_of_the_training_labels(name: str) -> None:
    series = _market(n=2000, missing=())
    got = BASELINES[name]([series], HORIZONS, 2000 * HOUR_MS)(series)
    for i in range(2):
        y, q = series.target[200:1990, i], got.quantiles[200:1990, i]
        assert np.mean((y >= q[:, 0]) & (y <= q[:, 18])) == pytest.approx(0.9, abs=0.015)
        assert np.mean((y >= q[:, 4]) & (y <= q[:, 14])) == pytest.approx(0.5, abs=0.03)
        assert np.mean(y**2 / got.vol[200:1990, i] ** 2) == pytest.approx(1.0, abs=0.1)


def test_random_walk_takes_quantiles_of_the_completed_returns_of_the_last_90_days() -> None:
    rng = np.random.default_rng(3)
    returns = rng.normal(0, 0.01, 200)
    horizons = (1, 3)
    series = _series(returns, horizons=horizons, step=DAY_MS)
    got = fit_random_walk([], horizons, 0)(series)
    level = np.cumsum(returns)
    for t in (40, 150, 199):
        for i, h in enumerate(horizons):
            sizes = [abs(level[s] - level[s - h]) for s in range(h, t + 1)][-90:]
            assert got.quantiles[t, i, 10:] == pytest.approx(np.quantile(sizes, ABS_LEVELS), rel=1e-9)
            assert got.vol[t, i] == pytest.approx(math.sqrt(np.mean(np.square(sizes))), rel=1e-9)


def test_random_walk_waits_for_thirty_completed_returns() -> None:
    got = fit_random_walk([], (1,), 0)(_series(np.full(50, 0.01), horizons=(1,)))
    assert np.flatnonzero(np.isfinite(got.vol[:, 0]))[0] == 31  # 30 + h of them, the first at bar 1
    assert np.isnan(got.quantiles[30]).all()


def test_random_walk_survives_a_market_that_falls_asleep() -> None:
    rng = np.random.default_rng(0)
    returns = np.concatenate([rng.normal(size=100) * 10.0 ** rng.integers(-6, 1, 100), np.zeros(200)])
    got = fit_random_walk([], (1,), 0)(_series(returns, horizons=(1,), step=DAY_MS))
    assert np.isfinite(got.vol[31:]).all()
    assert got.vol[-1, 0] == pytest.approx(1e-5)


def test_ewma_finds_the_decay_that_made_the_data() -> None:
    rng = np.random.default_rng(5)
    n, decay = 6000, 0.9
    variance, returns = 1e-4, np.zeros(n)
    for t in range(n):
        returns[t] = math.sqrt(variance) * rng.normal()
        variance = max(decay * variance + (1 - decay) * returns[t] ** 2, 1e-6)
    series = _series(returns, horizons=(1,))
    got = fit_ewma([series], (1,), n * HOUR_MS)(series).vol[500:, 0]
    sigma = {d: np.sqrt(ewma_variance(series.r, d))[500:] for d in LAMBDAS}
    ratio = {d: np.std(np.log(got / s)) for d, s in sigma.items()}
    assert min(ratio, key=lambda d: ratio[d]) in (0.9, 0.94)
    assert min(ratio.values()) < 1e-9


def test_har_recovers_the_coefficients_that_made_the_data() -> None:
    true = np.array([0.35, 0.25, 0.2, 0.05, 0.05])
    intercept = -9 * (1 - true.sum())

    def generated(seed: int, n: int = 6000) -> SeriesArrays:
        rng = np.random.default_rng(seed)
        gk, total = np.full(n, np.exp(-9.0)), np.zeros(n + 1)
        for t in range(n):
            if t:
                means = [(total[t] - total[max(0, t - w)]) / min(t, w) for w in HAR_WINDOWS]
                gk[t] = np.exp(intercept + true @ np.log(means) + 0.4 * rng.normal())
            total[t + 1] = total[t] + gk[t]
        return _series(np.sqrt(gk) * rng.normal(size=n), gk, horizons=(1,))

    series = generated(0)
    got = fit_har([series, generated(1)], (1,), 6000 * HOUR_MS)(series)
    x = har_regressors(series)
    keep = np.isfinite(x).all(axis=1)
    beta = np.linalg.lstsq(x[keep], 2 * np.log(got.vol[keep, 0]), rcond=None)[0]
    assert beta[1:4] == pytest.approx(true[:3], abs=0.06)
    assert beta[4:].sum() == pytest.approx(0.1, abs=0.08)
    assert np.mean(series.target[800:-1, 0] ** 2 / got.vol[800:-1, 0] ** 2) == pytest.approx(1, abs=0.06)


def test_har_regressors_are_logs_of_trailing_means_without_the_season() -> None:
    series = _series(np.zeros(60), np.arange(1.0, 61.0))
    series = replace(series, season=np.full(60, 2.0))
    x = har_regressors(series)
    assert x[59, :4] == pytest.approx([1, math.log(60 / 2), math.log(57.5 / 2), math.log(48.5 / 2)])
    assert x[59, 4] == x[59, 5] == pytest.approx(math.log(30.5 / 2))  # longer windows take what there is
    assert np.isnan(x[46, 4]) and np.isfinite(x[47]).all()  # from 48 bars on


def test_har_puts_the_season_of_the_hours_ahead_back() -> None:
    series = _market()
    forecast = fit_har([series], HORIZONS, 500 * HOUR_MS)
    louder = replace(series, season_ahead=4 * series.season_ahead)
    assert forecast(louder).vol[300:] == pytest.approx(2 * forecast(series).vol[300:])


@pytest.mark.parametrize("name", BASELINES)
def test_a_market_that_never_moves_gets_zero_quantiles_and_the_smallest_vol(name: str) -> None:
    series = _series(np.zeros(300))
    got = BASELINES[name]([series], HORIZONS, 250 * HOUR_MS)(series)
    assert (got.quantiles[100:] == 0).all()
    assert got.vol[100:] == pytest.approx(1e-5)


@pytest.mark.parametrize("name", ["ewma", "har"])
def test_two_hundred_daily_bars_are_enough_to_fit_on(name: str) -> None:
    rng = np.random.default_rng(8)
    series = _series(rng.normal(0, 0.02, 200), step=DAY_MS)
    got = BASELINES[name]([series], HORIZONS, 200 * DAY_MS)(series)
    assert np.isfinite(got.quantiles[60:]).all()


@pytest.mark.parametrize("name", ["ewma", "har"])
def test_a_training_span_without_a_complete_label_is_refused_with_a_hint(name: str) -> None:
    with pytest.raises(DataMissing, match="no complete label") as caught:
        BASELINES[name]([_market()], HORIZONS, 0)
    assert "longer history" in caught.value.hint


@pytest.mark.parametrize("name", BASELINES)
def test_a_very_short_series_has_shapes_and_no_error(name: str) -> None:
    forecast = BASELINES[name]([_market()], HORIZONS, 500 * HOUR_MS)
    for bars in (1, 2, 6):
        got = forecast(_series(np.full(bars, 0.01)))
        assert got.quantiles.shape == (bars, 2, 19) and got.vol.shape == (bars, 2)
