"""The pictures of a report, as SVG text that stands inside a page.

Drawn with matplotlib's own objects and its SVG writer: no pyplot, no global figure, no display. Colours are placeholders that
become CSS variables (``var(--ours)``), so that one picture is legible on a light and on a dark page; letters stay
text. Instants are float64 days since 1970 UTC, returns are log returns, skills are fractions.
"""

from __future__ import annotations

import io
import re
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import matplotlib
import numpy as np
from matplotlib import dates as mdates
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from numpy.typing import NDArray

Floats = NDArray[np.float64]

INK, SOFT, GRID = "#010101", "#010102", "#010103"
OURS, OTHER, THIRD = "#010104", "#010105", "#010106"
_VARIABLES = {INK: "ink", SOFT: "soft", GRID: "grid", OURS: "ours", OTHER: "other", THIRD: "third"}
_RC = {
    "svg.fonttype": "none", "svg.hashsalt": "recur", "text.parse_math": False, "font.size": 9.0,
    "figure.facecolor": "none", "axes.facecolor": "none", "text.color": INK, "axes.labelcolor": SOFT, "axes.edgecolor": GRID, "axes.titlecolor": INK,
    "xtick.color": SOFT, "ytick.color": SOFT, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.color": GRID, "grid.linewidth": 0.6, "axes.axisbelow": True,
    "axes.titlesize": 10.0, "axes.titlelocation": "left", "legend.frameon": False, "legend.fontsize": 8.5,
    "lines.linewidth": 1.4, "axes.unicode_minus": True,
}  # fmt: skip
MAX_POINTS = 1500
"""Points of one drawn curve; longer ones are thinned."""


@dataclass(frozen=True, slots=True)
class Interval:
    """One row of the forest plot. ``attainable`` is the skill of the simulated market's own law, where known."""

    group: str
    name: str
    skill: float
    low: float | None
    high: float | None
    attainable: float | None = None


@dataclass(frozen=True, slots=True)
class Fan:
    """The newest forecasts of one series: history (T,), and from the last cutoff H horizons in order.

    ``quantiles`` (H, 5) are log returns at 5, 25, 50, 75 and 95 %; ``actual`` (H,) is NaN where still unknown.
    """

    name: str
    times: Floats
    prices: Floats
    ahead: Floats
    quantiles: Floats
    actual: Floats


@dataclass(frozen=True, slots=True)
class Band:
    """Forecasts of one horizon at their target times (T,): the 90 % band and what happened (NaN: unknown)."""

    name: str
    times: Floats
    low: Floats
    high: Floats
    actual: Floats

    @property
    def outside(self) -> NDArray[np.bool_]:
        """(T,) whether the realised return lies outside the band; false where it is unknown."""
        out: NDArray[np.bool_] = (self.actual < self.low) | (self.actual > self.high)
        return out


def _render(width: float, height: float, label: str, draw: Callable[[Any], None]) -> str:
    with matplotlib.rc_context(_RC), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from")  # the browser has other fonts
        figure = Figure((width, height), layout="constrained")
        draw(figure)
        text = io.StringIO()
        FigureCanvasSVG(figure).print_svg(text, metadata={"Date": None})
    return _inline(text.getvalue(), label)


