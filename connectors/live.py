"""The venue's stream of candles, kept alive: hints that a bar has closed, never the bar itself.

pybit's client opens the connection, pings, and reads; this module decides everything else, since that client ends
quietly on a refused subscription, an unknown topic, bad JSON or an outage of a tenth of a second. So it is never
left to reconnect by itself, its own handling of messages is replaced (every message goes into a queue), and a thread
of ours watches it::

    connect ──> subscribe, ten topics a request ──> read ──> broken or silent? ──> wait ──> connect …

A refused request is halved until the topics at fault are found; the others go on. Topics and frames:
https://bybit-exchange.github.io/docs/v5/websocket/public/kline
"""

from __future__ import annotations

import json
import logging
import queue
import random
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self
from urllib.parse import urlsplit

import pybit.unified_trading as pybit
import websocket

from recur.connectors.bybit import PUBLIC_URL, VENUE_INTERVALS

TOPICS_PER_REQUEST = 10  # the most that spot allows; elsewhere it keeps the cost of a refusal small
_LOOK_EVERY_S = 0.25
_END_S = 2.0
_TRIES = 2  # of pybit's constructor: it counts its last try as failed even when that one connects

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class BarClosed:
    """The stream says that the bar of ``symbol`` which opened at ``open_ms`` has closed."""

    symbol: str
    open_ms: int


@dataclass(frozen=True, slots=True)
class Connected:
    """Connected and subscribed, for the ``number``-th time: what closed before may have been missed."""

    number: int


@dataclass(frozen=True, slots=True)
class Broken:
    """The connection is gone, or could not be made."""

    reason: str


@dataclass(frozen=True, slots=True)
class Stale:
    """``symbol`` is subscribed and says nothing."""

    symbol: str


@dataclass(frozen=True, slots=True)
class Rejected:
    """The venue does not stream ``symbol``."""

    symbol: str
    said: str


Event = BarClosed | Connected | Broken | Stale | Rejected


@dataclass(frozen=True, slots=True)
class Patience:
    """Times in seconds. The venue allows 500 connects in 5 minutes and pushes a candle at least once a minute."""

    connect_gap: float = 2.0  # between two connects
    longest_pause: float = 60.0  # between two connects that fail
    handshake: float = 10.0
    ack: float = 10.0
    silence: float = 90.0  # of one topic
    refusal: float = 300.0  # before a refused topic is asked for again


class _Lost(Exception):
    """This connection is of no further use."""


class _Socket(pybit.WebSocket):  # type: ignore[misc]
    """pybit's client that ends at an error, without raising into a thread where nobody listens."""

    exited: bool

    def __init__(self, errors: list[Exception], *args: Any, **settings: Any) -> None:
        self.errors = errors
        super().__init__(*args, **settings)  # connects

    def _on_error(self, error: Exception) -> None:
        self.errors.append(error)
        if not self.exited:
            self.exited = True
            if self.ws.sock is not None:
                self.ws.sock.shutdown()  # after the venue's close frame nothing else would close it
            self.exit()


