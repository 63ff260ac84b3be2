"""The shared request budget: its law, its file, and real processes that draw on it together."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recur.connectors.bybit import BybitConnector
from recur.connectors.ratefile import PaceFile, runtime_folder
from recur.connectors.ratelimit import BAN_S, DEFAULT_BURST, DEFAULT_RATE_PER_S, Pace, RateLimiter
from recur.connectors.sandbox.generated import GeneratedMarket
from recur.connectors.sandbox.server import SandboxServer, VirtualClock
from recur.connectors.session import DEFAULT_WORKERS
from recur.vocabulary import VenueBanned, parse_time

NOW = parse_time("2025-01-02")


class Clock:
    """Seconds that pass only by sleeping."""

    def __init__(self, now: float = 0.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def limiter(clock: Clock, rate: float = 10.0, burst: int = 3, file: PaceFile | None = None) -> RateLimiter:
    return RateLimiter(rate, burst, file=file, clock=clock, wall=clock, sleep=clock.sleep)


# -- the law --------------------------------------------------------------------------------------------------


def test_a_rest_gives_a_burst_and_then_the_rate() -> None:
    budget = limiter(Clock())
    assert [round(budget.take(), 6) for _ in range(6)] == [0.0, 0.0, 0.0, 0.1, 0.1, 0.1]


def test_the_default_leaves_room_for_every_worker_s_late_request_below_600_in_5_seconds() -> None:
    clock = Clock()
    budget = RateLimiter(clock=clock, wall=clock, sleep=clock.sleep)
    sent = []
    for _ in range(2000):
        budget.take()
        sent.append(clock.now)
    most = max(sum(at <= other < at + 5 for other in sent) for at in sent[::50])
    assert most <= 5 * DEFAULT_RATE_PER_S + DEFAULT_BURST == 554
    assert most + DEFAULT_WORKERS <= 600


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(0, 0.3), st.sampled_from(["take", "take", "take", "slow", "other"])), max_size=80
    )
)
def test_no_window_holds_more_than_the_rate_and_the_burst_whatever_happens(
    events: list[tuple[float, str]],
) -> None:
    clock, rate, burst = Clock(), 20.0, 3
    pace, sent = Pace(), []
    for rest, event in events:
        clock.now += rest
        if event == "slow":
            pace = pace.slowed(clock.now, 0.5)
            continue
        slots, pace = pace.reserve(clock.now, 1 if event == "take" else 4, rate, burst)
        sent += [max(clock.now, slot) for slot in slots]
        assert slots == sorted(slots)
    sent.sort()
    for i, at in enumerate(sent):
        within = [other for other in sent[i:] if other < at + 1.0]
        assert len(within) <= rate * 1.0 + burst


def test_a_complaint_pauses_everyone_halves_the_rate_and_is_forgiven_in_two_minutes() -> None:
    clock = Clock()
    budget = limiter(clock)
    budget.take()
    budget.slow_down(2.0)
    budget.slow_down(2.0)  # many threads hear the same complaint
    assert round(budget.take(), 6) == 2.0
    assert round(budget.take(), 6) == 0.2
    clock.now = 130.0
    for _ in range(3):
        budget.take()
    assert round(budget.take(), 6) == 0.1


def test_an_instant_that_was_not_used_in_time_is_lost() -> None:
    clock = Clock()
    budget = limiter(clock, rate=100.0, burst=1)  # takes four instants at once
    assert budget.take() == 0.0
    clock.now = 1.0
    waits = [round(budget.take(), 6) for _ in range(5)]
    assert waits == [0.0, 0.01, 0.01, 0.01, 0.01]


def test_after_a_ban_nothing_passes_then_one_and_then_slowly() -> None:
    clock = Clock(1000.0)
    budget = limiter(clock, rate=100.0)
    assert budget.ban() == 1000.0 + BAN_S
    with pytest.raises(VenueBanned, match="until 1970-01-01T00:26:40Z; nothing was sent"):
        budget.take()
    clock.now += BAN_S
    assert budget.take() == 0.0
    assert 0.5 < budget.take() <= 1.0


def test_a_ban_from_a_clock_that_was_set_back_ends_after_ten_minutes_at_most() -> None:
    pace = Pace(banned_until=1e9).sane(now_s=0.0, wall_s=1000.0)
    assert pace.banned_until == 1000.0 + BAN_S


@pytest.mark.parametrize("rate", [0.0, -1.0])
def test_a_rate_of_nothing_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match="rate_per_s must be > 0"):
        RateLimiter(rate)


# -- the file -------------------------------------------------------------------------------------------------


def test_two_limiters_of_one_file_share_one_budget(tmp_path: Path) -> None:
    clock = Clock(5.0)
    one, two = (limiter(clock, file=PaceFile("a", tmp_path), burst=1) for _ in range(2))
    waits = [round(budget.take(), 6) for budget in (one, two, one, two)]
    assert waits == [0.0, 0.1, 0.1, 0.1]
    one.ban()
    with pytest.raises(VenueBanned):
        two.take()


def test_other_names_are_other_budgets(tmp_path: Path) -> None:
    clock = Clock(5.0)
    one, two = (limiter(clock, file=PaceFile(name, tmp_path), burst=1) for name in ("a", "b"))
    assert [one.take(), two.take()] == [0.0, 0.0]


@pytest.mark.parametrize("damage", [b"", b"x", b"\0" * 40, b"RPC1" + b"\xff" * 36, b"y" * 4000])
def test_a_damaged_file_costs_the_burst_and_nothing_else(tmp_path: Path, damage: bytes) -> None:
    clock = Clock(5.0)
    file = PaceFile("a", tmp_path)
    limiter(clock, file=file).ban()
    file.path.write_bytes(damage)
    budget = limiter(clock, file=file)
    assert [round(budget.take(), 6) for _ in range(3)] == [0.0, 0.1, 0.1]
    with file.held() as fields:
        assert fields is not None


def test_a_file_that_a_cleaner_removed_is_made_again_by_whoever_comes_first(tmp_path: Path) -> None:
    clock = Clock(5.0)
    one, two = (limiter(clock, file=PaceFile("a", tmp_path), burst=1) for _ in range(2))
    one.take(), two.take()
    (tmp_path / "a.pace").unlink()
    one.ban()
    with pytest.raises(VenueBanned):
        two.take()


def test_a_file_from_before_a_reboot_does_not_hold_anybody_up(tmp_path: Path) -> None:
    limiter(Clock(1e6), file=PaceFile("a", tmp_path)).take()
    assert limiter(Clock(10.0), file=PaceFile("a", tmp_path)).take() == 0.0


def test_a_folder_that_cannot_be_written_leaves_each_process_alone_and_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    blocked = tmp_path / "file"
    blocked.touch()
    monkeypatch.setenv("TMPDIR", str(blocked))
    BybitConnector("http://127.0.0.1:9")
    assert "the request budget cannot be shared with other processes" in caplog.text


def test_the_folder_of_another_user_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    folder = runtime_folder()
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.rmdir()
    (tmp_path / "elsewhere").mkdir()
    folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PermissionError, match="belongs to another user"):
        runtime_folder()


def test_budgets_of_local_servers_are_forgotten_after_a_day(tmp_path: Path) -> None:
    old, public = tmp_path / "loopback-1.pace", tmp_path / "venue.pace"
    for path in (old, public):
        path.touch()
        os.utime(path, (0, 0))
    PaceFile("loopback-2", tmp_path)
    assert not old.exists()
    assert public.exists()


def test_a_turn_costs_less_than_a_fifth_of_a_millisecond(tmp_path: Path) -> None:
    budget = RateLimiter(1e9, file=PaceFile("a", tmp_path))
    times = []
    for _ in range(10):
        start = time.perf_counter()
        for _ in range(100):
            budget.take()
        times.append((time.perf_counter() - start) / 100)
    assert min(times) < 200e-6


# -- real threads and processes ---------------------------------------------------------------------------------

CHILD = textwrap.dedent(
    """
    import sys, threading, time
    from pathlib import Path
    from recur.connectors.ratefile import PaceFile
    from recur.connectors.ratelimit import RateLimiter

    budget = RateLimiter(200.0, 2, file=PaceFile("shared", Path(sys.argv[1])))
    ends = time.monotonic() + float(sys.argv[2])
    print("ready", flush=True)

    lock = threading.Lock()

    def work():
        while time.monotonic() < ends:
            budget.take()
            with lock:
                sys.stdout.write(f"{time.monotonic()}\\n")
                sys.stdout.flush()

    threads = [threading.Thread(target=work) for _ in range(3)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    """
)


def child(folder: Path, seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CHILD, str(folder), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_two_processes_together_send_no_more_than_one_may_even_when_a_third_is_killed(tmp_path: Path) -> None:
    children = [child(tmp_path, 2.0) for _ in range(3)]
    try:
        for process in children:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
        time.sleep(0.5)
        children[2].send_signal(signal.SIGKILL)
        sent = sorted(float(at) for process in children for at in process.communicate()[0].splitlines())
    finally:
        for process in children:
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()
    assert [process.returncode for process in children] == [0, 0, -9]
    span = sent[-1] - sent[0]
    assert len(sent) <= 200 * span + 3 * 8  # in a process up to eight instants may be used late
    assert len(sent) > 200 * span / 3  # nobody waits for the dead
    for i, at in enumerate(sent):
        assert sum(other < at + 0.5 for other in sent[i:]) <= 200 * 0.5 + 2 + 3 * 8


def test_two_connectors_of_one_exchange_stay_below_its_limit_and_one_ban_stops_both() -> None:
    world = GeneratedMarket(1, parse_time("2025-01-01"), NOW, symbols=("BTCUSDT",))
    with SandboxServer(world, VirtualClock(NOW), enforce_limit=True) as server:
        connectors = [BybitConnector(server.base_url, rate=100.0) for _ in range(2)]
        started = time.monotonic()
        threads = [
            threading.Thread(target=lambda c=c: [c.server_time_ms() for _ in range(50)]) for c in connectors
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert time.monotonic() - started > 0.9
        assert server.limit.refused == 0
        server.limit._banned_until = time.monotonic() + 60.0
        with pytest.raises(VenueBanned, match="HTTP status 403"):
            connectors[0].server_time_ms()
        asked = server.limit.refused
        with pytest.raises(VenueBanned, match="nothing was sent"):
            connectors[1].server_time_ms()
        with pytest.raises(VenueBanned, match="nothing was sent"):
            BybitConnector(server.base_url).server_time_ms()
        assert server.limit.refused == asked == 1
