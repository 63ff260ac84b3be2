"""Every passing fault at once, at random: fetches are repeated until one ends well, and the store then equals that
of a venue without faults, by content hash."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from recur.connectors.sandbox.catalogue import CATALOGUE
from recur.connectors.sandbox.faults import Rule
from recur.connectors.sandbox.generated import GeneratedMarket
from recur.pipeline.certificate import certify
from recur.pipeline.fetch import FetchRequest, plan_fetch, run_fetch
from recur.storage.store import Store
from recur.vocabulary import VenueError
from tests.venue import END, NOW, START, Venue, hurried, running

SYMBOLS = ("BTCUSDT", "ETHUSDT", "SOLUSDT")
KINDS = ("candles", "mark", "index", "premium", "funding", "open_interest", "long_short")
FORMS = {
    "retcode-malformed": "missing|null|text",
    "result-malformed": "null|list|no-list",
    "json-not-an-object": "list|null|nan",
    "malformed-number": "empty|exponent|nan|huge|comma",
    "impossible-bar": "crossed|negative-volume",
    "wrong-timestamp": "misaligned|future",
    "row-order": "ascending|shuffled",
}
PLAIN = (
    "accept-reset", "close-before-headers", "reset-before-headers", "content-length-too-long", "broken-chunked",
    "corrupt-gzip", "silent-keep-alive-close", "http-429", "http-5xx", "redirect", "too-many-visits",
    "server-error-code", "time-window-code", "retmsg-missing", "error-without-retmsg", "empty-body", "truncated-json",
    "unknown-fields", "renamed-field", "retmsg-empty", "wrong-echo", "row-before-start", "limit-lowered",
    "start-ignored", "end-ignored", "duplicate-rows", "page-overlap", "long-page", "cursor-repeats",
)  # fmt: skip


def storm(probability: float) -> list[Rule]:
    """Each fault that a connector must see through, at every request it can strike."""
    rules = [Rule(name, probability=probability) for name in PLAIN]
    for name, forms in FORMS.items():
        rules += [Rule(name, probability=probability, options={"form": form}) for form in forms.split("|")]
    for form in ("zero", "tiny"):  # a premium may well be that, so there nobody could tell
        rules.append(
            Rule("malformed-number", "/v5/market/kline", probability=probability, options={"form": form})
        )
    for seconds in (-5.0, 5.0):
        rules.append(Rule("clock-skew", probability=probability, options={"seconds": seconds}))
    for name, seconds in (("latency-spike", 0.4), ("connect-refused", 0.01), ("drip", 0.1)):
        rules.append(Rule(name, probability=probability / 4, options={"seconds": seconds}))
    return rules


@pytest.fixture(scope="module")
def venue() -> Iterator[Venue]:
    with running(GeneratedMarket(3, START, END, SYMBOLS, base_interval="1h")) as venue:
        yield venue


def fetched(venue: Venue, home: Path) -> tuple[str, int]:
    """Fetch everything until it ends without an error; (content hash of the store, errors on the way)."""
    store, errors = Store(home), 0
    for _ in range(60):
        connector = hurried(venue.server.base_url)
        request = FetchRequest(SYMBOLS, kinds=KINDS, since_ms=START, workers=4)
        try:
            summary = run_fetch(store, connector, plan_fetch(store, connector, request))
        except VenueError:
            errors += 1
            continue
        assert summary.gaps == 0
        return str(certify(store, NOW)["sha256"]), errors
    raise AssertionError("sixty fetches have failed")


def check(venue: Venue, home: Path, seed: int, probability: float) -> None:
    venue.heals()
    truth, errors = fetched(venue, home / "truth")
    assert errors == 0
    venue.suffers(*storm(probability), seed=seed)
    found, errors = fetched(venue, home / "storm")
    struck = venue.server.fault_counts
    venue.heals()
    assert struck.total() > 10 and len(struck) > 8 and set(struck) <= set(CATALOGUE)
    assert found == truth, f"seed {seed}: {errors} errors, {dict(struck)}"


@pytest.mark.parametrize("seed", [1, 2])
def test_a_storm_of_faults_ends_with_the_truth(venue: Venue, tmp_path: Path, seed: int) -> None:
    check(venue, tmp_path, seed, probability=0.008)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(10, 40))
def test_thirty_storms_of_faults_end_with_the_truth(venue: Venue, tmp_path: Path, seed: int) -> None:
    check(venue, tmp_path, seed, probability=0.012)
