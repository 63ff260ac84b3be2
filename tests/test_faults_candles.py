"""Every fault that can strike a fetch of candles, by name: the store ends equal to the venue's truth, or the
fetch ends with the right error and the next one makes the store equal."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from recur.connectors.sandbox.faults import Rule
from recur.connectors.sandbox.generated import GeneratedMarket
from recur.storage.store import Store
from recur.vocabulary import (
    HOUR_MS,
    Series,
    VenueBanned,
    VenueError,
    VenueForbidden,
    VenueRefused,
    VenueUnreachable,
    iso,
)
from tests.venue import BARS, END, NOON, NOW, START, Venue, gaps, hurried, revisions, running, stored

KLINE = "/v5/market/kline"


@pytest.fixture(scope="module")
def shared_venue() -> Iterator[Venue]:
    market = GeneratedMarket(3, START, END, symbols=("BTCUSDT", "ETHUSDT"), base_interval="1h")
    with running(market) as venue:
        yield venue


@pytest.fixture
def venue(shared_venue: Venue) -> Iterator[Venue]:
    yield shared_venue
    shared_venue.heals()


def case(fault: str, error: type[VenueError], **options: Any) -> Any:
    name = "-".join([fault, *(str(value) for value in options.values())])
    return pytest.param(fault, error, options, id=name)


def harmless(fault: str, **options: Any) -> Any:
    return pytest.param(fault, options, id="-".join([fault, *(str(value) for value in options.values())]))


PASSING = [
    case("connect-refused", VenueUnreachable, seconds=0.03),
    case("connect-stall", VenueUnreachable, seconds=0.03),
    case("accept-reset", VenueUnreachable),
    case("close-before-headers", VenueUnreachable),
    case("reset-before-headers", VenueUnreachable),
    case("silence-after-headers", VenueUnreachable),
    case("content-length-too-long", VenueUnreachable),
    case("broken-chunked", VenueUnreachable),
    case("corrupt-gzip", VenueUnreachable),
    case("latency-spike", VenueUnreachable, seconds=0.5),
    case("swapped-reply", VenueError),
    case("http-429", VenueUnreachable),
    case("http-5xx", VenueUnreachable),
    case("http-5xx", VenueUnreachable, status=503),
    case("redirect", VenueUnreachable),
    case("too-many-visits", VenueUnreachable, reset="none"),
    case("too-many-visits", VenueUnreachable, reset="past"),
    case("too-many-visits", VenueUnreachable, reset="garbage"),
    case("too-many-visits", VenueUnreachable, reset="far"),
    case("server-error-code", VenueUnreachable),
    case("time-window-code", VenueUnreachable),
    case("retcode-malformed", VenueError, form="missing"),
    case("retcode-malformed", VenueError, form="null"),
    case("retcode-malformed", VenueError, form="text"),
    case("error-without-retmsg", VenueError),
    case("result-malformed", VenueError, form="null"),
    case("result-malformed", VenueError, form="list"),
    case("result-malformed", VenueError, form="no-list"),
    case("empty-body", VenueError),
    case("truncated-json", VenueError),
    case("json-not-an-object", VenueError, form="list"),
    case("json-not-an-object", VenueError, form="null"),
    case("json-not-an-object", VenueError, form="nan"),
    case("renamed-field", VenueError),
    case("wrong-echo", VenueError, field="symbol"),
    case("wrong-echo", VenueError, field="category"),
    case("row-before-start", VenueError),
    case("start-ignored", VenueError),
    case("duplicate-rows", VenueError),
    case("page-overlap", VenueError),
    case("long-page", VenueError),
    case("malformed-number", VenueError, form="empty"),
    case("malformed-number", VenueError, form="zero"),
    case("malformed-number", VenueError, form="tiny"),
    case("malformed-number", VenueError, form="nan"),
    case("malformed-number", VenueError, form="comma"),
    case("impossible-bar", VenueError, form="crossed"),
    case("impossible-bar", VenueError, form="negative-volume"),
    case("wrong-timestamp", VenueError, form="seconds"),
    case("wrong-timestamp", VenueError, form="misaligned"),
    case("wrong-timestamp", VenueError, form="future"),
]


@pytest.mark.parametrize(("fault", "error", "options"), PASSING)
def test_a_fault_that_passes_costs_nothing_and_one_that_stays_is_told(
    venue: Venue, tmp_path: Path, fault: str, error: type[VenueError], options: dict[str, Any]
) -> None:
    store = Store(tmp_path)
    endpoint = "connect" if fault == "accept-reset" else KLINE
    venue.suffers(Rule(fault, endpoint, options=options))
    with pytest.raises(VenueError) as raised:
        venue.fetch(store)
    assert type(raised.value) is error
    assert "\n" not in raised.value.message and raised.value.hint
    assert venue.server.fault_counts[fault] >= 1
    venue.heals()
    venue.suffers(Rule(fault, endpoint, count=2, options=options))
    summary = venue.fetch(store)
    assert venue.server.fault_counts[fault] == 2
    assert stored(store).equals(venue.truth())
    assert summary.gaps == 0


HARMLESS = [
    harmless("silent-keep-alive-close"),
    harmless("drip", seconds=0.6),
    harmless("retmsg-missing"),
    harmless("retmsg-empty"),
    harmless("unknown-fields"),
    harmless("clock-skew", seconds=5.0),
    harmless("clock-skew", seconds=-5.0),
    harmless("clock-skew", seconds=3600.0),
    harmless("open-candle-absent"),
    harmless("limit-lowered"),
    harmless("end-ignored"),
    harmless("row-order", form="ascending"),
    harmless("row-order", form="shuffled"),
    harmless("malformed-number", form="exponent"),
    harmless("malformed-number", form="huge"),
]


@pytest.mark.parametrize(("fault", "options"), HARMLESS)
def test_a_harmless_oddity_changes_nothing(
    venue: Venue, tmp_path: Path, fault: str, options: dict[str, Any]
) -> None:
    store = Store(tmp_path)
    venue.suffers(Rule(fault, KLINE, options=options))
    summary = venue.fetch(store)
    assert venue.server.fault_counts[fault] >= 2
    assert stored(store).equals(venue.truth())
    assert summary.gaps == 0


@pytest.mark.parametrize("days", [-5.0, 5.0])
def test_a_launch_time_that_is_wrong_is_not_believed(venue: Venue, tmp_path: Path, days: float) -> None:
    store = Store(tmp_path)
    venue.suffers(Rule("launch-time-wrong", options={"days": days}))
    venue.fetch(store)
    assert venue.server.fault_counts["launch-time-wrong"] >= 1
    assert stored(store).equals(venue.truth())


FINAL = [
    case("ip-ban", VenueBanned),
    case("geo-403", VenueForbidden),
    case("geo-200", VenueForbidden),
    case("path-blocked", VenueForbidden),
    case("http-404", VenueRefused),
    case("symbol-refused", VenueRefused),
    case("symbol-renamed", VenueRefused),
]


@pytest.mark.parametrize(("fault", "error", "options"), FINAL)
def test_a_final_answer_ends_the_fetch_at_once_and_the_next_fetch_repairs_it(
    venue: Venue, tmp_path: Path, fault: str, error: type[VenueError], options: dict[str, Any]
) -> None:
    store = Store(tmp_path)
    venue.suffers(
        Rule(fault, KLINE, skip=1, count=1, options=options)
    )  # after the question for the first bar
    with pytest.raises(VenueError) as raised:
        venue.fetch(store, workers=1)
    assert type(raised.value) is error
    assert raised.value.hint
    assert venue.server.fault_counts[fault] == 1
    venue.heals()
    venue.fetch(store)
    assert stored(store).equals(venue.truth())


def test_nothing_is_sent_during_a_ban_which_asking_would_extend(venue: Venue, tmp_path: Path) -> None:
    venue.suffers(Rule("ip-ban", KLINE, count=1))
    connector = hurried(venue.server.base_url)
    asked = venue.server.requests.total()
    for _ in range(3):
        with pytest.raises(VenueBanned):
            connector.first_open(Series("linear", "BTCUSDT", "1h"))
    assert venue.server.requests.total() == asked + 1
    with pytest.raises(VenueBanned):  # another program that asks on
        hurried(venue.server.base_url).server_time_ms()
    assert venue.server.limit.refused == 1


def test_a_renamed_symbol_is_reported_with_the_name_the_venue_has(venue: Venue, tmp_path: Path) -> None:
    venue.suffers(Rule("symbol-renamed", symbol="BTCUSDT", options={"to": "BTCXUSDT"}))
    with pytest.raises(VenueRefused, match="Did you mean 'BTCXUSDT'"):
        venue.fetch(Store(tmp_path))


def test_one_refused_symbol_does_not_cost_the_others(venue: Venue, tmp_path: Path) -> None:
    store = Store(tmp_path)
    venue.fetch(store, "ETHUSDT", until_ms=START + 100 * HOUR_MS)
    venue.fetch(store, "BTCUSDT", until_ms=START + 100 * HOUR_MS)
    venue.suffers(Rule("symbol-refused", KLINE, symbol="BTC*"))
    with pytest.raises(VenueRefused):
        venue.fetch(store, "BTCUSDT")
    venue.fetch(store, "ETHUSDT")
    assert stored(store, symbol="ETHUSDT").equals(venue.truth(symbol="ETHUSDT"))
    assert stored(store).height == 100


# -- what is missing, late or revised ---------------------------------------------------------------------------


def test_an_empty_page_in_the_middle_of_history_is_asked_again(venue: Venue, tmp_path: Path) -> None:
    store = Store(tmp_path)
    venue.suffers(Rule("empty-page", KLINE, skip=1, count=1))
    assert venue.fetch(store, workers=1).gaps == 0
    assert stored(store).equals(venue.truth())


def test_a_page_that_stays_empty_is_a_gap_with_a_reason(venue: Venue, tmp_path: Path) -> None:
    store = Store(tmp_path)
    venue.suffers(Rule("empty-page", KLINE, skip=1))
    summary = venue.fetch(store)
    assert (summary.new, summary.missing) == (0, BARS)
    assert gaps(store) == {"venue empty": BARS}


def test_a_short_page_is_completed(venue: Venue, tmp_path: Path) -> None:
    store = Store(tmp_path)
    venue.suffers(Rule("short-page", KLINE, skip=1, count=1, options={"rows": 300}))
    assert venue.fetch(store, workers=1).gaps == 0
    assert stored(store).equals(venue.truth())


def test_bars_that_do_not_exist_are_a_gap_and_the_rest_is_stored(venue: Venue, tmp_path: Path) -> None:
    store = Store(tmp_path)
    lost = (START + 500 * HOUR_MS, START + 517 * HOUR_MS)
    span = {"from": iso(lost[0]), "to": iso(lost[1])}
    venue.suffers(Rule("missing-bars", KLINE, options=span))
    summary = venue.fetch(store)
    assert (summary.gaps, summary.missing) == (1, 17)
    truth = venue.truth().filter(~pl.col("open_time").is_between(*lost, closed="left"))
    assert stored(store).equals(truth)
    assert gaps(store) == {"venue empty": 17}


def test_flat_bars_without_volume_are_bars(venue: Venue, tmp_path: Path) -> None:
    store = Store(tmp_path)
    quiet = pl.col("open_time").is_between(START + 500 * HOUR_MS, START + 517 * HOUR_MS, closed="left")
    span = {"from": iso(START + 500 * HOUR_MS), "to": iso(START + 517 * HOUR_MS)}
    venue.suffers(Rule("flat-bars", KLINE, options=span))
    assert venue.fetch(store).gaps == 0
    flat = [pl.when(quiet).then("open").otherwise(name).alias(name) for name in ("high", "low", "close")]
    nothing = [pl.when(quiet).then(0.0).otherwise(name).alias(name) for name in ("volume", "turnover")]
    assert stored(store).equals(venue.truth().with_columns(*flat, *nothing))


def test_a_bar_that_was_revised_is_corrected_and_both_readings_are_kept(venue: Venue, tmp_path: Path) -> None:
    store = Store(tmp_path)
    venue.fetch(store, until_ms=NOON - 24 * HOUR_MS)
    venue.suffers(Rule("late-revision", KLINE))
    venue.fetch(store)
    assert not stored(store).equals(venue.truth())
    venue.heals()
    summary = venue.fetch(store)
    assert stored(store).equals(venue.truth())
    assert (summary.new, summary.changed, revisions(store)) == (0, 1, 1)


def test_a_bar_that_comes_late_is_fetched_when_it_is_there(venue: Venue, tmp_path: Path) -> None:
    store = Store(tmp_path)
    venue.suffers(Rule("late-bar", KLINE, options={"seconds": 3600.0}))
    assert venue.fetch(store).missing == 1
    assert stored(store).equals(venue.truth(until_ms=NOON - HOUR_MS))
    venue.heals()
    assert venue.fetch(store).new == 1
    assert stored(store).equals(venue.truth())


@pytest.mark.parametrize("seconds", [5.0, -5.0, 3600.0, -3600.0])
@pytest.mark.parametrize("endpoint", ["*", "/v5/market/time"])
def test_a_venue_whose_clock_is_off_is_put_right_by_the_next_fetch(
    venue: Venue, tmp_path: Path, seconds: float, endpoint: str
) -> None:
    store = Store(tmp_path)
    venue.suffers(Rule("clock-skew", endpoint, options={"seconds": seconds}))
    venue.fetch(store)
    venue.heals()
    venue.server.clock.set(NOW + HOUR_MS)
    venue.fetch(store)
    assert stored(store).equals(venue.truth(until_ms=NOON + HOUR_MS))


def test_a_symbol_delisted_midway_keeps_what_it_had(venue: Venue, tmp_path: Path) -> None:
    store = Store(tmp_path)
    end_ms = START + 700 * HOUR_MS
    venue.suffers(Rule("delisted-midway", symbol="BTCUSDT", options={"at": iso(end_ms)}))
    venue.fetch(store)
    assert stored(store).equals(venue.truth(until_ms=end_ms))
    ((reason, missing),) = gaps(store).items()
    assert reason in ("delisted", "venue empty") and missing == BARS - 700


def test_the_same_name_in_two_categories_is_two_series(venue: Venue, tmp_path: Path) -> None:
    store = Store(tmp_path)
    venue.fetch(store)
    venue.fetch(store, category="spot")
    assert stored(store).equals(venue.truth())
    assert stored(store, "spot").equals(venue.truth("spot"))
    assert not venue.truth("spot").equals(venue.truth())


def test_a_name_that_does_not_resolve_is_an_unreachable_venue(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    with pytest.raises(VenueUnreachable, match=r"http://sandbox\.invalid"):
        hurried("http://sandbox.invalid", attempts=2).server_time_ms()
