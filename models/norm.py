"""Root-mean-square normalisation (Zhang and Sennrich 2019, arXiv:1910.07467), plain and gated.

RMSNorm(x) = w ∘ x / sqrt(mean(x²) + ε)
gated (Mamba-2, Dao and Gu 2024, arXiv:2405.21060, section 7): RMSNorm(y ∘ silu(z)), mean per group of channels
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x (…, D) → (…, D); the mean square is taken in float32 where x is a half type."""

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        normed = nn.functional.rms_norm(wide, wide.shape[-1:], self.weight.to(wide.dtype), self.eps)
        return normed.to(x.dtype)


class GatedRMSNorm(nn.Module):
    """y, z (…, D) → (…, D): the gate first, then the norm, over each of ``groups`` equal parts of the channels."""

    def __init__(self, width: int, groups: int = 1, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.groups, self.eps = groups, eps

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        wide = torch.float32 if y.dtype in (torch.float16, torch.bfloat16) else y.dtype
        gated = torch.unflatten(y.to(wide) * nn.functional.silu(z.to(wide)), -1, (self.groups, -1))
        normed = nn.functional.rms_norm(gated, gated.shape[-1:], None, self.eps)
        return (normed.flatten(-2) * self.weight).to(y.dtype)
