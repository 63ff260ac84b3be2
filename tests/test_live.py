"""Every way the venue's stream fails, by its name: the follower's store still ends equal to the venue's candles."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pybit.unified_trading as pybit
import pytest
import websocket

from recur.connectors.live import (
    BarClosed,
    Broken,
    Connected,
    Event,
    LiveFeed,
    Patience,
    Rejected,
    Stale,
    stream_url,
)
from recur.connectors.sandbox.server import SandboxServer, VirtualClock
from recur.pipeline.follow import Follower
from recur.storage.store import Store
from recur.vocabulary import MINUTE_MS, floor_open
from tests.following import NOW, QUICK, WORLD, Fault, eventually, following, stored, truth

SPEED = 900.0  # fifteen candles of a minute in a second


class Faults:
    """Faults by the moment at which they happen, each once, in the order in which they were armed."""

    def __init__(self) -> None:
        self.armed: dict[str, list[str]] = {}
        self.lock = threading.Lock()

    def arm(self, moment: str, *names: str) -> None:
        with self.lock:
            self.armed.setdefault(f"stream/{moment}", []).extend(names)

    def take(self, endpoint: str, symbol: str, now_ms: int) -> Fault | None:
        with self.lock:
            names = self.armed.get(endpoint)
            return Fault(names.pop(0)) if names else None

    def spent(self) -> bool:
        return not any(self.armed.values())


def serve(faults: Faults | None = None, speed: float = 0.0) -> SandboxServer:
    return SandboxServer(WORLD, VirtualClock(NOW, speed), stream_faults=faults)


def meet(server: SandboxServer, store: Store, bars: int) -> None:
    """Wait until ``bars`` more candles have closed, and until the store is equal to the venue up to there."""
    end_ms = floor_open(server.clock.now_ms(), "1m") + bars * MINUTE_MS
    eventually(lambda: server.clock.now_ms() >= end_ms + 1000)
    expected = truth("BTCUSDT", "1m", end_ms)
    eventually(lambda: len(stored(store, "BTCUSDT", "1m", end_ms)) == len(expected), every_s=0.1)
    assert stored(store, "BTCUSDT", "1m", end_ms) == expected


NAMED = [
    (62, "connect", ["handshake-403"], 1),
    (62, "connect", ["handshake-429"], 1),
    (62, "connect", ["handshake-503"], 1),
    (63, "subscribe", ["no-ack"], 1),
    (64, "subscribe", ["reject"], 0),
    (64, "subscribe", ["args-size"], 0),
    (65, "subscribe", ["ack-at-once"], 0),
    (66, "kline", ["close-1000"], 1),
    (66, "kline", ["close-1001"], 1),
    (66, "kline", ["close-1006"], 1),
    (67, "kline", ["reset"], 1),
    (68, "kline", ["half-open"], 1),
    (68, "connect", ["half-open"], 1),
    (69, "kline", ["outage-short"], 1),
    (70, "kline", ["no-confirm"], 0),
    (70, "kline", ["two-confirms"], 0),
    (70, "kline", ["late-confirm"], 0),
    (71, "kline", ["out-of-order"], 0),
    (71, "kline", ["duplicate"], 0),
    (72, "kline", ["gap"], 1),
    (73, "kline", ["bad-json"], 1),
    (73, "kline", ["binary"], 1),
    (73, "kline", ["no-topic"], 0),
    (73, "kline", ["unknown-topic"], 0),
    (75, "kline", ["burst"], 0),
    (76, "kline", ["disagree"], 0),
]


@dataclass(frozen=True)
class Session:
    server: SandboxServer
    faults: Faults
    follower: Follower
    store: Store


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    """A follower at work for all of these tests."""
    faults = Faults()
    store = Store(tmp_path_factory.mktemp("followed"))
    with serve(faults, SPEED) as server, following(server, store) as follower:
        eventually(lambda: follower.summary.connects >= 1)
        yield Session(server, faults, follower, store)


@pytest.mark.parametrize(
    ("moment", "names", "breaks"),
    [row[1:] for row in NAMED],
    ids=[f"{number} {moment} {names[0]}" for number, moment, names, _ in NAMED],
)
def test_the_store_is_equal_to_the_venue_after_fault(
    session: Session, moment: str, names: list[str], breaks: int
) -> None:
    said = session.follower.summary
    breaks += said.breaks
    if moment != "kline":  # met at the next connect only
        session.faults.arm("kline", "reset")
        breaks += 1
    connects = said.connects
    session.faults.arm(moment, *names)
    eventually(lambda: session.faults.spent() and said.breaks >= breaks)
    eventually(lambda: said.breaks < 1 or said.connects >= connects)
    meet(session.server, session.store, 1)
    assert said.breaks == breaks
    assert said.gaps == 0


@pytest.mark.parametrize(
    ("name", "seconds"), [("outage", 3.0), pytest.param("outage-long", 60.0, marks=pytest.mark.full)]
)
def test_an_outage_costs_few_connects_and_no_candle(session: Session, name: str, seconds: float) -> None:
    """69 kline outage: every connect of so many seconds is refused."""
    said, before = session.follower.summary, session.server.streams.connects
    broken, started = said.breaks, time.monotonic()
    session.faults.arm("kline", name)
    eventually(session.faults.spent)
    time.sleep(seconds + 0.2)
    meet(session.server, session.store, 2)
    connects, passed = session.server.streams.connects - before, time.monotonic() - started
    # A connect of ours is two tries of pybit when it fails, and then costs the gap twice.
    assert 2 <= connects <= 2 + passed / QUICK.connect_gap
    assert said.breaks >= broken + 2
    assert said.gaps == 0


# -- the feed alone -----------------------------------------------------------------------------------


class Seen:
    """The events of a feed, in order."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def of(self, kind: type) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]


