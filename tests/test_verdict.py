"""The verdict: one word for each way a backtest can end."""

from __future__ import annotations

from typing import Any

import pytest

from recur.pipeline.verdict import beats, judge, verdict_text

WIN = {"crps_skill": 0.02, "dm_stat": -3.0, "dm_p": 0.003}
TIE = {"crps_skill": 0.001, "dm_stat": -0.5, "dm_p": 0.6}
LOSS = {"crps_skill": -0.02, "dm_stat": 3.0, "dm_p": 0.003}
IDLE: dict[str, Any] = {"net_sharpe": None, "turnover": 0.0, "break_even_bps": None, "deflated_sharpe": None}
Score = dict[str, float]


def _metrics(*horizons: tuple[Score, Score, Score], trading: dict[str, Any] | None = None) -> dict[str, Any]:
    return {
        "forecast": {
            str(h): {
                "coverage_90": 0.901,
                "baselines": dict(zip(("random_walk", "ewma", "har"), scores, strict=True)),
            }
            for h, scores in enumerate(horizons, start=1)
        },
        "trading": trading or IDLE,
    }


def test_a_baseline_is_beaten_only_with_skill_a_small_p_and_the_test_on_our_side() -> None:
    assert beats(WIN)
    assert not beats(TIE)
    assert not beats(LOSS)
    assert not beats(WIN | {"dm_p": 0.05})
    assert not beats({"crps_skill": 0.02, "dm_stat": None, "dm_p": None})
    assert not beats(WIN | {"dm_stat": 3.0})  # better over rows, worse over instants


@pytest.mark.parametrize(
    ("horizons", "skill"),
    [
        ([(WIN, WIN, WIN), (WIN, WIN, WIN)], "strong"),
        ([(WIN, WIN, WIN), (WIN, WIN, TIE)], "weak"),
        ([(WIN, WIN, LOSS), (LOSS, LOSS, LOSS)], "weak"),
        ([(WIN, TIE, WIN), (TIE, WIN, WIN)], "none"),
        ([(WIN | {"dm_p": 0.03}, WIN, WIN), (TIE, TIE, TIE)], "none"),  # two horizons, each might have done
        ([(TIE, TIE, TIE)], "none"),
        ([], "none"),
    ],
)
def test_one_word_per_pattern_of_wins(horizons: list[tuple[Score, Score, Score]], skill: str) -> None:
    assert judge(_metrics(*horizons))["skill"] == skill


def test_the_text_names_each_horizon_its_skills_p_values_and_coverage() -> None:
    text = judge(_metrics((WIN, WIN, LOSS | {"dm_p": 0.0001})))["text"]
    assert "h=1: +2.00 % CRPS against EWMA (p 0.003), -2.00 % against HAR (p < .001)" in text
    assert "90 % band holds 90.1 %" in text


def test_a_missing_p_value_reads_as_not_available() -> None:
    text = judge(_metrics((TIE, {"crps_skill": 0.0, "dm_stat": None, "dm_p": None}, TIE)))["text"]  # type: ignore[dict-item]
    assert "(p n/a)" in text


@pytest.mark.parametrize(
    ("trading", "sentence"),
    [
        (IDLE, "takes no view on direction, so nothing was traded."),
        (IDLE | {"turnover": 2.0}, "Too few bars were traded to judge its direction."),
        (
            {"net_sharpe": 1.5, "turnover": 2.0, "deflated_sharpe": 0.97, "break_even_bps": 12.0},
            "earned a net Sharpe of 1.50 after costs.",
        ),
        (
            {"net_sharpe": 1.5, "turnover": 2.0, "deflated_sharpe": 0.9, "break_even_bps": 12.0},
            "a net Sharpe of 1.50 after costs, which may be luck: the deflated Sharpe ratio is 0.900, not above 0.95.",
        ),
        (
            {"net_sharpe": -3.25, "turnover": 2.0, "deflated_sharpe": 0.0, "break_even_bps": -0.44},
            "not worth trading: net Sharpe -3.25 after costs, break-even at -0.4 bp per unit traded.",
        ),
    ],
)
def test_the_text_ends_with_what_trading_was_worth(trading: dict[str, Any], sentence: str) -> None:
    assert judge(_metrics((WIN, WIN, WIN), trading=trading))["text"].endswith(sentence)


def test_the_reader_gets_the_word_in_capitals_before_the_text() -> None:
    assert (
        verdict_text({"verdict": {"skill": "none", "text": "No reliable skill."}})
        == "NONE: No reliable skill."
    )
