"""A token bucket shared by every thread that talks to the venue.

The venue allows 600 requests in any 5 seconds from one address and answers more with a ban of ten minutes
(https://bybit-exchange.github.io/docs/v5/rate-limit). The default of 100 per second with a burst of 20 sends
at most 520 in 5 seconds.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

DEFAULT_RATE_PER_S = 100.0
DEFAULT_BURST = 20


class TokenBucket:
    """Lets ``rate_per_s`` requests pass per second, and ``burst`` at once after a rest.

    Each caller reserves its place under the lock and sleeps outside it, so callers leave in the order in
    which they came and a long sleep of one never blocks the bookkeeping of another.

    ``clock`` gives seconds that never go back, ``sleep`` waits for seconds; both can be replaced in tests.
    """

    def __init__(
        self,
        rate_per_s: float = DEFAULT_RATE_PER_S,
        burst: int = DEFAULT_BURST,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        if rate_per_s <= 0 or burst < 1:
            raise ValueError(f"rate_per_s must be > 0 and burst >= 1, found {rate_per_s} and {burst}")
        self.rate_per_s = rate_per_s
        self.burst = burst
        self._clock = clock
        self._sleep = sleep
        self._lock = threading.Lock()
        self._tokens = float(burst)  # may be negative: places already promised
        self._at = clock()

    def take(self) -> float:
        """Wait for one token; return the seconds waited."""
        with self._lock:
            self._refill()
            self._tokens -= 1.0
            wait_s = max(0.0, self._at - self._clock()) + max(0.0, -self._tokens) / self.rate_per_s
        if wait_s > 0:
            self._sleep(wait_s)
        return wait_s

    def pause(self, seconds: float) -> None:
        """Hold every later caller back for ``seconds`` from now, with no burst afterwards."""
        with self._lock:
            self._refill()
            self._tokens = min(self._tokens, 0.0)
            self._at = max(self._at, self._clock() + seconds)

    def slow_down(self, factor: float = 0.5, floor_per_s: float = 1.0) -> None:
        """Multiply the rate by ``factor``, not below ``floor_per_s``: the venue said it was too much."""
        with self._lock:
            self._refill()
            self.rate_per_s = max(min(floor_per_s, self.rate_per_s), self.rate_per_s * factor)

    def _refill(self) -> None:
        now = self._clock()
        if now > self._at:  # ``_at`` lies in the future while paused
            self._tokens = min(float(self.burst), self._tokens + (now - self._at) * self.rate_per_s)
            self._at = now
