"""Scores against values worked out by hand, slow references, and the laws they must obey."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats
from scipy.signal import lfilter

from recur.pipeline.metrics import (
    LEVELS,
    auc,
    by_cutoff,
    correlation,
    coverage,
    crps,
    diebold_mariano,
    pinball,
    pit,
    pit_ks,
    qlike,
    rank_correlation,
    skill_interval,
)

Floats = NDArray[np.float64]
SMALL = st.floats(-1, 1, allow_subnormal=False)
ONE_TO_19: Floats = np.arange(1.0, 20.0)


def _same(values: list[float], quantiles: Floats) -> tuple[Floats, Floats]:
    return np.array(values), np.tile(quantiles, (len(values), 1))


def test_levels_are_every_five_percent_from_5_to_95() -> None:
    assert LEVELS.tolist() == [
        0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5,
        0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95,
    ]  # fmt: skip


def test_pinball_and_crps_of_a_point_forecast_are_half_and_all_of_the_absolute_error() -> None:
    y, q = np.array([0.0, 3.0]), np.ones((2, 19))
    assert pinball(y, q) == pytest.approx([0.5, 1.0])
    assert crps(y, q) == pytest.approx([1.0, 2.0])


def test_pinball_weighs_an_outcome_above_a_quantile_by_its_level() -> None:
    q = np.zeros((1, 19))
    q[0, 18] = 1.0  # only the 95 % quantile is off: y = 0 lies one below it, loss 0.05
    assert pinball(np.array([0.0]), q)[0] == pytest.approx(0.05 / 19)
    q[0, 18] = -1.0  # y = 0 lies one above it, loss 0.95
    assert pinball(np.array([0.0]), q)[0] == pytest.approx(0.95 / 19)


@settings(max_examples=60, deadline=None)
@given(
    y=st.lists(SMALL, min_size=1, max_size=30),
    shift=st.lists(SMALL, min_size=19, max_size=19),
)
def test_no_other_quantiles_have_a_smaller_pinball_loss_than_the_true_ones(
    y: list[float], shift: list[float]
) -> None:
    outcomes = np.array(y)
    true = np.quantile(outcomes, LEVELS, method="inverted_cdf")
    best = pinball(*_same(y, true)).mean()
    assert best <= pinball(*_same(y, true + np.array(shift))).mean() + 1e-12


@settings(max_examples=60, deadline=None)
@given(y=SMALL, quantiles=st.lists(SMALL, min_size=19, max_size=19))
def test_crps_is_never_negative(y: float, quantiles: list[float]) -> None:
    assert crps(np.array([y]), np.sort(np.array(quantiles))[None])[0] >= 0


def test_coverage_counts_outcomes_inside_the_central_band_with_its_bounds() -> None:
    assert coverage(*_same([4, 5, 10, 15, 16], ONE_TO_19), 0.5) == 0.6
    assert coverage(*_same([0, 1, 19, 20], ONE_TO_19), 0.9) == 0.5


def test_pit_is_linear_between_quantiles_and_held_outside_them() -> None:
    got = pit(*_same([0, 1, 1.5, 10, 18.5, 19, 20], ONE_TO_19))
    assert got == pytest.approx([0.025, 0.05, 0.075, 0.5, 0.925, 0.95, 0.975])


def test_pit_of_a_point_mass_is_the_middle_of_its_levels() -> None:
    law = np.concatenate([np.full(4, -1.0), np.zeros(11), np.full(4, 1.0)])
    assert pit(*_same([-1, 0, 0.5, 1], law)) == pytest.approx([0.125, 0.5, 0.775, 0.875])
    assert pit(np.zeros(1), np.zeros((1, 19))) == pytest.approx([0.5])


def test_pit_is_uniform_when_the_forecast_is_the_true_law() -> None:
    rng = np.random.default_rng(1)
    sigma = np.exp(rng.normal(size=40_000))
    y, q = sigma * rng.normal(size=40_000), sigma[:, None] * stats.norm.ppf(LEVELS)
    got = pit(y, q)
    shares = (got[:, None] <= LEVELS).mean(axis=0)
    assert np.abs(shares - LEVELS).max() < 0.01
    assert np.abs((got[:, None] <= LEVELS[:-1] + 0.025).mean(axis=0) - LEVELS[:-1] - 0.025).max() < 0.01
    assert pit_ks(y, q) < 0.01
    assert coverage(y, q, 0.9) == pytest.approx(0.9, abs=0.01)


def test_pit_ks_is_the_largest_gap_between_shares_and_levels() -> None:
    assert pit_ks(*_same([0.0, 0.0], ONE_TO_19)) == pytest.approx(0.95)  # all below the 5 % quantile
    assert pit_ks(*_same([0.5, 10.5], ONE_TO_19)) == pytest.approx(0.45)  # half are below it


def test_pit_ks_holds_nothing_against_a_law_that_knows_of_its_point_mass() -> None:
    assert pit_ks(np.zeros(5), np.zeros((5, 19))) == 0.0


def test_qlike_is_log_variance_plus_squared_return_over_variance() -> None:
    assert qlike(np.array([2.0, 0.0]), np.array([2.0, 1.0])) == pytest.approx([math.log(4) + 1, 0.0])


@settings(max_examples=40, deadline=None)
@given(factor=st.floats(0.2, 5))
def test_qlike_is_smallest_at_the_true_variance(factor: float) -> None:
    y = np.array([0.01, -0.03, 0.02])
    true = np.full(3, math.sqrt(np.mean(y**2)))
    assert qlike(y, true).mean() <= qlike(y, factor * true).mean() + 1e-12


def test_correlations_have_their_textbook_values() -> None:
    x, y = np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.0, 4.0, 9.0, 16.0])
    assert correlation(x, y) == pytest.approx(25 / math.sqrt(5 * 129), rel=1e-12)
    assert rank_correlation(x, y) == pytest.approx(1.0)
    assert rank_correlation(np.array([1.0, 3.0, 2.0]), np.array([1.0, 2.0, 3.0])) == pytest.approx(0.5)


@pytest.mark.parametrize("score", [correlation, rank_correlation, auc])
def test_a_forecast_that_does_not_vary_has_no_correlation_and_no_auc(score: object) -> None:
    assert callable(score)
    assert score(np.full(4, 0.5), np.array([1.0, -1.0, 2.0, -2.0])) is None
    assert score(np.arange(4.0), np.zeros(4)) is None


def test_auc_counts_ties_half_and_leaves_unmoved_bars_out() -> None:
    forecast, y = np.array([1.0, 2.0, 3.0, 3.0, 9.0]), np.array([-1.0, 1.0, -1.0, 1.0, 0.0])
    assert auc(forecast, y) == pytest.approx(2.5 / 4)


def test_by_cutoff_averages_the_series_of_an_instant_in_order_of_time() -> None:
    assert by_cutoff(np.array([20, 10, 20]), np.array([1.0, 5.0, 3.0])).tolist() == [5.0, 2.0]


def _slow_dm(d: list[float], horizon: int, min_lag: int) -> tuple[float, float]:
    n = len(d)
    lag = min(max(min_lag, 3 * horizon, math.ceil(1.3 * math.sqrt(n))), n // 4)
    mean = math.fsum(d) / n
    variance = math.fsum((v - mean) ** 2 for v in d) / n
    for k in range(1, lag + 1):
        gamma = math.fsum((d[t] - mean) * (d[t - k] - mean) for t in range(k, n)) / n
        variance += 2 * (1 - k / (lag + 1)) * gamma
    h = min(horizon, n // 2)
    harvey = math.sqrt((n + 1 - 2 * h + h * (h - 1) / n) / n)
    statistic = harvey * mean / math.sqrt(variance / n)
    b = (lag + 1) / n
    critical = 1.96 + 2.9694 * b + 0.4160 * b**2 - 0.5324 * b**3
    return statistic, 2 * float(stats.t.sf(abs(statistic) * 1.96 / critical, n - 1))


@pytest.mark.parametrize(("n", "horizon", "min_lag"), [(30, 1, 24), (200, 24, 0), (500, 6, 24), (330, 80, 3)])
def test_diebold_mariano_equals_a_slow_textbook_loop(n: int, horizon: int, min_lag: int) -> None:
    rng = np.random.default_rng(n)
    d = lfilter([1.0], [1.0, -0.6], rng.normal(0.1, 1, n))
    assert diebold_mariano(d, horizon, min_lag) == pytest.approx(
        _slow_dm(d.tolist(), horizon, min_lag), rel=1e-9
    )


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(192, 400), horizon=st.integers(1, 48))
def test_diebold_mariano_is_antisymmetric_and_blind_to_units(seed: int, n: int, horizon: int) -> None:
    d = np.random.default_rng(seed).normal(0.1, 1, n)
    statistic, p = diebold_mariano(d, horizon)
    assert diebold_mariano(-d, horizon) == (-statistic, p)
    assert diebold_mariano(1e-9 * d, horizon) == pytest.approx((statistic, p), rel=1e-9)
    assert 0 <= p <= 1


@pytest.mark.parametrize(
    ("overlap", "decay", "horizon"), [(1, 0.5, 1), (1, 0.8, 1), (24, 0.0, 24), (168, 0.0, 168)]
)
def test_diebold_mariano_rejects_about_five_percent_of_equal_forecasts(
    overlap: int, decay: float, horizon: int
) -> None:
    rng = np.random.default_rng(7)
    n, tries = 1500, 400
    rejected = 0
    for _ in range(tries):
        noise = lfilter([1.0], [1.0, -decay], rng.normal(size=n + overlap + 99))[100:]
        sums = np.concatenate([[0.0], np.cumsum(noise)])
        rejected += diebold_mariano(sums[overlap:] - sums[:-overlap], horizon)[1] < 0.05
    assert 0.02 <= rejected / tries <= 0.09


def test_diebold_mariano_finds_a_real_difference() -> None:
    d = np.random.default_rng(2).normal(-0.3, 1, 1000)
    statistic, p = diebold_mariano(d, 1)
    assert statistic < -5 and p < 0.001


@pytest.mark.parametrize("d", [np.zeros(100), np.full(100, 0.1), np.full(100, 1e-9), np.arange(29.0)])
def test_diebold_mariano_is_nan_without_variation_or_with_few_instants(d: Floats) -> None:
    statistic, p = diebold_mariano(d, 1)
    assert math.isnan(statistic) and math.isnan(p)


def test_diebold_mariano_says_nothing_when_the_test_spans_few_horizons() -> None:
    d = np.random.default_rng(3).normal(-3, 1, 96)
    assert all(math.isnan(v) for v in diebold_mariano(d[:95], 24))
    assert diebold_mariano(d, 24)[1] < 0.001


def test_skill_interval_of_a_constant_ratio_is_that_ratio() -> None:
    theirs = np.random.default_rng(0).uniform(1, 2, 300)
    assert skill_interval(0.9 * theirs, theirs, block=24) == pytest.approx((0.1, 0.1))


def test_skill_interval_holds_the_skill_in_about_95_percent_of_worlds() -> None:
    rng = np.random.default_rng(4)
    held = 0
    for _ in range(100):
        theirs, ours = rng.exponential(1, 400), rng.exponential(0.8, 400)
        low, high = skill_interval(ours, theirs, block=8, draws=200)
        assert low is not None and high is not None
        held += low <= 0.2 <= high
    assert 88 <= held <= 100


def test_skill_interval_keeps_a_width_when_the_block_is_longer_than_the_test() -> None:
    rng = np.random.default_rng(5)
    low, high = skill_interval(rng.exponential(1, 100), rng.exponential(1, 100), block=168)
    assert low is not None and high is not None
    assert high - low > 0.05


def test_skill_interval_is_none_where_it_has_no_meaning() -> None:
    assert skill_interval(np.ones(50), np.zeros(50), block=5) == (None, None)
    assert skill_interval(np.ones(7), np.ones(7), block=1) == (None, None)
    assert skill_interval(np.zeros(0), np.zeros(0), block=5) == (None, None)
