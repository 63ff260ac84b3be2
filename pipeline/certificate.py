"""The certificate: for every stored series what is there, what is not and why, how fresh it is, and a hash of it.

The **content hash** of a series is the SHA-256 of its name, its column names and then, column by column, the bytes of
its values in order of time: times as 64-bit integers of UTC milliseconds, numbers as IEEE doubles, both little-endian,
absent values as one NaN. It does not depend on when, whence or in which order the rows came, so two machines with the same
data have the same hash. The hash of the store is that of the sorted lines ``<series> <hash>``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from recur.storage.inventory import StoredSeries
from recur.storage.store import Store
from recur.vocabulary import CANDLE_KINDS, INTERVALS, Series, ceil_open, floor_open, grid, iso, next_open

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Asked = tuple[int, int, str, str]

UNEXPLAINED = "unexplained"
OUTLIER_SIGMAS = 20.0
RULES = {
    "gaps": "points of the grid between the first and the last row that are absent",
    "holes": "all absent ranges, those before the first and after the last row too where they were asked for; "
    "the reason is what the last request for it recorded, or 'unexplained'",
    "zero_volume": "bars with volume 0",
    "outliers": f"closes more than {OUTLIER_SIGMAS:g} robust standard deviations (1.4826 x median absolute deviation "
    "of the log returns of neighbouring bars) from the close before",
}
"""How the figures of a certificate are counted."""


@dataclass(frozen=True, slots=True)
class Hole:
    """``bars`` absent points of the grid in ``[since_ms, until_ms)``, and why."""

    since_ms: int
    until_ms: int
    bars: int
    reason: str

    def as_dict(self) -> dict[str, Any]:
        return {
            "since": iso(self.since_ms),
            "until": iso(self.until_ms),
            "bars": self.bars,
            "reason": self.reason,
        }


def holes(times: Ints, interval: str, asked: Sequence[Asked]) -> list[Hole]:
    """What is absent of a series with rows at ``times`` (ascending UTC ms), with its reason, in order of time.

    ``asked``: ranges in the order of asking. What was never asked, or was recorded as complete and is not, is
    unexplained. Beyond the first and the last row only what was asked counts.
    """
    if not len(times):
        return []
    windows = [(since, until, status, reason) for since, until, status, reason in asked if since < until]
    ends = _next(times, interval)
    before = np.flatnonzero(ends[:-1] < times[1:])
    spans = list(zip(ends[before].tolist(), times[before + 1].tolist(), strict=True))
    first, end = int(times[0]), int(ends[-1])
    if windows:
        start = ceil_open(min(w[0] for w in windows), interval)
        if start < first:
            spans.insert(0, (start, first))
        stop = ceil_open(max(w[1] for w in windows), interval)
        if stop > end:
            spans.append((end, stop))
    since = np.array([w[0] for w in windows], dtype=np.int64)
    until = np.array([w[1] for w in windows], dtype=np.int64)
    out: list[Hole] = []
    for a, b in spans:
        over = np.flatnonzero((since < b) & (until > a))
        cuts = np.unique(np.clip(np.concatenate([[a, b], since[over], until[over]]), a, b))
        inner: list[Hole] = []
        for left, right in zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True):
            last = over[(since[over] <= left) & (until[over] >= right)]
            window = windows[int(last[-1])] if len(last) else None
            inside = first < left < end
            if window is None and not inside:
                continue  # beyond the rows, between two requests
            reason = window[3] if window and window[2] == "gap" else UNEXPLAINED
            bars = count(left, right, interval)
            if inner and inner[-1].reason == reason and inner[-1].until_ms == left:
                inner[-1] = Hole(inner[-1].since_ms, right, inner[-1].bars + bars, reason)
            else:
                inner.append(Hole(left, right, bars, reason))
        out += [hole for hole in inner if hole.bars]
    return out


def count(since_ms: int, until_ms: int, interval: str) -> int:
    """Points of the grid in ``[since, until)``."""
    step = INTERVALS[interval]
    if not step:
        return len(grid(since_ms, until_ms, interval))
    return max(0, -(-(until_ms - ceil_open(since_ms, interval)) // step))


def _next(times: Ints, interval: str) -> Ints:
    step = INTERVALS[interval]
    if step:
        return times + step
    return np.array([next_open(int(t), interval) for t in times], dtype=np.int64)


def outliers(times: Ints, close: Floats, interval: str) -> int:
    """Bars whose close is an outlier against the bar before, as ``RULES`` says; closes must be above 0 to count."""
    if len(times) < 3:
        return 0
    with np.errstate(invalid="ignore", divide="ignore"):
        returns = np.diff(np.log(close))
    returns = returns[(_next(times[:-1], interval) == times[1:]) & np.isfinite(returns)]
    if not len(returns):
        return 0
    centre = np.median(returns)
    spread = 1.4826 * float(np.median(np.abs(returns - centre)))
    return int((np.abs(returns - centre) > OUTLIER_SIGMAS * spread).sum()) if spread > 0 else 0


def content_hash(name: str, frame: pl.DataFrame) -> str:
    """The hash of one series; ``frame`` holds its time and its values, sorted by time."""
    digest = hashlib.sha256(f"{name}\n{','.join(frame.columns)}\n".encode())
    for column in frame.iter_columns():
        if column.dtype.is_temporal():
            digest.update(np.ascontiguousarray(column.dt.timestamp("ms").to_numpy(), dtype="<i8").data)
            continue
        values = np.ascontiguousarray(column.to_numpy(), dtype="<f8")
        absent = np.isnan(values)
        if absent.any() or not values.all():  # one NaN for all, and no negative zero
            values = np.where(absent, np.nan, values + 0.0)
        digest.update(values.data)
    return digest.hexdigest()


def store_hash(hashes: Iterable[tuple[str, str]]) -> str:
    """The hash of a store from the (name, hash) of its series."""
    return hashlib.sha256("".join(f"{n} {h}\n" for n, h in sorted(hashes)).encode()).hexdigest()


def name_of(series: Series) -> str:
    """``str(series)``, and ``bybit:linear:BTCUSDT:funding`` for what has no interval."""
    return str(series) if series.interval else f"bybit:{series.category}:{series.symbol}:{series.kind}"


def certify(store: Store, now_ms: int) -> dict[str, Any]:
    """The certificate of a store: ``series`` of candles and ``measures`` (funding, open interest, long/short ratios), one
    object each, ``sha256`` of all, and the ``rules`` of counting.

    Each has its name and parts, ``rows``, ``first``, ``last``, ``gaps`` and ``missing`` bars between them, the
    ``holes`` with reasons, ``unexplained`` bars, ``zero_volume``, ``outliers``, ``revisions``, ``age_hours`` since the
    last row, closed bars it lies ``behind``, and ``sha256``. Figures that a kind does not have are None.
    """
    with store.session():
        out = [_certified(store, stored, now_ms) for stored in store.inventory()]
    return {
        "series": [row for row in out if row["kind"] in CANDLE_KINDS],
        "measures": [row for row in out if row["kind"] not in CANDLE_KINDS],
        "sha256": store_hash((row["series"], row["sha256"]) for row in out),
        "rules": RULES,
    }


def _certified(store: Store, stored: StoredSeries, now_ms: int) -> dict[str, Any]:
    series, frame = stored.series, store.rows(stored.series)
    times = frame.get_column(stored.time).dt.timestamp("ms").to_numpy()
    last, name = int(times[-1]), name_of(series)
    row: dict[str, Any] = {
        "series": name, "category": series.category, "symbol": series.symbol, "interval": series.interval,
        "kind": series.kind, "rows": frame.height, "first": iso(int(times[0])), "last": iso(last),
    }  # fmt: skip
    asked = store.asked(series)
    if series.interval:
        absent = holes(times, series.interval, asked)
        end = next_open(last, series.interval)
        inner = [hole for hole in absent if times[0] < hole.since_ms < end]
        row |= {
            "gaps": _runs(inner),
            "missing": sum(hole.bars for hole in inner),
            "holes": [hole.as_dict() for hole in absent],
            "unexplained": sum(hole.bars for hole in absent if hole.reason == UNEXPLAINED),
            "behind": count(end, floor_open(now_ms, series.interval), series.interval),
        }
    else:
        row |= dict.fromkeys(("gaps", "missing", "unexplained", "behind"))
        row["holes"] = [
            Hole(since, until, 0, reason).as_dict()
            for since, until, status, reason in asked
            if status == "gap"
        ]
    bars = "close" in frame.columns
    return row | {
        "zero_volume": int((frame["volume"] == 0).sum()) if bars else None,
        "outliers": outliers(times, frame["close"].to_numpy(), series.interval) if bars else None,
        "revisions": stored.revisions,
        "age_hours": round((now_ms - last) / 3_600_000, 2),
        "sha256": content_hash(name, frame),
    }


def _runs(found: Sequence[Hole]) -> int:
    """How many unbroken gaps: one may have several reasons."""
    return sum(1 for i, hole in enumerate(found) if i == 0 or found[i - 1].until_ms != hole.since_ms)
