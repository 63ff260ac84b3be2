"""Files of texts: labelled ones for training and judging, plain ones for pretraining and scoring.

Parquet, CSV, gzipped CSV or Feather with a column ``text`` (or ``title``), and for labelled files ``label``: negative,
neutral, positive; bearish, neutral, bullish; 0, 1, 2; or −1, 0, 1. Optional: ``split`` (train, validation, test) and
``published_at``. Plain texts may also come one a line in a ``.txt`` file.

A labelled file that does not fit is refused whole, with row numbers (row 1 is the first below any header). Texts that
read the same are one text; when they carry different labels, nobody can say which is right: all of them are dropped
and counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from recur.connectors.files import load
from recur.pipeline.text import fingerprint
from recur.vocabulary import DAY_MS, UsageError, did_you_mean, iso, parse_time

CLASSES = ("negative", "neutral", "positive")
_WORDS = {
    "negative": 0, "neutral": 1, "positive": 2, "bearish": 0, "bullish": 2,
}  # fmt: skip
_SPLITS = {"train": "train", "training": "train", "test": "test", "dev": "validation", "val": "validation"}
_SPLITS |= {"valid": "validation", "validation": "validation"}
_PRECISIONS = ("ms", "s", "minute", "day")
_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Texts:
    """Texts of one or more files, without duplicates. ``label`` (N,) indexes ``CLASSES``; −1 where there is none.

    ``split`` is '' where the file has no such column; ``published`` is UTC milliseconds or None.
    """

    text: list[str]
    label: NDArray[np.int64]
    split: list[str]
    published: list[int | None]
    fingerprints: list[str]
    counts: dict[str, int] = field(default_factory=dict)
    """rows, duplicates, contradictions, empty: what was read and what was left out."""

    def __len__(self) -> int:
        return len(self.text)

    def take(self, rows: Sequence[int] | NDArray[np.int64]) -> Texts:
        """The given rows, in their order."""
        chosen = [int(i) for i in rows]
        return Texts(
            [self.text[i] for i in chosen],
            self.label[chosen],
            [self.split[i] for i in chosen],
            [self.published[i] for i in chosen],
            [self.fingerprints[i] for i in chosen],
            self.counts,
        )

    def before(self, until_ms: int) -> Texts:
        """The texts that were published before then, and those that bear no time.

        A time at midnight sharp is a date: its day has to be over by then.
        """
        ends = [at if at is None or at % DAY_MS else at + DAY_MS - 1 for at in self.published]
        return self.take([i for i, at in enumerate(ends) if at is None or at < until_ms])

    def window(self) -> dict[str, str | None]:
        """Earliest and latest publication, ISO-8601; None when no text carries its time.

        A latest time at midnight sharp is a date: the window ends with its day.
        """
        known = [at for at in self.published if at is not None]
        if not known:
            return {"since": None, "until": None}
        last = max(known)
        return {"since": iso(min(known)), "until": iso(last if last % DAY_MS else last + DAY_MS - 1)}


def read_labelled(paths: Sequence[Path]) -> Texts:
    """All labelled texts of ``paths``, duplicates removed. Raises UsageError for whatever does not fit."""
    frames = []
    for path in paths:
        raw = load(path)
        text = _text_column(raw, path)
        if "label" not in raw.columns:
            raise UsageError(
                f"{path} has no column label: found {', '.join(raw.columns)}.",
                "Labelled files hold text and label (negative, neutral or positive).",
            )
        frames.append(
            pl.DataFrame(
                {
                    "text": _strings(raw, text, path),
                    "label": _labels(raw["label"], path),
                    "split": _splits(raw, path),
                    "published": _published(raw, path),
                }
            )
        )
    found = _unique(pl.concat(frames))
    present = sorted({CLASSES[k] for k in found.label})
    if not present:
        raise UsageError(
            f"{' and '.join(map(str, paths))}: none of {found.counts['rows']} rows can be used:"
            f" {found.counts['contradictions']} bear a label that contradicts another, {found.counts['empty']} no text.",
            "Which of two labels of the same text is right?",
        )
    if len(present) < 2:
        raise UsageError(
            f"{' and '.join(map(str, paths))}: all {len(found)} texts are {' '.join(present)}: "
            "expected at least two classes.",
            "A classifier cannot be trained or judged on one class.",
        )
    return found


def read_texts(paths: Sequence[Path]) -> Texts:
    """All texts of ``paths`` without their labels: text, title, description and body alike. Duplicates removed."""
    frames = []
    for path in paths:
        if path.name.lower().endswith(".txt"):
            lines = pl.Series("text", _lines(path), dtype=pl.String)
            published = pl.Series("published", [None] * len(lines), dtype=pl.Int64)
            frames.append(pl.DataFrame([lines, published]))
            continue
        raw = load(path)
        first, times = _text_column(raw, path), _published(raw, path)
        for name in dict.fromkeys((first, "description", "body")):
            if name in raw.columns:
                frames.append(pl.DataFrame({"text": _strings(raw, name, path), "published": times}))
    both = pl.concat(frames).with_columns(label=pl.lit(-1, pl.Int64), split=pl.lit(""))
    return _unique(both.select("text", "label", "split", "published"))


def read_dated(paths: Sequence[Path]) -> pl.DataFrame:
    """Every row of ``paths``: ``text``, ``published`` (UTC ms, null where the row has none), ``day`` and ``symbol``.

    ``day`` marks times that are a date only: what ``published_precision`` says, else midnight sharp. ``symbol`` is null
    where the file names none. Labels are not read. Raises UsageError for a file without dates.
    """
    frames = []
    for path in paths:
        raw = load(path)
        published = _published(raw, path)
        if published.null_count() == raw.height:
            raise UsageError(
                f"{path} tells of no text when it was published: expected a column published_at with times.",
                "The market's reaction to a text can only be measured from its time on.",
            )
        day = (published % DAY_MS == 0).alias("day")
        if "published_precision" in raw.columns:
            given = raw["published_precision"].cast(pl.String)
            odd = set(given.drop_nulls()) - set(_PRECISIONS)
            if odd:
                raise UsageError(
                    f"{path}: published_precision is '{min(odd)}': expected {', '.join(_PRECISIONS)}."
                )
            day = pl.select(pl.coalesce(given == "day", day).alias("day")).to_series()
        none = pl.Series("symbol", [None] * raw.height, dtype=pl.String)
        symbol = raw["symbol"].cast(pl.String).str.to_uppercase() if "symbol" in raw.columns else none
        frames.append(
            pl.DataFrame(
                [_strings(raw, _text_column(raw, path), path), published, day, symbol.alias("symbol")]
            )
        )
    return pl.concat(frames)


def read_rows(path: Path) -> list[str]:
    """The text of every row (or line) of a file, in order, duplicates and all; '' where it is missing."""
    if path.name.lower().endswith(".txt"):
        return _lines(path)
    raw = load(path)
    return [text or "" for text in _strings(raw, _text_column(raw, path), path).to_list()]


def stratified(
    label: NDArray[np.int64], share: float, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(kept, held out) rows: ``share`` of every class is held out, drawn by ``seed``."""
    rng = np.random.default_rng((seed, 4))
    out = np.zeros(len(label), dtype=bool)
    for k in np.unique(label):
        rows = rng.permutation(np.flatnonzero(label == k))
        out[rows[: round(share * len(rows))]] = True
    return np.flatnonzero(~out), np.flatnonzero(out)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text("utf-8").splitlines()
    except OSError as error:
        raise UsageError(f"Cannot read {path}: {error.strerror}.", "Check the path.") from error
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{path} is not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}.",
            "Is it a binary file? Convert it to UTF-8, or give Parquet or CSV.",
        ) from error


