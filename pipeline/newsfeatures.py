"""What the news said, as of each bar's close: decayed sums, counts, disagreement, novelty, silence.

An item counts from the instant at which it could have been known, never from the one it bears:

    stated time ──▶ end of what it states (a date: the next midnight; a minute: its end)
                ──▶ not before it was first seen (not for archives, whose first-seen time is that of the import)
                ──▶ plus a latency

An edited item changes its weight from the instant its new version was seen. "No news" is a state of its own: the mean
is then absent, not neutral.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy.signal import lfilter

from recur.pipeline.entities import mentions
from recur.vocabulary import DAY_MS, HOUR_MS

Floats = NDArray[np.float64]
HALF_LIVES_H = (6, 24, 72)
DEFAULT_LATENCY_S = 60.0
"""Between an item being seen and a forecast being able to use it."""
_MEMORY_H = 24
_LONGEST_SILENCE_H = 30 * 24.0
_ENDS_MS = {"ms": 0, "s": 1_000, "minute": 60_000, "day": DAY_MS}
SCOPES = ("own", "all")
NAMES: tuple[str, ...] = tuple(
    f"news_{scope}_{name}"
    for scope in SCOPES
    for name in (*(f"sum_{h}" for h in HALF_LIVES_H), *(f"count_{h}" for h in HALF_LIVES_H),
                 "mean", "disagreement", "novelty", "silence", "any")
)  # fmt: skip
"""``own``: items that speak of the series' coin; ``all``: every item."""


