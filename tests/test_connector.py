"""The connector over real pybit: against the sandbox for answers, against a scripted server for failures."""

from __future__ import annotations

import gzip
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import polars as pl
import pytest

from recur.connectors.bybit import BybitConnector
from recur.connectors.sandbox.generated import GeneratedMarket
from recur.connectors.sandbox.server import SandboxServer, VirtualClock
from recur.connectors.windows import Window
from recur.vocabulary import (
    HOUR_MS,
    MINUTE_MS,
    Series,
    UsageError,
    VenueBanned,
    VenueError,
    VenueForbidden,
    VenueRefused,
    VenueUnreachable,
    parse_time,
)

START = parse_time("2025-07-01")
NOW = parse_time("2025-08-30T12:34")
BTC = Series("linear", "BTCUSDT", "1h")
TWO_HOURS = Window(BTC, START, START + 2 * HOUR_MS, 2)


@pytest.fixture(scope="module")
def sandbox() -> Iterator[SandboxServer]:
    world = GeneratedMarket(3, START, parse_time("2025-09-01"), symbols=("BTCUSDT", "ETHUSDT"))
    with SandboxServer(world, VirtualClock(NOW)) as server:
        yield server


def opens(frame: pl.DataFrame) -> list[int]:
    return frame["open_time"].dt.epoch("ms").to_list()


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

Reply = tuple[int, str, dict[str, str]]


class Scripted:
    """A server that gives ``replies`` in turn and then the last one for ever."""

    def __init__(self, replies: list[Reply]) -> None:
        self.replies = replies
        self.asked = 0
        self.paths: list[str] = []
        script = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                status, body, headers = script.replies[min(script.asked, len(script.replies) - 1)]
                script.asked += 1
                script.paths.append(self.path)
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body.encode())

            def log_message(self, *_: Any) -> None:
                """Say nothing."""

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.base_url = f"http://127.0.0.1:{self._http.server_address[1]}"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,))
        self._thread.start()

    def stop(self) -> None:
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()


@pytest.fixture
def scripted() -> Iterator[Callable[..., Scripted]]:
    servers: list[Scripted] = []

    def start(*replies: Reply) -> Scripted:
        servers.append(Scripted(list(replies)))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


