"""The causal convolution of both ways of computing it equals its definition, summed out step by step."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from recur.models.conv import causal_conv, conv_step, next_window

C = 5


def by_hand(x: Tensor, weight: Tensor, bias: Tensor, window: Tensor, segment: Tensor | None) -> Tensor:
    """y_t = b + Σ_k w_k x_{t−K+1+k}; what lies before the first step is the window, of segment 0."""
    batch, length, _ = x.shape
    taps = weight.shape[1]
    joined = torch.cat([window, x], 1)
    of = torch.zeros(batch, length, dtype=torch.long) if segment is None else segment
    of = torch.cat([torch.zeros(batch, taps - 1, dtype=torch.long), of], 1)
    y = bias.expand(batch, length, -1).clone()
    for b in range(batch):
        for t in range(length):
            for k in range(taps):
                if of[b, t + k] == of[b, t + taps - 1]:
                    y[b, t] = y[b, t] + weight[:, k] * joined[b, t + k]
    return y


def case(length: int, taps: int, batch: int = 3) -> list[Tensor]:
    make = torch.Generator().manual_seed(length)
    shapes = [(batch, length, C), (C, taps), (C,), (batch, taps - 1, C)]
    return [torch.randn(s, generator=make, dtype=torch.float64) for s in shapes]


def with_gradients(way: Callable[..., Tensor], given: list[Tensor], segment: Tensor | None) -> list[Tensor]:
    given = [t.clone().requires_grad_() for t in given]
    y = way(*given, segment)
    weight = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).to(y.dtype)
    return [y.detach(), *torch.autograd.grad((y * weight).sum(), given)]


@pytest.mark.parametrize("taps", [2, 4])
@pytest.mark.parametrize("length", [1, 2, 3, 4, 33])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("resets", [False, True])
def test_values_and_gradients_are_those_of_the_definition(
    taps: int, length: int, dtype: torch.dtype, tolerance: float, resets: bool
) -> None:
    given = case(length, taps)
    segment = (torch.arange(length) >= torch.tensor([[0], [2], [length]])).long() if resets else None
    expected = with_gradients(by_hand, given, segment)
    found = with_gradients(causal_conv, [t.to(dtype) for t in given], segment)
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert (one - other).abs().max() < tolerance * (1 + other.abs().max())


@pytest.mark.parametrize("length", [1, 7, 40])
@pytest.mark.parametrize("at", [1, 3, 20])
def test_in_single_precision_pieces_with_the_window_carried_equal_the_whole(length: int, at: int) -> None:
    x, weight, bias, window = (t.float() for t in case(length, 4))
    whole = causal_conv(x, weight, bias, window)
    first = causal_conv(x[:, :at].contiguous(), weight, bias, window)
    middle = next_window(x[:, :at], window)
    rest = [causal_conv(x[:, at:].contiguous(), weight, bias, middle)] if length > at else []
    assert torch.allclose(torch.cat([first, *rest], 1), whole, atol=1e-6)
    for t in range(length):
        y, window = conv_step(x[:, t], weight, bias, window)
        assert torch.allclose(y, whole[:, t], atol=1e-6)


def test_memory_between_the_rows_of_an_input_is_not_read() -> None:
    x, weight, bias, window = (t.float() for t in case(12, 4))
    wide = torch.full((3, 12, 2 * C), torch.nan)
    wide[..., C:] = x
    assert torch.equal(causal_conv(wide[..., C:], weight, bias, window), causal_conv(x, weight, bias, window))


def test_under_mixed_precision_it_stays_single() -> None:
    given = [t.float() for t in case(33, 4)]
    plain = with_gradients(causal_conv, given, None)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = with_gradients(causal_conv, given, None)
    for one, other in zip(mixed, plain, strict=True):
        assert torch.equal(one, other)
