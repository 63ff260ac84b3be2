"""Diagonal linear state space models, discretised exactly (S4D: Gu et al. 2022, arXiv:2206.11893; S5: Smith et al.
2023, arXiv:2208.04933)::

    dx/dt = λ ∘ x + B u,     y = Re(C x) + D u
    x_t = e^(λ Δ e_t) ∘ x_{t−1} + ((e^(λ Δ e_t) − 1) / λ) ∘ B u_t

Δ is learnt per state, e_t is the elapsed time in bars of each series (1 where it is not given), and u is held over that
time, so the second line is the solution of the first and not an approximation (zero-order hold). What follows is the
block of S5: v = GELU(y), out = v ∘ σ(W v), and where the widths allow it a layer norm before and the input added after.

:class:`DiagonalSSM` has complex λ = −e^a + iω from S4D-Lin (λ_n = −½ + iπn), :class:`RealSSM` real ones from S4D-Real
(λ_n = −(n + 1)).
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear

from recur.models.interface import State, Steps
from recur.models.scan import linear_scan, mark_scan
from recur.models.stack import Stack
from recur.models.steps import keep_invalid, restart

_DT = (1e-3, 1e-1)  # range of Δ at the start, in bars: memories of 20 to 2,000 bars at a real part of −½


class SSMLayer(nn.Module):
    """As many states as outputs. State: ``x`` (B, N), or (B, N, 2) with real and imaginary parts."""

    def __init__(self, d_in: int, d_out: int, complex_states: bool) -> None:
        super().__init__()
        self.d_in, self.d_out, self.parts = d_in, d_out, 2 if complex_states else 1
        n = torch.arange(d_out)
        self.log_decay = nn.Parameter(torch.full((d_out,), 0.5).log() if complex_states else (n + 1.0).log())
        self.frequency = nn.Parameter(math.pi * n) if complex_states else None
        self.log_dt = nn.Parameter(torch.empty(d_out).uniform_(math.log(_DT[0]), math.log(_DT[1])))
        self.b = nn.Linear(d_in, self.parts * d_out, bias=False)
        self.c = nn.Linear(self.parts * d_out, d_out, bias=False)
        self.d = nn.Linear(d_in, d_out)
        self.gate = nn.Linear(d_out, d_out)
        for w in (self.b.weight, self.c.weight, self.d.weight):
            nn.init.normal_(w, std=1 / math.sqrt(w.shape[1]))
        self.residual = d_in == d_out
        self.norm = nn.LayerNorm(d_in) if self.residual else nn.Identity()

    def poles(self) -> Tensor:
        """λ (N,), real or complex, with a negative real part; in double precision."""
        decay = -self.log_decay.double().exp()
        return decay if self.frequency is None else torch.complex(decay, self.frequency.double())

    def discrete(self, elapsed: Tensor | None) -> tuple[Tensor, Tensor]:
        """e^(λΔe) and (e^(λΔe) − 1)/λ for elapsed (…, 1) in bars: (…, N).

        For bars of equal length computed in double precision: λΔ is an angle of up to 20, and what single precision
        loses of it per bar would add up over the thousands of bars of a memory.
        """
        poles = self.poles()
        z = poles * self.log_dt.double().exp()
        dtype = self.log_dt.dtype.to_complex() if z.is_complex() else self.log_dt.dtype
        if elapsed is not None:
            poles, z = poles.to(dtype), z.to(dtype) * elapsed
        return torch.exp(z).to(dtype), (torch.expm1(z) / poles).to(dtype)

    def init_state(self, batch: int) -> State:
        shape = (batch, self.d_out, 2)[: 1 + self.parts]
        return {"x": self.log_dt.new_zeros(shape)}

    def forward(
        self, u: Tensor, state: State | None = None, steps: Steps | None = None
    ) -> tuple[Tensor, State]:
        x0 = (self.init_state(u.shape[0]) if state is None else state)["x"]
        valid = None if steps is None else steps.valid
        elapsed = None if steps is None else steps.elapsed
        with torch.autocast(u.device.type, enabled=False):
            u = u.to(self.log_dt.dtype)
            if valid is not None:  # what stands at a missing bar may be anything, NaN too
                u = torch.where(valid[..., None], u, torch.zeros_like(u))
            v = self.norm(u)
            first = v.transpose(0, 1)
            if elapsed is None:
                a, hold = self.discrete(None)
                weight = self._fold(self.b.weight, hold)
                a, b = a[None, None], self._states(linear(first, weight))
            else:
                a, hold = self.discrete(elapsed.T[..., None].to(u.dtype))
                b = hold * self._states(self.b(first))
            a, b = mark_scan(a, b, steps)
            x = self._flat(linear_scan(a, b, self._states(x0.flatten(1))))  # (T, B, parts · N)
            y = self._out(self.c(x).transpose(0, 1), v, u)
        end = {"x": x[-1].view_as(x0)}
        return (y if valid is None else torch.where(valid[..., None], y, torch.zeros_like(y))), end

    def step(self, u_t: Tensor, state: State, steps: Steps | None = None) -> tuple[Tensor, State]:
        state = restart(steps, state, self.init_state(u_t.shape[0]))
        elapsed = None if steps is None or steps.elapsed is None else steps.elapsed[:, None].to(u_t.dtype)
        a, hold = self.discrete(elapsed)
        v = self.norm(u_t)
        x = self._flat(a * self._states(state["x"].flatten(1)) + hold * self._states(self.b(v)))
        y = self._out(self.c(x), v, u_t)
        return keep_invalid(steps, y, {"x": x.view_as(state["x"])}, state)

    def _out(self, y: Tensor, v: Tensor, u: Tensor) -> Tensor:
        y = gelu(y + self.d(v))
        y = y * torch.sigmoid(self.gate(y))
        return u + y if self.residual else y

    def _states(self, flat: Tensor) -> Tensor:
        """(…, parts · N), the parts of a state beside each other, as numbers (…, N)."""
        return flat if self.parts == 1 else torch.view_as_complex(flat.reshape(*flat.shape[:-1], -1, 2))

    def _flat(self, x: Tensor) -> Tensor:
        return x if self.parts == 1 else torch.view_as_real(x).flatten(-2)

    def _fold(self, weight: Tensor, hold: Tensor) -> Tensor:
        """The rows (parts · N, F) of B times ``hold`` (N,): a constant step needs no product per bar."""
        if self.parts == 1:
            return weight * hold[:, None]
        pairs = weight.view(-1, 2, weight.shape[1]).transpose(1, 2)
        number = torch.view_as_complex(pairs.contiguous())  # (N, F)
        return torch.view_as_real(number * hold[:, None]).transpose(1, 2).flatten(0, 1)


class DiagonalSSM(Stack):
    """Layers of complex diagonal state spaces. State: ``x`` (B, layers, D, 2)."""

    continuous = True

    def __init__(self, d_in: int, d_out: int, layers: int = 1, dropout: float = 0.0) -> None:
        super().__init__(partial(SSMLayer, complex_states=True), d_in, d_out, layers, dropout)


class RealSSM(Stack):
    """Layers of real diagonal state spaces. State: ``x`` (B, layers, D)."""

    continuous = True

    def __init__(self, d_in: int, d_out: int, layers: int = 1, dropout: float = 0.0) -> None:
        super().__init__(partial(SSMLayer, complex_states=False), d_in, d_out, layers, dropout)
