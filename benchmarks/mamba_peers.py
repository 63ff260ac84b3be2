"""What the Mamba benchmark compares with: the paper's short listing, and packages where they are installed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def _segment_sum(a: Tensor) -> Tensor:
    """(…, Q) → (…, Q, Q): sums of a over j < k ≤ i, −inf above the diagonal, by a masked running sum."""
    q = a.shape[-1]
    spread = a.unsqueeze(-1).expand(*a.shape, q)
    below = torch.ones(q, q, dtype=torch.bool, device=a.device).tril(-1)
    sums = spread.masked_fill(~below, 0).cumsum(-2)
    return sums.masked_fill(~torch.ones_like(below).tril(), -torch.inf)


def listing(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, chunk: int) -> Tensor:
    """Chunked state-space dual after listing 1 of arXiv:2405.21060, by einsum and autograd; one group."""
    b, length, h, _ = x.shape
    split = [
        t.unflatten(1, (length // chunk, chunk))
        for t in (x * dt.unsqueeze(-1), dt * A, B[:, :, 0], C[:, :, 0])
    ]
    X, a, Bc, Cc = split
    a = a.permute(0, 3, 1, 2)
    total = a.cumsum(-1)
    inside = torch.einsum("bcln,bcsn,bhcls,bcshp->bclhp", Cc, Bc, _segment_sum(a).exp(), X)
    to_end = (total[..., -1:] - total).exp()
    states = torch.einsum("bcln,bhcl,bclhp->bchpn", Bc, to_end, X)
    states = torch.cat([torch.zeros_like(states[:, :1]), states], 1)
    between = _segment_sum(nn.functional.pad(total[..., -1], (1, 0))).exp()
    states = torch.einsum("bhzc,bchpn->bzhpn", between, states)[:, :-1]
    carried = torch.einsum("bcln,bchpn,bhcl->bclhp", Cc, states, total.exp())
    return (inside + carried).reshape(b, length, h, -1) + D[:, None] * x


class ListingMixer(nn.Module):
    """A Mamba-2 layer around :func:`listing`, as simple as it can be written; the names of its weights are ours."""

    def __init__(self, d_model: int, d_state: int, head: int, chunk: int) -> None:
        super().__init__()
        self.inner, self.d_state, self.head, self.chunk = 2 * d_model, d_state, head, chunk
        heads, conv = self.inner // head, self.inner + 2 * d_state
        self.in_proj = nn.Linear(d_model, self.inner + conv + heads, bias=False)
        self.conv1d = nn.Conv1d(conv, conv, 4, groups=conv, padding=3)
        self.dt_bias, self.A_log, self.D = (nn.Parameter(torch.zeros(heads)) for _ in range(3))
        self.norm = nn.RMSNorm(self.inner, eps=1e-5)
        self.out_proj = nn.Linear(self.inner, d_model, bias=False)

    def forward(self, u: Tensor) -> Tensor:
        n = self.d_state
        z, xbc, dt = self.in_proj(u).split([self.inner, self.inner + 2 * n, len(self.D)], -1)
        xbc = nn.functional.silu(self.conv1d(xbc.transpose(1, 2))[..., : u.shape[1]].transpose(1, 2))
        x, B, C = xbc.split([self.inner, n, n], -1)
        x, B, C = x.unflatten(-1, (-1, self.head)), B.unsqueeze(2), C.unsqueeze(2)
        dt = nn.functional.softplus(dt + self.dt_bias)
        y = listing(x, dt, -self.A_log.exp(), B, C, self.D, self.chunk)
        return self.out_proj(self.norm(y.flatten(2) * nn.functional.silu(z)))

    def step(self, u: Tensor, conv: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """u (B, d), conv (B, C, 4), state (B, H, P, N): both are written over, as the public implementations do."""
        n = self.d_state
        z, xbc, dt = self.in_proj(u).split([self.inner, self.inner + 2 * n, len(self.D)], -1)
        conv.copy_(torch.roll(conv, -1, -1))
        conv[:, :, -1] = xbc
        xbc = nn.functional.silu((conv * self.conv1d.weight[:, 0]).sum(-1) + self.conv1d.bias)
        x, B, C = xbc.split([self.inner, n, n], -1)
        x = x.unflatten(-1, (-1, self.head))
        dt = nn.functional.softplus(dt + self.dt_bias)
        dBx = torch.einsum("bh,bn,bhp->bhpn", dt, B, x)
        state.copy_(state * (dt * -self.A_log.exp()).exp()[..., None, None] + dBx)
        y = torch.einsum("bhpn,bn->bhp", state, C) + self.D[:, None] * x
        return self.out_proj(self.norm(y.flatten(1) * nn.functional.silu(z))), conv, state


def transformers_mixer(d_model: int, d_state: int, head: int, chunk: int) -> nn.Module | None:
    """``Mamba2Mixer`` of transformers on its plain torch path, or None."""
    try:
        from transformers import Mamba2Config
        from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer
    except ImportError:
        return None
    heads = 2 * d_model // head
    config = Mamba2Config(
        hidden_size=d_model, state_size=d_state, head_dim=head, num_heads=heads, n_groups=1, expand=2,
        chunk_size=chunk, num_hidden_layers=1, vocab_size=8,
    )  # fmt: skip
    mixer: nn.Module = Mamba2Mixer(config, 0)
    return mixer


def transformers_core() -> Callable[..., Any] | None:
    """``mamba2_chunk_scan`` of transformers, or None."""
    try:
        from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan
    except ImportError:
        return None
    core: Callable[..., Any] = mamba2_chunk_scan
    return core


def mambapy_block(d_model: int, pscan: bool = True) -> nn.Module | None:
    """Mamba-1 block of mambapy, or None."""
    try:
        from mambapy.mamba import MambaBlock, MambaConfig
    except ImportError:
        return None
    block: nn.Module = MambaBlock(MambaConfig(d_model=d_model, n_layers=1, pscan=pscan))
    return block
