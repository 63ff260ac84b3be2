"""Fetching from the sandbox exchange into a real store: complete, resumable, honest about gaps."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from recur.connectors.bybit import BybitConnector
from recur.connectors.sandbox.generated import GeneratedMarket
from recur.connectors.sandbox.replay import ReplayMarket
from recur.connectors.sandbox.server import SandboxServer, VirtualClock
from recur.connectors.windows import Window
from recur.pipeline.fetch import FetchRequest, FetchSummary, plan_fetch, run_fetch
from recur.pipeline.imports import import_file
from recur.storage.store import Store
from recur.vocabulary import (
    DAY_MS,
    HOUR_MS,
    DataMissing,
    Series,
    UnknownSymbol,
    UsageError,
    VenueError,
    VenueUnreachable,
    parse_time,
)

START = parse_time("2025-07-01")
NOW = parse_time("2025-08-30T12:34")
NOON = parse_time("2025-08-30T12:00")
BTC = Series("linear", "BTCUSDT", "1h")


@pytest.fixture(scope="module")
def sandbox() -> Iterator[SandboxServer]:
    world = GeneratedMarket(3, START, parse_time("2025-09-10"), symbols=("BTCUSDT", "ETHUSDT"))
    with SandboxServer(world, VirtualClock(NOW)) as server:
        yield server


@pytest.fixture
def clock(sandbox: SandboxServer) -> Iterator[VirtualClock]:
    yield sandbox.clock
    sandbox.clock.set(NOW)


def fetch(store: Store, base_url: str, *symbols: str, **wanted: Any) -> FetchSummary:
    connector = BybitConnector(base_url, rate=1000.0, workers=4, attempts=2)
    plan = plan_fetch(store, connector, FetchRequest(symbols or ("BTCUSDT",), **wanted))
    return run_fetch(store, connector, plan)


def table(store: Store, name: str = "candles") -> pl.DataFrame:
    with store.read() as con:
        found: pl.DataFrame = con.sql(f"SELECT * FROM {name} ORDER BY ALL").pl()
    return found


def hours(frame: pl.DataFrame) -> list[int]:
    return [(at - START) // HOUR_MS for at in frame["open_time"].dt.epoch("ms")]


# -- what is fetched ----------------------------------------------------------------------------------


def test_a_fetch_stores_every_closed_bar_once(sandbox: SandboxServer, tmp_path: Path) -> None:
    store = Store(tmp_path)
    summary = fetch(store, sandbox.base_url, "BTCUSDT", "ETHUSDT", since_ms=START)
    n = (NOON - START) // HOUR_MS
    assert n == 1452
    assert (summary.windows, summary.new, summary.changed, summary.gaps) == (4, 2 * n, 0, 0)
    assert summary.series == ["bybit:linear:BTCUSDT:1h", "bybit:linear:ETHUSDT:1h"]
    assert hours(store.candles("linear", ["BTCUSDT"], "1h")) == list(range(n))
    assert set(summary.as_dict()) >= {"series", "windows", "requests", "new", "changed", "gaps", "seconds"}


def test_a_second_fetch_asks_one_page_and_adds_nothing(sandbox: SandboxServer, tmp_path: Path) -> None:
    store = Store(tmp_path)
    fetch(store, sandbox.base_url, since_ms=START)
    before = table(store)
    summary = fetch(store, sandbox.base_url)
    assert (summary.requests, summary.new, summary.changed, summary.gaps) == (1, 0, 0, 0)
    assert table(store).equals(before)


def test_a_later_fetch_goes_on_where_the_record_ends_and_corrects_nothing_twice(
    sandbox: SandboxServer, clock: VirtualClock, tmp_path: Path
) -> None:
    store = Store(tmp_path)
    fetch(store, sandbox.base_url, since_ms=START)
    clock.set(NOW + 5 * HOUR_MS)
    summary = fetch(store, sandbox.base_url)
    assert (summary.new, summary.changed) == (5, 0)
    assert hours(store.candles("linear", ["BTCUSDT"], "1h")) == list(range(1457))


def test_times_before_the_listing_are_named_so_however_the_range_is_cut(
    sandbox: SandboxServer, tmp_path: Path
) -> None:
    days = [START + n * 24 * HOUR_MS for n in range(-4, 3, 2)]
    whole, pieces = Store(tmp_path / "whole"), Store(tmp_path / "pieces")
    fetch(whole, sandbox.base_url, since_ms=days[0], until_ms=days[-1])
    fetch(pieces, sandbox.base_url, since_ms=days[0], until_ms=days[1])
    fetch(pieces, sandbox.base_url, since_ms=days[1] + 24 * HOUR_MS, until_ms=days[-1])
    fetch(pieces, sandbox.base_url, since_ms=days[1], until_ms=days[1] + 24 * HOUR_MS)
    for store in (whole, pieces):
        gaps = table(store, "fetch_windows").filter(pl.col("status") == "gap")
        assert set(gaps["reason"]) == {"before listing"}


def test_an_earlier_since_brings_only_the_part_before(sandbox: SandboxServer, tmp_path: Path) -> None:
    store = Store(tmp_path)
    fetch(store, sandbox.base_url, since_ms=START + 48 * HOUR_MS, until_ms=START + 96 * HOUR_MS)
    connector = BybitConnector(sandbox.base_url)
    request = FetchRequest(("BTCUSDT",), since_ms=START, until_ms=START + 72 * HOUR_MS)
    assert plan_fetch(store, connector, request).windows == [Window(BTC, START, START + 48 * HOUR_MS, 48)]


def test_a_new_series_starts_365_days_back_and_knows_that_nothing_was_listed(
    sandbox: SandboxServer, tmp_path: Path
) -> None:
    store = Store(tmp_path)
    summary = fetch(store, sandbox.base_url)
    assert (summary.windows, summary.new, summary.gaps) == (2, 1452, 0)
    assert store.windows(BTC) == [(NOON - 365 * DAY_MS, NOON)]
    with store.read() as con:
        gaps = con.execute(
            "SELECT epoch_ms(since), epoch_ms(until), \"rows\", missing, reason FROM fetch_windows WHERE status = 'gap'"
        ).fetchall()
    assert gaps == [(NOON - 365 * DAY_MS, START, 0, 365 * 24 - 1452, "before listing")]


def test_all_kinds_come_in_one_fetch(sandbox: SandboxServer, tmp_path: Path) -> None:
    store = Store(tmp_path)
    kinds = ("candles", "mark", "index", "premium", "funding")
    summary = fetch(store, sandbox.base_url, since_ms=START, kinds=kinds)
    assert summary.gaps == 0
    assert summary.series[-1] == "bybit:linear:BTCUSDT:funding"
    for kind in ("trade", "mark", "index", "premium"):
        assert store.candles("linear", ["BTCUSDT"], "1h", kind).height == 1452
    times = store.funding("linear", ["BTCUSDT"])["funding_time"].dt.epoch("ms").to_list()
    assert times == list(range(times[0], NOW, 8 * HOUR_MS))
    again = fetch(store, sandbox.base_url, kinds=kinds)
    assert (again.new, again.changed) == (0, 0)


def test_a_dry_run_tells_the_plan_and_leaves_no_trace(sandbox: SandboxServer, tmp_path: Path) -> None:
    store = Store(tmp_path / "home")
    connector = BybitConnector(sandbox.base_url, rate=100.0)
    request = FetchRequest(("BTCUSDT",), since_ms=START, dry_run=True)
    plan = plan_fetch(store, connector, request)
    assert plan.as_dict() == {
        "series": [
            {
                "series": "bybit:linear:BTCUSDT:1h",
                "since": "2025-07-01T00:00:00Z",
                "windows": 2,
                "bars": 1452,
                "until": "2025-08-30T12:00:00Z",
            }
        ],
        "windows": 2,
        "requests": 2,
        "seconds": 0.02,
        "server_time": "2025-08-30T12:34:00Z",
    }
    assert run_fetch(store, connector, plan).windows == 0
    assert not (tmp_path / "home").exists()


def test_progress_counts_to_the_number_of_windows(sandbox: SandboxServer, tmp_path: Path) -> None:
    connector = BybitConnector(sandbox.base_url)
    plan = plan_fetch(Store(tmp_path), connector, FetchRequest(("BTCUSDT",), interval="5m", since_ms=START))
    seen: list[tuple[int, int]] = []
    run_fetch(Store(tmp_path), connector, plan, lambda done, total: seen.append((done, total)))
    assert seen == [(done, 18) for done in range(1, 19)]


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        ({"kinds": ("candels",)}, "Unknown kind 'candels'.*Did you mean 'candles'"),
        ({"interval": "60"}, "Unknown interval '60'"),
        ({"category": "spot", "kinds": ("funding",)}, "no funding data for category 'spot'"),
        ({"category": "inverse", "kinds": ("premium",)}, "no premium data for category 'inverse'"),
        ({"since_ms": 5, "until_ms": 5}, "The range is empty"),
        ({"days": -1}, "--days is -1"),
    ],
    ids=["kind", "interval", "spot funding", "inverse premium", "empty range", "days"],
)
def test_a_request_without_sense_is_a_usage_error(
    sandbox: SandboxServer, tmp_path: Path, wanted: dict[str, Any], says: str
) -> None:
    with pytest.raises(UsageError, match=says):
        fetch(Store(tmp_path), sandbox.base_url, **wanted)


def test_an_unknown_symbol_stops_the_fetch_before_anything_is_written(
    sandbox: SandboxServer, tmp_path: Path
) -> None:
    with pytest.raises(UnknownSymbol, match=r"no symbol 'BTCUSTD'.*Did you mean 'BTCUSDT'") as caught:
        fetch(Store(tmp_path), sandbox.base_url, "ETHUSDT", "BTCUSTD")
    assert caught.value.exit_code == 2
    with pytest.raises(DataMissing):
        table(Store(tmp_path))


# -- gaps and failures --------------------------------------------------------------------------------


def recorded(absent: set[int], n: int = 3000) -> pl.DataFrame:
    """``n`` hours of flat bars without those of ``absent``."""
    opens = [START + hour * HOUR_MS for hour in range(n) if hour not in absent]
    return pl.DataFrame(
        {
            "category": "linear",
            "symbol": "BTCUSDT",
            "interval": "1h",
            "kind": "trade",
            "open_time": pl.Series(opens).cast(pl.Datetime("ms", "UTC")),
            **dict.fromkeys(("open", "high", "low", "close", "volume", "turnover"), 100.0),
        }
    )


@pytest.fixture
def replay() -> Iterator[Callable[[pl.DataFrame], SandboxServer]]:
    servers: list[SandboxServer] = []

    def serve(frame: pl.DataFrame) -> SandboxServer:
        server = SandboxServer(ReplayMarket(frame), VirtualClock(START + 3000 * HOUR_MS))
        server.start()
        servers.append(server)
        return server

    yield serve
    for server in servers:
        server.stop()


Serve = Callable[[pl.DataFrame], SandboxServer]


def test_a_gap_is_asked_again_and_for_maintenance_recorded_with_its_reason_and_then_left_alone(
    replay: Serve, tmp_path: Path
) -> None:
    server, store = replay(recorded({1500, 1501, 1502})), Store(tmp_path)
    summary = fetch(store, server.base_url, since_ms=START)
    assert (summary.windows, summary.requests, summary.gaps, summary.missing) == (3, 5, 1, 3)
    assert store.candles("linear", ["BTCUSDT"], "1h").height == 2997
    with store.read() as con:
        found = con.execute(
            """SELECT expected, "rows", missing, reason FROM fetch_windows WHERE status = 'gap'"""
        ).fetchall()
    assert found == [(1000, 997, 3, "venue empty")]
    assert fetch(store, server.base_url).requests == 1


def test_a_bar_that_comes_late_is_found_by_the_next_fetch(replay: Serve, tmp_path: Path) -> None:
    store = Store(tmp_path)
    first = fetch(store, replay(recorded({2999})).base_url, since_ms=START)
    assert (first.new, first.missing) == (2999, 1)
    assert fetch(store, replay(recorded(set())).base_url).new == 1


def test_a_corrected_bar_replaces_the_old_one_and_leaves_a_revision(replay: Serve, tmp_path: Path) -> None:
    store = Store(tmp_path)
    fetch(store, replay(recorded(set())).base_url, since_ms=START)
    last = pl.col("open_time").dt.epoch("ms") == START + 2999 * HOUR_MS
    corrected = recorded(set()).with_columns(high=pl.when(last).then(101.0).otherwise(pl.col("high")))
    summary = fetch(store, replay(corrected).base_url)
    assert (summary.new, summary.changed) == (0, 1)
    assert store.candles("linear", ["BTCUSDT"], "1h")["high"].to_list()[-1] == 101.0
    assert table(store, "candle_revisions").select("old_high", "new_high").rows() == [(100.0, 101.0)]


def test_one_impossible_bar_costs_its_window_only(replay: Serve, tmp_path: Path) -> None:
    bad = pl.col("open_time").dt.epoch("ms") == START + 500 * HOUR_MS
    broken = recorded(set()).with_columns(high=pl.when(bad).then(1.0).otherwise(pl.col("high")))
    store = Store(tmp_path)
    with pytest.raises(VenueError, match=r"the bar of 2025-07-21T20:00:00Z has impossible values"):
        fetch(store, replay(broken).base_url, since_ms=START)
    assert hours(store.candles("linear", ["BTCUSDT"], "1h")) == list(range(1000, 3000))
    assert fetch(store, replay(recorded(set())).base_url).new == 1000
    assert hours(store.candles("linear", ["BTCUSDT"], "1h")) == list(range(3000))


def test_a_venue_that_goes_away_leaves_what_was_answered(replay: Serve, tmp_path: Path) -> None:
    server, store = replay(recorded(set())), Store(tmp_path)
    connector = BybitConnector(server.base_url, attempts=2, rate=0.5)  # one request in two seconds
    plan = plan_fetch(store, connector, FetchRequest(("BTCUSDT",), since_ms=START))

    def pull_the_plug(done: int, total: int) -> None:
        if done == 1:
            server.stop()

    with pytest.raises(VenueUnreachable):
        run_fetch(store, connector, plan, pull_the_plug)
    assert store.candles("linear", ["BTCUSDT"], "1h").height == 1000
    fetch(store, replay(recorded(set())).base_url)
    assert hours(store.candles("linear", ["BTCUSDT"], "1h")) == list(range(3000))


def test_ctrl_c_keeps_what_was_answered_and_a_rerun_completes_it(
    sandbox: SandboxServer, tmp_path: Path
) -> None:
    store = Store(tmp_path)
    connector = BybitConnector(sandbox.base_url, rate=50.0)
    plan = plan_fetch(store, connector, FetchRequest(("BTCUSDT",), interval="5m", since_ms=START))

    def interrupt(done: int, total: int) -> None:
        if done == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_fetch(store, connector, plan, interrupt)
    assert store.candles("linear", ["BTCUSDT"], "5m").height in range(6000, 7001)
    fetch(store, sandbox.base_url, interval="5m")
    assert store.candles("linear", ["BTCUSDT"], "5m").height == (NOW - START) // 300_000


# -- kill -9 ------------------------------------------------------------------------------------------

ALL_CANDLES = ("candles", "mark", "index", "premium")
CHILD = textwrap.dedent(
    """
    import sys
    from pathlib import Path
    from recur.connectors.bybit import BybitConnector
    from recur.pipeline.fetch import FetchRequest, plan_fetch, run_fetch
    from recur.storage.store import Store

    base_url, home, since, *kinds = sys.argv[1:]
    store, connector = Store(Path(home)), BybitConnector(base_url, rate=400.0, workers=8)
    request = FetchRequest(("BTCUSDT", "ETHUSDT"), interval="5m", kinds=tuple(kinds), since_ms=int(since))
    plan = plan_fetch(store, connector, request)
    run_fetch(store, connector, plan, lambda done, total: print(done, flush=True))
    """
)


@pytest.fixture(scope="module")
def undisturbed(sandbox: SandboxServer, tmp_path_factory: pytest.TempPathFactory) -> pl.DataFrame:
    store = Store(tmp_path_factory.mktemp("undisturbed"))
    fetch(store, sandbox.base_url, "BTCUSDT", "ETHUSDT", interval="5m", kinds=ALL_CANDLES, since_ms=START)
    return table(store)


@pytest.mark.parametrize("after", [1, 60, 120])
def test_kill_9_at_any_window_and_a_rerun_give_the_table_of_an_undisturbed_run(
    sandbox: SandboxServer, undisturbed: pl.DataFrame, tmp_path: Path, after: int
) -> None:
    assert undisturbed.height == 8 * ((NOW - START) // 300_000)
    command = [sys.executable, "-c", CHILD, sandbox.base_url, str(tmp_path), str(START), *ALL_CANDLES]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        for line in child.stdout:
            if int(line) >= after:
                break
        os.kill(child.pid, signal.SIGKILL)
    assert child.returncode == -signal.SIGKILL
    store = Store(tmp_path)
    partly = table(store)
    assert partly.height < undisturbed.height
    fetch(store, sandbox.base_url, "BTCUSDT", "ETHUSDT", interval="5m", kinds=ALL_CANDLES)
    assert table(store).equals(undisturbed)


# -- files --------------------------------------------------------------------------------------------


def test_a_file_becomes_candles_and_a_second_import_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "bars.parquet"
    recorded({5}, 10).rename({"open_time": "ts"}).drop("kind").write_parquet(path)
    store = Store(tmp_path / "home")
    summary = import_file(store, path, category="linear", languages=("en",), now_ms=NOW)
    del summary["seconds"]
    assert summary == {
        "source": "file:bars.parquet",
        "kind": "candles",
        "series": ["bybit:linear:BTCUSDT:1h"],
        "rows": 9,
        "new": 9,
        "changed": 0,
        "same": 0,
    }
    assert import_file(store, path, category="linear", languages=("en",), now_ms=NOW)["same"] == 9
    assert hours(store.candles("linear", ["BTCUSDT"], "1h")) == [0, 1, 2, 3, 4, 6, 7, 8, 9]


def test_a_file_of_funding_becomes_funding(tmp_path: Path) -> None:
    path = tmp_path / "funding.csv"
    path.write_text(
        "symbol,ts,funding_rate\nBTCUSDT,2025-07-01T00:00:00Z,0.0001\nBTCUSDT,2025-07-01T08:00:00Z,-0.0002\n"
    )
    store = Store(tmp_path / "home")
    summary = import_file(store, path, category="linear", languages=("en",), now_ms=NOW)
    assert (summary["kind"], summary["series"], summary["new"]) == (
        "funding",
        ["bybit:linear:BTCUSDT:funding"],
        2,
    )
    assert store.funding("linear")["rate"].to_list() == [0.0001, -0.0002]
