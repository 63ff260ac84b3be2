"""Names of sequence models. A new model is one file and one line here.

The table holds names of modules, not classes: a model's file is imported when that model is built, and no sooner.
A model of the user's own stands in a file of theirs (``path/to/file.py:Name``, see :mod:`recur.models.own`).
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Protocol

from recur.models.interface import SequenceModel
from recur.vocabulary import PATTERNED, UsageError, did_you_mean


class Make(Protocol):
    """How every model is built; in practice its class."""

    def __call__(self, d_in: int, d_out: int, layers: int, dropout: float) -> SequenceModel: ...


@dataclass(frozen=True, slots=True)
class Core:
    """A model that can be built, and what must be known about it.

    ``layers``: as many as it has where nobody asks for a number.
    ``continuous``: its state moves with the elapsed time, so missing bars are skipped instead of being inputs.
    ``source``: the text of the file that a user's own model comes from; empty for those of the table.
    """

    name: str
    make: Make
    layers: int = 1
    continuous: bool = False
    source: bytes = b""


MODELS: dict[str, str] = {
    "gru": "recur.models.gru:GRU",
    "gru_standard": "recur.models.gru:StandardGRU",
    "elman": "recur.models.elman:Elman",
    "lstm": "recur.models.lstm:LSTM",
    "mingru": "recur.models.mingru:MinGRU",
    "minlstm": "recur.models.mingru:MinLSTM",
    "ssm": "recur.models.ssm:DiagonalSSM",
    "ssm_real": "recur.models.ssm:RealSSM",
    "ctrnn": "recur.models.ctrnn:CTRNN",
    "ctrnn_euler": "recur.models.ctrnn:CTRNNEuler",
    "ctrnn_rk4": "recur.models.ctrnn:CTRNNRK4",
    "cfc": "recur.models.cfc:CfC",
    "ltc": "recur.models.ltc:LTC",
    "sparse": "recur.models.sparse:SparseRNN",
    "mamba": "recur.models.residual:Mamba",
    "mamba2": "recur.models.residual:Mamba2",
    "attention": "recur.models.residual:Attention",
    "hybrid": "recur.models.residual:Hybrid",
}
"""Name to ``module:class``."""


def is_own(name: str) -> bool:
    """Whether ``name`` means a class in a file of the user's own."""
    return ".py:" in name


def model_label(name: str) -> str:
    """What a model is called in run ids, tables and the ledger: its name, or the class of a user's own."""
    return name.rpartition(":")[2] if is_own(name) else name


def table_core(name: str) -> Core:
    """The model of that name in the table, or the hybrid of a pattern; UsageError for an unknown name. Never reads a
    user's file."""
    if name.startswith(PATTERNED):
        return _of_pattern(name)
    if name not in MODELS:
        near = did_you_mean(name.lower(), MODELS)
        raise UsageError(
            f"Unknown model '{name}': expected one of {', '.join(MODELS)}, hybrid:PATTERN, or a file.py:Class.{near}"
        )
    module, _, cls = MODELS[name].partition(":")
    make = getattr(import_module(module), cls)
    return Core(name, make, getattr(make, "usual_layers", 1), getattr(make, "continuous", False))


def _of_pattern(name: str) -> Core:
    from recur.models.residual import Stack, checked_pattern

    pattern = checked_pattern(name.removeprefix(PATTERNED))
    return Core(name, lambda d_in, d_out, layers, dropout: Stack(d_in, d_out, pattern, dropout), len(pattern))


def find_core(name: str) -> Core:
    """The model that a user named: one of the table, or ``path/to/file.py:Name``, which is run and checked."""
    if not is_own(name):
        return table_core(name)
    from recur.models.own import own_core

    path, _, cls = name.rpartition(":")
    try:
        source = Path(path).read_bytes()
    except OSError as error:
        raise UsageError(
            f"Cannot read the model file {path}: {error.strerror}.", "Give it as path/to/file.py:Name."
        ) from None
    return own_core(source, cls, path)


def build_sequence_model(name: str, d_in: int, d_out: int, layers: int, dropout: float) -> SequenceModel:
    """The named model of the table from ``d_in`` inputs to ``d_out`` outputs; UsageError for an unknown name."""
    return table_core(name).make(d_in, d_out, layers, dropout)
