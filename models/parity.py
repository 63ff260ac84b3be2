"""The proof that every model must give: its ways of running agree.

Whole sequence, step by step, in any pieces with the state carried, restarted in the middle, over missing bars, with bars
that took their own times, with all of these marks at once and another pattern in every series, each series alone, in
training, in single precision: many ways to compute the same numbers, and the same gradients. The check draws its weights
and inputs from a seed of its own and leaves the global generator as it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from recur.models.interface import SequenceModel, State, Steps
from recur.vocabulary import RecurError

BATCH = 3
LONG, SHORT = 300, 41
CUTS = (1, 16, 17, 40, 200)  # where a sequence is cut into uneven pieces
SINGLE = 1e-4
"""What single precision may differ from double, relative to the largest output."""


class ParityError(RecurError):
    """A model that cannot be run, or whose ways of running disagree."""


@dataclass(frozen=True, slots=True)
class ParityReport:
    """Largest absolute difference of outputs, then and afterwards, in each comparison, and what was tolerated. In double
    precision but for ``single``, over 300 steps in the first two comparisons, over 41 in the others."""

    steps: float
    """``step`` over all bars against ``forward`` over the whole."""
    pieces: float
    """``forward`` over uneven pieces with carried state against the whole."""
    reset: float
    """A reset in the middle, at a bar that is there or at a missing one, against two separate sequences, by ``forward``
    and by ``step``."""
    missing: float
    """Steps that are not valid against the same sequence without them, by ``forward`` and by ``step``."""
    elapsed: float
    """``step`` and uneven pieces against the whole where every step is told another elapsed time."""
    marks: float
    """The same where every series has missing steps, resets and times of its own."""
    alone: float
    """Each of those series alone against all of them together."""
    training: float
    """In training, with a dropout of 0, against evaluation."""
    gradient: float
    """Of inputs and parameters by ``forward`` against ``step``, relative to the largest where that is above 1."""
    single: float
    """Single precision, by ``forward`` and by ``step``, against double, relative to the largest output."""
    tolerance: float

    @property
    def passed(self) -> bool:
        exact = [value for name, value in self._found().items() if name != "single"]
        return _worst(*exact) <= self.tolerance and self.single <= SINGLE  # False for NaN

    def __str__(self) -> str:
        return ", ".join(f"{name} {value:.1e}" for name, value in self._found().items())

    def _found(self) -> dict[str, float]:
        return {name: value for name, value in asdict(self).items() if name != "tolerance"}


def check_parity(build: Callable[[], SequenceModel], tolerance: float = 1e-9) -> ParityReport:
    """Build a model, give it random float64 weights near its own start, and compare its ways of running.

    Raises ParityError when the model breaks the interface (shapes, state, types); a disagreement is reported, not
    raised.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build()
        if not isinstance(model, nn.Module) or not isinstance(model, SequenceModel):
            raise ParityError(
                f"{type(model).__name__} is no sequence model: expected a torch.nn.Module with d_in, d_out, init_state,"
                " forward and step."
            )
        model.double().eval()
        with torch.no_grad():
            for p in model.parameters():  # a part that begins at zero would hide its faults
                p.add_(0.05 * torch.randn_like(p))
            long = torch.randn(BATCH, LONG, model.d_in, dtype=torch.float64)
            u = long[:, :SHORT]
            _check_state("init_state", model.init_state(BATCH))
            whole = _check_pair("forward", model(long))
            _check_shapes(model, long, *whole)
            _check_unchanged(model, u)
            g = torch.Generator().manual_seed(2)
            marks = Steps(
                valid=torch.rand(u.shape[:2], generator=g) > 0.25,
                reset=torch.rand(u.shape[:2], generator=g) < 0.05,
                elapsed=0.25 + 3 * torch.rand(u.shape[:2], generator=g, dtype=u.dtype),
            )
            uneven = Steps(elapsed=marks.elapsed)
            found = {
                "steps": _far(model, _by_step(model, long, None), whole),
                "pieces": _far(model, _in_pieces(model, long, None), whole),
                "reset": _worst(_reset(model, u, there=True), _reset(model, u, there=False)),
                "missing": _missing(model, u),
                "elapsed": _all_ways(model, u, uneven),
                "marks": _all_ways(model, u, marks),
                "alone": _alone(model, u, marks),
                "training": float((model.train()(u)[0] - model.eval()(u)[0]).abs().max()),
            }
        gradient = _gradient(model, u)
        with torch.no_grad():
            return ParityReport(**found, gradient=gradient, single=_single(model, u), tolerance=tolerance)


