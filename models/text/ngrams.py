"""A linear classifier of hashed n-grams: what a few words in a row say, whatever stands around them.

Runs of one to three tokens are hashed into buckets and weighted by (1 + log count) · idf, of unit length per text;
multinomial logistic regression on them. Linear models of n-grams are hard to beat on short texts (Wang & Manning 2012,
ACL, "Baselines and Bigrams"), and they err elsewhere than a recurrent network does.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

BUCKETS = 1 << 17
LONGEST = 3
"""Tokens of the longest n-gram."""


def hashed(text: Sequence[int]) -> NDArray[np.int64]:
    """Bucket of every n-gram of a text (N tokens), 3 N − 3 of them from N = 3 on, the same in every process."""
    with np.errstate(over="ignore"):
        tokens = np.asarray(text, dtype=np.uint64) + np.uint64(1)
        runs, h = [], np.zeros(len(tokens), dtype=np.uint64)
        for n in range(min(LONGEST, len(tokens))):
            last = len(tokens) - n
            h = (h[:last] + tokens[n:]) * np.uint64(0x9E3779B97F4A7C15)
            h ^= h >> np.uint64(29)
            runs.append(h)
        joined = np.concatenate(runs) if runs else h
    return (joined % np.uint64(BUCKETS)).astype(np.int64)


class NGrams(nn.Module):
    """``classes`` logits from token numbers. Buckets that occur in fewer than two texts of the training are left out."""

    idf: Tensor

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.register_buffer("idf", torch.zeros(BUCKETS))
        self.weight = nn.Parameter(torch.zeros(BUCKETS, classes))
        self.bias = nn.Parameter(torch.zeros(classes))

    def bags(self, texts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor, Tensor]:
        """Buckets, their values, and where each text begins among them."""
        idf = self.idf.numpy()
        buckets, values, starts = [], [], [0]
        for text in texts:
            found, count = np.unique(hashed(text), return_counts=True)
            value = (1 + np.log(count)) * idf[found]
            found, value = found[value > 0], value[value > 0]
            buckets.append(found)
            values.append(value / max(float(np.sqrt((value**2).sum())), 1e-12))
            starts.append(starts[-1] + len(found))
        of = self.weight.dtype
        return (
            torch.from_numpy(np.concatenate(buckets)),
            torch.from_numpy(np.concatenate(values)).to(of),
            torch.tensor(starts[:-1]),
        )

    def forward(self, bags: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """What :meth:`bags` made of B texts → (B, classes)."""
        return _summed(bags, self.weight) + self.bias

    def fit(
        self, texts: Sequence[Sequence[int]], labels: NDArray[np.int64], weight: Tensor, strength: float
    ) -> None:
        """Least Σ weight · cross-entropy + ‖W‖² / (2 strength), by L-BFGS in float64; ``weight`` per class."""
        seen = np.bincount(np.concatenate([np.unique(hashed(text)) for text in texts]), minlength=BUCKETS)
        idf = np.where(seen > 1, np.log((1 + len(texts)) / (1 + seen)) + 1, 0.0)
        self.idf.copy_(torch.from_numpy(idf))
        known = torch.nonzero(self.idf)[:, 0]
        place = torch.zeros(BUCKETS, dtype=torch.long)
        place[known] = torch.arange(len(known))
        buckets, values, starts = self.bags(texts)
        bags = place[buckets], values.double(), starts
        matrix = torch.zeros(len(known), len(self.bias), dtype=torch.float64, requires_grad=True)
        bias = torch.zeros(len(self.bias), dtype=torch.float64, requires_grad=True)
        target, weight = torch.from_numpy(labels), weight.double()
        search = torch.optim.LBFGS(
            [matrix, bias], max_iter=200, history_size=10, line_search_fn="strong_wolfe"
        )

        def loss() -> Tensor:
            search.zero_grad()
            logits = _summed(bags, matrix) + bias
            fit = nn.functional.cross_entropy(logits, target, weight, reduction="sum")
            total = fit + matrix.square().sum() / (2 * strength)
            torch.autograd.backward(total)
            return total

        search.step(loss)  # type: ignore[no-untyped-call]
        with torch.no_grad():
            self.weight.zero_()
            self.weight[known] = matrix.to(self.weight.dtype)
            self.bias.copy_(bias)


def _summed(bags: tuple[Tensor, Tensor, Tensor], weight: Tensor) -> Tensor:
    buckets, values, starts = bags
    return nn.functional.embedding_bag(buckets, weight, starts, mode="sum", per_sample_weights=values)
