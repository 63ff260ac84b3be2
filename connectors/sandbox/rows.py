"""JSON text of candles: made a block at a time when first asked for, kept as bytes, cut where a page needs it."""

from __future__ import annotations

import numpy as np
import polars as pl
from numpy.typing import NDArray

from recur.connectors.sandbox.world import Candles, Floats

_BLOCK = 5000  # rows turned into text at a time: 400 kB
_BLOCKS_KEPT = 1600


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
            texts = [pl.Series(bars.open_time[::-1]).cast(pl.String), *(_text(c[::-1]) for c in columns)]
            frame = pl.DataFrame({str(i): text for i, text in enumerate(texts)})
            joined = pl.concat_str(pl.lit('["') + pl.col("0"), *frame.columns[1:], separator='","')
            rows = frame.select(joined + pl.lit('"],')).to_series()
            ends = np.cumsum(rows.str.len_bytes().to_numpy(), dtype=np.int64)
            made = rows.str.join("").item().encode(), np.concatenate([[0], ends])
            if len(self._blocks) >= _BLOCKS_KEPT:
                self._blocks.clear()
            self._blocks[block] = made
        return made


def _text(values: Floats) -> pl.Series:
    """``number_texts`` as a column, fast where polars writes no exponent."""
    size = np.abs(values)
    if (((size >= 1e-4) & (size < 1e15)) | (size == 0)).all():
        return pl.Series(values).cast(pl.String)
    return pl.Series(number_texts(values), dtype=pl.String)


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
