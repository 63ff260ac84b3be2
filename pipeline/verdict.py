"""The verdict on a backtest: one word and one paragraph, from its metrics alone.

A horizon *beats* a baseline when its CRPS skill is positive and the Diebold–Mariano test rejects equality at 5 %
in our favour.
``strong``: every horizon beats every baseline. ``weak``: some horizon beats both ``random_walk`` and ``ewma`` at 5 %
divided by the number of horizons (Bonferroni), since any of them would do.
``none``: otherwise.
"""

from __future__ import annotations

from typing import Any

ALPHA = 0.05


def beats(score: dict[str, Any], alpha: float = ALPHA) -> bool:
    p = score.get("dm_p")
    # Skill is a mean over rows, the test one over instants: with unequal series they can disagree in sign.
    if p is None or score["crps_skill"] is None:
        return False
    return bool(p < alpha and score["crps_skill"] > 0 and score["dm_stat"] < 0)


def judge(metrics: dict[str, Any]) -> dict[str, str]:
    """``{"skill": none|weak|strong, "text": …}`` for the metrics of a backtest."""
    horizons = metrics["forecast"]
    wins = {h: {name for name, score in f["baselines"].items() if beats(score)} for h, f in horizons.items()}
    if horizons and all(wins[h] == set(f["baselines"]) for h, f in horizons.items()):
        skill = "strong"
    elif any(
        all(beats(f["baselines"][name], ALPHA / len(horizons)) for name in ("random_walk", "ewma"))
        for f in horizons.values()
    ):
        skill = "weak"
    else:
        skill = "none"
    return {"skill": skill, "text": _sentences(metrics, skill)}


def _sentences(metrics: dict[str, Any], skill: str) -> str:
    lead = {
        "strong": "The forecast beats every baseline at every horizon",
        "weak": "The forecast beats the random walk and EWMA at some horizon, but not every baseline everywhere",
        "none": "No reliable skill: the forecast does not beat the random walk and EWMA at any horizon",
    }[skill]
    parts = []
    for h, f in metrics["forecast"].items():
        ewma, har = f["baselines"]["ewma"], f["baselines"]["har"]
        parts.append(
            f"h={h}: {_skill(ewma)} CRPS against EWMA (p {_p(ewma['dm_p'])}),"
            f" {_skill(har)} against HAR (p {_p(har['dm_p'])}),"
            f" 90 % band holds {100 * f['coverage_90']:.1f} %"
        )
    t = metrics["trading"]
    if not t.get("turnover"):
        money = "The forecast takes no view on direction, so nothing was traded."
    elif t.get("net_sharpe") is None:
        money = "Too few bars were traded to judge its direction."
    elif t["net_sharpe"] > 0 and (t.get("deflated_sharpe") or 0) > 0.95:
        money = f"Trading its direction earned a net Sharpe of {t['net_sharpe']:.2f} after costs."
    elif t["net_sharpe"] > 0:
        money = (
            f"Trading its direction earned a net Sharpe of {t['net_sharpe']:.2f} after costs, which may be luck: the"
            f" deflated Sharpe ratio is {_p(t.get('deflated_sharpe'))}, not above 0.95."
        )
    else:
        money = (
            f"Its direction is not worth trading: net Sharpe {t['net_sharpe']:.2f} after costs,"
            f" break-even at {t['break_even_bps']:.1f} bp per unit traded."
        )
    return f"{lead} (Diebold–Mariano, 5 %). " + "; ".join(parts) + ". " + money


def _skill(score: dict[str, Any]) -> str:
    skill = score["crps_skill"]
    return "no measurable" if skill is None else f"{100 * skill:+.2f} %"


def _p(p: float | None) -> str:
    return "n/a" if p is None else ("< .001" if p < 0.001 else f"{p:.3f}")


def verdict_text(metrics: dict[str, Any]) -> str:
    """The verdict for a reader."""
    v = metrics["verdict"]
    return f"{v['skill'].upper()}: {v['text']}"
