"""The sandbox's WebSocket as pybit's client sees it: acks, candles, tickers, pongs and refusals."""

from __future__ import annotations

import json
import queue
import time
from collections.abc import Callable, Iterator
from typing import Any

import pybit.unified_trading as ut
import pytest
import websocket

from recur.connectors.sandbox.generated import GeneratedMarket
from recur.connectors.sandbox.server import SandboxServer, VirtualClock
from recur.connectors.sandbox.stream import Streams
from recur.vocabulary import MINUTE_MS, parse_time
from tests.following import Fault

NOW = parse_time("2025-07-02T00:02:30")
MIDNIGHT = parse_time("2025-07-02")
M5 = 5 * MINUTE_MS


@pytest.fixture
def sandbox() -> Iterator[SandboxServer]:
    world = GeneratedMarket(
        1, parse_time("2025-07-01"), parse_time("2025-07-04"), ("BTCUSDT", "ETHUSDT", "SOLUSDT")
    )
    with SandboxServer(world, VirtualClock(NOW)) as server:
        yield server


Open = Callable[..., Any]


@pytest.fixture
def pybit_socket(sandbox: SandboxServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Open]:
    """Makes pybit's own client, connected to the sandbox."""
    url = sandbox.base_url.replace("http", "ws") + "/v5/public/{CHANNEL_TYPE}"
    monkeypatch.setattr(ut, "PUBLIC_WSS", url)
    opened = []

    def open_(category: str = "linear", **more: Any) -> Any:
        opened.append(ut.WebSocket(category, testnet=False, retries=2, restart_on_error=False, **more))
        return opened[-1]

    yield open_
    for socket in opened:
        socket.exit()


class Plain:
    """A bare client, to see every frame as it comes."""

    def __init__(self, sandbox: SandboxServer, category: str) -> None:
        url = sandbox.base_url.replace("http", "ws")
        self.socket = websocket.create_connection(f"{url}/v5/public/{category}", timeout=5)

    def ask(self, **command: Any) -> dict[str, Any]:
        self.socket.send(json.dumps(command))
        return self.next()

    def next(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.socket.recv())
        return found


@pytest.fixture
def plain(sandbox: SandboxServer) -> Iterator[Callable[[str], Plain]]:
    opened: list[Plain] = []

    def open_(category: str) -> Plain:
        opened.append(Plain(sandbox, category))
        return opened[-1]

    yield open_
    for client in opened:
        client.socket.close()


def without_id(ack: dict[str, Any]) -> dict[str, Any]:
    assert len(ack["conn_id"]) == 36
    return {key: value for key, value in ack.items() if key != "conn_id"}


def test_pybit_gets_the_open_candle_and_then_each_end_of_a_candle_as_rest_tells_it(
    sandbox: SandboxServer, pybit_socket: Open
) -> None:
    frames: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    pybit_socket().kline_stream(5, ["BTCUSDT"], frames.put)
    first = frames.get(timeout=5)
    assert (first["topic"], first["type"], first["ts"]) == ("kline.5.BTCUSDT", "snapshot", NOW)
    (bar,) = first["data"]
    assert (bar["start"], bar["end"], bar["confirm"]) == (MIDNIGHT, MIDNIGHT + M5 - 1, False)
    sandbox.clock.set(MIDNIGHT + 2 * M5 + 1000)
    ends = [frames.get(timeout=5)["data"][0] for _ in range(2)]
    assert [(bar["start"] - MIDNIGHT, bar["confirm"]) for bar in ends] == [(0, True), (M5, True)]
    query = {"symbol": "BTCUSDT", "interval": "5", "start": str(MIDNIGHT), "limit": "1"}
    reply = json.loads(sandbox.endpoints.answer("/v5/market/kline", query, sandbox.clock.now_ms()))
    (row,) = reply["result"]["list"]
    names = ("start", "open", "high", "low", "close", "volume", "turnover")
    assert [str(ends[0][name]) for name in names] == row
    assert [type(ends[0][name]) for name in ("start", "end", "timestamp", "close")] == [int, int, int, str]


def test_a_subscription_is_acknowledged_after_10_ms_or_more_and_before_any_candle(
    plain: Callable[[str], Plain],
) -> None:
    client = plain("linear")
    started = time.monotonic()
    ack = client.ask(op="subscribe", req_id="7", args=["kline.5.BTCUSDT"])
    assert 0.01 <= time.monotonic() - started < 1.0
    assert without_id(ack) == {"success": True, "ret_msg": "", "op": "subscribe", "req_id": "7"}
    assert client.next()["topic"] == "kline.5.BTCUSDT"


