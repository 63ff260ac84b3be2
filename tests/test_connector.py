"""The connector over real pybit: against the sandbox for answers, against a scripted server for failures."""

from __future__ import annotations

import gzip
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator

import polars as pl
import pytest

from recur.connectors.bybit import BybitConnector
from recur.connectors.sandbox.generated import GeneratedMarket
from recur.connectors.sandbox.server import SandboxServer, VirtualClock
from recur.connectors.windows import Window
from recur.vocabulary import (
    HOUR_MS,
    Series,
    VenueBanned,
    VenueError,
    VenueForbidden,
    VenueRefused,
    VenueUnreachable,
    parse_time,
)
from tests.scripted import (
    BTC,
    GOOD,
    HTML,
    NOW,
    START,
    TWO_HOURS,
    Reply,
    Scripted,
    code,
    ok,
    opens,
    patient,
    row,
)


@pytest.fixture(scope="module")
def sandbox() -> Iterator[SandboxServer]:
    world = GeneratedMarket(3, START, parse_time("2025-09-01"), symbols=("BTCUSDT", "ETHUSDT"))
    with SandboxServer(world, VirtualClock(NOW)) as server:
        yield server


# -- answers ------------------------------------------------------------------------------------------


def test_candles_equal_the_world_to_the_last_bit(sandbox: SandboxServer) -> None:
    frame = BybitConnector(sandbox.base_url).candles(Window(BTC, START, START + 1000 * HOUR_MS, 1000))
    world = GeneratedMarket(3, START, parse_time("2025-09-01"), symbols=("BTCUSDT", "ETHUSDT"))
    truth = world.candles("linear", "BTCUSDT", "trade", "1h")[:1000]
    assert opens(frame) == list(range(START, START + 1000 * HOUR_MS, HOUR_MS))
    for name in ("open", "high", "low", "close", "volume", "turnover"):
        assert frame[name].to_list() == getattr(truth, name).tolist()
    assert frame.row(0)[:4] == ("linear", "BTCUSDT", "1h", "trade")
    assert frame.schema["open_time"] == pl.Datetime("ms", "UTC")


def test_the_open_candle_never_comes_out(sandbox: SandboxServer) -> None:
    noon = parse_time("2025-08-30T12:00")
    frame = BybitConnector(sandbox.base_url).candles(Window(BTC, noon - 2 * HOUR_MS, noon + HOUR_MS, 3))
    assert opens(frame) == [noon - 2 * HOUR_MS, noon - HOUR_MS]


@pytest.mark.parametrize("kind", ["mark", "index", "premium"])
def test_price_candles_have_no_volume(sandbox: SandboxServer, kind: str) -> None:
    series = Series("linear", "BTCUSDT", "1h", kind)
    frame = BybitConnector(sandbox.base_url).candles(Window(series, START, START + 24 * HOUR_MS, 24))
    assert frame.height == 24
    assert frame["kind"].unique().to_list() == [kind]
    assert frame["volume"].null_count() == frame["turnover"].null_count() == 24


def test_months_and_weeks_open_on_the_calendar(sandbox: SandboxServer) -> None:
    connector = BybitConnector(sandbox.base_url)
    july, august = parse_time("2025-07-01"), parse_time("2025-08-01")
    month = Window(Series("linear", "BTCUSDT", "1M"), july, parse_time("2025-09-01"), 2)
    assert opens(connector.candles(month)) == [july]
    week = Window(Series("linear", "BTCUSDT", "1w"), parse_time("2025-07-07"), august, 4)
    assert opens(connector.candles(week)) == [
        parse_time(f"2025-07-{day}") for day in ("07", "14", "21", "28")
    ]


def test_the_clock_and_the_first_bar_are_the_venue_s(sandbox: SandboxServer) -> None:
    connector = BybitConnector(sandbox.base_url)
    assert connector.server_time_ms() == NOW
    assert connector.first_open(BTC) == START
    assert connector.requests == 2