def _check_pair(source: str, result: object) -> tuple[Tensor, State]:
    if not isinstance(result, tuple) or len(result) != 2 or not isinstance(result[0], Tensor):
        raise ParityError(
            f"{source} gave {type(result).__name__}, expected the pair of a tensor and a state."
        )
    return result


def _check_state(source: str, state: State) -> None:
    if not isinstance(state, dict) or not all(
        isinstance(v, Tensor) and v.ndim and len(v) == BATCH for v in state.values()
    ):
        raise ParityError(f"The state of {source} is not a dict of tensors with the batch first.")


def _check_shapes(model: SequenceModel, u: Tensor, y: Tensor, state: State) -> None:
    if y.shape != (BATCH, u.shape[1], model.d_out):
        raise ParityError(f"forward gave {tuple(y.shape)}, expected {(BATCH, u.shape[1], model.d_out)}.")
    _check_state("forward", state)
    fresh = model.init_state(BATCH)
    if set(fresh) != set(state):
        raise ParityError(f"init_state has the parts {sorted(fresh)}, forward gave {sorted(state)}.")
    one, _ = _check_pair("step", model.step(u[:, 0], fresh))
    if one.shape != (BATCH, model.d_out):
        raise ParityError(f"step gave {tuple(one.shape)}, expected {(BATCH, model.d_out)}.")


def _check_unchanged(model: SequenceModel, u: Tensor) -> None:
    """Whoever holds a state may go on from it twice: a model must not write into the one that it is given."""
    _, state = model(u)
    before = {name: part.clone() for name, part in state.items()}
    runs: dict[str, Callable[[], object]] = {
        "forward": lambda: model(u, state),
        "step": lambda: model.step(u[:, 0], state),
    }
    for source, run in runs.items():
        run()
        if set(state) != set(before) or not all(
            torch.equal(part.nan_to_num(), before[name].nan_to_num()) for name, part in state.items()
        ):
            raise ParityError(
                f"{source} changes the state that it is given: the next one must be new tensors."
            )


