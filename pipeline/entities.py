"""Which markets a text speaks of: names and tickers of coins.

A ticker that is also a word (SOL, LINK, DOT, APE) counts only in capitals or with a dollar sign.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_NAMES = {
    "BTC": r"bitcoins?(?!\s+(?:cash|sv|gold)\b)|btc|xbt",
    "ETH": r"ethereum(?!\s+classic\b)|ether|eth",
    "SOL": r"solana",
    "BNB": r"bnb|binance\s+coin",
    "XRP": r"xrp|ripple",
    "ADA": r"cardano",
    "DOGE": r"doge(?:coin)?",
    "LTC": r"litecoin|ltc",
    "LINK": r"chainlink",
    "DOT": r"polkadot",
    "TRX": r"tron|trx",
    "BCH": r"bitcoin\s+cash|bch",
    "AVAX": r"avalanche|avax",
    "MATIC": r"polygon|matic",
    "UNI": r"uniswap",
    "APE": r"apecoin",
    "AAVE": r"aave",
    "ATOM": r"cosmos",
    "SHIB": r"shiba\s+inu|shib",
    "TON": r"toncoin",
}
_QUOTES = ("USDT", "USDC", "USD", "PERP")


def base_coin(symbol: str) -> str:
    """``BTCUSDT`` → ``BTC``, ``1000PEPEUSDT`` → ``PEPE``."""
    coin = symbol.upper()
    for quote in _QUOTES:
        if coin.endswith(quote) and len(coin) > len(quote):
            coin = coin.removesuffix(quote)
            break
    return re.sub(r"^10+(?=[A-Z])", "", coin)


def pattern(symbol: str) -> re.Pattern[str]:
    """What a text must match to speak of ``symbol``'s coin."""
    coin = re.escape(base_coin(symbol))
    names = _NAMES.get(base_coin(symbol))
    ticker = rf"(?<![\w$])\$?{coin}(?!\w)"
    return re.compile(ticker + (rf"|(?i:(?<!\w)(?:{names})(?!\w))" if names else ""))


def mentions(symbol: str, texts: Sequence[str]) -> list[bool]:
    """For each text whether it speaks of the coin of ``symbol``."""
    found = pattern(symbol)
    return [found.search(text) is not None for text in texts]
