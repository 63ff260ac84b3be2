"""Reading labelled files: spellings, duplicates, contradictions, and everything that is refused."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from recur.pipeline.labelled import read_labelled, read_rows, read_texts, stratified
from recur.vocabulary import UsageError


def csv(folder: Path, *lines: str, header: str = "text,label", name: str = "x.csv") -> Path:
    path = folder / name
    path.write_text("\n".join([header, *lines]) + "\n", "utf-8")
    return path


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (["negative", "Neutral", " POSITIVE "], [0, 1, 2]),
        (["bearish", "neutral", "bullish"], [0, 1, 2]),
        (["0", "1", "2"], [0, 1, 2]),
        (["-1", "0", "1"], [0, 1, 2]),
        (["-1", "1", "1"], [0, 2, 2]),
        (["2", "0", "2.0"], [2, 0, 2]),
        (["-1.0", "0.0", "bullish"], [0, 1, 2]),
    ],
)
def test_labels_in_all_their_spellings(tmp_path: Path, labels: list[str], expected: list[int]) -> None:
    path = csv(tmp_path, *(f"text {'abc'[k]},{label}" for k, label in enumerate(labels)))
    assert read_labelled([path]).label.tolist() == expected


def test_all_formats_give_the_same_texts(tmp_path: Path) -> None:
    path = csv(tmp_path, "up,positive", "down,negative")
    (tmp_path / "x.csv.gz").write_bytes(gzip.compress(path.read_bytes()))
    pl.read_csv(path).write_parquet(tmp_path / "x.parquet")
    pl.read_csv(path).write_ipc(tmp_path / "x.feather")
    for name in ("x.csv", "x.csv.gz", "x.parquet", "x.feather"):
        found = read_labelled([tmp_path / name])
        assert (found.text, found.label.tolist()) == (["up", "down"], [2, 0]), name


def test_duplicates_are_one_text_and_contradictions_none(tmp_path: Path) -> None:
    path = csv(
        tmp_path,
        "Up 5,positive",
        "up  5,positive",
        "Odd,neutral",
        "odd,negative",
        "down,negative",
        ",neutral",
    )
    found = read_labelled([path])
    assert found.text == ["Up 5", "down"]
    assert found.counts == {"rows": 6, "empty": 1, "contradictions": 2, "duplicates": 1}


def test_of_equal_texts_the_one_in_the_test_part_stays(tmp_path: Path) -> None:
    path = csv(
        tmp_path, "up,positive,train", "down,negative,dev", "up,positive,test", header="text,label,split"
    )
    found = read_labelled([path])
    assert dict(zip(found.text, found.split, strict=True)) == {"down": "validation", "up": "test"}


@pytest.mark.parametrize(
    ("lines", "header", "said"),
    [
        (["up,positive", "x,postive", "y,"], "text,label", r"row 2: 'postive'; row 3: no label. Did you mean 'positive'"),
        (["up,0", "x,1"], "text,label", "may mean negative and neutral"),
        (["up,-1", "x,2"], "text,label", "mixes the labels -1 and 2"),
        (["up,positive", "x,positive"], "text,label", "all 2 texts are positive"),
        (["up,positive"], "words,label", "no column text"),
        (["up,positive"], "text,class", "no column label"),
        (["up,positive,train", "x,negative,tets"], "text,label,split", "row 2 has the split 'tets'"),
        (["up,positive,2024-13-01", "x,negative,"], "text,label,published_at", "row 1: Cannot read the time"),
        ([], "text,label", "has no rows"),
    ],
)  # fmt: skip
def test_a_file_that_does_not_fit_is_refused(
    tmp_path: Path, lines: list[str], header: str, said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        read_labelled([csv(tmp_path, *lines, header=header)])


def test_binary_files_are_refused(tmp_path: Path) -> None:
    for name in ("x.parquet", "x.csv.gz", "x.feather", "x.csv"):
        (tmp_path / name).write_bytes(bytes(range(256)) * 40)
        with pytest.raises(UsageError):
            read_labelled([tmp_path / name])
    (tmp_path / "x.txt").write_bytes(b"fine\n\xff\xfe")
    with pytest.raises(UsageError, match="not UTF-8 text: byte 5 is 0xff"):
        read_rows(tmp_path / "x.txt")
    pl.DataFrame({"text": [b"\x00"], "label": ["neutral"]}).write_parquet(tmp_path / "y.parquet")
    with pytest.raises(UsageError, match="column text has type Binary"):
        read_labelled([tmp_path / "y.parquet"])


def test_plain_texts_come_from_all_columns_of_text_with_their_times(tmp_path: Path) -> None:
    path = csv(
        tmp_path, "A,body a,2024-01-02", "B,,2024-01-01T12:00Z", header="title,description,published_at"
    )
    found = read_texts([path])
    assert sorted(found.text) == ["A", "B", "body a"]
    assert found.window() == {"since": "2024-01-01T12:00:00Z", "until": "2024-01-02T23:59:59.999Z"}
    lines = tmp_path / "x.txt"
    lines.write_text("one\ntwo\n\none\n", "utf-8")
    assert read_texts([lines]).text == ["one", "two"]
    assert read_rows(lines) == ["one", "two", "", "one"]


def test_a_window_that_ends_with_a_date_ends_with_its_day(tmp_path: Path) -> None:
    dates = csv(
        tmp_path, "up,positive,2024-01-03", "down,negative,2024-01-01", header="text,label,published_at"
    )
    assert read_labelled([dates]).window() == {
        "since": "2024-01-01T00:00:00Z",
        "until": "2024-01-03T23:59:59.999Z",
    }


def test_a_stratified_part_holds_its_share_of_every_class() -> None:
    label = np.repeat([0, 1, 2], [100, 50, 10])
    kept, out = stratified(label, 0.2, seed=0)
    assert np.bincount(label[out]).tolist() == [20, 10, 2]
    assert sorted([*kept, *out]) == list(range(160))
    assert not np.array_equal(stratified(label, 0.2, seed=1)[1], out)


def test_a_file_of_contradictions_alone_says_so(tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match="none of 3 rows can be used: 2 bear a label that contradicts another, 1 no text"
    ):
        read_labelled([csv(tmp_path, "Odd,neutral", "odd,negative", ",positive")])