def _far(model: SequenceModel, a: tuple[Tensor, State], b: tuple[Tensor, State]) -> float:
    """Largest difference of outputs, there and over further bars from both states; NaN when one is not finite.

    States are compared by what follows from them: two caches may hold the same past in another order.
    """
    more = torch.randn(BATCH, 8, model.d_in, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gaps = [(a[0] - b[0]).abs().max(), (model(more, a[1])[0] - model(more, b[1])[0]).abs().max()]
    return float(torch.stack(gaps).max())


def _worst(*gaps: float) -> float:
    """The largest, NaN when one is: ``max`` would keep what it met before a NaN."""
    return math.nan if any(math.isnan(gap) for gap in gaps) else max(gaps)


def _by_step(model: SequenceModel, u: Tensor, marks: Steps | None) -> tuple[Tensor, State]:
    state, out = model.init_state(u.shape[0]), []
    for t in range(u.shape[1]):
        y, state = model.step(u[:, t], state, None if marks is None else marks.at(t))
        out.append(y)
    return torch.stack(out, 1), state


def _in_pieces(model: SequenceModel, u: Tensor, marks: Steps | None) -> tuple[Tensor, State]:
    state, out, low = model.init_state(u.shape[0]), [], 0
    for high in (*(c for c in CUTS if c < u.shape[1]), u.shape[1]):
        y, state = model(u[:, low:high], state, None if marks is None else marks.slice(low, high))
        out.append(y)
        low = high
    return torch.cat(out, 1), state


def _reset(model: SequenceModel, u: Tensor, there: bool) -> float:
    """``there``: whether the bar at which the second sequence begins is valid."""
    at = 19
    here = (torch.arange(u.shape[1]) == at).expand(u.shape[0], -1)
    marks = Steps(reset=here) if there else Steps(reset=here, valid=~here)
    first, _ = model(u[:, :at])
    second, end = model(u[:, at if there else at + 1 :])
    gone = first.new_zeros(len(u), 0 if there else 1, model.d_out)
    apart = torch.cat([first, gone, second], 1), end
    return _worst(_far(model, model(u, None, marks), apart), _far(model, _by_step(model, u, marks), apart))


def _missing(model: SequenceModel, u: Tensor) -> float:
    """Without ``elapsed`` a missing step takes no time at all, so leaving it out must change nothing."""
    valid = torch.ones(u.shape[1], dtype=torch.bool)
    valid[[0, 7, 8, 9, 30]] = False
    marks = Steps(valid=valid.expand(u.shape[0], -1))
    y, end = model(u[:, valid])
    full = u.new_zeros(u.shape[0], u.shape[1], model.d_out)
    full[:, valid] = y
    spoiled = torch.where(valid[:, None], u, torch.full_like(u, math.nan))
    found = _far(model, model(spoiled, None, marks), (full, end))
    return _worst(found, _far(model, _by_step(model, spoiled, marks), (full, end)))


def _all_ways(model: SequenceModel, u: Tensor, marks: Steps) -> float:
    """Models of continuous time move with the elapsed time, all others must not mind."""
    whole = model(u, None, marks)
    found = _far(model, _by_step(model, u, marks), whole)
    return _worst(found, _far(model, _in_pieces(model, u, marks), whole))


def _alone(model: SequenceModel, u: Tensor, marks: Steps) -> float:
    """A series must not notice who else is in the batch."""
    whole, _ = model(u, None, marks)
    gaps = []
    for b in range(len(u)):
        own = (None if m is None else m[b : b + 1] for m in (marks.valid, marks.reset, marks.elapsed))
        gaps.append(float((model(u[b : b + 1], None, Steps(*own))[0][0] - whole[b]).abs().max()))
    return _worst(*gaps)


def _gradient(model: nn.Module, u: Tensor) -> float:
    """What training follows must be the slope of what production computes."""
    weight = torch.randn(BATCH, u.shape[1], model.d_out, dtype=u.dtype)  # type: ignore[call-overload]
    slopes = []
    for run in (model, lambda x: _by_step(model, x, None)):  # type: ignore[arg-type]
        x = u.clone().requires_grad_()
        sources = [x, *(p for p in model.parameters() if p.requires_grad)]
        total = (run(x)[0] * weight).sum()
        if not total.requires_grad:
            raise ParityError(f"The output of {type(model).__name__} has no gradient.")
        slopes.append(torch.autograd.grad(total, sources, allow_unused=True, materialize_grads=True))
    gaps = [(a - b).abs().max() / b.abs().max().clamp(min=1) for a, b in zip(*slopes, strict=True)]
    return _worst(*(float(gap) for gap in gaps))


def _single(model: nn.Module, u: Tensor) -> float:
    """Leaves the model in single precision."""
    exact = model(u)[0]
    single: SequenceModel = model.float()  # type: ignore[assignment]
    gaps = [y.double() - exact for y in (single(u.float())[0], _by_step(single, u.float(), None)[0])]
    return float(torch.stack(gaps).abs().max() / exact.abs().max().clamp(min=1e-300))
