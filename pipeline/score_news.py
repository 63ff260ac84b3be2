"""``recur sentiment --stored``: scores of the stored news into the ``sentiment`` table, each version of an item once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from recur.pipeline.sentiment import SentimentModel, contaminated, open_sentiment, score_texts
from recur.storage.store import Store
from recur.vocabulary import from_ms

BATCH = 5_000
"""Items scored and stored at once: a killed run loses at most so many."""
TEXT_LIMIT = 2_000
"""Characters of an item that are read, its title first."""


def score_stored(home: Path, store: Store, run: str | None, now_ms: int) -> dict[str, Any]:
    """Score what the run (None: the newest sentiment run) has not scored yet.

    Items that the model may have learned from (its own texts, or published in their time) are scored and marked
    ``contaminated``. Items with nothing to read get no score. Raises DataMissing without a run or a store.
    """
    model = open_sentiment(home, run)
    waiting = store.unscored(model.run_id)
    scored = marked = unread = 0
    for part in waiting.iter_slices(BATCH):
        rows = _scores(model, part, now_ms)
        readable = rows.filter(pl.col("p_positive").is_finite())
        unread += rows.height - readable.height
        scored += store.put_sentiment(readable)
        marked += int(readable["contaminated"].sum())
    return {
        "run_id": model.run_id,
        "scored": scored,
        "contaminated": marked,
        "unread": unread,
        "training_window": None if model.window is None else [from_ms(ms) for ms in model.window],
    }


def item_texts(items: pl.DataFrame) -> list[str]:
    """What is read of each item of a news frame: its title and the begin of its body."""
    both = pl.concat_str(pl.col("title").fill_null(""), pl.lit(". "), pl.col("body").fill_null(""))
    return items.select(both.str.strip_chars(" .").str.head(TEXT_LIMIT)).to_series().to_list()


def _scores(model: SentimentModel, part: pl.DataFrame, now_ms: int) -> pl.DataFrame:
    texts = item_texts(part)
    titles = part["title"].fill_null("").to_list()
    published = part["published_at"].dt.epoch("ms").to_list()
    bodies = part["body"].fill_null("").to_list()
    known = np.array(contaminated(model, titles, published)) | np.array(contaminated(model, texts))
    known |= np.array(contaminated(model, bodies))
    p = score_texts(model, texts)
    return part.select("news_id", "version").with_columns(
        pl.lit(model.run_id).alias("run_id"),
        pl.lit(from_ms(now_ms)).cast(pl.Datetime("ms", "UTC")).alias("scored_at"),
        *(pl.Series(name, p[:, k]) for k, name in enumerate(("p_negative", "p_neutral", "p_positive"))),
        pl.Series("contaminated", known),
    )
