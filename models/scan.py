"""The linear recurrence h_t = a_t ∘ h_{t−1} + b_t over whole sequences, without logarithms.

Time comes first here: (T, B, N). On a CPU the steps run one after the other, one fused multiply-add each, forward and
backward: arithmetic is never the limit, and so a scan that does more of it to be parallel is slower. On other devices
the same recurrence is run by doubling (Hillis & Steele 1986, "Data parallel algorithms"): ⌈log2 T⌉ passes that combine
(a, b)_t with (a, b)_{t−d} for d = 1, 2, 4, …. Neither ever divides by a product of decays nor takes its logarithm, so
the error does not grow with the length.

The adjoint is a scan of the same kind, backwards in time, with the gates one step later::

    g_t = ∂L/∂h_t + ā_{t+1} ∘ g_{t+1},   ∂L/∂b_t = g_t,   ∂L/∂a_t = g_t ∘ h̄_{t−1},   ∂L/∂h_0 = ā_1 ∘ g_1

where the bar is the complex conjugate.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from recur.models.interface import Steps


def _conj(x: Tensor) -> Tensor:
    return x.conj().resolve_conj() if x.is_complex() else x


def _run(gates: Sequence[Tensor], steps: Sequence[Tensor], before: Tensor) -> None:
    for gate, now in zip(gates, steps, strict=True):
        now.addcmul_(gate, before)
        before = now


def sequential(a: Tensor, h: Tensor, h0: Tensor) -> None:
    """In place, step by step: h (T, B, N) holding b becomes the states; a (T or 1, B or 1, N), h0 (B, N)."""
    _run(a.unbind(0) if a.shape[0] > 1 else (a[0],) * h.shape[0], h.unbind(0), h0)


def sequential_adjoint(a: Tensor, g: Tensor) -> Tensor:
    """g (T, B, N) holding ∂L/∂h becomes the adjoint, g_t += a_{t+1} ∘ g_{t+1}; a is conjugated already."""
    back = g.unbind(0)[::-1]
    _run(a.unbind(0)[:0:-1] if a.shape[0] > 1 else (a[0],) * (g.shape[0] - 1), back[1:], back[0])
    return g


def doubling(a: Tensor, h: Tensor, h0: Tensor) -> None:
    """As :func:`sequential`, in ⌈log2 T⌉ passes over the whole."""
    h[0] += a[0] * h0
    a = a.expand(h.shape).clone()
    distance = 1
    while distance < h.shape[0]:
        h[distance:] += a[distance:] * h[:-distance].clone()
        a[distance:] *= a[:-distance].clone()
        distance *= 2


def doubling_adjoint(a: Tensor, g: Tensor) -> Tensor:
    """As :func:`sequential_adjoint`, into a new tensor."""
    if a.shape[0] > 1:  # the first gate of the reversed scan acts on nothing
        a = torch.cat([a[:1], a[1:].flip(0)])
    g = g.flip(0)
    doubling(a, g, torch.zeros_like(g[0]))
    return g.flip(0)


class _LinearScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, h0: Tensor) -> Tensor:
        h = b.clone(memory_format=torch.contiguous_format)
        (sequential if h.device.type == "cpu" else doubling)(a, h, h0)
        ctx.save_for_backward(a, h, h0)
        return h

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None]:
        a, h, h0 = ctx.saved_tensors
        back = _conj(a)
        g = grad.clone(memory_format=torch.contiguous_format)
        g = (sequential_adjoint if g.device.type == "cpu" else doubling_adjoint)(back, g)
        d_a = d_h0 = None
        if ctx.needs_input_grad[0]:
            full = torch.empty_like(g)
            torch.mul(g[0], _conj(h0), out=full[0])
            torch.mul(g[1:], _conj(h[:-1]), out=full[1:])
            d_a = full.sum_to_size(a.shape)
        if ctx.needs_input_grad[2]:
            d_h0 = back[0] * g[0]
        return d_a, g, d_h0


def linear_scan(a: Tensor, b: Tensor, h0: Tensor) -> Tensor:
    """All h_t = a_t ∘ h_{t−1} + b_t: a (T or 1, B or 1, N), b (T, B, N), h0 (B, N) → (T, B, N); real or complex.

    A gate with a first dimension of 1 is the same at every step. Half precision is computed in float32.
    """
    if b.dtype in (torch.float16, torch.bfloat16) or a.dtype in (torch.float16, torch.bfloat16):
        a, b, h0 = a.float(), b.float(), h0.float()
    return cast(Tensor, _LinearScan.apply(a, b, h0))  # type: ignore[no-untyped-call]


def mark_scan(a: Tensor, b: Tensor, steps: Steps | None) -> tuple[Tensor, Tensor]:
    """Resets and missing steps as gates: a = 0 where a sequence begins, a = 1 and b = 0 where a step is missing.

    For models whose fresh state is 0. a and b as in :func:`linear_scan`; the marks (B, T).
    """
    if steps is None:
        return a, b
    if steps.valid is not None:
        valid = steps.valid.T[..., None]  # (T, B, 1)
        a = torch.where(valid, a, torch.ones_like(a))
        b = torch.where(valid, b, torch.zeros_like(b))
    if steps.reset is not None:
        a = torch.where(steps.reset.T[..., None], torch.zeros_like(a), a)
    return a, b
