"""What the venue says about itself: its announcements and its maintenance windows."""

from __future__ import annotations

from recur.connectors.sandbox.feed import AHEAD_MS
from recur.connectors.sandbox.query import Query, integer_of, limit_of, refused
from recur.connectors.sandbox.world import World

TYPES = {
    "new_crypto": "New Listings",
    "latest_bybit_news": "Latest News",
    "delistings": "Delistings",
    "latest_activities": "Latest Activities",
    "product_updates": "Product Updates",
    "maintenance_updates": "Maintenance Updates",
    "new_fiat_listings": "New Fiat Listings",
    "other": "Other",
}
_MOST_PER_PAGE = 50  # the venue states none; this is what is used


def announcements(world: World, query: Query, now: int) -> object:
    """A page of what is published at ``now``, newest first, each as it reads now. By page number: no cursor."""
    locale = query.get("locale", "")
    if not locale:
        raise refused("params error: locale invalid")
    wanted, tag = query.get("type"), query.get("tag")
    items = [
        item
        for item in reversed(world.announcements())
        if item.published_ms <= now and wanted in (None, item.key) and (tag is None or tag in item.tags)
    ]
    limit, page = limit_of(query, 20, _MOST_PER_PAGE), max(1, integer_of(query, "page") or 1)
    rows = []
    for item in items[(page - 1) * limit : page * limit]:
        title, description = item.text(now)
        rows.append(
            {
                "title": title,
                "description": description,
                "type": {"title": TYPES[item.key], "key": item.key},
                "tags": list(item.tags),
                "url": f"https://announcements.bybit.com/{locale}/article/{item.key}-{item.slug}/",
                "dateTimestamp": item.dated_ms,
                "startDateTimestamp": item.dated_ms,
                "endDateTimestamp": item.dated_ms,
                "publishTime": item.published_ms,
            }
        )
    return {"total": len(items), "list": rows}


def system_status(world: World, query: Query, now: int) -> object:
    """Maintenance that is over, running or told, newest first; ``state`` and ``id`` choose among it."""
    rows = []
    for pause in world.maintenance():
        state = "scheduled" if now < pause.begin_ms else "ongoing" if now < pause.end_ms else "completed"
        if pause.begin_ms - AHEAD_MS <= now:
            rows.append(
                {
                    "id": f"4d95b2a0-{pause.begin_ms:x}",
                    "title": pause.title,
                    "state": state,
                    "begin": str(pause.begin_ms),
                    "end": str(pause.end_ms),
                    "href": "",
                    "serviceTypes": [2, 3, 4, 5],
                    "product": [1, 2],
                    "uidSuffix": [],
                    "maintainType": 1,
                    "env": 1,
                }
            )
    wanted = {name: query[name] for name in ("id", "state") if query.get(name)}
    return {"list": [row for row in reversed(rows) if all(row[k] == v for k, v in wanted.items())]}