def test_funding_is_paged_backward_without_holes_or_doubles(sandbox: SandboxServer) -> None:
    connector = BybitConnector(sandbox.base_url)
    frame = connector.funding("linear", "BTCUSDT", START, NOW)
    times = frame["funding_time"].dt.epoch("ms").to_list()
    assert times == list(range(times[0], NOW, 8 * HOUR_MS))
    assert times[0] <= START + 8 * HOUR_MS
    part = connector.funding("linear", "BTCUSDT", START + 24 * HOUR_MS, START + 48 * HOUR_MS)
    assert part["funding_time"].dt.epoch("ms").to_list() == [START + h * HOUR_MS for h in (24, 32, 40)]
    assert part["rate"].is_finite().all()


def test_an_unknown_symbol_is_refused_with_a_suggestion(sandbox: SandboxServer) -> None:
    connector = BybitConnector(sandbox.base_url)
    connector.check_symbols("linear", ["BTCUSDT", "ETHUSDT"])
    with pytest.raises(
        VenueRefused, match=r"no symbol 'BTCUSD' in category 'linear'. Did you mean 'BTCUSDT'\?"
    ):
        connector.check_symbols("linear", ["ETHUSDT", "BTCUSD"])


def test_many_threads_share_as_few_connections_as_there_are_requests_at_once(sandbox: SandboxServer) -> None:
    connector = BybitConnector(sandbox.base_url)
    before = sandbox.connections
    threads = [
        threading.Thread(target=lambda: [connector.candles(TWO_HOURS) for _ in range(5)]) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert connector.requests == 20
    assert sandbox.connections - before <= 4


def test_pybit_adds_no_log_handler_and_prints_nothing(
    sandbox: SandboxServer, capfd: pytest.CaptureFixture[str]
) -> None:
    root_handlers = logging.root.handlers[:]
    logging.root.handlers.clear()  # pybit installs its handler only then
    try:
        BybitConnector(sandbox.base_url).server_time_ms()
        with pytest.raises(VenueRefused):
            BybitConnector(sandbox.base_url).first_open(Series("linear", "NONE", "1h"))
    finally:
        logging.root.handlers[:] = root_handlers
    assert logging.getLogger("pybit._http_manager").handlers == []
    assert capfd.readouterr() == ("", "")


# -- failures -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "reply",
    [
        (429, "slow down", {}),
        (500, "oops", {}),
        (503, "", {}),
        (504, "<html>gateway</html>", {}),
        code(10006, "Too many visits!"),
        code(10000),
        code(10016),
        code(-1),
        (200, GOOD[1][:40], {}),
        (200, "", {}),
        (200, "<html>maintenance</html>", {}),
        (200, "null", {}),
        (200, "[]", {}),
        (200, "{}", {}),
        (200, '{"retCode": 7}', {}),
        code(None),
        code("0"),
        (200, GOOD[1], {"Content-Length": "9999"}),
        ok(None),
        ok([]),
        ok({"list": None}),
        ok({"list": [["1"]]}),
        ok({"list": [row(0, "10", "12", "9", "x", "5", "55")]}),
        ok({"symbol": "ETHUSDT", "list": [row(0)]}),
        ok({"list": [row(5)]}),
        ok({"list": [row(0), row(0)]}),
        ok({"list": [row(0, "10", "8", "9", "11", "5", "55")]}),
        ok({"list": [row(0)]}, time="soon"),
    ],
    ids=lambda reply: f"{reply[0]} {reply[1][:60]}",
)
def test_a_passing_failure_is_asked_again(scripted: Callable[..., Scripted], reply: Reply) -> None:
    server = scripted(reply, reply, GOOD)
    connector, _ = patient(server.base_url, timeout_s=0.5)
    assert opens(connector.candles(TWO_HOURS)) == [START, START + HOUR_MS]
    assert server.asked == connector.requests == 3


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        ((502, "bad gateway", {}), VenueUnreachable),
        (code(10006, "Too many visits!"), VenueUnreachable),
        ((200, "not json", {}), VenueError),
        (ok({"list": [row(5)]}), VenueError),
    ],
    ids=["502", "10006", "not json", "wrong row"],
)
def test_a_lasting_failure_is_raised_after_the_attempts(
    scripted: Callable[..., Scripted], reply: Reply, error: type[VenueError]
) -> None:
    server = scripted(reply)
    connector, _ = patient(server.base_url, attempts=4)
    with pytest.raises(VenueError, match="gave up after 4 attempts") as raised:
        connector.candles(TWO_HOURS)
    assert type(raised.value) is error
    assert raised.value.exit_code == 1
    assert "\n" not in raised.value.message
    assert server.asked == 4


