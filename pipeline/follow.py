"""Stay up to date: after a fetch, bring in each bar as soon as it has closed, until told to stop.

The stream (``connectors/live.py``) and a timer only say *when* to ask; what is stored always comes from the REST
candles, by the windows and transactions of ``pipeline/fetch.py``::

    fetch ──> wait for a hint, a timer or a reconnect ──> ask the venue's clock ──> windows of new bars ──> store
                 ^                                                                                            │
                 └──────────────── bars that are not there yet are asked again ───────────────────────────────┘

A bar counts as closed ``LAG_MS`` after its close by the venue's clock, never by the local one. The newest bars are
asked again with each new one, and those of a day every quarter of an hour, since the venue corrects bars late. With that
the symbols are looked up again: what a pattern means by now is followed too, what was delisted no longer.
"""

from __future__ import annotations

import queue
import re
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import polars as pl

from recur.connectors.bybit import BybitConnector
from recur.connectors.live import BarClosed, Broken, Connected, Event, LiveFeed, Patience, Rejected, Stale
from recur.connectors.windows import Window, count_bars
from recur.pipeline.answered import empty_window
from recur.pipeline.config import is_pattern
from recur.pipeline.fetch import FetchPlan, FetchRequest, FetchSummary, plan_fetch, run_fetch
from recur.pipeline.followed import REREAD_BARS, Record, bars_again, last_close
from recur.pipeline.gaps import DELISTED, Life
from recur.pipeline.symbols import expand
from recur.pipeline.venue_clock import VenueClock
from recur.storage.store import Store
from recur.vocabulary import (
    CANDLE_KINDS,
    HOUR_MS,
    INTERVALS,
    MINUTE_MS,
    DataMissing,
    Series,
    StoreBusy,
    UsageError,
    VenueError,
    VenueForbidden,
    VenueRefused,
    floor_open,
    grid,
    iso,
    next_open,
)

LAG_MS = 1000
"""A bar counts as closed so long after its close, by the venue's clock, or later when the request says so."""
UNHINTED_MS = 5000
"""So much later a bar is asked for when the stream has not said that it closed."""
ASK_AGAIN_MS = 5000
"""A bar that the venue does not have yet is asked again after so long, then twice as long, …"""
FEW_MISSING = 3
"""A series that lacks more of its newest bars seems to have ended: they are asked again with each new bar only."""
MISSING_MS = HOUR_MS
"""For so long a bar that the venue does not have is asked again; the gap is recorded at once."""
REREAD_ALL_MS = 15 * MINUTE_MS
DRIFT_MS = 2000
"""A local clock that is wrong by more is told."""
_LONGEST_WAIT_S = 30.0
_LONGEST_BACKOFF_S = 60.0
_SHORTEST_WAIT_S = 0.01


@dataclass(slots=True)
class FollowSummary:
    """What following did. ``series`` were followed, some of them because their symbol was ``added`` after the start, some
    only until it ``ended``. ``bars`` closed while following, ``gaps`` of them never came; ``delay_s`` from a bar's close
    to its being stored, by the venue's clock, of the newest 10,000; ``drift_ms`` local minus venue's clock."""

    series: list[str] = field(default_factory=list)
    added: list[str] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)
    bars: int = 0
    new: int = 0
    changed: int = 0
    gaps: int = 0
    requests: int = 0
    updates: int = 0
    failures: int = 0
    connects: int = 0
    breaks: int = 0
    stale: int = 0
    rejected: list[str] = field(default_factory=list)
    drift_ms: int = 0
    seconds: float = 0.0
    delays_s: deque[float] = field(default_factory=lambda: deque(maxlen=10_000))

    def add(self, fetched: FetchSummary) -> None:
        self.new += fetched.new
        self.changed += fetched.changed

    def as_dict(self) -> dict[str, Any]:
        names = (
            "series",
            "added",
            "ended",
            "bars",
            "new",
            "changed",
            "gaps",
            "requests",
            "updates",
            "failures",
            "connects",
        )
        tail = ("breaks", "stale", "rejected", "drift_ms")
        delays = self.delays_s or [float("nan")]
        return {
            **{name: getattr(self, name) for name in (*names, *tail)},
            "delay_s": {"median": round(statistics.median(delays), 3), "max": round(max(delays), 3)},
            "seconds": round(self.seconds, 3),
        }


