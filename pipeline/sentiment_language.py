"""Pretraining: the language model reads the corpus as two endless streams, forward and backward.

Truncated back-propagation through time: the corpus is one line of tokens with a mark after each text, folded into
parallel streams; each step reads one stretch and hands its state, cut from the gradient, to the
next. The two directions have separate recurrences and add up their gradients on the shared embeddings, so each
runs in a thread of its own. The randomness of a pass depends on (seed, pass) alone: a killed training goes on from
the last finished pass and ends as an undisturbed one would.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from recur.models.interface import State
from recur.models.text.encoder import Drops
from recur.models.text.language import LanguageModel, draw_sample
from recur.pipeline.text import EOS
from recur.vocabulary import DataMissing, RecurError


def bf16_pays() -> bool:
    """Whether this processor multiplies in bfloat16: there the recurrences take half the time (weights stay in 32 bits)."""
    able: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(able.get("avx512_bf16") or able.get("amx_bf16"))


@dataclass(frozen=True, slots=True)
class LanguagePlan:
    """How to pretrain: ``epochs`` passes over the corpus, ``streams`` side by side, ``stretch`` tokens a step."""

    epochs: int = 10
    streams: int = 48
    stretch: int = 32
    lr: float = 6e-3
    drops: Drops = field(default_factory=lambda: Drops(0.03, 0.075, 0.15, 0.15, 0.15))
    others: int = 300
    clip: float = 1.0
    seed: int = 0


@dataclass(slots=True)
class Progress:
    """Where a pretraining stands after a finished pass; ``moments`` are the optimiser's."""

    epoch: int = 0
    losses: list[float] = field(default_factory=list)
    moments: dict[str, Tensor] = field(default_factory=dict)


def as_line(texts: Sequence[Sequence[int]], rng: np.random.Generator) -> Tensor:
    """All texts in a random order with an end mark after each: (N,)."""
    order = rng.permutation(len(texts))
    return torch.tensor([token for i in order for token in (*texts[i], EOS)], dtype=torch.long)


