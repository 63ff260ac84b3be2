"""The public WebSocket of the sandbox: candles and tickers as the venue pushes them, and its ways to fail.

One thread serves one connection: it reads what the client says, and pushes what its topics have to say by the
venue's clock. Rules of subscribing, acks, pongs and frames follow
https://bybit-exchange.github.io/docs/v5/ws/connect and its neighbours. Candles are taken from the REST endpoint, so
both always agree (but for the fault ``disagree``).

Faults are taken by name from a plan, at five moments, each with its own endpoint name:

    stream/connect      handshake-403 handshake-429 handshake-503 half-open
    stream/subscribe    no-ack reject args-size ack-at-once
    stream/ping         no-pong
    stream/kline        (each time a candle closes) close-1000 close-1001 close-1006 reset half-open outage-short
                        outage outage-long no-confirm two-confirms late-confirm out-of-order duplicate gap bad-json
                        binary no-topic unknown-topic burst disagree
    stream/tickers      (before the first ticker) delta-first
"""

from __future__ import annotations

import json
import random
import select
import socket
import struct
import threading
import time
import uuid
from dataclasses import dataclass, field
from typing import Any, Protocol

from websockets.frames import Frame, Opcode
from websockets.http11 import Request
from websockets.protocol import State
from websockets.server import ServerProtocol

from recur.connectors.sandbox.endpoints import INTERVAL_OF_CODE, Endpoints
from recur.connectors.sandbox.tickers import ticker
from recur.connectors.sandbox.world import World
from recur.vocabulary import CATEGORIES, floor_open, next_open

SPOT_ARGS = 10
"""Most topics of one subscribe request on the spot channel."""
IDLE_S = 600.0
ACK_DELAY_S = (0.01, 0.05)
PUSH_EVERY_MS = 1000
OUTAGE_S = {"outage-short": 0.05, "outage": 3.0, "outage-long": 60.0}
LATE_MS = 5000
GAP_BARS = 3
BURST = 10_000
_TICK_S = 0.02
_SEND_S = 10.0
_PREFIX = "/v5/public/"


class StreamFault(Protocol):
    @property
    def name(self) -> str: ...


class StreamFaults(Protocol):
    """Which fault, if any, happens at this moment of the stream; asked by many threads."""

    def take(self, endpoint: str, symbol: str, now_ms: int) -> StreamFault | None: ...


class Clock(Protocol):
    def now_ms(self) -> int: ...


class Streams:
    """All WebSocket connections of one sandbox. ``connects`` counts handshakes asked, refused ones included."""

    def __init__(
        self, world: World, endpoints: Endpoints, clock: Clock, faults: StreamFaults | None = None
    ) -> None:
        self.world = world
        self.endpoints = endpoints
        self.clock = clock
        self.connects = 0
        self.silent_until_ms: dict[str, int] = {}  # by symbol: the fault "gap"
        self._faults = faults
        self._outage_until_s = 0.0
        self._lock = threading.Lock()

    def __contains__(self, path: str) -> bool:
        return path.startswith(_PREFIX) and path.removeprefix(_PREFIX) in CATEGORIES

    def serve(self, path: str, request: bytes, connection: socket.socket) -> None:
        """Answer the handshake ``request`` and serve the connection until either side ends it."""
        with self._lock:
            self.connects += 1
        if self.out():
            return
        connection.settimeout(_SEND_S)
        try:
            _Connection(self, path.removeprefix(_PREFIX), connection).serve(request)
        except TimeoutError as error:
            raise ConnectionAbortedError("the client reads nothing") from error

    def fault(self, endpoint: str, symbol: str = "") -> str:
        """Name of the fault that happens now; empty for none."""
        fault = self._faults.take(f"stream/{endpoint}", symbol, self.clock.now_ms()) if self._faults else None
        return fault.name if fault else ""

    def go_out(self, seconds: float) -> None:
        """Cut every connection now, and every new one for ``seconds``."""
        self._outage_until_s = time.monotonic() + seconds

    def out(self) -> bool:
        return time.monotonic() < self._outage_until_s


@dataclass(slots=True)
class _Topic:
    name: str
    symbol: str
    code: str = ""  # of the candle's interval; empty for a ticker
    next_open_ms: int = 0  # of the first candle whose end was not pushed yet
    pushed_ms: int | None = None
    shown: dict[str, str] = field(default_factory=dict)  # of a ticker: what the client knows