def _inline(svg: str, label: str) -> str:
    """The bare ``<svg>`` element: no metadata, no foreign links, ids that cannot meet another picture's."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<defs>\s*<style.*?</defs>", "", svg, count=1, flags=re.DOTALL)
    prefix = re.sub(r"[^a-z0-9]+", "-", label.lower()) + f"-{_checksum(label)}-"

    def mend(match: re.Match[str]) -> str:
        tag = match.group(0)
        if tag.startswith("<svg"):
            box = re.search(r'viewBox="[^"]*"', tag)
            return f'<svg {box.group(0) if box else ""} role="img" aria-label="{escape(label)}">'
        if tag.startswith("<g "):
            tag = re.sub(r' id="[^"]*"', "", tag)
        tag = re.sub(r'\bid="', f'id="{prefix}', tag)
        tag = tag.replace("url(#", f"url(#{prefix}").replace('xlink:href="#', f'href="#{prefix}')
        tag = re.sub(r"font-family:[^;\"]*;? ?", "", tag)
        tag = re.sub(r"#0101\d\d", lambda m: f"var(--{_VARIABLES.get(m.group(0), 'ink')})", tag)
        tag = re.sub(r"#000000", "var(--ink)", tag)
        return re.sub(r"(\.\d\d)\d+", r"\1", tag).replace("\n", " ")

    return re.sub(r">\s+<", "><", re.sub(r"<[^>]*>", mend, svg)).strip()


def _checksum(text: str) -> str:
    return f"{zlib.crc32(text.encode()):08x}"


def _time_axis(axes: Any) -> None:
    locator = mdates.AutoDateLocator(tz="UTC", minticks=3, maxticks=7)
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(mdates.ConciseDateFormatter(locator, tz="UTC"))


def _thin(times: Floats, values: Floats) -> tuple[Floats, Floats]:
    """Every k-th point, and always the last one."""
    step = max(1, -(-len(times) // MAX_POINTS))
    keep = np.unique(np.append(np.arange(0, len(times), step), len(times) - 1))
    return times[keep], values[keep]


def _lowest(times: Floats, values: Floats) -> tuple[Floats, Floats]:
    """The lowest value of each run of k points, so that no trough is thinned away."""
    step = max(1, -(-len(times) // MAX_POINTS))
    starts = np.arange(0, len(times), step)
    return times[starts], np.fmin.reduceat(values, starts)


def forest(rows: Sequence[Interval]) -> str:
    """Skill in percent against each baseline, one group per horizon: point, 95 % interval, zero line."""

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        at, ticks, labels, last = 0.0, [], [], ""
        for row in rows:
            if row.group != last:
                at += 1.15 if last else 0.6
                axes.annotate(
                    row.group, (0, at), xycoords=("axes fraction", "data"), xytext=(4, 0),
                    textcoords="offset points", va="center", weight="bold",
                )  # fmt: skip
                at, last = at + 1, row.group
            low = row.skill if row.low is None else row.low
            high = row.skill if row.high is None else row.high
            sure = row.low is not None and row.high is not None
            colour = OURS if sure and low > 0 else OTHER if sure and high < 0 else SOFT
            axes.plot([100 * low, 100 * high], [at, at], color=colour, linewidth=2.2, solid_capstyle="butt")
            axes.plot([100 * row.skill], [at], "o", color=colour, markersize=5.5)
            if row.attainable is not None:
                axes.plot([100 * row.attainable], [at], "D", markersize=6, markerfacecolor="none", color=INK)
            ticks.append(at)
            labels.append(row.name)
            at += 1
        axes.axvline(0, color=INK, linewidth=1)
        axes.set_yticks(ticks, labels)
        axes.set_ylim(at - 0.3, 0)
        axes.margins(x=0.08)
        axes.grid(False, axis="y")
        axes.set_xlabel("CRPS skill, %   (right of zero: the model is better)")

    groups = len({row.group for row in rows})
    return _render(7.4, 0.75 + 0.22 * len(rows) + 0.45 * groups, "CRPS skill against each baseline", draw)


def calibration(levels: Sequence[float], shares: Sequence[float], title: str) -> str:
    """Share of outcomes below each quantile against its level; the diagonal is perfect calibration."""

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        axes.plot([0, 100], [0, 100], color=SOFT, linewidth=1, linestyle=(0, (4, 3)))
        axes.plot(
            [100 * v for v in levels], [100 * v for v in shares], color=OURS, marker="o", markersize=3.5
        )
        axes.set(xlim=(0, 100), ylim=(0, 100), xlabel="quantile level, %", ylabel="outcomes below it, %")
        axes.set_xticks(range(0, 101, 25))
        axes.set_yticks(range(0, 101, 25))
        axes.set_aspect("equal")
        axes.set_title(title)

    return _render(3.2, 3.3, f"Calibration, {title}", draw)


def fan(data: Fan) -> str:
    """Price up to the last cutoff, and the 50 % and 90 % bands of every horizon after it."""

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        start, price = data.times[-1], data.prices[-1]
        times = np.append(start, data.ahead)
        bands = price * np.exp(np.vstack([np.zeros(5), data.quantiles]))
        axes.fill_between(times, bands[:, 0], bands[:, 4], color=OURS, alpha=0.18, linewidth=0, label="90 %")
        axes.fill_between(times, bands[:, 1], bands[:, 3], color=OURS, alpha=0.34, linewidth=0, label="50 %")
        axes.plot(times, bands[:, 2], color=OURS, label="median")
        axes.plot(data.times, data.prices, color=INK, linewidth=1.1)
        known = np.isfinite(data.actual)
        if known.any():
            axes.plot(
                data.ahead[known], price * np.exp(data.actual[known]), "o", color=OTHER, markersize=4.5,
                label="what happened",
            )  # fmt: skip
        axes.axvline(start, color=SOFT, linewidth=0.8, linestyle=(0, (2, 2)))
        axes.margins(x=0.02)
        axes.yaxis.get_major_formatter().set_useOffset(False)
        axes.set_ylabel("price")
        axes.set_title(data.name)
        _time_axis(axes)
        figure.legend(loc="outside lower left", ncols=4)

    return _render(5.4, 3.0, f"Forecast fan of {data.name}", draw)


def band(data: Band, title: str) -> str:
    """The rolling 90 % band of one horizon and the realised returns; those outside it are marked."""

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        axes.fill_between(
            data.times, 100 * data.low, 100 * data.high, color=OURS, alpha=0.2, linewidth=0, label="90 % band"
        )
        known, out = np.isfinite(data.actual), data.outside
        axes.plot(data.times[known], 100 * data.actual[known], color=INK, linewidth=0.9, label="realised")
        if out.any():
            axes.plot(
                data.times[out], 100 * data.actual[out], "o", color=OTHER, markersize=4.5, label="outside"
            )
        axes.axhline(0, color=SOFT, linewidth=0.7)
        axes.margins(x=0.02)
        axes.set_ylabel("log return, %")
        axes.set_title(title)
        _time_axis(axes)
        figure.legend(loc="outside lower left", ncols=3)

    return _render(5.4, 3.0, f"Rolling band of {data.name}", draw)


def difference(curves: Mapping[str, tuple[Floats, Floats]]) -> str:
    """Cumulative loss difference, ours minus EWMA, one panel per horizon (their units differ too much for one)."""

    def draw(figure: Any) -> None:
        panels = figure.subplots(len(curves), 1, sharex=True, squeeze=False)[:, 0]
        for axes, (name, (times, values)) in zip(panels, curves.items(), strict=True):
            axes.plot(*_thin(times, values), color=OURS)
            axes.axhline(0, color=SOFT, linewidth=0.8)
            axes.set_title(name)
            axes.margins(x=0.01)
            _time_axis(axes)
        figure.supylabel("log-return units, falling: the model gains", color=SOFT, fontsize=9)

    return _render(7.4, 0.6 + 1.6 * len(curves), "Cumulative CRPS difference to EWMA", draw)


def equity(times: Floats, curves: Mapping[str, Floats]) -> str:
    """Cumulative log returns in percent above, the drawdown of each from its own peak below."""
    styles = {"net": (OURS, 1.8, "-"), "gross": (THIRD, 1.2, (0, (5, 2))), "buy_hold": (OTHER, 1.2, "-")}
    names = {"net": "net of costs", "gross": "before costs", "buy_hold": "buy and hold"}

    def draw(figure: Any) -> None:
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
        for key, values in curves.items():
            colour, width, dash = styles[key]
            upper.plot(
                *_thin(times, 100 * values),
                color=colour, linewidth=width, linestyle=dash, label=names[key],
            )  # fmt: skip
            if key != "gross":
                lower.plot(
                    *_lowest(times, 100 * drawdown(values)), color=colour, linewidth=width, linestyle=dash
                )
        for axes, text in ((upper, "cumulative log return, %"), (lower, "drawdown, %")):
            axes.axhline(0, color=SOFT, linewidth=0.8)
            axes.set_ylabel(text)
            axes.margins(x=0.01)
        _time_axis(lower)
        figure.legend(loc="outside lower left", ncols=3)

    return _render(7.4, 4.6, "Equity and drawdown of the simulated trading", draw)


def drawdown(log_equity: Floats) -> Floats:
    """(T,) loss from the highest value so far (the start, 0, included), as a fraction of it: 0 or negative."""
    peak = np.fmax(np.fmax.accumulate(log_equity), 0.0)
    out: Floats = np.expm1(log_equity - peak)
    return out


def training(values: Sequence[float]) -> str:
    """Validation pinball loss by epoch, the best one marked."""

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        epochs = np.arange(1, len(values) + 1)
        axes.plot(epochs, values, color=OURS, marker="o", markersize=4)
        if np.isfinite(values).any():
            best = int(np.nanargmin(values))
            axes.plot([epochs[best]], [values[best]], "D", color=OTHER, markersize=8, markerfacecolor="none")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set(xlabel="epoch", ylabel="validation pinball loss (standardised returns)")

    return _render(7.4, 3.2, "Validation loss by epoch", draw)
