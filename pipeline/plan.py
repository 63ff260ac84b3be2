"""What a fetch will ask: the request checked, the past subtracted, the rest cut into windows.

A fetch brings a series up to date: from where its record starts (or ``since``) to its last closed bar (or
``until``), leaving out the ranges of ``fetch_windows``. The newest part of the record is asked again, since a bar
may have come late or have been corrected.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from recur.connectors.bybit import FUNDING_PAGE_ROWS, BybitConnector
from recur.connectors.windows import Range, Window, count_bars, missing_ranges, plan_windows
from recur.storage.store import Store
from recur.vocabulary import (
    CANDLE_KINDS,
    DAY_MS,
    HOUR_MS,
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

_KINDS_WITHOUT = {"spot": {"mark", "index", "premium", "funding"}, "inverse": {"premium"}}


@dataclass(frozen=True, slots=True)
class FetchRequest:
    """What a user wants. ``kinds``: candles (= trade), mark, index, premium, funding.

    Without ``since_ms`` and ``days`` a known series goes on from its record and a new one starts 365 days ago;
    without ``until_ms`` the end is the last closed bar. ``workers`` None takes the connector's.
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


@dataclass(frozen=True, slots=True)
class FundingRange:
    """Funding of one symbol in ``[since_ms, until_ms)``, asked as one task."""

    series: Series
    since_ms: int
    until_ms: int

    @property
    def n_requests(self) -> int:
        """Pages at one event per eight hours, and the empty one that ends the paging."""
        return math.ceil((self.until_ms - self.since_ms) / (8 * HOUR_MS) / FUNDING_PAGE_ROWS) + 1


@dataclass(frozen=True, slots=True)
class FetchPlan:
    """``windows`` and ``funding`` to ask, ``before_listing`` known to be empty, ``starts`` of new records."""

    request: FetchRequest
    server_ms: int
    rate: float
    windows: list[Window] = field(default_factory=list)
    funding: list[FundingRange] = field(default_factory=list)
    before_listing: list[Window] = field(default_factory=list)
    starts: dict[Series, int] = field(default_factory=dict)
    listed: dict[tuple[str, str], int] = field(default_factory=dict)

    @property
    def n_requests(self) -> int:
        return len(self.windows) + sum(asked.n_requests for asked in self.funding)

    @property
    def seconds(self) -> float:
        """Shortest time at the request rate."""
        return self.n_requests / self.rate

    @property
    def n_tasks(self) -> int:
        return len(self.windows) + len(self.funding)

    def as_dict(self) -> dict[str, Any]:
        per_series: dict[str, dict[str, Any]] = {}
        for window in self.windows:
            row = per_series.setdefault(
                str(window.series),
                {"series": str(window.series), "since": iso(window.since_ms), "windows": 0, "bars": 0},
            )
            row["until"] = iso(window.until_ms)
            row["windows"] += 1
            row["bars"] += window.expected
        for asked in self.funding:
            name = series_name(asked.series)
            per_series[name] = {
                "series": name,
                "since": iso(asked.since_ms),
                "until": iso(asked.until_ms),
                "windows": 1,
            }
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

    Writes nothing. UsageError for a request that makes no sense, VenueRefused for an unknown symbol.
    """
    kinds = _checked_kinds(request)
    connector.check_symbols(request.category, request.symbols)
    plan = FetchPlan(request, connector.server_time_ms(), connector.rate)
    for symbol in dict.fromkeys(request.symbols):
        for kind in kinds:
            if kind == "funding":
                _plan_funding(store, plan, Series(request.category, symbol, "", "funding"))
            else:
                _plan_candles(
                    store, connector, plan, Series(request.category, symbol, request.interval, kind)
                )
    return plan


def _checked_kinds(request: FetchRequest) -> list[str]:
    check_category(request.category)
    check_interval(request.interval)
    if not request.symbols:
        raise UsageError("No symbol to fetch.", "Name some, as in '-s BTCUSDT -s ETHUSDT'.")
    kinds = list(dict.fromkeys("trade" if kind == "candles" else kind for kind in request.kinds))
    known = (*CANDLE_KINDS, "funding")
    for kind in kinds:
        if kind not in known:
            names = ("candles", *known[1:])
            raise UsageError(
                f"Unknown kind '{kind}': expected some of {', '.join(names)}.{did_you_mean(kind, names)}"
            )
        if kind in _KINDS_WITHOUT.get(request.category, ()):
            raise UsageError(f"The venue has no {kind} data for category '{request.category}'.")
    if None not in (request.since_ms, request.until_ms) and request.since_ms >= request.until_ms:  # type: ignore[operator]
        raise UsageError("The range is empty: --since is not before --until.")
    if request.days is not None and request.days <= 0:
        raise UsageError(f"--days is {request.days:g}, expected more than 0.")
    return kinds


def _since(request: FetchRequest, until_ms: int, record: list[Range]) -> int:
    if request.since_ms is not None:
        return request.since_ms
    if request.days is None and record:
        return record[0][0]
    return until_ms - int((request.days or DEFAULT_DAYS) * DAY_MS)


def _plan_candles(store: Store, connector: BybitConnector, plan: FetchPlan, series: Series) -> None:
    request, interval = plan.request, series.interval
    closed_ms = floor_open(plan.server_ms, interval)  # bars that open before it are closed
    until_ms = closed_ms if request.until_ms is None else min(request.until_ms, closed_ms)
    record = store.windows(series)
    since_ms = ceil_open(_since(request, until_ms, record), interval)
    if since_ms >= until_ms:
        return
    done = record
    last_ms = store.last_open(series)
    if until_ms == closed_ms and record and last_ms is not None:
        done = _without_tail(record, max(floor_open(last_ms - 1, interval), record[-1][1] - REREAD_MS))
    if not record or since_ms < record[0][0]:
        plan.starts[series] = since_ms
        since_ms = _skip_unlisted(connector, plan, series, since_ms, until_ms)
    plan.windows.extend(plan_windows(series, since_ms, until_ms, done))


def _without_tail(record: list[Range], from_ms: int) -> list[Range]:
    return [(start, min(end, from_ms)) for start, end in record if start < from_ms]


def _skip_unlisted(
    connector: BybitConnector, plan: FetchPlan, series: Series, since_ms: int, until_ms: int
) -> int:
    """Learn when the symbol first traded; return where asking for ``series`` has to begin."""
    key = (series.category, series.symbol)
    if key not in plan.listed:
        listed = connector.first_open(Series(*key, series.interval))
        if listed is not None:
            plan.listed[key] = listed
    # Only for trades: another kind of price may start earlier, so its windows are asked.
    listed_ms = min(plan.listed.get(key, since_ms), until_ms)
    if series.kind != "trade" or listed_ms <= since_ms:
        return since_ms
    n_bars = count_bars(since_ms, listed_ms, series.interval)
    plan.before_listing.append(Window(series, since_ms, listed_ms, n_bars))
    return listed_ms


def _plan_funding(store: Store, plan: FetchPlan, series: Series) -> None:
    request = plan.request
    until_ms = plan.server_ms if request.until_ms is None else min(request.until_ms, plan.server_ms)
    record = store.windows(series)
    since_ms = _since(request, until_ms, record)
    if record and until_ms == plan.server_ms:
        record = _without_tail(record, record[-1][1] - REREAD_MS)  # an event may have come late
    for start, end in missing_ranges(since_ms, until_ms, record):
        plan.funding.append(FundingRange(series, start, end))