class _Cut(Exception):
    """The connection ends here; ``reset`` with a TCP reset."""

    def __init__(self, reset: bool = False) -> None:
        self.reset = reset


class _Connection:
    def __init__(self, streams: Streams, category: str, connection: socket.socket) -> None:
        self._streams = streams
        self._category = category
        self._socket = connection
        self._protocol = ServerProtocol()
        self._id = str(uuid.uuid4())
        self._topics: dict[str, _Topic] = {}
        self._later: list[tuple[float, dict[str, Any]]] = []  # (monotonic seconds, message)
        self._held: list[tuple[int, dict[str, Any]]] = []  # (venue's ms, message)
        self._pending: list[tuple[float, list[_Topic]]] = []  # active once their ack is out
        self._pings = 0
        self._deaf = False  # half-open: neither hears nor speaks
        self._heard_s = time.monotonic()

    # -- the connection -----------------------------------------------------------------------------

    def serve(self, request: bytes) -> None:
        self._protocol.receive_data(request)
        (asked,) = self._protocol.events_received()
        if not isinstance(asked, Request):
            raise ConnectionAbortedError("no handshake")
        fault = self._streams.fault("connect")
        if fault.startswith("handshake-"):
            response = self._protocol.reject(int(fault.removeprefix("handshake-")), "refused\n")
        else:
            response = self._protocol.accept(asked)
        self._protocol.send_response(response)
        self._flush()
        self._deaf = fault == "half-open"
        try:
            self._loop()
        except _Cut as cut:
            if cut.reset:
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self._socket.close()

    def _loop(self) -> None:
        next_tick = 0.0
        while self._protocol.state is not State.CLOSED:
            now = time.monotonic()
            if self._streams.out() or now - self._heard_s > IDLE_S:
                return
            self._send_due(now)
            if now >= next_tick and self._protocol.state is State.OPEN:
                next_tick = now + _TICK_S
                self._push()
            wake = min([next_tick, *(at for at, _ in self._later)])
            ready, _, _ = select.select([self._socket], [], [], max(0.001, wake - time.monotonic()))
            if ready:
                self._hear(self._socket.recv(65536))

    def _hear(self, data: bytes) -> None:
        if self._deaf and data:
            return
        self._heard_s = time.monotonic()
        if data:
            self._protocol.receive_data(data)
        else:
            self._protocol.receive_eof()
        for event in self._protocol.events_received():
            if isinstance(event, Frame) and event.opcode is Opcode.TEXT:
                self._command(bytes(event.data))
        self._flush()

    def _flush(self) -> None:
        for data in self._protocol.data_to_send():
            if data:
                self._socket.sendall(data)
            else:
                self._socket.shutdown(socket.SHUT_WR)

    def _send(self, message: dict[str, Any]) -> None:
        self._send_text(json.dumps(message))

    def _send_text(self, text: str) -> None:
        if self._protocol.state is State.OPEN and not self._deaf:
            self._protocol.send_text(text.encode())
            self._flush()

    def _send_due(self, now_s: float) -> None:
        for at, message in [entry for entry in self._later if entry[0] <= now_s]:
            self._later.remove((at, message))
            self._send(message)
        for at, topics in [entry for entry in self._pending if entry[0] <= now_s]:
            self._pending.remove((at, topics))
            self._topics |= {topic.name: topic for topic in topics}
        venue_ms = self._streams.clock.now_ms()
        for at_ms, message in [entry for entry in self._held if entry[0] <= venue_ms]:
            self._held.remove((at_ms, message))
            self._send(message)

    # -- commands -----------------------------------------------------------------------------------

    def _command(self, text: bytes) -> None:
        try:
            command = json.loads(text)
            op, args = command["op"], [str(arg) for arg in command.get("args", [])]
        except (ValueError, KeyError, TypeError, AttributeError):
            self._send(self._ack("", None, False, "error:request can not be read"))
            return
        if op == "ping":
            self._pong(command)
        elif op == "subscribe":
            self._subscribe(command.get("req_id"), args)
        elif op == "unsubscribe":
            for name in args:
                self._topics.pop(name, None)
            self._answer(self._ack(op, command.get("req_id"), True))
        else:
            self._answer(self._ack(op, command.get("req_id"), False, "error:op not found"))

    def _pong(self, command: dict[str, Any]) -> None:
        if self._streams.fault("ping") == "no-pong":
            return
        self._pings += 1
        if self._category == "linear" and self._pings % 2 == 0:  # both forms were seen there
            self._send({"op": "pong", "args": [str(self._streams.clock.now_ms())]})
        else:
            self._send(self._ack("ping", command.get("req_id"), True, "pong"))

    def _subscribe(self, req_id: object, args: list[str]) -> None:
        topics = [self._topic(name) for name in args]
        fault = self._streams.fault("subscribe", next((t.symbol for t in topics if t), ""))
        if fault == "no-ack":
            return
        if (self._category == "spot" and len(args) > SPOT_ARGS) or fault == "args-size":
            self._answer(self._ack("subscribe", None, False, "args size >10"))
            return
        bad = [name for name, topic in zip(args, topics, strict=True) if topic is None]
        if bad or fault == "reject":
            refusal = f"error:handler not found,topic:{(bad or args)[0]}"
            self._answer(self._ack("subscribe", req_id, False, refusal))
            return
        ack = self._ack("subscribe", req_id, True, "subscribe" if self._category == "spot" else "")
        good = [topic for topic in topics if topic is not None]
        if fault == "ack-at-once":
            self._send(ack)
            self._topics |= {topic.name: topic for topic in good}
        else:
            self._pending.append((self._answer(ack), good))

    def _topic(self, name: str) -> _Topic | None:
        """The topic of a name such as ``kline.60.BTCUSDT`` or ``tickers.BTCUSDT``; None if there is none."""
        kind, *middle, symbol = name.split(".")
        if symbol not in self._streams.world.symbols(self._category):
            return None
        if kind == "tickers" and not middle:
            return _Topic(name, symbol)
        if kind == "kline" and len(middle) == 1 and middle[0] in INTERVAL_OF_CODE:
            opened = floor_open(self._streams.clock.now_ms(), INTERVAL_OF_CODE[middle[0]])
            return _Topic(name, symbol, middle[0], opened)
        return None

    def _ack(self, op: str, req_id: object, success: bool, said: str = "") -> dict[str, Any]:
        ack = {"success": success, "ret_msg": said, "conn_id": self._id, "op": op}
        return ack if req_id is None else ack | {"req_id": req_id}

    def _answer(self, ack: dict[str, Any]) -> float:
        """Send ``ack`` as late as the venue does; returns when, in monotonic seconds."""
        at = time.monotonic() + random.uniform(*ACK_DELAY_S)
        self._later.append((at, ack))
        return at

    # -- pushes -------------------------------------------------------------------------------------

    def _push(self) -> None:
        now = self._streams.clock.now_ms()
        for topic in list(self._topics.values()):
            if topic.code:
                self._push_candles(topic, now)
            elif topic.pushed_ms is None or now - topic.pushed_ms >= PUSH_EVERY_MS:
                self._push_ticker(topic, now)

    def _push_candles(self, topic: _Topic, now: int) -> None:
        """The end of each candle that closed since the last look, and at most once a second the open one."""
        closes = now >= next_open(topic.next_open_ms, INTERVAL_OF_CODE[topic.code])
        due = topic.pushed_ms is None or now - topic.pushed_ms >= PUSH_EVERY_MS
        if not (closes or due):
            return
        bars = self._bars(topic, topic.next_open_ms, now)
        ended = [bar for bar in bars if bar["end"] < now]
        opened = [bar for bar in bars if bar["end"] >= now]
        if closes:
            topic.next_open_ms = floor_open(now, INTERVAL_OF_CODE[topic.code])
        for bar in ended:
            if bar["end"] >= self._streams.silent_until_ms.get(topic.symbol, 0):
                self._close_candle(topic, bar, now)
        if opened and now >= self._streams.silent_until_ms.get(topic.symbol, 0):
            topic.pushed_ms = now
            self._send(_candle_frame(topic, opened[-1], now))

    def _close_candle(self, topic: _Topic, bar: dict[str, Any], now: int) -> None:
        """Push the end of one candle, or what a fault makes of it."""
        fault = self._streams.fault("kline", topic.symbol)
        last = _candle_frame(topic, bar | {"confirm": True}, now)
        if fault in ("close-1000", "close-1001"):
            self._protocol.send_close(int(fault[-4:]), "")
            self._flush()
        elif fault in ("close-1006", "reset"):
            raise _Cut(reset=fault == "reset")
        elif fault == "half-open":
            self._deaf = True
        elif fault in OUTAGE_S:
            self._streams.go_out(OUTAGE_S[fault])
            raise _Cut
        elif fault == "gap":
            length = bar["end"] + 1 - bar["start"]
            self._streams.silent_until_ms[topic.symbol] = bar["end"] + 1 + GAP_BARS * length
            raise _Cut
        elif fault == "late-confirm":
            self._held.append((bar["end"] + 1 + LATE_MS, last))
        elif fault == "binary":
            self._protocol.send_binary(b"\x00\xff\xfe")
            self._flush()
        else:
            for text in _texts_of(fault, topic, bar, last, now):
                self._send_text(text)

    def _push_ticker(self, topic: _Topic, now: int) -> None:
        values = ticker(self._streams.world, self._category, topic.symbol, now)
        frame = {"topic": topic.name, "type": "snapshot", "ts": now, "cs": now, "data": values}
        if self._category != "spot":
            changed = {k: v for k, v in values.items() if topic.shown.get(k) != v}
            first = topic.pushed_ms is None
            if not first or self._streams.fault("tickers", topic.symbol) == "delta-first":
                frame |= {"type": "delta", "data": {"symbol": topic.symbol} | changed}
        topic.pushed_ms, topic.shown = now, values
        self._send(frame)

    def _bars(self, topic: _Topic, since_ms: int, now: int) -> list[dict[str, Any]]:
        """Candles from ``since_ms`` on, oldest first, the open one last, as the stream names their parts."""
        query = {
            "category": self._category,
            "symbol": topic.symbol,
            "interval": topic.code,
            "start": str(since_ms),
            "end": str(now),
            "limit": "1000",
        }
        reply = json.loads(self._streams.endpoints.answer("/v5/market/kline", query, now))
        bars = []
        for start, o, h, low, c, volume, turnover in reversed(reply["result"].get("list", [])):
            end = next_open(int(start), INTERVAL_OF_CODE[topic.code]) - 1
            prices = {"open": o, "close": c, "high": h, "low": low, "volume": volume, "turnover": turnover}
            bars.append({"start": int(start), "end": end, "interval": topic.code, **prices, "confirm": False})
        return bars