def known_at_ms(news: pl.DataFrame, latency_s: float = DEFAULT_LATENCY_S) -> pl.Series:
    """When each version of an item (a news frame) could first be used, in UTC ms.

    The stated precision is rounded up: a date is known at the next midnight, a minute at its end.
    """
    published = pl.col("published_at").dt.epoch("ms")
    length = pl.col("published_precision").replace_strict(_ENDS_MS, default=DAY_MS, return_dtype=pl.Int64)
    # the end of the day, minute or second that the stated time lies in
    end = pl.when(length > 0).then((published // length.clip(1) + 1) * length).otherwise(published)
    seen = pl.col("first_seen").dt.epoch("ms")
    archived = pl.col("backfill").fill_null(False) & (pl.col("version") == 1)
    known = pl.when(archived).then(end).otherwise(pl.max_horizontal(end, seen))
    return news.select((known + int(latency_s * 1000)).alias("known_ms")).to_series()


@dataclass(frozen=True, slots=True)
class Items:
    """Versions of items, sorted by ``known_ms``. ``score`` is p_positive − p_negative, NaN where not scored.

    ``first_ms``: when the item's first version was known; ``weight`` changes (an edit takes back the old score);
    ``new_story``: the first item of its story by ``known_ms``.
    """

    text: tuple[str, ...]
    known_ms: NDArray[np.int64]
    first_ms: NDArray[np.int64]
    score: Floats
    is_edit: NDArray[np.bool_]
    old_score: Floats
    new_story: NDArray[np.bool_]

    def only(self, keep: NDArray[np.bool_]) -> Items:
        return Items(
            tuple(t for t, k in zip(self.text, keep, strict=True) if k),
            *(getattr(self, f)[keep] for f in self.__slots__[1:]),
        )


def make_items(
    news: pl.DataFrame, scores: pl.DataFrame | None, latency_s: float = DEFAULT_LATENCY_S
) -> Items:
    """``news``: all versions (a news frame); ``scores``: news_id, version, p_negative, p_positive, if there are any."""
    frame = news.with_columns(known_at_ms(news, latency_s))
    if scores is not None:
        score = scores.select(
            "news_id", "version", (pl.col("p_positive") - pl.col("p_negative")).alias("score")
        )
        frame = frame.join(score, on=["news_id", "version"], how="left")
    else:
        frame = frame.with_columns(pl.lit(None, dtype=pl.Float64).alias("score"))
    next_known = pl.col("known_ms").cum_min(reverse=True).shift(-1).over("news_id", order_by="version")
    # a version that a later one has replaced before it could be used never counts
    frame = frame.filter(next_known.is_null() | (pl.col("known_ms") < next_known))
    frame = frame.sort("known_ms", "news_id", "version").with_columns(
        pl.col("known_ms").min().over("news_id").alias("first_ms"),
        pl.col("score").shift(1).over("news_id").alias("old_score"),
        (pl.int_range(pl.len()).over("news_id") > 0).alias("is_edit"),
        (pl.int_range(pl.len()).over(pl.coalesce("story_id", "news_id")) == 0).alias("new_story"),
    )
    texts = frame.select(
        pl.concat_str(pl.col("title").fill_null(""), pl.lit(" "), pl.col("body").fill_null(""))
    )
    return Items(
        tuple(texts.to_series()),
        frame["known_ms"].to_numpy(),
        frame["first_ms"].to_numpy(),
        frame["score"].fill_null(np.nan).to_numpy(),
        frame["is_edit"].to_numpy(),
        frame["old_score"].fill_null(np.nan).to_numpy(),
        frame["new_story"].to_numpy(),
    )


def news_columns(symbol: str, close_ms: NDArray[np.int64], items: Items) -> pl.DataFrame:
    """One row per bar (bars of a regular grid, ``close_ms`` ascending), the columns of ``NAMES``."""
    own = items.only(np.array(mentions(symbol, items.text), dtype=bool))
    parts: dict[str, Floats] = {}
    for scope, chosen in zip(SCOPES, (own, items), strict=True):
        parts |= {f"news_{scope}_{k}": v for k, v in _scope(close_ms, chosen).items()}
    return pl.DataFrame({name: parts[name] for name in NAMES}, nan_to_null=True)


def _scope(close_ms: NDArray[np.int64], items: Items) -> dict[str, Floats]:
    at = np.searchsorted(close_ms, items.known_ms, side="left")  # the first bar that closes when it is known
    seen = at < len(close_ms)
    items, at = items.only(seen), at[seen]
    scored = np.isfinite(items.score)
    value = np.where(scored, items.score, 0.0)
    old = np.where(items.is_edit & np.isfinite(items.old_score), items.old_score, 0.0)
    first, once = ~items.is_edit, np.where(items.is_edit, 0.0, 1.0)
    out: dict[str, Floats] = {}

    def decayed(amount: Floats, half_life_h: float) -> Floats:
        return _decayed(close_ms, at, items.first_ms, amount, half_life_h)

    for h in HALF_LIVES_H:
        out[f"sum_{h}"] = decayed(value - old, h)
        out[f"count_{h}"] = np.log1p(decayed(once, h).clip(0))
    n = decayed(once, _MEMORY_H)
    n_scored = decayed(scored.astype(float) - np.isfinite(items.old_score), _MEMORY_H)
    enough = n_scored > 1e-3
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = decayed(value - old, _MEMORY_H) / n_scored
        square = decayed(value**2 - old**2, _MEMORY_H) / n_scored
        out["mean"] = np.where(enough, mean, np.nan)
        out["disagreement"] = np.where(enough, np.sqrt(np.clip(square - mean**2, 0, None)), np.nan)
        fresh = decayed((items.new_story & first).astype(float), _MEMORY_H)
        out["novelty"] = np.where(n > 1e-3, fresh / n, np.nan)
    last = np.full(len(close_ms), -np.inf)
    np.maximum.at(last, at[first], items.known_ms[first].astype(float))
    silence = (close_ms - np.maximum.accumulate(last)) / HOUR_MS
    out["silence"] = np.log1p(np.minimum(silence, _LONGEST_SILENCE_H))
    out["any"] = (silence <= _MEMORY_H).astype(float)
    return out


def _decayed(
    close_ms: NDArray[np.int64],
    at: NDArray[np.int64],
    since_ms: NDArray[np.int64],
    amount: Floats,
    half_life_h: float,
) -> Floats:
    """Σ amount · 2^(−age/half-life) at every close; ``age`` runs from ``since_ms``, the amount counts from bar ``at``."""
    added = np.zeros(len(close_ms))
    age_h = (close_ms[at] - since_ms) / HOUR_MS
    np.add.at(added, at, amount * 2.0 ** (-age_h / half_life_h))
    if len(close_ms) < 2:
        return added
    per_bar = 2.0 ** (-(float(close_ms[1] - close_ms[0]) / HOUR_MS) / half_life_h)
    out: Floats = lfilter([1.0], [1.0, -per_bar], added)
    return out


def lookback_bars(interval_ms: int) -> int:
    """Bars after which the weight of an item is below 1e-9 at the longest half-life."""
    return int(np.ceil(30 * max(HALF_LIVES_H) * HOUR_MS / interval_ms))


def shuffled_within_month(news: pl.DataFrame, seed: int) -> pl.DataFrame:
    """The same items with their times dealt anew among those of each month: a placebo.

    Times (published, first seen, precision) move together; what is said, and how much in a month, stays.
    """
    rng = np.random.default_rng(seed)
    moved: Sequence[str] = ("published_at", "published_precision", "first_seen", "backfill")
    month = news["published_at"].dt.strftime("%Y-%m").to_numpy()
    order = np.arange(news.height)
    for name in np.unique(month):
        place = np.flatnonzero(month == name)
        order[place] = rng.permutation(place)
    return news.with_columns(news.select(moved)[order.tolist()].get_columns())
