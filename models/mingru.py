"""minGRU and minLSTM (Feng et al. 2024, arXiv:2410.01201, sections 3.1 and 3.2): gates that see the input only.

minGRU::

    z = σ(W_z u + b_z),   h̃ = W_h u + b_h
    h' = (1 − z) ∘ h + z ∘ h̃

minLSTM, with the two gates normalised to sum to one::

    f = σ(W_f u + b_f),   i = σ(W_i u + b_i),   f* = f / (f + i)
    h' = f* ∘ h + (1 − f*) ∘ h̃

Both are linear in h, so a whole sequence is a scan. The paper runs it on logarithms, which needs a positive h̃ and drifts
with the length in single precision; here it runs as it stands (:mod:`recur.models.scan`), h̃ may have any sign, and a
state is carried as it is.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from recur.models.initial import memory_bias
from recur.models.interface import State, Steps
from recur.models.scan import linear_scan, mark_scan
from recur.models.stack import Stack
from recur.models.steps import keep_invalid, restart


class _ScanLayer(nn.Module):
    """h' = a(u) ∘ h + (1 − a(u)) ∘ h̃(u). State: ``h`` (B, D)."""

    parts: int

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.d_in, self.d_out = d_in, d_out
        self.linear = nn.Linear(d_in, self.parts * d_out)
        for part in self.linear.weight.data.chunk(self.parts):
            nn.init.xavier_uniform_(part)
        nn.init.zeros_(self.linear.bias)

    @abstractmethod
    def gates(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """u (…, F) → a and (1 − a) ∘ h̃, each (…, D)."""

    def init_state(self, batch: int) -> State:
        return {"h": self.linear.weight.new_zeros(batch, self.d_out)}

    def forward(
        self, u: Tensor, state: State | None = None, steps: Steps | None = None
    ) -> tuple[Tensor, State]:
        h0 = (self.init_state(u.shape[0]) if state is None else state)["h"]
        valid = None if steps is None else steps.valid
        if valid is not None:  # what stands at a missing bar may be anything, NaN too
            u = torch.where(valid[..., None], u, torch.zeros_like(u))
        a, b = mark_scan(*self.gates(u.transpose(0, 1)), steps)
        y = linear_scan(a, b, h0).transpose(0, 1)
        state = {"h": y[:, -1]}
        return (y if valid is None else torch.where(valid[..., None], y, torch.zeros_like(y))), state

    def step(self, u_t: Tensor, state: State, steps: Steps | None = None) -> tuple[Tensor, State]:
        state = restart(steps, state, self.init_state(u_t.shape[0]))
        a, b = self.gates(u_t)
        h = a * state["h"] + b
        return keep_invalid(steps, h, {"h": h}, state)


class MinGRULayer(_ScanLayer):
    parts = 2

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__(d_in, d_out)
        self.linear.bias.data[:d_out] = -memory_bias(d_out)

    def gates(self, u: Tensor) -> tuple[Tensor, Tensor]:
        k, candidate = self.linear(u).chunk(2, dim=-1)
        return torch.sigmoid(-k), torch.sigmoid(k) * candidate


class MinLSTMLayer(_ScanLayer):
    parts = 3

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__(d_in, d_out)
        bias = memory_bias(d_out)
        self.linear.bias.data[: 2 * d_out] = torch.cat([bias, -bias])  # f* = σ(bias)

    def gates(self, u: Tensor) -> tuple[Tensor, Tensor]:
        f, i, candidate = self.linear(u).chunk(3, dim=-1)
        ratio = logsigmoid(f) - logsigmoid(i)  # log(f / i), finite also where both gates are 0
        return torch.sigmoid(ratio), torch.sigmoid(-ratio) * candidate


class MinGRU(Stack):
    """Layers of minGRU. State: ``h`` (B, layers, D)."""

    def __init__(self, d_in: int, d_out: int, layers: int = 1, dropout: float = 0.0) -> None:
        super().__init__(MinGRULayer, d_in, d_out, layers, dropout)


class MinLSTM(Stack):
    """Layers of minLSTM. State: ``h`` (B, layers, D)."""

    def __init__(self, d_in: int, d_out: int, layers: int = 1, dropout: float = 0.0) -> None:
        super().__init__(MinLSTMLayer, d_in, d_out, layers, dropout)