@pytest.mark.parametrize(
    ("reply", "error", "ret_code"),
    [
        (code(10001, "Invalid period!"), VenueRefused, 10001),
        (code(10017), VenueRefused, 10017),
        (code(3100198), VenueRefused, 3100198),
        ((404, "404 page not found", {}), VenueRefused, 404),
        ((403, "access too frequent", {}), VenueBanned, None),
        (code(10018), VenueBanned, None),
        ((403, HTML, {}), VenueForbidden, None),
        ((200, HTML, {}), VenueForbidden, None),
        (code(10024), VenueForbidden, None),
    ],
    ids=lambda value: f"{value[0]} {value[1][:40]}" if isinstance(value, tuple) else "",
)
def test_a_final_answer_is_not_asked_again(
    scripted: Callable[..., Scripted], reply: Reply, error: type[VenueError], ret_code: int | None
) -> None:
    server = scripted(reply, GOOD)
    connector, _ = patient(server.base_url)
    with pytest.raises(error) as raised:
        connector.candles(TWO_HOURS)
    assert server.asked == 1
    assert getattr(raised.value, "ret_code", None) == ret_code
    assert raised.value.hint


def test_after_a_ban_nothing_is_sent_for_ten_minutes(scripted: Callable[..., Scripted]) -> None:
    server = scripted((403, "access too frequent", {}), GOOD)
    connector, clock = patient(server.base_url)
    with pytest.raises(VenueBanned, match=r"HTTP status 403; banned until 1970-01-01T00:10:00Z\.$"):
        connector.candles(TWO_HOURS)
    for _ in range(2):
        with pytest.raises(VenueBanned, match=r"banned this address until 1970-01-01T00:10:00Z; nothing was"):
            connector.candles(TWO_HOURS)
    assert server.asked == 1
    clock.now += 600.0
    assert connector.candles(TWO_HOURS).height == 2


def test_a_ban_can_be_waited_out_and_is_told_once(
    scripted: Callable[..., Scripted], caplog: pytest.LogCaptureFixture
) -> None:
    server = scripted((403, "access too frequent", {}), (403, "access too frequent", {}), GOOD)
    connector, clock = patient(server.base_url, wait_ban=True, attempts=1)
    assert connector.candles(TWO_HOURS).height == 2
    assert server.asked == 3
    assert 1200.0 < clock.now < 1210.0
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert said == ["the venue has banned this address; waiting 600 s for the end of the ban"] * 2


@pytest.mark.parametrize(
    ("header", "waited"),
    [
        ({}, 1.0),
        ({"X-Bapi-Limit-Reset-Timestamp": str(NOW + 3000), "Timenow": str(NOW)}, 3.0),
        ({"X-Bapi-Limit-Reset-Timestamp": str(NOW - 5), "Timenow": str(NOW)}, 1.0),
        ({"X-Bapi-Limit-Reset-Timestamp": "soon", "Timenow": str(NOW)}, 1.0),
        ({"X-Bapi-Limit-Reset-Timestamp": str(NOW + 10**9), "Timenow": str(NOW)}, 1.0),
    ],
    ids=["absent", "in 3 s", "past", "garbage", "far future"],
)
def test_too_many_visits_waits_for_a_sane_reset(
    scripted: Callable[..., Scripted], header: dict[str, str], waited: float
) -> None:
    status, body, _ = code(10006, "Too many visits!")
    connector, clock = patient(scripted((status, body, header), GOOD).base_url)
    connector.candles(TWO_HOURS)
    assert waited <= clock.now <= waited + 0.3


