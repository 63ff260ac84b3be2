"""Following a pattern: what is listed later is followed too, what was delisted no longer, and says why it ends."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from recur.connectors.bybit import BybitConnector
from recur.connectors.sandbox.generated import GeneratedMarket
from recur.connectors.sandbox.server import SandboxServer, VirtualClock
from recur.connectors.sandbox.world import Life
from recur.pipeline.certificate import certify
from recur.pipeline.fetch import FetchRequest
from recur.pipeline.follow import Follower
from recur.storage.store import Store
from recur.vocabulary import MINUTE_MS, DataMissing, Series, parse_time
from tests.following import QUICK, START, eventually, stored

NOW = parse_time("2025-07-01T06:00:30")
END = parse_time("2025-07-03")


class ChangingMarket(GeneratedMarket):
    """A generated market whose listings change while it is watched: nothing tells a delisting before it happens."""

    def __init__(self, symbols: tuple[str, ...], lives: dict[str, Life] | None = None) -> None:
        super().__init__(1, START, END, symbols, base_interval="1m", lives=lives)

    def delist(self, symbol: str, at_ms: int) -> None:
        with self._lock:
            self._lives[symbol] = Life(START, at_ms)
            self._cache.clear()

    def opens(self, category: str, symbol: str, until_ms: int) -> list[int]:
        return [t for t in self.candles(category, symbol, "trade", "1m").open_time.tolist() if t < until_ms]


@contextmanager
def followed(
    server: SandboxServer, store: Store, lines: list[str], request: FetchRequest
) -> Iterator[Follower]:
    connector = BybitConnector(server.base_url, attempts=3, workers=4)
    follower = Follower(store, connector, request, say=lines.append, patience=QUICK)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(follower.run)
        try:
            yield follower
        finally:
            follower.stop()
        running.result(timeout=10)


def opens(store: Store, category: str, symbol: str) -> list[int]:
    return store.candles(category, [symbol], "1m")["open_time"].dt.epoch("ms").to_list()


def wait_for(store: Store, market: ChangingMarket, category: str, symbol: str, until_ms: int) -> None:
    """Until all bars of the market that open before ``until_ms`` are stored."""
    eventually(lambda: opens(store, category, symbol) == market.opens(category, symbol, until_ms))


def test_a_pattern_takes_in_what_is_listed_later_and_lets_go_of_what_was_delisted(tmp_path: Path) -> None:
    listed, delisted = parse_time("2025-07-01T06:12"), parse_time("2025-07-01T06:10")
    market = ChangingMarket(("BTCUSDT", "GONEUSDT"), {"NEWUSDT": Life(listed)})
    store, lines = Store(tmp_path), list[str]()
    request = FetchRequest(("*USDT",), interval="1m", since_ms=START)
    with (
        SandboxServer(market, VirtualClock(NOW)) as server,
        followed(server, store, lines, request) as follower,
    ):
        eventually(lambda: follower.summary.connects >= 1)
        assert follower.summary.series == ["bybit:linear:BTCUSDT:1m", "bybit:linear:GONEUSDT:1m"]
        market.delist("GONEUSDT", delisted)
        server.clock.set(parse_time("2025-07-01T06:13:30"))
        until = parse_time("2025-07-01T06:13")
        eventually(lambda: opens(store, "linear", "BTCUSDT") == market.opens("linear", "BTCUSDT", until))
        assert follower.summary.added == []
        server.clock.set(parse_time("2025-07-01T06:16:30"))
        eventually(lambda: follower.summary.added == ["NEWUSDT"] and follower.summary.ended == ["GONEUSDT"])
        connects = follower.summary.connects
        eventually(lambda: follower.summary.connects > connects)  # the stream is asked for the new symbol
        server.clock.set(parse_time("2025-07-01T06:18:30"))
        until = parse_time("2025-07-01T06:18")
        for symbol in ("BTCUSDT", "NEWUSDT"):
            wait_for(store, market, "linear", symbol, until)
    assert opens(store, "linear", "NEWUSDT")[0] == listed
    assert opens(store, "linear", "GONEUSDT") == market.opens("linear", "GONEUSDT", delisted)
    assert opens(store, "linear", "GONEUSDT")[-1] == delisted - MINUTE_MS
    assert "GONEUSDT was delisted: it is not followed any more." in lines
    assert "NEWUSDT trades: it is followed from now on." in lines
    (gone,) = [row for row in certify(store, NOW)["series"] if row["symbol"] == "GONEUSDT"]
    assert [(hole["since"], hole["reason"]) for hole in gone["holes"]] == [
        ("2025-07-01T06:10:00Z", "delisted")
    ]
    assert store.asked(Series("linear", "GONEUSDT", "1m"))[-1][1] < parse_time("2025-07-01T06:17")


def test_following_ends_when_all_that_was_named_is_delisted(tmp_path: Path) -> None:
    market, store, lines = ChangingMarket(("BTCUSDT",)), Store(tmp_path), list[str]()
    request = FetchRequest(("BTCUSDT",), interval="1m", since_ms=START)
    delisted = parse_time("2025-07-01T06:05")
    with (
        SandboxServer(market, VirtualClock(NOW)) as server,
        followed(server, store, lines, request) as follower,
    ):
        eventually(lambda: follower.summary.connects >= 1)
        market.delist("BTCUSDT", delisted)
        server.clock.set(parse_time("2025-07-01T06:16:30"))
        eventually(lambda: follower.summary.seconds > 0)  # it has ended by itself
    assert opens(store, "linear", "BTCUSDT") == market.opens("linear", "BTCUSDT", delisted)
    with (
        SandboxServer(market, VirtualClock(parse_time("2025-07-02"))) as server,
        pytest.raises(DataMissing, match="BTCUSDT trade no more"),
    ):
        Follower(store, BybitConnector(server.base_url), request, patience=QUICK).run()


def test_a_spot_pair_that_is_delisted_does_not_cost_the_others_anything(tmp_path: Path) -> None:
    market, store, lines = ChangingMarket(("BTCUSDT", "GONEUSDT")), Store(tmp_path), list[str]()
    request = FetchRequest(("GONEUSDT", "BTCUSDT"), "spot", "1m", since_ms=START)
    with (
        SandboxServer(market, VirtualClock(NOW)) as server,
        followed(server, store, lines, request) as follower,
    ):
        eventually(lambda: follower.summary.connects >= 1)
        market.delist("GONEUSDT", parse_time("2025-07-01T06:10"))
        for minute in (13, 16):  # once it is asked for in vain, then the venue is asked what it lists
            server.clock.set(parse_time(f"2025-07-01T06:{minute}:30"))
            wait_for(store, market, "spot", "BTCUSDT", parse_time(f"2025-07-01T06:{minute}"))
        eventually(lambda: "The venue does not list GONEUSDT: it is not followed while that is so." in lines)
        market.delist("GONEUSDT", END)  # it is back
        # Well over a quarter of an hour later: after a jump the follower takes the clock for a fast one, and looks ahead.
        server.clock.set(parse_time("2025-07-01T06:58:30"))
        until = parse_time("2025-07-01T06:58")
        for symbol in ("BTCUSDT", "GONEUSDT"):
            wait_for(store, market, "spot", symbol, until)
    assert follower.summary.failures == 0
    assert stored(store, "BTCUSDT", "1m", END) == []  # spot alone
