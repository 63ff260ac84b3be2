"""The sandbox exchange, asked by the real pybit client, and the generated market against its own truth."""

from __future__ import annotations

import http.client
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from pybit.exceptions import FailedRequestError, InvalidRequestError
from pybit.unified_trading import HTTP

from recur.connectors.sandbox.generated import GeneratedMarket
from recur.connectors.sandbox.replay import ReplayMarket
from recur.connectors.sandbox.server import AddressLimit, SandboxServer, VirtualClock
from recur.connectors.sandbox.world import Candles, aggregate
from recur.vocabulary import DAY_MS, HOUR_MS, MINUTE_MS, UsageError, VenueRefused, parse_time

T0 = parse_time("2024-01-01")  # a Monday
REAL = Path(__file__).resolve().parents[1] / "../shared/data/candles_bybit_perp_1h.parquet"

logging.getLogger().addHandler(logging.NullHandler())  # else each pybit client adds a handler of its own


def hourly_frame(hours: int, absent: tuple[int, ...] = ()) -> pl.DataFrame:
    """Hour k opens at 100 + k, closes at 101 + k, reaches from 99.5 + k to 101.25 + k, trades 10 * (k + 1)."""
    k = np.array([i for i in range(hours) if i not in absent])
    return pl.DataFrame(
        {
            "category": "linear",
            "symbol": "BTCUSDT",
            "interval": "1h",
            "kind": "trade",
            "open_time": pl.Series(T0 + k * HOUR_MS).cast(pl.Datetime("ms", "UTC")),
            "open": 100.0 + k,
            "high": 101.25 + k,
            "low": 99.5 + k,
            "close": 101.0 + k,
            "volume": 10.0 * (k + 1),
            "turnover": pl.Series([None] * len(k), dtype=pl.Float64),
        }
    )


def funding_frame(events: int) -> pl.DataFrame:
    times = pl.Series([T0 + i * 8 * HOUR_MS for i in range(events)]).cast(pl.Datetime("ms", "UTC"))
    return pl.DataFrame(
        {
            "category": "linear",
            "symbol": "BTCUSDT",
            "funding_time": times,
            "rate": [1e-05 * i for i in range(events)],
        }
    )


