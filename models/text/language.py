"""Recurrent language model: which token comes next, in either direction of reading.

Outputs are tied to the embeddings (Inan et al. 2017, arXiv:1611.01462). Training scores a sample of the vocabulary:
the tokens that occur in the batch and some others, each logit lowered by the logarithm of its chance to be in the
sample, which makes the sum over the sample an unbiased estimate of the sum over all (Bengio & Senécal 2008).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from recur.models.interface import State
from recur.models.text.classifier import TextClassifier
from recur.models.text.encoder import Encoder
from recur.models.text.recurrence import locked_dropout


class LanguageModel(nn.Module):
    """Next-token logits of each direction over one :class:`Encoder`."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.bias = nn.Parameter(torch.zeros(2, encoder.spec.vocabulary))

    def begin_with(self, counts: Tensor) -> None:
        """Before anything is learned, let every token be as likely as its count (V,) in the corpus says.

        Otherwise the embeddings spend the first pass on learning which words are common, all in one direction.
        """
        with torch.no_grad():
            self.bias.copy_(((counts + 0.5) / (counts + 0.5).sum()).log().expand(2, -1))

    def hidden(self, tokens: Tensor, backward: bool, state: State | None) -> tuple[Tensor, State]:
        """tokens (B, T) in reading order → (B, T, width) and the state to go on with."""
        part = self.encoder.direction(backward)
        y, state = part(self.encoder.embed(tokens, part.rng), state)
        return (locked_dropout(y, self.encoder.drops.output, part.rng) if self.training else y), state

    def logits(self, hidden: Tensor, backward: bool) -> Tensor:
        """hidden (…, width) → scores of every token (…, V)."""
        return hidden @ self.encoder.embedding.weight.T + self.bias[int(backward)]

    def loss(self, hidden: Tensor, targets: Tensor, backward: bool, sample: Tensor, chance: Tensor) -> Tensor:
        """Mean cross-entropy of ``targets`` (B, T) over the tokens in ``sample`` (S,), ``chance`` (S,) in (0, 1].

        Every target must be in the sample, which is sorted.
        """
        weight = self.encoder.embedding.weight[sample]
        scores = (hidden.flatten(0, 1) @ weight.to(hidden.dtype).T).float() + (
            self.bias[int(backward)][sample] - chance.log()
        )
        return nn.functional.cross_entropy(scores, torch.searchsorted(sample, targets.flatten()))


def grown_classifier(net: TextClassifier, pieces: Sequence[Sequence[int]]) -> TextClassifier:
    """``net`` with a further token for each of ``pieces``, as in :func:`grown`."""
    encoder = grown(LanguageModel(net.encoder), pieces).encoder
    after = TextClassifier(encoder)
    after.load_state_dict(net.state_dict() | {f"encoder.{k}": v for k, v in encoder.state_dict().items()})
    return after


def grown(model: LanguageModel, pieces: Sequence[Sequence[int]]) -> LanguageModel:
    """``model`` with a further token for each of ``pieces``; it begins as the mean of those tokens."""
    before = model.encoder
    after = LanguageModel(Encoder(replace(before.spec, vocabulary=before.spec.vocabulary + len(pieces))))
    tensors = model.state_dict()
    if pieces:
        rows = tensors["encoder.embedding.weight"]
        tensors["encoder.embedding.weight"] = torch.cat(
            [rows, torch.stack([rows[list(p)].mean(0) for p in pieces])]
        )
        bias = tensors["bias"]
        tensors["bias"] = torch.cat([bias, torch.stack([bias[:, list(p)].mean(1) for p in pieces], 1)], 1)
    after.load_state_dict(tensors)
    return after


def draw_sample(
    targets: Tensor, frequency: Tensor, others: int, rng: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Sorted tokens to score for ``targets`` and the chance of each to be drawn.

    ``frequency`` (V,) is the share of each token in the corpus; ``others`` tokens come uniformly on top.
    """
    size = len(frequency)
    extra = torch.randint(0, size, (others,), generator=rng)
    sample = torch.unique(torch.cat([targets.flatten(), extra]))
    absent = (1 - frequency[sample]).clamp(min=1e-12).log() * targets.numel()
    absent = absent + others * torch.log1p(torch.tensor(-1 / size))
    return sample, (1 - absent.exp()).clamp(min=1e-6)
