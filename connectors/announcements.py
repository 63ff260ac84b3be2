"""The venue's announcements: its own news feed, by pages of a list that moves while it is read.

https://bybit-exchange.github.io/docs/v5/announcement. The list has no cursor: an item published between two pages
shifts the rows, so pages are read until one holds nothing new, and items met twice count once. The address is the
only thing that stays when an item is edited.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

MAX_PAGES = 500
_KEY = re.compile(r"blt[0-9a-f]{8,}")
Row = Mapping[str, Any]


def key_of(row: Row) -> str:
    """What stays the same when an announcement is edited: the ``blt…`` part of its address, else the address."""
    url = str(row.get("url") or "")
    found = _KEY.search(url)
    return found.group(0) if found else url or str(row.get("title"))


def read_pages(ask: Callable[[int], Sequence[Row]], is_known: Callable[[Row], bool]) -> list[Row]:
    """Rows of page 1, 2, … until a page is empty or holds only known rows; the last reading of a row counts.

    ``ask`` gives the rows of a page (from 1). Page 1 is asked once more at the end when there was more than one:
    what was published meanwhile stands there.
    """
    rows: dict[str, Row] = {}

    def take(page: int) -> bool:
        found = ask(page)
        fresh = [row for row in found if key_of(row) not in rows and not is_known(row)]
        rows.update((key_of(row), row) for row in found)
        return bool(fresh)

    page = 1
    while take(page) and page < MAX_PAGES:
        page += 1
    if page > 2:
        take(1)
    return list(rows.values())


def as_items(rows: Iterable[Row], now_ms: int) -> Iterable[dict[str, Any]]:
    """Rows as items for ``feeds.news_frame``. Their time is ``publishTime``; the author's own date is no proof.

    Without ``publishTime`` the item counts as published when it was seen.
    """
    for row in rows:
        stated = row.get("publishTime")
        kind = row.get("type")
        key = kind.get("key") if isinstance(kind, dict) else None
        tags = row.get("tags")
        yield {
            "key": key_of(row),
            "published_ms": stated if isinstance(stated, int) and 0 < stated <= now_ms else now_ms,
            "precision": "ms",
            "title": row.get("title"),
            "body": row.get("description"),
            "url": row.get("url"),
            "source": "bybit announcements",
            "tags": [str(t) for t in [key, *(tags if isinstance(tags, list) else [])] if t],
        }