class LiveFeed:
    """Watches the trade candles of ``symbols`` and tells ``emit`` (called in a thread of the feed) what happens.

    Use it as a context manager. ``emit`` must return at once and not raise: a queue's ``put``. ``base_url`` is that
    of the REST venue. Every loss of the connection is told by ``Broken`` and followed, after a pause that grows,
    by another connect; ``connects`` counts them, from those of a feed before this one. Hints come at most once per bar, and never for a bar older than
    the last hint of its symbol.
    """

    def __init__(
        self,
        category: str,
        interval: str,
        symbols: Sequence[str],
        emit: Callable[[Event], None],
        base_url: str = PUBLIC_URL,
        patience: Patience | None = None,
        connects: int = 0,
    ) -> None:
        self.connects = connects
        self.ignored = 0  # messages that could not be read
        self._category = category
        self._symbols = {f"kline.{VENUE_INTERVALS[interval]}.{symbol}": symbol for symbol in symbols}
        self._emit = emit
        self._url = stream_url(base_url)
        self._patience = patience or Patience()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="live feed", daemon=True)
        self._newest: dict[str, int] = {}  # by symbol: open time of the newest bar seen
        self._told: dict[str, int] = {}  # by symbol: open time of the newest bar told as closed
        self._blamed: set[str] = set()  # topics for whose silence a connection was given up
        self._heard: dict[str, float] = {}  # by accepted topic: when it spoke last
        self._acks: list[dict[str, Any]] = []
        self._has_spoken = False  # this connection has brought a candle

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join(timeout=_END_S)

    # -- the supervisor -----------------------------------------------------------------------------

    def _run(self) -> None:
        failures = 0
        while not self._stopped.is_set():
            began = time.monotonic()
            spent = _TRIES  # connects used
            reason = ""
            try:
                with self._connected() as connection:
                    spent = 1
                    self._watch(*connection)
            except _Lost as lost:
                reason = str(lost)
            except Exception as error:  # noqa: BLE001  pybit and websocket-client raise many kinds here
                _log.debug("the stream failed", exc_info=error)
                reason = f"{type(error).__name__}: {error}"
            if self._stopped.is_set():
                return
            failures = 0 if self._has_spoken else failures + 1
            self._emit(Broken(reason))
            rest = spent * self._patience.connect_gap - (time.monotonic() - began)
            self._stopped.wait(max(rest, self._pause(failures)))

    def _pause(self, failures: int) -> float:
        """Doubling, capped, half of it random so that clients do not come back together."""
        gap = self._patience.connect_gap
        full = min(self._patience.longest_pause, gap * 2.0 ** max(0, min(failures - 1, 30)))
        return full * (0.5 + 0.5 * random.random())

    @contextmanager
    def _connected(self) -> Iterator[tuple[queue.SimpleQueue[Any], _Socket]]:
        inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._has_spoken = False
        self.connects += 1
        client = _open(self._category, self._url, inbox.put, self._patience.handshake)
        try:
            yield inbox, client
        finally:
            _close(client)

    def _watch(self, inbox: queue.SimpleQueue[Any], client: _Socket) -> None:
        """Subscribe and read until the feed is stopped; raises _Lost when the connection is."""
        self._heard = {}
        self._subscribe_all(inbox, client, list(self._symbols))
        self._emit(Connected(self.connects))
        looked = asked = time.monotonic()
        stale: set[str] = set()
        while not self._stopped.is_set():
            self._read(inbox, client)
            now = time.monotonic()
            if now - looked >= _LOOK_EVERY_S:
                looked = now
                stale = self._look(now, stale)
            if now - asked >= self._patience.refusal:
                asked = now
                self._subscribe_all(inbox, client, [t for t in self._symbols if t not in self._heard])

    def _read(self, inbox: queue.SimpleQueue[Any], client: _Socket) -> None:
        """Take one message; what came before a connection broke is still read."""
        try:
            message = inbox.get(timeout=_LOOK_EVERY_S)
        except queue.Empty:
            if not client.wst.is_alive() or not client.is_connected():
                raise _Lost(_why(client.errors)) from None
            return
        self._take(message)

    def _look(self, now: float, known: set[str]) -> set[str]:
        """The topics that are silent for too long. Raises _Lost unless another connect did not help either."""
        stale = {topic for topic, at in self._heard.items() if now - at > self._patience.silence}
        for topic in sorted(stale - known):
            self._emit(Stale(self._symbols[topic]))
        if stale and (stale - self._blamed or stale == set(self._heard)):
            self._blamed |= stale
            raise _Lost(f"{len(stale)} of {len(self._heard)} topics silent for {self._patience.silence:g} s")
        return stale

    # -- subscribing --------------------------------------------------------------------------------

    def _subscribe_all(self, inbox: queue.SimpleQueue[Any], client: _Socket, topics: list[str]) -> None:
        for first in range(0, len(topics), TOPICS_PER_REQUEST):
            self._subscribe(inbox, client, topics[first : first + TOPICS_PER_REQUEST])

    def _subscribe(self, inbox: queue.SimpleQueue[Any], client: _Socket, topics: list[str]) -> None:
        """Subscribe ``topics``, without those at fault when the venue refuses them."""
        ack = self._ask(inbox, client, topics)
        if ack.get("success") is True:
            now = time.monotonic()
            self._heard |= {topic: self._heard.get(topic, now) for topic in topics}
        elif len(topics) == 1:
            self._emit(Rejected(self._symbols[topics[0]], str(ack.get("ret_msg", ""))))
        else:
            half = len(topics) // 2
            self._subscribe(inbox, client, topics[:half])
            self._subscribe(inbox, client, topics[half:])

    def _ask(self, inbox: queue.SimpleQueue[Any], client: _Socket, topics: list[str]) -> dict[str, Any]:
        """The venue's answer to one request; one without a request id answers the only request there is.

        Sent past pybit's ``subscribe``, which waits for ever once the connection is lost.
        """
        req_id = str(uuid.uuid4())
        self._acks.clear()
        client.ws.send(json.dumps({"op": "subscribe", "req_id": req_id, "args": topics}))
        until = time.monotonic() + self._patience.ack
        while time.monotonic() < until and not self._stopped.is_set():
            self._read(inbox, client)
            for ack in self._acks:
                if ack.get("req_id", req_id) in (req_id, ""):
                    return ack
        raise _Lost(f"no answer to a subscription within {self._patience.ack:g} s")

    # -- messages -----------------------------------------------------------------------------------

    def _take(self, message: Any) -> None:
        if isinstance(message, dict) and message.get("op") == "subscribe":
            self._acks.append(message)
            return
        topic = message.get("topic") if isinstance(message, dict) else None
        if not isinstance(topic, str) or topic not in self._symbols:
            self.ignored += 1
            return
        self._has_spoken = True
        self._heard[topic] = time.monotonic()
        self._blamed.discard(topic)
        bars = message.get("data")
        for bar in bars if isinstance(bars, list) else []:
            start = bar.get("start") if isinstance(bar, dict) else None
            if type(start) is int:
                self._see(self._symbols[topic], start, bar.get("confirm") is True)
            else:
                self.ignored += 1

    def _see(self, symbol: str, start_ms: int, confirmed: bool) -> None:
        """A bar has closed when it is confirmed, or when a later one is seen."""
        newest = self._newest.get(symbol, start_ms)
        self._newest[symbol] = max(newest, start_ms)
        closed = start_ms if confirmed else newest if start_ms > newest else None
        if closed is not None and closed > self._told.get(symbol, -1):
            self._told[symbol] = closed
            self._emit(BarClosed(symbol, closed))


