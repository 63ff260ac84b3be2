"""The sandbox's rules for positions, listings and notices, asked by the real pybit client."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import polars as pl
import pytest
from pybit.exceptions import InvalidRequestError
from pybit.unified_trading import HTTP

from recur.connectors.sandbox.endpoints import Endpoints
from recur.connectors.sandbox.generated import GeneratedMarket, extra_lives
from recur.connectors.sandbox.replay import ReplayMarket
from recur.connectors.sandbox.server import SandboxServer, VirtualClock
from recur.connectors.sandbox.world import DELIVERY_MS, Life, Maintenance
from recur.vocabulary import DAY_MS, HOUR_MS, MINUTE_MS, parse_time

T0 = parse_time("2025-01-01")
NOW = T0 + 40 * DAY_MS + 7 * MINUTE_MS
LIVES = extra_lives(T0, T0 + 60 * DAY_MS)  # GONE delisted after 20 days, NEW listed after 30, SOON after all
PAUSE = Maintenance(T0 + 10 * DAY_MS, T0 + 10 * DAY_MS + 3 * HOUR_MS)
LATER = Maintenance(T0 + 41 * DAY_MS, T0 + 41 * DAY_MS + HOUR_MS)
NAMES = ["BTCUSDT", "GONEUSDT", "NEWUSDT", "SOONUSDT", *(f"C{n:03}USDT" for n in range(600))]

logging.getLogger().addHandler(logging.NullHandler())  # else each pybit client adds a handler of its own


@pytest.fixture(scope="module")
def market() -> GeneratedMarket:
    return GeneratedMarket(
        5, T0, T0 + 60 * DAY_MS, NAMES, base_interval="5m", lives=LIVES, maintenance=(LATER, PAUSE)
    )


@pytest.fixture(scope="module")
def server(market: GeneratedMarket) -> Iterator[SandboxServer]:
    with SandboxServer(market, VirtualClock(NOW)) as running:
        yield running


@pytest.fixture
def client(server: SandboxServer) -> Iterator[HTTP]:
    server.clock.set(NOW)
    made = HTTP(max_retries=1)
    made.endpoint = server.base_url
    yield made
    made.client.close()


BTC: dict[str, Any] = {"category": "linear", "symbol": "BTCUSDT"}


def minutes(rows: list[dict[str, Any]]) -> list[int]:
    """Minutes before NOW's last five-minute mark."""
    return [(NOW - 2 * MINUTE_MS - int(row["timestamp"])) // MINUTE_MS for row in rows]


# -- open interest and ratio --------------------------------------------------------------------------------------


def test_open_interest_comes_newest_first_fifty_a_page_and_ignores_a_lone_start(client: HTTP) -> None:
    ask = client.get_open_interest
    plain = ask(**BTC, intervalTime="5min")["result"]
    assert minutes(plain["list"]) == list(range(0, 250, 5))
    assert set(plain["list"][0]) == {"openInterest", "singleOpenInterest", "timestamp"}
    row = plain["list"][0]
    assert float(row["singleOpenInterest"]) == pytest.approx(float(row["openInterest"]) / 2, abs=1e-3)
    alone = ask(**BTC, intervalTime="5min", startTime=T0)["result"]
    assert alone == plain
    to_end = ask(**BTC, intervalTime="5min", endTime=NOW - 62 * MINUTE_MS, limit=3)["result"]
    assert minutes(to_end["list"]) == [60, 65, 70]
    assert len(ask(**BTC, intervalTime="5min", limit=1000)["result"]["list"]) == 200


def test_the_cursor_walks_to_the_start_of_the_bounds_and_ends_there(client: HTTP) -> None:
    bounds = {"startTime": NOW - 62 * MINUTE_MS, "endTime": NOW, "limit": 5}
    pages, cursor = [], ""
    while True:
        more = {"cursor": cursor} if cursor else {}
        result = client.get_open_interest(**BTC, intervalTime="5min", **bounds, **more)["result"]
        pages.append(minutes(result["list"]))
        cursor = result["nextPageCursor"]
        if not cursor:
            break
        assert cursor.startswith("lastid%3D0%26lasttime%3D")
    assert pages == [[0, 5, 10, 15, 20], [25, 30, 35, 40, 45], [50, 55, 60]]


def test_a_cursor_that_was_decoded_on_the_way_back_is_refused(client: HTTP) -> None:
    with pytest.raises(InvalidRequestError, match="cursor invalid") as caught:
        client.get_open_interest(**BTC, intervalTime="5min", cursor="lastid=0&lasttime=1737000000")
    assert caught.value.status_code == 10001


@pytest.mark.parametrize("period", ["5min", "15min", "30min", "1h", "4h", "1d"])
def test_positions_lie_on_their_grid_and_are_parts_of_the_finest(client: HTTP, period: str) -> None:
    step = {"5min": 5, "15min": 15, "30min": 30, "1h": 60, "4h": 240, "1d": 1440}[period] * MINUTE_MS
    coarse = client.get_open_interest(**BTC, intervalTime=period, limit=2)["result"]["list"]
    newest = int(coarse[0]["timestamp"])
    assert newest == NOW - NOW % step and int(coarse[1]["timestamp"]) == newest - step
    fine = client.get_open_interest(**BTC, intervalTime="5min", endTime=newest, limit=1)["result"]["list"]
    assert fine[0] == coarse[0]


def test_the_ratio_is_five_hundred_a_page_and_its_shares_add_to_one(client: HTTP) -> None:
    result = client.get_long_short_ratio(**BTC, period="5min", limit=9999)["result"]
    assert len(result["list"]) == 500 and result["nextPageCursor"]
    assert set(result["list"][0]) == {"symbol", "buyRatio", "sellRatio", "timestamp"}
    for row in result["list"]:
        assert float(row["buyRatio"]) + float(row["sellRatio"]) == pytest.approx(1.0, abs=1e-9)
        assert 0.05 <= float(row["buyRatio"]) <= 0.95
    assert len(client.get_long_short_ratio(**BTC, period="1h")["result"]["list"]) == 50


@pytest.mark.parametrize("query", [{"intervalTime": "4d"}, {}, {"intervalTime": "1h", "category": "spot"}])
def test_wrong_questions_about_positions_are_refused(client: HTTP, query: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        client.get_open_interest(**(BTC | query))
    assert caught.value.status_code == 10001


def test_a_longer_market_has_the_same_positions(market: GeneratedMarket) -> None:
    short = GeneratedMarket(5, T0, T0 + 9 * DAY_MS, ["BTCUSDT"], base_interval="5m")
    for name in ("open_interest", "account_ratio"):
        times, values = getattr(short, name)("linear", "BTCUSDT", HOUR_MS)
        longer = getattr(market, name)("linear", "BTCUSDT", HOUR_MS)
        assert np.array_equal(times, longer[0][: len(times)]) and np.array_equal(
            values, longer[1][: len(values)]
        )
    assert (values > 0).all() and len(np.unique(values)) > 100


# -- listings -----------------------------------------------------------------------------------------------------


def listed(client: HTTP, **query: Any) -> list[str]:
    rows = client.get_instruments_info(**{"category": "linear", "limit": 1000, **query})["result"]["list"]
    return [row["symbol"] for row in rows]


def test_an_instrument_goes_through_its_life_by_the_venue_s_clock(
    server: SandboxServer, client: HTTP
) -> None:
    assert {"BTCUSDT", "NEWUSDT"} < set(listed(client))
    assert listed(client, status="Closed") == ["GONEUSDT"] and listed(client, status="PreLaunch") == [
        "SOONUSDT"
    ]
    assert listed(client, status="Delivering") == []
    (gone,) = client.get_instruments_info(category="linear", status="Closed")["result"]["list"]
    assert (gone["status"], gone["deliveryTime"]) == ("Closed", str(LIVES["GONEUSDT"].delisted_ms))
    (soon,) = client.get_instruments_info(category="linear", status="PreLaunch")["result"]["list"]
    assert soon["isPreListing"] is True and soon["launchTime"] == str(LIVES["SOONUSDT"].listed_ms)
    server.clock.set(T0 + 20 * DAY_MS + MINUTE_MS)
    assert listed(client, status="Delivering") == ["GONEUSDT"]
    assert (
        listed(client, status="PreLaunch") == ["NEWUSDT", "SOONUSDT"]
        and listed(client, status="Closed") == []
    )


def test_a_life_has_four_parts() -> None:
    life = Life(100, 200)
    at = (99, 100, 199, 200, 200 + DELIVERY_MS - 1, 200 + DELIVERY_MS)
    parts = ["PreLaunch", "Trading", "Trading", "Delivering", "Delivering", "Closed"]
    assert [life.status(ms) for ms in at] == parts
    assert Life(100).status(10**15) == "Trading"


def test_five_hundred_instruments_a_page_and_a_cursor_to_the_rest(client: HTTP) -> None:
    first = client.get_instruments_info(category="linear")["result"]
    assert len(first["list"]) == 500 and first["nextPageCursor"].startswith("first%3D")
    rest = client.get_instruments_info(category="linear", cursor=first["nextPageCursor"])["result"]
    assert len(rest["list"]) == 102 and rest["nextPageCursor"] == ""
    spot = client.get_instruments_info(category="spot", limit=5)["result"]
    assert len(spot["list"]) == 602 and "nextPageCursor" not in spot and "launchTime" not in spot["list"][0]
    assert client.get_instruments_info(category="spot", symbol="NOPE")["result"]["list"] == []
    with pytest.raises(InvalidRequestError, match="status invalid"):
        listed(client, status="Settling")


def test_candles_of_a_symbol_lie_within_its_life(server: SandboxServer, client: HTTP) -> None:
    def first_and_last(symbol: str) -> list[int]:
        ask = {"category": "linear", "symbol": symbol, "interval": "60", "limit": 1}
        ends = (client.get_kline(**ask, start=1), client.get_kline(**ask))
        return [int(row[0]) for reply in ends for row in reply["result"]["list"]]

    assert first_and_last("GONEUSDT") == [T0, T0 + 20 * DAY_MS - HOUR_MS]
    assert first_and_last("NEWUSDT") == [T0 + 30 * DAY_MS, T0 + 40 * DAY_MS]
    assert first_and_last("SOONUSDT") == []
    events = client.get_funding_rate_history(category="linear", symbol="GONEUSDT")["result"]["list"]
    assert int(events[0]["fundingRateTimestamp"]) == T0 + 20 * DAY_MS


def test_tickers_agree_with_the_candles_of_the_last_day(market: GeneratedMarket, client: HTTP) -> None:
    (row,) = client.get_tickers(**BTC)["result"]["list"]
    bars = market.candles("linear", "BTCUSDT", "trade", "5m")
    last = int(np.searchsorted(bars.open_time, NOW, "right")) - 1
    assert float(row["bid1Price"]) <= float(row["lastPrice"]) <= float(row["ask1Price"])
    assert float(row["prevPrice24h"]) == bars.open[last - 287]
    assert float(row["highPrice24h"]) == max(*bars.high[last - 287 : last], float(row["ask1Price"]))
    whole = bars.turnover[last - 287 : last].sum()
    assert whole <= float(row["turnover24h"]) <= whole + bars.turnover[last]
    assert row["nextFundingTime"] == str(T0 + 40 * DAY_MS + 8 * HOUR_MS)
    assert all(isinstance(value, str) for value in row.values())


def test_tickers_hold_what_trades_now_in_one_reply() -> None:
    world = GeneratedMarket(5, T0, T0 + 60 * DAY_MS, ["BTCUSDT"], base_interval="1h", lives=LIVES)
    reply = json.loads(Endpoints(world).answer("/v5/market/tickers", {"category": "spot"}, NOW))
    assert [row["symbol"] for row in reply["result"]["list"]] == ["BTCUSDT", "NEWUSDT"]


def test_recent_trades_come_newest_first_up_to_the_limit_of_the_category(client: HTTP) -> None:
    rows = client.get_public_trade_history(**BTC)["result"]["list"]
    times = [int(row["time"]) for row in rows]
    assert len(rows) == 500 and times == sorted(times, reverse=True) and times[0] == NOW
    assert len({row["execId"] for row in rows}) == 500 and {row["side"] for row in rows} == {"Buy", "Sell"}
    assert len(client.get_public_trade_history(**BTC, limit=5000)["result"]["list"]) == 1000
    spot = client.get_public_trade_history(category="spot", symbol="BTCUSDT", limit=5000)["result"]["list"]
    assert len(spot) == 60


# -- notices ------------------------------------------------------------------------------------------------------


def test_announcements_are_paged_by_number_newest_first(client: HTTP) -> None:
    pages = [client.get_announcement(locale="en-US", page=n, limit=10)["result"] for n in (1, 2)]
    rows = [row for page in pages for row in page["list"]]
    times = [row["publishTime"] for row in rows]
    assert len(rows) == 20 and times == sorted(times, reverse=True) and times[0] <= NOW
    assert pages[0]["total"] == pages[1]["total"] > 600  # a listing for each symbol
    assert len({row["url"] for row in rows}) == 20 and all("blt" in row["url"] for row in rows)
    assert client.get_announcement(locale="en-US", page=9999)["result"]["list"] == []
    with pytest.raises(InvalidRequestError, match="locale invalid"):
        client.get_announcement(locale="")


def test_announcements_can_be_chosen_by_type_and_tag(client: HTTP) -> None:
    (gone,) = client.get_announcement(locale="en-US", type="delistings")["result"]["list"]
    assert "GONEUSDT" in gone["title"] and gone["tags"] == ["Delistings"]
    assert gone["publishTime"] == LIVES["GONEUSDT"].delisted_ms - 2 * DAY_MS  # type: ignore[operator]
    assert client.get_announcement(locale="en-US", tag="Delistings")["result"]["total"] == 1


def test_some_announcements_are_edited_under_the_same_url(market: GeneratedMarket) -> None:
    edited = [item for item in market.announcements() if item.edits]
    assert len(edited) >= 3
    item = edited[0]
    (edited_ms, title, description) = item.edits[0]
    assert item.text(edited_ms - 1) == (item.title, item.description)
    assert item.text(edited_ms) == (title, description) and title.startswith("[Updated]")


def test_maintenance_is_told_two_days_ahead_and_nothing_trades_in_it(
    server: SandboxServer, client: HTTP
) -> None:
    rows = client.get_system_status()["result"]["list"]
    assert [(row["state"], row["begin"]) for row in rows] == [
        ("scheduled", str(LATER.begin_ms)),
        ("completed", str(PAUSE.begin_ms)),
    ]
    over = client.client.get(f"{server.base_url}/v5/system/status?state=completed").json()
    assert over["result"]["list"] == rows[1:]
    server.clock.set(PAUSE.begin_ms + HOUR_MS)
    (running,) = client.get_system_status()["result"]["list"]
    assert running["state"] == "ongoing"
    span = {"start": PAUSE.begin_ms - HOUR_MS, "end": PAUSE.end_ms, "interval": "60"}
    server.clock.set(NOW)
    opens = [int(row[0]) for row in client.get_kline(**BTC, **span)["result"]["list"]]
    assert opens == [PAUSE.end_ms, PAUSE.begin_ms - HOUR_MS]


def test_a_replayed_market_answers_with_empty_lists_for_what_was_not_recorded() -> None:
    hours = pl.Series([T0, T0 + HOUR_MS]).cast(pl.Datetime("ms", "UTC"))
    prices = dict.fromkeys(("open", "high", "low", "close"), 1.5) | dict.fromkeys(("volume", "turnover"), 2.0)
    key = {"category": "linear", "symbol": "BTCUSDT", "interval": "1h", "kind": "trade"}
    frame = pl.DataFrame({"open_time": hours}).with_columns(
        *(pl.lit(value).alias(name) for name, value in (key | prices).items())
    )
    with SandboxServer(ReplayMarket(frame), VirtualClock(T0 + HOUR_MS)) as server:
        made = HTTP(max_retries=1)
        made.endpoint = server.base_url
        assert made.get_open_interest(**BTC, intervalTime="1h")["result"]["list"] == []
        assert made.get_long_short_ratio(**BTC, period="1h")["result"]["list"] == []
        assert made.get_announcement(locale="en-US")["result"] == {"total": 0, "list": []}
        assert made.get_system_status()["result"]["list"] == []
        (row,) = made.get_tickers(**BTC)["result"]["list"]
        assert row["lastPrice"] == "1.5" and row["markPrice"] == row["openInterest"] == ""
        made.client.close()
