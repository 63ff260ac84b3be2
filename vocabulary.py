"""Words that every layer shares: intervals and their time grid, series names, and the error tree.

Standard library only, so that any layer, and ``recur --help``, can import it for nothing.

Time is an ``int`` of UTC milliseconds here (names end in ``_ms``) and ``Datetime("ms", "UTC")`` in frames.
A bar is named by its **open time**; what it tells is known at its **close time**. Ranges are half-open.

Errors (each carries the process exit code that the command line returns)::

    RecurError                1   something failed
    ├── UsageError            2   wrong usage, configuration or input file
    ├── DataMissing           3   needed data is absent or not good enough
    ├── CheckFailed           4   an audit or ledger check failed
    ├── StoreBusy            75   another process holds the store for longer than the wait
    ├── StoreCorrupt          1   the store file cannot be read
    └── VenueError            1   the venue could not be asked, or said no
        ├── VenueUnreachable      no connection, time-out, 5xx or overload, retries used up   (transient)
        ├── VenueBanned           HTTP 403, too many requests from this address: wait ten minutes
        ├── VenueForbidden        HTTP 403, this country or address is not served
        └── VenueRefused          the request itself is wrong (``ret_code`` says why)
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta


class RecurError(Exception):
    """An error a user can act on: one line of what happened and one of what to do."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(RecurError):
    exit_code = 2


class DataMissing(RecurError):
    exit_code = 3


class CheckFailed(RecurError):
    exit_code = 4


class StoreBusy(RecurError):
    exit_code = 75


class StoreCorrupt(RecurError):
    exit_code = 1


class VenueError(RecurError):
    """The venue did not give what was asked."""


class VenueUnreachable(VenueError):
    pass


class VenueBanned(VenueError):
    pass


class VenueForbidden(VenueError):
    pass


class VenueRefused(VenueError):
    """The venue answered that the request is wrong. ``ret_code`` is the venue's own code, or the HTTP status."""

    def __init__(self, message: str, hint: str = "", ret_code: int = 0) -> None:
        super().__init__(message, hint)
        self.ret_code = ret_code


class UnknownSymbol(VenueRefused):
    """A symbol was asked for that the venue does not have: wrong usage, whoever noticed it."""

    exit_code = UsageError.exit_code


MINUTE_MS = 60_000
HOUR_MS = 60 * MINUTE_MS
DAY_MS = 24 * HOUR_MS
WEEK_MS = 7 * DAY_MS
_MONDAY_MS = 4 * DAY_MS  # 1970-01-05, the first Monday after the epoch

INTERVALS: dict[str, int] = {
    "1m": MINUTE_MS, "3m": 3 * MINUTE_MS, "5m": 5 * MINUTE_MS, "15m": 15 * MINUTE_MS, "30m": 30 * MINUTE_MS,
    "1h": HOUR_MS, "2h": 2 * HOUR_MS, "4h": 4 * HOUR_MS, "6h": 6 * HOUR_MS, "12h": 12 * HOUR_MS,
    "1d": DAY_MS, "1w": WEEK_MS, "1M": 0,
}  # fmt: skip
"""Length of each interval in milliseconds; 0 for the calendar month."""

CATEGORIES = ("linear", "inverse", "spot")
CANDLE_KINDS = ("trade", "mark", "index", "premium")

