"""Short connections to ``market.duckdb``: one writing process at a time, others wait politely.

DuckDB lets one process hold the file for writing, and then refuses every other process at once, readers included.
So a connection lives for one transaction only; whoever finds the file held tries again until a deadline.
Within this process connections of one file exclude each other by a lock (DuckDB cannot mix read-only and writing
connections in one process).
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import duckdb

from recur.storage.schema import VERSION, stored_version, upgrade
from recur.vocabulary import DataMissing, RecurError, StoreBusy, StoreCorrupt, UsageError

_SETTLE_S = 0.5  # a file that another process is just creating looks broken for an instant
_BROKEN = (duckdb.IOException, duckdb.FatalException, duckdb.InternalException, duckdb.SerializationException)


class _FileLock:
    """The in-process lock of one file; a thread that would wait for itself gets an error instead."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner = 0

    @contextmanager
    def hold(self, path: Path, wait_s: float) -> Iterator[None]:
        if self._owner == threading.get_ident():
            raise RuntimeError(f"this thread already has a connection to {path} open: close it first")
        if not self._lock.acquire(timeout=max(wait_s, 0.0)):
            raise StoreBusy(
                f"The store {path} is used by another thread of this process for longer than {wait_s:g} s.",
                "Wait for it to finish, or allow a longer --wait.",
            )
        self._owner = threading.get_ident()
        try:
            yield
        finally:
            self._owner = 0
            self._lock.release()


_locks: dict[Path, _FileLock] = {}
_locks_guard = threading.Lock()


def _lock_of(path: Path) -> _FileLock:
    with _locks_guard:
        return _locks.setdefault(path.resolve(), _FileLock())


def _translated(error: duckdb.Error, path: Path) -> RecurError:
    """What a DuckDB failure of the file itself means to the user."""
    said = (str(error).strip().splitlines() or [""])[0]
    if "No space left" in said:
        return RecurError(
            f"The disk is full: {said}", f"Free some space near {path}; committed data is safe."
        )
    if "ermission denied" in said or "Read-only file system" in said:
        return UsageError(
            f"The store {path} may not be opened: {said}", "Check its owner, or give another --home."
        )
    return StoreCorrupt(
        f"The store {path} cannot be read: {said}",
        "Move the file away and run `recur fetch` again, or restore a copy of it.",
    )


def _open(path: Path, read_only: bool, wait_s: float) -> duckdb.DuckDBPyConnection:
    """Open the file, waiting up to ``wait_s`` seconds while another process holds it."""
    started = time.monotonic()
    pause = 0.01
    while True:
        try:
            return duckdb.connect(str(path), read_only=read_only)
        except duckdb.Error as error:
            waited = time.monotonic() - started
            held = "Could not set lock" in str(error)
            if waited >= (wait_s if held else min(wait_s, _SETTLE_S)):
                if not held:
                    raise _translated(error, path) from error
                pid = re.search(r"PID (\d+)", str(error))
                holder = f"process {pid.group(1)}" if pid else "another process"
                raise StoreBusy(
                    f"The store {path} is held by {holder} for longer than {wait_s:g} s.",
                    "Wait for that process to finish, or allow a longer --wait.",
                ) from error
        time.sleep(pause)
        pause = min(pause * 1.5, 0.2)


@contextmanager
def _file_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except _BROKEN as error:
        raise _translated(error, path) from error


@contextmanager
def write_connection(path: Path, wait_s: float) -> Iterator[duckdb.DuckDBPyConnection]:
    """One transaction on the store: committed when the block ends, dropped when it raises.

    Creates the folder, the file and the tables when they are absent. Raises StoreBusy, StoreCorrupt, UsageError.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"Cannot make the workspace folder {path.parent}: {error.strerror}.", "Give another --home."
        ) from error
    with _lock_of(path).hold(path, wait_s), _file_errors(path):
        con = _open(path, read_only=False, wait_s=wait_s)
        try:
            upgrade(con)
            con.execute("BEGIN")
            yield con
            con.execute("COMMIT")
        finally:
            con.close()  # without COMMIT this drops the transaction


@contextmanager
def read_connection(path: Path, wait_s: float) -> Iterator[duckdb.DuckDBPyConnection]:
    """A read-only connection. Raises DataMissing when there is no store yet, StoreBusy, StoreCorrupt, UsageError."""
    if not path.exists():
        raise DataMissing(f"There is no store at {path} yet.", "Run `recur fetch` first.")
    with _lock_of(path).hold(path, wait_s), _file_errors(path):
        con = _open(path, read_only=True, wait_s=wait_s)
        try:
            if stored_version(con) < VERSION:  # made by an older program, or its making was cut short
                con.close()
                with _open(path, read_only=False, wait_s=wait_s) as writable:
                    upgrade(writable)
                con = _open(path, read_only=True, wait_s=wait_s)
            yield con
        finally:
            con.close()
