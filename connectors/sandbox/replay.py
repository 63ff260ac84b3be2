"""A recorded market for the sandbox: serves given candles and funding rows as they are."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from recur.connectors.files import read_candles, read_funding, sniff
from recur.connectors.sandbox.world import (
    Announcement,
    Candles,
    Floats,
    Life,
    Maintenance,
    Millis,
    aggregate,
    instrument_row,
    nests,
)
from recur.vocabulary import INTERVALS, UsageError, VenueRefused, next_open

_PRICES = ("open", "high", "low", "close", "volume", "turnover")
_KEYS = ("category", "symbol", "kind", "interval")


class ReplayMarket:
    """Serves ``candles`` (candle frame) and ``funding`` (category, symbol, funding_time, rate).

    An interval that the frame has is served unchanged, holes included. A coarser one is built from the
    coarsest recorded interval that nests in it, from complete groups only. A finer one is refused with
    10001 "Invalid period!". Nulls are absent values. Raises UsageError for missing columns or no rows.
    """

    def __init__(self, candles: pl.DataFrame, funding: pl.DataFrame | None = None) -> None:
        _require(candles, (*_KEYS, "open_time", *_PRICES), "candle")
        if candles.is_empty():
            raise UsageError("Nothing to replay: the candle frame has no rows.", "Give a file with candles.")
        if funding is not None:
            _require(funding, ("category", "symbol", "funding_time", "rate"), "funding")
        self._frame = candles.sort(*_KEYS, "open_time")
        self._funding = funding
        self._recorded: dict[tuple[str, str, str], list[str]] = {}
        self._ranges: dict[tuple[str, str], int] = {}
        spans = self._frame.group_by(_KEYS).agg(
            pl.col("open_time").min().dt.epoch("ms").alias("first"),
            pl.col("open_time").max().dt.epoch("ms").alias("last"),
        )
        ends = []
        for category, symbol, kind, interval, first, last in spans.sort(_KEYS).iter_rows():
            self._recorded.setdefault((category, symbol, kind), []).append(interval)
            launch = self._ranges.get((category, symbol), first)
            self._ranges[category, symbol] = min(first, launch)
            ends.append(next_open(last, interval))
        for intervals in self._recorded.values():
            intervals.sort(key=list(INTERVALS).index)
        self.start_ms = min(self._ranges.values())
        self.end_ms = max(ends)
        self._cache: dict[tuple[str, str, str, str], Candles] = {}
        self._lock = threading.Lock()

    def symbols(self, category: str) -> list[str]:
        return sorted(symbol for c, symbol in self._ranges if c == category)

    def instrument(self, category: str, symbol: str) -> dict[str, Any]:
        return instrument_row(category, symbol, self._ranges[category, symbol], 0.0001, 480)

    def life(self, category: str, symbol: str) -> Life:
        """From the first recorded bar, without an end."""
        return Life(self._ranges[category, symbol])

    def base_interval(self, category: str, symbol: str, kind: str) -> str:
        """Finest recorded interval; raises VenueRefused when this kind was not recorded."""
        recorded = self._recorded.get((category, symbol, kind))
        if not recorded:
            raise VenueRefused(f"Not recorded: {kind} candles of {symbol}.", ret_code=10001)
        return recorded[0]

    def candles(self, category: str, symbol: str, kind: str, interval: str) -> Candles:
        """Bars of the series; empty when the kind was not recorded, VenueRefused when only coarser was."""
        recorded = self._recorded.get((category, symbol, kind), [])
        usable = [r for r in recorded if nests(r, interval)]
        if recorded and not usable:
            raise VenueRefused("Invalid period!", ret_code=10001)
        source = usable[-1] if usable else interval
        with self._lock:
            key = (category, symbol, kind, interval)
            if key not in self._cache:
                self._cache[key] = aggregate(self._rows(category, symbol, kind, source), source, interval)
            return self._cache[key]

    def funding(self, category: str, symbol: str) -> tuple[Millis, Floats]:
        if self._funding is None:
            return np.empty(0, np.int64), np.empty(0)
        own = self._funding.filter(pl.col("category") == category, pl.col("symbol") == symbol)
        own = own.sort("funding_time")
        return own["funding_time"].dt.epoch("ms").to_numpy(), own["rate"].to_numpy()

    def open_interest(self, category: str, symbol: str, step_ms: int) -> tuple[Millis, Floats]:
        """Not recorded: empty."""
        return np.empty(0, np.int64), np.empty(0)

    def account_ratio(self, category: str, symbol: str, step_ms: int) -> tuple[Millis, Floats]:
        """Not recorded: empty."""
        return np.empty(0, np.int64), np.empty(0)

    def maintenance(self) -> Sequence[Maintenance]:
        """Not recorded: empty."""
        return ()

    def announcements(self) -> Sequence[Announcement]:
        """Not recorded: empty."""
        return ()

    def _rows(self, category: str, symbol: str, kind: str, interval: str) -> Candles:
        wanted = dict(zip(_KEYS, (category, symbol, kind, interval), strict=True))
        own = self._frame.filter(*(pl.col(key) == value for key, value in wanted.items()))
        columns = (own[name].cast(pl.Float64).fill_null(float("nan")).to_numpy() for name in _PRICES)
        return Candles(own["open_time"].dt.epoch("ms").to_numpy(), *columns)


def _require(frame: pl.DataFrame, columns: tuple[str, ...], what: str) -> None:
    missing = [c for c in columns if c not in frame.columns]
    if missing:
        raise UsageError(f"The {what} frame to replay lacks the columns {', '.join(missing)}.")


def replay_files(paths: Sequence[Path]) -> ReplayMarket:
    """The market in files of candles and funding. UsageError when none holds candles."""
    kinds = [(path, sniff(path)) for path in paths]
    candles = [read_candles(path) for path, kind in kinds if kind == "candles"]
    funding = [read_funding(path) for path, kind in kinds if kind == "funding"]
    if not candles:
        raise UsageError("No file of candles was given to replay.", "--replay FILE, repeated for funding.")
    return ReplayMarket(pl.concat(candles), pl.concat(funding) if funding else None)
