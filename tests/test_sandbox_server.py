"""The sandbox's HTTP on the wire: connections, latency, compression, faults of transport, WebSocket hand-over."""

from __future__ import annotations

import gzip
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import websocket

from recur.connectors.sandbox.faults import FaultPlan, Rule
from recur.connectors.sandbox.generated import GeneratedMarket
from recur.connectors.sandbox.server import SandboxServer, VirtualClock
from recur.vocabulary import DAY_MS, parse_time

T0 = parse_time("2025-01-01")
KLINE = "/v5/market/kline?category=linear&symbol=BTCUSDT&interval=60&limit=50"
TIME = "/v5/market/time"


@pytest.fixture(scope="module")
def market() -> GeneratedMarket:
    return GeneratedMarket(5, T0, T0 + 20 * DAY_MS, ["BTCUSDT"], base_interval="1h")


@pytest.fixture
def serve(market: GeneratedMarket) -> Iterator[Callable[..., SandboxServer]]:
    running: list[SandboxServer] = []

    def start(*rules: Rule, **options: float | bool) -> SandboxServer:
        server = SandboxServer(market, VirtualClock(T0 + 9 * DAY_MS), faults=FaultPlan(rules), **options)  # type: ignore[arg-type]
        server.start()
        running.append(server)
        return server

    yield start
    for server in running:
        server.stop()


def connect(server: SandboxServer, timeout: float = 5.0) -> http.client.HTTPConnection:
    return http.client.HTTPConnection(server.base_url.removeprefix("http://"), timeout=timeout)


def ask(connection: http.client.HTTPConnection, path: str = TIME, **headers: str) -> tuple[int, bytes]:
    connection.request("GET", path, headers=headers)
    reply = connection.getresponse()
    return reply.status, reply.read()


def test_latency_delays_a_reply_and_no_other_connection(serve: Callable[..., SandboxServer]) -> None:
    server = serve(latency_s=0.2)
    connections = [connect(server) for _ in range(8)]
    began = time.monotonic()
    for connection in connections:
        connection.request("GET", TIME)
    for connection in connections:
        assert connection.getresponse().read()
        connection.close()
    assert 0.2 <= time.monotonic() - began < 0.8  # one after the other: 1.6


def test_a_late_reply_of_one_leaves_the_others_alone(serve: Callable[..., SandboxServer]) -> None:
    server = serve(Rule("latency-spike", KLINE.partition("?")[0], options={"seconds": 30.0}))
    slow, quick = connect(server), connect(server)
    slow.request("GET", KLINE)
    began = time.monotonic()
    assert ask(quick)[0] == 200 and time.monotonic() - began < 2
    began = time.monotonic()
    server.stop()
    assert time.monotonic() - began < 2  # a stop ends every wait
    slow.close()
    quick.close()


def test_a_reply_is_compressed_only_where_that_is_on_and_accepted(
    serve: Callable[..., SandboxServer],
) -> None:
    plain, packing = connect(serve()), connect(serve(compress=True))
    _, body = ask(plain, KLINE, **{"Accept-Encoding": "gzip, deflate"})
    assert json.loads(body)["retCode"] == 0
    packing.request("GET", KLINE, headers={"Accept-Encoding": "gzip, deflate"})
    reply = packing.getresponse()
    packed = reply.read()
    assert reply.headers["Content-Encoding"] == "gzip" and len(packed) < len(body) / 2
    assert gzip.decompress(packed) == body == ask(packing, KLINE)[1]
    plain.close()
    packing.close()


def test_a_connection_is_kept_until_the_client_asks_to_close_it(serve: Callable[..., SandboxServer]) -> None:
    server = serve()
    connection = connect(server)
    for _ in range(3):
        assert ask(connection)[0] == 200
    connection.request("GET", TIME, headers={"Connection": "close"})
    reply = connection.getresponse()
    assert reply.read()
    assert connection.sock is None or connection.sock.recv(1) == b""
    assert (server.connections, server.requests[TIME]) == (1, 4)
    connection.close()


def test_what_is_no_http_ends_its_own_connection_only(serve: Callable[..., SandboxServer]) -> None:
    server = serve()
    address = ("127.0.0.1", int(server.base_url.rpartition(":")[2]))
    with socket.create_connection(address, 5) as raw:
        raw.sendall(b"\x16\x03\x01 hello\r\n\r\n")
        assert raw.recv(10) == b""
    connection = connect(server)
    assert ask(connection)[0] == 200
    connection.close()


