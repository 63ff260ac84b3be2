"""The recurrent cells beside the public ones: training steps, single-precision errors, sparse wiring, streaming.

A training step is forward, backward (to the input too) and AdamW of one layer, (B, L, d) to (B, L, d). All models of a
table take turns in one process, and the figures are medians, so only ratios within a table mean something. Both sides run
with freed memory kept (``models/allocator.py``). Peers:
torch's GRU and LSTM, minGRU-pytorch, ncps, torchdiffeq; one that is not installed is left out with a line that says so.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from common import Results, goal, interleaved, main, show
from torch import Tensor, nn

from recur.models.allocator import keep_freed_memory
from recur.models.cfc import CfC
from recur.models.ctrnn import CTRNN, CTRNNRK4, CTRNNEuler
from recur.models.elman import Elman
from recur.models.gru import GRU, StandardGRU
from recur.models.lstm import LSTM
from recur.models.ltc import LTC
from recur.models.mingru import MinGRU, MinLSTM
from recur.models.scan import linear_scan
from recur.models.sparse import SparseLayer, SparseRNN
from recur.models.ssm import DiagonalSSM, RealSSM

OURS: dict[str, Any] = {
    "elman": Elman, "lstm": LSTM, "gru": GRU, "gru_standard": StandardGRU, "mingru": MinGRU, "minlstm": MinLSTM,
    "ssm": DiagonalSSM, "ssm_real": RealSSM, "ctrnn": CTRNN, "ctrnn_euler": CTRNNEuler, "ctrnn_rk4": CTRNNRK4,
    "cfc": CfC, "ltc": LTC, "sparse": SparseRNN,
}  # fmt: skip
GOALS = {("gru", 64): 1.35, ("gru", 8): 1.8, ("mingru", 64): 3.5}


def peer(module: str, package: str) -> ModuleType | None:
    try:
        return importlib.import_module(module)
    except ImportError:
        print(f"{package} is not installed and left out: pip install '.[bench]'")
        return None


class Ode(nn.Module):
    """τ dx/dt = −x + tanh(W x + U u + b), a bar at a time through torchdiffeq."""

    def __init__(self, odeint: Callable[..., Tensor], d: int, method: str) -> None:
        super().__init__()
        self.odeint, self.method = odeint, method
        self.w, self.u = nn.Linear(d, d, bias=False), nn.Linear(d, d)
        self.tau = nn.Parameter(torch.full((d,), 5.0))

    def forward(self, u: Tensor) -> Tensor:
        drive, x, out = self.u(u), u.new_zeros(u.shape[0], u.shape[2]), []
        bar = torch.tensor([0.0, 1.0])
        for now in drive.unbind(1):
            slope = lambda _, x, now=now: (torch.tanh(self.w(x) + now) - x) / self.tau
            x = self.odeint(slope, x, bar, method=self.method)[-1]
            out.append(x)
        return torch.stack(out, 1)


def peers(d: int, batch: int) -> dict[str, tuple[str, nn.Module]]:
    """Name to the one of ours it stands beside and a layer of width ``d``; the slow ones for small batches only."""
    found: dict[str, tuple[str, nn.Module]] = {
        "torch GRU": ("gru", nn.GRU(d, d, batch_first=True)),
        "torch LSTM": ("lstm", nn.LSTM(d, d, batch_first=True)),
        "torch RNN": ("elman", nn.RNN(d, d, batch_first=True)),
    }
    if (m := peer("minGRU_pytorch.minGRU", "minGRU-pytorch")) is not None:
        found |= {"minGRU-pytorch minGRU": ("mingru", m.minGRU(d))}
    if (m := peer("minGRU_pytorch.minLSTM", "minGRU-pytorch")) is not None:
        found |= {"minGRU-pytorch minLSTM": ("minlstm", m.minLSTM(d))}
    if (m := peer("ncps.torch", "ncps")) is not None:
        found |= {"ncps CfC": ("cfc", m.CfC(d, d, backbone_units=d))}
        found |= {} if batch > 8 else {"ncps LTC": ("ltc", m.LTC(d, d))}
    if batch <= 8 and (m := peer("torchdiffeq", "torchdiffeq")) is not None:
        found |= {"torchdiffeq euler": ("ctrnn_euler", Ode(m.odeint, d, "euler"))}
        found |= {"torchdiffeq rk4": ("ctrnn_rk4", Ode(m.odeint, d, "rk4"))}
    return found


def train_step(model: nn.Module, u: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters())

    def job() -> None:
        y = model(u.detach().requires_grad_())
        torch.autograd.backward((y[0] if isinstance(y, tuple) else y).sum())
        optimizer.step()
        optimizer.zero_grad()

    return job


def training(batch: int, length: int, d: int, rounds: int) -> Results:
    torch.manual_seed(0)
    u = torch.randn(batch, length, d)
    beside = peers(d, batch)
    jobs = {name: train_step(make(d, d), u) for name, make in OURS.items()}
    jobs |= {name: train_step(model, u) for name, (_, model) in beside.items()}
    seconds = interleaved(jobs, rounds)
    rows, ratios = [], {}
    for name in OURS:
        rows.append(
            (name, f"{1e3 * seconds[name]:.1f}", f"{batch * length / seconds[name] / 1e3:,.0f}", "", "")
        )
        for other, (ours, _) in beside.items():
            if ours == name:
                ratio = ratios[f"{name} / {other}"] = seconds[other] / seconds[name]
                bound = GOALS.get((name, batch))
                met = "" if bound is None else goal(ratio, bound)
                thousands = f"{batch * length / seconds[other] / 1e3:,.0f}"
                rows.append((f"  {other}", f"{1e3 * seconds[other]:.1f}", thousands, f"{ratio:.2f}", met))
    title = f"Training step, B={batch} L={length} d={d}, {torch.get_num_threads()} threads"
    show(title, ("", "ms", "k steps/s", "ours is faster by", "goal"), rows)
    return {"ms": {k: 1e3 * v for k, v in seconds.items()}, "ratios": ratios}


def errors(length: int) -> Results:
    """Largest error of float32 against float64, relative to the largest value: outputs, input and weight gradients."""
    found: Results = {}
    d, batch = 32, 4
    torch.manual_seed(0)
    u, weight = torch.randn(batch, length, d), torch.randn(batch, length, d)

    def measure(run: Callable[[Tensor], Tensor], model: nn.Module) -> list[Tensor]:
        dtype = next(model.parameters()).dtype
        x = u.to(dtype).requires_grad_()
        y = run(x)
        return [y.detach(), *torch.autograd.grad((y * weight.to(dtype)).sum(), [x, *model.parameters()])]

    def far(single: list[Tensor], double: list[Tensor]) -> list[float]:
        parts = [
            float((a.double() - b).abs().max() / b.abs().max()) for a, b in zip(single, double, strict=True)
        ]
        return [parts[0], parts[1], max(parts[2:])]

    for name in ("gru", "lstm", "mingru", "minlstm", "ssm", "ctrnn", "cfc", "ltc", "sparse"):
        model = OURS[name](d, d)
        single = measure(lambda x, m=model: m(x)[0], model)
        model.double()
        found[name] = far(single, measure(lambda x, m=model: m(x)[0], model))
    if (public := peer("minGRU_pytorch.minGRU", "minGRU-pytorch")) is not None:
        model = public.minGRU(d)

        def linear_form(x: Tensor) -> Tensor:
            candidate, gate = model.to_hidden_and_gate(x.transpose(0, 1)).chunk(2, dim=-1)
            b = torch.sigmoid(gate) * public.g(candidate)
            return linear_scan(torch.sigmoid(-gate), b, x.new_zeros(batch, d)).transpose(0, 1)

        theirs, ours = measure(model, model), measure(linear_form, model)
        model.double()
        exact = measure(linear_form, model)
        found["its equations by our scan"], found["minGRU-pytorch minGRU"] = (
            far(ours, exact),
            far(theirs, exact),
        )
    rows = [(k, *(f"{x:.0e}" for x in v)) for k, v in found.items()]
    show(f"Errors of single precision at L={length}", ("", "outputs", "input grad", "weight grad"), rows)
    return found


def wiring(widths: tuple[int, ...], rounds: int) -> Results:
    """Forward and backward of the sparse recurrence against the same one with every unit wired to every other."""
    found, rows = {}, []
    for batch in (8, 64):
        for d in widths:
            u = torch.randn(batch, 64, 16)
            layers = {"sparse": SparseLayer(16, d), "dense": _dense(d)}
            jobs = {k: (lambda m=m, u=u: torch.autograd.backward(m(u)[0].sum())) for k, m in layers.items()}
            seconds = interleaved(jobs, rounds)
            ratio = found[f"B{batch} d{d}"] = seconds["dense"] / seconds["sparse"]
            ms = (f"{1e3 * seconds[k]:.1f}" for k in ("sparse", "dense"))
            rows.append((f"B={batch} width {d}", *ms, f"{ratio:.2f}"))
    show("Sparse wiring of 32 inputs per unit, 64 steps", ("", "sparse ms", "dense ms", "ratio"), rows)
    return found


def _dense(d: int) -> SparseLayer:
    """The same layer as a single block of ``d`` units: one dense product per step."""
    layer = SparseLayer(16, d, fan_in=d)
    layer.hears, layer.block = torch.zeros(1, 1, dtype=torch.long), d
    layer.weight = nn.Parameter(torch.randn(1, 2 * d, d) / d**0.5)
    return layer


def streaming(d: int, rounds: int) -> Results:
    """One bar with the state carried, for one series and for 500, against reading a window of 256 bars again."""
    found: Results = {}
    rows = []
    with torch.no_grad():
        for name, make in OURS.items():
            model = make(d, d).eval()
            jobs: dict[str, Callable[[], object]] = {}
            for batch in (1, 500):
                u = torch.randn(batch, 256, d)
                _, state = model(u)
                jobs[f"step {batch}"] = lambda m=model, u=u[:, 0], s=state: m.step(u, s)
                jobs[f"window {batch}"] = lambda m=model, u=u: m(u)
            seconds = interleaved(jobs, rounds, warm=2)
            saved = [seconds[f"window {b}"] / seconds[f"step {b}"] for b in (1, 500)]
            found[name] = {"step_us": {str(b): 1e6 * seconds[f"step {b}"] for b in (1, 500)}, "saved": saved}
            us = (f"{1e6 * seconds[f'step {b}']:.0f}" for b in (1, 500))
            rows.append((name, *us, *(f"{x:.0f}" for x in saved)))
    header = ("", "1 series us", "500 series us", "window/step, 1", "window/step, 500")
    show(f"One new bar, width {d}", header, rows)
    return found


def growth(d: int, lengths: tuple[int, ...], rounds: int) -> Results:
    """Microseconds per step of a training step of eight sequences, by length: constant where time grows linearly."""
    jobs = {
        f"{name} {n}": train_step(OURS[name](d, d), torch.randn(8, n, d)) for name in OURS for n in lengths
    }
    seconds = interleaved(jobs, rounds)
    found = {name: [1e6 * seconds[f"{name} {n}"] / n for n in lengths] for name in OURS}
    rows = [(k, *(f"{x:.1f}" for x in v)) for k, v in found.items()]
    show("Microseconds per step of eight sequences, by length", ("", *(str(n) for n in lengths)), rows)
    return found


def measure(quick: bool) -> Results:
    keep_freed_memory()
    rounds = 2 if quick else 7
    shapes = [(8, 64, 32)] if quick else [(64, 256, 64), (8, 256, 64)]
    return {
        "models_cells": {
            "threads": torch.get_num_threads(),
            "training": {f"B{b} L{n} d{d}": training(b, n, d, rounds) for b, n, d in shapes},
            "float32": {str(n): errors(n) for n in ((256,) if quick else (256, 4096))},
            "sparse": wiring((64, 256) if quick else (64, 128, 256, 512), rounds),
            "streaming": streaming(64, 5 * rounds),
            "growth": growth(64, (256, 512) if quick else (256, 1024, 4096, 8192), 1 if quick else 3),
        }
    }


if __name__ == "__main__":
    main(measure, __doc__)