CALM = replace(QUICK, silence=60.0)
"""For a clock that stands still between the steps of a test, however slow the machine is."""


@contextmanager
def watching(
    server: SandboxServer, *symbols: str, category: str = "linear", patience: Patience = QUICK
) -> Iterator[Seen]:
    seen = Seen()
    with LiveFeed(category, "1m", symbols, seen.events.append, server.base_url, patience):
        yield seen


def test_a_hint_comes_once_for_each_candle_in_order() -> None:
    with serve() as server, watching(server, "BTCUSDT", patience=CALM) as seen:
        eventually(lambda: seen.events == [Connected(1)])
        first = floor_open(NOW, "1m")
        for n in range(1, 4):
            server.clock.set(NOW + n * MINUTE_MS)
            eventually(lambda n=n: len(seen.events) == 1 + n)  # type: ignore[misc]
        assert seen.of(BarClosed) == [BarClosed("BTCUSDT", first + n * MINUTE_MS) for n in range(3)]


@pytest.mark.parametrize("fault", ["no-confirm", "two-confirms", "duplicate", "out-of-order", "late-confirm"])
def test_no_hint_is_doubled_or_lost_under_fault(fault: str) -> None:
    faults = Faults()
    faults.arm("kline", fault)
    with serve(faults) as server, watching(server, "BTCUSDT", patience=CALM) as seen:
        eventually(lambda: seen.events == [Connected(1)])
        time.sleep(0.5)
        first = floor_open(NOW, "1m")
        for n in (1, 2):
            server.clock.set(NOW + n * MINUTE_MS)
            eventually(lambda n=n: len(seen.of(BarClosed)) == n)  # type: ignore[misc]
        assert seen.of(BarClosed) == [BarClosed("BTCUSDT", first), BarClosed("BTCUSDT", first + MINUTE_MS)]


def test_one_symbol_that_the_venue_does_not_know_costs_only_itself() -> None:
    symbols = [f"NO{n}USDT" for n in range(2)] + ["BTCUSDT", "ETHUSDT", "SOLUSDT"]
    with serve() as server, watching(server, *symbols, category="spot", patience=CALM) as seen:
        eventually(lambda: Connected(1) in seen.events)
        assert sorted(event.symbol for event in seen.of(Rejected)) == ["NO0USDT", "NO1USDT"]
        assert "handler not found" in seen.of(Rejected)[0].said
        server.clock.set(NOW + MINUTE_MS)
        eventually(lambda: len(seen.of(BarClosed)) == 3)
        assert {event.symbol for event in seen.of(BarClosed)} == {"BTCUSDT", "ETHUSDT", "SOLUSDT"}


