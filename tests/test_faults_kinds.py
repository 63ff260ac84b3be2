"""Every fault of funding, open interest, ratios and instruments, by name, against fetches into a real store;
those of announcements against the real pybit client."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from pybit.unified_trading import HTTP

from recur.connectors.sandbox.faults import Rule
from recur.connectors.sandbox.generated import GeneratedMarket, extra_lives
from recur.storage.store import Store
from recur.vocabulary import DAY_MS, HOUR_MS, VenueRefused, iso
from tests.venue import END, NOON, NOW, START, Venue, hurried, running

FUNDING, INTEREST, RATIO = (
    "/v5/market/funding/history",
    "/v5/market/open-interest",
    "/v5/market/account-ratio",
)
INSTRUMENTS, NEWS = "/v5/market/instruments-info", "/v5/announcements/index"
EIGHT_HOURS = 8 * HOUR_MS
MANY = [f"C{number:04}USDT" for number in range(1200)]


@pytest.fixture(scope="module")
def shared_venue() -> Iterator[Venue]:
    symbols = ["BTCUSDT", *MANY]
    market = GeneratedMarket(3, START, END, symbols, base_interval="1h", lives=extra_lives(START, NOON))
    with running(market) as venue:
        yield venue


@pytest.fixture
def venue(shared_venue: Venue) -> Iterator[Venue]:
    yield shared_venue
    shared_venue.heals()


def events(venue: Venue, kind: str) -> pl.DataFrame:
    """The market's own truth up to its clock: (time in UTC ms, value)."""
    if kind == "funding":
        times, values = venue.market.funding("linear", "BTCUSDT")
    elif kind == "open_interest":
        times, values = venue.market.open_interest("linear", "BTCUSDT", HOUR_MS)
    else:
        times, values = venue.market.account_ratio("linear", "BTCUSDT", HOUR_MS)
    return pl.DataFrame({"time": times[times <= NOW], "value": values[times <= NOW]})


def stored(store: Store, kind: str) -> pl.DataFrame:
    if kind == "funding":
        frame, time, value = store.funding("linear", ["BTCUSDT"]), "funding_time", "rate"
    else:
        frame = store.points(kind, "linear", ["BTCUSDT"], "1h")
        time, value = "ts", {"open_interest": "open_interest", "long_short": "buy_ratio"}[kind]
    return frame.select(pl.col(time).dt.epoch("ms").alias("time"), pl.col(value).alias("value"))


