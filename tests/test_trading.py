"""The trading simulation, by hand and against a plain loop over bars."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from recur.pipeline.trading import Leg, deflated_sharpe, run_leg, sharpe, simulate
from recur.vocabulary import HOUR_MS

Floats = NDArray[np.float64]
NAN = float("nan")


def _leg(
    opens: list[float], wishes: dict[int, float], funding: list[tuple[float, float]] | None = None
) -> Leg:
    """Hourly bars; ``wishes``: position asked for at the close of a bar; ``funding``: (hour, rate)."""
    paid = funding or []
    return Leg(
        open_ms=np.arange(len(opens), dtype=np.int64) * HOUR_MS,
        open=np.array(opens),
        index=np.array(sorted(wishes), dtype=np.int64),
        mean=np.array([wishes[t] / 10 for t in sorted(wishes)]),
        vol=np.ones(len(wishes)),
        funding_ms=np.array([round(hour * HOUR_MS) for hour, _ in paid], dtype=np.int64),
        funding_rate=np.array([rate for _, rate in paid], dtype=np.float64),
    )


def test_a_forecast_is_filled_at_the_next_open_and_pays_for_every_change() -> None:
    got = run_leg(_leg([100, 100, 110, 99, 50], {0: 1.0, 1: -0.5}), fee_bps=10, slippage_bps=2)
    assert got.open_ms.tolist() == [HOUR_MS, 2 * HOUR_MS]
    assert got.hold == pytest.approx([0.1, -0.1])
    assert got.gross == pytest.approx([0.1, 0.05])
    assert got.traded == pytest.approx([1.0, 1.5])
    assert got.fee == pytest.approx([0.001, 0.0015])
    assert got.slippage == pytest.approx([0.0002, 0.0003])


def test_the_position_is_ten_times_the_ratio_of_mean_to_vol_and_never_above_one() -> None:
    leg = Leg(
        np.arange(5, dtype=np.int64), np.ones(5), np.arange(3), np.array([0.02, -9.0, 0.0]),
        np.array([0.5, 1.0, 1.0]), np.zeros(0, dtype=np.int64), np.zeros(0),
    )  # fmt: skip
    assert run_leg(leg, 0, 0).traded == pytest.approx([0.4, 1.4, 1.0])


def test_longs_pay_a_positive_rate_and_shorts_receive_it() -> None:
    long = run_leg(_leg([100] * 4, {0: 1.0}, [(1.5, 0.001)]), 0, 0)
    short = run_leg(_leg([100] * 4, {0: -0.5}, [(1.5, 0.001)]), 0, 0)
    assert long.funding.tolist() == [0.001]
    assert short.funding.tolist() == [-0.0005]


def test_a_settlement_at_an_exact_open_falls_on_what_was_held_before_it() -> None:
    wishes = {0: 1.0, 1: -1.0}
    at = {hour: run_leg(_leg([100] * 5, wishes, [(hour, 0.01)]), 0, 0).funding.tolist() for hour in range(5)}
    assert at == {0: [0, 0], 1: [0, 0], 2: [0.01, 0], 3: [0, -0.01], 4: [0, 0]}


def test_all_settlements_inside_a_long_bar_are_paid() -> None:
    leg = _leg([100] * 4, {0: 1.0}, [(1.25, 0.001), (1.5, 0.002), (1.75, 0.003)])
    assert run_leg(leg, 0, 0).funding == pytest.approx([0.006])


def test_a_missing_next_bar_is_not_filled_and_the_old_position_rides_through_the_gap() -> None:
    got = run_leg(_leg([100, 100, NAN, 120, 132, 132], {0: 0.5, 1: -1.0, 3: 0.0}), 0, 0)
    # Held 0.5 from open 1; the wish of bar 1 meets no bar 2; the wish of bar 3 is filled at open 4.
    assert got.traded == pytest.approx([0.5, 0, 0, 0.5])
    assert got.hold == pytest.approx([0, 0.2, 0.1, 0])
    assert got.gross == pytest.approx([0, 0.1, 0.05, 0])


def test_a_forecast_at_the_end_of_the_data_or_none_at_all_gives_no_bars() -> None:
    assert len(run_leg(_leg([100, 100, 100], {2: 1.0}), 1, 1).gross) == 0
    assert len(run_leg(_leg([100, 100, 100], {1: 1.0}), 1, 1).gross) == 0
    assert len(run_leg(_leg([100, 100, 100], {}), 1, 1).gross) == 0


@st.composite
def legs(draw: st.DrawFn) -> Leg:
    n = draw(st.integers(3, 30))
    price = st.one_of(st.floats(50, 200), st.floats(50, 200), st.just(NAN))
    opens = draw(st.lists(price, min_size=n, max_size=n))
    seen = [t for t in range(n) if math.isfinite(opens[t])]
    chosen = [t for t in seen if draw(st.booleans())]
    wishes = {t: draw(st.floats(-2, 2)) for t in chosen}
    hours = st.integers(-4, 4 * n + 4).map(lambda quarter: quarter / 4)
    funding = draw(st.lists(st.tuples(hours, st.floats(-0.01, 0.01)), max_size=8))
    return _leg(opens, wishes, funding)


def _loop(leg: Leg) -> list[tuple[int, float, float, float]]:
    """(open time, gross, traded, funding) of each bar, one at a time."""
    wish = {
        int(t): max(-1.0, min(1.0, 10 * m / v)) for t, m, v in zip(leg.index, leg.mean, leg.vol, strict=True)
    }
    out: list[tuple[int, float, float, float]] = []
    if not wish:
        return out
    position, price = 0.0, 0.0
    for t in range(len(leg.open) - 1):
        old = position
        if math.isfinite(leg.open[t]):
            price = float(leg.open[t])
            position = wish.get(t - 1, position)
        after = float(leg.open[t + 1]) if math.isfinite(leg.open[t + 1]) else price
        paid = sum(
            float(rate)
            for at, rate in zip(leg.funding_ms, leg.funding_rate, strict=True)
            if leg.open_ms[t] < at <= leg.open_ms[t + 1]
        )
        if min(wish) < t <= max(wish) + 1:
            change = after / price - 1
            out.append((int(leg.open_ms[t]), position * change, abs(position - old), position * paid))
    return out


@settings(max_examples=120, deadline=None)
@given(leg=legs())
def test_a_leg_equals_a_plain_loop_over_its_bars(leg: Leg) -> None:
    got, expected = run_leg(leg, 5, 1), _loop(leg)
    assert got.open_ms.tolist() == [row[0] for row in expected]
    assert got.gross == pytest.approx([row[1] for row in expected], abs=1e-12)
    assert got.traded == pytest.approx([row[2] for row in expected], abs=1e-12)
    assert got.funding == pytest.approx([row[3] for row in expected], abs=1e-12)
    assert got.fee == pytest.approx(got.traded * 0.0005, abs=1e-15)
    assert got.slippage == pytest.approx(got.traded * 0.0001, abs=1e-15)


@settings(max_examples=60, deadline=None)
@given(leg=legs(), data=st.data())
def test_prices_after_a_bar_leave_its_equity_and_all_before_bit_identical(
    leg: Leg, data: st.DataObject
) -> None:
    if not len(leg.index):
        return
    cut = data.draw(st.integers(int(leg.index[0]) + 1, len(leg.open)))
    changed = leg.open.copy()
    changed[cut:] *= 1.7
    other = Leg(leg.open_ms, changed, leg.index, leg.mean, leg.vol, leg.funding_ms, leg.funding_rate)
    _, before = simulate([leg], 5, 1, 8760, 1)
    _, after = simulate([other], 5, 1, 8760, 1)
    known = before["time_ms"] < (cut - 1) * HOUR_MS  # what is held from there on ends after the cut
    for name in ("net", "gross", "buy_hold"):
        assert before[name][known].tolist() == after[name][known].tolist()


def _wavy(n: int, sign: float) -> Leg:
    rng = np.random.default_rng(3)
    opens = 100 * np.exp(np.cumsum(rng.normal(0, 0.01, n)))
    wishes = {t: sign * (1.0 if opens[t + 2] > opens[t + 1] else -1.0) for t in range(n - 2)}
    return _leg(opens.tolist(), wishes, [(8.0 * k, 0.0001) for k in range(n // 8)])


def test_the_book_is_the_equal_weight_mean_of_its_legs_and_idle_legs_count() -> None:
    first = _leg([100, 100, 110, 110, 110], {0: 1.0, 1: 1.0})
    second = _leg([100, 100, 100, 100, 90], {2: -1.0})
    metrics, curves = simulate([first, second], 0, 0, bars_per_year=24 * 365, n_trials=1)
    assert curves["time_ms"].tolist() == [HOUR_MS, 2 * HOUR_MS, 3 * HOUR_MS]
    assert np.expm1(curves["net"]) == pytest.approx([0.05, 0.05, 1.05 * 1.05 - 1])
    assert np.expm1(curves["buy_hold"]) == pytest.approx([0.05, 0.05, 1.05 * 0.95 - 1])
    assert metrics["net_return"] == pytest.approx(0.1025)
    assert metrics["max_drawdown"] == 0.0
    assert metrics["turnover"] == pytest.approx((0.5 + 0.5) / (3 / 24))


def test_drawdown_counts_from_the_start_and_from_every_peak() -> None:
    metrics, _ = simulate([_leg([100, 100, 80, 120, 90, 90], {t: 1.0 for t in range(4)})], 0, 0, 8760, 1)
    assert metrics["max_drawdown"] == pytest.approx(0.25)
    metrics, _ = simulate([_leg([100, 100, 80, 80], {0: 1.0, 1: 1.0})], 0, 0, 8760, 1)
    assert metrics["max_drawdown"] == pytest.approx(0.2)


def test_a_short_that_loses_more_than_everything_ends_at_nothing_and_not_at_nan() -> None:
    metrics, curves = simulate([_leg([100, 100, 250, 250], {0: -1.0, 1: -1.0})], 0, 0, 8760, 1)
    assert metrics["net_return"] == pytest.approx(-1.0)
    assert metrics["max_drawdown"] == pytest.approx(1.0)
    assert np.isfinite(curves["net"]).all()


def test_at_the_break_even_cost_the_sum_of_net_returns_is_zero() -> None:
    leg = _wavy(200, 1.0)
    free, _ = simulate([leg], 0, 0, 8760, 1)
    assert free["break_even_bps"] > 0
    paid, _ = simulate([leg], free["break_even_bps"], 0, 8760, 1)
    assert paid["net_sharpe"] == pytest.approx(0.0, abs=1e-6)
    assert paid["gross_sharpe"] == pytest.approx(free["gross_sharpe"])


def test_costs_are_sums_over_the_book() -> None:
    metrics, _ = simulate(
        [_leg([100] * 6, {t: (-1.0) ** t for t in range(4)}, [(1.5, 0.001)])], 10, 5, 8760, 3
    )
    assert metrics["fees"] == pytest.approx((1 + 2 + 2 + 2) * 0.001)
    assert metrics["slippage"] == pytest.approx((1 + 2 + 2 + 2) * 0.0005)
    assert metrics["funding"] == pytest.approx(0.001)
    assert metrics["n_trials"] == 3


def test_a_book_without_a_view_has_no_ratios() -> None:
    metrics, _ = simulate([_leg([100.0 + t for t in range(60)], {t: 0.0 for t in range(50)})], 5, 1, 8760, 1)
    assert metrics["turnover"] == 0.0 and metrics["net_return"] == 0.0
    for name in ("gross_sharpe", "net_sharpe", "break_even_bps", "deflated_sharpe"):
        assert metrics[name] is None
    assert metrics["buy_hold_sharpe"] > 0


def test_a_book_without_a_single_bar_has_numbers_and_nones_but_no_error() -> None:
    metrics, curves = simulate([_leg([100, 100], {1: 1.0})], 5, 1, 8760, 1)
    assert metrics["net_return"] is None and metrics["turnover"] is None and metrics["max_drawdown"] is None
    assert metrics["fees"] == 0.0
    assert len(curves["net"]) == 0


def test_a_market_that_never_moves_has_no_sharpe_of_holding_it() -> None:
    metrics, _ = simulate([_leg([100.0] * 60, {t: 1.0 for t in range(50)})], 5, 1, 8760, 1)
    assert metrics["buy_hold_sharpe"] is None and metrics["gross_sharpe"] is None
    assert metrics["net_return"] == pytest.approx(-0.0006)


def test_sharpe_is_annualised_by_the_root_of_the_bars_in_a_year() -> None:
    assert sharpe(np.array([0.01, 0.03]), bars_per_year=4) == pytest.approx(4.0)
    assert sharpe(np.full(10, 0.01), 4) is None


def test_deflated_sharpe_is_the_probabilistic_sharpe_ratio_for_one_trial() -> None:
    returns = np.tile([0.02, -0.01], 50)  # mean 0.005, deviation 0.015, skew 0, kurtosis 1
    ratio = 1 / 3
    expected = 0.5 * math.erfc(-ratio * math.sqrt(99) / math.sqrt(1 + 0 * ratio**2) / math.sqrt(2))
    assert deflated_sharpe(returns, 1) == pytest.approx(expected, rel=1e-9)
    assert deflated_sharpe(np.tile([0.01, -0.01], 50), 1) == pytest.approx(0.5)


def test_deflated_sharpe_falls_with_every_further_trial_and_is_none_for_few_bars() -> None:
    returns = np.random.default_rng(0).normal(0.1, 1, 500)
    got = [deflated_sharpe(returns, trials) for trials in (1, 2, 10, 100)]
    assert all(p is not None for p in got)
    assert got == sorted(got, key=lambda p: -(p or 0)) and len(set(got)) == 4
    assert deflated_sharpe(returns[:29], 1) is None


def test_the_best_of_many_skill_less_tries_has_a_deflated_sharpe_of_about_a_half() -> None:
    rng = np.random.default_rng(1)
    best = []
    for _ in range(200):
        tries = rng.normal(0, 1, (20, 250))
        winner = tries[np.argmax(tries.mean(axis=1) / tries.std(axis=1))]
        p = deflated_sharpe(winner, 20)
        assert p is not None
        best.append(p)
    assert np.mean(best) == pytest.approx(0.5, abs=0.08)