# -- the connection -------------------------------------------------------------------------------------

_globals = threading.Lock()  # pybit and websocket-client keep these two settings in module variables


def stream_url(base_url: str) -> str:
    """WebSocket address that belongs to a REST one, ``{CHANNEL_TYPE}`` left open: ``api.…`` becomes ``stream.…``.

    >>> stream_url("https://api.bybit.com")
    'wss://stream.bybit.com/v5/public/{CHANNEL_TYPE}'
    """
    parts = urlsplit(base_url)
    host = parts.netloc
    if host.startswith(("api.", "api-")):
        host = "stream" + host.removeprefix("api")
    return f"{'wss' if parts.scheme == 'https' else 'ws'}://{host}/v5/public/{{CHANNEL_TYPE}}"


def _open(category: str, url: str, take: Callable[[Any], None], timeout_s: float) -> _Socket:
    """A connected client that hands every message but pongs to ``take``; _Lost says why there is none."""
    logging.getLogger("websocket").propagate = False  # its errors are told by Broken
    errors: list[Exception] = []
    with _globals:
        kept = pybit.PUBLIC_WSS, websocket.getdefaulttimeout()
        pybit.PUBLIC_WSS = url
        websocket.setdefaulttimeout(timeout_s)
        try:
            return _Socket(
                errors,
                category,
                testnet=False,
                retries=_TRIES,
                restart_on_error=False,
                callback_function=take,
            )
        except websocket.WebSocketTimeoutException as error:
            raise _Lost(_why(errors or [error])) from error
        finally:
            pybit.PUBLIC_WSS = kept[0]
            websocket.setdefaulttimeout(kept[1])


def _close(client: _Socket) -> None:
    """End the connection at once: a peer that is gone would never answer a polite goodbye."""
    client.exited = True
    raw = client.ws.sock
    if raw is not None:
        raw.abort()  # wakes the reading thread
        client.wst.join(timeout=_END_S)
        raw.shutdown()
    client.exit()


def _why(errors: Sequence[Exception]) -> str:
    if not errors:
        return "the connection was closed"
    return (str(errors[0]).splitlines() or [type(errors[0]).__name__])[0]
