"""Following the venue for hours of its own time: whatever happens, the store ends equal to the venue's candles."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path

import duckdb
import pytest

from recur.cli import run as recur
from recur.connectors.bybit import BybitConnector
from recur.connectors.live import Patience
from recur.connectors.sandbox.endpoints import Endpoints
from recur.connectors.sandbox.server import SandboxServer, VirtualClock
from recur.pipeline.fetch import FetchRequest
from recur.pipeline.follow import Follower, FollowSummary, seconds_of
from recur.pipeline.venue_clock import VenueClock
from recur.storage.store import Store
from recur.vocabulary import (
    DAY_MS,
    HOUR_MS,
    MINUTE_MS,
    UsageError,
    VenueRefused,
    VenueUnreachable,
    floor_open,
    parse_time,
)
from tests.following import NOW, QUICK, START, WORLD, Fault, eventually, following, stored, truth

SYMBOLS = ("BTCUSDT", "ETHUSDT")
KLINE_FAULTS: tuple[str, ...] = (
    *("close-1000", "close-1001", "close-1006", "reset", "half-open", "outage-short", "outage", "gap"),
    *("no-confirm", "two-confirms", "late-confirm", "out-of-order", "duplicate", "burst", "disagree"),
    *("bad-json", "binary", "no-topic", "unknown-topic"),
)


# -- a day --------------------------------------------------------------------------------------------


class RandomFaults:
    """At each moment of the stream a fault with some probability."""

    CHOICES: Mapping[str, tuple[float, tuple[str, ...]]] = {
        "stream/connect": (0.2, ("handshake-403", "handshake-429", "handshake-503", "half-open")),
        "stream/subscribe": (0.2, ("no-ack", "reject", "args-size", "ack-at-once")),
        "stream/kline": (0.05, KLINE_FAULTS),
    }

    def __init__(self, seed: int) -> None:
        self.drawn: list[str] = []
        self._random = random.Random(seed)
        self._lock = threading.Lock()

    def take(self, endpoint: str, symbol: str, now_ms: int) -> Fault | None:
        probability, names = self.CHOICES.get(endpoint, (0.0, ()))
        with self._lock:
            if self._random.random() >= probability:
                return None
            self.drawn.append(self._random.choice(names))
            return Fault(self.drawn[-1])


class Unsettled:
    """The venue's candles while some come late, some are corrected later, and some replies are cut off.

    Every seventh bar appears ``LATE_MS`` after its close; every fifth shows twice its volume until it is
    ``WRONG_MS`` old; every ninth until it is ``LONG_WRONG_MS`` old.
    """

    LATE_MS, WRONG_MS, LONG_WRONG_MS = 20_000, 2 * MINUTE_MS, 40 * MINUTE_MS

    def __init__(self, inner: Endpoints, step_ms: int, cut: float = 0.01) -> None:
        self._inner, self._step, self._cut = inner, step_ms, cut
        self._random = random.Random(5)

    def __contains__(self, path: str) -> bool:
        return path in self._inner

    def answer(self, path: str, query: Mapping[str, str], now_ms: int) -> bytes:
        if self._random.random() < self._cut:
            raise ConnectionResetError("cut off")
        body = self._inner.answer(path, query, now_ms)
        if not path.endswith("/kline"):
            return body
        reply = json.loads(body)
        rows = []
        for row in reply["result"].get("list", []):
            n, age = int(row[0]) // self._step, now_ms - int(row[0]) - self._step
            if n % 7 == 0 and 0 <= age < self.LATE_MS:
                continue
            wrong = (n % 5 == 0 and age < self.WRONG_MS) or (n % 9 == 0 and age < self.LONG_WRONG_MS)
            if wrong and age >= 0:
                row[5] = str(2 * float(row[5]))
            rows.append(row)
        reply["result"]["list"] = rows
        return json.dumps(reply).encode()


def follow_a_time(home: Path, hours: float, speed: float, interval: str, seed: int) -> FollowSummary:
    """Follow two symbols for ``hours`` of the venue's time under every fault, and compare."""
    step = {"1m": MINUTE_MS, "5m": 5 * MINUTE_MS}[interval]
    faults, store, lines = RandomFaults(seed), Store(home), list[str]()
    with SandboxServer(WORLD, VirtualClock(NOW, speed), stream_faults=faults) as server:
        server.endpoints = Unsettled(server.endpoints, step)  # type: ignore[assignment]
        end_ms = floor_open(NOW + int(hours * HOUR_MS), interval)
        with following(server, store, *SYMBOLS, interval=interval, lines=lines) as follower:
            eventually(lambda: server.clock.now_ms() > end_ms + HOUR_MS, 600)
            for symbol in SYMBOLS:
                expected = truth(symbol, interval, end_ms)
                eventually(lambda s=symbol, e=expected: stored(store, s, interval, end_ms) == e, every_s=0.5)  # type: ignore[misc]
    told = [line for line in lines if " closed at " in line]
    keys = [tuple(line.split()[:2]) for line in told]
    assert len(keys) == len(set(keys))  # one line for each bar
    assert set(KLINE_FAULTS) & set(faults.drawn)
    assert follower.summary.breaks > 0
    assert follower.summary.gaps == 0
    return follower.summary


