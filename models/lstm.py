"""Long short-term memory (Hochreiter & Schmidhuber 1997; forget gate: Gers, Schmidhuber & Cummins 2000)::

    i, f, o = σ(W_i u + U_i h + b_i), σ(W_f u + U_f h + b_f), σ(W_o u + U_o h + b_o)
    g  = tanh(W_g u + U_g h + b_g)
    c' = f ∘ c + i ∘ g
    h' = o ∘ tanh(c')

Whole sequences run in torch's LSTM kernel (oneDNN on a CPU, cuDNN on a GPU), one bar by these equations.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from recur.models.initial import memory_bias
from recur.models.interface import State, Steps
from recur.models.rows import RowLayer, after
from recur.models.stack import Stack
from recur.models.steps import keep_invalid, restart

_SURE = 200.0  # σ(±200) is 1 and 0 to the last bit of a double


class LSTMLayer(RowLayer):
    """State: ``h`` and ``c`` (B, D). Weights as in ``torch.nn.LSTM``, gates in the order i, f, g, o.

    Recurrent weights begin orthogonal per gate; forget biases spread upwards from 1 over memories of 4 to 500 bars
    (:func:`memory_bias`), and the input-gate bias is the negative, so that slow units take in slowly.
    """

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.d_in, self.d_out = d_in, d_out
        self.rnn = nn.LSTM(d_in, d_out, batch_first=True)
        w, u, b, c = self.weights()
        with torch.no_grad():
            for gate in u.chunk(4):
                nn.init.orthogonal_(gate)
            for gate in w.chunk(4):
                nn.init.xavier_uniform_(gate)
            forget = memory_bias(d_out)
            b.copy_(torch.cat([-forget, forget, torch.zeros(2 * d_out)]))
            c.zero_()

    def weights(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(W (4D, F), U (4D, D), b (4D,), c (4D,)); the biases are added."""
        w, u, b, c = (getattr(self.rnn, f"{n}_l0") for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
        return w, u, b, c

    def init_state(self, batch: int) -> State:
        zero = self.weights()[1].new_zeros(batch, self.d_out)
        return {"h": zero, "c": zero}

    def kernel(
        self, u: Tensor, state: State, elapsed: Tensor | None, lengths: Tensor | None
    ) -> tuple[Tensor, State]:
        h0, c0 = state["h"][None].contiguous(), state["c"][None].contiguous()
        if lengths is None:
            y, (h, c) = self.rnn(u, (h0, c0))
            return y, {"h": h[0], "c": c[0]}
        # The kernel tells c after the last column only. A further input closes the input gate and opens the forget
        # gate after the end of a row, so that c stays what it was.
        (w, *others), d = self.weights(), self.d_out
        past = torch.arange(u.shape[1], device=u.device) >= lengths[:, None]
        flag = torch.cat([w.new_full((d,), -_SURE), w.new_full((d,), _SURE), w.new_zeros(2 * d)])
        weights = [torch.cat([w, flag[:, None]], 1), *others]
        marked = torch.cat([u, past.to(u.dtype)[..., None]], -1)
        y, _, c = torch.lstm(marked, (h0, c0), weights, True, 1, 0.0, self.training, False, True)
        return y, {"h": after(y, state["h"], lengths), "c": c[0]}

    def step(self, u_t: Tensor, state: State, steps: Steps | None = None) -> tuple[Tensor, State]:
        state = restart(steps, state, self.init_state(u_t.shape[0]))
        w, u, b, c = self.weights()
        gates = nn.functional.linear(u_t, w, b) + nn.functional.linear(state["h"], u, c)
        i, f, g, o = gates.chunk(4, dim=-1)
        c = torch.sigmoid(f) * state["c"] + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        return keep_invalid(steps, h, {"h": h, "c": c}, state)


class LSTM(Stack):
    """Layers of LSTM. State: ``h`` and ``c`` (B, layers, D)."""

    def __init__(self, d_in: int, d_out: int, layers: int = 1, dropout: float = 0.0) -> None:
        super().__init__(LSTMLayer, d_in, d_out, layers, dropout)
