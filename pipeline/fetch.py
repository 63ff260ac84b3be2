"""Bring the store up to date: ask what the plan says, keep what came, record what did not.

    plan.windows ──> threads ask the venue ──> answers ──> one transaction per 50 windows or second ──> store

A window and its rows are recorded in one transaction, so a fetch that is stopped or killed at any moment leaves a
record that tells the truth, and the same command run again asks for the rest only.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl

from recur.connectors.bybit import BybitConnector
from recur.connectors.files import read_candles, read_funding, sniff
from recur.connectors.windows import Window, verify
from recur.pipeline.parallel import Parallel
from recur.pipeline.plan import FetchPlan, FetchRequest, FundingRange, plan_fetch, series_name
from recur.storage.store import CANDLE_SCHEMA, PutResult, Store, WindowRows
from recur.vocabulary import Series, VenueBanned, VenueError, VenueForbidden, VenueUnreachable

__all__ = ["FetchPlan", "FetchRequest", "FetchSummary", "import_file", "plan_fetch", "run_fetch"]

BATCH_WINDOWS = 50
BATCH_S = 1.0

Task = Window | FundingRange


@dataclass(slots=True)
class FetchSummary:
    """What a fetch did. ``gaps`` counts windows in which the venue lacks bars that it should have, ``missing``
    those bars; bars before a symbol's listing count as neither."""

    series: list[str] = field(default_factory=list)
    windows: int = 0
    requests: int = 0
    new: int = 0
    changed: int = 0
    gaps: int = 0
    missing: int = 0
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
            "seconds": round(self.seconds, 3),
        }


@dataclass(frozen=True, slots=True)
class _Funding:
    asked: FundingRange
    frame: pl.DataFrame


class _Writer:
    """Collects answers and stores them in batches; ``first_seen`` is the venue's time at the plan."""

    def __init__(self, store: Store, plan: FetchPlan, summary: FetchSummary) -> None:
        self._store = store
        self._source = plan.request.source
        self._now_ms = plan.server_ms
        self._summary = summary
        self._windows: list[WindowRows] = []
        self._funding: list[_Funding] = []
        self._flushed = time.monotonic()

    def add(self, answer: WindowRows | _Funding) -> None:
        if isinstance(answer, _Funding):
            self._funding.append(answer)
        else:
            self._windows.append(answer)
        waiting = len(self._windows) + len(self._funding)
        if waiting >= BATCH_WINDOWS or time.monotonic() - self._flushed >= BATCH_S:
            self.flush()

    def flush(self) -> None:
        if self._windows:
            result = self._store.put_windows(self._windows, source=self._source, now_ms=self._now_ms)
            done, self._windows = self._windows, []
            self._count(result, len(done))
            for window in done:
                if window.reason == "venue empty":
                    self._summary.gaps += 1
                    self._summary.missing += (window.expected or 0) - window.frame.height
        if self._funding:
            result = self._store.put_funding(
                pl.concat([answer.frame for answer in self._funding]),
                source=self._source,
                now_ms=self._now_ms,
                windows=[(a.asked.series, a.asked.since_ms, a.asked.until_ms) for a in self._funding],
            )
            self._count(result, len(self._funding))
            self._funding = []
        self._flushed = time.monotonic()

    def _count(self, result: PutResult, windows: int) -> None:
        self._summary.new += result.new
        self._summary.changed += result.changed
        self._summary.windows += windows


