"""The cron entry that runs fetch and then predict: pure functions over crontab text, and the ``crontab`` program.

A line ends in the comment ``# recur-home:<home>``: that is how it is found again, so that two homes can be
scheduled side by side. Cron counts in local time and whole minutes, bars in UTC: the minute is shifted by the
local offset, periods above an hour are checked against UTC in the line itself, odd seconds are slept.
"""

from __future__ import annotations

import logging
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from recur.storage.runs import RunFolder, latest_run
from recur.vocabulary import INTERVALS, DataMissing, RecurError, UsageError

_log = logging.getLogger(__name__)

_MINUTE_S = 60
_HOUR_S = 3600


def tag(home: Path) -> str:
    """The comment that marks the line of ``home`` (percent signs escaped, as everywhere in a crontab)."""
    return f"# recur-home:{home}".replace("%", r"\%")


def cron_line(
    home: Path,
    python: str,
    options: Sequence[str],
    *,
    every: str,
    delay_s: int,
    cwd: Path,
    flock: str | None = None,
    utc_offset_min: int = 0,
) -> str:
    """The crontab line that runs ``recur fetch`` and then ``recur predict`` every ``every``.

    ``home`` and ``cwd`` are absolute; ``options`` are the global options of both commands; ``delay_s`` counts from
    the bar's close (0 to 3599, below ``every``); ``flock`` is the program's path, without it runs may overlap;
    ``utc_offset_min`` is the local time's offset. Output goes to ``<home>/logs/schedule.log``.
    """
    if "\n" in f"{home}{cwd}{python}{''.join(options)}":
        raise UsageError("A path with a line break cannot stand in a crontab.", "Choose another --home.")
    period_s = INTERVALS[every] // 1000
    minute = delay_s // _MINUTE_S + utc_offset_min
    if period_s >= _HOUR_S:
        minutes = str(minute % 60)
    else:
        step = period_s // _MINUTE_S
        minutes = "*" if step == 1 else f"{minute % step}-59/{step}"
    steps = []
    if period_s > _HOUR_S:
        hours = period_s // _HOUR_S
        steps.append(f"[ $(( $(date -u +%s) / {_HOUR_S} % {hours} )) -eq 0 ]")
    if delay_s % _MINUTE_S:
        steps.append(f"sleep {delay_s % _MINUTE_S}")
    steps.append(f"cd {shlex.quote(str(cwd))}")
    recur = shlex.join([python, "-m", "recur.cli", *options])
    both = f"{recur} fetch && {recur} predict"
    if flock:
        lock = shlex.quote(str(home / "logs" / "schedule.lock"))
        both = f"{shlex.quote(flock)} -n {lock} /bin/sh -c {shlex.quote(both)}"
    else:
        both = f"{{ {both}; }}"
    log = shlex.quote(str(home / "logs" / "schedule.log"))
    command = " && ".join([*steps, f"{both} >> {log} 2>&1"])
    return f"{minutes} * * * * {command.replace('%', chr(92) + '%')} {tag(home)}"


def warn_of_consent(home: Path) -> None:
    """Say that the scheduled predict will be refused when the newest run is of a user's own model: running its code
    takes a consent that the line does not give."""
    run = latest_run(home, "train")
    try:
        spec = RunFolder(home, run).read_json("model.json").get("spec") if run else None
    except DataMissing:
        return  # predict tells what is wrong with the run
    if isinstance(spec, dict) and spec.get("sha256"):
        _log.warning(
            "the newest run, %s, is of a model of its own, and the scheduled predict may not run its code: it will be"
            " refused. Train a built-in model after it, or schedule 'recur predict --run %s --trust-model' yourself.",
            run, run,
        )  # fmt: skip


def install(text: str, line: str) -> str:
    """Crontab ``text`` with ``line`` in place of the one with the same tag, or at the end; twice is as once."""
    mark = line[line.rindex("# recur-home:") :]
    lines = text.splitlines()
    at = [i for i, old in enumerate(lines) if _is_entry(old, mark)]
    kept = [old for i, old in enumerate(lines) if i not in at]
    kept.insert(at[0] if at else len(kept), line)
    return "\n".join(kept) + "\n"


def remove(text: str, home: Path) -> str:
    """Crontab ``text`` without the line of ``home``; everything else stays as it is."""
    return "".join(line for line in text.splitlines(keepends=True) if not _is_entry(line, tag(home)))


def show(text: str, home: Path) -> str | None:
    """The line of ``home`` in crontab ``text``, or None."""
    return next((line for line in text.splitlines() if _is_entry(line, tag(home))), None)


def _is_entry(line: str, mark: str) -> bool:
    return line.rstrip("\r\n").endswith(f" {mark}") and not line.lstrip().startswith("#")


def read_crontab() -> str:
    """The user's crontab, empty when there is none. RecurError where the program is absent or fails."""
    done = _crontab("-l")
    if done.returncode and "no crontab" not in done.stderr.lower():
        raise RecurError(
            f"crontab -l failed: {done.stderr.strip() or done.returncode}.", "Check that cron is allowed."
        )
    return "" if done.returncode else done.stdout


def write_crontab(text: str) -> None:
    """Replace the user's crontab. RecurError where the program is absent or refuses."""
    done = _crontab("-", text)
    if done.returncode:
        raise RecurError(
            f"crontab refused the new table: {done.stderr.strip() or done.returncode}.", "Nothing changed."
        )


def find_flock() -> str | None:
    """Path of the ``flock`` program, or None."""
    return shutil.which("flock")


def _crontab(argument: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
    program = shutil.which("crontab")
    if program is None:
        raise RecurError("This system has no crontab program.", "Install cron, or use another scheduler.")
    try:
        return subprocess.run(
            [program, argument], input=text, capture_output=True, text=True, timeout=30, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RecurError(f"crontab could not be run: {error}.", "Nothing changed.") from None
