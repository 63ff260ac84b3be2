"""Which model can remember what: copy, selective copy, a sum at lag 500, and time that is not regular.

Every model of the registry has the same width, steps, batch and learning rate, and a linear read-out. A task counts as
solved at 95 % (accuracy, or share of variance explained) on fresh examples; training stops early at 99 %.

- copy (Hochreiter & Schmidhuber 1997; Arjovsky et al. 2016): four symbols, sixty blanks, then recall in order.
- selective copy (Gu & Dao 2023, arXiv:2312.00752): the four symbols stand at random places among the blanks.
- sum at lag 500 (the adding problem): the sum of two marked numbers, the first of them 500 bars before the answer.
- irregular time: a damped oscillator kicked at irregular instants; the elapsed time is an input of every model and
  moves the state of the continuous ones. Scored on the gaps of training, and on gaps three times as long.

Beside them the gradient of the last output at lag 200, untrained, relative to that at lag 0.

``python benchmarks/memory.py [--models gru,lstm] [--seeds 3] [--out FOLDER]``: one JSON per model, task and seed,
those that are there are not computed again. ``--table`` prints the table of what is there.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from recur.models.interface import SequenceModel, Steps
from recur.models.probes import gradient_by_lag
from recur.models.registry import MODELS, table_core

WIDTH, BATCH, STEPS, LR, EVERY = 32, 32, 1500, 5e-3, 100
LAYERS = {"hybrid": 5}
"""Every other model has two; in five, M-M*-, two are of Mamba-2 and one of attention."""
SOLVED, ENOUGH = 0.95, 0.99
SYMBOLS, RECALLED, DELAY, LAG = 4, 4, 60, 500


@dataclass(frozen=True, slots=True)
class Examples:
    """``u`` (B, T, F); ``target`` (B, K) symbols or numbers for the last K bars; ``elapsed`` (B, T) or None."""

    u: Tensor
    target: Tensor
    elapsed: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Task:
    """``draw(batch, generator)`` gives examples; ``outputs`` 1 is regression, more are that many symbols."""

    draw: Callable[[int, torch.Generator], Examples]
    inputs: int
    outputs: int


def _recall(batch: int, g: torch.Generator, scattered: bool) -> Examples:
    symbols = torch.randint(0, SYMBOLS, (batch, RECALLED), generator=g)
    length = RECALLED + DELAY + RECALLED
    ids = torch.full((batch, length), SYMBOLS)  # the blank
    if scattered:
        at = torch.rand(batch, RECALLED + DELAY - 1, generator=g).argsort(1)[:, :RECALLED].sort(1).values
    else:
        at = torch.arange(RECALLED).expand(batch, -1)
    ids.scatter_(1, at, symbols)
    ids[:, -RECALLED:] = SYMBOLS + 1  # the cue, once per symbol to be recalled
    return Examples(nn.functional.one_hot(ids, SYMBOLS + 2).float(), symbols)


def _sum(batch: int, g: torch.Generator) -> Examples:
    values = torch.rand(batch, LAG + 1, generator=g)
    marks = torch.zeros(batch, LAG + 1)
    marks[:, 0] = 1
    marks.scatter_(1, torch.randint(1, LAG, (batch, 1), generator=g), 1.0)
    return Examples(torch.stack([values, marks], -1), (values * marks).sum(1, keepdim=True))


def _oscillator(batch: int, g: torch.Generator, stretch: float, bars: int = 100) -> Examples:
    """z' = (−1/τ + iω) z between kicks, τ = 12 and a period of 15; the target is Re z after the last kick."""
    elapsed = stretch * (0.1 - torch.rand(batch, bars, generator=g).clamp(min=1e-6).log())
    kicks = torch.randn(batch, bars, generator=g)
    z = torch.zeros(batch, dtype=torch.complex64)
    rate = torch.tensor(complex(-1 / 12, 2 * torch.pi / 15))
    out = []
    for t in range(bars):
        z = z * torch.exp(rate * elapsed[:, t]) + kicks[:, t]
        out.append(z.real)
    u = torch.stack([kicks, elapsed.log()], -1)
    return Examples(u, torch.stack(out, 1)[:, 20:], elapsed)


TASKS = {
    "copy": Task(lambda b, g: _recall(b, g, False), SYMBOLS + 2, SYMBOLS),
    "selective copy": Task(lambda b, g: _recall(b, g, True), SYMBOLS + 2, SYMBOLS),
    "sum at lag 500": Task(_sum, 2, 1),
    "irregular time": Task(lambda b, g: _oscillator(b, g, 1.0), 2, 1),
}
SHIFTED = "irregular, gaps x3"
COLUMNS = (*TASKS, SHIFTED)


