"""``recur fetch --source FILE``: what a file holds is told by its columns, checked whole, and stored."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recur.connectors.feeds import read_feed
from recur.connectors.files import read_candles, read_funding, sniff
from recur.connectors.newsfiles import read_news
from recur.connectors.pointfiles import read_points
from recur.pipeline.news import put_items
from recur.pipeline.plan import series_name
from recur.storage.store import Store
from recur.vocabulary import Series, UsageError

FEED_SUFFIXES = (".xml", ".rss", ".atom")


def import_file(
    store: Store, path: Path, *, category: str, languages: Sequence[str], now_ms: int
) -> dict[str, Any]:
    """Store what a file holds and say what came of it; UsageError, and nothing stored, when it does not fit.

    ``category`` is that of rows which do not name one; ``now_ms`` becomes their first-seen time; ``languages`` are
    those whose news are kept.
    """
    started, source = time.monotonic(), f"file:{path.name}"
    if path.name.lower().endswith(FEED_SUFFIXES):
        try:
            items = read_feed(path.read_bytes(), path.name, now_ms)
        except OSError as error:
            raise UsageError(f"Cannot read {path}: {error.strerror}.") from None
        done = put_items(store, items, source=source, now_ms=now_ms, languages=languages, backfill=True)
        return {"kind": "news", **done, "seconds": round(time.monotonic() - started, 3)}
    kind = sniff(path)
    if kind == "news":
        done = put_items(
            store, read_news(path), source=source, now_ms=now_ms, languages=languages, backfill=True
        )
        return {"kind": "news", **done, "seconds": round(time.monotonic() - started, 3)}
    if kind == "funding":
        frame = read_funding(path, category=category, now_ms=now_ms)
        result = store.put_funding(frame, source=source, now_ms=now_ms)
        keys = frame.select("category", "symbol").unique(maintain_order=True).iter_rows()
        names = [series_name(Series(c, s, "", "funding")) for c, s in keys]
    elif kind == "candles":
        frame = read_candles(path, category=category, now_ms=now_ms)
        result = store.put_candles(frame, source=source, now_ms=now_ms)
        candles = frame.select("category", "symbol", "interval", "kind").unique(maintain_order=True)
        names = [str(Series(*key)) for key in candles.iter_rows()]
    else:
        frame = read_points(path, kind, category=category)
        result = store.put_points(kind, frame, source=source, now_ms=now_ms)
        points = frame.select("category", "symbol", "interval").unique(maintain_order=True)
        names = [str(Series(c, s, i, kind)) for c, s, i in points.iter_rows()]
    return {
        "source": source,
        "kind": kind,
        "series": names,
        "rows": frame.height,
        "new": result.new,
        "changed": result.changed,
        "same": result.same,
        "seconds": round(time.monotonic() - started, 3),
    }
