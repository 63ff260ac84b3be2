"""The legal rate: one budget of requests for this machine's address, shared by threads and by processes.

The venue counts the requests of an address over all its programs: more than 600 in any 5 seconds and it answers
HTTP 403 for at least ten minutes (https://bybit-exchange.github.io/docs/v5/rate-limit). So the budget is a property
of the machine, not of a connector. ``Pace`` is its whole state, in a file when it is shared (``ratefile.py``);
``RateLimiter`` is how one process draws on it.

The law is the generic cell rate algorithm: each request is given an instant, ``1 / rate`` after the one before, and
an idle budget lets ``burst`` of them pass at once. In any 5 seconds that is ``5 rate + burst`` requests: 554 by
default. The rest up to 600 is for requests that were delayed on their way and arrive together with later ones, of
which there cannot be more than there are workers.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

from recur.connectors.ratefile import PaceFile
from recur.vocabulary import VenueBanned, iso

DEFAULT_RATE_PER_S = 110.0
DEFAULT_BURST = 4
LEGAL_RATE_PER_S = 120.0
BAN_S = 600.0
"""The venue lifts a ban of an address after ten minutes without requests."""

RECOVERY_S = 120.0
"""From a standstill back to the full rate."""

_LEAST_SHARE = 0.01
_BATCH_S, _BATCH_MOST = 0.04, 8  # what a process takes from the file at once
_STALE_S = 0.25  # an instant that was not used by then is lost: used later, it would come on top of others
_FAR_S = 60.0  # an instant further ahead than this was written before a reboot, or is damage

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Pace:
    """The budget: ``next_s`` is the instant of the next request.

    The rate is ``share`` of the full one at ``share_at_s`` and grows from there. ``next_s`` and ``share_at_s`` are
    seconds of the machine's monotonic clock, ``banned_until`` (0: not banned) is UTC epoch seconds.
    """

    next_s: float = 0.0
    share: float = 1.0
    share_at_s: float = 0.0
    banned_until: float = 0.0

    def share_now(self, now_s: float) -> float:
        """Share of the full rate at ``now_s``: linear in time from ``share`` to 1."""
        return min(1.0, self.share + max(0.0, now_s - self.share_at_s) / RECOVERY_S)

    def sane(self, now_s: float, wall_s: float) -> Pace:
        """Without what cannot be: both clocks may have been set back since, the monotonic one by a reboot."""
        ahead = self.share_at_s > now_s + BAN_S + _FAR_S
        return Pace(
            now_s if self.next_s > now_s + _FAR_S else self.next_s,
            self.share,
            now_s if ahead else self.share_at_s,
            min(self.banned_until, wall_s + BAN_S) if self.banned_until > wall_s else 0.0,
        )

    def reserve(self, now_s: float, n: int, rate_per_s: float, burst: int) -> tuple[list[float], Pace]:
        """Instants of the next ``n`` requests (those in the past are due at once), and what remains."""
        share = self.share_now(now_s)
        gap_s = 1.0 / (rate_per_s * share)
        idle = burst - 1 if share == 1.0 else 0
        first_s = max(self.next_s, now_s - idle * gap_s)
        return [first_s + i * gap_s for i in range(n)], replace(self, next_s=first_s + n * gap_s)

    def slowed(self, now_s: float, pause_s: float) -> Pace:
        """At half the rate after ``pause_s``: the venue said it was too much. Complaints of one second count once."""
        share, at_s = self.share_now(now_s), now_s
        if self.share_at_s > now_s - 1.0 and self.share < 1.0:
            share, at_s = self.share, self.share_at_s
        else:
            share = max(_LEAST_SHARE, share / 2)
        return replace(self, next_s=max(self.next_s, now_s + pause_s), share=share, share_at_s=at_s)

    def banned(self, now_s: float, wall_s: float, ban_s: float) -> Pace:
        """Closed for ``ban_s``, then slow: one request, and the full rate two minutes later."""
        return replace(
            self, share=_LEAST_SHARE, share_at_s=now_s + ban_s, banned_until=max(self.banned_until, wall_s + ban_s)
        )  # fmt: skip


class RateLimiter:
    """Lets the threads of this process send ``rate_per_s`` requests per second together with all other processes
    that use the same ``file``; without a file, alone.

    A few instants are taken from the file at a time, so that a request costs little. ``clock`` gives seconds that
    never go back, ``wall`` UTC epoch seconds, ``sleep`` waits for seconds.
    """

    def __init__(
        self,
        rate_per_s: float = DEFAULT_RATE_PER_S,
        burst: int = DEFAULT_BURST,
        *,
        file: PaceFile | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        if rate_per_s <= 0 or burst < 1:
            raise ValueError(f"rate_per_s must be > 0 and burst >= 1, found {rate_per_s} and {burst}")
        self.rate_per_s = rate_per_s
        self.burst = burst
        self._file = file
        self._clock, self._wall, self._sleep = clock, wall, sleep
        self._lock = threading.Lock()
        self._pace = Pace(next_s=clock() - burst / rate_per_s)
        self._slots: deque[tuple[float, float]] = deque()  # (instant, when it is lost)
        self._turn = 0  # grows when instants given out so far must not be used

    def take(self) -> float:
        """Wait for one request's turn; return the seconds waited. Raises VenueBanned while the address is banned."""
        waited = 0.0
        while True:
            with self._lock:
                slot_s, turn = self._slot(), self._turn
            wait_s = slot_s - self._clock()
            if wait_s > 0:
                self._sleep(wait_s)
                waited += wait_s
            if turn == self._turn:
                return waited

    def slow_down(self, pause_s: float) -> None:
        """Hold everybody back for ``pause_s`` and go on at half the rate, which recovers slowly."""
        with self._lock:
            self._update(lambda pace: (None, pace.slowed(self._clock(), pause_s)))
            self._recall()

    def ban(self, ban_s: float = BAN_S) -> float:
        """Send nothing more, from any process, for ``ban_s``; return when that ends (UTC epoch seconds)."""
        with self._lock:
            self._update(lambda pace: (None, pace.banned(self._clock(), self._wall(), ban_s)))
            self._recall()
            return self._pace.banned_until

    def ban_left_s(self) -> float:
        """Seconds until the known ban ends, 0 without one."""
        return max(0.0, self._pace.banned_until - self._wall())

    def _recall(self) -> None:
        self._slots.clear()
        self._turn += 1

    def _slot(self) -> float:
        now_s = self._clock()
        while self._slots:
            slot_s, lost_s = self._slots.popleft()
            if now_s <= lost_s:
                return slot_s
        slots = self._update(self._reserve)
        if slots is None:
            raise VenueBanned(
                f"The venue has banned this address until {iso(int(self._pace.banned_until) * 1000)}; nothing was sent.",
                "Run the command again after that time, or give --wait-ban to wait it out.",
            )
        self._slots.extend((slot_s, max(slot_s, now_s) + _STALE_S) for slot_s in slots[1:])
        return slots[0]

    def _reserve(self, pace: Pace) -> tuple[list[float] | None, Pace]:
        now_s = self._clock()
        if pace.banned_until:
            return None, pace
        n = int(self.rate_per_s * pace.share_now(now_s) * _BATCH_S)
        return pace.reserve(now_s, max(1, min(n, _BATCH_MOST)), self.rate_per_s, self.burst)

    def _update(self, change: Callable[[Pace], tuple[list[float] | None, Pace]]) -> list[float] | None:
        """Apply ``change`` to the budget as it is now, in the file when there is one."""
        if self._file is not None:
            try:
                with self._file.held() as fields:
                    known = Pace(*fields) if fields else Pace(next_s=self._clock())
                    result, self._pace = change(known.sane(self._clock(), self._wall()))
                    self._file.write(
                        (self._pace.next_s, self._pace.share, self._pace.share_at_s, self._pace.banned_until)
                    )
                return result
            except OSError as error:
                _log.warning("the request budget cannot be shared with other processes: %s", error)
                self._file = None
        result, self._pace = change(self._pace.sane(self._clock(), self._wall()))
        return result
