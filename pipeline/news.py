"""News into the store: from feeds, from the venue's announcements, from files.

bytes ──connectors──▶ clean, dated items ──stories──▶ Store.put_news (an edit is a further version)
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import polars as pl

from recur.connectors.announcements import as_items, key_of, read_pages
from recur.connectors.bybit import BybitConnector
from recur.connectors.feeds import download, in_languages, news_frame, read_feed
from recur.pipeline.config import NewsConfig
from recur.pipeline.stories import WITHIN_MS, assign_stories
from recur.storage.store import Store
from recur.vocabulary import UsageError, VenueError


def put_items(
    store: Store,
    frame: pl.DataFrame,
    *,
    source: str,
    now_ms: int,
    languages: Sequence[str],
    backfill: bool = False,
) -> dict[str, Any]:
    """Store a news frame: items of other languages left out, stories told from each other; says what came of it."""
    kept = frame.filter(in_languages(frame, languages))
    result: dict[str, Any] = {
        "source": source,
        "items": frame.height,
        "other_language": frame.height - kept.height,
    }
    if kept.is_empty():
        return {**result, "new": 0, "changed": 0, "same": 0, "repeats": 0}
    kept = kept.unique("news_id", keep="last", maintain_order=True)
    published = kept["published_at"].dt.epoch("ms").to_list()
    first, last = min(published), max(published)
    known = (
        store.news(since_ms=first - WITHIN_MS, until_ms=last + 1)
        if store.path.exists()
        else kept.clear().with_columns(pl.lit(None, dtype=pl.String).alias("story_id"))
    )
    told = assign_stories(kept.filter(~pl.col("news_id").is_in(known["news_id"].implode())), known)
    edited = kept.join(known.select("news_id", "story_id"), on="news_id", how="inner")
    rows = pl.concat([told, edited.select(told.columns)])
    put = store.put_news(rows, source=source, now_ms=now_ms, backfill=backfill)
    repeats = told.filter(pl.col("story_id") != pl.col("news_id")).height
    return {**result, "new": put.new, "changed": put.changed, "same": put.same, "repeats": repeats}


def fetch_feeds(
    store: Store, urls: Sequence[str], now_ms: int, languages: Sequence[str]
) -> list[dict[str, Any]]:
    """Read every feed and store what is in it. A feed that fails does not cost the others; then its error is raised."""
    done: list[dict[str, Any]] = []
    errors: list[VenueError] = []
    for url in urls:
        try:
            frame = read_feed(download(url), url, now_ms)
        except VenueError as error:
            errors.append(error)
            continue
        done.append(put_items(store, frame, source=url, now_ms=now_ms, languages=languages))
    if errors:
        raise errors[0]
    return done


def fetch_texts(
    store: Store, connector: BybitConnector, kinds: Sequence[str], config: NewsConfig, now_ms: int
) -> list[dict[str, Any]]:
    """Bring in the ``announcements`` and the ``news`` feeds named by ``config``; what came of each source.

    ``now_ms`` dates what feeds say; announcements are dated by the venue's own clock.
    """
    done = []
    if "announcements" in kinds:
        done.append(fetch_announcements(store, connector, config.locale))
    if "news" in kinds:
        if not config.feeds:
            raise UsageError(
                "There is no feed to read news from.", "Name some: --set 'news.feeds=[\"https://…/rss\"]'."
            )
        done += fetch_feeds(store, config.feeds, now_ms, config.languages)
    return done


def fetch_announcements(store: Store, connector: BybitConnector, locale: str) -> dict[str, Any]:
    """Read the venue's announcements until only known ones come, and store them."""
    now_ms = connector.server_time_ms()
    known: set[str] = set()
    if store.path.exists():
        items = store.news().filter(pl.col("source") == "bybit announcements")
        known = {
            key_of({"url": url, "title": title}) for url, title in items.select("url", "title").iter_rows()
        }

    rows = read_pages(partial(connector.announcements_page, locale), lambda row: key_of(row) in known)
    frame = news_frame(as_items(rows, now_ms))
    return put_items(store, frame, source="bybit announcements", now_ms=now_ms, languages=(locale[:2], "en"))
