"""What a fetch was answered, collected and written in batches: each window in one transaction with its rows.

answers ──> runs of whole windows become one frame; windows with gaps are cut by reason ──> store
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import polars as pl

from recur.connectors.answers import candle_frame
from recur.connectors.bybit import BybitConnector
from recur.connectors.windows import Bars, Range, Window, count_bars
from recur.pipeline.gaps import EXPECTED_REASONS, Life, Part, explained
from recur.pipeline.plan import FetchPlan, FundingRange
from recur.storage.fetched import Asked
from recur.storage.store import PutResult, Store, WindowRows
from recur.vocabulary import Series, VenueError

BATCH_WINDOWS = 50
BATCH_S = 1.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Candles:
    """One window's bars, sorted, the open times that are missing, and the venue's clock at the answer."""

    window: Window
    bars: Bars
    missing: list[int]
    time_ms: int


@dataclass(frozen=True, slots=True)
class Points:
    """One window's open interest or long/short ratios, and the instants that are missing."""

    window: Window
    frame: pl.DataFrame
    missing: list[int]


@dataclass(frozen=True, slots=True)
class Funding:
    asked: FundingRange
    frame: pl.DataFrame


@dataclass(frozen=True, slots=True)
class Instruments:
    frame: pl.DataFrame


Answer = Candles | Points | Funding | Instruments


@dataclass(slots=True)
class FetchSummary:
    """What a fetch did. ``gaps`` counts windows in which the venue lacks bars that it should have, ``missing`` those
    bars; bars before a symbol's listing or after its delisting count as neither. ``reasons`` counts all missing bars
    by reason. ``clock_drift_s``: how far the venue's clock is ahead of this machine's."""

    series: list[str] = field(default_factory=list)
    windows: int = 0
    requests: int = 0
    new: int = 0
    changed: int = 0
    gaps: int = 0
    missing: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    clock_drift_s: float = 0.0
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        return {
            "series": self.series,
            "windows": self.windows,
            "requests": self.requests,
            "new": self.new,
            "changed": self.changed,
            "gaps": self.gaps,
            "missing": self.missing,
            "reasons": self.reasons,
            "clock_drift_s": round(self.clock_drift_s, 3),
            "seconds": round(self.seconds, 3),
        }


