"""Price forecaster: a sequence model between an input projection and a head of quantiles.

Notation: B batch, T time, F features, D width, H horizons, Q = 19 quantile levels (5 %, 10 %, …, 95 %).

Everything is in units of the causal scale of its horizon, so that one network serves all markets. By default the
distribution is symmetric about zero: on hourly crypto a free median costs skill. Quantiles cannot cross, since
those above the median are cumulative sums of positive increments::

    q_{50+5k} = loc + exp(s) · Σ_{j≤k} softplus(a_j),   q_{50−5k} = loc − (the same)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from recur.models.interface import SequenceModel, State, Steps
from recur.models.registry import Core, table_core

LEVELS: tuple[float, ...] = tuple(round(0.05 * k, 2) for k in range(1, 20))
_HALF = 9  # quantile levels above the median
_NORMAL_UPPER = (0.1257, 0.2533, 0.3853, 0.5244, 0.6745, 0.8416, 1.0364, 1.2816, 1.6449)


@dataclass(frozen=True, slots=True, kw_only=True)
class ForecasterSpec:
    """Everything that is needed to build the network again; saved as JSON beside the weights."""

    model: str
    n_features: int
    n_symbols: int
    """Rows of the symbol embedding, 0 being 'any other symbol'."""
    horizons: tuple[int, ...]
    hidden: int
    layers: int
    embed: int
    dropout: float
    drift: bool
    """Whether quantiles are centred on the forecast mean instead of zero."""
    continuous: bool = False
    """Whether missing bars are skipped and the state moves by the elapsed time; else they are inputs like others."""
    sha256: str = ""
    """Of the file that a user's own ``model`` comes from; empty for a model of the table."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Outputs:
    """All in units of the causal scale: ``quantiles`` (B, T, H, Q), ``log_var`` and ``mean`` (B, T, H)."""

    quantiles: Tensor
    log_var: Tensor
    mean: Tensor


class Forecaster(nn.Module):
    """features (B, T, F) and symbol (B,) → :class:`Outputs` and the next state.

    ``core`` is the sequence model to build; without one it is that of the table that ``spec`` names. A spec alone
    never makes code of a user's own run.
    """

    chunk: int = 0
    """Bars per piece of time whose insides are computed again in the backward pass; 0 keeps everything."""

    def __init__(self, spec: ForecasterSpec, core: Core | None = None) -> None:
        super().__init__()
        self.spec = spec
        n_h = len(spec.horizons)
        self.embedding = nn.Embedding(spec.n_symbols, spec.embed)
        nn.init.normal_(self.embedding.weight, std=0.1)
        make = (core or table_core(spec.model)).make
        self.core: SequenceModel = make(spec.n_features + spec.embed, spec.hidden, spec.layers, spec.dropout)
        self.drop = nn.Dropout(spec.dropout)
        self.head = nn.Linear(spec.hidden, n_h * (_HALF + 2))
        self.mean_head = nn.Linear(spec.hidden, n_h)
        for layer in (self.head, self.mean_head):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        upper = torch.tensor((0.0, *_NORMAL_UPPER))
        self.register_buffer("increments", torch.log(torch.expm1(upper.diff())), persistent=False)
        self.increments: Tensor

    def init_state(self, batch: int) -> State:
        return self.core.init_state(batch)

    def steps(self, observed: Tensor, elapsed: Tensor) -> Steps | None:
        """Marks for the core from ``observed`` (B, T) and ``elapsed`` (B, T), bars since the last observed one.

        None for a model that takes missing bars as inputs, and where no bar is missing: the fast path.
        """
        if not self.spec.continuous or bool((observed & (elapsed == 1)).all()):
            return None
        return Steps(valid=observed, elapsed=elapsed)

    def inputs(self, x: Tensor, symbol: Tensor) -> Tensor:
        """What the core sees: (B, T, F + E)."""
        e = self.embedding(symbol)[:, None].expand(-1, x.shape[1], -1)  # (B, T, E)
        return torch.cat([x, e], dim=-1)

    def forward(
        self, x: Tensor, symbol: Tensor, state: State | None = None, steps: Steps | None = None
    ) -> tuple[Outputs, State]:
        """``steps`` are those of :meth:`steps`; at steps that are not valid the outputs mean nothing."""
        u = self.inputs(x, symbol)
        if self.chunk and torch.is_grad_enabled() and u.shape[1] > self.chunk:
            y, state = in_chunks(self.core, u, state, steps, self.chunk)
        else:
            y, state = self.core(u, state, steps)  # (B, T, D)
        return self._outputs(y), state

    def step(
        self, x_t: Tensor, symbol: Tensor, state: State, steps: Steps | None = None
    ) -> tuple[Outputs, State]:
        """One bar: x_t (B, F), marks (B,). The outputs keep a time dimension of length 1."""
        y, state = self.core.step(torch.cat([x_t, self.embedding(symbol)], dim=-1), state, steps)
        return self._outputs(y[:, None]), state

    def _outputs(self, y: Tensor) -> Outputs:
        y = self.drop(y)
        raw = self.head(y).unflatten(-1, (len(self.spec.horizons), _HALF + 2)).float()  # (B, T, H, 11)
        log_scale, log_var, shape = raw[..., :1], raw[..., 1], raw[..., 2:]
        upper = log_scale.clamp(-4, 4).exp() * nn.functional.softplus(self.increments + shape).cumsum(-1)
        # The mean is read off a detached state unless it moves the quantiles: direction is mostly noise and
        # must not bend the features that the width needs.
        mean = self.mean_head(y if self.spec.drift else y.detach()).float()  # (B, T, H)
        loc = mean[..., None] if self.spec.drift else torch.zeros_like(log_scale)
        quantiles = torch.cat([loc - upper.flip(-1), loc, loc + upper], dim=-1)  # (B, T, H, 19)
        return Outputs(quantiles, log_var.clamp(-8, 8), mean)


