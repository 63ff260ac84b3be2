"""Continuous-time recurrent network (Funahashi & Nakamura 1993, Neural Networks 6), one time constant per unit::

    τ ∘ dx/dt = −x + tanh(W x + U u + b),      y = x

The input of a bar acts over the whole time since the bar before (``Steps.elapsed`` in bars, of each series its own; 1
where it is not given), so a gap lets the state relax for as long as the gap was. Three integrators:

* :class:`CTRNN`, exponential Euler: the leak exactly, tanh held over the step (Hochbruck & Ostermann 2010, eq. 2.3)::

      x' = e^(−Δt/τ) ∘ x + (1 − e^(−Δt/τ)) ∘ tanh(W x + U u + b)

  One evaluation whatever Δt is, and stable for all of them: the one to use.
* :class:`CTRNNEuler`, x' = x + Δt f(x), and :class:`CTRNNRK4`, the classical Runge–Kutta method of order four. Both
  divide Δt into equal steps of at most one bar; τ is above one bar, so neither can become unstable, and a gap costs as
  many steps as it has bars.
"""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from recur.models.initial import memory_bias
from recur.models.interface import State, Steps
from recur.models.leaky import leaky
from recur.models.rows import RowLayer, after
from recur.models.stack import Stack
from recur.models.steps import keep_invalid, restart


class _Layer(RowLayer):
    """State: ``x`` (B, D). τ = 1 + e^s bars, spread over 4 to 500 at the start."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.d_in, self.d_out = d_in, d_out
        self.w_in = nn.Parameter(nn.init.xavier_uniform_(torch.empty(d_out, d_in)))
        self.w = nn.Parameter(nn.init.orthogonal_(torch.empty(d_out, d_out)))
        self.bias = nn.Parameter(torch.zeros(d_out))
        self.log_tau = nn.Parameter(memory_bias(d_out))
        """s, the logarithm of τ − 1."""

    @property
    def tau(self) -> Tensor:
        """(D,) in bars."""
        return 1 + self.log_tau.exp()

    def init_state(self, batch: int) -> State:
        return {"x": self.w.new_zeros(batch, self.d_out)}

    @abstractmethod
    def run(self, u: Tensor, x0: Tensor, elapsed: Tensor | None) -> Tensor:
        """u (T, B, F), elapsed (T, B) → x (T, B, D)."""

    @abstractmethod
    def advance(self, x: Tensor, drive: Tensor, elapsed: Tensor) -> Tensor:
        """x (B, D) after ``elapsed`` (B, 1) bars under ``drive`` = U u + b (B, D)."""

    def kernel(
        self, u: Tensor, state: State, elapsed: Tensor | None, lengths: Tensor | None
    ) -> tuple[Tensor, State]:
        elapsed = None if elapsed is None else elapsed.to(self.w.dtype).T
        y = self.run(u.transpose(0, 1), state["x"], elapsed).transpose(0, 1)
        return y, {"x": after(y, state["x"], lengths)}

    def step(self, u_t: Tensor, state: State, steps: Steps | None = None) -> tuple[Tensor, State]:
        state = restart(steps, state, self.init_state(u_t.shape[0]))
        if steps is None or steps.elapsed is None:
            elapsed = u_t.new_ones(u_t.shape[0], 1)
        else:
            elapsed = steps.elapsed[:, None].to(u_t.dtype)
        x = self.advance(state["x"], linear(u_t, self.w_in, self.bias), elapsed)
        return keep_invalid(steps, x, {"x": x}, state)

    def slope(self, x: Tensor, drive: Tensor) -> Tensor:
        """dx/dt, in units per bar."""
        return (torch.tanh(linear(x, self.w) + drive) - x) / self.tau


class ExponentialLayer(_Layer):
    def run(self, u: Tensor, x0: Tensor, elapsed: Tensor | None) -> Tensor:
        time = self.w.new_ones(1, 1, 1) if elapsed is None else elapsed[..., None]
        return leaky(u, self.w_in, self.bias, self.w, torch.exp(-time / self.tau), x0)

    def advance(self, x: Tensor, drive: Tensor, elapsed: Tensor) -> Tensor:
        decay = torch.exp(-elapsed / self.tau)
        return decay * x + (1 - decay) * torch.tanh(linear(x, self.w) + drive)


def substeps(elapsed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Steps of at most one bar for elapsed (T, B): index of the bar (S,), length (S, B), last substep of each bar (T,).

    A series that needs fewer substeps than its neighbours in the batch stands still in the others, so what is
    computed for it does not depend on them.
    """
    parts = elapsed.ceil().clamp(min=1)  # (T, B)
    most = parts.amax(1).long()  # (T,)
    bar = torch.repeat_interleave(torch.arange(len(most), device=elapsed.device), most)
    ends = most.cumsum(0) - 1
    nth = torch.arange(len(bar), device=elapsed.device) - (ends - most + 1)[bar]
    length = torch.where(nth[:, None] < parts[bar], (elapsed / parts)[bar], torch.zeros_like(elapsed[bar]))
    return bar, length, ends


