"""Turns at ``market.duckdb``: one process at a time, others wait politely.

DuckDB lets one process hold the file for writing, and then refuses every other process at once, readers included.
So a turn is one transaction or one read; whoever finds the file held tries again until a deadline. A session keeps the
file between its writes only while nobody waits (see ``storage/attached.py``).
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import duckdb

from recur.storage.attached import AttachedFile, file_at, waiting
from recur.storage.schema import VERSION, stored_version, upgrade
from recur.vocabulary import DataMissing, RecurError, StoreBusy, StoreCorrupt, UsageError

_SETTLE_S = 0.5  # a file that another process is just creating looks broken for an instant
_PAUSE_S = 0.005
_HEADERS_BYTES = 3 * 4096  # of a DuckDB file: what it is, and twice where its content begins
_SESSION_S = 60.0  # for threads of this process to end what they do with the file
_FATAL = (duckdb.FatalException, duckdb.InternalException)
_BROKEN = (*_FATAL, duckdb.IOException, duckdb.SerializationException)
_FULL = re.compile(r"No space left[^\n]*|File too large|[Qq]uota exceeded")
_TELLS = re.compile(_FULL.pattern + r"|Corrupt database file")  # whatever class of error says so


def _translated(error: duckdb.Error, path: Path) -> RecurError:
    """What a DuckDB failure of the file itself means to the user."""
    said = (str(error).strip().splitlines() or [""])[0]
    if full := _FULL.search(str(error)):
        return RecurError(
            f"The disk is full: {path} cannot grow ({full.group()}).",
            "Free some space there and run the command again; what was committed is safe.",
        )
    if "ermission denied" in said or "Read-only file system" in said:
        return UsageError(
            f"The store {path} may not be opened: {said}", "Check its owner, or give another --home."
        )
    return StoreCorrupt(
        f"The store {path} cannot be read: {said}",
        "Move the file away and run `recur fetch` again, or restore a copy of it.",
    )


def _is_stillborn(path: Path) -> bool:
    """Whether the process that was making this file died before it had written the headers: nothing was ever stored.
    An empty file is none of these, since a store may have been emptied: that has to be told."""
    try:
        with path.open("rb") as file:
            begin = file.read(_HEADERS_BYTES)
    except OSError:  # a folder, a file of somebody else: to attach it will tell
        return False
    return len(begin) < _HEADERS_BYTES and begin[8:12] == b"DUCK"


def _attach(file: AttachedFile, read_only: bool, wait_s: float) -> None:
    """Attach the file, waiting up to ``wait_s`` seconds while another process holds it."""
    started = time.monotonic()
    file.give_way()
    with ExitStack() as said:
        announced = False
        while True:
            try:
                return file.attach(read_only)
            except duckdb.Error as error:
                waited = time.monotonic() - started
                held = "Could not set lock" in str(error)
                if waited >= (wait_s if held else min(wait_s, _SETTLE_S)):
                    if not held and not read_only and _is_stillborn(file.path):
                        file.path.unlink()
                        continue
                    if not held:
                        raise _translated(error, file.path) from error
                    pid = re.search(r"PID (\d+)", str(error))
                    holder = f"process {pid.group(1)}" if pid else "another process"
                    raise StoreBusy(
                        f"The store {file.path} is held by {holder} for longer than {wait_s:g} s.",
                        "Wait for that process to finish, or allow a longer --wait.",
                    ) from error
            if not announced:
                said.enter_context(waiting(file.path))
                announced = True
            time.sleep(_PAUSE_S)


@contextmanager
def _turn(path: Path, wait_s: float) -> Iterator[AttachedFile]:
    """This thread's turn at the file; DuckDB's failures of the file leave as errors of ours."""
    file = file_at(path)
    with file.hold(wait_s):
        try:
            yield file
        except duckdb.Error as error:
            if isinstance(error, _FATAL):
                file.abandon()
            if isinstance(error, _BROKEN) or _TELLS.search(str(error)):
                raise _translated(error, path) from error
            raise


@contextmanager
def write_connection(path: Path, wait_s: float) -> Iterator[duckdb.DuckDBPyConnection]:
    """One transaction on the store: committed when the block ends, dropped when it raises.

    Creates the folder, the file and the tables when they are absent. Raises StoreBusy, StoreCorrupt, UsageError, and
    RecurError when the disk is full.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"Cannot make the workspace folder {path.parent}: {error.strerror}.", "Give another --home."
        ) from error
    with _turn(path, wait_s) as file:
        if not file.writable:
            file.detach()  # a session may have it for reading
            _attach(file, read_only=False, wait_s=wait_s)
        try:
            con = file.cursor()
            try:
                if not file.checked:
                    upgrade(con)
                    file.checked = True
                con.execute("BEGIN")
                yield con
                con.execute("COMMIT")
            finally:
                con.close()  # without COMMIT this drops the transaction
        except BaseException as error:
            if not isinstance(error, _FATAL):
                file.finish()
            raise
        file.finish()


@contextmanager
def read_connection(path: Path, wait_s: float) -> Iterator[duckdb.DuckDBPyConnection]:
    """A connection for reading. Raises DataMissing when there is no store yet, StoreBusy, StoreCorrupt, UsageError."""
    if not path.exists():
        raise DataMissing(f"There is no store at {path} yet.", "Run `recur fetch` first.")
    if _is_stillborn(path):
        with write_connection(path, wait_s):
            pass
    with _turn(path, wait_s) as file:
        if not file.attached:
            _attach(file, read_only=True, wait_s=wait_s)
        try:
            con = file.cursor()
            if (
                not file.checked and stored_version(con) < VERSION
            ):  # made by an older program, or its making was cut short
                con.close()
                file.detach()
                _attach(file, read_only=False, wait_s=wait_s)
                con = file.cursor()
                upgrade(con)
            try:
                yield con
            finally:
                con.close()
        finally:
            file.finish()


@contextmanager
def session(path: Path) -> Iterator[None]:
    """While this is open, writes of this process keep the file attached between them unless another process waits."""
    file, ended = file_at(path), threading.Event()
    watcher = threading.Thread(target=file.watch, args=(ended,), name="recur-store", daemon=True)
    with file.hold(_SESSION_S):
        file.sessions += 1
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()
        with _turn(path, _SESSION_S) as held:
            held.sessions -= 1
            held.finish()