def in_chunks(
    core: SequenceModel, u: Tensor, state: State | None, steps: Steps | None, chunk: int
) -> tuple[Tensor, State]:
    """``core(u, state, steps)`` with the memory of one chunk: between chunks only the state is kept, the insides
    are computed a second time when their gradient is asked for (Chen et al. 2016, arXiv:1604.06174)."""
    state = core.init_state(u.shape[0]) if state is None else state
    run = cast(Callable[..., tuple[Tensor, State]], checkpoint)
    out = []
    for low in range(0, u.shape[1], chunk):
        high = min(low + chunk, u.shape[1])
        marks = None if steps is None else steps.slice(low, high)
        y, state = run(core, u[:, low:high], state, marks, use_reentrant=False)
        out.append(y)
    return torch.cat(out, dim=1), state


def forecast_loss(out: Outputs, target: Tensor, mask: Tensor) -> Tensor:
    """Mean pinball loss over levels, plus a twentieth of the Gaussian likelihood of the variance, plus the mean's error.

    ``target`` and ``mask`` (B, T, H), target in units of the causal scale. Koenker & Bassett (1978) for the pinball.
    """
    target = torch.where(mask, target, torch.zeros_like(target))
    pinball = pinball_errors(out, target)
    bounded = target.clamp(-8, 8)
    nll = 0.5 * (out.log_var + bounded.square() * (-out.log_var).exp())
    mean = 0.1 * (bounded.clamp(-4, 4) - out.mean).square()
    per_step = pinball + 0.05 * nll + mean
    return (per_step * mask).sum() / mask.sum().clamp(min=1)


def pinball_errors(out: Outputs, target: Tensor) -> Tensor:
    """(B, T, H) pinball loss of each forecast, mean over the quantile levels."""
    levels = torch.tensor(LEVELS, device=target.device)
    error = target[..., None] - out.quantiles
    return torch.maximum(levels * error, (levels - 1) * error).mean(-1)


def pinball_loss(out: Outputs, target: Tensor, mask: Tensor) -> Tensor:
    """(H,) mean pinball loss of each horizon: what early stopping watches."""
    pinball = pinball_errors(out, torch.where(mask, target, torch.zeros_like(target)))
    dims = tuple(range(pinball.ndim - 1))
    return (pinball * mask).sum(dims) / mask.sum(dims).clamp(min=1)
