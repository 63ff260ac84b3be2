"""``recur train sentiment --label-from-market``: dated texts labelled by what the price did after them.

    texts of files, or stored news ──entity map──▶ symbol ──stored candles──▶ reaction ──▶ label ──time──▶ part

The parts follow one another in time and a label belongs to a part only when its window closed before the next begins::

    ├──────── train ────────┤purged├─ validation ─┤purged├───── test ─────┤
                            train_until           known_until

Where the parts begin depends on the times of texts and candles alone, never on a price. Of texts that read the same the
earliest stays. An edited item is read as it was first published.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from recur.pipeline.config import Config
from recur.pipeline.entities import mentions
from recur.pipeline.labelled import CLASSES, Texts, read_dated
from recur.pipeline.reaction import AFTER, BEFORE, ReactionPlan, reactions
from recur.pipeline.score_news import item_texts
from recur.pipeline.text import fingerprint
from recur.storage.store import Store
from recur.vocabulary import DAY_MS, INTERVALS, DataMissing, Series, UsageError, iso, parse_time

TEST_SHARE = 0.2
"""Share of the texts, the latest, that nothing is learned from."""
LEADER = "BTCUSDT"
"""What of another coin's move this one explains is no reaction to a text."""
UNDATED, UNNAMED, BARE = "without a time", "speaks of no symbol", "no candles of its symbol"


@dataclass(frozen=True, slots=True)
class MarketTexts:
    """Labelled ``texts`` with their parts in ``split``; ``summary`` goes to the manifest.

    Training labels were known by ``train_until_ms``; the test part begins at ``known_until_ms`` and all other labels were
    known by ``learned_until_ms``, at most as late. ``days`` is the UTC day on which each text (by fingerprint) became
    usable; ``sha256`` is of texts, labels and parts.
    """

    texts: Texts
    train_until_ms: int
    known_until_ms: int
    learned_until_ms: int
    days: dict[str, int]
    summary: dict[str, Any]
    sha256: str


