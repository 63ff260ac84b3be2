"""Which request a fault strikes: rules, their files, and the catalogue they draw from."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recur.connectors.sandbox.catalogue import CATALOGUE
from recur.connectors.sandbox.faults import FaultPlan, Rule, read_faults
from recur.connectors.sandbox.spoil import EFFECTS
from recur.vocabulary import UsageError, parse_time

KLINE, FUNDING = "/v5/market/kline", "/v5/market/funding/history"


def struck(
    plan: FaultPlan, times: int, endpoint: str = KLINE, symbol: str = "BTCUSDT", now_ms: int = 0
) -> str:
    """One letter per request: the first of the fault's name, or a dot."""
    faults = [plan.take(endpoint, symbol, now_ms) for _ in range(times)]
    return "".join("." if fault is None else fault.name[0] for fault in faults)


def test_a_rule_skips_then_strikes_so_often() -> None:
    plan = FaultPlan([Rule("empty-body", skip=2, count=3)])
    assert struck(plan, 8) == "..eee..."
    assert plan.counts == {"empty-body": 3}


def test_the_first_rule_that_is_due_strikes_and_the_others_wait() -> None:
    plan = FaultPlan([Rule("empty-body", count=1), Rule("http-429", count=2), Rule("drip", skip=1, count=1)])
    assert struck(plan, 6) == "ehh.d."


def test_endpoint_and_symbol_are_globs_and_a_request_without_symbol_fits() -> None:
    plan = FaultPlan([Rule("empty-body", "/v5/market/*", symbol="BTC*")])
    assert struck(plan, 1) == "e" and struck(plan, 1, symbol="") == "e"
    assert struck(plan, 1, symbol="ETHUSDT") == "." and struck(plan, 1, "/v5/system/status") == "."


def test_a_rule_can_hold_in_a_time_of_the_venue_or_between_two_requests() -> None:
    plan = FaultPlan([Rule("empty-body", since_ms=10, until_ms=12)])
    assert [struck(plan, 1, now_ms=ms) for ms in (9, 10, 11, 12)] == [".", "e", "e", "."]
    plan = FaultPlan([Rule("empty-body", from_request=2, to_request=4)])
    assert struck(plan, 6) == "..ee.."


def test_a_fault_strikes_only_where_it_can() -> None:
    rules = [Rule(name, endpoint="*") for name in ("accept-reset", "reject", "row-order", "cursor-expired")]
    plan = FaultPlan(rules)
    assert struck(plan, 1, "connect") == "a" and struck(plan, 1, "stream/subscribe") == "r"
    assert struck(plan, 1, "stream/kline") == "." and struck(plan, 1, "/v5/market/time") == "."
    assert struck(plan, 1, FUNDING) == "r"
    asked = plan.take("/v5/market/open-interest", "BTCUSDT", 0, {"cursor": "x"})
    assert asked is not None and asked.name == "row-order"
    assert FaultPlan(rules[3:]).take("/v5/market/open-interest", "", 0, {}) is None
    assert FaultPlan(rules[3:]).take("/v5/market/open-interest", "", 0, {"cursor": "x"}) is not None


def test_connections_and_streams_are_not_counted_as_requests() -> None:
    plan = FaultPlan([Rule("empty-body", from_request=1, to_request=2)])
    struck(plan, 5, "connect")
    struck(plan, 5, "stream/kline")
    assert struck(plan, 3) == ".e." and plan.requests == 3


@given(seed=st.integers(0, 2**32), probability=st.floats(0, 1), requests=st.integers(0, 60))
def test_the_same_seed_strikes_the_same_requests(seed: int, probability: float, requests: int) -> None:
    first, second = (FaultPlan([Rule("drip", probability=probability)], seed) for _ in range(2))
    assert struck(first, requests) == struck(second, requests)
    assert first.counts.total() <= requests


def test_a_probability_is_kept_over_many_requests() -> None:
    plan = FaultPlan([Rule("drip", probability=0.3)], seed=5)
    assert 1200 - 75 < struck(plan, 4000).count("d") < 1200 + 75  # standard deviation 29


def test_threads_share_a_count_to_the_last_strike() -> None:
    plan = FaultPlan([Rule("empty-body", count=1000)])
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(struck(plan, 500))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Counter("".join(found)) == {"e": 1000, ".": 1000}
    assert plan.counts["empty-body"] == 1000 and plan.requests == 2000


# -- files ------------------------------------------------------------------------------------------------------

TOML = """
seed = 7
[[rule]]
fault = "http-5xx"
endpoint = "/v5/market/*kline"
symbol = "BTC*"
skip = 3
count = 5
probability = 0.5
since = "2025-07-01"
until = "2025-07-02T12:00"
from_request = 1
to_request = 100
status = 503
[[rule]]
fault = "drip"
"""


def test_a_file_says_all_that_a_rule_can(tmp_path: Path) -> None:
    (tmp_path / "faults.toml").write_text(TOML)
    rules = read_faults(tmp_path / "faults.toml").rules
    assert rules[0] == Rule(
        "http-5xx", "/v5/market/*kline", "BTC*", 3, 5, 0.5, parse_time("2025-07-01"),
        parse_time("2025-07-02T12:00"), 1, 100, {"status": 503},
    )  # fmt: skip
    assert rules[1].settings() == {"seconds": 10.0}
    document = {"seed": 7, "rule": [{"fault": "drip", "seconds": 2}]}
    (tmp_path / "faults.json").write_text(json.dumps(document))
    (tmp_path / "bare.json").write_text(json.dumps(document["rule"]))
    for name in ("faults.json", "bare.json"):
        assert read_faults(tmp_path / name).rules[0].settings() == {"seconds": 2}