class Follower:
    """Follows ``request`` (whose end must be open) into ``store`` for ``for_s`` seconds, or until ``stop``.

    ``say`` gets a line for each bar and each event; ``clock`` tells the venue's time. ``run`` does it all once, in
    the calling thread; ``stop`` may be called from any other.
    """

    def __init__(
        self,
        store: Store,
        connector: BybitConnector,
        request: FetchRequest,
        *,
        for_s: float | None = None,
        say: Callable[[str], None] = lambda line: None,
        clock: VenueClock | None = None,
        patience: Patience | None = None,
    ) -> None:
        if request.until_ms is not None or request.dry_run:
            raise UsageError("Following has no end and is no rehearsal: leave out --until and --dry-run.")
        kinds = dict.fromkeys("trade" if kind == "candles" else kind for kind in request.kinds)
        self._kinds = [kind for kind in kinds if kind in CANDLE_KINDS]
        if not self._kinds:
            raise UsageError("Following needs candles: none of --kinds has bars.")
        self._store = store
        self._connector = connector
        self._request = request
        self._for_s = for_s
        self._say = say
        self._clock = clock or VenueClock()
        self._patience = patience
        self._inbox: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._stopped = threading.Event()
        self._lag_ms = max(LAG_MS, request.lag_ms)
        self._symbols: tuple[str, ...] = ()
        self._records: list[Record] = []
        self._lives: dict[str, Life] = {}
        self._hinted: dict[
            str, int
        ] = {}  # by symbol: open time of the newest bar that the stream calls closed
        self._now = False  # an update is wanted at once
        self._not_before_s = 0.0  # monotonic
        self._measured_s = 0.0  # monotonic
        self._failed_in_a_row = 0
        self._reread_ms = 0
        self._asked_ms = 0
        self._drift_told = False
        self.summary = FollowSummary()

    def stop(self) -> None:
        """End ``run`` soon; what was answered is stored."""
        self._stopped.set()
        self._connector.stop()
        self._inbox.put(None)

    def run(self) -> FollowSummary:
        """Fetch, then follow. Raises what a fetch raises before the first bar is followed, VenueForbidden, and
        failures of the store; other failures of the venue are told and tried again."""
        started, sent = time.monotonic(), self._connector.requests
        try:
            self._begin()
            while not self._over(started):
                self._stay(started)
        except VenueError:
            if not self._stopped.is_set():  # stop() ends a request under way with this error
                raise
        self.summary.requests = self._connector.requests - sent
        self.summary.seconds = time.monotonic() - started
        return self.summary

    def _stay(self, started: float) -> None:
        """Follow by one feed, until its symbols are others."""
        symbols, before = self._symbols, self.summary.connects
        wanted = (self._request.category, self._request.interval, symbols)
        with LiveFeed(*wanted, self._inbox.put, self._connector.base_url, self._patience, before):
            while symbols == self._symbols and not self._over(started):
                self._listen(self._wait_s(started))
                if self._due() and not self._over(started):
                    self._try_update()
            self._listen(0.0)  # what happened during the last update

    # -- whom ---------------------------------------------------------------------------------------

    def _begin(self) -> None:
        self._measure()
        self._fetch_all()
        if not self._symbols:
            raise DataMissing(f"Nothing to follow: {', '.join(self.summary.ended)} trade no more.")
        self._reread_ms = self._measure()

    def _fetch_all(self) -> None:
        """An ordinary fetch of what the request means by now: all kinds, and whatever the record lacks. What of it still
        trades is followed from here."""
        wanted = self._wanted()
        if not wanted:
            return self._follow((), set())
        plan = plan_fetch(self._store, self._connector, replace(self._request, symbols=wanted))
        self.summary.add(run_fetch(self._store, self._connector, plan))
        self._lives = plan.lives
        closed_ms = plan.server_ms - self._lag_ms
        ended = {
            s for s in wanted if last_close(plan.lives[s], self._request.interval, closed_ms) is not None
        }
        self._follow(tuple(s for s in wanted if s not in ended), ended)

    def _wanted(self) -> tuple[str, ...]:
        """The symbols of the request, and those found before: one that is no longer among the most traded stays."""
        category, followed = self._request.category, self._symbols
        try:
            found = expand(self._request.symbols, category, self._connector, self._store)
        except (UsageError, DataMissing) as error:
            if not self.summary.series:
                raise
            self._say(f"{error.message} What was followed stays.")
            return followed
        names = tuple(s for s in dict.fromkeys((*followed, *found)) if s not in self.summary.ended)
        if category != "spot" or not self.summary.series:
            return names
        # Of spot the venue describes only what trades; what is absent now may be back in the next answer.
        trading = {str(row.get("symbol")) for row in self._connector.instruments(category)}
        for symbol in (s for s in followed if s not in trading):
            self._say(f"The venue does not list {symbol}: it is not followed while that is so.")
        return tuple(s for s in names if s in trading)

    def _follow(self, symbols: tuple[str, ...], ended: set[str]) -> None:
        """Follow ``symbols`` from what is stored of them, and no more those that have ``ended``."""
        started, now_ms, interval = bool(self.summary.series), self._clock.now_ms(), self._request.interval
        for record in self._records:
            if record.series.symbol in ended:
                self._explain_end(record)
        self.summary.ended += sorted(ended)
        for symbol in sorted(ended):
            self._say(f"{symbol} was delisted: it is not followed any more.")
        kept = [record for record in self._records if record.series.symbol in symbols]
        new = [s for s in symbols if s not in self._symbols]
        with self._store.session():
            self._records = kept + [
                self._record_of(
                    Series(self._request.category, symbol, interval, kind), floor_open(now_ms, interval)
                )
                for symbol in new
                for kind in self._kinds
            ]
        self._symbols = symbols
        names = [str(record.series) for record in self._records]
        self.summary.series = list(dict.fromkeys([*self.summary.series, *names]))
        if started:
            self.summary.added += [s for s in new if s not in self.summary.added]
            for symbol in new:
                self._say(f"{symbol} trades: it is followed from now on.")

    def _explain_end(self, record: Record) -> None:
        """Bars asked for after the delisting, when it was not known yet, get their true reason."""
        series, life = record.series, self._lives[record.series.symbol]
        end_ms = last_close(life, series.interval, record.next_ms)
        if series.kind == "trade" and end_ms is not None and end_ms < record.next_ms:
            window = Window(
                series, end_ms, record.next_ms, count_bars(end_ms, record.next_ms, series.interval)
            )
            marks = [empty_window(window, DELISTED)]
            self._store.put_windows(marks, source=self._request.source, now_ms=self._clock.now_ms())

    def _record_of(self, series: Series, opened_ms: int) -> Record:
        last = self._store.last_open(series)
        if last is None:
            return Record(series, opened_ms, opened_ms)
        first = floor_open(last - bars_again(series.interval) * INTERVALS[series.interval], series.interval)
        stored = self._stored([series.symbol], series.kind, first, last + 1).get(series.symbol, {})
        return Record(series, min(stored), next_open(last, series.interval))

    # -- when ---------------------------------------------------------------------------------------

    def _over(self, started: float) -> bool:
        if self.summary.ended and not self._symbols and not any(map(is_pattern, self._request.symbols)):
            return True  # all were delisted, and no other can come
        late = self._for_s is not None and time.monotonic() - started >= self._for_s
        return self._stopped.is_set() or late

    def _wait_s(self, started: float) -> float:
        """Seconds to wait for an event: until something is due, the end, or a while has passed."""
        now = time.monotonic()
        until_due = 0.0 if self._now else self._clock.seconds_until(self._due_ms(), _LONGEST_WAIT_S)
        wait = max(until_due, self._not_before_s - now, _SHORTEST_WAIT_S)
        return wait if self._for_s is None else max(0.0, min(wait, started + self._for_s - now))

    def _due_ms(self) -> int:
        """Venue's time at which there is something to ask."""
        interval = self._request.interval
        due = [self._reread_ms + REREAD_ALL_MS]
        due += [next_open(r.next_ms, interval) + self._lag_ms + UNHINTED_MS for r in self._records]
        few = [max(r.missing.values()) for r in self._records if 0 < len(r.missing) <= FEW_MISSING]
        if few:  # after 5 s, 10 s, 20 s …
            due.append(self._asked_ms + max(ASK_AGAIN_MS, self._asked_ms - max(few)))
        for record in self._records:
            if self._hinted.get(record.series.symbol, -1) >= record.next_ms:
                due.append(next_open(record.next_ms, interval) + self._lag_ms)
        return min(due)

    def _due(self) -> bool:
        if time.monotonic() < self._not_before_s:
            return False
        idle_s = time.monotonic() - self._measured_s  # a machine that slept does not know it
        return self._now or idle_s > 2 * _LONGEST_WAIT_S or self._clock.now_ms() >= self._due_ms()

    def _listen(self, wait_s: float) -> None:
        """Take the events that come within ``wait_s``; returns after the first and those that wait behind it."""
        try:
            event = self._inbox.get(timeout=wait_s)
            while True:
                if event is not None:
                    self._take(event)
                event = self._inbox.get_nowait()
        except queue.Empty:
            return

    def _take(self, event: Event) -> None:
        if isinstance(event, BarClosed):
            self._hinted[event.symbol] = max(event.open_ms, self._hinted.get(event.symbol, -1))
            closed_ms = next_open(event.open_ms, self._request.interval)
            self._now |= closed_ms > self._clock.now_ms()  # the clock is slower than the venue's: look at it
        elif isinstance(event, Connected):
            self.summary.connects = event.number
            self._now |= event.number > 1
        elif isinstance(event, Broken):
            self.summary.breaks += 1
            self._say(f"The stream broke ({event.reason}); it is being connected again.")
        elif isinstance(event, Stale):
            self.summary.stale += 1
            self._say(f"The stream says nothing about {event.symbol}.")
        elif isinstance(event, Rejected) and event.symbol not in self.summary.rejected:
            self.summary.rejected.append(event.symbol)
            self._say(
                f"The venue does not stream {event.symbol} ({event.said}); it is asked for by the clock."
            )

    # -- what ---------------------------------------------------------------------------------------

    def _measure(self) -> int:
        now_ms = self._clock.measure(self._connector.server_time_ms)
        self._measured_s = time.monotonic()
        self.summary.drift_ms = self._clock.drift_ms
        if abs(self._clock.drift_ms) > DRIFT_MS and not self._drift_told:
            self._drift_told = True
            way = "ahead of" if self._clock.drift_ms > 0 else "behind"
            seconds = abs(self._clock.drift_ms) / 1000
            self._say(f"The local clock is {seconds:.1f} s {way} the venue's; bars go by the venue's.")
        return now_ms

    def _try_update(self) -> None:
        """Update; a failure of the venue or a busy store is told, and tried again after a pause that grows."""
        self._now = False
        try:
            self._update()
        except VenueForbidden:
            raise
        except (VenueError, StoreBusy) as error:
            if self._stopped.is_set():
                return
            self.summary.failures += 1
            self._now = True  # whatever the stream said is still to be fetched
            self._failed_in_a_row += 1
            pause_s = min(_LONGEST_BACKOFF_S, 2.0 ** min(self._failed_in_a_row - 1, 10))
            self._not_before_s = time.monotonic() + pause_s
            self._say(f"{error.message} Trying again in {pause_s:g} s.")
        else:
            self._failed_in_a_row = 0
            self._not_before_s = time.monotonic() + _SHORTEST_WAIT_S

    def _update(self) -> None:
        now_ms = self._measure()
        interval = self._request.interval
        again = now_ms >= self._reread_ms + REREAD_ALL_MS
        if again:
            self._fetch_all()
            self._reread_ms = now_ms
        until_ms = floor_open(now_ms - self._lag_ms, interval)
        windows: list[Window] = []
        for record in self._records:
            if again or record.missing or record.next_ms < until_ms:
                windows += record.windows(until_ms, bars_again(interval) if again else REREAD_BARS)
        if not windows:
            return
        self.summary.updates += 1
        self._asked_ms = now_ms
        plan = FetchPlan(self._request, now_ms, self._connector.rate, windows=windows, lives=self._lives)
        try:
            self.summary.add(run_fetch(self._store, self._connector, plan))
        except VenueRefused as error:  # one symbol's trouble: the others were stored
            self._say(error.message)
        except VenueError:
            self._look(until_ms, complete=False)
            raise
        self._look(until_ms, complete=True)

    def _look(self, until_ms: int, complete: bool) -> None:
        """Compare the store with the grid: tell the bars that came, note those that did not.

        When the fetch was not ``complete``, a bar that is absent was perhaps not asked for.
        """
        now_ms = self._clock.now_ms()
        for kind in dict.fromkeys(record.series.kind for record in self._records):
            records = [record for record in self._records if record.series.kind == kind]
            since_ms = min(min([record.next_ms, *record.missing]) for record in records)
            if since_ms < until_ms:
                stored = self._stored(self._symbols, kind, since_ms, until_ms)
                for record in records:
                    self._compare(record, stored.get(record.series.symbol, {}), until_ms, now_ms, complete)

    def _compare(
        self, record: Record, stored: dict[int, float], until_ms: int, now_ms: int, complete: bool
    ) -> None:
        for open_ms in [at for at in record.missing if at in stored]:
            del record.missing[open_ms]
            self._tell(record.series, open_ms, stored[open_ms], now_ms)
        for open_ms in grid(record.next_ms, until_ms, record.series.interval):
            if open_ms in stored:
                self._tell(record.series, open_ms, stored[open_ms], now_ms)
            elif complete:
                record.missing[open_ms] = now_ms
            else:
                return
            record.next_ms = next_open(open_ms, record.series.interval)
        for open_ms in [at for at, noted_ms in record.missing.items() if now_ms - noted_ms > MISSING_MS]:
            del record.missing[open_ms]
            self.summary.gaps += 1
            self._say(f"{record.series}: the venue has no bar of {iso(open_ms)}.")

    def _tell(self, series: Series, open_ms: int, close: float, now_ms: int) -> None:
        close_ms = next_open(open_ms, series.interval)
        delay_s = (now_ms - close_ms) / 1000
        self.summary.bars += 1
        self.summary.delays_s.append(delay_s)
        self._say(f"{iso(close_ms)} {series} closed at {close:g}, stored {delay_s:.1f} s later")

    def _stored(
        self, symbols: Sequence[str], kind: str, since_ms: int, until_ms: int
    ) -> dict[str, dict[int, float]]:
        """By symbol and open time: the close of each stored bar, in one read."""
        found = self._store.candles(
            self._request.category, symbols, self._request.interval, kind, since_ms, until_ms
        ).select("symbol", pl.col("open_time").dt.epoch("ms"), "close")
        closes: dict[str, dict[int, float]] = {}
        for symbol, open_ms, close in found.iter_rows():
            closes.setdefault(symbol, {})[open_ms] = close
        return closes


_UNIT_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


def seconds_of(text: str) -> float:
    """Seconds of a duration such as ``90s``, ``20m``, ``24h``, ``7d``; UsageError for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text.strip())
    if not found or float(found[1]) <= 0:
        raise UsageError(
            f"'{text}' is not a duration: expected a number and a unit, as in 90s, 20m, 24h, 7d."
        )
    return float(found[1]) * _UNIT_S[found[2]]