class Client:
    """pybit against one sandbox server, both closed at the end of the test."""

    def __init__(self, server: SandboxServer) -> None:
        self.server = server
        self.http = HTTP(max_retries=1)
        self.http.endpoint = server.base_url

    def opens(self, **query: Any) -> list[int]:
        """Hours since T0 of the BTCUSDT candles received, in the order received."""
        query = {"category": "linear", "symbol": "BTCUSDT", "interval": "60"} | query
        return [(int(row[0]) - T0) // HOUR_MS for row in self.http.get_kline(**query)["result"]["list"]]

    def close(self) -> None:
        self.http.client.close()
        self.server.stop()


@pytest.fixture
def client() -> Iterator[Client]:
    """30 hours recorded; the clock stands at 20:15, so that hour 20 is open."""
    world = ReplayMarket(hourly_frame(30), funding_frame(4))
    server = SandboxServer(world, VirtualClock(T0 + 20 * HOUR_MS + 15 * MINUTE_MS))
    server.start()
    made = Client(server)
    yield made
    made.close()


@pytest.fixture(scope="module")
def market() -> GeneratedMarket:
    return GeneratedMarket(7, T0, T0 + 400 * DAY_MS, signal=0.1)


def test_envelope_carries_virtual_time_and_ok(client: Client) -> None:
    reply = client.http.get_server_time()
    assert reply["retCode"] == 0 and reply["retMsg"] == "OK" and reply["time"] == 1704140100000
    assert reply["result"] == {"timeSecond": "1704140100", "timeNano": "1704140100000000000"}


def test_kline_is_strings_newest_first_with_the_open_candle_on_top(client: Client) -> None:
    reply = client.http.get_kline(symbol="BTCUSDT", interval="60", limit=2)["result"]
    assert reply["category"] == "linear" and reply["symbol"] == "BTCUSDT"
    assert reply["list"] == [
        # a quarter of the hour has passed: a quarter of the way from the open to the final values
        ["1704139200000", "120.0", "120.3125", "119.875", "120.25", "52.5", ""],
        ["1704135600000", "119.0", "120.25", "118.5", "120.0", "200.0", ""],
    ]


def test_a_candle_at_its_open_has_one_price_and_no_volume(client: Client) -> None:
    client.server.clock.set(T0 + 20 * HOUR_MS)
    newest = client.http.get_kline(symbol="BTCUSDT", interval="60", limit=1)["result"]["list"]
    assert newest == [["1704139200000", "120.0", "120.0", "120.0", "120.0", "0.0", ""]]


def test_lone_start_is_floored_and_pages_forward(client: Client) -> None:
    assert client.opens(start=T0 + 5 * HOUR_MS + 1, limit=3) == [7, 6, 5]
    assert client.opens(start=9999, limit=1) == [0]
    assert client.opens(start=T0 + 20 * HOUR_MS + 1) == [20]


def test_both_bounds_are_inclusive_and_keep_the_newest_rows(client: Client) -> None:
    assert client.opens(start=T0 + 2 * HOUR_MS, end=T0 + 5 * HOUR_MS) == [5, 4, 3, 2]
    assert client.opens(start=T0 + 2 * HOUR_MS, end=T0 + 5 * HOUR_MS, limit=2) == [5, 4]
    assert client.opens(end=T0 + 3 * HOUR_MS - 1, limit=2) == [2, 1]
    assert client.opens(start=T0, end=T0 + 99 * HOUR_MS, limit=3) == [20, 19, 18]


def test_ranges_before_listing_or_in_the_future_are_empty(client: Client) -> None:
    assert client.opens(start=1, end=T0 - 1) == []
    assert client.opens(start=T0 + 25 * HOUR_MS, end=T0 + 28 * HOUR_MS) == []


def test_default_limit_is_200_and_the_maximum_1000() -> None:
    server = SandboxServer(ReplayMarket(hourly_frame(1200)), VirtualClock(T0 + 1200 * HOUR_MS))
    server.start()
    client = Client(server)
    assert client.opens() == list(range(1199, 999, -1))
    assert client.opens(limit=5000) == list(range(1199, 199, -1))
    client.close()


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ({"interval": "7"}, "Invalid period!"),
        ({"interval": "15"}, "Invalid period!"),  # finer than what was recorded
        ({"symbol": "NOPEUSDT"}, "params error: symbol invalid"),
        ({"category": "option"}, "params error: category invalid"),
        ({"limit": 0}, "params error: limit invalid"),
        ({"start": "soon"}, "params error: start invalid"),
    ],
)
def test_wrong_requests_are_answered_with_10001(client: Client, query: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message) as caught:
        client.opens(**query)
    assert caught.value.status_code == 10001


def test_unknown_paths_are_404(client: Client) -> None:
    with pytest.raises(FailedRequestError) as caught:
        client.http.get_insurance()
    assert caught.value.status_code == 404


def test_funding_refuses_a_lone_start_and_gives_the_newest_first(client: Client) -> None:
    ask = client.http.get_funding_rate_history
    key = {"category": "linear", "symbol": "BTCUSDT"}
    with pytest.raises(InvalidRequestError, match="Time is invalid"):
        ask(**key, startTime=T0)
    rows = ask(**key)["result"]["list"]
    assert [(row["fundingRateTimestamp"], row["fundingRate"]) for row in rows] == [
        ("1704124800000", "0.00002"),  # the event at 24:00 has not happened at 20:15
        ("1704096000000", "0.00001"),
        ("1704067200000", "0.0"),
    ]
    assert len(ask(**key, startTime=T0, endTime=T0 + 8 * HOUR_MS)["result"]["list"]) == 2
    assert ask(**key, limit=1, endTime=T0)["result"]["list"][0]["fundingRateTimestamp"] == "1704067200000"


def test_instruments_page_by_the_cursor_as_received() -> None:
    names = ("AUSDT", "BUSDT", "CUSDT")
    world = GeneratedMarket(1, T0, T0 + DAY_MS, symbols=names, base_interval="1h")
    with SandboxServer(world, VirtualClock(T0)) as server:
        client = Client(server)
        ask = client.http.get_instruments_info
        first = ask(category="linear", limit=2)["result"]
        assert first["nextPageCursor"] == "first%3DAUSDT%26last%3DBUSDT"
        second = ask(category="linear", limit=2, cursor=first["nextPageCursor"])["result"]
        assert [row["symbol"] for row in first["list"] + second["list"]] == ["AUSDT", "BUSDT", "CUSDT"]
        assert second["nextPageCursor"] == "" and second["list"][0]["launchTime"] == str(T0)
        assert ask(category="linear", status="Closed")["result"]["list"] == []
        assert ask(category="spot", symbol="NOPE")["result"]["list"] == []
        with pytest.raises(InvalidRequestError, match="status invalid"):
            ask(category="linear", status="Settling")
        with pytest.raises(InvalidRequestError, match="symbol invalid"):
            ask(category="linear", symbol="NOPE")
        client.close()


