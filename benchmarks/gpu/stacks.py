"""Sequence models on a CUDA machine: training speed, half precision, decoding with a long context.

Self-contained: it needs torch and the package, writes one JSON document to the file named by ``--json``, and exits
with code 3 and one line where there is no GPU. ``--cpu`` runs every line of it there in a tiny size, so that a GPU
that is there for minutes is not met by a slip of the pen.

1. training tokens/s of every model of the registry at equal width, float32 and bfloat16 autocast: the block models as
   stacks of equal depth, the others with one layer;
2. loss curves of the hybrid on an invented task (recall of a value shown earlier), bfloat16 against float32;
3. decoding: 1,024 steps after a context of 65,536, the hybrid against attention and feed-forward layers of equal
   width and depth; the largest batch that fits is searched for each, because the gain is memory for keys and values.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from recur.models.attention import AttentionMixer
from recur.models.interface import State
from recur.models.registry import MODELS, table_core
from recur.models.residual import Stack, nemotron_pattern

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def patterns(layers: int) -> dict[str, str]:
    return {
        "mamba": "S-" * (layers // 2),
        "mamba2": "M-" * (layers // 2),
        "attention": "*-" * (layers // 2),
        "hybrid": nemotron_pattern(layers),
    }


def build(pattern: str, width: int, context: int, d_in: int = 16) -> Stack:
    torch.manual_seed(0)
    made = Stack(d_in, width, pattern)
    for mixer in made.mixers:
        if isinstance(mixer, AttentionMixer):
            mixer.context = context
    return made.to(DEVICE)


def of_name(name: str, width: int, layers: int, context: int) -> nn.Module:
    """The block models in ``layers`` layers, every other model in one."""
    if name in patterns(layers):
        return build(patterns(layers)[name], width, context)
    torch.manual_seed(0)
    made = table_core(name).make(16, width, 1, 0.0)
    assert isinstance(made, nn.Module)
    return made.to(DEVICE)


def wait() -> None:
    """Until the device has done what it was given."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def forget_peak() -> None:
    """Give cached memory back and begin the peak anew."""
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gib() -> float:
    return torch.cuda.max_memory_allocated() / 2**30 if DEVICE.type == "cuda" else 0.0


def half_precision(enabled: bool) -> torch.autocast:
    return torch.autocast(DEVICE.type, torch.bfloat16, enabled=enabled)


