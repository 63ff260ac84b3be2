"""The cron entry: its text, its place in a crontab, and the ``crontab`` program."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from recur.pipeline import schedule
from recur.storage.runs import RunFolder
from recur.vocabulary import RecurError, UsageError

HOME = Path("/data/home")
FAKE_CRONTAB = """#!/bin/sh
table="$(dirname "$0")/table"
case "$1" in
  -l) [ -f "$table" ] && cat "$table" || { echo "no crontab for me" >&2; exit 1; } ;;
  -) cat > "$table" ;;
esac
"""


def line(
    home: Path = HOME, every: str = "1h", delay_s: int = 20, offset: int = 0, flock: str | None = None
) -> str:
    return schedule.cron_line(
        home, "/py", ["--home", str(home)], every=every, delay_s=delay_s, cwd=Path("/w"), flock=flock,
        utc_offset_min=offset,
    )  # fmt: skip


def test_the_hourly_line_sleeps_the_odd_seconds_and_runs_fetch_then_predict() -> None:
    assert line() == (
        "0 * * * * sleep 20 && cd /w && { /py -m recur.cli --home /data/home fetch && "
        "/py -m recur.cli --home /data/home predict; } >> /data/home/logs/schedule.log 2>&1 # recur-home:/data/home"
    )


def test_with_flock_runs_never_overlap() -> None:
    expected = "/usr/bin/flock -n /data/home/logs/schedule.lock /bin/sh -c '/py -m recur.cli"
    assert expected in line(flock="/usr/bin/flock")


@pytest.mark.parametrize(
    ("every", "delay_s", "offset", "minutes"),
    [
        ("1m", 20, 0, "*"), ("5m", 60, 0, "1-59/5"), ("15m", 0, 330, "0-59/15"), ("1h", 120, 0, "2"),
        ("1h", 90, 330, "31"), ("4h", 0, -210, "30"), ("1d", 0, 60, "0"),
    ],
)  # fmt: skip
def test_the_minute_follows_period_delay_and_local_offset(
    every: str, delay_s: int, offset: int, minutes: str
) -> None:
    assert line(every=every, delay_s=delay_s, offset=offset).split(" ")[0] == minutes


def test_periods_above_an_hour_are_checked_in_utc_with_percent_signs_escaped() -> None:
    assert r"[ $(( $(date -u +\%s) / 3600 \% 4 )) -eq 0 ] && sleep 20 && cd /w" in line(every="4h")


def test_awkward_paths_reach_the_shell_whole(tmp_path: Path) -> None:
    home = tmp_path / "it's 100% mine"
    (home / "logs").mkdir(parents=True)
    text = schedule.cron_line(
        home,
        sys.executable,
        ["--home", str(home)],
        every="1h",
        delay_s=0,
        cwd=tmp_path,
        flock=schedule.find_flock(),
    )
    command = text.split(" ", 5)[5].replace(r"\%", "%")
    subprocess.run(["/bin/sh", "-c", command.replace("-m recur.cli", "-m json.tool")], check=False)
    assert "usage: python" in (home / "logs" / "schedule.log").read_text()
    assert schedule.show(text + "\n", home) == text


def test_a_line_break_in_a_path_is_refused() -> None:
    with pytest.raises(UsageError, match="line break"):
        line(Path("/a\nb"))


def test_installing_twice_is_as_once_and_keeps_other_lines_and_homes() -> None:
    other = line(Path("/other/home"))
    text = f"# mine\n5 4 * * * backup\n{other}\n"
    once = schedule.install(text, line())
    assert once == f"{text}{line()}\n"
    assert schedule.install(once, line()) == once
    assert schedule.install(once, line(every="4h")) == f"{text}{line(every='4h')}\n"
    assert schedule.show(once, HOME) == line()
    assert schedule.remove(once, HOME) == text
    assert schedule.remove(text, HOME) == text
    assert schedule.show(text, HOME) is None


def test_a_home_that_ends_like_another_is_another() -> None:
    text = schedule.install("", line(Path("/data/home/inner")))
    assert schedule.show(text, HOME) is None
    assert schedule.show(text, Path("/inner")) is None


def test_the_command_line_installs_shows_and_removes(tmp_path: Path) -> None:
    program = tmp_path / "bin" / "crontab"
    program.parent.mkdir()
    program.write_text(FAKE_CRONTAB)
    program.chmod(0o755)
    env = os.environ | {"PATH": f"{program.parent}:{os.environ['PATH']}"}

    def recur(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "recur.cli", "--home", "h", "schedule", *words]
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True)

    assert recur("show").stdout == "Not scheduled.\n"
    installed = recur("install", "--every", "4h").stdout
    recur("install", "--every", "4h")
    assert (program.parent / "table").read_text() == installed
    assert f"--home {tmp_path / 'h'} --quiet fetch" in installed
    assert recur("show").stdout == installed
    assert recur("remove").stdout == "Removed.\n"
    assert (program.parent / "table").read_text() == ""


def test_without_the_program_the_error_is_clear(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RecurError, match="no crontab program"):
        schedule.read_crontab()


@pytest.mark.parametrize(("sha256", "expected"), [("ab12", 1), ("", 0), (None, 0)])
def test_a_newest_run_that_the_schedule_may_not_open_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, sha256: str | None, expected: int
) -> None:
    for name, ours in (
        ("train-gru-20250701T120000-aaaaaa", ""),
        ("train-Mine-20250702T120000-bbbbbb", sha256),
    ):
        run = RunFolder(tmp_path, name)
        run.write_json("manifest.json", {"status": "complete"})
        if ours is not None:
            run.write_json("model.json", {"spec": {"sha256": ours}})
    schedule.warn_of_consent(tmp_path)
    schedule.warn_of_consent(tmp_path / "empty")
    assert len(caplog.messages) == expected
    for message in caplog.messages:
        assert "'recur predict --run train-Mine-20250702T120000-bbbbbb --trust-model'" in message
