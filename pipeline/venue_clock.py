"""The venue's time between two answers of the venue, and how far this machine's clock is from it."""

from __future__ import annotations

import time
from collections.abc import Callable

_SPAN_S = 0.05  # shortest time between two measures that tells the pace
_REAL = 0.05  # a pace so near to 1 is 1
_FASTEST = 1e6


class VenueClock:
    """Follows the venue by a clock of this machine that nobody sets (``monotonic``), so a wrong local time of day
    moves nothing.

    A sandbox may run faster than real time: the pace is that between the last two measures.
    """

    def __init__(
        self,
        wall_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._wall_ms = wall_ms
        self._monotonic = monotonic
        self._anchor: tuple[int, float] | None = None
        self.pace = 1.0
        self.drift_ms = 0
        """Local time of day minus the venue's at the last measure: above 0 the local clock is ahead."""

    def measure(self, ask: Callable[[], int]) -> int:
        """Ask the venue for its time and return it as of now; it is taken to be that of half-way through the call."""
        before = self._monotonic()
        said_ms = ask()
        after = self._monotonic()
        middle = (before + after) / 2
        if self._anchor is not None and middle - self._anchor[1] >= _SPAN_S:
            pace = (said_ms - self._anchor[0]) / 1000 / (middle - self._anchor[1])
            self.pace = 1.0 if abs(pace - 1) < _REAL else min(max(pace, 0.0), _FASTEST)
        self._anchor = (said_ms, middle)
        now_ms = said_ms + int((after - middle) * 1000 * self.pace)
        self.drift_ms = self._wall_ms() - now_ms
        return now_ms

    def now_ms(self) -> int:
        """The venue's time; RuntimeError before the first measure."""
        if self._anchor is None:
            raise RuntimeError("the venue's clock was not measured yet")
        return self._anchor[0] + int((self._monotonic() - self._anchor[1]) * 1000 * self.pace)

    def seconds_until(self, venue_ms: int, most: float) -> float:
        """Real seconds until the venue's clock shows ``venue_ms``, at least 0, at most ``most``."""
        left_ms = venue_ms - self.now_ms()
        if left_ms <= 0:
            return 0.0
        return min(most, left_ms / 1000 / self.pace) if self.pace > 0 else most
