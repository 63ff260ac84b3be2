"""What the benchmarks share: invented bars, interleaved timing, and the table they print."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from recur.vocabulary import INTERVALS, parse_time

START_MS = parse_time("2023-01-01")
Results = dict[str, Any]


def bars(symbol: str, n: int, interval: str, seed: int = 0, holes: int = 0) -> pl.DataFrame:
    """Candle frame of ``n`` grid points with wandering volatility; ``holes`` of them are left out."""
    rng = np.random.default_rng(seed)
    step = INTERVALS[interval]
    opens = START_MS + step * np.arange(n, dtype=np.int64)
    daily = 0.4 * np.sin(2 * np.pi * (opens % 86_400_000) / 86_400_000)
    shocks = rng.normal(0, 0.05, n)
    level = np.cumsum(shocks) - np.linspace(0, shocks.sum(), n)  # a bridge: it comes back to where it began
    sigma = 0.006 * np.sqrt(step / 3_600_000) * np.exp(np.clip(level, -1.0, 1.0) + daily)
    r = rng.normal(0, 1, n) * sigma
    log_close = np.log(100.0) + np.cumsum(r) - np.linspace(0, r.sum(), n)
    log_open = np.concatenate([[np.log(100.0)], log_close[:-1]])
    high = np.maximum(log_open, log_close) + np.abs(rng.normal(0, 0.5, n)) * sigma
    low = np.minimum(log_open, log_close) - np.abs(rng.normal(0, 0.5, n)) * sigma
    close, volume = np.exp(log_close), np.exp(5 + 30 * sigma + rng.normal(0, 0.3, n))
    frame = pl.DataFrame(
        {
            "open_time": pl.Series(opens).cast(pl.Datetime("ms", "UTC")),
            "open": np.exp(log_open),
            "high": np.exp(high),
            "low": np.exp(low),
            "close": close,
            "volume": volume,
            "turnover": volume * close,
        }
    ).select(
        *(pl.lit(v).alias(k) for k, v in zip(_KEY, ("linear", symbol, interval, "trade"), strict=True)),
        pl.all(),
    )
    if holes:
        gone = rng.choice(np.arange(1, n - 1), holes, replace=False)
        frame = frame.filter(~pl.Series(np.isin(np.arange(n), gone)))
    return frame


_KEY = ("category", "symbol", "interval", "kind")


def interleaved(jobs: Mapping[str, Callable[[], object]], rounds: int, warm: int = 1) -> dict[str, float]:
    """Median seconds of each job; the jobs take turns, so that a noisy moment strikes all of them."""
    taken: dict[str, list[float]] = {name: [] for name in jobs}
    for turn in range(warm + rounds):
        for name, job in jobs.items():
            start = time.perf_counter()
            job()
            if turn >= warm:
                taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in taken.items()}


def show(title: str, header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """Print a small table, the first column to the left and the others to the right."""
    widths = [max(len(line[i]) for line in [header, *rows]) for i in range(len(header))]
    print(f"\n{title}")
    for line in [header, tuple("-" * w for w in widths), *rows]:
        cells = [line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]
        print("  ".join(cells))


def goal(value: float, bound: float, at_least: bool = True) -> str:
    """``≥ 4 met`` or ``≥ 4 missed``."""
    met = value >= bound if at_least else value <= bound
    return f"{'≥' if at_least else '≤'} {bound:g} {'met' if met else 'missed'}"


def main(measure: Callable[[bool], Results], description: str | None) -> None:
    """Command line of one benchmark: ``--quick`` for a small try-out, ``--json`` for a file of the figures."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small data and few rounds; not for quoting")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    asked = parser.parse_args()
    results = measure(asked.quick)
    if asked.json:
        asked.json.write_text(json.dumps(results, indent=2) + "\n")
