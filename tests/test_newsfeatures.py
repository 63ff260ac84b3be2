"""News joined to bars never looks ahead: inside a bar, at its boundary, by date only, edited later, arriving late."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recur.pipeline.entities import base_coin, mentions
from recur.pipeline.newsfeatures import (
    NAMES,
    known_at_ms,
    make_items,
    news_columns,
    shuffled_within_month,
)
from recur.storage.frames import NEWS_SCHEMA
from recur.vocabulary import DAY_MS, HOUR_MS, parse_time

T0 = parse_time("2024-05-01")
CLOSES = T0 + HOUR_MS * np.arange(1, 241, dtype=np.int64)


def _news(*rows: dict[str, Any]) -> pl.DataFrame:
    base = {
        "news_id": "a", "published_precision": "s", "title": "Bitcoin rises", "body": "", "url": None,
        "source": "x", "tags": "[]", "version": 1, "backfill": False,
    }  # fmt: skip
    full = [{**base, **row} for row in rows]
    for row in full:
        row.setdefault("first_seen", row["published_at"])
        row.setdefault("story_id", row["news_id"])
    frame = pl.DataFrame(
        [{k: row[k] for k in NEWS_SCHEMA} for row in full], orient="row", infer_schema_length=None
    )
    return frame.with_columns(
        pl.col("published_at", "first_seen").cast(pl.Int64).cast(pl.Datetime("ms", "UTC"))
    ).cast({k: v for k, v in NEWS_SCHEMA.items() if k not in ("published_at", "first_seen")})


def _scores(*values: tuple[str, int, float]) -> pl.DataFrame:
    return pl.DataFrame(
        [{"news_id": i, "version": v, "p_negative": 0.0, "p_positive": s} for i, v, s in values],
        schema={
            "news_id": pl.String,
            "version": pl.Int32,
            "p_negative": pl.Float64,
            "p_positive": pl.Float64,
        },
    )


def _columns(news: pl.DataFrame, scores: pl.DataFrame | None = None, latency_s: float = 0.0) -> pl.DataFrame:
    return news_columns("BTCUSDT", CLOSES, make_items(news, scores, latency_s))


def _first_bar(frame: pl.DataFrame) -> int:
    return int(np.argmax(frame["news_all_any"].to_numpy() > 0))


@pytest.mark.parametrize(
    ("row", "known"),
    [
        ({"published_at": T0 + 1_500, "published_precision": "ms"}, T0 + 1_500),
        ({"published_at": T0 + 1_500, "published_precision": "s"}, T0 + 2_000),
        ({"published_at": T0 + 5 * 60_000, "published_precision": "minute"}, T0 + 6 * 60_000),
        ({"published_at": T0, "published_precision": "day"}, T0 + DAY_MS),
        ({"published_at": T0 + 7 * HOUR_MS, "published_precision": "day"}, T0 + DAY_MS),
        ({"published_at": T0, "published_precision": "ms", "first_seen": T0 + HOUR_MS}, T0 + HOUR_MS),
        ({"published_at": T0, "published_precision": "ms", "first_seen": T0 + HOUR_MS, "backfill": True}, T0),
        ({"published_at": T0, "published_precision": "ms", "first_seen": T0 + HOUR_MS, "backfill": True,
          "version": 2}, T0 + HOUR_MS),
    ],
)  # fmt: skip
def test_an_item_is_known_when_it_could_be(row: dict[str, Any], known: int) -> None:
    assert known_at_ms(_news(row), latency_s=0).to_list() == [known]
    assert known_at_ms(_news(row), latency_s=90).to_list() == [known + 90_000]


def test_an_item_inside_a_bar_counts_at_that_bars_close_and_not_before() -> None:
    frame = _columns(_news({"published_at": T0 + 5 * HOUR_MS + 60_000}))
    assert _first_bar(frame) == 5  # the bar that closes at 06:00
    assert frame["news_all_count_6"].to_list()[4] == 0.0


def test_an_item_at_a_boundary_counts_at_the_close_only_when_it_was_known_by_then() -> None:
    exact = {"published_at": T0 + 5 * HOUR_MS, "published_precision": "ms"}
    assert _first_bar(_columns(_news(exact))) == 4
    assert _first_bar(_columns(_news(exact), latency_s=1)) == 5


def test_an_item_with_a_date_only_counts_from_the_next_midnight() -> None:
    assert _first_bar(_columns(_news({"published_at": T0 + DAY_MS, "published_precision": "day"}))) == 47


def test_an_item_that_arrives_late_counts_from_its_arrival() -> None:
    late = {"published_at": T0 + HOUR_MS, "first_seen": T0 + 9 * HOUR_MS + 1}
    assert _first_bar(_columns(_news(late))) == 9


def test_an_edit_changes_the_score_from_the_instant_it_was_seen() -> None:
    news = _news(
        {"published_at": T0, "published_precision": "ms"},
        {"published_at": T0, "published_precision": "ms", "first_seen": T0 + 6 * HOUR_MS, "version": 2},
    )
    frame = _columns(news, _scores(("a", 1, 0.8), ("a", 2, -0.4)))
    sums, counts = frame["news_own_sum_6"].to_list(), frame["news_own_count_6"].to_list()
    assert sums[0] == pytest.approx(0.8 * 2 ** (-1 / 6))
    assert sums[5] == pytest.approx(-0.4 * 0.5)
    assert np.expm1(counts[5]) == pytest.approx(0.5)  # still one item


@pytest.mark.parametrize("seen", [12 * HOUR_MS, DAY_MS])
def test_a_date_that_an_edit_made_exact_does_not_come_back_at_midnight(seen: int) -> None:
    news = _news(
        {"published_at": T0, "published_precision": "day"},
        {
            "published_at": T0 + 10 * HOUR_MS,
            "published_precision": "ms",
            "first_seen": T0 + seen,
            "version": 2,
        },
    )
    frame = _columns(news, _scores(("a", 1, 0.8), ("a", 2, -0.4)))
    sums, counts = frame["news_own_sum_6"].to_list(), frame["news_own_count_6"].to_list()
    close = seen // HOUR_MS - 1
    assert [sums[close - 1], sums[close], sums[close + 6]] == pytest.approx([0.0, -0.4, -0.2])
    assert sums[close + 18] == pytest.approx(-0.4 / 8)
    assert np.expm1(counts[close + 18]) == pytest.approx(1 / 8)


def test_no_news_is_a_state_of_its_own_and_never_neutral() -> None:
    frame = _columns(_news({"published_at": T0 + 100 * HOUR_MS}), _scores(("a", 1, 0.0)))
    before, after = frame.row(50, named=True), frame.row(101, named=True)
    assert (before["news_all_mean"], before["news_all_any"]) == (None, 0.0)
    assert (after["news_all_mean"], after["news_all_any"]) == (0.0, 1.0)


def test_a_repeated_story_is_not_new_and_disagreement_is_the_spread_of_scores() -> None:
    at = T0 + 2 * HOUR_MS
    news = _news(
        {"news_id": "a", "published_at": at, "story_id": "s"},
        {"news_id": "b", "published_at": at, "story_id": "s"},
    )
    row = _columns(news, _scores(("a", 1, 1.0), ("b", 1, -1.0))).row(3, named=True)
    assert row["news_all_novelty"] == pytest.approx(0.5)
    assert row["news_all_mean"] == pytest.approx(0.0)
    assert row["news_all_disagreement"] == pytest.approx(1.0)


def test_items_of_other_coins_count_for_the_market_only() -> None:
    row = _columns(_news({"published_at": T0, "title": "Cardano upgrade"})).row(2, named=True)
    assert (row["news_own_any"], row["news_all_any"]) == (0.0, 1.0)


def test_coins_are_told_from_texts() -> None:
    texts = [
        "Bitcoin Cash forks",
        "bitcoin falls",
        "XBT futures",
        "the sol rises",
        "$SOL up",
        "SOL up",
        "link here",
    ]
    assert mentions("BTCUSDT", texts) == [False, True, True, False, False, False, False]
    assert mentions("SOLUSDT", texts) == [False, False, False, False, True, True, False]
    assert mentions("LINKUSDT", texts) == [False] * 7
    assert base_coin("1000PEPEUSDT") == "PEPE"


@settings(max_examples=30, deadline=None)
@given(
    times=st.lists(st.integers(0, 230 * HOUR_MS), min_size=1, max_size=20),
    precision=st.sampled_from(["ms", "s", "minute", "day"]),
    cut=st.integers(5, 235),
)
def test_what_becomes_known_after_a_bar_leaves_every_column_up_to_it_bit_identical(
    times: list[int], precision: str, cut: int
) -> None:
    rows = [
        {"news_id": str(k), "published_at": T0 + t, "published_precision": precision, "story_id": str(k % 3)}
        for k, t in enumerate(times)
    ]
    news = _news(*rows)
    scores = _scores(*((str(k), 1, 1.0 - k / 10) for k in range(len(times))))
    whole = _columns(news, scores)
    past = news.filter(known_at_ms(news, 0) <= int(CLOSES[cut]))
    poisoned = _news(*({**row, "title": "Bitcoin poison", "story_id": "0"} for row in rows))
    later = poisoned.filter(known_at_ms(poisoned, 0) > int(CLOSES[cut]))
    for other in (past, pl.concat([past, later])):
        frame = _columns(other, scores) if other.height else None
        if frame is not None:
            assert frame.head(cut + 1).equals(whole.head(cut + 1))


def test_a_placebo_keeps_what_was_said_and_how_much_in_a_month_and_moves_only_times() -> None:
    rows = [{"news_id": str(k), "published_at": T0 + k * DAY_MS, "title": f"Item {k}"} for k in range(60)]
    news = _news(*rows)
    placebo = shuffled_within_month(news, 1)
    assert placebo["title"].to_list() == news["title"].to_list()
    assert sorted(placebo["published_at"]) == sorted(news["published_at"])
    assert placebo["published_at"].to_list() != news["published_at"].to_list()
    months = [frame["published_at"].dt.month().to_list() for frame in (news, placebo)]
    assert months[0] == months[1]


def test_all_columns_are_there_even_without_items() -> None:
    frame = _columns(_news({"published_at": T0 + 400 * HOUR_MS}))
    assert frame.columns == list(NAMES)
    assert frame["news_all_any"].sum() == 0
