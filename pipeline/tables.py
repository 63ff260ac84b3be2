"""Tables for a terminal: what is left out when it is too narrow for all of one."""

from __future__ import annotations

import re
from collections.abc import Sequence

SPARE = (
    "sha256", "outliers", "zero_volume", "revisions", "age_hours", "model", "cutoff", "prob_up", "vol", "missing", "q50",
)  # fmt: skip
"""Columns that a reader misses least, the first of them first; after these go those on the right."""

_FRACTION = re.compile(r"-?0\.\d+")
_TIME = re.compile(r"(\d{4}-\d{2}-\d{2})T(\d{2}:\d{2})(?::00)?Z")


def fitted(
    columns: Sequence[str], rows: Sequence[Sequence[str]], width: int
) -> tuple[list[str], list[list[str]], list[str]]:
    """``(columns, rows, names left out)`` such that no word of a cell must be cut at ``width`` characters.

    A table of five columns at most stays as it is, and so does one whose cells can be wrapped between words. Else
    times lose their seconds, fractions all but three digits, and columns go until the rest fits; the first column
    never does.
    """
    names, cells = list(columns), [list(row) for row in rows]
    if len(names) <= 5 or _needed(names, cells) <= width:
        return names, cells, []
    cells = [[_shortened(cell) for cell in row] for row in cells]
    gone = []
    while len(names) > 1 and _needed(names, cells) > width:
        name = next((spare for spare in SPARE if spare in names[1:]), names[-1])
        at = names.index(name, 1)
        gone.append(name)
        del names[at]
        for row in cells:
            del row[at]
    return names, cells, gone


def _shortened(cell: str) -> str:
    if _FRACTION.fullmatch(cell):
        return f"{float(cell):.3g}"
    return _TIME.sub("\\1\u00a0\\2", cell)


def _needed(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> int:
    """Characters that a table with borders takes when every cell is wrapped between all of its words."""
    longest = [
        max((len(word) for text in column for word in text.split(" ")), default=0)
        for column in zip(columns, *rows, strict=True)
    ]
    return sum(longest) + 3 * len(longest) + 1
