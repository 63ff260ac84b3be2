"""What a market behind the sandbox exchange must provide, and the arithmetic every such market shares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from recur.vocabulary import DAY_MS, INTERVALS, MINUTE_MS, WEEK_MS, floor_open

DELIVERY_MS = 30 * MINUTE_MS

Floats = NDArray[np.float64]
Millis = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Candles:
    """One series of bars as columns of equal length n, oldest first; ``open_time`` in UTC ms, NaN = absent."""

    open_time: Millis
    open: Floats
    high: Floats
    low: Floats
    close: Floats
    volume: Floats
    turnover: Floats

    def __len__(self) -> int:
        return len(self.open_time)

    def __getitem__(self, rows: slice | NDArray[np.bool_]) -> Candles:
        return Candles(*(getattr(self, f.name)[rows] for f in fields(self)))


NO_CANDLES = Candles(np.empty(0, np.int64), *(np.empty(0),) * 6)


@dataclass(frozen=True, slots=True)
class Life:
    """When a symbol trades: from ``listed_ms`` until ``delisted_ms`` (None: for as long as the world lasts)."""

    listed_ms: int
    delisted_ms: int | None = None

    def status(self, now_ms: int) -> str:
        """The venue's word for it at ``now_ms``; a delisted contract delivers for half an hour."""
        if now_ms < self.listed_ms:
            return "PreLaunch"
        if self.delisted_ms is None or now_ms < self.delisted_ms:
            return "Trading"
        return "Delivering" if now_ms < self.delisted_ms + DELIVERY_MS else "Closed"


@dataclass(frozen=True, slots=True)
class Maintenance:
    """A time ``[begin_ms, end_ms)`` in which nothing trades; the venue tells it two days ahead."""

    begin_ms: int
    end_ms: int
    title: str = "Derivatives trading engine upgrade"


@dataclass(frozen=True, slots=True)
class Announcement:
    """An item of the venue's own feed; ``edits`` are (from when, title, description), the url stays."""

    slug: str
    key: str
    title: str
    description: str
    tags: tuple[str, ...]
    published_ms: int
    dated_ms: int
    edits: tuple[tuple[int, str, str], ...] = ()

    def text(self, now_ms: int) -> tuple[str, str]:
        """(title, description) as they read at ``now_ms``."""
        text = self.title, self.description
        for at_ms, title, description in self.edits:
            if at_ms <= now_ms:
                text = title, description
        return text


class World(Protocol):
    """A market with a past and a future; the server shows of it what its clock allows."""

    @property
    def start_ms(self) -> int:
        """Open time of the first bar."""

    @property
    def end_ms(self) -> int:
        """Close time of the last bar."""

    def symbols(self, category: str) -> list[str]:
        """Sorted names that ever trade in ``category``; empty if none do."""

    def life(self, category: str, symbol: str) -> Life:
        """When the symbol trades."""

    def instrument(self, category: str, symbol: str) -> dict[str, Any]:
        """One row of the venue's instruments-info."""

    def base_interval(self, category: str, symbol: str, kind: str) -> str:
        """Finest interval this market has for the series; raises VenueRefused if it has none."""

    def candles(self, category: str, symbol: str, kind: str, interval: str) -> Candles:
        """All bars, past and future; raises VenueRefused (10001) for an interval that cannot be had."""

    def funding(self, category: str, symbol: str) -> tuple[Millis, Floats]:
        """Funding times (UTC ms, ascending) and rates (fraction per funding interval)."""

    def open_interest(self, category: str, symbol: str, step_ms: int) -> tuple[Millis, Floats]:
        """Instants on the grid of ``step_ms`` (UTC ms, ascending) and the open interest in base coins there."""

    def account_ratio(self, category: str, symbol: str, step_ms: int) -> tuple[Millis, Floats]:
        """Instants on the grid of ``step_ms`` (UTC ms, ascending) and the share of accounts that are long."""

    def maintenance(self) -> Sequence[Maintenance]:
        """Times without trading, oldest first."""

    def announcements(self) -> Sequence[Announcement]:
        """The venue's own feed, oldest first."""