def _text_column(raw: pl.DataFrame, path: Path) -> str:
    for name in ("text", "title"):
        if name in raw.columns:
            return name
    raise UsageError(f"{path} has no column text (or title): found {', '.join(raw.columns)}.")


def _strings(raw: pl.DataFrame, name: str, path: Path) -> pl.Series:
    kind = raw.schema[name]
    if kind.is_nested() or kind in (pl.Binary, pl.Object):
        raise UsageError(f"{path}: column {name} has type {kind}: expected text.", "Is it the right column?")
    return raw[name].cast(pl.String).alias("text")


def _labels(column: pl.Series, path: Path) -> pl.Series:
    given = [
        ("" if value is None else str(value).strip().lower().removesuffix(".0")) for value in column.to_list()
    ]
    numbers = set(given) & {"-1", "0", "1", "2"}
    known = dict(_WORDS)
    if numbers == {"0", "1"}:
        raise UsageError(
            f"{path}: the labels 0 and 1 alone may mean negative and neutral, or neutral and positive.",
            "Write the labels as words.",
        )
    if {"-1", "2"} <= numbers:
        raise UsageError(
            f"{path} mixes the labels -1 and 2: expected 0, 1, 2 or -1, 0, 1.", "Write them as words."
        )
    offset = 1 if "-1" in numbers else 0
    if numbers:
        known |= {str(k - offset): k for k in range(3)}
    bad = [(row, value) for row, value in enumerate(given, 1) if value not in known]
    if bad:
        shown = "; ".join(
            f"row {row}: '{value}'" if value else f"row {row}: no label" for row, value in bad[:_SHOWN]
        )
        rest = f"; and {len(bad) - _SHOWN} more rows" if len(bad) > _SHOWN else ""
        raise UsageError(
            f"{path} is refused for unknown labels: {shown}{rest}.{did_you_mean(bad[0][1], _WORDS)}",
            "Known are negative, neutral, positive; bearish, bullish; 0, 1, 2; -1, 0, 1.",
        )
    return pl.Series("label", [known[value] for value in given], dtype=pl.Int64)


