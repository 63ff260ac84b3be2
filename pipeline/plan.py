"""What a fetch will ask: the request checked, the past subtracted, the rest cut into windows.

A fetch brings a series up to date: from where its record starts (or ``since``) to its last closed bar (or
``until``), leaving out the ranges of ``fetch_windows``. The newest part of the record is asked again, since a bar
may have come late or have been corrected.
"""

from __future__ import annotations

import logging
import math
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from recur.connectors.answers import instant
from recur.connectors.bybit import (
    FUNDING_PAGE_ROWS,
    POINT_INTERVALS,
    POINT_PAGE_ROWS,
    STATUSES,
    BybitConnector,
)
from recur.connectors.windows import PAGE_ROWS, Range, Window, count_bars, missing_ranges, plan_windows
from recur.pipeline.config import FETCH_KINDS
from recur.pipeline.gaps import BEFORE_LISTING, DELISTED, Life
from recur.pipeline.parallel import Parallel
from recur.pipeline.symbols import expand
from recur.storage.store import Store
from recur.vocabulary import (
    DAY_MS,
    HOUR_MS,
    INTERVALS,
    Series,
    UsageError,
    ceil_open,
    check_category,
    check_interval,
    did_you_mean,
    floor_open,
    iso,
)

DEFAULT_DAYS = 365
REREAD_MS = DAY_MS
"""At most so much of the end of the record is asked again when the newest bars are missing."""

FUNDING_TASK_MS = 365 * DAY_MS
MAX_DRIFT_MS = 5000
"""A clock of this machine that is further off is worth a warning."""

_KINDS_WITHOUT = {
    "spot": {"mark", "index", "premium", "funding", "open_interest", "long_short"},
    "inverse": {"premium"},
}

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FetchRequest:
    """What a user wants. ``kinds``: see ``FETCH_KINDS``; candles are the trade candles.

    ``symbols`` may be patterns (see ``pipeline/symbols.py``). Without ``since_ms`` and ``days`` a known series goes
    on from its record and a new one starts ``first_days`` ago; without ``until_ms`` the end is the last bar that
    closed ``lag_ms`` ago by the venue's clock. ``workers`` None takes the connector's.
    """

    symbols: tuple[str, ...]
    category: str = "linear"
    interval: str = "1h"
    kinds: tuple[str, ...] = ("candles",)
    since_ms: int | None = None
    until_ms: int | None = None
    days: float | None = None
    workers: int | None = None
    dry_run: bool = False
    source: str = "bybit"
    first_days: float = DEFAULT_DAYS
    lag_ms: int = 0


@dataclass(frozen=True, slots=True)
class FundingRange:
    """Funding of one symbol in ``[since_ms, until_ms)``, asked as one task; none is known before ``first_ms``."""

    series: Series
    since_ms: int
    until_ms: int
    first_ms: int

    @property
    def n_requests(self) -> int:
        """Pages at one event per eight hours, and the empty one, asked twice, that ends the paging."""
        return math.ceil((self.until_ms - self.first_ms) / (8 * HOUR_MS) / FUNDING_PAGE_ROWS) + 2


@dataclass(slots=True)
class FetchPlan:
    """``windows`` (candles and points) and ``funding`` to ask, and ``instruments`` when a snapshot is wanted.

    ``unasked``: windows known to be empty, with the reason. ``starts`` of new records. ``lives`` of the symbols as
    far as known. ``server_ms`` is the venue's clock, ``drift_ms`` how far it is ahead of this machine's.
    """

    request: FetchRequest
    server_ms: int
    rate: float
    drift_ms: int = 0
    instruments: bool = False
    windows: list[Window] = field(default_factory=list)
    funding: list[FundingRange] = field(default_factory=list)
    unasked: list[tuple[Window, str]] = field(default_factory=list)
    starts: dict[Series, int] = field(default_factory=dict)
    lives: dict[str, Life] = field(default_factory=dict)

    @property
    def n_requests(self) -> int:
        snapshot = 0
        if self.instruments:
            snapshot = 1 + (1 if self.request.category == "spot" else len(STATUSES))
        return snapshot + len(self.windows) + sum(asked.n_requests for asked in self.funding)

    @property
    def seconds(self) -> float:
        """Shortest time at the request rate."""
        return self.n_requests / self.rate

    @property
    def n_tasks(self) -> int:
        return len(self.windows) + len(self.funding) + self.instruments

    def as_dict(self) -> dict[str, Any]:
        per_series: dict[str, dict[str, Any]] = {}
        tasks: list[Window | FundingRange] = [*self.windows, *self.funding]
        for task in tasks:
            name = series_name(task.series)
            row = per_series.setdefault(name, {"series": name, "since": iso(task.since_ms), "windows": 0})
            row["until"] = iso(task.until_ms)
            row["windows"] += 1
            if isinstance(task, Window):
                row["bars"] = row.get("bars", 0) + task.expected
        return {
            "series": list(per_series.values()),
            "windows": self.n_tasks,
            "requests": self.n_requests,
            "seconds": round(self.seconds, 2),
            "server_time": iso(self.server_ms),
        }


