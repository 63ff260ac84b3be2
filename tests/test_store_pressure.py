"""The store under pressure: readers and writers of several processes at once, kills at any moment, a full disk."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import polars as pl
import pytest

from recur.pipeline.certificate import certify
from recur.storage.inventory import duplicates
from recur.storage.store import Store, WindowRows
from recur.vocabulary import HOUR_MS, Series, StoreBusy, StoreCorrupt, parse_time
from tests.market import candles

T0 = parse_time("2025-07-01")
BTC = Series("linear", "BTCUSDT", "1h")
PAGE, PAGES = 200, 30
BARS = candles("BTCUSDT", T0, PAGE * PAGES)

WRITER = """
import json, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from tests.test_store_pressure import page
from recur.storage.store import Store
from recur.vocabulary import RecurError
store = Store(Path(sys.argv[2]), wait_s=60)
first, last, step, pause = int(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]), float(sys.argv[6])
if len(sys.argv) > 7:
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[7]),) * 2)
print("ready", flush=True)
try:
    with store.session():
        for k in range(first, last, step):
            store.put_windows([page(k)], source="child", now_ms=1)
            print(k, flush=True)
            time.sleep(pause)
except RecurError as error:
    print(json.dumps([type(error).__name__, error.message, error.hint]), flush=True)
"""

WAITER = """
import sys, time
from pathlib import Path
from recur.storage.attached import waiting
with waiting(Path(sys.argv[1])):
    print("in", flush=True)
    time.sleep(60)
