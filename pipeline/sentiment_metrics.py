"""How good a classifier of three classes is, and whether its probabilities mean what they say."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from recur.pipeline.labelled import CLASSES

BINS = 15
IntArray = NDArray[np.int64]
FloatArray = NDArray[np.floating[Any]]


def evaluate(probability: FloatArray, label: IntArray) -> dict[str, Any]:
    """Metrics of probability (N, 3) against label (N,).

    Rows without a probability (texts in which nothing could be read) count as wrong. ``macro_f1`` averages over the
    classes that the labels contain; ``ece`` is the expected calibration error of the most probable class over 15 even
    bins (Guo et al. 2017, arXiv:1706.04599, eq. 3); ``auc`` ranks positive against negative by the difference of
    their probabilities and is None where either is absent.
    """
    read = np.asarray(np.isfinite(probability).all(axis=1))
    guess = np.where(read, np.argmax(np.where(read[:, None], probability, 0.0), axis=1), -1)
    confusion = np.zeros((3, 3), dtype=int)
    np.add.at(confusion, (label[read], guess[read]), 1)
    per_class, f1s, weights = {}, [], []
    for k, name in enumerate(CLASSES):
        hits, given, said = int(confusion[k, k]), int((label == k).sum()), int((guess == k).sum())
        precision, recall = hits / said if said else 0.0, hits / given if given else 0.0
        f1 = 2 * precision * recall / (precision + recall) if hits else 0.0
        per_class[name] = {"precision": precision, "recall": recall, "f1": f1, "n": given}
        if given:
            f1s.append(f1)
            weights.append(given)
    return {
        "accuracy": float((guess == label).mean()),
        "macro_f1": float(np.mean(f1s)),
        "weighted_f1": float(np.average(f1s, weights=weights)),
        "per_class": per_class,
        "confusion": confusion.tolist(),
        "ece": calibration_error(probability[read], label[read]) if read.any() else None,
        "auc": auc(probability[read, 2] - probability[read, 0], label[read]),
        "n": len(label),
    }


def calibration_error(probability: FloatArray, label: IntArray, bins: int = BINS) -> float:
    """Mean distance between confidence and accuracy over even bins of confidence, weighted by their texts."""
    confidence, right = probability.max(axis=1), probability.argmax(axis=1) == label
    which = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = [
        abs(right[which == b].mean() - confidence[which == b].mean()) * (which == b).mean()
        for b in np.unique(which)
    ]
    return float(sum(gaps))


def auc(score: FloatArray, label: IntArray) -> float | None:
    """Chance that a positive text scores above a negative one (ties count half); neutral ones are left out."""
    from scipy.stats import rankdata

    chosen = label != 1
    positive = label[chosen] == 2
    n, m = int(positive.sum()), int((~positive).sum())
    if not n or not m:
        return None
    ranks = rankdata(score[chosen])
    return float((ranks[positive].sum() - n * (n + 1) / 2) / (n * m))


def cross_entropy(logits: FloatArray, label: IntArray) -> float:
    """Mean of −log softmax(logits) (N, 3) at the labels, in nats."""
    z = logits.astype(np.float64)
    z = z - z.max(axis=1, keepdims=True)
    return float((np.log(np.exp(z).sum(axis=1)) - z[np.arange(len(label)), label]).mean())


def fit_temperature(logits: FloatArray, label: IntArray) -> float:
    """The T in (0.2, 5) whose softmax(logits / T) has the least cross-entropy (Guo et al. 2017, §4.2)."""
    from scipy.optimize import minimize_scalar

    found = minimize_scalar(
        lambda log_t: cross_entropy(logits / np.exp(log_t), label),
        bounds=(np.log(0.2), np.log(5.0)),
        method="bounded",
    )
    return float(np.exp(found.x))
