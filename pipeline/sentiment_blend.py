"""Two readers, one answer: the probabilities of the recurrent network and those of the n-grams, mixed.

    p = (1 − share) · softmax(network / T) + share · softmax(n-grams / U)

A linear opinion pool (Genest & Zidek 1986, Statistical Science 1(1)): the two err on different texts. Both temperatures
and the share come from texts that neither has learned from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar

from recur.models.text.ngrams import NGrams
from recur.pipeline.sentiment_fit import FloatArray, class_weights
from recur.pipeline.sentiment_metrics import fit_temperature
from recur.pipeline.text import EOS

STRENGTH = 10.0
"""How little the weights of n-grams are held back (the C of scikit-learn)."""


def _framed(texts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Each text between two end marks, as the network reads it: what begins or ends a text is an n-gram too."""
    return [[EOS, *text, EOS] for text in texts]


def fit_ngrams(texts: Sequence[Sequence[int]], labels: NDArray[np.int64], classes: int) -> NGrams:
    """Learned from texts as token numbers, all classes weighing the same."""
    grams = NGrams(classes)
    grams.fit(_framed(texts), labels, class_weights(labels, classes, 1.0), STRENGTH)
    return grams


def ngram_logits(grams: NGrams, texts: Sequence[Sequence[int]]) -> FloatArray:
    """(N, classes) of texts as token numbers."""
    with torch.inference_mode():
        return grams(grams.bags(_framed(texts))).numpy()  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True)
class Blend:
    """The two temperatures and the n-grams' share, 0 to 1."""

    temperature: float
    ngram_temperature: float
    share: float

    def __call__(self, network: FloatArray, ngrams: FloatArray) -> FloatArray:
        """Logits (N, classes) of both → probabilities (N, classes); NaN where either could not read."""
        one = torch.from_numpy(network / np.float32(self.temperature)).softmax(1)
        two = torch.from_numpy(ngrams / np.float32(self.ngram_temperature)).softmax(1)
        return torch.lerp(one, two, self.share).numpy()


def spread(logits: FloatArray) -> float:
    """Mean over texts of the standard deviation over classes, without texts that could not be read."""
    return float(np.nanmean(logits.std(axis=1)))


def fit_blend(network: FloatArray, ngrams: FloatArray, label: NDArray[np.int64]) -> Blend:
    """Each temperature by itself, then the share, with the least cross-entropy of logits (N, classes) at label (N,)."""
    one, two = fit_temperature(network, label), fit_temperature(ngrams, label)
    rows = np.arange(len(label))
    ends = [Blend(one, two, share)(network, ngrams)[rows, label].astype(np.float64) for share in (0.0, 1.0)]
    found = minimize_scalar(
        lambda share: -np.log((1 - share) * ends[0] + share * ends[1] + 1e-12).mean(),
        bounds=(0.0, 1.0),
        method="bounded",
    )
    return Blend(one, two, float(found.x))
