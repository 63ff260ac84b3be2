"""Causal depthwise convolution of a few taps over (batch, time, channels), with a carried window.

    y_t = b + Σ_k w_k ∘ x_{t−K+1+k},   k = 0 … K−1   (the last tap meets the current step)

as in Mamba (Gu and Dao 2023, arXiv:2312.00752, figure 3; K = 4), in the layout in which the projections around it work;
``torch.conv1d`` wants channels first. Single precision on a CPU goes to oneDNN, everything else is a handful of shifted
multiply-adds.

The window is the last K−1 inputs, (B, K−1, C), oldest first. ``segment`` (B, T) numbers the sequences that a row
holds one after the other, 0 for the one that the window belongs to: a tap never reaches into another sequence.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def _same(segment: Tensor, lag: int, dtype: torch.dtype) -> Tensor:
    """(B, T − lag, 1): 1 where step t and step t − lag are of one sequence."""
    return (segment[:, lag:] == segment[:, : segment.shape[1] - lag]).to(dtype).unsqueeze(-1)


def _begun(segment: Tensor, n: int, dtype: torch.dtype) -> Tensor:
    """(B, n, 1): 1 where one of the first ``n`` steps still belongs to the window's sequence."""
    return (segment[:, :n] == 0).to(dtype).unsqueeze(-1)


def _by_library(x: Tensor, segment: Tensor | None) -> bool:
    """Whether oneDNN has a depthwise kernel for it, which is faster than shifted multiply-adds."""
    return (
        segment is None
        and x.dtype == torch.float32
        and x.device.type == "cpu"
        and bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
    )


def _depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, pad: int) -> Tensor:
    """x (B, T, C), weight (C, K) → (B, T + 2·pad − K + 1, C): as an image of one row whose channels are last, so that
    nothing is moved in memory."""
    image = x.unsqueeze(1).permute(0, 3, 1, 2)
    with torch.autocast(x.device.type, enabled=False):
        y = F.conv2d(image, weight[:, None, None], bias, padding=(0, pad), groups=len(weight))
    return y.squeeze(2).transpose(1, 2)


def conv_forward(
    x: Tensor, weight: Tensor, bias: Tensor, window: Tensor, segment: Tensor | None = None
) -> Tensor:
    """x (B, T, C), weight (C, K), bias (C,), window (B, K−1, C) → y (B, T, C)."""
    length, taps = x.shape[1], weight.shape[1]
    w = weight.t().contiguous()
    if _by_library(x, segment):
        y = _depthwise(x, weight, bias, taps - 1)[:, :length]
    else:
        y = torch.addcmul(bias, x, w[-1])
        for lag in range(1, min(taps, length)):
            past = x[:, :-lag] if segment is None else x[:, :-lag] * _same(segment, lag, x.dtype)
            y[:, lag:].addcmul_(past, w[-1 - lag])
    for lag in range(1, taps):
        n = min(lag, length)
        past = window[:, taps - 1 - lag :][:, :n]
        if segment is not None:
            past = past * _begun(segment, n, x.dtype)
        y[:, :n].addcmul_(past, w[-1 - lag])
    return y


def conv_backward(
    dy: Tensor, x: Tensor, weight: Tensor, window: Tensor, segment: Tensor | None, dweight: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradient of :func:`conv_forward`: adds to ``dweight`` (K, C), returns dx and dwindow.

    ``dy`` (B, T + K−1, C): the gradient of y, then K−1 steps of zero, which no step of x reaches.
    """
    length, taps, w, late = x.shape[1], weight.shape[1], weight.t().contiguous(), dy
    dy, dwindow = dy[:, :length], torch.zeros_like(window)
    for lag in range(1, taps):
        n = min(lag, length)
        early = dy[:, :n] if segment is None else dy[:, :n] * _begun(segment, n, x.dtype)
        of = slice(taps - 1 - lag, taps - 1 - lag + n)
        dwindow[:, of].addcmul_(early, w[-1 - lag])
        dweight[-1 - lag] += (early * window[:, of]).sum((0, 1))
    library = _by_library(x, segment)
    dx = _depthwise(late, weight.flip(1), None, 0) if library else torch.zeros_like(x)
    for lag in range(min(taps, length)):
        part = dy[:, lag:] if segment is None else dy[:, lag:] * _same(segment, lag, x.dtype)
        if not library:
            dx[:, : length - lag].addcmul_(part, w[-1 - lag])
        dweight[-1 - lag] += (part * x[:, : length - lag]).sum((0, 1))
    return dx, dwindow


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, window: Tensor, segment: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(x, weight, window, segment)
        return conv_forward(x, weight, bias, window, segment)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, window, segment = ctx.saved_tensors
        dweight = weight.new_zeros(weight.shape[1], weight.shape[0])
        late = F.pad(dy, (0, 0, 0, weight.shape[1] - 1))
        dx, dwindow = conv_backward(late, x, weight, window, segment, dweight)
        return dx, dweight.t(), dy.sum((0, 1)), dwindow, None


def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor, window: Tensor, segment: Tensor | None = None
) -> Tensor:
    """Differentiable :func:`conv_forward`; weight (C, K), all of one dtype."""
    y: Tensor = _Conv.apply(x, weight, bias, window, segment)  # type: ignore[no-untyped-call]
    return y


def next_window(
    x: Tensor, window: Tensor, lengths: Tensor | None = None, segment: Tensor | None = None
) -> Tensor:
    """The last K−1 inputs of window and x together (B, K−1, C), zeros where another sequence has begun since.

    ``lengths`` (B,) counts the steps of x that are real where the rest is padding on the right.
    ``segment`` then holds in its last column the sequence that the state after x belongs to.
    """
    keep, (batch, length, channels) = window.shape[1], x.shape
    if lengths is None:
        late = x[:, length - keep :] if length >= keep else torch.cat([window[:, length:], x], 1)
        out = late.clone(memory_format=torch.contiguous_format)  # a view would hold all of x in memory
    else:
        at = lengths.unsqueeze(1) + torch.arange(keep, device=x.device)
        joined = torch.cat([window, x], 1)
        out = joined.gather(1, at.unsqueeze(-1).expand(batch, keep, channels))
    if segment is not None:
        padded = torch.cat([segment.new_zeros(batch, keep), segment], 1)
        at = (
            segment.new_full((batch, 1), length) if lengths is None else lengths.unsqueeze(1)
        ) + torch.arange(keep, device=x.device)
        out = out * (padded.gather(1, at) == segment[:, -1:]).to(x.dtype).unsqueeze(-1)
    return out


def conv_step(
    x_t: Tensor, weight: Tensor, bias: Tensor, window: Tensor, inplace: bool = False
) -> tuple[Tensor, Tensor]:
    """One step: x_t (B, C), window (B, K−1, C) → y_t (B, C) and the next window.

    ``inplace`` writes the next window over ``window``; without gradients only.
    """
    w = torch.stack(weight.unbind(1))  # contiguous taps, also where it is compiled
    y = torch.addcmul(bias, x_t, w[-1])
    for past, tap in zip(window.unbind(1), w[:-1], strict=True):
        y = torch.addcmul(y, past, tap)
    after = torch.cat([window[:, 1:], x_t.unsqueeze(1)], 1)
    return y, window.copy_(after) if inplace and not torch.is_grad_enabled() else after