def test_a_refused_symbol_is_asked_for_again() -> None:
    faults = Faults()
    faults.arm("subscribe", "reject")
    with serve(faults) as server, watching(server, "BTCUSDT", patience=CALM) as seen:
        eventually(lambda: len(seen.of(Rejected)) == 1)

        def a_minute_passes_and_is_told() -> bool:
            server.clock.set(server.clock.now_ms() + MINUTE_MS)
            return len(seen.of(BarClosed)) > 0

        eventually(a_minute_passes_and_is_told, every_s=0.2)
        assert seen.of(Broken) == []


def test_a_silent_connection_is_given_up_and_made_again() -> None:
    with serve() as server, watching(server, "BTCUSDT") as seen:  # the clock stands: no candle ever moves
        eventually(lambda: len(seen.of(Connected)) == 3)
        assert seen.of(Stale)[:2] == [Stale("BTCUSDT")] * 2
        assert seen.of(Broken)[0].reason == "1 of 1 topics silent for 0.5 s"


def test_one_silent_symbol_does_not_cost_the_others_their_connection_twice() -> None:
    faults = Faults()
    with serve(faults, speed=60.0) as server, watching(server, "BTCUSDT", "ETHUSDT") as seen:
        eventually(lambda: Connected(1) in seen.events)
        server.streams.silent_until_ms["ETHUSDT"] = NOW * 2
        eventually(lambda: Stale("ETHUSDT") in seen.events)
        time.sleep(2.0)
        assert len(seen.of(Broken)) == 1
        assert [event.number for event in seen.of(Connected)] == [1, 2]


def test_connects_keep_their_distance_while_nobody_listens() -> None:
    with serve() as server:
        url = server.base_url
    seen = Seen()
    patience = Patience(connect_gap=0.2, longest_pause=0.8)
    with LiveFeed("linear", "1m", ["BTCUSDT"], seen.events.append, url, patience) as feed:
        time.sleep(1.5)
        assert 2 <= feed.connects <= 4  # after two tries each, so at most every 0.4 s
    assert "refused" in seen.of(Broken)[0].reason


def test_a_server_that_stalls_the_handshake_does_not_hold_the_feed() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        seen = Seen()
        patience = Patience(connect_gap=0.05, longest_pause=0.1, handshake=0.2)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with LiveFeed("linear", "1m", ["BTCUSDT"], seen.events.append, url, patience):
            eventually(lambda: len(seen.of(Broken)) >= 2)
        assert "timed out" in seen.of(Broken)[0].reason


def test_a_delta_before_its_snapshot_and_other_strange_messages_end_nothing() -> None:
    """74: pybit's own merging of tickers would raise; here it is not in the way."""
    seen = Seen()
    feed = LiveFeed("linear", "1m", ["BTCUSDT"], seen.events.append)
    strange: list[Any] = [
        {"topic": "tickers.BTCUSDT", "type": "delta", "data": {"symbol": "BTCUSDT", "lastPrice": "1"}},
        {"topic": "kline.1.BTCUSDT", "data": None},
        {"topic": "kline.1.BTCUSDT", "data": [None, {"start": "1", "confirm": True}, {}]},
        {"topic": ["kline"]},
        [1, 2],
        None,
    ]
    for message in strange:
        feed._take(message)
    assert seen.events == []
    assert feed.ignored == 7


def test_pybit_keeps_its_address_and_its_time_limit() -> None:
    before = (pybit.PUBLIC_WSS, websocket.getdefaulttimeout())
    with serve() as server, watching(server, "BTCUSDT") as seen, watching(server, "ETHUSDT") as other:
        eventually(lambda: Connected(1) in seen.events and Connected(1) in other.events)
        assert (pybit.PUBLIC_WSS, websocket.getdefaulttimeout()) == before
    assert before[0] == "wss://{SUBDOMAIN}.{DOMAIN}.com/v5/public/{CHANNEL_TYPE}"


def test_the_stream_is_found_beside_the_rest_address() -> None:
    tail = "/v5/public/{CHANNEL_TYPE}"
    assert stream_url("https://api.bybit.com") == f"wss://stream.bybit.com{tail}"
    assert stream_url("https://api-testnet.bybit.com") == f"wss://stream-testnet.bybit.com{tail}"
    assert stream_url("https://api.bytick.com") == f"wss://stream.bytick.com{tail}"
    assert stream_url("http://127.0.0.1:8899") == f"ws://127.0.0.1:8899{tail}"
