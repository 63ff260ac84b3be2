"""The picture of ``recur inspect``: one SVG with the gradient by lag, the ablation, the gates and the parameters."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

_RC = {
    "svg.fonttype": "none", "svg.hashsalt": "recur", "text.parse_math": False, "font.size": 9.0,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3,
    "axes.axisbelow": True, "axes.titlesize": 10.0, "axes.titlelocation": "left",
}  # fmt: skip
_BLUE, _GREY = "#2b6cb0", "#94a3b8"
MOST_GATES = 16
"""More could not be told apart in the picture; ``inspect.json`` has them all."""


def draw(found: Mapping[str, Any]) -> str:
    """SVG text of what ``inspect_run`` found; the same findings give the same bytes."""
    with matplotlib.rc_context(_RC), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from")  # the viewer has other fonts
        figure = Figure((9.6, 6.4), layout="constrained", facecolor="white")
        axes = figure.subplots(2, 2)
        radius = found["spectral_radius"]["median"]
        shown = "not measured" if radius is None else f"{radius:.3f}"
        figure.suptitle(f"{found['run_id']}: spectral radius {shown} (median)", x=0.01, ha="left")
        _gradient(axes[0, 0], found["gradient"])
        _ablation(axes[0, 1], found["ablation"])
        _gates(axes[1, 0], found["gates"])
        _parameters(axes[1, 1], found["parameters"])
        text = io.StringIO()
        FigureCanvasSVG(figure).print_svg(text, metadata={"Date": None})
    return text.getvalue()


def _gradient(axes: Any, gradient: Mapping[str, Any]) -> None:
    norms = np.asarray(gradient["norm_by_lag"])
    top = norms.max() or 1.0
    axes.plot(np.arange(len(norms)), np.maximum(norms / top, 1e-12), color=_BLUE)
    axes.axhline(0.01, color=_GREY, linestyle="--", linewidth=0.8)
    axes.set(yscale="log", ylim=(1e-9, 2), xlabel="lag in bars", ylabel="of the largest")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_title("Gradient of the last output by input lag")


def _ablation(axes: Any, ablation: Mapping[str, Any]) -> None:
    rows = ablation["rows"]
    bars = [row["bars"] for row in rows]
    worse, error = ([100 * row[key] for row in rows] for key in ("worse", "error"))
    axes.errorbar(bars, worse, yerr=[2 * e for e in error], color=_BLUE, marker="o", markersize=3, capsize=2)
    axes.axhline(0, color=_GREY, linewidth=0.8)
    axes.set(xscale="log", xlabel="bars of memory", ylabel="% worse")
    axes.set_xticks(bars, [f"{n}" for n in bars])
    axes.minorticks_off()
    axes.set_title(f"Pinball loss when the state is cut, against {ablation['longest']} bars")


def _gates(axes: Any, gates: Any) -> None:
    axes.set_title("Gates: mean, and from the 5 % to the 95 % quantile")
    if not gates:
        axes.text(0.5, 0.5, "no gates", ha="center", transform=axes.transAxes)
        return
    if len(gates) > MOST_GATES:
        axes.set_title(f"Gates, the first {MOST_GATES} of {len(gates)}: mean, 5 % to 95 % quantile")
        gates = gates[:MOST_GATES]
    y = np.arange(len(gates))
    axes.hlines(y, [g["low"] for g in gates], [g["high"] for g in gates], color=_GREY, linewidth=4)
    axes.plot([g["mean"] for g in gates], y, "o", color=_BLUE)
    axes.set_yticks(y, [g["gate"] for g in gates])
    axes.set(xlim=(0, 1))
    axes.invert_yaxis()


def _parameters(axes: Any, parameters: Mapping[str, Any]) -> None:
    parts = parameters["parts"]
    y = np.arange(len(parts))
    axes.barh(y, list(parts.values()), color=_BLUE)
    axes.set_yticks(y, list(parts))
    axes.invert_yaxis()
    axes.set_title(f"Parameters by part ({parameters['total']:,} in all)")
