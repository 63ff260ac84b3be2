"""Fine-tuning: from a pretrained encoder and labelled texts to a classifier.

After Howard & Ruder 2018 (arXiv:1801.06146): deeper layers learn more slowly (discriminative rates), and with
``unfreeze`` > 0 the head learns first and one more layer joins every so many epochs (gradual unfreezing). Besides: label
smoothing, class weights, and the average of the weights over the second half of the way (Izmailov et al. 2018,
arXiv:1803.05407).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from recur.models.text.classifier import TextClassifier
from recur.models.text.encoder import Drops
from recur.pipeline.sentiment_language import one_cycle
from recur.pipeline.sentiment_metrics import cross_entropy, fit_temperature
from recur.pipeline.text import EOS, PAD

FloatArray = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class FinePlan:
    """How to fine-tune. ``decay`` divides the rate from one layer to the next deeper one.

    ``unfreeze`` is 0: all layers learn from the first epoch (docs/sentiment.md tells why).
    """

    epochs: int = 6
    batch: int = 32
    lr: float = 2e-3
    decay: float = 1.1
    drops: Drops = field(default_factory=lambda: Drops(0.05, 0.2, 0.2, 0.0, 0.2))
    head_drop: float = 0.3
    smoothing: float = 0.1
    class_power: float = 0.5
    unfreeze: int = 0
    weight_decay: float = 0.02
    clip: float = 1.0
    patience: int = 3
    seed: int = 0


def batches(
    texts: Sequence[Sequence[int]], size: int, rng: np.random.Generator | None
) -> Iterator[NDArray[np.int64]]:
    """Rows of each batch: of similar length, in a random order when ``rng`` is given, none of them empty."""
    lengths = np.array([len(text) for text in texts])
    noise = rng.uniform(0.85, 1.15, len(texts)) if rng is not None else np.ones(len(texts))
    order = np.argsort(-lengths * noise, kind="stable")
    order = order[lengths[order] > 0]
    groups = [order[at : at + size] for at in range(0, len(order), size)]
    for k in rng.permutation(len(groups)) if rng is not None else range(len(groups)):
        yield groups[k]


def padded(
    texts: Sequence[Sequence[int]], rows: NDArray[np.int64]
) -> tuple[Tensor, Tensor, NDArray[np.int64]]:
    """(tokens, lengths, rows) of a batch, longest text first, each between two end marks, as in the corpus.

    Its breadth is a multiple of eight: kernels are made for a shape and kept, so there had better be few shapes.
    """
    rows = rows[np.argsort([-len(texts[i]) for i in rows], kind="stable")]
    lengths = torch.tensor([len(texts[i]) + 2 for i in rows])
    breadth = -(-int(lengths[0]) // 8) * 8
    tokens = torch.full((len(rows), breadth), PAD, dtype=torch.long)
    for k, i in enumerate(rows):
        tokens[k, : len(texts[i]) + 2] = torch.tensor([EOS, *texts[i], EOS])
    return tokens, lengths, rows


def logits_of(net: TextClassifier, texts: Sequence[Sequence[int]], batch_tokens: int = 8192) -> FloatArray:
    """(N, classes) of texts as token numbers, in batches of similar length; NaN for a text without tokens.

    Texts that are the same to the network are read once.
    """
    places: dict[tuple[int, ...], list[int]] = {}
    for i, text in enumerate(texts):
        if text:
            places.setdefault(tuple(text), []).append(i)
    out = np.full((len(texts), net.out.out_features), np.nan, dtype=np.float32)
    order = sorted(places, key=len, reverse=True)
    net.eval()
    with torch.inference_mode():
        at = 0
        while at < len(order):
            part = order[at : at + max(1, min(256, batch_tokens // len(order[at])))]
            tokens, lengths, rows = padded(part, np.arange(len(part)))
            for row, logits in zip(rows, net(tokens, lengths).numpy(), strict=True):
                out[places[part[row]]] = logits
            at += len(part)
    return out


def layer_groups(net: TextClassifier) -> list[list[nn.Parameter]]:
    """Parameters from the head down to the embeddings, in the order in which they are unfrozen."""
    encoder = net.encoder
    head = [p for name, p in net.named_parameters() if not name.startswith("encoder.")]
    groups = [head]
    for layer in reversed(range(encoder.spec.layers)):
        groups.append([p for way in (False, True) for p in encoder.direction(way).cells[layer].parameters()])
    return [*groups, list(encoder.embedding.parameters())]


def class_weights(labels: NDArray[np.int64], classes: int, power: float) -> Tensor:
    """Weights ∝ frequency^-power whose mean over the texts is 1."""
    share = np.bincount(labels, minlength=classes) / len(labels)
    weight = np.where(share > 0, np.maximum(share, 1e-9) ** -power, 0.0)
    return torch.tensor(weight / (weight * share).sum(), dtype=torch.float32)


def fine_tune(
    net: TextClassifier,
    texts: Sequence[Sequence[int]],
    labels: NDArray[np.int64],
    plan: FinePlan,
    on_epoch: Callable[[int, TextClassifier], bool] = lambda epoch, net: False,
) -> None:
    """Train ``net`` in place and leave it with the averaged weights.

    ``on_epoch`` hears (epoch, the network as it would be left now) and stops the training by returning True.
    """
    torch.manual_seed(plan.seed)
    rng = np.random.default_rng((plan.seed, 3))
    groups = layer_groups(net)
    rates = [plan.lr / plan.decay**k for k in range(len(groups))]
    optimiser = torch.optim.AdamW(
        [{"params": g, "lr": r} for g, r in zip(groups, rates, strict=True)],
        betas=(0.9, 0.99), weight_decay=plan.weight_decay,
    )  # fmt: skip
    weight = class_weights(labels, net.out.out_features, plan.class_power)
    net.encoder.regularise(plan.drops, plan.seed)
    net.drop = plan.head_drop
    total = plan.epochs * len(list(batches(texts, plan.batch, None)))
    average = _Average(net)
    step = 0
    for epoch in range(plan.epochs):
        for k, group in enumerate(groups):
            for parameter in group:
                parameter.requires_grad_(plan.unfreeze == 0 or k <= epoch // plan.unfreeze)
        net.train()
        for rows in batches(texts, plan.batch, rng):
            tokens, lengths, rows = padded(texts, rows)
            loss = nn.functional.cross_entropy(
                net(tokens, lengths), torch.from_numpy(labels[rows]), weight, label_smoothing=plan.smoothing
            )
            optimiser.zero_grad()
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(net.parameters(), plan.clip)
            for options, rate in zip(optimiser.param_groups, rates, strict=True):
                options["lr"] = rate * one_cycle(step, total)
            optimiser.step()
            step += 1
            if step > total // 2:
                average.add(net)
        if on_epoch(epoch, average.net if average.count else net):
            break
        net.train()
    if average.count:
        net.load_state_dict(average.net.state_dict())
    for parameter in net.parameters():
        parameter.requires_grad_(True)
    net.eval()


class _Average:
    """Running mean of the weights of a network."""

    def __init__(self, net: TextClassifier) -> None:
        self.net, self.count = copy.deepcopy(net).eval(), 0

    def add(self, net: TextClassifier) -> None:
        self.count += 1
        with torch.no_grad():
            for mine, other in zip(self.net.parameters(), net.parameters(), strict=True):
                mine.lerp_(other, 1 / self.count)


def early_stopped(
    net: TextClassifier,
    texts: Sequence[Sequence[int]],
    labels: NDArray[np.int64],
    check: tuple[Sequence[Sequence[int]], NDArray[np.int64]],
    plan: FinePlan,
    say: Callable[[int, int], None] = lambda done, total: None,
) -> list[float]:
    """Fine-tune with the epoch chosen that serves the texts of ``check`` best: see ``plan.patience``.

    What serves best has the least cross-entropy after its own temperature; returns that of every epoch.
    """
    best, best_epoch, best_weights = np.inf, -1, net.state_dict()
    values: list[float] = []

    def judge(epoch: int, current: TextClassifier) -> bool:
        nonlocal best, best_epoch, best_weights
        logits = logits_of(current, check[0])
        read = np.isfinite(logits).all(axis=1)
        t = fit_temperature(logits[read], check[1][read])
        value = cross_entropy(logits[read] / t, check[1][read])
        values.append(value)
        if value < best:
            best, best_epoch = value, epoch
            best_weights = copy.deepcopy(current.state_dict())
        say(epoch + 1, plan.epochs)
        return epoch - best_epoch >= plan.patience

    fine_tune(net, texts, labels, plan, judge)
    net.load_state_dict(best_weights)
    return values
