"""What the connector makes of answers of every kind, against a scripted server."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from recur.connectors.bybit import BybitConnector
from recur.connectors.windows import Window
from recur.vocabulary import (
    HOUR_MS,
    MINUTE_MS,
    Series,
    UsageError,
    VenueError,
)
from tests.scripted import (
    BTC,
    START,
    TWO_HOURS,
    Reply,
    Scripted,
    ok,
    opens,
    patient,
    row,
)


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
