"""Elman's simple recurrent network (Elman 1990, "Finding structure in time", Cognitive Science 14)::

    h_t = tanh(W_hh h_{t−1} + W_hx u_t + b_h)
    y_t = W_yh h_t + b_y

The output function is the identity: what follows is a head, or the tanh of the next layer. The gradient through many
steps is a product of W_hh and slopes below 1, and vanishes (Bengio et al. 1994): a model to compare with.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from recur.models.interface import State, Steps
from recur.models.leaky import leaky
from recur.models.rows import RowLayer, after
from recur.models.stack import Stack
from recur.models.steps import keep_invalid, restart


class ElmanLayer(RowLayer):
    """State: ``h`` (B, D). W_hh begins orthogonal (Saxe et al. 2014, arXiv:1312.6120)."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.d_in, self.d_out = d_in, d_out
        self.w_in = nn.Parameter(nn.init.xavier_uniform_(torch.empty(d_out, d_in)))
        self.w = nn.Parameter(nn.init.orthogonal_(torch.empty(d_out, d_out)))
        self.bias = nn.Parameter(torch.zeros(d_out))
        self.out = nn.Linear(d_out, d_out)

    def init_state(self, batch: int) -> State:
        return {"h": self.w.new_zeros(batch, self.d_out)}

    def kernel(
        self, u: Tensor, state: State, elapsed: Tensor | None, lengths: Tensor | None
    ) -> tuple[Tensor, State]:
        h = leaky(u.transpose(0, 1), self.w_in, self.bias, self.w, None, state["h"])
        y = self.out(h).transpose(0, 1)
        return y, {"h": after(h.transpose(0, 1), state["h"], lengths)}

    def step(self, u_t: Tensor, state: State, steps: Steps | None = None) -> tuple[Tensor, State]:
        state = restart(steps, state, self.init_state(u_t.shape[0]))
        h = torch.tanh(state["h"] @ self.w.T + u_t @ self.w_in.T + self.bias)
        return keep_invalid(steps, self.out(h), {"h": h}, state)


class Elman(Stack):
    """Layers of Elman units. State: ``h`` (B, layers, D)."""

    def __init__(self, d_in: int, d_out: int, layers: int = 1, dropout: float = 0.0) -> None:
        super().__init__(ElmanLayer, d_in, d_out, layers, dropout)