PATTERNED = "hybrid:"
"""What comes before a pattern of layers in the name of a model, as in ``hybrid:M-M*-``."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``" Did you mean 'x'?"`` when ``word`` is close to a known one, else an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" Did you mean '{close[0]}'?" if close else ""


def check_interval(interval: str) -> str:
    """Return ``interval`` if it is known, else raise UsageError naming the known ones."""
    if interval not in INTERVALS:
        raise UsageError(
            f"Unknown interval '{interval}': expected one of {' '.join(INTERVALS)}.{did_you_mean(interval, INTERVALS)}",
            "Give the interval as in '1h' (hours) or '1m' (minutes); months are '1M'.",
        )
    return interval


def check_category(category: str) -> str:
    if category not in CATEGORIES:
        raise UsageError(
            f"Unknown category '{category}': expected one of {', '.join(CATEGORIES)}."
            f"{did_you_mean(category, CATEGORIES)}"
        )
    return category


def _month_start(ms: int) -> datetime:
    at = from_ms(ms)
    return datetime(at.year, at.month, 1, tzinfo=UTC)


def floor_open(ms: int, interval: str) -> int:
    """Open time of the bar that contains instant ``ms``."""
    step = INTERVALS[interval]
    if step == 0:
        return to_ms(_month_start(ms))
    if interval == "1w":
        return ms - (ms - _MONDAY_MS) % WEEK_MS
    return ms - ms % step


def next_open(open_ms: int, interval: str) -> int:
    """Open time of the bar after the one that opens at ``open_ms``: equally, its close time."""
    step = INTERVALS[interval]
    if step:
        return open_ms + step
    return to_ms((_month_start(open_ms) + timedelta(days=32)).replace(day=1))


def ceil_open(ms: int, interval: str) -> int:
    """First open time at or after ``ms``."""
    floor = floor_open(ms, interval)
    return floor if floor == ms else next_open(floor, interval)


def grid(since_ms: int, until_ms: int, interval: str) -> list[int]:
    """All open times in ``[since_ms, until_ms)``."""
    first = ceil_open(since_ms, interval)
    step = INTERVALS[interval]
    if step:
        return list(range(first, until_ms, step))
    opens = []
    while first < until_ms:
        opens.append(first)
        first = next_open(first, interval)
    return opens


def bars_per_year(interval: str) -> float:
    """Bars in 365 days, the annualisation used everywhere."""
    step = INTERVALS[interval] or 365 * DAY_MS / 12
    return 365 * DAY_MS / step


def to_ms(at: datetime) -> int:
    """UTC milliseconds of an aware datetime (naive ones are taken as UTC)."""
    if at.tzinfo is None:
        at = at.replace(tzinfo=UTC)
    return (at - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(milliseconds=1)


def from_ms(ms: int) -> datetime:
    return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=ms)


def iso(ms: int) -> str:
    """``2025-07-01T00:00:00Z``; milliseconds only when there are any."""
    at = from_ms(ms)
    return at.strftime("%Y-%m-%dT%H:%M:%S") + (f".{ms % 1000:03d}" if ms % 1000 else "") + "Z"


def parse_time(text: str) -> int:
    """UTC milliseconds of ``2025-07-01``, ``2025-07-01T12:00``, ``…Z`` or any ISO-8601 offset form."""
    try:
        return to_ms(datetime.fromisoformat(text.strip()))
    except ValueError:
        raise UsageError(
            f"Cannot read the time '{text}': expected ISO-8601 such as 2025-07-01 or 2025-07-01T12:00Z.",
            "Times are UTC unless they carry an offset.",
        ) from None


def parse_symbol(text: str, category: str = "linear") -> tuple[str, str]:
    """(category, symbol) of ``BTCUSDT``, ``BTC/USDT`` (spot) or ``BTC/USDT:USDT`` (linear)."""
    text = text.strip()
    if "/" in text:
        pair, _, settle = text.partition(":")
        base, _, quote = pair.partition("/")
        if settle:
            category = "linear" if settle.upper() == quote.upper() else "inverse"
        else:
            category = "spot"
        text = base + quote
    symbol = text.upper()
    if not symbol or not symbol.replace("-", "").isalnum():
        raise UsageError(f"'{text}' is not a symbol: expected a name such as BTCUSDT or BTC/USDT:USDT.")
    return check_category(category), symbol


@dataclass(frozen=True, slots=True, order=True)
class Series:
    """One stored candle series; ``str()`` gives its id, ``bybit:linear:BTCUSDT:1h``."""

    category: str
    symbol: str
    interval: str
    kind: str = "trade"

    def __str__(self) -> str:
        tail = "" if self.kind == "trade" else f":{self.kind}"
        return f"bybit:{self.category}:{self.symbol}:{self.interval}{tail}"