class EulerLayer(_Layer):
    def run(self, u: Tensor, x0: Tensor, elapsed: Tensor | None) -> Tensor:
        if elapsed is None:
            return leaky(u, self.w_in, self.bias, self.w, (1 - 1 / self.tau)[None, None], x0)
        bar, length, ends = substeps(elapsed)
        return leaky(u[bar], self.w_in, self.bias, self.w, 1 - length[..., None] / self.tau, x0)[ends]

    def advance(self, x: Tensor, drive: Tensor, elapsed: Tensor) -> Tensor:
        parts = elapsed.ceil().clamp(min=1)
        for k in range(math.ceil(float(parts.max()))):
            x = torch.where(k < parts, x + elapsed / parts * self.slope(x, drive), x)
        return x


class RungeKuttaLayer(_Layer):
    def run(self, u: Tensor, x0: Tensor, elapsed: Tensor | None) -> Tensor:
        drive = linear(u, self.w_in, self.bias)
        bar, length, ends = substeps(drive.new_ones(drive.shape[:2]) if elapsed is None else elapsed)
        x, out = x0, []
        for pushed, time in zip(drive[bar].unbind(0), length[..., None].unbind(0), strict=True):
            x = self._rk4(x, pushed, time)
            out.append(x)
        return torch.stack(out)[ends]

    def advance(self, x: Tensor, drive: Tensor, elapsed: Tensor) -> Tensor:
        parts = elapsed.ceil().clamp(min=1)
        for k in range(math.ceil(float(parts.max()))):
            x = torch.where(k < parts, self._rk4(x, drive, elapsed / parts), x)
        return x

    def _rk4(self, x: Tensor, drive: Tensor, time: Tensor) -> Tensor:
        k1 = self.slope(x, drive)
        k2 = self.slope(x + time / 2 * k1, drive)
        k3 = self.slope(x + time / 2 * k2, drive)
        k4 = self.slope(x + time * k3, drive)
        return x + time / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


class CTRNN(Stack):
    """Layers of continuous-time units, exponential Euler. State: ``x`` (B, layers, D)."""

    continuous = True

    def __init__(self, d_in: int, d_out: int, layers: int = 1, dropout: float = 0.0) -> None:
        super().__init__(ExponentialLayer, d_in, d_out, layers, dropout)


class CTRNNEuler(Stack):
    """The same by explicit Euler steps."""

    continuous = True

    def __init__(self, d_in: int, d_out: int, layers: int = 1, dropout: float = 0.0) -> None:
        super().__init__(EulerLayer, d_in, d_out, layers, dropout)


class CTRNNRK4(Stack):
    """The same by Runge–Kutta steps of order four."""

    continuous = True

    def __init__(self, d_in: int, d_out: int, layers: int = 1, dropout: float = 0.0) -> None:
        super().__init__(RungeKuttaLayer, d_in, d_out, layers, dropout)
