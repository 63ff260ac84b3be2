"""The file that holds the request budget for all processes of a user: four numbers and a checksum, under a lock.

A process killed at any moment leaves either the old numbers or the new ones: the lock dies with it, and a torn write
fails the checksum, which reads as "nothing known".
"""

from __future__ import annotations

import getpass
import os
import stat
import struct
import tempfile
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock

_FORMAT = struct.Struct("<4s4d")
_MAGIC = b"RPC1"
_SIZE = _FORMAT.size + 4
_WAIT_S = 10.0
_FORGOTTEN_S = 86_400.0

Fields = tuple[float, float, float, float]


def runtime_folder() -> Path:
    """A folder of this user alone, the same for a shell and a cron job, gone at the latest when temporary files are.

    Raises OSError when it cannot be made or somebody else has made it.
    """
    owner = os.getuid() if hasattr(os, "getuid") else getpass.getuser()
    folder = Path(os.environ.get("TMPDIR") or tempfile.gettempdir()) / f"recur-{owner}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or (hasattr(os, "getuid") and found.st_uid != os.getuid()):
        raise PermissionError(f"{folder} belongs to another user")
    return folder


class PaceFile:
    """The budget named ``name``. ``held`` locks it and gives its numbers, None when they are absent or damaged."""

    def __init__(self, name: str, folder: Path | None = None) -> None:
        folder = folder or runtime_folder()
        self.path = folder / f"{name}.pace"
        if not self.path.exists():
            _sweep(folder)
        self._lock = filelock.FileLock(f"{self.path}.lock", timeout=_WAIT_S, thread_local=False)

    @contextmanager
    def held(self) -> Iterator[Fields | None]:
        """Raises OSError (TimeoutError included) when the file cannot be locked or read."""
        with self._lock:
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o600)
            try:
                yield _unpacked(os.read(self._fd, _SIZE + 1))
            finally:
                os.close(self._fd)

    def write(self, fields: Fields) -> None:
        """Replace the numbers; only while ``held``."""
        body = _FORMAT.pack(_MAGIC, *fields)
        os.lseek(self._fd, 0, os.SEEK_SET)
        os.write(self._fd, body + zlib.crc32(body).to_bytes(4, "little"))
        os.ftruncate(self._fd, _SIZE)


def _unpacked(data: bytes) -> Fields | None:
    body = data[: _FORMAT.size]
    if len(data) != _SIZE or zlib.crc32(body).to_bytes(4, "little") != data[_FORMAT.size :]:
        return None
    magic, next_s, share, share_at_s, banned_until = _FORMAT.unpack(body)
    return (next_s, share, share_at_s, banned_until) if magic == _MAGIC else None


def _sweep(folder: Path) -> None:
    """Remove what servers on this machine left behind, each of which had a budget of its own, after a day."""
    for path in folder.glob("loopback-*"):
        try:
            if path.stat().st_mtime < time.time() - _FORGOTTEN_S:
                path.unlink()
        except FileNotFoundError:  # another process was faster
            continue
