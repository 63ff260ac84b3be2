"""Bring the store up to date: ask what the plan says, keep what came, record what did not.

    plan.windows ──> threads ask the venue ──> answers ──> one transaction per 50 windows or second ──> store

A window and its rows are recorded in one transaction, so a fetch that is stopped or killed at any moment leaves a
record that tells the truth, and the same command run again asks for the rest only.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import polars as pl

from recur.connectors.bybit import POINT_PAGE_ROWS, BybitConnector
from recur.connectors.windows import Window, count_bars
from recur.pipeline.answered import (
    Answer,
    Candles,
    FetchSummary,
    Funding,
    Instruments,
    Points,
    Writer,
    empty_window,
    record_mark,
)
from recur.pipeline.gaps import BEFORE_LISTING, EXPECTED_REASONS, Life, reason_of
from recur.pipeline.parallel import Parallel
from recur.pipeline.plan import FetchPlan, FetchRequest, FundingRange, plan_fetch, series_name
from recur.storage.store import Store
from recur.vocabulary import (
    Series,
    VenueBanned,
    VenueError,
    VenueForbidden,
    VenueUnreachable,
    grid,
    next_open,
)

__all__ = ["FetchPlan", "FetchRequest", "FetchSummary", "plan_fetch", "run_fetch"]

Task = Window | FundingRange


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
    summary = FetchSummary(series=_names(plan), clock_drift_s=plan.drift_ms / 1000)
    if plan.request.dry_run:
        return summary
    for window, reason in plan.unasked:
        summary.reasons[reason] = summary.reasons.get(reason, 0) + window.expected
    tasks: list[Task] = [*plan.windows, *plan.funding]
    workers = max(1, min(plan.request.workers or connector.workers, len(tasks)))
    errors: list[Exception] = []
    pool = Parallel(tasks, partial(_ask, connector, plan), workers)
    writer = Writer(store, connector, plan, summary)
    with store.session():
        try:
            pool.start()  # the first answers are on their way while the store is opened
            _record_start(store, plan)
            if plan.instruments:
                try:
                    writer.add(Instruments(connector.all_instruments(plan.request.category)))
                except VenueError as error:
                    errors.append(error)
                    if _is_hopeless(error):
                        pool.stop()
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


def _ask(connector: BybitConnector, plan: FetchPlan, task: Task) -> Answer:
    series = task.series
    if isinstance(task, FundingRange):
        return Funding(task, connector.funding(series.category, series.symbol, task.since_ms, task.until_ms))
    if series.kind in POINT_PAGE_ROWS:
        return _ask_points(connector, plan, task)
    bars, missing, time_ms = connector.bars(task)
    # An answer may be short by accident, or because the venue cuts it shorter than its limit: ask for what is
    # missing as long as that brings anything.
    while _is_unexplained(task, missing, plan):
        rest = Window(series, *_span(missing, series))
        more, _, time_ms = connector.bars(rest)
        known = len(bars)
        bars = bars.joined(more)
        missing = sorted(set(missing).difference(more.open_ms.tolist()))
        if len(bars) == known:
            break
    return Candles(task, bars, missing, time_ms)


def _ask_points(connector: BybitConnector, plan: FetchPlan, task: Window) -> Points:
    frame = connector.points(task.series, task.since_ms, task.until_ms)
    wanted = grid(task.since_ms, task.until_ms, task.series.interval)
    missing = sorted(set(wanted).difference(frame["ts"].dt.epoch("ms").to_list()))
    if _is_unexplained(task, missing, plan):
        since_ms, until_ms, _ = _span(missing, task.series)
        more = connector.points(task.series, since_ms, until_ms)
        frame = pl.concat([frame, more]).unique("ts", keep="last").sort("ts")
        missing = sorted(set(missing).difference(more["ts"].dt.epoch("ms").to_list()))
    return Points(task, frame, missing)


def _is_unexplained(task: Window, missing: list[int], plan: FetchPlan) -> bool:
    """Whether any missing bar could be there, as far as is known without asking."""
    life = plan.lives.get(task.series.symbol, Life())
    return any(reason_of(ms, task.series.interval, life, ()) not in EXPECTED_REASONS for ms in missing)


def _span(missing: list[int], series: Series) -> tuple[int, int, int]:
    """(since, until, expected) of the range from the first to the last of ``missing``."""
    since_ms, until_ms = missing[0], next_open(missing[-1], series.interval)
    return since_ms, until_ms, count_bars(since_ms, until_ms, series.interval)


def _record_start(store: Store, plan: FetchPlan) -> None:
    """Record what needs no asking, and where each new series begins, so that a first fetch that is cut short is
    resumed from there: the range before the listing when there is one, else an empty range that marks the place."""
    marks = [empty_window(window, reason) for window, reason in plan.unasked]
    marked = {window.series for window, reason in plan.unasked if reason == BEFORE_LISTING}
    marks += [
        record_mark(series, since_ms) for series, since_ms in plan.starts.items() if series not in marked
    ]
    store.put_windows(marks, source=plan.request.source, now_ms=plan.server_ms)


def _is_hopeless(error: Exception) -> bool:
    """Whether the other windows would fail as well."""
    venue_gone = isinstance(error, VenueUnreachable | VenueBanned | VenueForbidden)
    return venue_gone or not isinstance(error, VenueError)


def _names(plan: FetchPlan) -> list[str]:
    asked = [w.series for w in plan.windows] + [f.series for f in plan.funding]
    names = list(dict.fromkeys(series_name(series) for series in asked))
    return [*names, f"bybit:{plan.request.category}:instruments"] if plan.instruments else names
