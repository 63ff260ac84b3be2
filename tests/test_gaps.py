"""Every missing bar gets a reason, and a window is cut where the reason changes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from recur.connectors.windows import Window
from recur.pipeline.gaps import Life, Part, explained, reason_of
from recur.vocabulary import HOUR_MS, Series, parse_time

START = parse_time("2025-07-01")
BTC = Series("linear", "BTCUSDT", "1h")


def hour(n: float) -> int:
    return START + int(n * HOUR_MS)


def window(n: int) -> Window:
    return Window(BTC, hour(0), hour(n), n)


def test_a_bar_is_missing_because_of_the_listing_the_delisting_a_maintenance_or_nothing_known() -> None:
    life = Life(listed_ms=hour(2), delisted_ms=hour(8))
    closed = [(hour(4.5), hour(5.2))]
    found = [reason_of(hour(n), "1h", life, closed) for n in range(10)]
    assert found == [
        *["before listing"] * 2, *["venue empty"] * 2, *["maintenance"] * 2, *["venue empty"] * 2,
        *["delisted"] * 2,
    ]  # fmt: skip


def test_a_maintenance_touches_the_bars_it_overlaps_and_no_others() -> None:
    assert reason_of(hour(3), "1h", Life(), [(hour(4), hour(5))]) == "venue empty"
    assert reason_of(hour(4), "1h", Life(), [(hour(4), hour(5))]) == "maintenance"
    assert reason_of(hour(5), "1h", Life(), [(hour(4), hour(5))]) == "venue empty"


def test_a_whole_window_is_one_part_without_a_reason() -> None:
    assert explained(window(5), [], Life()) == [Part(hour(0), hour(5), 0, "")]


def test_a_window_is_cut_where_the_reason_changes() -> None:
    missing = [hour(n) for n in (0, 1, 5, 6, 9)]
    life = Life(listed_ms=hour(2), delisted_ms=hour(9))
    assert explained(window(10), missing, life, [(hour(6), hour(7))]) == [
        Part(hour(0), hour(5), 2, "before listing"),
        Part(hour(5), hour(6), 1, "venue empty"),
        Part(hour(6), hour(9), 1, "maintenance"),
        Part(hour(9), hour(10), 1, "delisted"),
    ]


@given(
    st.sets(st.integers(0, 29)), st.integers(0, 30), st.integers(0, 30), st.integers(0, 30), st.integers(0, 9)
)
def test_parts_cover_the_window_once_and_hold_every_missing_bar_with_its_reason(
    absent: set[int], listed: int, delisted: int, begin: int, length: int
) -> None:
    missing = [hour(n) for n in sorted(absent)]
    life, closed = Life(hour(listed), hour(delisted)), [(hour(begin), hour(begin + length))]
    parts = explained(window(30), missing, life, closed)
    assert [part.since_ms for part in parts] == [hour(0), *(part.until_ms for part in parts[:-1])]
    assert parts[-1].until_ms == hour(30)
    for part in parts:
        inside = [ms for ms in missing if part.since_ms <= ms < part.until_ms]
        assert len(inside) == part.missing
        assert {reason_of(ms, "1h", life, closed) for ms in inside} <= {part.reason}