def test_hours_of_following_under_random_faults_end_with_the_venues_candles(tmp_path: Path) -> None:
    summary = follow_a_time(tmp_path, hours=4, speed=3600.0, interval="5m", seed=3)
    assert summary.bars >= 2 * 46


@pytest.mark.full
@pytest.mark.parametrize("seed", [1, 2])
def test_a_day_of_following_under_random_faults_ends_with_the_venues_candles(
    tmp_path: Path, seed: int
) -> None:
    summary = follow_a_time(tmp_path, hours=24, speed=720.0, interval="1m", seed=seed)
    assert summary.bars >= 2 * 24 * 60 - 4
    assert summary.breaks >= 10
    assert summary.changed > 100


# -- clocks -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("wrong_ms", "way"), [(HOUR_MS, "ahead of"), (-HOUR_MS, "behind")])
def test_a_local_clock_that_is_an_hour_wrong_moves_nothing_and_is_told(
    tmp_path: Path, wrong_ms: int, way: str
) -> None:
    store, lines = Store(tmp_path), list[str]()
    venue = VirtualClock(NOW, 300.0)
    with SandboxServer(WORLD, venue) as server:
        clock = VenueClock(wall_ms=lambda: venue.now_ms() + wrong_ms)
        with following(server, store, clock=clock, lines=lines):
            end_ms = floor_open(NOW, "1m") + 5 * MINUTE_MS
            eventually(lambda: venue.now_ms() > end_ms + 1000)
            eventually(lambda: store.path.exists())
            expected = truth("BTCUSDT", "1m", end_ms)
            eventually(lambda: stored(store, "BTCUSDT", "1m", end_ms) == expected)
            newest = store.candles()["open_time"].dt.epoch("ms").max()
            assert newest + MINUTE_MS <= venue.now_ms()  # type: ignore[operator]
    (told,) = [line for line in lines if "local clock" in line]
    assert re.fullmatch(
        rf"The local clock is 3[56]\d\d\.\d s {way} the venue's; bars go by the venue's\.", told
    )


def test_the_venues_clock_is_taken_half_way_through_the_call_and_runs_on_by_itself() -> None:
    now = [100.0]

    def ask() -> int:
        now[0] += 0.4
        return 1_000_000

    clock = VenueClock(wall_ms=lambda: 1_000_200 + 3_600_000, monotonic=lambda: now[0])
    assert clock.measure(ask) == 1_000_200
    assert clock.drift_ms == 3_600_000
    now[0] += 2.0
    assert clock.now_ms() == 1_002_200
    assert clock.seconds_until(1_005_200, 30.0) == 3.0
    assert clock.seconds_until(9_000_000, 30.0) == 30.0
    assert clock.seconds_until(1_000_000, 30.0) == 0.0


@pytest.mark.parametrize(
    ("passed_ms", "pace"), [(10_000, 1.0), (10_400, 1.0), (600_000, 60.0), (0, 0.0), (-5, 0.0)]
)
def test_the_pace_of_a_sandbox_is_seen_and_that_of_a_real_venue_is_one(passed_ms: int, pace: float) -> None:
    now = [0.0]
    clock = VenueClock(monotonic=lambda: now[0])
    clock.measure(lambda: 5_000_000)
    now[0] = 10.0
    clock.measure(lambda: 5_000_000 + passed_ms)
    assert clock.pace == pace


def test_a_clock_that_was_never_measured_says_so() -> None:
    with pytest.raises(RuntimeError, match="not measured"):
        VenueClock().now_ms()


# -- bars ---------------------------------------------------------------------------------------------