def series_name(series: Series) -> str:
    """``str(series)``, and ``bybit:linear:BTCUSDT:funding`` for funding, which has no interval."""
    return str(series) if series.interval else f"bybit:{series.category}:{series.symbol}:{series.kind}"


def plan_fetch(store: Store, connector: BybitConnector, request: FetchRequest) -> FetchPlan:
    """Ask the venue for its clock, its symbols and first bars, the store for its record, and plan the rest.

    Writes nothing. UsageError for a request that makes no sense, UnknownSymbol for one that the venue lacks.
    """
    kinds = _checked_kinds(request)
    server_ms, drift_ms = connector.read_clock()
    if connector.is_public and abs(drift_ms) > MAX_DRIFT_MS:
        _log.warning("this machine's clock is %+.1f s off the venue's", -drift_ms / 1000)
    plan = FetchPlan(request, server_ms, connector.rate, drift_ms, "instruments" in kinds)
    kinds = [kind for kind in kinds if kind != "instruments"]
    symbols = expand(request.symbols, request.category, connector, store) if kinds else ()
    plan.lives = _lives(connector, request.category, symbols)
    # The smaller of two readings: a clock that once stood too late would let open bars pass for closed ones.
    plan.server_ms = min(server_ms, connector.time_ms)
    wanted = [
        Series(request.category, symbol, _interval_of(kind, request.interval), kind)
        for symbol in symbols
        for kind in kinds
    ]
    with store.session() if store.path.exists() else nullcontext():
        asks = [_asked_range(store, plan, series) for series in wanted]
    _learn_listings(connector, plan, [ask for ask in asks if ask.early])
    for ask in asks:
        if ask.since_ms < ask.until_ms:
            (_plan_funding if ask.series.kind == "funding" else _plan_grid)(plan, ask)
    return plan


def _interval_of(kind: str, interval: str) -> str:
    return "" if kind == "funding" else point_interval(interval) if kind in POINT_PAGE_ROWS else interval


def point_interval(interval: str) -> str:
    """The coarsest spacing of points that divides a bar of ``interval``; the finest there is for shorter bars."""
    step = INTERVALS[interval] or DAY_MS
    fitting = [name for name in POINT_INTERVALS if step % INTERVALS[name] == 0]
    return fitting[-1] if fitting else "5m"


def _checked_kinds(request: FetchRequest) -> list[str]:
    check_category(request.category)
    check_interval(request.interval)
    for kind in request.kinds:
        if kind not in FETCH_KINDS and kind != "trade":
            raise UsageError(
                f"Unknown kind '{kind}': expected some of {', '.join(FETCH_KINDS)}."
                f"{did_you_mean(kind, FETCH_KINDS)}"
            )
        if kind in _KINDS_WITHOUT.get(request.category, ()):
            raise UsageError(
                f"The venue has no {kind} data for category '{request.category}'.", "Leave it out of --kinds."
            )
    kinds = list(dict.fromkeys("trade" if kind == "candles" else kind for kind in request.kinds))
    if not request.symbols and kinds != ["instruments"]:
        raise UsageError("No symbol to fetch.", "Name some, as in '-s BTCUSDT -s ETHUSDT'.")
    if None not in (request.since_ms, request.until_ms) and request.since_ms >= request.until_ms:  # type: ignore[operator]
        raise UsageError("The range is empty: --since is not before --until.")
    if request.days is not None and request.days <= 0:
        raise UsageError(f"--days is {request.days:g}, expected more than 0.")
    return kinds


def _lives(connector: BybitConnector, category: str, symbols: tuple[str, ...]) -> dict[str, Life]:
    if not symbols:
        return {}
    described = connector.describe_symbols(category, symbols)
    return {symbol: Life(None, instant(row.get("deliveryTime"))) for symbol, row in described.items()}


def _since(request: FetchRequest, until_ms: int, record: list[Range]) -> int:
    if request.since_ms is not None:
        return request.since_ms
    if request.days is None and record:
        return record[0][0]
    return until_ms - int((request.days or request.first_days) * DAY_MS)


@dataclass(frozen=True, slots=True)
class _Ask:
    """The range wanted of a series, its record, what of it is settled, whether the range starts before the record, and
    whether it starts before the first stored row, so that the symbol may not have traded yet."""

    series: Series
    since_ms: int
    until_ms: int
    record: list[Range]
    done: list[Range]
    starts: bool
    early: bool