def test_price_candles_have_five_strings(market: GeneratedMarket) -> None:
    with SandboxServer(market, VirtualClock(T0 + DAY_MS)) as server:
        client = Client(server)
        query = {"symbol": "BTCUSDT", "interval": "60", "limit": 2}
        for method in ("get_mark_price_kline", "get_index_price_kline", "get_premium_index_price_kline"):
            rows = getattr(client.http, method)(category="linear", **query)["result"]["list"]
            assert [len(row) for row in rows] == [5, 5]
        with pytest.raises(InvalidRequestError, match="category invalid"):
            client.http.get_premium_index_price_kline(category="inverse", **query)
        client.close()


def test_every_float_survives_the_wire(market: GeneratedMarket) -> None:
    with SandboxServer(market, VirtualClock(market.end_ms)) as server:
        client = Client(server)
        bars = market.candles("linear", "SOLUSDT", "trade", "5m")[2000:3000]
        reply = client.http.get_kline(
            category="linear", symbol="SOLUSDT", interval="5", limit=1000,
            start=int(bars.open_time[0]), end=int(bars.open_time[-1]),
        )  # fmt: skip
        received = np.array(reply["result"]["list"][::-1], dtype=np.float64).T
        sent = (bars.open_time, bars.open, bars.high, bars.low, bars.close, bars.volume, bars.turnover)
        for got, expected in zip(received, sent, strict=True):
            assert np.array_equal(got, expected)
        client.close()


def test_the_open_candle_of_a_coarse_interval_knows_only_finished_fine_bars(market: GeneratedMarket) -> None:
    now = T0 + 10 * HOUR_MS + 25 * MINUTE_MS
    with SandboxServer(market, VirtualClock(now)) as server:
        client = Client(server)
        row = client.http.get_kline(symbol="BTCUSDT", interval="60", limit=1)["result"]["list"][0]
        client.close()
    fine = market.candles("linear", "BTCUSDT", "trade", "5m")[120:126]  # the last one opens at 10:25
    assert float(row[2]) == max(*fine.high[:5], fine.open[5])
    assert float(row[4]) == fine.open[5]
    assert float(row[5]) == pytest.approx(fine.volume[:5].sum())


def test_requests_reuse_one_connection_and_are_counted(client: Client) -> None:
    for _ in range(5):
        client.opens()
    assert client.server.requests == {"/v5/market/kline": 5} and client.server.connections == 1


def test_more_than_600_requests_in_five_seconds_ban_the_address_and_asking_on_extends_the_ban() -> None:
    limit = AddressLimit(ban_s=600.0)
    assert all(limit.admits(0.001 * i) for i in range(600))
    assert not limit.admits(0.7)
    assert not limit.admits(600.0)  # still banned; now until 1200
    assert not limit.admits(1199.0)  # now until 1799
    assert limit.admits(1799.5) and limit.refused == 3 and limit.most_in_window == 601


def test_a_banned_client_sees_403_only_where_the_limit_is_enforced() -> None:
    world = ReplayMarket(hourly_frame(2))
    with SandboxServer(world, VirtualClock(T0), enforce_limit=True) as server:
        connection = http.client.HTTPConnection(server.base_url.removeprefix("http://"))
        replies = []
        for _ in range(601):
            connection.request("GET", "/v5/market/time")
            reply = connection.getresponse()
            replies.append((reply.status, reply.read()))
        connection.close()
    assert {status for status, _ in replies[:600]} == {200}
    assert replies[600] == (403, b"access too frequent")


def test_a_clock_runs_at_its_speed_and_can_be_set() -> None:
    frozen, fast = VirtualClock(T0), VirtualClock(T0, speed=1000.0)
    time.sleep(0.02)
    assert frozen.now_ms() == T0 and fast.now_ms() >= T0 + 20_000
    frozen.set(T0 + 5)
    assert frozen.now_ms() == T0 + 5