def test_a_bar_that_comes_late_is_recorded_as_a_gap_and_asked_for_again(tmp_path: Path) -> None:
    store, lines = Store(tmp_path), list[str]()
    late = next(
        at for at in range(floor_open(NOW, "1m"), NOW + DAY_MS, MINUTE_MS) if at % (7 * MINUTE_MS) == 0
    )
    with SandboxServer(WORLD, VirtualClock(late)) as server:
        server.endpoints = Unsettled(server.endpoints, MINUTE_MS, cut=0.0)  # type: ignore[assignment]
        with following(server, store, lines=lines, patience=Patience()) as follower:
            eventually(lambda: follower.summary.connects == 1)
            server.clock.set(late + MINUTE_MS + 2000)
            eventually(lambda: gaps(store) == [(late, "venue empty")])
            server.clock.set(late + 2 * MINUTE_MS + 2000)
            eventually(lambda: follower.summary.bars == 2)
    assert [row[0] for row in stored(store, "BTCUSDT", "1m", DAY_MS + NOW)][-2:] == [late, late + MINUTE_MS]
    assert follower.summary.gaps == 0


def gaps(store: Store) -> list[tuple[int, str]]:
    """(open time of the last bar, reason) of each recorded gap."""
    with store.read() as con:
        found = con.execute(
            "SELECT epoch_ms(until), reason FROM fetch_windows WHERE status = 'gap'"
        ).fetchall()
    return [(until - MINUTE_MS, reason) for until, reason in found]


def test_a_venue_that_goes_away_is_waited_for_and_what_it_missed_is_fetched(tmp_path: Path) -> None:
    store, lines, venue = Store(tmp_path), list[str](), VirtualClock(NOW, 300.0)
    server = SandboxServer(WORLD, venue)
    server.start()
    try:
        with following(server, store, lines=lines) as follower:
            eventually(lambda: follower.summary.bars >= 2)
            port = int(server.base_url.rpartition(":")[2])
            server.stop()
            eventually(lambda: follower.summary.failures >= 1)
            server = SandboxServer(WORLD, venue, port=port)
            server.start()
            end_ms = floor_open(venue.now_ms(), "1m") + 2 * MINUTE_MS
            expected = truth("BTCUSDT", "1m", end_ms)
            eventually(lambda: stored(store, "BTCUSDT", "1m", end_ms) == expected)
    finally:
        server.stop()
    assert any("Trying again in 1 s." in line for line in lines)
    assert any(line.startswith("The stream broke (") for line in lines)


class CountingStore(Store):
    """Counts how often the file is opened."""

    opened = 0

    def read(self) -> AbstractContextManager[duckdb.DuckDBPyConnection]:
        self.opened += 1
        return super().read()

    def write(self) -> AbstractContextManager[duckdb.DuckDBPyConnection]:
        self.opened += 1
        return super().write()


def test_between_two_bars_neither_the_store_nor_the_venue_is_asked(tmp_path: Path) -> None:
    store = CountingStore(tmp_path)
    with (
        SandboxServer(WORLD, VirtualClock(NOW, 1.0)) as server,
        following(server, store, patience=Patience()) as follower,
    ):
        eventually(lambda: follower.summary.connects == 1)
        before = (store.opened, sum(server.requests.values()))
        time.sleep(1.5)
        assert (store.opened, sum(server.requests.values())) == before


def test_a_bar_is_stored_soon_after_its_close_with_a_line_that_says_so(tmp_path: Path) -> None:
    store, lines = Store(tmp_path), list[str]()
    with SandboxServer(WORLD, VirtualClock(floor_open(NOW, "1m") + 58_500, 1.0)) as server:
        with following(server, store, lines=lines) as follower:
            eventually(lambda: follower.summary.bars == 1)
        (line,) = [line for line in lines if "closed at" in line]
        assert line.startswith("2025-07-01T06:01:00Z bybit:linear:BTCUSDT:1m closed at ")
        delay = float(line.split()[-3])
        assert 1.0 <= delay < 5.0  # the hint of the stream came before the timer
        assert list(follower.summary.delays_s) == [pytest.approx(delay, abs=0.05)]


# -- begin and end ------------------------------------------------------------------------------------