class Net(nn.Module):
    """The model and a linear read-out of its last bars."""

    def __init__(self, name: str, task: Task) -> None:
        super().__init__()
        core = table_core(name)
        self.continuous = core.continuous
        self.core: SequenceModel = core.make(task.inputs, WIDTH, LAYERS.get(name, 2), 0.0)
        self.read = nn.Linear(WIDTH, task.outputs)

    def forward(self, examples: Examples) -> Tensor:
        """(B, K, outputs)"""
        timed = self.continuous and examples.elapsed is not None
        y, _ = self.core(examples.u, None, Steps(elapsed=examples.elapsed) if timed else None)
        read: Tensor = self.read(y[:, -examples.target.shape[1] :])
        return read


def score(net: Net, examples: Examples) -> float:
    """Accuracy, or 1 − error / variance."""
    with torch.no_grad():
        out = net(examples)
    if out.shape[-1] > 1:
        return float((out.argmax(-1) == examples.target).float().mean())
    error = (out[..., 0] - examples.target).square().mean()
    return float(1 - error / examples.target.var())


def loss_of(net: Net, examples: Examples) -> Tensor:
    out = net(examples)
    if out.shape[-1] > 1:
        return nn.functional.cross_entropy(out.flatten(0, 1), examples.target.flatten())
    return nn.functional.mse_loss(out[..., 0], examples.target)


def learn(name: str, task_name: str, seed: int, steps: int) -> dict[str, Any]:
    """Train one model on one task; its score on 512 fresh examples, and the steps and seconds it took."""
    torch.manual_seed(seed)
    task = TASKS[task_name]
    net = Net(name, task)
    fresh, held_out = torch.Generator().manual_seed(1000 + seed), torch.Generator().manual_seed(7)
    test = task.draw(512, held_out)
    optimizer = torch.optim.AdamW(net.parameters(), lr=LR, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=steps, pct_start=0.05)
    start, taken, reached = time.perf_counter(), 0, score(net, test)
    for taken in range(1, steps + 1):
        loss = loss_of(net, task.draw(BATCH, fresh))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if taken % EVERY == 0 and (reached := score(net, test)) >= ENOUGH:
            break
    found = {"score": reached, "steps": taken, "seconds": time.perf_counter() - start}
    if task_name == "irregular time":
        found["shifted"] = score(net, _oscillator(512, held_out, 3.0))
    return found


def untrained_gradient(name: str, lag: int = 200) -> float:
    """‖∂y_T/∂u_{T−lag}‖ over that at lag 0, of one layer (a hybrid: five) on noise, mean over three seeds (geometric)."""
    logs = []
    for seed in range(3):
        torch.manual_seed(seed)
        core = table_core(name).make(8, WIDTH, LAYERS.get(name, 1), 0.0)
        norm = gradient_by_lag(core, torch.randn(8, lag + 56, 8))
        logs.append(float((norm[lag] / norm[0]).clamp(min=1e-30).log10()))
    return float(10 ** statistics.mean(logs))


def available() -> list[str]:
    return [n for n, where in MODELS.items() if importlib.util.find_spec(where.partition(":")[0])]


def file_of(folder: Path, name: str, what: str, seed: int) -> Path:
    return folder / f"{name}--{what.replace(' ', '_')}--{seed}.json"


def table(folder: Path) -> str:
    """Markdown: mean score over seeds, solved in bold, by model and task."""
    header = ["model", *COLUMNS, "gradient at lag 200"]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for name in MODELS:
        cells = []
        for column in COLUMNS:
            task, key = ("irregular time", "shifted") if column == SHIFTED else (column, "score")
            files = sorted(folder.glob(f"{name}--{task.replace(' ', '_')}--*.json"))
            scores = [json.loads(f.read_text())[key] for f in files]
            if not scores:
                cells.append("")
                continue
            mean, best = statistics.mean(scores), max(scores)
            text = f"{round(100 * max(mean, -9.99))} %"
            cells.append(
                f"**{text}**"
                if mean >= SOLVED
                else f"{text} (best {100 * best:.0f})"
                if best >= SOLVED
                else text
            )
        if any(cells):
            gradient = file_of(folder, name, "gradient", 0)
            cells.append(f"{json.loads(gradient.read_text())['ratio']:.0e}" if gradient.exists() else "")
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", default=",".join(available()))
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("out") / "memory")
    parser.add_argument("--table", action="store_true", help="only print what is there")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    for name in [] if asked.table else asked.models.split(","):
        gradient = file_of(asked.out, name, "gradient", 0)
        if not gradient.exists():
            gradient.write_text(json.dumps({"ratio": untrained_gradient(name)}) + "\n")
        for task in asked.tasks.split(","):
            for seed in range(asked.seeds):
                path = file_of(asked.out, name, task, seed)
                if not path.exists():
                    found = learn(name, task, seed, asked.steps)
                    path.write_text(json.dumps(found) + "\n")
                    print(f"{name}, {task}, seed {seed}: {found}", flush=True)
    print(table(asked.out))


if __name__ == "__main__":
    main()