def test_the_spot_channel_acknowledges_in_its_own_words_and_takes_ten_topics_at_most(
    plain: Callable[[str], Plain],
) -> None:
    client = plain("spot")
    ten = [f"kline.{code}.BTCUSDT" for code in ("5", "15", "30", "60", "120", "240", "360", "720", "D", "W")]
    ack = client.ask(op="subscribe", req_id="a", args=[*ten, "tickers.BTCUSDT"])
    assert without_id(ack) == {"success": False, "ret_msg": "args size >10", "op": "subscribe"}
    ack = client.ask(op="subscribe", req_id="b", args=ten)
    assert without_id(ack) == {"success": True, "ret_msg": "subscribe", "op": "subscribe", "req_id": "b"}


@pytest.mark.parametrize(
    "bad", ["kline.5.NOSUCHUSDT", "kline.7.BTCUSDT", "trades.BTCUSDT", "tickers.5.BTCUSDT"]
)
def test_one_bad_topic_refuses_the_whole_request(plain: Callable[[str], Plain], bad: str) -> None:
    client = plain("linear")
    ack = client.ask(op="subscribe", req_id="1", args=["kline.5.BTCUSDT", bad])
    assert without_id(ack) == {
        "success": False,
        "ret_msg": f"error:handler not found,topic:{bad}",
        "op": "subscribe",
        "req_id": "1",
    }
    client.socket.settimeout(0.3)
    with pytest.raises(websocket.WebSocketTimeoutException):
        client.next()


def test_pings_are_answered_in_the_forms_of_the_channel(plain: Callable[[str], Plain]) -> None:
    spot, linear = plain("spot"), plain("linear")
    assert without_id(spot.ask(op="ping")) == {"success": True, "ret_msg": "pong", "op": "ping"}
    assert linear.ask(op="ping")["ret_msg"] == "pong"
    assert linear.ask(op="ping") == {"op": "pong", "args": [str(NOW)]}


def test_pybit_keeps_its_connection_alive_with_pings_of_both_kinds(pybit_socket: Open) -> None:
    socket = pybit_socket(ping_interval=0.4, ping_timeout=0.3)
    time.sleep(1.5)
    assert socket.is_connected()
    assert socket.wst.is_alive()


def test_a_linear_ticker_comes_whole_and_then_as_what_changed_a_spot_ticker_always_whole(
    sandbox: SandboxServer, plain: Callable[[str], Plain]
) -> None:
    linear, spot = plain("linear"), plain("spot")
    for client in (linear, spot):
        client.ask(op="subscribe", args=["tickers.BTCUSDT"])
    first, first_spot = linear.next(), spot.next()
    assert (first["type"], first_spot["type"]) == ("snapshot", "snapshot")
    prices = {"lastPrice", "prevPrice24h", "price24hPcnt", "highPrice24h", "lowPrice24h"}
    assert set(first_spot["data"]) == {"symbol", "volume24h", "turnover24h"} | prices
    assert set(first["data"]) - set(first_spot["data"]) == {"markPrice", "indexPrice"}
    assert all(isinstance(value, str) and value for value in first["data"].values())
    sandbox.clock.set(NOW + 2000)
    second, second_spot = linear.next(), spot.next()
    assert (second["type"], second_spot["type"]) == ("delta", "snapshot")
    assert {"symbol", "lastPrice", "markPrice"} <= set(second["data"]) < set(first["data"])
    assert set(second_spot["data"]) == set(first_spot["data"])


def test_a_ticker_delta_may_come_before_its_snapshot(
    sandbox: SandboxServer, plain: Callable[[str], Plain]
) -> None:
    """74: the fault ``delta-first``."""

    class DeltaFirst:
        def take(self, endpoint: str, symbol: str, now_ms: int) -> Fault | None:
            return Fault("delta-first") if endpoint == "stream/tickers" else None

    sandbox.streams = Streams(sandbox.streams.world, sandbox.endpoints, sandbox.clock, DeltaFirst())
    client = plain("linear")
    client.ask(op="subscribe", args=["tickers.BTCUSDT"])
    assert client.next()["type"] == "delta"


def test_an_unsubscribed_topic_falls_silent(sandbox: SandboxServer, plain: Callable[[str], Plain]) -> None:
    client = plain("linear")
    client.ask(op="subscribe", args=["kline.5.BTCUSDT"])
    client.next()
    assert client.ask(op="unsubscribe", args=["kline.5.BTCUSDT"])["success"]
    sandbox.clock.set(NOW + M5)
    client.socket.settimeout(0.3)
    with pytest.raises(websocket.WebSocketTimeoutException):
        client.next()


def test_a_path_without_a_channel_is_no_stream(sandbox: SandboxServer) -> None:
    with pytest.raises(websocket.WebSocketBadStatusException, match="404"):
        websocket.create_connection(sandbox.base_url.replace("http", "ws") + "/v5/public/futures", timeout=5)