def nests(fine: str, coarse: str) -> bool:
    """Whether every ``coarse`` bar is a whole number of ``fine`` bars."""
    step = INTERVALS[fine]
    if fine == coarse or step == 0:
        return fine == coarse
    whole = {"1M": DAY_MS, "1w": WEEK_MS if fine == "1w" else DAY_MS}.get(coarse, INTERVALS[coarse])
    return whole % step == 0


def floor_opens(times: Millis, interval: str) -> Millis:
    """``floor_open`` for an array of UTC ms."""
    step = INTERVALS[interval]
    if step == 0:
        return (
            times.astype("datetime64[ms]").astype("datetime64[M]").astype("datetime64[ms]").astype(np.int64)
        )
    offset = floor_open(WEEK_MS, interval) % step  # 0 but for weeks, which open on Monday
    return times - (times - offset) % step


def aggregate(base: Candles, fine: str, coarse: str) -> Candles:
    """Build ``coarse`` bars from ``fine`` ones; a bar with any ``fine`` bar missing is left out."""
    if fine == coarse or not len(base):
        return base
    group = floor_opens(base.open_time, coarse)
    first = np.flatnonzero(np.r_[True, group[1:] != group[:-1]])
    last = np.r_[first[1:], len(group)] - 1
    opens = group[first]
    if coarse == "1M":
        months = opens.astype("datetime64[ms]").astype("datetime64[M]")
        length = (months + 1).astype("datetime64[ms]").astype(np.int64) - opens
    else:
        length = np.full(len(opens), INTERVALS[coarse])
    whole = last - first + 1 == length // INTERVALS[fine]
    return Candles(
        opens[whole],
        base.open[first][whole],
        np.maximum.reduceat(base.high, first)[whole],
        np.minimum.reduceat(base.low, first)[whole],
        base.close[last][whole],
        np.add.reduceat(base.volume, first)[whole],
        np.add.reduceat(base.turnover, first)[whole],
    )


def unfinished(base: Candles, now_ms: int, close_ms: int) -> Candles:
    """One bar made of ``base`` (fine bars, the last one closing at ``close_ms``) as it looks at ``now_ms``.

    A bar that is still open shows its final path shrunk to the elapsed share of its time: at its open all
    four prices equal the open and nothing has traded.
    """
    begun = int(base.open_time[-1])
    share = min(1.0, (now_ms - begun) / (close_ms - begun))
    opened = base.open[-1]
    high, low, close = (opened + share * (x[-1] - opened) for x in (base.high, base.low, base.close))
    volume, turnover = (x[:-1].sum() + share * x[-1] for x in (base.volume, base.turnover))
    return Candles(
        base.open_time[:1],
        base.open[:1],
        np.array([max(high, close, *base.high[:-1])]),
        np.array([min(low, close, *base.low[:-1])]),
        np.array([close]),
        np.array([volume]),
        np.array([turnover]),
    )


def instrument_row(
    category: str, symbol: str, launch_ms: int, tick: float, funding_min: int
) -> dict[str, Any]:
    """An instruments-info row with the fields and types of the venue (spot has no ``launchTime``)."""
    quote = next((q for q in ("USDT", "USDC", "USD") if symbol.endswith(q)), "")
    base = symbol.removesuffix(quote)
    tick_text = np.format_float_positional(tick, trim="-")
    row: dict[str, Any] = {
        "symbol": symbol,
        "status": "Trading",
        "baseCoin": base,
        "quoteCoin": quote,
        "priceFilter": {"tickSize": tick_text},
    }
    if category == "spot":
        row["lotSizeFilter"] = {"basePrecision": "0.001", "quotePrecision": "0.0001", "minOrderAmt": "5"}
        return row
    row |= {
        "contractType": "LinearPerpetual" if category == "linear" else "InversePerpetual",
        "settleCoin": quote if category == "linear" else base,
        "launchTime": str(launch_ms),
        "deliveryTime": "0",
        "deliveryFeeRate": "",
        "priceScale": str(len(tick_text.partition(".")[2])),
        "leverageFilter": {"minLeverage": "1", "maxLeverage": "50.00", "leverageStep": "0.01"},
        "lotSizeFilter": {"minOrderQty": "0.001", "maxOrderQty": "1000000", "qtyStep": "0.001"},
        "unifiedMarginTrade": True,
        "fundingInterval": funding_min,
        "isPreListing": False,
        "preListingInfo": None,
    }
    return row
