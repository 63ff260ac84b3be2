"""The venue's own announcements in the generated market: listings, delistings, maintenance and small talk."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from zlib import crc32

import numpy as np

from recur.connectors.sandbox.world import Announcement, Life, Maintenance
from recur.vocabulary import DAY_MS, HOUR_MS, MINUTE_MS, floor_open, iso

AHEAD_MS = 2 * DAY_MS
"""So long before it happens a maintenance, a listing or a delisting is told."""

_TALK = (
    ("latest_bybit_news", "Weekly report: {} leads the derivatives volume", ("Derivatives",)),
    ("latest_activities", "Trade {} and share a pool of prizes", ("Spot", "Derivatives")),
    ("product_updates", "Adjustment of the risk limits of {}", ("Derivatives",)),
    ("new_fiat_listings", "Buy {} with more cards", ("Spot",)),
)
_EDITED_SHARE = 0.15


def feed(
    seed: int, start_ms: int, end_ms: int, lives: Mapping[str, Life], maintenance: Sequence[Maintenance]
) -> list[Announcement]:
    """All items, oldest first; those of a day depend on the seed, the day and the symbols alone."""
    items = itertools.chain(_talk(seed, start_ms, end_ms, sorted(lives)), _events(lives, maintenance))
    return sorted(items, key=lambda item: (item.published_ms, item.slug))


def _talk(seed: int, start_ms: int, end_ms: int, symbols: list[str]) -> Iterator[Announcement]:
    for day in range(floor_open(start_ms, "1d") // DAY_MS, -(-end_ms // DAY_MS)):
        rng = np.random.default_rng([seed, crc32(b"announcements"), day])
        for number in range(int(rng.poisson(1.5))):
            key, title, tags = _TALK[int(rng.integers(len(_TALK)))]
            symbol = symbols[int(rng.integers(len(symbols)))]
            at_ms = day * DAY_MS + int(rng.integers(DAY_MS // MINUTE_MS)) * MINUTE_MS
            title = title.format(symbol)
            edits: tuple[tuple[int, str, str], ...] = ()
            if rng.random() < _EDITED_SHARE:
                edited_ms = at_ms + int(rng.integers(1, 48)) * HOUR_MS
                edits = ((edited_ms, f"[Updated] {title}", f"{title}. The terms were corrected."),)
            yield _item(f"{day}/{number}", key, title, f"{title}. Terms apply.", tags, at_ms, at_ms, edits)


def _events(lives: Mapping[str, Life], maintenance: Sequence[Maintenance]) -> Iterator[Announcement]:
    for symbol, life in lives.items():
        told_ms = life.listed_ms - AHEAD_MS
        title = f"New listing: {symbol} perpetual contract"
        text = f"{symbol} trades from {iso(life.listed_ms)}."
        yield _item(f"list/{symbol}", "new_crypto", title, text, ("Futures",), told_ms, life.listed_ms)
        if life.delisted_ms is not None:
            told_ms = life.delisted_ms - AHEAD_MS
            title = f"Delisting of {symbol} perpetual contract"
            text = f"{symbol} stops trading at {iso(life.delisted_ms)}."
            yield _item(
                f"delist/{symbol}", "delistings", title, text, ("Delistings",), told_ms, life.delisted_ms
            )
    for pause in maintenance:
        text = f"No trading from {iso(pause.begin_ms)} to {iso(pause.end_ms)}."
        slug, told_ms = f"maintenance/{pause.begin_ms}", pause.begin_ms - AHEAD_MS
        yield _item(slug, "maintenance_updates", pause.title, text, ("Derivatives",), told_ms, pause.begin_ms)


def _item(
    name: str,
    key: str,
    title: str,
    description: str,
    tags: tuple[str, ...],
    published_ms: int,
    dated_ms: int,
    edits: tuple[tuple[int, str, str], ...] = (),
) -> Announcement:
    slug = f"blt{crc32(name.encode()):08x}{crc32(name[::-1].encode()):08x}"
    return Announcement(slug, key, title, description, tags, published_ms, dated_ms, edits)
