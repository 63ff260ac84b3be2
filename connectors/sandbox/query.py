"""Reading the query of a request as the venue does: absurd bounds cut, wrong words refused with code 10001."""

from __future__ import annotations

from collections.abc import Mapping

from recur.vocabulary import VenueRefused

Query = Mapping[str, str]

_LATEST_MS = 253_370_764_800_000  # 9999-01-01: keeps absurd bounds inside the calendar


def refused(message: str) -> VenueRefused:
    """The venue's answer to a request that makes no sense."""
    return VenueRefused(message, ret_code=10001)


def category_of(query: Query, allowed: tuple[str, ...], default: str | None = None) -> str:
    category = query.get("category") or default
    if category not in allowed:
        raise refused("params error: category invalid")
    return category


def integer_of(query: Query, name: str) -> int | None:
    """The whole number ``name``, held within the years 1970 to 9999; None when absent."""
    text = query.get(name, "")
    if not text:
        return None
    try:
        return max(0, min(int(text), _LATEST_MS))
    except ValueError:
        raise refused(f"params error: {name} invalid") from None


def limit_of(query: Query, default: int, maximum: int) -> int:
    """The page size: ``default`` when absent, at most ``maximum``."""
    limit = integer_of(query, "limit")
    if limit is not None and limit < 1:
        raise refused("params error: limit invalid")
    return default if limit is None else min(limit, maximum)
