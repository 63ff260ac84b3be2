"""Gated recurrent unit, in both forms.

:class:`GRU`, the form of cuDNN and ``torch.nn.GRU`` (reset after the product; Cho et al. 2014, arXiv:1406.1078v3)::

    r = σ(W_r u + b_r + U_r h + c_r)
    z = σ(W_z u + b_z + U_z h + c_z)
    n = tanh(W_n u + b_n + r ∘ (U_n h + c_n))
    h' = (1 − z) ∘ n + z ∘ h

:class:`StandardGRU`, the form of the paper (reset before the product; arXiv:1406.1078v1, eq. 5-8)::

    r = σ(W_r u + U_r h + b_r)
    z = σ(W_z u + U_z h + b_z)
    h̃ = tanh(W_n u + U_n (r ∘ h) + b_n)
    h' = (1 − z) ∘ h + z ∘ h̃

:mod:`recur.models.gru_forms` converts one into the other where that is possible.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from recur.models.gru_kernel import reset_after, reset_before
from recur.models.interface import State, Steps
from recur.models.rows import RowLayer, after, cut, has_marks
from recur.models.stack import Stack
from recur.models.steps import keep_invalid, nothing, readable, restart


class GRU(nn.Module):
    """Layers of GRU with orthogonal recurrent weights per gate (Saxe et al. 2014, arXiv:1312.6120).

    State: ``h`` (B, layers, D). The weights are those of the ``torch.nn.GRU`` in :attr:`rnn`, which also computes on
    a GPU and under autocast; elsewhere :func:`reset_after` does, faster.
    """

    def __init__(self, d_in: int, d_out: int, layers: int = 1, dropout: float = 0.0) -> None:
        super().__init__()
        self.d_in, self.d_out, self.layers = d_in, d_out, layers
        self.rnn = nn.GRU(d_in, d_out, layers, batch_first=True, dropout=dropout if layers > 1 else 0.0)
        for name, weight in self.rnn.named_parameters():
            if name.startswith("weight_hh"):
                for gate in weight.data.chunk(3):
                    nn.init.orthogonal_(gate)
            elif name.startswith("weight_ih"):
                for gate in weight.data.chunk(3):
                    nn.init.xavier_uniform_(gate)
            else:
                nn.init.zeros_(weight)

    def weights(self, layer: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(W (3D, F), U (3D, D), b (3D,), c (3D,)), gates in the order r, z, n."""
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        w, u, b, c = (getattr(self.rnn, f"{name}_l{layer}") for name in names)
        return w, u, b, c

    def init_state(self, batch: int) -> State:
        return {"h": self.weights(0)[1].new_zeros(batch, self.layers, self.d_out)}

    def forward(
        self, u: Tensor, state: State | None = None, steps: Steps | None = None
    ) -> tuple[Tensor, State]:
        if not u.shape[1]:
            return nothing(self, u, state)
        fresh = self.init_state(u.shape[0])
        state = fresh if state is None else state
        if steps is None or not has_marks(steps):
            y, h = self._run(u, state["h"], None)
            return y, {"h": h}
        rows = cut(u, steps)
        y, h = self._run(rows.u, rows.begin(state, fresh)["h"], rows.lengths)
        return rows.spread(y), rows.end({"h": h})

    def _run(self, x: Tensor, h0: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        """x (R, L, F), h0 (R, layers, D) → y (R, L, D) and the state after ``lengths`` steps."""
        own = x.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
        if not own and lengths is None:
            y, h = self.rnn(x, h0.transpose(0, 1).contiguous())
            return y, h.transpose(0, 1)
        ends = []
        for layer in range(self.layers):
            x = nn.functional.dropout(x, self.rnn.dropout, self.training) if layer else x
            if own:
                y = reset_after(x.transpose(0, 1), *self.weights(layer), h0[:, layer]).transpose(0, 1)
            else:
                weights, start = list(self.weights(layer)), h0[:, layer][None].contiguous()
                y, _ = torch.gru(x, start, weights, True, 1, 0.0, self.training, False, True)
            ends.append(after(y, h0[:, layer], lengths))
            x = y
        return x, torch.stack(ends, dim=1)

    def step(self, u_t: Tensor, state: State, steps: Steps | None = None) -> tuple[Tensor, State]:
        """One bar by the equations above: an independent second computation."""
        state = restart(steps, state, self.init_state(u_t.shape[0]))
        x, hidden = readable(steps, u_t), []
        for layer in range(self.layers):
            w_i, w_h, b_i, b_h = self.weights(layer)
            h = state["h"][:, layer]
            i_r, i_z, i_n = linear(x, w_i, b_i).chunk(3, dim=-1)
            h_r, h_z, h_n = linear(h, w_h, b_h).chunk(3, dim=-1)
            r, z = torch.sigmoid(i_r + h_r), torch.sigmoid(i_z + h_z)
            n = torch.tanh(i_n + r * h_n)
            x = (1 - z) * n + z * h
            hidden.append(x)
        return keep_invalid(steps, x, {"h": torch.stack(hidden, dim=1)}, state)


class StandardGRULayer(RowLayer):
    """State: ``h`` (B, D). Weights w (3D, F), u (3D, D) and bias (3D,), gates in the order r, z, h̃."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.d_in, self.d_out = d_in, d_out
        self.w = nn.Parameter(torch.empty(3 * d_out, d_in))
        self.u = nn.Parameter(torch.empty(3 * d_out, d_out))
        self.bias = nn.Parameter(torch.zeros(3 * d_out))
        for gate in self.w.data.chunk(3):
            nn.init.xavier_uniform_(gate)
        for gate in self.u.data.chunk(3):
            nn.init.orthogonal_(gate)

    def init_state(self, batch: int) -> State:
        return {"h": self.u.new_zeros(batch, self.d_out)}

    def kernel(
        self, u: Tensor, state: State, elapsed: Tensor | None, lengths: Tensor | None
    ) -> tuple[Tensor, State]:
        y = reset_before(u.transpose(0, 1), self.w, self.u, self.bias, state["h"]).transpose(0, 1)
        return y, {"h": after(y, state["h"], lengths)}

    def step(self, u_t: Tensor, state: State, steps: Steps | None = None) -> tuple[Tensor, State]:
        state = restart(steps, state, self.init_state(u_t.shape[0]))
        h = state["h"]
        i_r, i_z, i_n = linear(u_t, self.w, self.bias).chunk(3, dim=-1)
        u_r, u_z, u_n = self.u.chunk(3)
        r, z = torch.sigmoid(i_r + h @ u_r.T), torch.sigmoid(i_z + h @ u_z.T)
        h = (1 - z) * h + z * torch.tanh(i_n + (r * h) @ u_n.T)
        return keep_invalid(steps, h, {"h": h}, state)


class StandardGRU(Stack):
    """Layers of the paper's GRU. State: ``h`` (B, layers, D)."""

    def __init__(self, d_in: int, d_out: int, layers: int = 1, dropout: float = 0.0) -> None:
        super().__init__(StandardGRULayer, d_in, d_out, layers, dropout)