class Writer:
    """Collects answers and stores them, 50 windows or what came in a second at a time.

    ``first_seen`` of candles is the venue's clock at the answer: what was not here cannot have been known.
    """

    def __init__(
        self, store: Store, connector: BybitConnector, plan: FetchPlan, summary: FetchSummary
    ) -> None:
        self._store = store
        self._connector = connector
        self._plan = plan
        self._summary = summary
        self._waiting: list[Answer] = []
        self._started = self._flushed = time.monotonic()
        self._known_maintenance: list[Range] | None = None

    def add(self, answer: Answer) -> None:
        self._waiting.append(answer)
        if len(self._waiting) >= BATCH_WINDOWS or time.monotonic() - self._flushed >= BATCH_S:
            self.flush()

    def flush(self) -> None:
        """Store all that waits; what is stored no longer waits, even when a later part cannot be stored."""
        answers, self._waiting = self._waiting, []
        candles = [answer for answer in answers if isinstance(answer, Candles)]
        if candles:
            now_ms = self._now_ms(answer.time_ms for answer in candles)
            source = self._plan.request.source
            result = self._store.put_windows(self._window_rows(candles), source=source, now_ms=now_ms)
            self._count(result, len(candles))
        for kind in ("open_interest", "long_short"):
            points = [a for a in answers if isinstance(a, Points) and a.window.series.kind == kind]
            if points:
                self._put_points(kind, points)
        funding = [answer for answer in answers if isinstance(answer, Funding)]
        if funding:
            result = self._store.put_funding(
                pl.concat([answer.frame for answer in funding]),
                source=self._plan.request.source,
                now_ms=self._plan.server_ms,
                windows=[(a.asked.series, a.asked.since_ms, a.asked.until_ms) for a in funding],
            )
            self._count(result, len(funding))
        for answer in answers:
            if isinstance(answer, Instruments):
                put = self._store.put_instruments(
                    answer.frame, source=self._plan.request.source, now_ms=self._plan.server_ms
                )
                self._count(put, 1)
        self._flushed = time.monotonic()

    def _now_ms(self, times: Iterable[int]) -> int:
        """The venue's clock at the last of some answers, within what this machine's clock allows since the plan."""
        elapsed_ms = int(1000 * (time.monotonic() - self._started))
        return min(max(*times, self._plan.server_ms), self._plan.server_ms + elapsed_ms)

    def _window_rows(self, answers: Sequence[Candles]) -> list[WindowRows]:
        whole = [answer for answer in answers if not answer.missing]
        out = [_one(run) for run in _runs(whole)]
        for answer in answers:
            if answer.missing:
                for part in self._explained(answer.window, answer.missing):
                    opens = answer.bars.open_ms
                    low, high = np.searchsorted(opens, (part.since_ms, part.until_ms))
                    frame = candle_frame(answer.window.series, [answer.bars.take(slice(int(low), int(high)))])
                    n_bars = count_bars(part.since_ms, part.until_ms, answer.window.series.interval)
                    status = "gap" if part.missing else "done"
                    out.append(
                        WindowRows(
                            answer.window.series,
                            part.since_ms,
                            part.until_ms,
                            frame,
                            n_bars,
                            status,
                            part.reason,
                        )
                    )
        return out

    def _put_points(self, kind: str, answers: Sequence[Points]) -> None:
        asked: list[Asked] = []
        for answer in answers:
            series = answer.window.series
            for part in self._explained(answer.window, answer.missing):
                n = count_bars(part.since_ms, part.until_ms, series.interval)
                status = "gap" if part.missing else "done"
                asked.append((series, part.since_ms, part.until_ms, n, n - part.missing, status, part.reason))
        result = self._store.put_points(
            kind,
            pl.concat([answer.frame for answer in answers]),
            source=self._plan.request.source,
            now_ms=self._plan.server_ms,
            windows=asked,
        )
        self._count(result, len(answers))

    def _explained(self, window: Window, missing: Sequence[int]) -> list[Part]:
        life = self._plan.lives.get(window.series.symbol, Life())
        parts = explained(window, missing, life)
        if any(part.reason not in ("", *EXPECTED_REASONS) for part in parts):
            parts = explained(window, missing, life, self._maintenance())
        for part in parts:
            if part.missing:
                reasons = self._summary.reasons
                reasons[part.reason] = reasons.get(part.reason, 0) + part.missing
        lacking = sum(part.missing for part in parts if part.reason not in EXPECTED_REASONS)
        self._summary.gaps += bool(lacking)
        self._summary.missing += lacking
        return parts

    def _maintenance(self) -> list[Range]:
        """The venue's maintenance windows, asked once, when something has to be explained."""
        if self._known_maintenance is None:
            try:
                self._known_maintenance = self._connector.maintenance()
            except VenueError as error:
                _log.warning("gaps cannot be compared with the venue's maintenance: %s", error.message)
                self._known_maintenance = []
        return self._known_maintenance

    def _count(self, result: PutResult, windows: int) -> None:
        self._summary.new += result.new
        self._summary.changed += result.changed
        self._summary.windows += windows


def _runs(answers: Sequence[Candles]) -> list[list[Candles]]:
    """Answers of one series whose windows touch, in the order of time."""
    ordered = sorted(answers, key=lambda answer: answer.window)
    runs = [ordered[:1]] if ordered else []
    for before, answer in pairwise(ordered):
        touching = (
            before.window.series == answer.window.series and before.window.until_ms == answer.window.since_ms
        )
        if touching:
            runs[-1].append(answer)
        else:
            runs.append([answer])
    return runs


def _one(run: Sequence[Candles]) -> WindowRows:
    first, last = run[0].window, run[-1].window
    frame = candle_frame(first.series, [answer.bars for answer in run])
    return WindowRows(first.series, first.since_ms, last.until_ms, frame, sum(a.window.expected for a in run))


def empty_window(window: Window, reason: str) -> WindowRows:
    """The record of a window that was not asked, since nothing can be there."""
    frame = candle_frame(window.series, [])
    return WindowRows(window.series, window.since_ms, window.until_ms, frame, window.expected, "gap", reason)


def record_mark(series: Series, at_ms: int) -> WindowRows:
    """An empty range that marks where a record starts."""
    return WindowRows(series, at_ms, at_ms, candle_frame(series, []), 0, "done", "start of the record")