KINDS = {"funding": FUNDING, "open_interest": INTEREST, "long_short": RATIO}


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize(
    ("fault", "options"),
    [
        ("empty-page", {}),
        ("short-page", {"rows": 30}),
        ("duplicate-rows", {}),
        ("row-order", {"form": "shuffled"}),
        ("swapped-reply", {}),
        ("start-ignored", {}),
        ("end-ignored", {}),
        ("wrong-echo", {"field": "symbol"}),
        ("truncated-json", {}),
        ("unknown-fields", {}),
        ("http-5xx", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_fault_that_passes_leaves_no_mark_on_funding_and_positions(
    venue: Venue, tmp_path: Path, kind: str, fault: str, options: dict[str, Any]
) -> None:
    store = Store(tmp_path)
    venue.suffers(Rule(fault, KINDS[kind], count=1, options=options))
    venue.fetch(store, kinds=(kind,), workers=1)
    assert venue.server.fault_counts[fault] == 1
    assert stored(store, kind).equals(events(venue, kind))


@pytest.mark.parametrize("kind", ["open_interest", "long_short"])
@pytest.mark.parametrize(
    "fault", ["series-hole", "series-duplicate", "cursor-repeats", "cursor-double-encoded"]
)
def test_holes_doubles_and_cursors_of_positions_are_seen_through(
    venue: Venue, tmp_path: Path, kind: str, fault: str
) -> None:
    store = Store(tmp_path)
    count = 1 if fault == "series-hole" else None
    venue.suffers(Rule(fault, KINDS[kind], count=count))
    venue.fetch(store, kinds=(kind,), workers=1)
    assert venue.server.fault_counts[fault] >= 1
    assert stored(store, kind).equals(events(venue, kind))


def test_a_change_of_the_funding_interval_loses_no_event(venue: Venue, tmp_path: Path) -> None:
    store = Store(tmp_path)
    change_ms = START + 20 * DAY_MS
    venue.suffers(Rule("funding-interval-change", options={"before": iso(change_ms)}))
    venue.fetch(store, kinds=("funding",))
    both = (pl.col("time") >= change_ms) | (pl.col("time") // EIGHT_HOURS % 2 == 0)
    assert stored(store, "funding").equals(events(venue, "funding").filter(both))


# -- instruments ------------------------------------------------------------------------------------------------


def names(venue: Venue) -> list[str]:
    return [str(row["symbol"]) for row in hurried(venue.server.base_url).instruments("linear")]


def test_a_cursor_that_repeats_ends_the_paging_with_all_instruments(venue: Venue) -> None:
    venue.suffers(Rule("cursor-repeats", INSTRUMENTS))
    assert set(names(venue)) == {"BTCUSDT", "NEWUSDT", *MANY}


def test_a_cursor_on_an_empty_page_ends_the_paging(venue: Venue) -> None:
    venue.suffers(Rule("cursor-on-empty-page", INSTRUMENTS))
    assert names(venue) == []
    assert venue.server.fault_counts["cursor-on-empty-page"] == 1


@pytest.mark.parametrize("fault", ["cursor-expired", "cursor-double-encoded"])
def test_a_cursor_that_is_refused_is_an_error_and_no_short_list(venue: Venue, fault: str) -> None:
    venue.suffers(Rule(fault, INSTRUMENTS))
    with pytest.raises(VenueRefused, match="cursor invalid"):
        names(venue)
    venue.heals()
    assert len(names(venue)) == len(MANY) + 2


def test_a_listing_between_two_pages_loses_no_instrument(venue: Venue) -> None:
    venue.suffers(Rule("instruments-shift", INSTRUMENTS))
    found = names(venue)
    assert len(found) == len(MANY) + 3 and set(found) == {"BTCUSDT", "NEWUSDT", *MANY}


def test_a_delisted_symbol_is_fetched_for_as_long_as_it_lived(venue: Venue, tmp_path: Path) -> None:
    store = Store(tmp_path)
    venue.fetch(store, "GONEUSDT")
    gone_ms = extra_lives(START, NOON)["GONEUSDT"].delisted_ms
    opens = store.candles("linear", ["GONEUSDT"], "1h")["open_time"].dt.epoch("ms").to_list()
    assert gone_ms is not None and opens == list(range(START, gone_ms, HOUR_MS))


# -- announcements ----------------------------------------------------------------------------------------------


@pytest.fixture
def client(venue: Venue) -> Iterator[HTTP]:
    made = HTTP(max_retries=1)
    made.endpoint = venue.server.base_url
    yield made
    made.client.close()


def page(client: HTTP, number: int, limit: int = 5) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = client.get_announcement(locale="en-US", page=number, limit=limit)["result"][
        "list"
    ]
    return rows


def urls(rows: list[dict[str, Any]]) -> list[str]:
    return [row["url"] for row in rows]


def test_an_announcement_inserted_between_pages_repeats_an_item(venue: Venue, client: HTTP) -> None:
    first, second = page(client, 1), page(client, 2)
    venue.suffers(Rule("announcement-inserted", NEWS))
    assert urls(page(client, 1)) == urls(first)
    assert urls(page(client, 2)) == [first[-1]["url"], *urls(second)[:-1]]


def test_an_edited_announcement_keeps_its_url(venue: Venue, client: HTTP) -> None:
    (before, *_) = page(client, 1)
    venue.suffers(Rule("announcement-edited", NEWS))
    (after, *_) = page(client, 1)
    assert after["url"] == before["url"] and after["title"] == before["title"] + " (updated)"


@pytest.mark.parametrize(
    ("fault", "gone", "new"),
    [
        ("publish-time-missing", {"publishTime"}, set()),
        (
            "date-fields-misspelt",
            {"startDateTimestamp", "endDateTimestamp"},
            {"startDataTimestamp", "endDataTimestamp"},
        ),
    ],
)
def test_fields_of_announcements_are_missing_or_misspelt(
    venue: Venue, client: HTTP, fault: str, gone: set[str], new: set[str]
) -> None:
    usual = set(page(client, 1)[0])
    venue.suffers(Rule(fault, NEWS))
    assert all(set(row) == (usual - gone) | new for row in page(client, 1))


def test_announcements_are_dated_ahead_tagged_in_other_words_and_miscounted(
    venue: Venue, client: HTTP
) -> None:
    plain = client.get_announcement(locale="ja-JP")["result"]
    venue.suffers(Rule("announcement-dated-ahead", NEWS, count=1), Rule("tags-localised", NEWS, count=1),
                  Rule("total-wrong", NEWS, count=1))  # fmt: skip
    ahead, tagged, counted = (client.get_announcement(locale="ja-JP")["result"] for _ in range(3))
    assert [
        a["dateTimestamp"] - b["dateTimestamp"] for a, b in zip(ahead["list"], plain["list"], strict=True)
    ] == [30 * DAY_MS] * len(plain["list"])
    assert any("デリバティブ" in row["tags"] for row in tagged["list"])
    assert not any("Derivatives" in row["tags"] for row in tagged["list"])
    assert counted["total"] == 3 * plain["total"] + 7


def test_the_truth_of_these_tests_is_not_empty(venue: Venue) -> None:
    assert [events(venue, kind).height for kind in KINDS] == [181, 1453, 1453]