"""
IMPATIENT = """
import sys
from pathlib import Path
from recur.storage.store import Store
Store(Path(sys.argv[1]), wait_s=0.2).candles()
"""


def page(k: int) -> WindowRows:
    since = T0 + k * PAGE * HOUR_MS
    rows = BARS[k * PAGE : (k + 1) * PAGE] if k < PAGES else candles("BTCUSDT", since, PAGE, seed=k)
    return WindowRows(BTC, since, since + PAGE * HOUR_MS, rows, PAGE)


def writer(
    home: Path, first: int, last: int, step: int = 1, pause: float = 0.0, limit: int | None = None
) -> subprocess.Popen[str]:
    root = Path(__file__).resolve().parents[1]
    words = [str(w) for w in (root, home, first, last, step, pause, *([limit] if limit else []))]
    found = subprocess.Popen(
        [sys.executable, "-c", WRITER, *words], stdout=subprocess.PIPE, text=True, env=os.environ
    )
    assert found.stdout is not None and found.stdout.readline() == "ready\n"
    return found


def undisturbed(home: Path, pages: int) -> str:
    store = Store(home)
    store.put_windows([page(k) for k in range(pages)], source="x", now_ms=5)
    return str(certify(store, T0)["sha256"])


def test_a_reader_gets_in_between_the_writes_of_a_session_in_another_process(tmp_path: Path) -> None:
    stream = writer(tmp_path, 0, 100_000, pause=0.0)
    try:
        assert stream.stdout is not None and stream.stdout.readline() == "0\n"
        seen, waited = [], []
        for _ in range(8):
            started = time.monotonic()
            seen.append(Store(tmp_path, wait_s=10).candles("linear", ["BTCUSDT"], "1h").height)
            waited.append(time.monotonic() - started)
        assert seen == sorted(seen) and seen[-1] > seen[0] and all(n % PAGE == 0 for n in seen)
        assert max(waited) < 5
    finally:
        stream.kill()
        stream.communicate()


def test_an_idle_session_hands_the_file_over_and_takes_it_back(tmp_path: Path) -> None:
    idle = writer(tmp_path, 0, 2, pause=1.0)
    assert idle.stdout is not None and idle.stdout.readline() == "0\n"
    assert Store(tmp_path, wait_s=10).candles().height == PAGE  # that is, before its second write
    rest, _ = idle.communicate(timeout=30)
    assert rest == "1\n" and Store(tmp_path).candles().height == 2 * PAGE


def test_a_session_lets_threads_of_its_own_process_read_meanwhile(tmp_path: Path) -> None:
    store, seen = Store(tmp_path), []
    with store.session():
        for k in range(3):
            store.put_windows([page(k)], source="x", now_ms=1)
            reader = threading.Thread(target=lambda: seen.append(Store(tmp_path).candles().height))
            reader.start()
            reader.join()
    assert seen == [PAGE, 2 * PAGE, 3 * PAGE]


def test_a_session_may_read_first_and_write_then(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.put_windows([page(0)], source="x", now_ms=1)
    with store.session(), store.session():
        assert store.candles().height == PAGE
        store.put_windows([page(1)], source="x", now_ms=1)
        assert store.candles().height == 2 * PAGE
    assert not list(tmp_path.glob("*.wal"))


def test_two_writers_at_once_store_the_union_of_what_they_bring(tmp_path: Path) -> None:
    both = [writer(tmp_path / "a", 0, 16, 2), writer(tmp_path / "a", 1, 16, 2)]
    also = writer(tmp_path / "a", 0, 8)  # the same pages as the others bring
    for process in (*both, also):
        out, _ = process.communicate(timeout=120)
        assert process.returncode == 0 and "[" not in out
    store = Store(tmp_path / "a")
    assert store.candles().height == 16 * PAGE
    assert store.windows(BTC) == [(T0, T0 + 16 * PAGE * HOUR_MS)]
    assert certify(store, T0)["sha256"] == undisturbed(tmp_path / "b", 16)


@pytest.mark.parametrize("limit", [400_000, 900_000])  # in the log; in the file
def test_a_full_disk_is_one_clear_error_and_committed_rows_stay(tmp_path: Path, limit: int) -> None:
    full = writer(tmp_path, 0, 100_000, limit=limit)
    out, _ = full.communicate(timeout=120)
    *told, error = out.splitlines()
    kind, message, hint = json.loads(error)
    assert (kind, message.count("\n")) == ("RecurError", 0)
    assert message.startswith("The disk is full: ")
    assert hint.startswith("Free some space there") and len(told) > 3
    store = Store(tmp_path)
    rows = store.candles("linear", ["BTCUSDT"], "1h").height
    assert rows >= len(told) * PAGE and rows % PAGE == 0
    assert store.windows(BTC) == [(T0, T0 + rows * HOUR_MS)]
    store.put_windows([page(len(told))], source="x", now_ms=1)


def kill_a_writer(home: Path, moment: random.Random) -> int:
    """Kill a writer somewhere inside its work; returns how many pages it had acknowledged."""
    stream = writer(home, 0, PAGES)
    told = -1
    assert stream.stdout is not None
    for _ in range(moment.randrange(PAGES // 2)):
        told = int(stream.stdout.readline())
    time.sleep(moment.random() * 0.03)
    stream.send_signal(signal.SIGKILL)
    rest, _ = stream.communicate()
    done = [line for line in rest.split("\n")[:-1] if line]
    return (int(done[-1]) if done else told) + 1


def check_kills(folder: Path, kills: int, seed: int) -> None:
    expected, moment = undisturbed(folder / "calm", PAGES), random.Random(seed)
    for k in range(kills):
        home = folder / str(k)
        told = kill_a_writer(home, moment)
        store = Store(home)
        if not store.path.exists():
            assert told == 0
            continue
        rows = store.candles("linear", ["BTCUSDT"], "1h").height
        assert rows in (told * PAGE, (told + 1) * PAGE), f"kill {k}"
        assert store.windows(BTC) == ([(T0, T0 + rows * HOUR_MS)] if rows else [])
        with store.read() as con:
            assert duplicates(con) == []
        for at in range(0, PAGES, 10):
            store.put_windows([page(at + i) for i in range(10)], source="again", now_ms=2)
        assert certify(store, T0)["sha256"] == expected, f"kill {k}"


def test_a_writer_killed_at_five_random_moments_loses_nothing_it_acknowledged(tmp_path: Path) -> None:
    check_kills(tmp_path, 5, seed=1)


@pytest.mark.full
def test_a_writer_killed_at_fifty_random_moments_loses_nothing_it_acknowledged(tmp_path: Path) -> None:
    check_kills(tmp_path, 50, seed=2)


def test_a_killed_waiter_does_not_hold_a_session_up(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with store.session():
        store.put_windows([page(0)], source="x", now_ms=1)
        waiter = subprocess.Popen(
            [sys.executable, "-c", WAITER, str(store.path)], stdout=subprocess.PIPE, text=True
        )
        assert waiter.stdout is not None and waiter.stdout.readline() == "in\n"
        waiter.kill()
        waiter.communicate()
        started = time.monotonic()
        store.put_windows([page(1)], source="x", now_ms=1)
        assert time.monotonic() - started < 0.9


def test_a_busy_store_names_the_process_that_holds_it_also_during_a_session(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.put_windows([page(0)], source="x", now_ms=1)
    with store.write():
        words = [sys.executable, "-c", IMPATIENT, str(tmp_path)]
        other = subprocess.run(words, capture_output=True, text=True, check=False)
    assert StoreBusy.__name__ in other.stderr and f"held by process {os.getpid()} " in other.stderr
    assert isinstance(store.candles(), pl.DataFrame)


@pytest.mark.parametrize("written", [12, 4096, 8192])
def test_a_store_whose_making_was_killed_is_made_again(tmp_path: Path, written: int) -> None:
    whole, home = Store(tmp_path / "whole"), tmp_path / "killed"
    with whole.write() as con:
        con.execute("SELECT 1")
    home.mkdir()
    (home / "market.duckdb").write_bytes(whole.path.read_bytes()[:written])
    assert Store(home).candles().is_empty()
    (home / "market.duckdb").write_bytes(whole.path.read_bytes()[:written])
    Store(home).put_windows([page(0)], source="test", now_ms=1)
    assert Store(home).candles().height == PAGE


def test_a_short_file_of_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "market.duckdb"
    path.write_bytes(b"notes of somebody\n")
    with pytest.raises(StoreCorrupt):
        Store(tmp_path).put_windows([page(0)], source="test", now_ms=1)
    assert path.read_bytes() == b"notes of somebody\n"