def test_following_an_unknown_symbol_or_an_absent_venue_fails_at_once(tmp_path: Path) -> None:
    with SandboxServer(WORLD, VirtualClock(NOW)) as server:
        connector = BybitConnector(server.base_url, attempts=1)
        with pytest.raises(VenueRefused, match="no symbol 'BTCUSTD'"):
            Follower(Store(tmp_path), connector, FetchRequest(("BTCUSTD",))).run()
    with pytest.raises(VenueUnreachable):
        Follower(Store(tmp_path), connector, FetchRequest(("BTCUSDT",))).run()


def test_following_refuses_an_end_a_rehearsal_and_kinds_without_bars(tmp_path: Path) -> None:
    with SandboxServer(WORLD, VirtualClock(NOW)) as server:
        connector = BybitConnector(server.base_url)
        for request in (FetchRequest(("BTCUSDT",), until_ms=NOW), FetchRequest(("BTCUSDT",), dry_run=True)):
            with pytest.raises(UsageError, match="no end"):
                Follower(Store(tmp_path), connector, request)
        with pytest.raises(UsageError, match="needs candles"):
            request = FetchRequest(("BTCUSDT",), kinds=("funding",), since_ms=START)
            Follower(Store(tmp_path), connector, request).run()


def test_following_keeps_funding_and_all_kinds_of_candles_up_to_date(tmp_path: Path) -> None:
    store = Store(tmp_path)
    kinds = ("candles", "mark", "index", "premium", "funding")
    request = FetchRequest(("BTCUSDT",), interval="5m", kinds=kinds, since_ms=START)
    with SandboxServer(WORLD, VirtualClock(parse_time("2025-07-01T07:45"), 900.0)) as server:
        follower = Follower(store, BybitConnector(server.base_url), request, for_s=3.0, patience=QUICK)
        summary = follower.run()
    assert [name.rpartition(":")[2] for name in summary.series] == ["5m", "mark", "index", "premium"]
    ends = [store.candles("linear", ["BTCUSDT"], "5m", kind)["open_time"].max() for kind in kinds[1:4]]
    assert len(set(ends)) == 1
    payments = store.funding("linear", ["BTCUSDT"])["funding_time"].dt.epoch("ms").to_list()
    assert payments == [parse_time("2025-07-01T08:00")]


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("20m", 1200), ("24h", 86_400), ("1.5d", 129_600)]
)
def test_a_duration_has_a_number_and_a_unit(text: str, seconds: float) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "20", "m", "-5s", "0s", "1w", "1h30m"])
def test_anything_else_is_no_duration(text: str) -> None:
    with pytest.raises(UsageError, match="is not a duration"):
        seconds_of(text)


def test_the_command_follows_for_a_time_and_reports_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with SandboxServer(WORLD, VirtualClock(NOW, 300.0)) as server:
        common = ["--home", str(tmp_path), "--json", "fetch", "-s", "BTCUSDT", "-i", "1m", "--days", "1"]
        code = recur([*common, "--base-url", server.base_url, "--follow", "--for", "3s"])
    said = capfd.readouterr()
    assert code == 0
    report = json.loads(said.out)
    assert report["series"] == ["bybit:linear:BTCUSDT:1m"]
    assert report["bars"] >= 3
    assert report["connects"] >= 1
    assert len(re.findall(r"closed at", said.err)) == report["bars"]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--for", "5s"], "--follow was not given"),
        (["--follow", "--for", "5"], "'5' is not a duration"),
        (["--follow", "--dry-run"], "no rehearsal"),
        (["--follow", "--until", "2025-01-01"], "has no end"),
        (["--follow", "--source", "bybit", "--source", "sandbox"], "one venue"),
    ],
)
def test_flags_that_do_not_go_together_are_wrong_usage(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], flags: list[str], says: str
) -> None:
    assert recur(["--home", str(tmp_path), "fetch", "-s", "BTCUSDT", *flags]) == 2
    assert says in capfd.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_a_clean_end(tmp_path: Path, number: signal.Signals) -> None:
    with SandboxServer(WORLD, VirtualClock(NOW, 300.0)) as server:
        arguments = (
            f"--home {tmp_path} --json fetch -s BTCUSDT -i 1m --days 1 --follow --base-url {server.base_url}"
        )
        code = "import sys; from recur.cli import run; sys.exit(run(sys.argv[1:]))"
        with subprocess.Popen(
            [sys.executable, "-c", code, *arguments.split()],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stderr is not None
            while "closed at" not in process.stderr.readline():
                assert process.poll() is None
            os.kill(process.pid, number)
            out, _ = process.communicate(timeout=10)
    assert process.returncode == 0
    assert json.loads(out)["bars"] >= 1