@pytest.mark.parametrize(("left", "waited"), [("0", 2.0), ("7", 0.0), ("none", 0.0)])
def test_a_quota_that_is_used_up_holds_the_next_request_back(
    scripted: Callable[..., Scripted], left: str, waited: float
) -> None:
    headers = {
        "X-Bapi-Limit-Status": left,
        "X-Bapi-Limit-Reset-Timestamp": str(NOW + 2000),
        "Timenow": str(NOW),
    }
    connector, clock = patient(scripted((200, GOOD[1], headers)).base_url)
    connector.candles(TWO_HOURS)
    assert clock.now == 0.0
    connector.candles(TWO_HOURS)
    assert clock.now == waited


def test_nobody_listening_is_unreachable_and_says_where() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    connector, clock = patient(f"http://127.0.0.1:{port}", attempts=3)
    with pytest.raises(
        VenueUnreachable, match=rf"no answer from http://127.0.0.1:{port} \(connection refused\)"
    ):
        connector.server_time_ms()
    assert 0.3 < clock.now < 0.8


def test_silence_ends_with_the_time_out() -> None:
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        connector, _ = patient(f"http://127.0.0.1:{deaf.getsockname()[1]}", attempts=2, timeout_s=0.1)
        with pytest.raises(VenueUnreachable, match="timed out"):
            connector.server_time_ms()


def test_the_deadline_ends_the_attempts_of_one_request(scripted: Callable[..., Scripted]) -> None:
    server = scripted((500, "", {}))
    connector, clock = patient(server.base_url, attempts=1000, deadline_s=60.0)
    with pytest.raises(VenueUnreachable):
        connector.server_time_ms()
    assert 45.0 < clock.now <= 60.0


def test_stop_wakes_a_waiting_call(scripted: Callable[..., Scripted]) -> None:
    connector = BybitConnector(scripted((500, "", {})).base_url, attempts=1000)
    threading.Timer(0.1, connector.stop).start()
    with pytest.raises(VenueUnreachable, match="stopped"):
        connector.server_time_ms()


def test_a_body_that_drips_ends_with_a_time_out_of_its_own() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        ended = threading.Event()

        def drip() -> None:
            with listener.accept()[0] as client:
                client.recv(4096)
                client.sendall(
                    b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 9999\r\n\r\n"
                )
                while not ended.wait(0.05):
                    try:
                        client.sendall(b" ")
                    except OSError:
                        return

        thread = threading.Thread(target=drip)
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        started = time.monotonic()
        with pytest.raises(VenueUnreachable, match="timed out"):
            BybitConnector(url, attempts=1, timeout_s=0.2).server_time_ms()
        assert 0.5 < time.monotonic() - started < 2.0
        ended.set()
        thread.join()


def test_a_zipped_answer_is_read(scripted: Callable[..., Scripted]) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        body = gzip.compress(GOOD[1].encode())

        def answer() -> None:
            with listener.accept()[0] as client:
                client.recv(4096)
                head = f"Content-Encoding: gzip\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
                client.sendall(b"HTTP/1.1 200 OK\r\n" + head.encode() + body)

        thread = threading.Thread(target=answer)
        thread.start()
        connector = BybitConnector(f"http://127.0.0.1:{listener.getsockname()[1]}")
        assert connector.candles(TWO_HOURS).height == 2
        thread.join()