def _candle_frame(topic: _Topic, bar: dict[str, Any], now: int) -> dict[str, Any]:
    data = [bar | {"timestamp": min(now, bar["end"])}]
    return {"topic": topic.name, "type": "snapshot", "ts": now, "data": data}


def _texts_of(fault: str, topic: _Topic, bar: dict[str, Any], last: dict[str, Any], now: int) -> list[str]:
    """What is sent at the end of a candle under the faults that spoil messages; ``last`` alone without a fault."""
    text = json.dumps(last)
    unfinished = json.dumps(_candle_frame(topic, bar, now))
    length = bar["end"] + 1 - bar["start"]
    if fault == "no-confirm":
        return [unfinished]
    if fault == "two-confirms":
        return [text, text]
    if fault == "duplicate":
        return [unfinished, unfinished, text, text, unfinished]
    if fault == "out-of-order":
        older = bar | {"start": bar["start"] - 2 * length, "end": bar["end"] - 2 * length}
        newer = bar | {"start": bar["start"] + length, "end": bar["end"] + length}
        return [json.dumps(_candle_frame(topic, other, now)) for other in (newer, older)] + [text]
    if fault == "bad-json":
        return [text[: len(text) // 2]]
    if fault == "no-topic":
        return [json.dumps({key: value for key, value in last.items() if key != "topic"})]
    if fault == "unknown-topic":
        return [json.dumps(last | {"topic": f"kline.{topic.code}.NOSUCHUSDT"})]
    if fault == "burst":
        return [unfinished] * BURST + [text]
    if fault == "disagree":
        bar = last["data"][0]
        return [json.dumps(last | {"data": [bar | {"close": bar["high"], "volume": "1"}]})]
    return [text]