def test_many_connections_ask_for_many_pages_at_once(serve: Callable[..., SandboxServer]) -> None:
    server = serve()
    first = connect(server)
    expected = json.loads(ask(first, KLINE)[1])["result"]
    first.close()
    answers: list[object] = []

    def work() -> None:
        connection = connect(server)
        for _ in range(25):
            answers.append(json.loads(ask(connection, KLINE)[1])["result"])
        connection.close()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 200 and all(answer == expected for answer in answers)
    assert server.requests["/v5/market/kline"] == 201


def test_a_websocket_is_taken_on_the_same_port_with_faults_of_the_same_plan(
    serve: Callable[..., SandboxServer],
) -> None:
    server = serve(Rule("handshake-503", count=1))
    address = server.base_url.replace("http://", "ws://") + "/v5/public/linear"
    with pytest.raises(websocket.WebSocketBadStatusException, match="503"):
        websocket.create_connection(address, timeout=5)
    talk = websocket.create_connection(address, timeout=5)
    talk.send(json.dumps({"op": "ping", "req_id": "7"}))
    answer = json.loads(talk.recv())
    assert (answer["success"], answer["ret_msg"], answer["req_id"]) == (True, "pong", "7")
    talk.close()
    assert server.fault_counts == {"handshake-503": 1} and server.streams.connects == 2


# -- faults of transport, as a client without any cleverness sees them -----------------------------------------------


def seen(server: SandboxServer, timeout: float = 0.3) -> type[BaseException] | None:
    """What a plain client meets on a new connection; None when all is well."""
    connection = connect(server, timeout)
    try:
        ask(connection, KLINE)
    except (OSError, http.client.HTTPException) as error:
        return type(error)
    finally:
        connection.close()
    return None


@pytest.mark.parametrize(
    ("fault", "options", "error"),
    [
        ("accept-reset", {}, ConnectionResetError),
        ("close-before-headers", {}, http.client.RemoteDisconnected),
        ("reset-before-headers", {}, ConnectionResetError),
        ("silence-after-headers", {}, TimeoutError),
        ("latency-spike", {"seconds": 5.0}, TimeoutError),
        ("content-length-too-long", {}, http.client.IncompleteRead),
        ("broken-chunked", {}, http.client.IncompleteRead),
    ],
)  # fmt: skip
def test_a_fault_of_transport_looks_on_the_wire_as_it_should(
    serve: Callable[..., SandboxServer], fault: str, options: dict[str, float], error: type[Exception]
) -> None:
    server = serve(Rule(fault, count=1, options=options))
    assert seen(server) is error
    assert seen(server) is None
    assert server.fault_counts == {fault: 1}


@pytest.mark.parametrize(
    ("fault", "error"), [("connect-refused", ConnectionRefusedError), ("connect-stall", TimeoutError)]
)
def test_a_venue_that_is_away_refuses_connections_or_leaves_them_waiting(
    serve: Callable[..., SandboxServer], fault: str, error: type[Exception]
) -> None:
    server = serve(Rule(fault, count=1, options={"seconds": 1.0}))
    assert seen(server) is http.client.RemoteDisconnected
    assert seen(server) is error
    time.sleep(1.0)
    assert seen(server, 2.0) is None


def test_a_drip_takes_longer_than_any_single_read_may(serve: Callable[..., SandboxServer]) -> None:
    server = serve(Rule("drip", options={"seconds": 0.6}))
    connection = connect(server, timeout=0.3)
    began = time.monotonic()
    status, body = ask(connection, KLINE)
    assert status == 200 and json.loads(body)["retCode"] == 0 and time.monotonic() - began >= 0.5
    connection.close()


def test_a_ban_lasts_until_nobody_asked_for_its_time(serve: Callable[..., SandboxServer]) -> None:
    server = serve(Rule("ip-ban", count=1, options={"seconds": 0.4}))
    connection = connect(server)
    replies = []
    for wait_s in (0.0, 0.2, 0.3, 0.6):
        time.sleep(wait_s)
        replies.append(ask(connection))
    assert [status for status, _ in replies] == [403, 403, 403, 200]
    assert replies[0][1] == b"access too frequent"
    connection.close()