def test_a_choice_defaults_to_its_first_form() -> None:
    assert Rule("too-many-visits").settings() == {"reset": "none"}
    assert Rule("too-many-visits", options={"reset": "far"}).settings() == {"reset": "far"}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('[[rule]]\nfault = "http-5x"', "rule 1: Unknown fault 'http-5x'. Did you mean 'http-5xx'?"),
        ('[[rule]]\nfault = "drip"\n[[rule]]\nendpoint = "x"', "rule 2: Expected a table with at least 'fault'"),
        ('[[rule]]\nfault = "drip"\nminutes = 1', "Fault drip has no option 'minutes'; it has seconds"),
        ('[[rule]]\nfault = "drip"\nseconds = "1"', "seconds is '1', expected a value like 10.0"),
        ('[[rule]]\nfault = "too-many-visits"\nreset = "soon"', "expected one of none|past|garbage|far"),
        ('[[rule]]\nfault = "drip"\ncount = 0', "expected skip >= 0 and count >= 1"),
        ('[[rule]]\nfault = "drip"\nprobability = 1.5', "the probability is 1.5, expected 0 to 1"),
        ('[[rule]]\nfault = "drip"\nskip = "many"', "skip is 'many', which is not what it can be"),
        ('[[rule]]\nfault = "drip"\nsince = "soon"', "Cannot read the time 'soon'"),
        ('faults = []', "holds no faults"),
        ('[rule]\nfault = "drip"', "holds no faults"),
        ('seed = "x"\n[[rule]]\nfault = "drip"', "the seed is 'x'"),
        ("rule = [", "cannot be read"),
    ],
)  # fmt: skip
def test_a_file_that_makes_no_sense_is_refused(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "faults.toml").write_text(text)
    with pytest.raises(UsageError, match=re.escape(says)):
        read_faults(tmp_path / "faults.toml")


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        read_faults(tmp_path / "none.toml")


# -- the catalogue ----------------------------------------------------------------------------------------------


def test_every_fault_of_a_request_has_an_effect_and_no_effect_is_without_a_fault() -> None:
    requests = {name for name, kind in CATALOGUE.items() if any(path.startswith("/") for path in kind.paths)}
    assert requests == set(EFFECTS)
    streams = {n for n, k in CATALOGUE.items() if all(path.startswith("stream/") for path in k.paths)}
    assert set(CATALOGUE) == requests | streams | {"accept-reset"}


def test_the_catalogue_covers_more_than_fifty_faults_over_http_and_fifteen_of_streams() -> None:
    numbers = {
        where: {k.number for k in CATALOGUE.values() if any(fnmatchcase(path, glob) for path in k.paths)}
        for where, glob in (("http", "[/c]*"), ("stream", "stream/*"))
    }
    assert len(numbers["http"]) == 59 and max(numbers["http"]) == 61
    assert numbers["stream"] == set(range(62, 77))


def test_every_fault_of_http_is_named_by_a_test_that_strikes_with_it() -> None:
    here = Path(__file__).parent
    told = "".join((here / f"test_faults_{part}.py").read_text("utf-8") for part in ("candles", "kinds"))
    http = [n for n, k in CATALOGUE.items() if not any(path.startswith("stream/") for path in k.paths)]
    assert [name for name in http if f'"{name}"' not in told] == []


# -- the command line -------------------------------------------------------------------------------------------


def test_the_command_line_serves_with_faults_and_latency(tmp_path: Path) -> None:
    (tmp_path / "faults.toml").write_text('[[rule]]\nfault = "http-5xx"\nstatus = 503\ncount = 1\n')
    words = ["--port", "0", "--since", "2025-01-01", "--until", "2025-01-02", "--speed", "0"]
    faulty = ["--faults", "faults.toml", "--latency-ms", "150", "--enforce-limit"]
    command = [sys.executable, "-m", "recur.cli", "sandbox", "serve", *words, *faulty]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path) as server:
        assert server.stdout is not None
        try:
            url = server.stdout.readline().strip() + "/v5/market/time"
            began = time.monotonic()
            with pytest.raises(urllib.error.HTTPError, match="503") as caught:
                urllib.request.urlopen(url, timeout=10)
            caught.value.close()
            with urllib.request.urlopen(url, timeout=10) as reply:
                assert json.load(reply)["retCode"] == 0
            assert time.monotonic() - began >= 0.3
        finally:
            server.terminate()
        assert server.wait(10) == 0


def test_a_wrong_fault_file_is_one_line_and_wrong_usage(tmp_path: Path) -> None:
    (tmp_path / "faults.toml").write_text('[[rule]]\nfault = "http-5x"\n')
    command = [
        sys.executable,
        "-m",
        "recur.cli",
        "sandbox",
        "serve",
        "--port",
        "0",
        "--faults",
        "faults.toml",
    ]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(
        "recur: faults.toml, rule 1: Unknown fault 'http-5x'. Did you mean 'http-5xx'?"
    )
    assert done.stderr.count("\n") == 1


def test_the_manual_lists_every_fault() -> None:
    manual = (Path(__file__).resolve().parents[1] / "docs" / "sandbox.md").read_text("utf-8")
    assert [name for name, kind in CATALOGUE.items() if f"| {kind.number} | `{name}` |" not in manual] == []
