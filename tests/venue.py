"""A small faulty venue for tests: fetch from it with real parts and little waiting, compare with its truth."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import polars as pl

from recur.connectors.bybit import BybitConnector
from recur.connectors.sandbox.clock import AddressLimit, VirtualClock
from recur.connectors.sandbox.faults import FaultPlan, Rule
from recur.connectors.sandbox.generated import GeneratedMarket
from recur.connectors.sandbox.server import SandboxServer
from recur.pipeline.fetch import FetchRequest, FetchSummary, plan_fetch, run_fetch
from recur.storage.store import Store
from recur.vocabulary import parse_time

START = parse_time("2025-07-01")
END = parse_time("2025-09-10")
NOW = parse_time("2025-08-30T12:34")
NOON = parse_time("2025-08-30T12:00")
BARS = 1452  # hours from START to NOON
TIMEOUT_S = 0.3
ATTEMPTS = 5


class HurriedClock:
    """Seconds that pass by sleeping, of which a twentieth passes in reality."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        time.sleep(min(seconds, 2.0) / 20)


def hurried(base_url: str, **options: Any) -> BybitConnector:
    clock = HurriedClock()
    wanted = {"timeout_s": TIMEOUT_S, "attempts": ATTEMPTS, "rate": 1000.0} | options
    return BybitConnector(base_url, clock=clock, sleep=clock.sleep, **wanted)


@dataclass
class Venue:
    """One server; its faults are replaced from run to run."""

    market: GeneratedMarket
    server: SandboxServer = field(init=False)

    def __post_init__(self) -> None:
        self.server = SandboxServer(self.market, VirtualClock(NOW))

    def suffers(self, *rules: Rule, seed: int = 1) -> None:
        self.server.faults = FaultPlan(rules, seed)

    def heals(self) -> None:
        """No faults, no ban, and connections are taken again."""
        self.suffers()
        self.server.limit = AddressLimit()
        self.server.clock.set(NOW)
        address = urlsplit(self.server.base_url)
        for _ in range(200):
            with (
                contextlib.suppress(OSError),
                socket.create_connection((address.hostname, address.port), 0.1),
            ):
                return
            time.sleep(0.01)
        raise AssertionError("the venue does not come back")

    def fetch(self, store: Store, symbol: str = "BTCUSDT", **wanted: Any) -> FetchSummary:
        connector = hurried(self.server.base_url)
        request = FetchRequest((symbol,), **({"since_ms": START, "workers": 2} | wanted))
        return run_fetch(store, connector, plan_fetch(store, connector, request))

    def truth(self, category: str = "linear", symbol: str = "BTCUSDT", until_ms: int = NOON) -> pl.DataFrame:
        """The closed hours of the market itself, as the columns of ``stored``."""
        bars = self.market.candles(category, symbol, "trade", "1h")
        bars = bars[: int(np.searchsorted(bars.open_time, until_ms))]
        names = ("open_time", "open", "high", "low", "close", "volume", "turnover")
        return pl.DataFrame({name: getattr(bars, name) for name in names})


def stored(store: Store, category: str = "linear", symbol: str = "BTCUSDT") -> pl.DataFrame:
    """The stored hours, times as UTC ms."""
    frame = store.candles(category, [symbol], "1h").drop("category", "symbol", "interval", "kind")
    return frame.with_columns(pl.col("open_time").dt.epoch("ms"))


def gaps(store: Store) -> dict[str, int]:
    """Missing bars by reason, as the record of what was asked has them."""
    with store.read() as con:
        rows = con.execute(
            "SELECT reason, sum(missing)::BIGINT FROM fetch_windows WHERE status = 'gap' GROUP BY reason"
        ).fetchall()
    return dict(rows)


def revisions(store: Store) -> int:
    with store.read() as con:
        ((count,),) = con.execute("SELECT count(*) FROM candle_revisions").fetchall()
    return int(count)


@contextlib.contextmanager
def running(market: GeneratedMarket) -> Iterator[Venue]:
    venue = Venue(market)
    with venue.server:
        yield venue