def _splits(raw: pl.DataFrame, path: Path) -> pl.Series:
    if "split" not in raw.columns:
        return pl.Series("split", [""] * raw.height)
    given = [str(value or "").strip().lower() for value in raw["split"].to_list()]
    bad = [(row, value) for row, value in enumerate(given, 1) if value not in _SPLITS]
    if bad:
        raise UsageError(
            f"{path} is refused: row {bad[0][0]} has the split '{bad[0][1]}', one of {len(bad)} such rows.",
            "Known are train, validation and test.",
        )
    return pl.Series("split", [_SPLITS[value] for value in given])


def _published(raw: pl.DataFrame, path: Path) -> pl.Series:
    """UTC milliseconds; null where the file tells none."""
    absent = pl.Series("published", [None] * raw.height, dtype=pl.Int64)
    if "published_at" not in raw.columns:
        return absent
    column = raw["published_at"]
    if isinstance(column.dtype, pl.Datetime):
        aware = column.dt.replace_time_zone("UTC") if column.dtype.time_zone is None else column
        return aware.dt.epoch("ms").alias("published")
    if column.dtype == pl.Date:
        return column.cast(pl.Datetime("ms")).dt.epoch("ms").alias("published")
    if column.dtype.is_integer():
        return column.cast(pl.Int64).alias("published")
    if column.dtype == pl.Null:
        return absent
    times: list[int | None] = []
    for row, value in enumerate(column.to_list(), 1):
        try:
            times.append(parse_time(str(value)) if value else None)
        except UsageError as error:
            raise UsageError(f"{path}: row {row}: {error.message}", error.hint) from None
    return pl.Series("published", times, dtype=pl.Int64)


def _unique(frame: pl.DataFrame) -> Texts:
    marked = frame.with_columns(
        pl.Series(
            "fingerprint", ["" if not (t or "").strip() else fingerprint(t) for t in frame["text"].to_list()]
        )
    )
    kept = marked.filter(pl.col("fingerprint") != "")
    agreed = kept.filter(pl.col("label").n_unique().over("fingerprint") == 1)
    # Of equal texts the first stays; one of a test part stays there, so that it is never trained on.
    order = pl.col("split").replace_strict({"test": 0, "validation": 1}, default=2, return_dtype=pl.Int64)
    once = (
        agreed.with_row_index("row")
        .sort(order, "row")
        .unique("fingerprint", keep="first", maintain_order=True)
        .sort("row")
    )
    counts = {
        "rows": frame.height,
        "empty": frame.height - kept.height,
        "contradictions": kept.height - agreed.height,
        "duplicates": agreed.height - once.height,
    }
    return Texts(
        once["text"].to_list(),
        once["label"].to_numpy().astype(np.int64),
        once["split"].to_list(),
        once["published"].to_list(),
        once["fingerprint"].to_list(),
        counts,
    )
