"""What is known of one followed series, and what of it to ask next. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

from recur.connectors.windows import Window, plan_windows
from recur.pipeline.gaps import Life
from recur.vocabulary import DAY_MS, INTERVALS, Series, ceil_open, floor_open

REREAD_BARS = 5
"""So many stored bars are asked again with each new one."""


@dataclass(slots=True)
class Record:
    """What is known of one series: all bars in ``[first_ms, next_ms)`` are stored but those ``missing``."""

    series: Series
    first_ms: int
    next_ms: int
    missing: dict[int, int] = field(default_factory=dict)
    """By open time: the venue's time when it was first missed."""

    def windows(self, until_ms: int, n_again: int) -> list[Window]:
        """What to ask to be complete up to ``until_ms``, with ``n_again`` bars before that are stored already."""
        since_ms = min([self.next_ms, *self.missing])
        for _ in range(n_again):
            since_ms = floor_open(since_ms - 1, self.series.interval)
        return plan_windows(self.series, max(since_ms, self.first_ms), max(until_ms, self.next_ms))


def bars_again(interval: str) -> int:
    """How many stored bars are asked again every quarter of an hour: a day, in one page of the venue."""
    step = INTERVALS[interval]
    return max(REREAD_BARS, min(DAY_MS // step, 990)) if step else REREAD_BARS


def last_close(life: Life, interval: str, closed_ms: int) -> int | None:
    """When the last bar of a delisted symbol closed; None while that is not known, or later than ``closed_ms``."""
    if life.delisted_ms is None:
        return None
    end_ms = ceil_open(life.delisted_ms, interval)
    return end_ms if end_ms <= closed_ms else None
