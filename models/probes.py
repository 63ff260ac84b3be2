"""What a recurrence does, measured from outside: the same questions to every model, through the interface alone.

Notation: B batch, T time, n numbers in the state of one row of the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from recur.models.interface import SequenceModel, State, Steps

WHOLE = 256
"""Largest state whose Jacobian is written out; larger ones are met by power iteration."""


@dataclass(frozen=True, slots=True)
class Gate:
    """What one gate of ``width`` numbers between 0 and 1 does over all bars: shares of values below 5 % and above 95 %."""

    kind: str
    """``gate``, a sigmoid, or ``decay``, an exponential of nothing positive."""
    width: int
    mean: float
    closed: float
    open: float
    low: float
    high: float


def state_size(state: State) -> int:
    """Numbers of one row of the batch that gradients can flow through."""
    return sum(v[0].numel() for v in state.values() if v.is_floating_point())


def states_along(model: SequenceModel, u: Tensor, at: list[int], steps: Steps | None = None) -> list[State]:
    """The states before the bars ``at`` (increasing) of u (B, T, F)."""
    state, states, low = model.init_state(u.shape[0]), [], 0
    with torch.no_grad():
        for high in at:
            if high > low:
                marks = None if steps is None else steps.slice(low, high)
                _, state = model(u[:, low:high], state, marks)
                low = high
            states.append(state)
    return states


def gradient_by_lag(model: SequenceModel, u: Tensor, probes: int = 4, steps: Steps | None = None) -> Tensor:
    """(T,) how strongly the last output depends on the input of k bars earlier, k = 0 first.

    The root mean square over the batch of ‖∂y_T/∂u_{T−k}‖ (Frobenius), estimated without bias for its square by
    ``probes`` random directions of the output (Hutchinson 1990).
    """
    source = u.detach().clone().requires_grad_()
    total = torch.zeros(u.shape[1], dtype=torch.float64)
    with torch.enable_grad():
        y, _ = model(source, None, steps)
        for k in range(probes):
            generator = torch.Generator().manual_seed(k)
            signs = torch.randint(0, 2, y[:, -1].shape, generator=generator).to(y) * 2 - 1
            (grad,) = torch.autograd.grad((y[:, -1] * signs).sum(), source, retain_graph=k + 1 < probes)
            total += grad.double().square().sum(-1).mean(0).cpu()
    return (total / probes).sqrt().flip(0)


def spectral_radius(
    model: SequenceModel, state: State, u_t: Tensor, iterations: int = 60, steps: Steps | None = None
) -> Tensor:
    """(B,) largest |eigenvalue| of ∂state'/∂state at each given state and input u_t (B, F).

    Below 1 a disturbance of the state dies out, at 1 it stays, above 1 it grows. States of at most 256 numbers have
    their Jacobian written out; for larger ones it is the growth of a random vector under Jᵀ over the last half of
    ``iterations`` products, which for a window that is only shifted along falls to 0.
    """
    n, batch = state_size(state), u_t.shape[0]
    names = [k for k, v in state.items() if v.is_floating_point()]
    if not n:  # nothing is carried, so nothing can stay
        return torch.zeros(batch)
    with torch.enable_grad():
        inputs = {k: v.detach().clone().requires_grad_(k in names) for k, v in state.items()}
        _, after = model.step(u_t, dict(inputs), steps)
        flat = torch.cat([after[k].flatten(1) for k in names], dim=1)  # (B, n)
        sources = [inputs[k] for k in names]

        def product(v: Tensor) -> Tensor:
            """(B, n) v ↦ Jᵀ v of every row."""
            grads = torch.autograd.grad(flat, sources, v, retain_graph=True, allow_unused=True)
            pairs = zip(grads, sources, strict=True)
            return torch.cat([(torch.zeros_like(s) if g is None else g).flatten(1) for g, s in pairs], dim=1)

        if flat.shape[1] != n or not flat.requires_grad:  # a state that grows, or that forgets everything
            return torch.zeros(batch) if flat.shape[1] == n else torch.full((batch,), float("nan"))
        if n <= WHOLE:
            eye = torch.eye(n, dtype=flat.dtype, device=flat.device)
            rows = [product(row.expand(batch, -1)) for row in eye]
            jacobian = torch.stack(rows, dim=1).double().cpu()  # (B, n, n)
            radius: Tensor = torch.linalg.eigvals(jacobian).abs().amax(-1)
            return radius
        return _growth(product, flat, iterations)


def _growth(product: Callable[[Tensor], Tensor], like: Tensor, iterations: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(like.shape, generator=generator).to(like)
    v = v / v.norm(dim=1, keepdim=True)
    logs = []
    for _ in range(iterations):
        v = product(v)
        size = v.norm(dim=1, keepdim=True)
        logs.append(size.double().log().flatten())
        v = v / size.clamp(min=torch.finfo(v.dtype).tiny)
    return torch.stack(logs[iterations // 2 :]).mean(0).exp().cpu()


def gates(
    model: SequenceModel, u: Tensor, state: State | None = None, steps: Steps | None = None
) -> list[Gate]:
    """Statistics of every sigmoid and every decay that ``step`` takes, in the order of computation, over the valid bars of
    u (B, T, F). A decay is an exponential, or the size of a complex one, of which no number is above 1.

    A sigmoid over several gates side by side counts as one gate per ``d_out`` numbers. Empty for a model without, and
    for one whose steps do not all take the same ones: which of them are the same gate cannot be told then.
    """
    state = model.init_state(u.shape[0]) if state is None else state
    seen, per_step = _Seen(), []
    with torch.no_grad(), seen:
        for t, u_t in enumerate(u.unbind(1)):
            marks = None if steps is None else steps.at(t)
            _, state = model.step(u_t, state, marks)
            found, there = seen.take(), None if marks is None else marks.valid
            if there is None or bool(there.any()):
                per_step.append([(kind, _rows(x, there)) for kind, x in found])
    if len({tuple((kind, x.shape[-1]) for kind, x in step) for step in per_step}) > 1:
        return []
    out = []
    for values in zip(*per_step, strict=True):
        kind, stacked = values[0][0], torch.cat([x for _, x in values])  # (bars, width)
        parts = stacked.shape[-1] // model.d_out
        even = kind == "gate" and parts > 1 and stacked.shape[-1] % model.d_out == 0
        for part in stacked.chunk(parts, dim=-1) if even else [stacked]:
            flat = part.double()
            low, high = torch.quantile(
                flat.flatten()[:: max(1, flat.numel() // 2**20)], torch.tensor([0.05, 0.95]).double()
            )
            out.append(
                Gate(
                    kind=kind,
                    width=part.shape[-1],
                    mean=float(flat.mean()),
                    closed=float((flat < 0.05).double().mean()),
                    open=float((flat > 0.95).double().mean()),
                    low=float(low),
                    high=float(high),
                )
            )
    return out


def _rows(x: Tensor, there: Tensor | None) -> Tensor:
    """(rows, width), without the rows of series whose bar is missing."""
    if there is not None and x.ndim > 1 and len(x) == len(there):
        x = x[there]
    return x.flatten(0, -2) if x.ndim > 1 else x.view(1, -1)


class _Seen(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes every sigmoid and every decay that torch computes while it is entered."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[tuple[str, Tensor]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.sigmoid, torch.ops.aten.sigmoid_):
            self.found.append(("gate", result.detach().clone()))
        elif func.overloadpacket in (torch.ops.aten.exp, torch.ops.aten.exp_):
            size = result.detach().abs()
            if size.numel() and bool((size <= 1).all()):
                self.found.append(("decay", size))
        return result

    def take(self) -> list[tuple[str, Tensor]]:
        """What was noted since the last time."""
        found, self.found = self.found, []
        return found