def test_a_stopped_server_frees_its_port() -> None:
    world = ReplayMarket(hourly_frame(2))
    server = SandboxServer(world, VirtualClock(T0))
    port = int(server.start().rpartition(":")[2])
    server.stop()
    server.stop()
    with SandboxServer(world, VirtualClock(T0), port=port) as again:
        assert again.base_url == f"http://127.0.0.1:{port}"


def test_replay_builds_coarser_bars_from_complete_groups_only() -> None:
    world = ReplayMarket(hourly_frame(12, absent=(5,)))
    bars = world.candles("linear", "BTCUSDT", "trade", "4h")
    assert ((bars.open_time - T0) // HOUR_MS).tolist() == [0, 8]
    assert (bars.open[0], bars.high[0], bars.low[0], bars.close[0], bars.volume[0]) == (
        100,
        104.25,
        99.5,
        104,
        100,
    )
    assert len(world.candles("linear", "BTCUSDT", "trade", "1h")) == 11
    assert len(world.candles("linear", "BTCUSDT", "mark", "1h")) == 0
    with pytest.raises(VenueRefused, match="Invalid period!"):
        world.candles("linear", "BTCUSDT", "trade", "30m")
    with pytest.raises(UsageError, match="lacks the columns volume"):
        ReplayMarket(hourly_frame(2).drop("volume"))


def test_weeks_open_on_monday_and_months_follow_the_calendar() -> None:
    days = T0 + DAY_MS * np.arange(-3, 70, dtype=np.int64)
    one = np.ones(len(days))
    base = Candles(days, one, one, one, one, one, one)
    weeks, months = aggregate(base, "1d", "1w"), aggregate(base, "1d", "1M")
    assert weeks.open_time[0] == T0 and set(weeks.volume) == {7.0}
    assert months.open_time.tolist() == [T0, parse_time("2024-02-01")] and months.volume.tolist() == [
        31.0,
        29.0,
    ]


@pytest.mark.skipif(not REAL.exists(), reason="the shared real candles are not here")
def test_real_candles_come_back_as_recorded() -> None:
    real = pl.read_parquet(REAL).filter(pl.col("symbol") == "BTCUSDT").rename({"ts": "open_time"})
    absent = pl.lit(None, pl.Float64).alias("turnover")
    frame = real.with_columns(absent, category=pl.lit("linear"), kind=pl.lit("trade"))
    world = ReplayMarket(frame)
    with SandboxServer(world, VirtualClock(world.end_ms)) as server:
        client = Client(server)
        reply = client.http.get_kline(symbol="BTCUSDT", interval="60", start=world.start_ms, limit=1000)
        client.close()
    closes = [float(row[4]) for row in reply["result"]["list"][::-1]]
    assert closes == real["close"][:1000].to_list()


def test_the_same_seed_gives_the_same_market_however_long(market: GeneratedMarket) -> None:
    short = GeneratedMarket(7, T0, T0 + 30 * DAY_MS, symbols=("ETHUSDT",), signal=0.1)
    for kind in ("trade", "mark", "premium"):
        a = short.candles("linear", "ETHUSDT", kind, "1h")
        b = market.candles("linear", "ETHUSDT", kind, "1h")[: len(a)]
        assert np.array_equal(a.close, b.close) and np.array_equal(a.high, b.high)
    other = GeneratedMarket(8, T0, T0 + 30 * DAY_MS, symbols=("ETHUSDT",)).candles(
        "linear", "ETHUSDT", "trade", "1h"
    )
    assert not np.array_equal(other.close, a.close)


def test_generated_bars_are_sane_and_chain(market: GeneratedMarket) -> None:
    for category, kind in (("linear", "trade"), ("linear", "mark"), ("linear", "premium"), ("spot", "trade")):
        bars = market.candles(category, "BNBUSDT", kind, "5m")
        assert len(bars) == 400 * 288 and np.array_equal(bars.open[1:], bars.close[:-1])
        assert (bars.high >= np.maximum(bars.open, bars.close)).all()
        assert (bars.low <= np.minimum(bars.open, bars.close)).all()
        assert kind != "trade" or (bars.volume > 0).all()
    trade, index, premium = (
        market.candles("linear", "BNBUSDT", k, "1h").close for k in ("trade", "index", "premium")
    )
    assert np.abs(trade / index - 1 - premium).max() < 1e-5


def test_funding_comes_each_eight_hours_and_follows_the_premium(market: GeneratedMarket) -> None:
    times, rates = market.funding("linear", "BTCUSDT")
    assert times[0] == T0 + 8 * HOUR_MS and set(np.diff(times)) == {8 * HOUR_MS} and len(times) == 1200
    assert np.median(rates) == pytest.approx(1e-4) and np.abs(rates).max() < 3e-3


@pytest.mark.parametrize("hours", [1, 24])
def test_realised_over_expected_variance_averages_to_one(market: GeneratedMarket, hours: int) -> None:
    ratios = []
    for symbol in market.symbols("linear"):
        bars = market.candles("linear", symbol, "trade", "1h")
        returns = np.log(bars.close[hours::hours] / bars.close[:-hours:hours])
        cutoffs = (bars.open_time + HOUR_MS)[:-hours:hours]
        ratios.append(returns**2 / market.expected_variance(symbol, cutoffs, hours * HOUR_MS))
    ratio = np.mean(ratios, axis=0)  # over symbols, which move together: one independent value per time
    assert abs(ratio.mean() - 1) < 3 * ratio.std() / np.sqrt(len(ratio))
    assert ratio.std() / np.sqrt(len(ratio)) < 0.1


def test_expected_variance_tells_calm_from_wild_hours(market: GeneratedMarket) -> None:
    bars = market.candles("linear", "BTCUSDT", "trade", "1h")
    expected = market.expected_variance("BTCUSDT", bars.open_time[1:], HOUR_MS)
    squared = np.diff(np.log(bars.close)) ** 2
    wild = expected > np.median(expected)
    assert squared[wild].mean() > 3 * squared[~wild].mean()


def test_the_planted_predictor_has_the_stated_correlation_and_shows_in_volume(
    market: GeneratedMarket,
) -> None:
    correlations, slopes = [], []
    for symbol in market.symbols("linear"):
        bars = market.candles("linear", symbol, "trade", "1h")
        z = market.predictor(symbol)[1]
        returns = np.diff(np.log(bars.close))
        cutoffs = bars.open_time[1:]
        expected = market.expected_return(symbol, cutoffs, 6 * HOUR_MS)
        scaled = returns / np.sqrt(market.expected_variance(symbol, cutoffs, HOUR_MS))
        correlations.append(np.corrcoef(z[:-1], scaled)[0, 1])
        slopes.append((returns * expected).sum() / (expected**2).sum())
        assert np.corrcoef(z[1:], np.diff(np.log(bars.volume)))[0, 1] > 0.4
    assert np.mean(correlations) == pytest.approx(0.1, abs=0.015)  # standard error 0.005
    assert np.mean(slopes) == pytest.approx(1.0, abs=0.2)


def test_without_signal_the_predictor_predicts_nothing() -> None:
    market = GeneratedMarket(3, T0, T0 + 400 * DAY_MS, base_interval="1h")
    bars = market.candles("linear", "BTCUSDT", "trade", "1h")
    returns = np.diff(np.log(bars.close))
    assert (
        abs(np.corrcoef(market.predictor("BTCUSDT")[1][:-1], np.sign(returns))[0, 1]) < 0.031
    )  # 3 standard errors
    assert not market.expected_return("BTCUSDT", bars.open_time[1:], HOUR_MS).any()


def test_wrong_markets_and_cutoffs_are_refused(market: GeneratedMarket) -> None:
    with pytest.raises(UsageError, match="must divide one hour"):
        GeneratedMarket(1, T0, T0 + DAY_MS, base_interval="2h")
    with pytest.raises(UsageError, match="-1 < signal < 1"):
        GeneratedMarket(1, T0, T0 + DAY_MS, signal=1.0)
    with pytest.raises(UsageError, match="at least one bar"):
        GeneratedMarket(1, T0, T0)
    with pytest.raises(UsageError, match="whole base bars"):
        market.expected_variance("BTCUSDT", np.array([T0]), HOUR_MS)  # nothing has closed yet


def test_two_years_of_four_symbols_are_made_within_three_seconds() -> None:
    began = time.process_time()
    market = GeneratedMarket(1, T0, T0 + 730 * DAY_MS)
    bars = [market.candles("linear", symbol, "trade", "5m") for symbol in market.symbols("linear")]
    assert [len(b) for b in bars] == [210_240] * 4
    assert time.process_time() - began < 3