def label_from_market(store: Store, config: Config, files: Sequence[Path], validation: float) -> MarketTexts:
    """Label the texts of ``files``, or without files the stored news, by the stored candles of ``config.market``.

    ``validation`` is the share of the texts before the test part that decides when to stop. ``config.train`` bounds the
    times of publication. Raises DataMissing without news or candles, UsageError when too few labels come of them.
    """
    market, s = config.market, config.sentiment
    step = INTERVALS[market.interval]
    if not step:
        raise UsageError(
            f"Reactions are not measured in bars of {market.interval}.", "Give a fixed --interval."
        )
    plan = ReactionPlan(
        s.reaction_bars, s.reaction_threshold, s.reaction_history, int(1000 * s.reaction_latency_s)
    )
    items = read_dated(files) if files else _stored(store)
    rows = items.height
    items, duplicates = _once(_within(items, config))
    items = items.with_columns(_symbols(items, market.symbols))
    others = [symbol for symbol in market.symbols if symbol != LEADER]
    leader = store.candles(market.category, [LEADER], market.interval) if others else pl.DataFrame()
    frame = _react(store, config, items, step, plan, None if leader.is_empty() else leader)
    inside = frame.filter(pl.col("usable_ms").is_not_null())["usable_ms"].sort()
    if len(inside) < 10:
        reasons = _counts(frame["why"])
        raise UsageError(
            f"{rows} texts leave {len(inside)} inside the candles: {_said(reasons)}.",
            "Fetch candles of the time of the texts, or name the symbols they speak of with --symbols.",
        )
    train_until = int(inside[int((1 - TEST_SHARE - validation) * len(inside))])
    known_until = int(inside[int((1 - TEST_SHARE) * len(inside))])
    frame = frame.with_columns(_part(train_until, known_until))
    kept = frame.filter(pl.col("label").is_not_null() & (pl.col("split") != "purged"))
    if not (kept["split"] == "validation").any():  # a part drawn at random instead would not keep to the time
        raise UsageError(
            f"{rows} texts leave none to validate between {iso(train_until)} and {iso(known_until)}: the windows of all"
            f" of that part reach into the test part, or have no label ({_said(_counts(frame['why']))}).",
            "Give texts of a longer time, or lower sentiment.reaction_bars.",
        )
    texts = Texts(
        kept["text"].to_list(),
        (kept["label"] + 1).to_numpy().astype(np.int64),
        kept["split"].to_list(),
        kept["published"].to_list(),
        kept["fingerprint"].to_list(),
        {"rows": rows, "duplicates": duplicates, "unlabelled": frame["why"].count()},
    )
    summary = {
        "labels": "reaction",
        "texts_from": [str(path) for path in files] or "stored news",
        "candles": [str(Series(market.category, symbol, market.interval)) for symbol in market.symbols],
        "market": None if leader.is_empty() else LEADER,
        "plan": asdict(plan),
        "train_until": iso(train_until),
        "known_until": iso(known_until),
        "classes": {part: _classes(kept.filter(pl.col("split") == part)) for part in _PARTS},
        "purged": int((frame["label"].is_not_null() & (frame["split"] == "purged")).sum()),
        "unlabelled": _counts(frame["why"]),
    }
    digest = sha256("\n".join(map(str, kept.select("fingerprint", "label", "split").iter_rows())).encode())
    days = dict(zip(kept["fingerprint"], (kept["usable_ms"] // DAY_MS).to_list(), strict=True))
    learned = kept.filter(pl.col("split") != "test")["known_ms"].max()
    return MarketTexts(
        texts, train_until, known_until, int(str(learned or train_until)), days, summary, digest.hexdigest()
    )


_PARTS = ("train", "validation", "test")


def against_majority(
    probability: NDArray[np.floating[Any]], test: Texts, train: Texts, days: dict[str, int]
) -> dict[str, Any]:
    """Accuracy gained on ``test`` over always saying the commonest class of ``train``.

    ``se`` is its standard error; texts of one UTC day share their market and count as one (Liang & Zeger 1986,
    Biometrika 73: sums by cluster).
    """
    usual = int(np.bincount(train.label, minlength=len(CLASSES)).argmax())
    right = np.where(np.isfinite(probability).all(axis=1), probability.argmax(axis=1), -1) == test.label
    gained = right.astype(float) - (test.label == usual)
    _, day = np.unique([days[f] for f in test.fingerprints], return_inverse=True)
    sums = np.bincount(day, weights=gained - gained.mean())
    return {
        "class": CLASSES[usual],
        "accuracy": float((test.label == usual).mean()),
        "gain": float(gained.mean()),
        "se": float(np.sqrt((sums**2).sum()) / len(gained)),
        "days": len(sums),
    }


def _stored(store: Store) -> pl.DataFrame:
    """Stored news as :func:`read_dated` gives them: the first version of every item."""
    items = store.news_versions().filter(pl.col("version") == 1)
    if items.is_empty():
        raise DataMissing(
            f"The store {store.path} holds no news to label.",
            "Run 'recur fetch --source NEWSFILE', or give dated texts with --data FILE.",
        )
    return items.select(
        pl.Series("text", item_texts(items), dtype=pl.String),
        pl.col("published_at").dt.epoch("ms").alias("published"),
        (pl.col("published_precision") == "day").fill_null(True).alias("day"),
        pl.lit(None, dtype=pl.String).alias("symbol"),
    )


def _within(items: pl.DataFrame, config: Config) -> pl.DataFrame:
    """Items published in ``[train.since, train.until)``, where these are given; undated ones stay to be counted."""
    for bound, test in (
        (config.train.since, pl.col("published").ge),
        (config.train.until, pl.col("published").lt),
    ):
        if bound:
            items = items.filter(test(parse_time(bound)) | pl.col("published").is_null())
    return items


def _once(items: pl.DataFrame) -> tuple[pl.DataFrame, int]:
    """The earliest of the texts that read the same, in order of time, and how many were left out."""
    marks = [fingerprint(text) if (text or "").strip() else None for text in items["text"]]
    readable = items.with_columns(pl.Series("fingerprint", marks, dtype=pl.String)).filter(
        pl.col("fingerprint").is_not_null()
    )
    first = readable.sort("published", nulls_last=True, maintain_order=True).unique(
        "fingerprint", keep="first", maintain_order=True
    )
    return first, readable.height - first.height


def _symbols(items: pl.DataFrame, symbols: Sequence[str]) -> pl.Series:
    """The symbol of each item: its own if that is one of ``symbols``, else the first of them that it speaks of."""
    found = items["symbol"].to_list()
    own = [name is not None for name in found]
    for symbol in reversed(symbols):
        for k, spoken in enumerate(mentions(symbol, items["text"].to_list())):
            if spoken and not own[k]:
                found[k] = symbol
    return pl.Series("symbol", [name if name in symbols else None for name in found], dtype=pl.String)


def _react(
    store: Store,
    config: Config,
    items: pl.DataFrame,
    step: int,
    plan: ReactionPlan,
    leader: pl.DataFrame | None,
) -> pl.DataFrame:
    """``items`` with usable_ms, known_ms, label and why, in order of time. usable_ms is null outside the candles."""
    market = config.market
    undated = items.filter(pl.col("published").is_null()).with_columns(why=pl.lit(UNDATED))
    unnamed = items.filter(pl.col("published").is_not_null() & pl.col("symbol").is_null()).with_columns(
        why=pl.lit(UNNAMED)
    )
    parts, bare = [undated, unnamed], []
    for symbol in market.symbols:
        mine = items.filter(pl.col("published").is_not_null() & (pl.col("symbol") == symbol))
        candles = store.candles(market.category, [symbol], market.interval)
        if candles.is_empty():
            bare.append(symbol)
            parts.append(mine.with_columns(why=pl.lit(BARE)))
            continue
        found = reactions(
            mine["published"].to_numpy(),
            mine["day"].to_numpy(),
            candles,
            step,
            plan,
            None if symbol == LEADER else leader,
        )
        outside = pl.col("why").is_in([BEFORE, AFTER]).fill_null(False)
        found = found.with_columns(usable_ms=pl.when(~outside).then("usable_ms"))
        parts.append(mine.hstack(found.select("usable_ms", "known_ms", "label", "why")))
    if len(bare) == len(market.symbols):
        raise DataMissing(
            f"The store {store.path} holds no {market.category} {market.interval} candles of {', '.join(bare)}.",
            f"Run 'recur fetch -s {','.join(bare)} -i {market.interval}' first; 'recur status' lists what is stored.",
        )
    return pl.concat(parts, how="diagonal").sort("published", "fingerprint", nulls_last=True)


def _part(train_until: int, known_until: int) -> pl.Expr:
    usable, known = pl.col("usable_ms"), pl.col("known_ms")
    return (
        pl.when(usable >= known_until)
        .then(pl.lit("test"))
        .when((usable >= train_until) & (known <= known_until))
        .then(pl.lit("validation"))
        .when(known <= train_until)
        .then(pl.lit("train"))
        .otherwise(pl.lit("purged"))
        .alias("split")
    )


def _classes(frame: pl.DataFrame) -> dict[str, int]:
    return {name: int((frame["label"] == k - 1).sum()) for k, name in enumerate(CLASSES)}


def _counts(why: pl.Series) -> dict[str, int]:
    return {str(name): int(n) for name, n in why.drop_nulls().value_counts().sort("why").iter_rows()}


def _said(reasons: dict[str, int]) -> str:
    return "; ".join(f"{n} {name}" for name, n in reasons.items()) or "none has a label"
