"""Open interest and long/short ratio from a file: ``symbol, interval, ts`` and ``open_interest``, or ``buy_ratio,
sell_ratio``, and optionally ``category``. Formats and times as in ``files.py``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import polars as pl

from recur.connectors.files import category_of, key_faults, load, need, number, refuse, symbol_of, text, times

PointKind = Literal["open_interest", "long_short"]
COLUMNS: dict[PointKind, tuple[str, ...]] = {
    "open_interest": ("open_interest",),
    "long_short": ("buy_ratio", "sell_ratio"),
}
_ROW = "row_in_file"


def read_points(path: str | Path, kind: PointKind, *, category: str = "linear") -> pl.DataFrame:
    """The frame of a kind of point in a file, sorted by its key. Raises UsageError for anything that does not fit."""
    path, names = Path(path), COLUMNS[kind]
    raw = load(path)
    need(raw, path, kind.replace("_", " "), ("symbol", "interval", *names), ("ts", "open_time"))
    time = "ts" if "ts" in raw.columns else "open_time"
    frame = raw.with_row_index(_ROW, offset=1).select(
        pl.col(_ROW).cast(pl.Int64),
        category_of(raw, category),
        symbol_of(),
        text("interval"),
        times(raw, time, path).alias("ts"),
        *(number(name) for name in names),
    )
    refuse(
        path,
        frame,
        [
            *key_faults("ts", ("category", "symbol", "interval")),
            *(
                (
                    pl.col(n).is_null() | ~pl.col(n).is_finite() | (pl.col(n) < 0),
                    f"{n} is no number of 0 or more",
                )
                for n in names
            ),
        ],
    )
    return frame.drop(_ROW).sort("category", "symbol", "interval", "ts")
