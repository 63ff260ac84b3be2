"""News from RSS and Atom feeds as news frames. Parsing is feedparser's; this file is what makes it safe and dated.

A news frame has the columns ``news_id, published_at, published_precision, title, body, url, source, tags``.
``published_precision`` says how exact the stated time is: an item with a date only (``day``) cannot be taken as known
before the day has ended.
"""

from __future__ import annotations

import calendar
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import urlsplit

import feedparser
import polars as pl
import requests

from recur.connectors.cleantext import BODY_LIMIT, TITLE_LIMIT, clean, latin_share
from recur.connectors.language import UNKNOWN, language_of
from recur.vocabulary import VenueError, VenueRefused, VenueUnreachable

NEWS_COLUMNS = pl.Schema(
    {
        "news_id": pl.String(),
        "published_at": pl.Datetime("ms", "UTC"),
        **dict.fromkeys(("published_precision", "title", "body", "url", "source", "tags"), pl.String()),
    }
)
MAX_BYTES = 5_000_000
MAX_ITEMS = 2_000
_LATIN_LANGUAGES = {"en", "de", "es", "fr", "it", "nl", "pt", "pl", "tr", "id", "vi"}
_CLOCK = re.compile(r"\d{1,2}:\d{2}(:\d{2})?")
_TELLING_CHARS = 300  # of a body, besides the title, are looked at for the language
_AGENT = "recur (news reader)"


def download(url: str, timeout_s: float = 10.0) -> bytes:
    """The body of a feed, at most ``MAX_BYTES``. Raises VenueUnreachable, or VenueRefused for a refusal."""
    try:
        with requests.get(url, timeout=timeout_s, stream=True, headers={"User-Agent": _AGENT}) as answer:
            if answer.status_code >= 500 or answer.status_code == 429:
                raise VenueUnreachable(f"{url}: HTTP status {answer.status_code}.", "Try again later.")
            if answer.status_code != 200:
                raise VenueRefused(f"{url}: HTTP status {answer.status_code}.", "Check the feed's address.")
            parts, size = [], 0
            for part in answer.iter_content(65_536):
                parts.append(part)
                size += len(part)
                if size > MAX_BYTES:
                    raise VenueError(
                        f"{url}: the feed is larger than {MAX_BYTES:,} bytes; nothing was taken."
                    )
            return b"".join(parts)
    except requests.RequestException as error:
        raise VenueUnreachable(
            f"{url}: no answer ({type(error).__name__}).", "Check the network and the feed's address."
        ) from error


def read_feed(body: bytes, url: str, now_ms: int) -> pl.DataFrame:
    """The items of an RSS or Atom document as a news frame, in its order.

    An undated item counts as published when it was seen (``now_ms``). Raises VenueError for a document that is no
    feed, or that declares entities: no honest feed needs them.
    """
    if b"<!ENTITY" in body[:200_000]:
        raise VenueError(f"{url}: the feed declares entities of its own; nothing was taken.")
    parsed = feedparser.parse(body, sanitize_html=False, resolve_relative_uris=False)
    if not parsed.entries:
        if parsed.get("version"):
            return NEWS_COLUMNS.to_frame()
        raise VenueError(f"{url}: this is neither RSS nor Atom.", "Give the address of the feed itself.")
    source = urlsplit(url).hostname or url
    return news_frame(_item(dict(entry), source, now_ms) for entry in parsed.entries[:MAX_ITEMS])


def _item(entry: Mapping[str, Any], source: str, now_ms: int) -> dict[str, Any]:
    body = entry.get("summary") or ""
    if content := entry.get("content"):
        body = content[0].get("value") or body
    stated = str(entry.get("published") or entry.get("updated") or "")
    moment = entry.get("published_parsed") or entry.get("updated_parsed")
    link = str(entry.get("link") or "")
    return {
        "key": str(entry.get("id") or link or f"{entry.get('title')}{stated}"),
        "published_ms": calendar.timegm(moment) * 1000 if moment else now_ms,
        "precision": _precision(stated) if moment else "s",
        "title": entry.get("title"),
        "body": body,
        "url": link,
        "source": source,
        "tags": [str(tag.get("term")) for tag in entry.get("tags") or () if tag.get("term")],
    }


def _precision(stated: str) -> str:
    clock = _CLOCK.search(stated)
    if clock is None:
        return "day"
    return "s" if clock.group(1) else "minute"


def news_frame(items: Iterable[Mapping[str, Any]]) -> pl.DataFrame:
    """Clean items (key, published_ms, precision, title, body, url, source, tags) as a news frame.

    Items without any text are left out. The id is made of source and key, so that an edit keeps it.
    """
    rows = []
    for item in items:
        title, body = clean(item["title"], TITLE_LIMIT), clean(item["body"], BODY_LIMIT)
        if not title and not body:
            continue
        if not title:
            title = clean(body, TITLE_LIMIT)
        source = clean(item["source"], 100)
        digest = hashlib.sha256(f"{source}\n{item['key']}".encode("utf-8", "replace")).hexdigest()
        tags = [clean(tag, 50) for tag in item["tags"][:20]]
        rows.append(
            {
                "news_id": digest[:24],
                "published_at": item["published_ms"],
                "published_precision": item["precision"],
                "title": title,
                "body": body or None,
                "url": _web_address(item["url"]),
                "source": source,
                "tags": json.dumps([tag for tag in tags if tag], ensure_ascii=False),
            }
        )
    schema = {**NEWS_COLUMNS, "published_at": pl.Int64()}
    return pl.DataFrame(rows, schema=schema, orient="row").with_columns(
        pl.col("published_at").cast(pl.Datetime("ms", "UTC"))
    )


def _web_address(url: object) -> str | None:
    text = clean(url, 2_000)
    return text if urlsplit(text).scheme in ("http", "https") else None


def in_languages(frame: pl.DataFrame, languages: Iterable[str]) -> pl.Series:
    """Whether each item may be in one of ``languages`` (two letters): False when most of its title is of a script that
    none of them uses, or when its words tell another language for certain (see ``connectors/language.py``).
    """
    wanted = frozenset(languages)
    is_latin = wanted <= _LATIN_LANGUAGES
    kept = []
    for title, body in frame.select("title", "body").iter_rows():
        may = not is_latin or latin_share(title) >= 0.5
        text = f"{title} {(body or '')[:_TELLING_CHARS]}"
        kept.append(may and language_of(text, wanted) in (UNKNOWN, *wanted))
    return pl.Series(kept, dtype=pl.Boolean)
