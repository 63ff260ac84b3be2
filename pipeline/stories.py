"""The same story from several sources is one story.

An item belongs to the story of an earlier item when the title or the begin of the body of one says nearly what that of
the other says: similarity of the sorted words (rapidfuzz) of at least 90 of 100 within two days, the same numbers in
both, and at least four words. Only earlier items are looked at, so a story never changes by what comes later.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable

import polars as pl
from rapidfuzz import fuzz, process

from recur.vocabulary import DAY_MS

WITHIN_MS = 2 * DAY_MS
ALIKE = 90.0
_WORDS = re.compile(r"[^\W_]+(?:[.,]\d+)*", re.UNICODE)
_LEAST_WORDS = 4
_BODY_CHARS = 300
Saying = tuple[str, frozenset[str]]
"""Lower-case words in one string, and the numbers among them."""


def assign_stories(new: pl.DataFrame, known: pl.DataFrame) -> pl.DataFrame:
    """``new`` news items with ``story_id``: that of the first item alike in ``known`` or before it in ``new``.

    ``known`` needs ``news_id, published_at, title, body, story_id``; both are gone through in the order of publication.
    """
    columns = ("news_id", "published_at", "title", "body")
    before = known.select(*columns, "story_id").with_columns(pl.lit(-1).alias("place"))
    now = new.select(columns).with_columns(
        pl.lit(None, dtype=pl.String).alias("story_id"), pl.int_range(pl.len()).alias("place")
    )
    rows = pl.concat([before, now], how="vertical_relaxed").sort("published_at", "place", maintain_order=True)
    found = [""] * new.height
    recent: deque[tuple[int, str, Saying]] = deque()
    for news_id, at, title, body, story, place in rows.iter_rows():
        ms = int(at.timestamp() * 1000)
        while recent and recent[0][0] < ms - WITHIN_MS:
            recent.popleft()
        sayings = [_reduced(text) for text in (title, (body or "")[:_BODY_CHARS]) if text]
        story = story or next(filter(None, (_alike(s, recent) for s in sayings)), None) or news_id
        if place >= 0:
            found[place] = story
        recent.extend((ms, story, saying) for saying in sayings)
    return new.with_columns(pl.Series("story_id", found, dtype=pl.String))


def _reduced(text: str) -> Saying:
    words = _WORDS.findall(text.lower())
    return " ".join(words), frozenset(w for w in words if w[0].isdigit())


def _alike(saying: Saying, recent: Iterable[tuple[int, str, Saying]]) -> str | None:
    words, numbers = saying
    if words.count(" ") + 1 < _LEAST_WORDS:
        return next((story for _, story, (other, _) in recent if words and other == words), None)
    same = [(story, other) for _, story, (other, theirs) in recent if theirs == numbers and " " in other]
    hit = process.extractOne(
        words, [other for _, other in same], scorer=fuzz.token_sort_ratio, score_cutoff=ALIKE
    )
    return same[hit[2]][0] if hit else None
