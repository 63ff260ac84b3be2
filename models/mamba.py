"""Mamba (Gu and Dao 2023, arXiv:2312.00752, figure 3 and section 3.5): one layer with its state.

    [x, z] = W_in u        x ← silu(conv(x))        [r, B, C] = W_x x        dt = softplus(W_dt r + b_dt)
    h_t = e^(dt_t A) ∘ h_{t−1} + (dt_t x_t) B_tᵀ        y_t = h_t C_t + D x_t        A = −e^(A_log), (d_inner, N)
    out = W_out (y ∘ silu(z))

Initialised as published: A_log = log(1 … N) per channel (S4D-real), W_dt uniform in ±rank^(−1/2), b_dt as in
:mod:`recur.models.mamba2`, D = 1. The names of the weights are those of mamba-ssm, transformers and mambapy.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recur.models.conv import causal_conv, conv_step, next_window
from recur.models.interface import State
from recur.models.mamba2 import dt_bias_init, no_weight_decay
from recur.models.selective import selective_scan, selective_step


class MambaMixer(nn.Module):
    """u (B, T, d_model) → (B, T, d_model).

    State: ``conv`` (B, K−1, d_inner), the last raw inputs of the convolution, and ``ssm`` (B, N, d_inner).
    """

    def __init__(self, d_model: int, d_state: int = 16, expand: int = 2, taps: int = 4) -> None:
        super().__init__()
        self.inner, self.d_state, self.rank = expand * d_model, d_state, -(-d_model // 16)
        self.in_proj = nn.Linear(d_model, 2 * self.inner, bias=False)
        self.conv1d = nn.Conv1d(self.inner, self.inner, taps, groups=self.inner, padding=taps - 1)
        self.x_proj = nn.Linear(self.inner, self.rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(self.rank, self.inner)
        self.A_log = nn.Parameter(torch.arange(1.0, d_state + 1).log().repeat(self.inner, 1))
        self.D = nn.Parameter(torch.ones(self.inner))
        self.out_proj = nn.Linear(self.inner, d_model, bias=False)
        nn.init.uniform_(self.dt_proj.weight, -(self.rank**-0.5), self.rank**-0.5)
        self.dt_proj.bias.data = dt_bias_init(self.inner)
        no_weight_decay(self.dt_proj.bias, self.A_log, self.D)

    def init_state(self, batch: int) -> State:
        taps = self.conv1d.kernel_size[0]
        return {
            "conv": self.A_log.new_zeros(batch, taps - 1, self.inner),
            "ssm": self.A_log.new_zeros(batch, self.d_state, self.inner),
        }

    def forward(
        self, u: Tensor, state: State, lengths: Tensor | None = None, segment: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """``lengths`` (B,): real steps before padding on the right; ``segment`` (B, T): counts beginnings."""
        raw, z = self.in_proj(u).chunk(2, -1)
        wide = torch.promote_types(raw.dtype, torch.float32)
        raw, window = raw.to(wide).contiguous(), state["conv"].to(wide)
        x = F.silu(causal_conv(raw, *self._taps(wide), window, segment))
        dt, B, C = self._select(x)
        if lengths is not None:
            live = torch.arange(u.shape[1], device=u.device) < lengths.unsqueeze(1)
            dt = dt * live.unsqueeze(-1)
        y, ssm = selective_scan(x, dt, -torch.exp(self.A_log.to(wide)), B, C, self.D, state["ssm"], segment)
        out = self.out_proj((y * F.silu(z)).to(z.dtype))
        return out, {"conv": next_window(raw, window, lengths, segment), "ssm": ssm}

    def step(self, u_t: Tensor, state: State, inplace: bool = False) -> tuple[Tensor, State]:
        """u_t (B, d_model) → (B, d_model); ``inplace`` as in :meth:`recur.models.residual.Stack.step`."""
        raw, z = self.in_proj(u_t).chunk(2, -1)
        wide = torch.promote_types(raw.dtype, torch.float32)
        x, window = conv_step(raw.to(wide), *self._taps(wide), state["conv"].to(wide), inplace)
        x = F.silu(x)
        dt, B, C = self._select(x)
        A = -torch.exp(self.A_log.to(wide))
        y, ssm = selective_step(x, dt, A, B, C, self.D.to(wide), state["ssm"].to(wide), inplace)
        return self.out_proj((y * F.silu(z)).to(z.dtype)), {"conv": window, "ssm": ssm}

    def _taps(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        bias = self.conv1d.bias
        assert bias is not None
        return self.conv1d.weight.squeeze(1).to(dtype), bias.to(dtype)

    def _select(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Step sizes (…, d_inner), B and C (…, N), in the type of x."""
        r, B, C = torch.split(self.x_proj(x.to(self.D.dtype)), [self.rank, self.d_state, self.d_state], -1)
        raw = F.linear(r, self.dt_proj.weight).to(x.dtype) + self.dt_proj.bias.to(x.dtype)
        return F.softplus(raw), B.to(x.dtype), C.to(x.dtype)
