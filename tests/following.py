"""A generated market, a follower at work on it in a thread, and what its store should hold at the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import polars as pl

from recur.connectors.bybit import BybitConnector
from recur.connectors.live import Patience
from recur.connectors.sandbox.generated import GeneratedMarket
from recur.connectors.sandbox.server import SandboxServer
from recur.pipeline.fetch import FetchRequest
from recur.pipeline.follow import Follower
from recur.pipeline.venue_clock import VenueClock
from recur.storage.store import Store
from recur.vocabulary import parse_time

START = parse_time("2025-07-01")
NOW = parse_time("2025-07-01T06:00:30")
WORLD = GeneratedMarket(
    1, START, parse_time("2025-07-06"), ("BTCUSDT", "ETHUSDT", "SOLUSDT"), base_interval="1m"
)
QUICK = Patience(connect_gap=0.05, longest_pause=0.2, handshake=1.0, ack=0.3, silence=0.5, refusal=0.3)

Row = tuple[float, ...]


@dataclass(frozen=True)
class Fault:
    name: str


def truth(symbol: str, interval: str, until_ms: int) -> list[Row]:
    """The venue's candles that open before ``until_ms``: open time, prices, volume, turnover."""
    bars = WORLD.candles("linear", symbol, "trade", interval)
    own = bars[: int(np.searchsorted(bars.open_time, until_ms))]
    columns = (own.open_time, own.open, own.high, own.low, own.close, own.volume, own.turnover)
    return list(zip(*(column.tolist() for column in columns), strict=True))


def stored(store: Store, symbol: str, interval: str, until_ms: int) -> list[Row]:
    """The same from the store; empty before the first write."""
    if not store.path.exists():
        return []
    frame = store.candles("linear", [symbol], interval, until_ms=until_ms)
    values = ("open", "high", "low", "close", "volume", "turnover")
    return frame.select(pl.col("open_time").dt.epoch("ms"), *values).rows()


def eventually(true: Callable[[], bool], within_s: float = 30.0, every_s: float = 0.02) -> None:
    """Wait until ``true()``; fails after ``within_s`` seconds."""
    until = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < until, "it did not come true in time"
        time.sleep(every_s)


@contextmanager
def following(
    server: SandboxServer,
    store: Store,
    *symbols: str,
    interval: str = "1m",
    clock: VenueClock | None = None,
    lines: list[str] | None = None,
    patience: Patience = QUICK,
) -> Iterator[Follower]:
    """A follower at work in a thread; whatever it raises is raised at the end."""
    request = FetchRequest(symbols or ("BTCUSDT",), interval=interval, since_ms=START)
    connector = BybitConnector(server.base_url, attempts=3, workers=4)
    say = (lambda line: None) if lines is None else lines.append
    follower = Follower(store, connector, request, say=say, clock=clock, patience=patience)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(follower.run)
        try:
            yield follower
        finally:
            follower.stop()
        running.result(timeout=10)
