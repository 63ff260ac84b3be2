"""Gated recurrent unit.

In the form of cuDNN and ``torch.nn.GRU`` (reset after the product; Cho et al. 2014, arXiv:1406.1078, eq. 5-8,
as modified in arXiv:1406.1078v3)::

    r = σ(W_r u + b_r + U_r h + c_r)
    z = σ(W_z u + b_z + U_z h + c_z)
    n = tanh(W_n u + b_n + r ∘ (U_n h + c_n))
    h' = (1 − z) ∘ n + z ∘ h
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from recur.models.interface import State, Steps
from recur.models.steps import keep_invalid, restart, scan_steps


class GRU(nn.Module):
    """Layers of GRU with orthogonal recurrent weights per gate (Saxe et al. 2014, arXiv:1312.6120).

    State: ``h`` (B, layers, D).
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

    def init_state(self, batch: int) -> State:
        weight = self.rnn.weight_hh_l0
        assert isinstance(weight, Tensor)
        return {"h": torch.zeros(batch, self.layers, self.d_out, device=weight.device, dtype=weight.dtype)}

    def forward(
        self, u: Tensor, state: State | None = None, steps: Steps | None = None
    ) -> tuple[Tensor, State]:
        if steps is not None:
            return scan_steps(self, u, state, steps)
        h = (state or self.init_state(u.shape[0]))["h"].transpose(0, 1).contiguous()  # (layers, B, D)
        y, h = self.rnn(u, h)
        return y, {"h": h.transpose(0, 1)}

    def step(self, u_t: Tensor, state: State, steps: Steps | None = None) -> tuple[Tensor, State]:
        """One bar by the equations above, without ``nn.GRU``: an independent second computation."""
        state = restart(steps, state, self.init_state(u_t.shape[0]))
        h_all = state["h"]
        x, hidden = u_t, []
        for layer in range(self.layers):
            w_i, w_h = getattr(self.rnn, f"weight_ih_l{layer}"), getattr(self.rnn, f"weight_hh_l{layer}")
            b_i, b_h = getattr(self.rnn, f"bias_ih_l{layer}"), getattr(self.rnn, f"bias_hh_l{layer}")
            h = h_all[:, layer]
            i_r, i_z, i_n = nn.functional.linear(x, w_i, b_i).chunk(3, dim=-1)
            h_r, h_z, h_n = nn.functional.linear(h, w_h, b_h).chunk(3, dim=-1)
            r, z = torch.sigmoid(i_r + h_r), torch.sigmoid(i_z + h_z)
            n = torch.tanh(i_n + r * h_n)
            x = (1 - z) * n + z * h
            hidden.append(x)
        return keep_invalid(steps, x, {"h": torch.stack(hidden, dim=1)}, {"h": h_all})
