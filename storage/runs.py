"""Run folders: ``<home>/runs/<run_id>/``, one per trained model or backtest.

Files appear whole or not at all (written beside, flushed to disk, then renamed). ``manifest.json`` carries
``"status"``: ``"running"`` from the start, ``"complete"`` once everything else is there. Only complete runs open.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from recur.vocabulary import DataMissing, StoreBusy, UsageError, did_you_mean, from_ms

RUNNING, COMPLETE = "running", "complete"
_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def new_run_id(kind: str, model: str, now_ms: int) -> str:
    """A fresh id such as ``train-gru-20250701T120000-3f9a1c``: sorts by time within kind and model, never repeats.

    Characters of ``kind`` and ``model`` that do not belong in a folder name become ``_``.
    """
    safe = [re.sub(r"[^A-Za-z0-9_]", "_", part) or "_" for part in (kind, model)]
    return f"{safe[0]}-{safe[1]}-{from_ms(now_ms):%Y%m%dT%H%M%S}-{secrets.token_hex(3)}"


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file that is either complete or not there, also after a crash in the middle."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(3)}.tmp")
    try:
        with beside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


class RunFolder:
    """Paths and atomic writing of one run. Making the object touches nothing on disk."""

    def __init__(self, home: Path, run_id: str) -> None:
        if not _RUN_ID.fullmatch(run_id):
            raise UsageError(f"'{run_id}' is not a run id.", "`recur status` lists the runs.")
        self.run_id = run_id
        self.path = Path(home) / "runs" / run_id

    def part(self, name: str) -> RunFolder:
        """A folder inside this one with the same file names: one fold of a backtest."""
        inner = RunFolder(self.path, self.run_id)
        inner.path = self.path / name
        return inner

    @property
    def manifest(self) -> Path:
        return self.path / "manifest.json"

    @property
    def config(self) -> Path:
        return self.path / "config.toml"

    @property
    def features(self) -> Path:
        return self.path / "features.json"

    @property
    def weights(self) -> Path:
        return self.path / "model.safetensors"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.json"

    @property
    def predictions(self) -> Path:
        return self.path / "predictions.parquet"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    def write_text(self, name: str, text: str) -> Path:
        """Write ``name`` inside the run, whole or not at all; returns its path."""
        target = self.path / name
        write_bytes(target, text.encode())
        return target

    def write_json(self, name: str, value: object) -> Path:
        """Write ``value`` as indented JSON. Raises ValueError for NaN and infinity: JSON has neither."""
        return self.write_text(name, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")

    def read_json(self, name: str) -> dict[str, Any]:
        """A JSON object of the run. Raises DataMissing when the file is absent or broken."""
        target = self.path / name
        try:
            value = json.loads(target.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise DataMissing(f"Run '{self.run_id}' has no {name}.", _REMEDY.format(path=self.path)) from None
        except (ValueError, OSError) as error:
            raise DataMissing(
                f"{name} of run '{self.run_id}' cannot be read: {error}.", _REMEDY.format(path=self.path)
            ) from error
        if not isinstance(value, dict):
            raise DataMissing(
                f"{name} of run '{self.run_id}' is not a JSON object.", _REMEDY.format(path=self.path)
            )
        return value

    def read_manifest(self) -> dict[str, Any]:
        """The manifest; DataMissing when the run never got one or it is broken."""
        return self.read_json("manifest.json")

    @contextmanager
    def unless_data_missing(self) -> Iterator[None]:
        """Remove the folder when the work inside raises DataMissing: there is nothing in it to resume or to read."""
        try:
            yield
        except DataMissing:
            shutil.rmtree(self.path, ignore_errors=True)
            raise

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Keep the folder to this process; StoreBusy where another one works in it. The kernel ends it with the process."""
        handle = os.open(self.path, os.O_RDONLY)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise StoreBusy(
                    f"Run {self.run_id} is being trained by another process.",
                    "Wait for it, or end that process.",
                ) from None
            yield
        finally:
            os.close(handle)

    def status(self) -> str:
        """``"complete"``, ``"running"`` (at work, or cut short) or ``"broken"`` (no readable manifest)."""
        try:
            found = self.read_manifest().get("status")
        except DataMissing:
            return "broken"
        return str(found) if found in (RUNNING, COMPLETE) else "broken"


_RESUMED_BY = {"train": "recur train", "sentiment": "recur train sentiment"}
_REMEDY = "The run was cut short or damaged: remove {path} and run the command that made it again."


def list_runs(home: Path) -> list[RunFolder]:
    """All run folders, whatever their status, oldest first by the time in their id."""
    root = Path(home) / "runs"
    if not root.is_dir():
        return []
    names = [entry.name for entry in root.iterdir() if entry.is_dir() and _RUN_ID.fullmatch(entry.name)]
    return [RunFolder(home, name) for name in sorted(names, key=_by_time)]


def open_run(home: Path, run_id: str) -> RunFolder:
    """A complete run. Raises DataMissing for an unknown id (with the closest one) and for an unfinished run."""
    run = RunFolder(home, run_id)
    if not run.path.is_dir():
        known = [other.run_id for other in list_runs(home)]
        raise DataMissing(
            f"There is no run '{run_id}' in {run.path.parent}.{did_you_mean(run_id, known)}",
            "`recur status` lists the runs."
            if known
            else "No run exists yet: `recur train price` makes one.",
        )
    status = run.read_manifest().get("status")
    if status == RUNNING:
        command = _RESUMED_BY.get(run_id.partition("-")[0])
        resume = f"resume it with `{command} --resume {run_id}` or " if command else ""
        raise DataMissing(
            f"Run '{run_id}' is not finished: its manifest says it is still running.",
            f"Wait for it; if nothing is working on it, {resume}remove {run.path}.",
        )
    if status != COMPLETE:
        raise DataMissing(
            f"The manifest of run '{run_id}' has the status {status!r}: expected '{COMPLETE}'.",
            _REMEDY.format(path=run.path),
        )
    return run


def latest_run(home: Path, kind: str) -> str | None:
    """Id of the newest complete run of a kind (the first part of its id), None when there is none."""
    for run in reversed(list_runs(home)):
        if run.run_id.startswith(f"{kind}-") and run.status() == COMPLETE:
            return run.run_id
    return None


def _by_time(run_id: str) -> tuple[str, str]:
    stamp = re.search(r"-(\d{8}T\d{6})(?:-|$)", run_id)
    return (stamp.group(1) if stamp else "", run_id)