def _asked_range(store: Store, plan: FetchPlan, series: Series) -> _Ask:
    """A series with a grid goes up to its last closed bar, points up to the last instant, funding up to now."""
    request, interval = plan.request, series.interval
    newest_ms = plan.server_ms
    if interval:
        newest_ms = floor_open(plan.server_ms - request.lag_ms, interval)
        newest_ms += INTERVALS[interval] if series.kind in POINT_PAGE_ROWS else 0
    until_ms = newest_ms if request.until_ms is None else min(request.until_ms, newest_ms)
    record = store.windows(series)
    since_ms = _since(request, until_ms, record)
    since_ms = ceil_open(since_ms, interval) if interval else since_ms
    starts = since_ms < until_ms and (not record or since_ms < record[0][0])
    done = _settled(store, series, record) if record and until_ms == newest_ms else record
    early = starts
    if record and since_ms < until_ms and not starts:
        first_ms = store.first_open(series)
        early = first_ms is None or since_ms < first_ms
    return _Ask(series, since_ms, until_ms, record, done, starts, early)


def _settled(store: Store, series: Series, record: list[Range]) -> list[Range]:
    """The record without its newest part, which is asked again: from the last stored bar, a day at most."""
    from_ms = record[-1][1] - REREAD_MS
    if series.interval:  # an event of funding has no place where it should have been
        last_ms = store.last_open(series)
        if last_ms is None and series.kind not in POINT_PAGE_ROWS:
            return record
        from_ms = max(floor_open(last_ms - 1, series.interval), from_ms) if last_ms is not None else from_ms
    return [(start, min(end, from_ms)) for start, end in record if start < from_ms]


def _learn_listings(connector: BybitConnector, plan: FetchPlan, new: list[_Ask]) -> None:
    """Ask for the first bar that each symbol traded; the venue's stated launch time is no lower bound."""
    symbols = {ask.series.symbol: Series(*_trade_key(plan, ask.series)) for ask in new}
    if not symbols:
        return
    for outcome in Parallel(symbols.values(), connector.first_open, min(connector.workers, len(symbols))):
        if outcome.error is not None:
            raise outcome.error
        symbol = outcome.task.symbol
        plan.lives[symbol] = Life(outcome.result, plan.lives[symbol].delisted_ms)


def _trade_key(plan: FetchPlan, series: Series) -> tuple[str, str, str]:
    return series.category, series.symbol, series.interval or plan.request.interval


def _plan_grid(plan: FetchPlan, ask: _Ask) -> None:
    series, since_ms, until_ms = ask.series, ask.since_ms, ask.until_ms
    if ask.starts:
        plan.starts[series] = since_ms
    life = plan.lives[series.symbol]
    listed_ms, delisted_ms = life.listed_ms, life.delisted_ms
    # Other kinds of price may start earlier and end later than trading, so their windows are asked.
    of_trading = series.kind == "trade" or series.kind in POINT_PAGE_ROWS
    if of_trading and listed_ms is not None and since_ms < listed_ms:
        listed_ms = floor_open(listed_ms, series.interval)
        _leave_out(plan, ask, since_ms, min(listed_ms, until_ms), BEFORE_LISTING)
        since_ms = min(listed_ms, until_ms)
    if of_trading and delisted_ms is not None and ceil_open(delisted_ms, series.interval) < until_ms:
        end_ms = max(since_ms, ceil_open(delisted_ms, series.interval))
        _leave_out(plan, ask, end_ms, until_ms, DELISTED)
        until_ms = end_ms
    limit = POINT_PAGE_ROWS.get(series.kind, PAGE_ROWS)
    plan.windows.extend(plan_windows(series, since_ms, until_ms, ask.done, limit))


def _leave_out(plan: FetchPlan, ask: _Ask, since_ms: int, until_ms: int, reason: str) -> None:
    for start, end in missing_ranges(since_ms, until_ms, ask.record):
        n_bars = count_bars(start, end, ask.series.interval)
        if n_bars:
            plan.unasked.append((Window(ask.series, start, end, n_bars), reason))


def _plan_funding(plan: FetchPlan, ask: _Ask) -> None:
    listed_ms = plan.lives[ask.series.symbol].listed_ms or ask.since_ms
    for start, end in missing_ranges(ask.since_ms, ask.until_ms, ask.done):
        # Before the listing there is nothing to page through, so all of that goes with the first task.
        first_ms = max(start, min(listed_ms, end))
        edges = [start, *range(first_ms + FUNDING_TASK_MS, end, FUNDING_TASK_MS), end]
        plan.funding.extend(FundingRange(ask.series, a, b, max(a, first_ms)) for a, b in pairwise(edges))
