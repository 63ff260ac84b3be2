"""Mamba-2 (Dao and Gu 2024, arXiv:2405.21060, figure 6): one layer with its state.

    [z, x, B, C, dt] = W_in u        x, B, C ← silu(conv(x, B, C))        dt ← softplus(dt + b_dt)
    S_t = e^(dt_t A) S_{t−1} + dt_t B_t x_tᵀ        y_t = C_tᵀ S_t + D x_t        A = −e^(A_log), one per head
    out = W_out RMSNorm(y ∘ silu(z))

Initialised as published: dt log-uniform in [0.001, 0.1], not below 1e-4, through the inverse of softplus; A uniform
in [1, 16]; D = 1. Names and layouts of the weights are those of mamba-ssm and transformers, so that theirs load.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recur.models.conv import causal_conv, conv_step, next_window
from recur.models.interface import State
from recur.models.mamba2_fused import Shape, fused_layer
from recur.models.norm import GatedRMSNorm
from recur.models.ssd import CHUNK, ssd, ssd_step


def dt_bias_init(n: int, low: float = 1e-3, high: float = 1e-1, floor: float = 1e-4) -> Tensor:
    """(n,): b with softplus(b) log-uniform in [low, high], at least ``floor``."""
    dt = torch.exp(torch.rand(n) * math.log(high / low) + math.log(low)).clamp(min=floor)
    return dt + torch.log(-torch.expm1(-dt))


def no_weight_decay(*parameters: nn.Parameter) -> None:
    """Mark parameters that weight decay would push away from what they mean."""
    for parameter in parameters:
        parameter._no_weight_decay = True  # type: ignore[attr-defined]


def largest_divisor(n: int, at_most: int) -> int:
    return max(k for k in range(1, min(n, at_most) + 1) if n % k == 0)


class Mamba2Mixer(nn.Module):
    """u (B, T, d_model) → (B, T, d_model).

    State: ``conv`` (B, K−1, C), the last raw inputs of the convolution of C = d_inner + 2·G·N channels, and ``ssm``
    (B, H, P, N).
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        head: int = 64,
        expand: int = 2,
        groups: int = 1,
        taps: int = 4,
        chunk: int = CHUNK,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        inner = expand * d_model
        if inner % groups:
            raise ValueError(f"d_inner {inner} is not a multiple of {groups} groups")
        head = largest_divisor(inner // groups, head)
        self.shape = Shape(groups, inner // groups // head, head, d_state, chunk, eps)
        heads = inner // head
        self.in_proj = nn.Linear(d_model, inner + self.shape.conv + heads, bias=False)
        self.conv1d = nn.Conv1d(
            self.shape.conv, self.shape.conv, taps, groups=self.shape.conv, padding=taps - 1
        )
        self.dt_bias = nn.Parameter(dt_bias_init(heads))
        self.A_log = nn.Parameter(torch.empty(heads).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(heads))
        self.norm = GatedRMSNorm(inner, groups, eps)
        self.out_proj = nn.Linear(inner, d_model, bias=False)
        no_weight_decay(self.dt_bias, self.A_log, self.D)

    def init_state(self, batch: int) -> State:
        s, like = self.shape, self.A_log
        taps = self.conv1d.kernel_size[0]
        return {
            "conv": like.new_zeros(batch, taps - 1, s.conv),
            "ssm": like.new_zeros(batch, s.groups * s.heads, s.head, s.state),
        }

    def forward(
        self, u: Tensor, state: State, lengths: Tensor | None = None, segment: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """``lengths`` (B,): real steps before padding on the right; ``segment`` (B, T): counts beginnings."""
        plain = u.device.type == "cpu" and u.dtype == self.in_proj.weight.dtype == self.A_log.dtype
        if plain and u.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled("cpu"):
            weights = (
                self.in_proj.weight, self.conv1d.weight.squeeze(1), self._conv_bias(), self.dt_bias,
                -torch.exp(self.A_log), self.D, self.norm.weight, self.out_proj.weight,
            )  # fmt: skip
            y, window, ssm = fused_layer(
                self.shape, u, weights, state["conv"], state["ssm"], lengths, segment
            )
            return y, {"conv": window, "ssm": ssm}
        return self.composed(u, state, lengths, segment)

    def composed(
        self, u: Tensor, state: State, lengths: Tensor | None = None, segment: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """The layer from its parts, for any device and for mixed precision: between the projections it computes in
        float32 at least."""
        s = self.shape
        raw = self.in_proj(u)
        wide = torch.promote_types(raw.dtype, torch.float32)
        z, xbc, dt = torch.split(raw.to(wide), [s.inner, s.conv, len(self.D)], -1)
        with torch.autocast(u.device.type, enabled=False):
            xbc = xbc.contiguous()
            window = state["conv"].to(wide)
            weight = self.conv1d.weight.squeeze(1).to(wide)
            act = F.silu(causal_conv(xbc, weight, self._conv_bias().to(wide), window, segment))
            dt = F.softplus(dt + self.dt_bias.to(wide))
            if lengths is not None:
                live = torch.arange(u.shape[1], device=u.device) < lengths.unsqueeze(1)
                dt = dt * live.unsqueeze(-1)
            x, B, C = torch.split(act, [s.inner, s.groups * s.state, s.groups * s.state], -1)
            y, ssm = ssd(
                torch.unflatten(x, -1, (-1, s.head)),
                dt,
                -torch.exp(self.A_log.to(wide)),
                torch.unflatten(B, -1, (s.groups, -1)),
                torch.unflatten(C, -1, (s.groups, -1)),
                self.D,
                state["ssm"],
                segment,
                s.chunk,
            )
            normed = self.norm(y.flatten(2), z).to(raw.dtype)
        return self.out_proj(normed), {"conv": next_window(xbc, window, lengths, segment), "ssm": ssm}

    def step(self, u_t: Tensor, state: State, inplace: bool = False) -> tuple[Tensor, State]:
        """u_t (B, d_model) → (B, d_model); ``inplace`` as in :meth:`recur.models.residual.Stack.step`."""
        s = self.shape
        raw = self.in_proj(u_t)
        wide = torch.promote_types(raw.dtype, torch.float32)
        z, xbc, dt = torch.split(raw.to(wide), [s.inner, s.conv, len(self.D)], -1)
        weight = self.conv1d.weight.squeeze(1).to(wide)
        xbc, window = conv_step(xbc, weight, self._conv_bias().to(wide), state["conv"].to(wide), inplace)
        x, B, C = torch.split(F.silu(xbc), [s.inner, s.groups * s.state, s.groups * s.state], -1)
        y, ssm = ssd_step(
            torch.unflatten(x, -1, (-1, s.head)),
            F.softplus(dt + self.dt_bias.to(wide)),
            -torch.exp(self.A_log.to(wide)),
            torch.unflatten(B, -1, (s.groups, -1)),
            torch.unflatten(C, -1, (s.groups, -1)),
            self.D.to(wide),
            state["ssm"].to(wide),
            inplace,
        )
        normed = self.norm(y.flatten(1), z).to(raw.dtype)
        return self.out_proj(normed), {"conv": window, "ssm": ssm}

    def _conv_bias(self) -> Tensor:
        bias = self.conv1d.bias
        assert bias is not None
        return bias