def stretches(line: Tensor, streams: int, stretch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(inputs, targets), each (streams, stretch), in order; the rest of the line, less than a stretch, is left out.

    All have one length: the processor's kernels are made for a shape and kept, and many shapes fill the memory.
    """
    length = (len(line) - 1) // streams
    folded = torch.stack([line[k * length : (k + 1) * length + 1] for k in range(streams)])
    for at in range(0, length - stretch + 1, stretch):
        yield folded[:, at : at + stretch], folded[:, at + 1 : at + stretch + 1]


def one_cycle(step: int, total: int, warm: float = 0.1) -> float:
    """Share of the highest rate: up from a tenth over the first ``warm`` part, then down along a cosine to 0.01."""
    at = min(1.0, step / max(1, total))
    if at < warm:
        return 0.1 + 0.9 * at / warm
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (at - warm) / (1 - warm)))


def pretrain(
    model: LanguageModel,
    texts: Sequence[Sequence[int]],
    plan: LanguagePlan,
    done: Progress | None = None,
    on_epoch: Callable[[Progress], None] = lambda progress: None,
    on_step: Callable[[int, int, float], None] = lambda step, total, loss: None,
) -> list[float]:
    """Train ``model`` in place; returns the mean loss in nats per token of each pass.

    ``on_step`` hears (step, total, loss); ``on_epoch`` hears where the training stands, which ``done`` takes up again.
    Raises DataMissing for less than two tokens, RecurError when the loss is no longer finite.
    """
    done = done or Progress()
    whole = as_line(texts, np.random.default_rng(0))
    counts = torch.bincount(whole, minlength=model.encoder.spec.vocabulary).float()
    streams = max(1, min(plan.streams, len(whole) // (2 * plan.stretch)))
    per_epoch = (len(whole) - 1) // streams // plan.stretch
    if not per_epoch:
        raise DataMissing(
            f"{len(whole)} tokens are too few to pretrain on: expected {plan.stretch + 1}.",
            "Give files of texts with --pretrain.",
        )
    frequency = counts / counts.sum()
    if not model.bias.any():
        model.begin_with(counts)
    total = plan.epochs * per_epoch
    optimiser = torch.optim.AdamW(model.parameters(), lr=plan.lr, betas=(0.9, 0.99), weight_decay=0.01)
    _restore(optimiser, model, done.moments)
    model.train()
    with ThreadPoolExecutor(2) as pool:
        for epoch in range(done.epoch, plan.epochs):
            rng = np.random.default_rng((plan.seed, epoch, 1))
            line = as_line(texts, rng)
            draws = [torch.Generator().manual_seed(100_003 * plan.seed + 2 * epoch + k) for k in range(2)]
            model.encoder.regularise(plan.drops, 1009 * plan.seed + epoch)
            states: list[State | None] = [None, None]
            losses: list[float] = []
            for pair in zip(
                *(stretches(way, streams, plan.stretch) for way in (line, line.flip(0))), strict=True
            ):
                jobs = [
                    pool.submit(
                        _gradients, model, bool(k), pair[k], states[k], frequency, plan.others, draws[k]
                    )
                    for k in range(2)
                ]
                found = [job.result() for job in jobs]
                states = [after for _, _, after in found]
                step = epoch * per_epoch + len(losses)
                for group in optimiser.param_groups:
                    group["lr"] = plan.lr * one_cycle(step, total)
                losses.append(sum(value for value, _, _ in found) / 2)
                if not math.isfinite(losses[-1]):
                    raise RecurError(
                        f"The language model's loss became {losses[-1]} at step {step}.", "Lower its rate."
                    )
                _apply(model, optimiser, [grads for _, grads, _ in found], plan.clip)
                on_step(step + 1, total, losses[-1])
            done = Progress(epoch + 1, [*done.losses, float(np.mean(losses))], _moments(optimiser, model))
            on_epoch(done)
    model.eval()
    return done.losses


def _gradients(
    model: LanguageModel,
    backward: bool,
    piece: tuple[Tensor, Tensor],
    state: State | None,
    frequency: Tensor,
    others: int,
    rng: torch.Generator,
) -> tuple[float, dict[str, Tensor], State]:
    other_way = f"encoder.directions.{int(not backward)}."
    names, parameters = zip(
        *((name, p) for name, p in model.named_parameters() if not name.startswith(other_way)), strict=True
    )
    inputs, targets = piece
    sample, chance = draw_sample(targets, frequency, others, rng)
    hidden, after = model.hidden(inputs, backward, state)
    loss = model.loss(hidden, targets, backward, sample, chance)
    grads = torch.autograd.grad(loss, parameters)
    return loss.item(), dict(zip(names, grads, strict=True)), {k: v.detach() for k, v in after.items()}


def _apply(
    model: LanguageModel, optimiser: torch.optim.Optimizer, grads: Sequence[dict[str, Tensor]], clip: float
) -> None:
    for name, parameter in model.named_parameters():
        parts = [part[name] for part in grads if name in part]
        parameter.grad = parts[0] if len(parts) == 1 else parts[0] + parts[1]
    nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimiser.step()


def _moments(optimiser: torch.optim.Optimizer, model: LanguageModel) -> dict[str, Tensor]:
    names = {id(p): name for name, p in model.named_parameters()}
    return {
        f"{part}:{names[id(p)]}": torch.as_tensor(value)
        for p, slots in optimiser.state.items()
        for part, value in slots.items()
    }


def _restore(optimiser: torch.optim.Optimizer, model: LanguageModel, moments: dict[str, Tensor]) -> None:
    parameters = dict(model.named_parameters())
    for key, value in moments.items():
        part, name = key.split(":", 1)
        optimiser.state[parameters[name]][part] = value.clone()
