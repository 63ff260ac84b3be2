"""A trained forecaster on disk: safetensors weights and JSON beside them. Loading never executes code."""

from __future__ import annotations

import platform
import subprocess
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from recur.models.forecaster import Forecaster, ForecasterSpec
from recur.pipeline.features import FeatureTransform
from recur.storage.runs import RunFolder, open_run
from recur.vocabulary import DataMissing


@dataclass(frozen=True, slots=True)
class Artefact:
    """Network, its feature transformation, and the symbols that it has embeddings for."""

    net: Forecaster
    transform: FeatureTransform
    symbols: dict[str, int]


def save_spec(folder: RunFolder, artefact: Artefact) -> None:
    """Write what is fixed before training: ``features.json`` and ``model.json``."""
    folder.write_json("features.json", artefact.transform.as_dict())
    folder.write_json("model.json", {"spec": artefact.net.spec.as_dict(), "symbols": artefact.symbols})


def save_weights(folder: RunFolder, net: Forecaster) -> None:
    beside = folder.path / ".model.tmp"
    save_file({k: v.contiguous() for k, v in net.state_dict().items()}, beside)
    beside.replace(folder.weights)


def load_artefact(folder: RunFolder) -> Artefact:
    """The forecaster of a complete run; DataMissing when a part of it is absent or does not fit the others."""
    transform = FeatureTransform.from_dict(folder.read_json("features.json"))
    model = folder.read_json("model.json")
    spec = ForecasterSpec(**{**model["spec"], "horizons": tuple(model["spec"]["horizons"])})
    net = Forecaster(spec)
    try:
        net.load_state_dict(load_file(folder.weights))
    except (OSError, RuntimeError, ValueError) as error:
        raise DataMissing(
            f"The weights of run {folder.run_id} cannot be loaded: {str(error).splitlines()[0]}",
            "Train again with 'recur train price'.",
        ) from error
    return Artefact(net.eval(), transform, dict(model["symbols"]))


def open_trained(home: Path, run_id: str) -> tuple[RunFolder, Artefact]:
    folder = open_run(home, run_id)
    return folder, load_artefact(folder)


def environment() -> dict[str, Any]:
    """Versions that a run was made with, for its manifest."""
    packages = {}
    for name in ("recur", "torch", "lightning", "polars", "duckdb", "numpy", "pybit"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = "not installed"
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages,
        "git": _git(),
    }


def _git() -> str | None:
    """Commit of the source tree, with '+' when it has changes; None outside one."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    try:
        run = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty=+"],
            check=False,
            capture_output=True,
            text=True,
            timeout=5,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run.stdout.strip() or None
