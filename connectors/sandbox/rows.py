"""JSON text of candles: made a block at a time when first asked for, kept as bytes, cut where a page needs it."""

from __future__ import annotations

import numpy as np
import polars as pl
from numpy.typing import NDArray

from recur.connectors.sandbox.world import Candles, Floats

_BLOCK = 1000  # rows turned into text at a time
_BLOCKS_KEPT = 8000


class RowTexts:
    """The rows ``["start","open",…]`` of one series; safe to share by threads."""

    def __init__(self, bars: Candles, with_volume: bool) -> None:
        self._bars = bars
        self._with_volume = with_volume
        self._blocks: dict[int, tuple[bytes, NDArray[np.int64]]] = {}

    def prepare(self) -> None:
        """Make all texts now, so that every page is as fast as the second reading of it."""
        for block in range(-(-len(self._bars) // _BLOCK)):
            self._block(block)

    def newest_first(self, low: int, high: int) -> bytes:
        """Rows ``[low, high)`` joined by commas, the newest first."""
        parts = []
        for block in reversed(range(low // _BLOCK, -(-high // _BLOCK))):
            text, begins = self._block(block)
            base, count = block * _BLOCK, len(begins) - 1
            newest = count - min(high - base, count)  # position, counted from the block's newest row
            oldest = count - max(low - base, 0)
            if newest < oldest:
                parts.append(text[begins[newest] : begins[oldest] - 1])
        return b",".join(parts)

    def _block(self, block: int) -> tuple[bytes, NDArray[np.int64]]:
        """Text of a block, a comma after each row, and where each row begins in it."""
        made = self._blocks.get(block)
        if made is None:
            bars = self._bars[block * _BLOCK : (block + 1) * _BLOCK]
            columns = [bars.open, bars.high, bars.low, bars.close]
            columns += [bars.volume, bars.turnover] if self._with_volume else []
            times = list(map(str, bars.open_time[::-1].tolist()))
            texts = (number_texts(column[::-1]) for column in columns)
            rows = ['["' + '","'.join(row) + '"],' for row in zip(times, *texts, strict=True)]
            lengths = np.fromiter(map(len, rows), np.int64, len(rows))
            made = "".join(rows).encode(), np.concatenate([[0], np.cumsum(lengths)])
            if len(self._blocks) >= _BLOCKS_KEPT:
                self._blocks.clear()
            self._blocks[block] = made
        return made


def number_texts(values: Floats) -> list[str]:
    """Shortest decimal texts that read back as the same floats; "" for NaN; never an exponent."""
    texts = pl.Series(values).cast(pl.String).to_list()
    together = "".join(texts)
    if "e" in together or "N" in together:
        for i, text in enumerate(texts):
            if text == "NaN":
                texts[i] = ""
            elif "e" in text:
                texts[i] = np.format_float_positional(values[i], trim="-")
    return texts
