"""Names of sequence models. A new model is one file and one line here."""

from __future__ import annotations

from recur.models.gru import GRU
from recur.models.interface import SequenceModel
from recur.vocabulary import UsageError, did_you_mean

MODELS = {"gru": GRU}


def build_sequence_model(name: str, d_in: int, d_out: int, layers: int, dropout: float) -> SequenceModel:
    """The named model from ``d_in`` inputs to ``d_out`` outputs; UsageError for an unknown name."""
    if name not in MODELS:
        raise UsageError(
            f"Unknown model '{name}': expected one of {', '.join(MODELS)}.{did_you_mean(name, MODELS)}"
        )
    return MODELS[name](d_in, d_out, layers, dropout)