class Clock:
    """Seconds that pass only by sleeping."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def patient(base_url: str, **options: Any) -> tuple[BybitConnector, Clock]:
    """A connector whose waits take no time, and the clock that counts them."""
    clock = Clock()
    return BybitConnector(base_url, clock=clock, sleep=clock.sleep, **options), clock


def ok(result: object, **extra: object) -> Reply:
    return 200, json.dumps({"retCode": 0, "retMsg": "", "result": result, "time": NOW, **extra}), {}


def code(number: object, text: str = "no") -> Reply:
    return 200, json.dumps({"retCode": number, "retMsg": text, "result": {}, "time": NOW}), {}


def row(hour: int, *values: str) -> list[str]:
    return [str(START + hour * HOUR_MS), *(values or ("10", "12", "9", "11", "5", "55"))]


GOOD = ok({"category": "linear", "symbol": "BTCUSDT", "list": [row(1), row(0)]})
HTML = "<html><body>The distribution is configured to block access from your country.</body></html>"


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


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ("NaN", "is not a number"),
        ("1,5", "float"),
        ("inf", "is not a number"),
        (" 1", "float"),
        (1, "is not text"),
    ],
)
def test_a_value_that_is_no_number_is_refused(
    scripted: Callable[..., Scripted], value: object, why: str
) -> None:
    bad = [str(START), "10", "12", "9", "11", value, "55"]
    connector, _ = patient(scripted(ok({"list": [bad, bad[:5]]})).base_url, attempts=1)
    with pytest.raises(VenueError, match=f"candles cannot be read .*{why}"):
        connector.candles(TWO_HOURS)


def test_further_columns_are_news_to_us_and_ignored(scripted: Callable[..., Scripted]) -> None:
    server = scripted(ok({"list": [[*row(0), "7"]], "news": 1}))
    assert opens(patient(server.base_url)[0].candles(TWO_HOURS)) == [START]


def test_absent_values_become_null(scripted: Callable[..., Scripted]) -> None:
    server = scripted(ok({"list": [row(0, "10", "12", "9", "11", "5", "")]}))
    frame = patient(server.base_url)[0].candles(Window(BTC, START, START + HOUR_MS, 1))
    assert frame.row(0)[5:] == (10.0, 12.0, 9.0, 11.0, 5.0, None)


def test_instruments_follow_the_cursor_until_it_repeats(scripted: Callable[..., Scripted]) -> None:
    server = scripted(
        ok({"list": [{"symbol": "A"}], "nextPageCursor": "first%3DA"}),
        ok({"list": [{"symbol": "B"}], "nextPageCursor": "first%3DB"}),
        ok({"list": [{"symbol": "C"}], "nextPageCursor": "first%3DB"}),
    )
    found = patient(server.base_url)[0].instruments("linear")
    assert [row["symbol"] for row in found] == ["A", "B", "C"]


def test_instruments_become_a_frame_with_times_numbers_and_turnover(
    scripted: Callable[..., Scripted],
) -> None:
    btc = {
        "symbol": "BTCUSDT", "contractType": "LinearPerpetual", "status": "Trading", "baseCoin": "BTC",
        "quoteCoin": "USDT", "settleCoin": "USDT", "launchTime": "1585526400000", "deliveryTime": "0",
        "fundingInterval": 480, "priceFilter": {"tickSize": "0.10"}, "lotSizeFilter": {"qtyStep": "0.001"},
        "somethingNew": {"a": 1},
    }  # fmt: skip
    gone = {"symbol": "AAVEUSDT", "status": "Closed", "launchTime": "", "deliveryTime": "1700000000000"}
    server = scripted(
        ok({"list": [btc]}), ok({"list": []}), ok({"list": []}), ok({"list": [gone]}),
        ok({"list": [{"symbol": "BTCUSDT", "turnover24h": "5000.5"}, {"symbol": "X", "turnover24h": ""}]}),
    )  # fmt: skip
    frame = patient(server.base_url)[0].all_instruments("linear")
    assert frame["launch_time"].dt.epoch("ms").to_list() == [None, 1585526400000]
    assert frame["delivery_time"].dt.epoch("ms").to_list() == [1700000000000, None]
    assert frame.drop("launch_time", "delivery_time").rows() == [
        ("linear", "AAVEUSDT", "Closed", *[None] * 8),
        ("linear", "BTCUSDT", "Trading", "LinearPerpetual", "BTC", "USDT", "USDT", 480, 0.1, 0.001, 5000.5),
    ]


def points_reply(*rows: dict[str, str]) -> Reply:
    return ok({"category": "linear", "symbol": "BTCUSDT", "list": list(rows)})


def interest(hour: int, value: str = "5.5") -> dict[str, str]:
    return {"openInterest": value, "singleOpenInterest": "2", "timestamp": str(START + hour * HOUR_MS)}


INTEREST = Series("linear", "BTCUSDT", "1h", "open_interest")


def test_points_are_paged_backward_by_their_end_until_nothing_comes(
    scripted: Callable[..., Scripted],
) -> None:
    server = scripted(
        points_reply(interest(5), interest(4), interest(4)), points_reply(interest(1)), points_reply()
    )
    frame = patient(server.base_url)[0].points(INTEREST, START, START + 6 * HOUR_MS)
    assert frame["ts"].dt.epoch("ms").to_list() == [START + hour * HOUR_MS for hour in (1, 4, 5)]
    assert frame.columns == ["category", "symbol", "interval", "ts", "open_interest"]
    assert frame.row(0)[:3] == ("linear", "BTCUSDT", "1h")
    assert server.asked == 3
    assert [path.partition("?")[2] for path in server.paths] == [
        f"category=linear&endTime={START + end * HOUR_MS - 1}&intervalTime=1h&limit=200"
        f"&startTime={START}&symbol=BTCUSDT"
        for end in (6, 4, 1)
    ]


def test_a_full_window_of_points_takes_one_request(scripted: Callable[..., Scripted]) -> None:
    server = scripted(points_reply(interest(1), interest(0)))
    assert patient(server.base_url)[0].points(INTEREST, START, START + 2 * HOUR_MS).height == 2
    assert server.asked == 1


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        ([interest(9)], "outside the range"),
        ([interest(0), interest(0, "6")], "two things about one instant"),
        ([interest(0, "-1")], "an impossible open_interest"),
        ([interest(0, "")], "a value is empty"),
        ([{"openInterest": "1", "timestamp": str(START + 1)}], "is not on its grid"),
        ([{"timestamp": str(START)}], "cannot be read"),
        ([{"openInterest": "1", "timestamp": "soon"}], "cannot be read"),
    ],
    ids=["outside", "two values", "negative", "empty", "off the grid", "no value", "no time"],
)
def test_points_that_cannot_be_are_refused(
    scripted: Callable[..., Scripted], rows: list[dict[str, str]], why: str
) -> None:
    connector, _ = patient(scripted(points_reply(*rows)).base_url, attempts=1)
    with pytest.raises(VenueError, match=why):
        connector.points(INTEREST, START, START + 2 * HOUR_MS)


def test_the_long_short_ratio_has_two_fractions(scripted: Callable[..., Scripted]) -> None:
    rows = {"symbol": "BTCUSDT", "buyRatio": "0.52", "sellRatio": "0.48", "timestamp": str(START)}
    server = scripted(points_reply(rows))
    series = Series("linear", "BTCUSDT", "4h", "long_short")
    frame = patient(server.base_url)[0].points(series, START, START + 4 * HOUR_MS)
    assert frame.select("buy_ratio", "sell_ratio").rows() == [(0.52, 0.48)]
    assert "period=4h" in server.paths[0] and "limit=500" in server.paths[0]


def test_maintenance_windows_without_both_times_are_left_out(scripted: Callable[..., Scripted]) -> None:
    listed = [{"begin": "1000", "end": "2000"}, {"begin": 3000, "end": 4000}, {"begin": "5"}, {"end": "x"}]
    assert patient(scripted(ok({"list": listed})).base_url)[0].maintenance() == [(1000, 2000), (3000, 4000)]


def test_the_drift_is_the_venue_s_clock_less_ours(scripted: Callable[..., Scripted]) -> None:
    ahead_ms = int(time.time() * 1000) + 90_000
    server_ms, drift_ms = patient(scripted(ok({}, time=ahead_ms)).base_url)[0].read_clock()
    assert server_ms == ahead_ms
    assert 85_000 < drift_ms <= 90_000


def test_a_base_url_needs_a_scheme() -> None:
    with pytest.raises(UsageError, match="'localhost:8000' is not a base URL"):
        BybitConnector("localhost:8000")


def test_a_minute_has_passed_only_by_the_venue_s_clock(scripted: Callable[..., Scripted]) -> None:
    minute = Series("linear", "BTCUSDT", "1m")
    rows = [[str(START + i * MINUTE_MS), "1", "1", "1", "1", "0", "0"] for i in (1, 0)]
    server = scripted(
        ok({"list": rows}, time=START + 2 * MINUTE_MS - 1), ok({"list": rows}, time=START + 2 * MINUTE_MS)
    )
    connector, _ = patient(server.base_url)
    window = Window(minute, START, START + 2 * MINUTE_MS, 2)
    assert opens(connector.candles(window)) == [START]
    assert opens(connector.candles(window)) == [START, START + MINUTE_MS]
