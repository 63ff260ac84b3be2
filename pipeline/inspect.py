"""``recur inspect RUN``: what a trained recurrence does, on the bars that its training was checked on.

- parameters by part, those of the recurrence against the closed formula;
- spectral radius of the state map at states met along real bars: below 1 the past fades;
- norm of the gradient of the last output against the input of k bars earlier: how far back it truly looks;
- gates: how often they are shut and open;
- ablation: the loss of a forecast whose state began k bars before it. Where the loss no longer falls, more memory
  is of no use.

Writes ``inspect.json`` and ``inspect.svg`` into the run folder.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

from recur.models.forecaster import Forecaster, pinball_errors
from recur.models.interface import Steps
from recur.models.probes import Gate, gates, gradient_by_lag, spectral_radius, state_size, states_along
from recur.pipeline.artefact import Artefact, load_artefact
from recur.pipeline.dataset import arrays
from recur.pipeline.inspect_plot import draw
from recur.pipeline.load import open_store, stored_series
from recur.pipeline.samples import Samples, make_samples
from recur.pipeline.settings import load_config
from recur.storage.runs import RunFolder, open_run
from recur.vocabulary import INTERVALS, DataMissing, UsageError, from_ms, parse_time

CUTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
"""Bars after which the state is cut in the ablation."""
FULL = 1024
"""Bars of the forecasts that cut ones are compared with."""
CUTOFFS = 384
"""Forecasts in the ablation, spread evenly over series and time."""
LAGS = 512
"""Bars that the gradient is followed back."""
ROWS = 64
"""Windows run at once."""

GATES = {"elman": 1, "gru": 3, "gru_standard": 3, "lstm": 4}
"""Blocks of d_h (d_x + d_h + 1) weights in one layer."""
GATE_NAMES = {
    "gru": ("reset", "update"), "gru_standard": ("reset", "update"), "lstm": ("forget", "input", "output"),
    "mingru": ("keep", "write"), "minlstm": ("keep", "write"), "mamba": ("decay",), "mamba2": ("decay",),
}  # fmt: skip
"""Gates of one layer in the order in which ``step`` takes them."""


def inspect_run(home: Path, run_id: str, *, trust: bool = False) -> dict[str, Any]:
    """Measure a complete training run (or the last fold of a backtest) on its validation span.

    Raises DataMissing when the run or its bars are not there. ``trust`` lets a user's own model run its code.
    """
    folder = open_run(home, run_id)
    manifest = folder.read_manifest()
    if manifest.get("kind") == "sentiment":
        raise UsageError(f"Run {run_id} reads texts, not bars.", "Give it one: --trace TEXT.")
    spans = manifest["split"] if "split" in manifest else manifest["folds"][-1]
    inner = folder if "split" in manifest else folder.part(f"folds/{len(manifest['folds'])}")
    if not inner.weights.exists() and manifest.get("parent"):
        raise DataMissing(
            f"Run {run_id} holds no weights: it judged run {manifest['parent']}.",
            f"recur inspect {manifest['parent']}",
        )
    made = load_artefact(inner, trust=trust)
    series = _bars(home, folder, made, parse_time(spans["val_since"]), parse_time(spans["val_until"]))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        found = {
            "run_id": run_id,
            "model": manifest["model"],
            "series": len(series),
            "since": spans["val_since"],
            "until": spans["val_until"],
            "parameters": parameters(made.net),
            **_dynamics(made.net, series),
            "ablation": ablation(made.net, series),
        }
    folder.write_json("inspect.json", found)
    folder.write_text("inspect.svg", draw(found))
    return found | {"plot": str(folder.path / "inspect.svg")}


def _bars(home: Path, folder: RunFolder, made: Artefact, since_ms: int, until_ms: int) -> list[Samples]:
    """The stored series of a run with labels in its validation span and enough bars before it."""
    config, _ = load_config([folder.config], [], {})
    step = INTERVALS[config.market.interval] or 31 * 86_400_000
    start = since_ms - (made.transform.lookback + FULL + 8) * step
    raw = stored_series(open_store(home, config), config, start, until_ms)
    until = from_ms(until_ms)
    raw = [replace(s, frame=s.frame.filter(pl.col("close_time") <= until)) for s in raw]
    data = arrays([s for s in raw if s.frame.height], made.transform)
    samples = make_samples(data, made.symbols, made.transform.horizons, since_ms, until_ms)
    if not samples:
        raise DataMissing(
            f"The store holds no bar of the span that run {folder.run_id} was checked on,"
            f" {from_ms(since_ms):%Y-%m-%d} to {from_ms(until_ms):%Y-%m-%d}.",
            "Run 'recur fetch --since' for it.",
        )
    return samples


def parameters(net: Forecaster) -> dict[str, Any]:
    """Numbers of weights by part; for the core what the textbook's formula gives and what stands beside it.

    One layer of g gates has g · d_h (d_x + d_h + 1) weights: 4 gates in an LSTM, 3 in a GRU. torch keeps two bias
    vectors where one would do, so its GRU and LSTM hold g · d_h more per layer, the ``second_bias``.
    """
    spec = net.spec
    parts = {
        name: sum(p.numel() for p in module.parameters())
        for name, module in net.named_children()
        if any(True for _ in module.parameters())
    }
    out: dict[str, Any] = {"total": sum(p.numel() for p in net.parameters()), "parts": parts}
    if spec.model in GATES:
        g, d_h, d_x = GATES[spec.model], spec.hidden, spec.n_features + spec.embed
        formula = sum(g * d_h * (d + d_h + 1) for d in [d_x, *[d_h] * (spec.layers - 1)])
        second = sum(
            p.numel() for n, p in net.named_parameters() if n.rpartition(".")[2].startswith("bias_hh")
        )
        out["core"] = {
            "formula": f"{g}·d_h·(d_x + d_h + 1)",
            "d_x": d_x,
            "d_h": d_h,
            "layers": spec.layers,
            "expected": formula,
            "second_bias": second,
            "other": parts["core"] - formula - second,
        }
    return out


@dataclass(frozen=True, slots=True)
class Cut:
    """Windows that end at the same bars: ``x`` (N, K, F), ``symbol`` (N,), marks (N, K), target and mask (N, 1, H)."""

    x: Tensor
    symbol: Tensor
    observed: Tensor
    elapsed: Tensor
    target: Tensor
    mask: Tensor

    def steps(self, net: Forecaster, rows: slice, last: int) -> Steps | None:
        return net.steps(self.observed[rows, -last:], self.elapsed[rows, -last:])

    def there(self, net: Forecaster, t: int) -> Tensor:
        """(N,) which windows have a bar at ``t`` for the model to step over; a missing one is an input to most."""
        return self.observed[:, t] if net.spec.continuous else torch.ones_like(self.observed[:, t])


def _windows(series: Sequence[Samples], length: int, count: int) -> Cut:
    """About ``count`` windows of ``length`` bars that end at bars with a label, spread evenly."""
    rows: list[tuple[Samples, int]] = []
    for s in series:
        ends = torch.nonzero(s.mask.any(1) & s.observed).flatten() + 1
        ends = ends[ends >= min(length, int(ends[-1]))]
        pick = np.unique(np.linspace(0, len(ends) - 1, max(1, count // len(series))).astype(int))
        rows += [(s, int(ends[i])) for i in pick]
    length = min(length, *(end for _, end in rows))
    return Cut(
        x=torch.stack([s.x[end - length : end] for s, end in rows]),
        symbol=torch.tensor([s.symbol for s, _ in rows]),
        observed=torch.stack([s.observed[end - length : end] for s, end in rows]),
        elapsed=torch.stack([s.elapsed[end - length : end] for s, end in rows]),
        target=torch.stack([s.target[end - 1 : end] for s, end in rows]),
        mask=torch.stack([s.mask[end - 1 : end] for s, end in rows]),
    )


def _dynamics(net: Forecaster, series: Sequence[Samples]) -> dict[str, Any]:
    """Spectral radius, gradient by lag, and gates, all on windows of real bars."""
    few = _windows(series, LAGS, 8)
    with torch.no_grad():
        u = net.inputs(few.x, few.symbol)
    steps = few.steps(net, slice(None), u.shape[1])
    at = [int(t) for t in np.linspace(u.shape[1] // 2, u.shape[1] - 1, 8)]
    states = states_along(net.core, u, at, steps)
    radii = torch.cat(
        [
            spectral_radius(net.core, s, u[:, t], steps=None if steps is None else steps.at(t))[
                few.there(net, t)
            ]
            for t, s in zip(at, states, strict=True)
        ]
    )
    norms = gradient_by_lag(net.core, u, steps=steps).tolist()
    top = max(norms)
    far = max((k for k, v in enumerate(norms) if v >= 0.01 * top), default=0) if top > 0 else 0
    late = None if steps is None else steps.slice(at[0], u.shape[1])
    names = _gate_names(net, found := gates(net.core, u[:, at[0] :], states[0], late))
    return {
        "spectral_radius": {
            "state_size": state_size(states[0]),
            "points": radii.numel(),
            "median": _number(radii.median()),
            "min": _number(radii.min()),
            "max": _number(radii.max()),
        },
        "gradient": {"norm_by_lag": norms, "one_percent_lag": far, "followed": len(norms) - 1},
        "gates": [{"gate": name, **asdict(gate)} for name, gate in zip(names, found, strict=True)],
    }


def _number(value: Tensor) -> float | None:
    return float(value) if math.isfinite(float(value)) else None


def _gate_names(net: Forecaster, found: Sequence[Gate]) -> list[str]:
    names, layers = GATE_NAMES.get(net.spec.model, ()), net.spec.layers
    if len(found) != len(names) * layers:
        kinds = [gate.kind for gate in found]
        return [f"{kind} {kinds[:k].count(kind) + 1}" for k, kind in enumerate(kinds)]
    return [f"layer {i + 1} {name}" for i in range(layers) for name in names]


def ablation(net: Forecaster, series: Sequence[Samples]) -> dict[str, Any]:
    """Pinball loss of forecasts whose state began k bars before, and how much worse that is than the longest.

    ``worse`` is the relative excess of the mean over horizons, ``error`` its standard error over forecasts.
    """
    cut = _windows(series, FULL, CUTOFFS)
    longest = cut.x.shape[1]
    losses = {k: _losses(net, cut, k) for k in (*(k for k in CUTS if k < longest), longest)}
    full = losses[longest]
    rows = []
    for k, loss in losses.items():
        seen = torch.isfinite(loss)
        excess = torch.where(seen, loss - full, 0.0).sum(1) / seen.sum(1).clamp(min=1)  # (N,)
        scale = float(full[seen].mean())
        rows.append(
            {
                "bars": k,
                "pinball": {str(h): _number(loss[:, i].nanmean()) for i, h in enumerate(net.spec.horizons)},
                "worse": float(excess.mean()) / scale if scale else 0.0,
                "error": float(excess.std()) / math.sqrt(len(excess)) / scale
                if scale and len(excess) > 1
                else 0.0,
            }
        )
    return {"forecasts": len(cut.x), "longest": longest, "rows": rows}


@torch.no_grad()
def _losses(net: Forecaster, cut: Cut, bars: int) -> Tensor:
    """(N, H) pinball loss at the last bar of states that began ``bars`` earlier; NaN without a label."""
    out = []
    for low in range(0, len(cut.x), ROWS):
        rows = slice(low, low + ROWS)
        got, _ = net(cut.x[rows, -bars:], cut.symbol[rows], None, cut.steps(net, rows, bars))
        last = replace(got, quantiles=got.quantiles[:, -1:])
        loss = pinball_errors(last, cut.target[rows])[:, 0]
        out.append(torch.where(cut.mask[rows, 0], loss, torch.nan))
    return torch.cat(out)
