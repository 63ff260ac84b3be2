"""``recur doctor --repair``: bring a workspace back in order after crashes, without ever losing a stored row."""

from __future__ import annotations

import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

from recur.pipeline.certificate import certify
from recur.storage.inventory import duplicates
from recur.storage.ledger import first_broken
from recur.storage.runs import RunFolder, list_runs
from recur.storage.store import Store
from recur.vocabulary import StoreCorrupt

_TMP = re.compile(r"\..+\.(\d+)\.[0-9a-f]{6}\.tmp")
_UNTOUCHED_S = 3600.0  # a run that has just begun has no manifest yet either


def repair(home: Path, store: Store, now_ms: int) -> dict[str, Any]:
    """Put the log into the store file, remove what killed processes left half-written, and check every row.

    Returns ``{"ok", "removed": [paths], "kept": [run ids without a readable manifest that hold results],
    "duplicates": [...], "ledger_broken_at": seq | None, "series": n, "sha256": hash of the content}``.
    Raises StoreCorrupt, with the way to restore a backup, when the store cannot be read to its last row.
    """
    removed = [str(path) for path in _half_written(home)]
    kept = []
    for run in list_runs(home):
        if run.status() == "broken":
            if _is_dead(run):
                shutil.rmtree(run.path)
                removed.append(str(run.path))
            else:
                kept.append(run.run_id)
    found: dict[str, Any] = {"duplicates": [], "ledger_broken_at": None, "series": 0, "sha256": None}
    if store.path.exists():
        try:
            with store.write():
                pass  # opening replays the log, closing writes it into the file
            with store.read() as con:
                found["duplicates"] = duplicates(con)
            found["ledger_broken_at"] = first_broken(store.forecasts())
            held = certify(store, now_ms)  # reads every row: a damaged block does not stay hidden
        except StoreCorrupt as error:
            raise StoreCorrupt(
                error.message,
                f"Restore a backup: move {store.path} and {store.path}.wal away, copy the backup to {store.path}, and run"
                " `recur fetch` to bring it up to date. Nothing was changed.",
            ) from error
        found |= {"series": len(held["series"]) + len(held["measures"]), "sha256": held["sha256"]}
    ok = not found["duplicates"] and found["ledger_broken_at"] is None
    return {"ok": ok, "removed": removed, "kept": kept, **found}


def _half_written(home: Path) -> list[Path]:
    """Remove the temporary files of processes that are no more."""
    gone = []
    for path in home.rglob(".*.tmp"):
        made = _TMP.fullmatch(path.name)
        if made and path.is_file() and not _alive(int(made.group(1))):
            path.unlink(missing_ok=True)
            gone.append(path)
    return gone


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _is_dead(run: RunFolder) -> bool:
    """A run that never got a manifest, holds no result, and was not touched for an hour."""
    if run.manifest.exists() or run.metrics.exists() or any(run.path.rglob("*.safetensors")):
        return False
    newest = max(path.stat().st_mtime for path in (run.path, *run.path.rglob("*")))
    return time.time() - newest > _UNTOUCHED_S
