"""Results as a person reads them at a terminal, and as the one JSON document that a program reads.

Rich is imported where something is drawn, so that plain help answers at once.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import date, datetime
from pathlib import Path
from typing import Any

from recur.pipeline.tables import fitted
from recur.vocabulary import iso, to_ms


def to_json(document: object) -> str:
    """JSON text: NaN and infinity become null, times ISO-8601 with Z, NumPy scalars and paths plain values."""
    return json.dumps(plain(document), ensure_ascii=False, allow_nan=False)


def plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, datetime):
        return iso(to_ms(value))
    if isinstance(value, date | Path):
        return str(value)
    return plain(value.item()) if hasattr(value, "item") else str(value)


def cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.5g}" if math.isfinite(value) else "-"
    if isinstance(value, datetime):
        return iso(to_ms(value))
    return "-" if value is None else str(value)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Draw a table that keeps to the width of the terminal; columns that do not fit are named below it."""
    from rich.console import Console
    from rich.table import Table

    console = Console(
        highlight=False, markup=False, emoji=False, width=None if sys.stdout.isatty() else 200,
        color_system=None if os.environ.get("NO_COLOR") else "auto",  # else rich keeps bold and italics
    )  # fmt: skip
    cells = [[cell(value) for value in row] for row in rows]
    names, cells, gone = fitted(columns, cells, console.width)
    drawn = Table(*names, title=title, title_justify="left")
    for row in cells:
        drawn.add_row(*row)
    console.print(drawn)
    if gone:
        print(f"Left out for want of width: {', '.join(gone)}. --json has them.")


def pairs(title: str, values: Mapping[str, Any]) -> None:
    """A two-column table of what is not itself a table."""
    shown = [(key, value) for key, value in values.items() if not isinstance(value, Mapping | list)]
    table(title, ["", ""], shown)


@contextlib.contextmanager
def stages(show: bool) -> Iterator[Callable[[str, int, int], None]]:
    """A bar on standard error for each stage in turn; gives the function to call with (stage, done, total)."""
    with contextlib.ExitStack() as stack:
        bars: dict[str, Callable[[int, int], None]] = {}

        def say(stage: str, done: int, total: int) -> None:
            if stage not in bars:
                stack.close()
                bars[stage] = stack.enter_context(progress(show, stage))
            bars[stage](done, total)

        yield say


@contextlib.contextmanager
def progress(show: bool, what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error; gives the function to call with (done, total)."""
    if not show:
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def percent(value: float | None, digits: int = 2, sign: str = "+") -> str:
    return "–" if value is None else f"{100 * value:{sign}.{digits}f} %"


def p_value(p: float | None) -> str:
    return "" if p is None else " (p < .001)" if p < 0.001 else f" (p {p:.3f})"


def say_metrics(metrics: Mapping[str, Any]) -> None:
    """The skill table of a backtest, or the validation losses of a training run."""
    forecast, oracle = metrics.get("forecast"), metrics.get("oracle", {})
    if not forecast:
        losses = metrics["val_pinball"]
        table(
            "Validation pinball loss, in units of volatility",
            ["epoch", "loss", "best"],
            ([k + 1, loss, "*" if k == metrics["best_epoch"] else ""] for k, loss in enumerate(losses)),
        )
        pairs("Run", metrics)
        return
    names = list(next(iter(forecast.values()))["baselines"])
    rows = []
    for horizon, block in forecast.items():
        skills = [
            percent(b["crps_skill"]) + p_value(b["dm_p"]) for b in (block["baselines"][n] for n in names)
        ]
        best = [percent(oracle[horizon]["crps_skill"])] if oracle else []
        bands = [percent(block[f"coverage_{level}"], 1, "") for level in (50, 90)]
        rows.append([horizon, block["n"], *skills, *best, *bands])
    attainable = ["attainable vs ewma"] if oracle else []
    columns = [
        "horizon",
        "forecasts",
        *(f"vs {n}" for n in names),
        *attainable,
        "in 50 % band",
        "in 90 % band",
    ]
    table("CRPS skill out of sample (p: Diebold-Mariano)", columns, rows)
    trading = metrics["trading"]
    table(
        f"Trading its direction ({trading['fee_bps']} bp fee, {trading['slippage_bps']} bp slippage, 365-day year)",
        ["gross Sharpe", "net Sharpe", "net return", "max drawdown", "break-even bp", "buy and hold Sharpe"],
        [
            [
                trading["gross_sharpe"], trading["net_sharpe"], percent(trading["net_return"], 1),
                percent(trading["max_drawdown"], 1, ""), trading["break_even_bps"], trading["buy_hold_sharpe"],
            ]
        ],
    )  # fmt: skip


def say_certificate(title: str, held: Mapping[str, Any]) -> None:
    columns = ["series", "rows", "first", "last", "gaps", "missing", "unexplained", "zero_volume", "outliers"]
    columns += ["revisions", "age_hours", "sha256"]
    every = [*held["series"], *held["measures"]]
    table(title, columns, ([row[key] for key in columns[:-1]] + [row["sha256"][:12]] for row in every))
    reasons: dict[tuple[str, str], list[int]] = {}
    for row in every:
        for hole in row["holes"]:
            reasons.setdefault((row["series"], hole["reason"]), []).append(hole["bars"])
    if reasons:
        table(
            "What is absent, and why (--json lists each)",
            ["series", "reason", "ranges", "bars", "longest"],
            ([*key, len(bars), sum(bars), max(bars)] for key, bars in reasons.items()),
        )
    print(f"Content of the store: sha256 {held['sha256']}")


def say_sentiment(title: str, metrics: Mapping[str, Any]) -> None:
    pairs(title, metrics)
    columns = ["precision", "recall", "f1", "n"]
    rows = ([name, *(block[c] for c in columns)] for name, block in metrics["per_class"].items())
    table("Per class", ["", *columns], rows)


def say_inspection(found: Mapping[str, Any]) -> None:
    weights, gradient = found["parameters"], found["gradient"]
    table("Parameters", ["part", "number"], [*weights["parts"].items(), ("all", weights["total"])])
    if "core" in weights:
        pairs(f"The core against {weights['core']['formula']}", weights["core"])
    pairs("Spectral radius of the state map, along real bars", found["spectral_radius"])
    far = f"{gradient['one_percent_lag']} bars"
    if gradient["one_percent_lag"] == gradient["followed"]:
        far = f"more than {far}"
    lags = [0, *(1 << k for k in range(10) if 1 << k < len(gradient["norm_by_lag"]))]
    table(
        f"Gradient of the last output by input lag: 1 % of its largest at {far}",
        ["lag", "norm"],
        ([lag, gradient["norm_by_lag"][lag]] for lag in lags),
    )
    if found["gates"]:
        columns = ["gate", "width", "mean", "closed", "open"]
        table("Gates", columns, ([gate[key] for key in columns] for gate in found["gates"]))
    rows = found["ablation"]["rows"]
    table(
        f"Pinball loss when the state is cut ({found['ablation']['forecasts']} forecasts)",
        ["bars", *(f"h={h}" for h in rows[0]["pinball"]), "worse", "± 1 s.e."],
        (
            [r["bars"], *r["pinball"].values(), percent(r["worse"]), percent(r["error"], sign="")]
            for r in rows
        ),
    )
    print(f"Plot: {found['plot']}")


def say_forecasts(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    columns = ["unique_id", "cutoff", "ds", "horizon", "model", "q05", "q50", "q95", "prob_up", "vol"]
    table(title, columns, ([row.get(key) for key in columns] for row in rows))
