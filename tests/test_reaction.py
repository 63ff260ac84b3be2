"""Labels from the market look forward only from when an item may be used, and are known only when their window closed."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from recur.pipeline.reaction import ReactionPlan, reactions, usable_ms
from recur.vocabulary import DAY_MS, HOUR_MS, DataMissing, UsageError

START = 1_704_067_200_000  # 2024-01-01
PLAN = ReactionPlan(bars=2, threshold=1.0, history=48, latency_ms=60_000)


def candles(returns: np.ndarray) -> pl.DataFrame:
    close = 100 * np.exp(np.cumsum(returns))
    opens = np.concatenate([[100.0], close[:-1]])
    times = pl.Series(START + HOUR_MS * np.arange(len(returns))).cast(pl.Datetime("ms", "UTC"))
    return pl.DataFrame({"open_time": times, "open": opens, "close": close})


def calm(n: int = 100, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.01, n)


def labels(returns: np.ndarray, at: list[int], **more: pl.DataFrame) -> pl.DataFrame:
    return reactions(np.array(at), np.zeros(len(at), bool), candles(returns), HOUR_MS, PLAN, **more)


def test_an_item_is_labelled_by_the_bars_that_open_after_it_is_usable() -> None:
    returns = calm()
    returns[60:62] = 0.05
    at = START + 60 * HOUR_MS
    # 2 minutes before bar 60 opens the whole jump is ahead; at its open only one of the two bars is
    found = labels(returns, [at - 120_000, at - 30_000, at + HOUR_MS])
    assert found["label"].to_list()[0] == 1
    history = returns[12:60]
    assert found["z"][0] == pytest.approx(0.1 / (history.std(ddof=1) * np.sqrt(2)))
    assert found["z"][1] == pytest.approx(returns[61:63].sum() / (returns[13:61].std(ddof=1) * np.sqrt(2)))
    assert found["z"][2] == pytest.approx(returns[62:64].sum() / (returns[14:62].std(ddof=1) * np.sqrt(2)))
    assert found["known_ms"][0] == at + 2 * HOUR_MS


def test_an_item_of_a_day_is_usable_only_from_the_next() -> None:
    noon = START + 12 * HOUR_MS
    usable = usable_ms(np.array([noon, noon, START]), np.array([True, False, True]), 60_000)
    assert usable.tolist() == [START + DAY_MS + 60_000, noon + 60_000, START + DAY_MS + 60_000]


def test_what_the_market_explains_is_no_reaction() -> None:
    market = calm(seed=1)
    market[60:62] = 0.05
    own = 2 * market + 0.002 * calm(seed=2) / 0.01
    at = [START + 60 * HOUR_MS - 120_000]
    assert labels(own, at)["label"].to_list() == [1]
    assert abs(labels(own, at, market=candles(market))["z"][0]) < 5 < labels(own, at)["z"][0]


def test_later_bars_change_nothing() -> None:
    returns = calm()
    at = [START + 60 * HOUR_MS - 120_000]
    before = labels(returns, at)
    poisoned = returns.copy()
    poisoned[62:] = 9.0
    assert labels(poisoned, at).equals(before)


def test_holes_and_edges_have_no_label() -> None:
    at = START + 60 * HOUR_MS - 120_000
    holed = candles(calm()).filter(pl.Series(np.arange(100) != 61))
    found = reactions(np.array([at]), np.zeros(1, bool), holed, HOUR_MS, PLAN)
    assert found["label"].to_list() == [None]
    edges = [START, START + 46 * HOUR_MS, START + 98 * HOUR_MS, START + 99 * HOUR_MS, START + 500 * HOUR_MS]
    assert labels(calm(), edges)["label"].to_list() == [None] * 5
    before, after = "before the candles and their history", "after the candles"
    assert labels(calm(), edges)["why"].to_list() == [before, before, after, after, after]
    still = labels(np.zeros(100), [at])
    assert (still["label"].to_list(), still["why"].to_list()) == ([None], ["the price never moved"])
    assert (found["why"].to_list(), labels(calm(), [at])["why"].to_list()) == (["bars are missing"], [None])


def test_wrong_plans_and_empty_candles_are_refused() -> None:
    with pytest.raises(UsageError, match="history ≥ 24"):
        ReactionPlan(history=3)
    with pytest.raises(DataMissing, match="no candles"):
        reactions(np.array([START]), np.zeros(1, bool), candles(calm()).clear(), HOUR_MS, PLAN)
