"""How this process holds a store file: attached to an in-memory DuckDB that lives as long as the process.

Starting DuckDB costs ten times as much as attaching a file to one that runs already, and the file is locked only
while it is attached. There are two such instances: one for reading with all threads, and one for writing with a
single thread, which appends batches of some thousand rows twice as fast as several do.

While a **session** is open the file stays attached between writes, unless another process waits for it. Whoever waits
says so by a shared ``flock`` on ``<file>.wait``, which the kernel takes back when a process dies; the session looks for it
after each write, and by a thread while it is idle, and hands the file over.
"""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import duckdb

from recur.vocabulary import StoreBusy

CHECKPOINT_AT = "64MB"
"""Size of the write-ahead log at which a session writes it into the file; a single write does so at its end."""
ROW_GROUP = 16_384
"""Rows per stored group. A batch of some ten thousand rows fills whole groups, which go into the file at once instead of
first into the log, and a page of a thousand rewrites at most one small group. The file grows by a fifth."""
_LOOK_S = 0.02  # how often an idle session looks whether another process waits
_YIELD_S = 1.0  # how long a session lets those who wait go first

_instances: dict[tuple[int, bool], duckdb.DuckDBPyConnection] = {}
_guard = threading.Lock()
_names = 0


def _instance(read_only: bool) -> duckdb.DuckDBPyConnection:
    """The in-memory DuckDB of this process for reading or for writing (a forked child makes its own)."""
    with _guard:
        key = (os.getpid(), read_only)
        if key not in _instances:
            settings: dict[str, str | bool | int | float | list[str]] = (
                {} if read_only else {"threads": 1, "wal_autocheckpoint": CHECKPOINT_AT}
            )
            _instances[key] = duckdb.connect(":memory:", config=settings)
        return _instances[key].cursor()


def _forget_instance(read_only: bool) -> None:
    """Let go of an instance that a fatal error has made unusable; the next use starts a new one."""
    with _guard:
        broken = _instances.pop((os.getpid(), read_only), None)
    if broken is not None:
        broken.close()


class AttachedFile:
    """One store file within this process. Its threads take turns; ``hold`` is the turn.

    ``attach`` and ``cursor`` are to be called during a turn only. DuckDB errors pass through untranslated.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.sessions = 0
        self._turn = threading.Lock()
        self._owner = 0
        self._control: duckdb.DuckDBPyConnection | None = None
        self._read_only = False
        self._name = ""
        self._yielded = False
        self.checked = False
        """Whether the schema of what is attached now is known to be current."""

    @contextmanager
    def hold(self, wait_s: float) -> Iterator[None]:
        """This thread's turn. StoreBusy after ``wait_s`` seconds; RuntimeError where a thread would wait for itself."""
        if self._owner == threading.get_ident():
            raise RuntimeError(f"this thread already has a connection to {self.path} open: close it first")
        if not self._turn.acquire(timeout=max(wait_s, 0.0)):
            raise StoreBusy(
                f"The store {self.path} is used by another thread of this process for longer than {wait_s:g} s.",
                "Wait for it to finish, or allow a longer --wait.",
            )
        self._owner = threading.get_ident()
        try:
            yield
        finally:
            self._owner = 0
            self._turn.release()

    @property
    def attached(self) -> bool:
        return self._control is not None

    @property
    def read_only(self) -> bool:
        return self._read_only

    def attach(self, read_only: bool) -> None:
        """Attach the file, or raise what DuckDB raises (the file may be held by another process)."""
        global _names
        control = _instance(read_only)
        with _guard:
            _names += 1
            name = f"store_{_names}"
        try:
            mode = "TYPE duckdb, READ_ONLY" if read_only else f"TYPE duckdb, ROW_GROUP_SIZE {ROW_GROUP}"
            control.execute(f"ATTACH '{str(self.path).replace(chr(39), chr(39) * 2)}' AS {name} ({mode})")
        except BaseException:
            control.close()
            raise
        self._control, self._read_only, self._name = control, read_only, name
        self.checked = False

    def cursor(self) -> duckdb.DuckDBPyConnection:
        """A connection whose default database is the attached file. Close it before the turn ends."""
        assert self._control is not None
        found = self._control.cursor()
        found.execute(f"USE {self._name}")
        return found

    def detach(self) -> None:
        """Let go of the file; a writing attachment puts its log into the file first."""
        control, self._control = self._control, None
        if control is None:
            return
        try:
            control.execute(f"DETACH {self._name}")
        except duckdb.Error:  # the log could not be put into the file: end the instance, which lets go of it
            _forget_instance(self._read_only)
            raise
        finally:
            control.close()

    def abandon(self) -> None:
        """Let go of the file after a fatal error: what was committed stays in the log for the next one to replay."""
        control, self._control = self._control, None
        if control is not None:
            with suppress(duckdb.Error):  # it is broken: the error that says so is on its way up already
                control.execute(f"DETACH {self._name}")
            control.close()
            _forget_instance(self._read_only)

    def finish(self) -> None:
        """End of a turn: keep the file when a session is open and nobody waits for it."""
        waited_for = someone_waits(self.path)
        if waited_for or not self.sessions:
            self.detach()
            self._yielded = waited_for

    def give_way(self) -> None:
        """Before taking the file again after others waited for it: let them go first, for a second at most."""
        if not self._yielded:
            return
        self._yielded = False
        until = time.monotonic() + _YIELD_S
        while someone_waits(self.path) and time.monotonic() < until:
            time.sleep(0.002)

    def watch(self, ended: threading.Event) -> None:
        """Body of a session's thread: hand the file over between writes when another process waits for it."""
        while not ended.wait(_LOOK_S):
            if self.attached and someone_waits(self.path) and self._turn.acquire(blocking=False):
                try:
                    if self.attached:
                        self.detach()
                        self._yielded = True
                finally:
                    self._turn.release()


_files: dict[tuple[int, Path], AttachedFile] = {}


def file_at(path: Path) -> AttachedFile:
    """The one object for a path in this process (a forked child has its own)."""
    with _guard:
        return _files.setdefault((os.getpid(), path.resolve()), AttachedFile(path))


@contextmanager
def waiting(path: Path) -> Iterator[None]:
    """Say, to sessions in other processes, that this one waits for the file."""
    mark = os.open(f"{path}.wait", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(mark, fcntl.LOCK_SH)
        yield
    finally:
        os.close(mark)


def someone_waits(path: Path) -> bool:
    """Whether a process is inside ``waiting`` for this file."""
    try:
        mark = os.open(f"{path}.wait", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(mark)
    return False
