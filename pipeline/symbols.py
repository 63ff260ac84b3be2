"""Which symbols a request means: names, patterns such as ``*USDT``, and the most traded of a category.

``top:20`` ranks what trades now by the venue's turnover of the last 24 hours. ``top:20@2025-01-01`` ranks what could
be traded on that day, delisted symbols included, by stored turnover of the 30 days before it: today's most traded are
the survivors, and a history chosen among them flatters every model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase

from recur.connectors.bybit import BybitConnector
from recur.storage.store import Store
from recur.vocabulary import DAY_MS, DataMissing, UsageError, iso, parse_symbol, parse_time

RANKED_DAYS = 30
_TOP = re.compile(r"top:(\d+)(?:@(.+))?", re.IGNORECASE)
_DOLLARS = ("USDT", "USDC")  # spot pairs of other quotes cannot be compared with these


def is_pattern(word: str) -> bool:
    """Whether ``word`` stands for symbols that have yet to be found, rather than for one."""
    return "*" in word or "?" in word or word.lower().startswith("top:")


def expand(words: Iterable[str], category: str, connector: BybitConnector, store: Store) -> tuple[str, ...]:
    """The symbols of ``category`` that ``words`` mean, each once, in their order.

    Raises UsageError for a pattern that nothing fits, DataMissing when the store cannot say what was most traded.
    """
    found: dict[str, None] = {}
    trading: list[str] | None = None
    for word in words:
        if not is_pattern(word):
            found[parse_symbol(word, category)[1]] = None
        elif word.lower().startswith("top:"):
            found |= dict.fromkeys(_top(word, category, connector, store))
        else:
            if trading is None:
                trading = sorted(str(row.get("symbol")) for row in connector.instruments(category))
            fitting = [symbol for symbol in trading if fnmatchcase(symbol, word.upper())]
            if not fitting:
                raise UsageError(f"No {category} symbol that trades now fits '{word}'.")
            found |= dict.fromkeys(fitting)
    return tuple(found)


def _top(word: str, category: str, connector: BybitConnector, store: Store) -> list[str]:
    parts = _TOP.fullmatch(word)
    n = int(parts[1]) if parts else 0
    if parts is None or n < 1:
        raise UsageError(f"Cannot read '{word}': expected top:20 or top:20@2025-01-01.")
    if parts[2]:
        return top_at(store, category, n, parse_time(parts[2]))
    amounts = {
        symbol: amount
        for symbol, amount in connector.day_amounts(category).items()
        if amount and (category != "spot" or symbol.endswith(_DOLLARS))
    }
    return _largest(amounts, n)


def top_at(store: Store, category: str, n: int, at_ms: int) -> list[str]:
    """The ``n`` most traded symbols of ``category`` before ``at_ms``, of all that could be traded then.

    DataMissing when the universe of that instant, or the candles of any symbol in it, are not in the store.
    """
    known = set(store.universe(category, at_ms)["symbol"]) if store.path.exists() else set()
    if not known:
        raise DataMissing(
            f"The store does not know which {category} symbols could be traded on {iso(at_ms)}.",
            f"Run 'recur fetch --kinds instruments --category {category}' first.",
        )
    amount = "volume" if category == "inverse" else "turnover"  # both in dollars
    with store.read() as con:
        stored = con.execute(
            f"""SELECT symbol, max(total) FROM (
                SELECT symbol, interval, sum({amount}) AS total FROM candles
                WHERE category = ? AND kind = 'trade'
                AND open_time >= make_timestamp_ms(?) AND open_time < make_timestamp_ms(?)
                GROUP BY symbol, interval) GROUP BY symbol HAVING max(total) > 0""",
            [category, at_ms - RANKED_DAYS * DAY_MS, at_ms],
        ).fetchall()
    amounts = {str(symbol): float(total) for symbol, total in stored if symbol in known}
    if len(amounts) < len(known):
        absent = sorted(known - amounts.keys())
        raise DataMissing(
            f"The store holds no turnover for {len(absent)} of the {len(known)} {category} symbols that could be"
            f" traded on {iso(at_ms)}, {absent[0]} for one, in the {RANKED_DAYS} days before.",
            f"Bring them first: recur fetch -i 1d --category {category} -s {','.join(absent[:3])}… "
            f"--since {iso(at_ms - RANKED_DAYS * DAY_MS)[:10]} --until {iso(at_ms)[:10]}.",
        )
    return _largest(amounts, n)


def _largest(amounts: dict[str, float], n: int) -> list[str]:
    return sorted(amounts, key=lambda symbol: (-amounts[symbol], symbol))[:n]
