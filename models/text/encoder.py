"""The part that the language model and the classifier share: embeddings and one recurrence for each direction.

The two directions are separate stacks (Peters et al. 2018, arXiv:1802.05365, §3.1): each can be pretrained on its own
to predict the token that it has not read yet, and each reads a text of any length in pieces with its state carried.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from recur.models.text.recurrence import Recurrence, locked_dropout


@dataclass(frozen=True, slots=True)
class EncoderSpec:
    """Sizes: ``vocabulary`` tokens, ``width`` of an embedding and of the last layer, ``hidden`` of other layers."""

    vocabulary: int
    width: int = 256
    hidden: int = 256
    layers: int = 2

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Drops:
    """Shares dropped in training: whole words, embedding entries, between layers, of the output, of weights."""

    word: float = 0.0
    embedding: float = 0.0
    between: float = 0.0
    output: float = 0.0
    weight: float = 0.0


class Encoder(nn.Module):
    """Token numbers to one vector per token and direction."""

    def __init__(self, spec: EncoderSpec) -> None:
        super().__init__()
        self.spec = spec
        self.embedding = nn.Embedding(spec.vocabulary, spec.width)
        nn.init.normal_(self.embedding.weight, std=0.2)
        self.directions = nn.ModuleList(
            Recurrence(spec.width, spec.hidden, spec.width, spec.layers) for _ in range(2)
        )
        self.drops = Drops()

    def direction(self, backward: bool) -> Recurrence:
        part = self.directions[int(backward)]
        assert isinstance(part, Recurrence)
        return part

    def halve(self, on: bool) -> None:
        """Compute the recurrences in bfloat16 (weights and results stay in 32 bits)."""
        for backward in (False, True):
            self.direction(backward).half_precision = on

    def regularise(self, drops: Drops, seed: int) -> None:
        """Set the dropout of both directions and start their generators anew."""
        self.drops = drops
        for backward in (False, True):
            part = self.direction(backward)
            part.dropout, part.weight_drop = drops.between, drops.weight
            part.rng.manual_seed(2 * seed + backward)

    def embed(self, tokens: Tensor, rng: torch.Generator) -> Tensor:
        """tokens (B, T) → (B, T, width); in training some words of the vocabulary are absent everywhere."""
        x = nn.functional.embedding(tokens, self.embedding.weight)
        if not self.training:
            return x
        if self.drops.word > 0:
            kept = torch.empty(self.spec.vocabulary, 1).bernoulli_(1 - self.drops.word, generator=rng)
            x = x * nn.functional.embedding(tokens, kept.div_(1 - self.drops.word))
        return locked_dropout(x, self.drops.embedding, rng)


def load_weights(module: nn.Module, tensors: Mapping[str, Tensor], prefix: str) -> None:
    """Load the entries of ``tensors`` that begin with ``prefix``, with it taken off."""
    module.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