def seconds(job: Callable[[], object], rounds: int, budget: float = 10.0) -> float:
    """Median wall time of one call, the device waited for; fewer than ``rounds`` calls where they take more seconds
    than ``budget``."""
    taken: list[float] = []
    for turn in range(rounds + 2):
        wait()
        start = time.perf_counter()
        job()
        wait()
        if turn >= 2:
            taken.append(time.perf_counter() - start)
        if sum(taken) > budget:
            break
    return sorted(taken)[len(taken) // 2]


def training(width: int, layers: int, batch: int, length: int, rounds: int) -> dict[str, Any]:
    out: dict[str, Any] = {}
    u = torch.randn(batch, length, 16, device=DEVICE)
    for name in MODELS:
        for half in (False, True):
            model = of_name(name, width, layers, length)
            optimizer = torch.optim.AdamW(model.parameters(), fused=DEVICE.type == "cuda")

            def step(model: nn.Module = model, optimizer: Any = optimizer, half: bool = half) -> None:
                optimizer.zero_grad(set_to_none=True)
                with half_precision(half):
                    loss = model(u)[0].float().square().mean()
                torch.autograd.backward(loss)
                optimizer.step()

            forget_peak()
            taken = seconds(step, rounds)
            out[f"{name} {'bf16' if half else 'fp32'}"] = {
                "tokens_per_s": batch * length / taken,
                "peak_gib": peak_gib(),
                "parameters": sum(p.numel() for p in model.parameters()),
            }
            del model, optimizer, step
    return out


def recall_batch(batch: int, length: int, make: torch.Generator) -> tuple[Tensor, Tensor]:
    """Inputs (B, T, 16) that show one of 8 values in the first quarter and ask for it at the end; answers (B,)."""
    u = 0.1 * torch.randn(batch, length, 16, generator=make)
    answer = torch.randint(8, (batch,), generator=make)
    at = torch.randint(1, length // 4, (batch,), generator=make)
    rows = torch.arange(batch)
    u[rows, at, answer] += 2.0
    u[rows, at, 8] = 2.0
    u[:, -1, 9] = 2.0
    return u.to(DEVICE), answer.to(DEVICE)


def curves(width: int, layers: int, batch: int, length: int, updates: int) -> dict[str, list[float]]:
    """Loss of every tenth update, same seeds and same batches in both precisions."""
    out: dict[str, list[float]] = {}
    for half in (False, True):
        model = build(nemotron_pattern(layers), width, length)
        head = nn.Linear(width, 8).to(DEVICE)
        parameters = [*model.parameters(), *head.parameters()]
        optimizer, make = torch.optim.AdamW(parameters, lr=1e-3), torch.Generator().manual_seed(1)
        losses = []
        for _ in range(updates):
            u, answer = recall_batch(batch, length, make)
            optimizer.zero_grad(set_to_none=True)
            with half_precision(half):
                scores = head(model(u)[0][:, -1])
            loss = nn.functional.cross_entropy(scores.float(), answer)
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            losses.append(loss.item())
        out["bf16" if half else "fp32"] = [sum(losses[i : i + 10]) / 10 for i in range(0, updates - 9, 10)]
    return out


def full_state(model: Stack, batch: int, context: int) -> State:
    """A state as after ``context`` steps. Its values do not change what a step costs, so they are left at 0."""
    state = model.init_state(batch)
    return {k: torch.full_like(v, context) if k.endswith(".n") else v for k, v in state.items()}


def decode_rate(model: Stack, batch: int, context: int, steps: int) -> float:
    """Tokens per second of ``steps`` steps of a batch after the context."""
    u = torch.randn(batch, 16, device=DEVICE, dtype=model.in_proj.weight.dtype)
    with torch.inference_mode():
        state = full_state(model, batch, context)
        for _ in range(3):
            _, state = model.step(u, state, inplace=True)
        wait()
        start = time.perf_counter()
        for _ in range(steps):
            _, state = model.step(u, state, inplace=True)
        wait()
    return batch * steps / (time.perf_counter() - start)


def decoding(width: int, layers: int, context: int, steps: int, most: int) -> dict[str, Any]:
    """Batches 1, 2, 4 … ``most`` or as many as the memory holds."""
    out: dict[str, Any] = {}
    for name in ("hybrid", "attention"):
        model = build(patterns(layers)[name], width, context + steps).to(torch.bfloat16)
        rates: dict[int, float] = {}
        for batch in (2**k for k in range(most.bit_length())):
            forget_peak()
            try:
                decode_rate(model, batch, context, 8)
                rates[batch] = decode_rate(model, batch, context, steps)
            except torch.OutOfMemoryError:
                break
        out[name] = {"tokens_per_s_by_batch": rates, "best": max(rates.values(), default=0.0)}
        del model
    out["hybrid_over_attention"] = out["hybrid"]["best"] / max(out["attention"]["best"], 1e-9)
    return out


@dataclass(frozen=True, slots=True)
class Sizes:
    width: int
    layers: int
    batch: int
    length: int
    rounds: int
    updates: int
    context: int
    steps: int
    most: int
    """Largest batch of the decoding."""


SIZES = {
    "full": Sizes(512, 24, 8, 2048, 10, 600, 65_536, 1024, 1024),
    "quick": Sizes(128, 12, 8, 512, 3, 50, 4096, 64, 1024),
    "cpu": Sizes(32, 6, 2, 70, 1, 20, 96, 4, 2),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="small sizes; not for quoting")
    size.add_argument("--cpu", action="store_true", help="try every line without a GPU; measures nothing")
    parser.add_argument("--json", type=Path, default=Path("gpu-stacks.json"))
    asked = parser.parse_args()
    if DEVICE.type != "cuda" and not asked.cpu:
        print("No CUDA device: this benchmark needs one; nothing was measured.", file=sys.stderr)
        return 3
    s = SIZES["cpu" if asked.cpu else "quick" if asked.quick else "full"]
    out: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "sizes": asdict(s),
    }
    parts: dict[str, Callable[[], Any]] = {
        "training": lambda: training(s.width, s.layers, s.batch, s.length, s.rounds),
        "curves": lambda: curves(min(s.width, 128), min(s.layers, 12), 8 * s.batch, s.length // 8, s.updates),
        "decoding": lambda: decoding(s.width, s.layers, s.context, s.steps, s.most),
    }
    for name, part in parts.items():
        out[name] = part()
        asked.json.write_text(json.dumps(out, indent=2) + "\n")
        print(f"{name}: {json.dumps(out[name])}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
