"""A trained forecaster on disk: safetensors weights and JSON beside them. Loading never executes code.

A run of a user's own model holds a copy of its file (``model.py``). Without that code there is nothing to load, so
such a run opens only for a caller who says that it is trusted; then the copy must be the one that was trained.
"""

from __future__ import annotations

import platform
import subprocess
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from recur.models.forecaster import Forecaster, ForecasterSpec
from recur.models.own import own_core, source_sha256
from recur.models.registry import Core, model_label
from recur.pipeline.features import FeatureTransform
from recur.storage.runs import RunFolder, open_run, write_bytes
from recur.vocabulary import DataMissing, UsageError

OWN_SOURCE = "model.py"


@dataclass(frozen=True, slots=True)
class Artefact:
    """Network, its feature transformation, and the symbols that it has embeddings for."""

    net: Forecaster
    transform: FeatureTransform
    symbols: dict[str, int]


def save_spec(folder: RunFolder, artefact: Artefact, core: Core) -> None:
    """Write what is fixed before training: ``features.json``, ``model.json``, the file of a user's own model."""
    if core.source:
        write_bytes(folder.path / OWN_SOURCE, core.source)
    folder.write_json("features.json", artefact.transform.as_dict())
    folder.write_json("model.json", {"spec": artefact.net.spec.as_dict(), "symbols": artefact.symbols})


def save_weights(folder: RunFolder, net: Forecaster) -> None:
    beside = folder.path / ".model.tmp"
    # Copies: safetensors refuses weights that share memory, as those of a model that ties them do.
    save_file(
        {k: v.clone(memory_format=torch.contiguous_format) for k, v in net.state_dict().items()}, beside
    )
    beside.replace(folder.weights)


def load_artefact(folder: RunFolder, *, trust: bool = False) -> Artefact:
    """The forecaster of a complete run; DataMissing when a part of it is absent or does not fit the others.

    UsageError for a run of a user's own model without ``trust``, and when its file is not the one trained.
    """
    features, model = folder.read_json("features.json"), folder.read_json("model.json")
    try:
        transform = FeatureTransform.from_dict(features)
        spec = ForecasterSpec(**{**model["spec"], "horizons": tuple(model["spec"]["horizons"])})
        symbols = {str(name): int(row) for name, row in model["symbols"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataMissing(
            f"features.json or model.json of run {folder.run_id} does not describe a model"
            f" ({type(error).__name__}: {error}).",
            "Train again with 'recur train price'.",
        ) from error
    net = Forecaster(spec, stored_core(folder, spec, trust) if spec.sha256 else None)
    try:
        net.load_state_dict(load_file(folder.weights))
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise DataMissing(
            f"The weights of run {folder.run_id} cannot be loaded: {str(error).splitlines()[0].rstrip('.')}.",
            "Train again with 'recur train price'.",
        ) from error
    return Artefact(net.eval(), transform, symbols)


def stored_core(folder: RunFolder, spec: ForecasterSpec, trust: bool) -> Core:
    """The user's own model of a run, from the copy in its folder: running it takes consent."""
    path = folder.path / OWN_SOURCE
    if not trust:
        raise UsageError(
            f"Run {folder.run_id} is of a model of its own, {model_label(spec.model)}: opening it would run the code in {path}"
            f" (sha256 {spec.sha256[:12]}…).",
            "Read that file, then give --trust-model.",
        )
    try:
        source = path.read_bytes()
    except OSError as error:
        raise DataMissing(
            f"Run {folder.run_id} has no {OWN_SOURCE}: {error.strerror}.", "Train again."
        ) from None
    if source_sha256(source) != spec.sha256:
        raise UsageError(
            f"{path} is not the file that run {folder.run_id} was trained with: sha256 {source_sha256(source)[:12]}…,"
            f" expected {spec.sha256[:12]}….",
            "Put the original back, or train again.",
        )
    return own_core(source, model_label(spec.model), str(path))


def open_trained(home: Path, run_id: str, *, trust: bool = False) -> tuple[RunFolder, Artefact]:
    folder = open_run(home, run_id)
    if (kind := folder.read_manifest().get("kind")) != "train":
        raise UsageError(
            f"Run {run_id} is no trained price model but a {kind} run.",
            "'recur status' lists the trained runs.",
        )
    return folder, load_artefact(folder, trust=trust)


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
