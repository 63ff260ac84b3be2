"""The venue's time, and its limit of requests per address."""

from __future__ import annotations

import threading
import time
from collections import deque

LIMIT_REQUESTS = 600
LIMIT_WINDOW_S = 5.0


class VirtualClock:
    """The venue's time: starts at ``now_ms`` and runs ``speed`` times as fast as real time (0 stands still)."""

    def __init__(self, now_ms: int, speed: float = 0.0) -> None:
        self._speed = speed
        self._anchor = (now_ms, time.monotonic())

    def now_ms(self) -> int:
        at_ms, since = self._anchor
        return at_ms + int((time.monotonic() - since) * 1000 * self._speed)

    def set(self, ms: int) -> None:
        """Jump to ``ms``; the pace stays."""
        self._anchor = (ms, time.monotonic())


class AddressLimit:
    """The venue's limit per address: over 600 requests in 5 s bans it; each request while banned extends the ban."""

    def __init__(self, ban_s: float = 600.0) -> None:
        self._ban_s = ban_s
        self._banned_until = 0.0
        self._recent: deque[float] = deque()
        self._lock = threading.Lock()
        self.imposed = False
        self.refused = 0
        self.most_in_window = 0

    def admits(self, at_s: float) -> bool:
        """Count one request at ``at_s`` (monotonic seconds) and say whether it is served."""
        with self._lock:
            self._recent.append(at_s)
            while self._recent[0] <= at_s - LIMIT_WINDOW_S:
                self._recent.popleft()
            self.most_in_window = max(self.most_in_window, len(self._recent))
            banned = at_s < self._banned_until
            if banned or len(self._recent) > LIMIT_REQUESTS:
                self._banned_until = at_s + self._ban_s
                self.refused += 1
                return False
            self.imposed = False
            return True

    def ban(self, at_s: float, seconds: float) -> None:
        """Ban from now on, whether the limit is enforced or not, for ``seconds`` after the last request."""
        with self._lock:
            self._ban_s = seconds
            self._banned_until = at_s + seconds
            self.imposed = True
