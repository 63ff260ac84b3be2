"""Why bars are missing: each missing one gets a reason, and a window is cut where the reason changes. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from recur.connectors.windows import Range, Window
from recur.vocabulary import next_open

BEFORE_LISTING, DELISTED, MAINTENANCE, EMPTY = "before listing", "delisted", "maintenance", "venue empty"
EXPECTED_REASONS = (BEFORE_LISTING, DELISTED)
"""Bars that no venue could have."""


@dataclass(frozen=True, slots=True)
class Life:
    """When an instrument could be traded: from its first bar to its delisting, None where that is not known."""

    listed_ms: int | None = None
    delisted_ms: int | None = None


@dataclass(frozen=True, slots=True)
class Part:
    """A part ``[since_ms, until_ms)`` of a window with one reason for all that it misses; "" for nothing."""

    since_ms: int
    until_ms: int
    missing: int
    reason: str


def reason_of(open_ms: int, interval: str, life: Life, maintenance: Sequence[Range]) -> str:
    """Why the bar that opens at ``open_ms`` is not there. A bar in a maintenance lies wholly or partly in it."""
    if life.listed_ms is not None and open_ms < life.listed_ms:
        return BEFORE_LISTING
    if life.delisted_ms is not None and open_ms >= life.delisted_ms:
        return DELISTED
    close_ms = next_open(open_ms, interval)
    if any(begin < close_ms and open_ms < end for begin, end in maintenance):
        return MAINTENANCE
    return EMPTY


def explained(
    window: Window, missing: Sequence[int], life: Life, maintenance: Sequence[Range] = ()
) -> list[Part]:
    """``window`` in consecutive parts, each with one reason; one part when nothing or one cause is missing."""
    parts: list[Part] = []
    since_ms, count, reason = window.since_ms, 0, ""
    for open_ms in missing:
        why = reason_of(open_ms, window.series.interval, life, maintenance)
        if count and why != reason:
            parts.append(Part(since_ms, open_ms, count, reason))
            since_ms, count = open_ms, 0
        reason, count = why, count + 1
    return [*parts, Part(since_ms, window.until_ms, count, reason)]