def run_fetch(
    store: Store,
    connector: BybitConnector,
    plan: FetchPlan,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> FetchSummary:
    """Ask all of ``plan`` in parallel and store it; ``on_progress(done, total)`` counts windows.

    A window that fails does not cost the others: what was answered is stored, then the first error is raised. When
    the venue cannot be reached, or refuses to serve, no further window is asked. A dry run asks and stores nothing.
    """
    started, requests_before = time.monotonic(), connector.requests
    summary = FetchSummary(series=_names(plan))
    if plan.request.dry_run:
        return summary
    _record_start(store, plan)
    writer = _Writer(store, plan, summary)
    tasks: list[Task] = [*plan.windows, *plan.funding]
    workers = max(1, min(plan.request.workers or connector.workers, len(tasks)))
    pool = Parallel(tasks, partial(_ask, connector, plan.listed), workers)
    errors: list[Exception] = []
    try:
        for n_done, outcome in enumerate(pool, start=1):
            if outcome.result is not None:
                writer.add(outcome.result)
            elif outcome.error is not None:
                errors.append(outcome.error)
                if _is_hopeless(outcome.error):
                    pool.stop()
            on_progress(n_done, len(tasks))
    except KeyboardInterrupt:
        connector.stop()
        pool.stop()
        writer.flush()
        raise
    except BaseException:
        pool.stop()
        raise
    writer.flush()
    if errors:
        raise errors[0]
    summary.requests = connector.requests - requests_before
    summary.seconds = time.monotonic() - started
    return summary


def _ask(connector: BybitConnector, listed: dict[tuple[str, str], int], task: Task) -> WindowRows | _Funding:
    if isinstance(task, FundingRange):
        series = task.series
        return _Funding(task, connector.funding(series.category, series.symbol, task.since_ms, task.until_ms))
    frame = connector.candles(task)
    frame, missing = verify(task, frame)
    listed_ms = listed.get((task.series.category, task.series.symbol), task.since_ms)
    if missing and missing[-1] >= listed_ms:  # once more: an answer may be short by accident
        again = connector.candles(task)
        frame, missing = verify(task, pl.concat([frame, again]).unique("open_time", keep="last"))
    status = "gap" if missing else "done"
    reason = "" if not missing else "before listing" if missing[-1] < listed_ms else "venue empty"
    return WindowRows(task.series, task.since_ms, task.until_ms, frame, task.expected, status, reason)


def _record_start(store: Store, plan: FetchPlan) -> None:
    """Record where each new series begins, so that an interrupted first fetch is resumed from there.

    That is the range before the listing when there is one, else an empty range that marks the place.
    """
    empty = CANDLE_SCHEMA.to_frame()
    marks = [
        WindowRows(w.series, w.since_ms, w.until_ms, empty, w.expected, "gap", "before listing")
        for w in plan.before_listing
    ]
    marked = {mark.series for mark in marks}
    marks += [
        WindowRows(series, since_ms, since_ms, empty, 0, "done", "start of the record")
        for series, since_ms in plan.starts.items()
        if series not in marked
    ]
    store.put_windows(marks, source=plan.request.source, now_ms=plan.server_ms)


def _is_hopeless(error: Exception) -> bool:
    """Whether the other windows would fail as well."""
    venue_gone = isinstance(error, VenueUnreachable | VenueBanned | VenueForbidden)
    return venue_gone or not isinstance(error, VenueError)


def _names(plan: FetchPlan) -> list[str]:
    asked = [w.series for w in plan.windows] + [f.series for f in plan.funding]
    return list(dict.fromkeys(series_name(series) for series in asked))


def import_file(store: Store, path: Path, category: str, now_ms: int) -> dict[str, Any]:
    """Store the candles or funding of a file and say what came of it; UsageError when the file does not fit.

    ``category`` is that of rows which do not name one; ``now_ms`` becomes their first-seen time.
    """
    started, source = time.monotonic(), f"file:{path.name}"
    kind = sniff(path)
    if kind == "funding":
        frame = read_funding(path, category=category)
        result = store.put_funding(frame, source=source, now_ms=now_ms)
        keys = frame.select("category", "symbol").unique(maintain_order=True).iter_rows()
        names = [series_name(Series(c, s, "", "funding")) for c, s in keys]
    else:
        frame = read_candles(path, category=category)
        result = store.put_candles(frame, source=source, now_ms=now_ms)
        columns = ("category", "symbol", "interval", "kind")
        names = [str(Series(*key)) for key in frame.select(columns).unique(maintain_order=True).iter_rows()]
    return {
        "source": source,
        "kind": kind,
        "series": names,
        "rows": frame.height,
        "new": result.new,
        "changed": result.changed,
        "same": result.same,
        "seconds": round(time.monotonic() - started, 3),
    }
