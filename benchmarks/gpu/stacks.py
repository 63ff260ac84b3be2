"""Stacks of sequence models on a CUDA machine: training speed, half precision, decoding with a long context.

Self-contained: it needs torch and the package, writes one JSON document to the file named by ``--json``, and exits
with code 3 and one line where there is no GPU.

1. training tokens/s of every stack at equal width and depth, float32 and bfloat16 autocast;
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
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from recur.models.attention import AttentionMixer
from recur.models.interface import State
from recur.models.residual import Stack, nemotron_pattern

DEVICE = torch.device("cuda")


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


def seconds(job: Callable[[], object], rounds: int) -> float:
    """Median wall time of one call, the device waited for."""
    taken = []
    for turn in range(rounds + 2):
        torch.cuda.synchronize()
        start = time.perf_counter()
        job()
        torch.cuda.synchronize()
        if turn >= 2:
            taken.append(time.perf_counter() - start)
    return sorted(taken)[len(taken) // 2]


def training(width: int, layers: int, batch: int, length: int, rounds: int) -> dict[str, Any]:
    out: dict[str, Any] = {}
    u = torch.randn(batch, length, 16, device=DEVICE)
    for name, pattern in patterns(layers).items():
        for half in (False, True):
            model = build(pattern, width, length)
            optimizer = torch.optim.AdamW(model.parameters(), fused=True)

            def step(model: Stack = model, optimizer: Any = optimizer, half: bool = half) -> None:
                optimizer.zero_grad(set_to_none=True)
                with torch.autocast("cuda", torch.bfloat16, enabled=half):
                    loss = model(u)[0].float().square().mean()
                torch.autograd.backward(loss)
                optimizer.step()

            torch.cuda.reset_peak_memory_stats()
            taken = seconds(step, rounds)
            out[f"{name} {'bf16' if half else 'fp32'}"] = {
                "tokens_per_s": batch * length / taken,
                "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
                "parameters": sum(p.numel() for p in model.parameters()),
            }
            del model, optimizer
            torch.cuda.empty_cache()
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
            with torch.autocast("cuda", torch.bfloat16, enabled=half):
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
            _, state = model.step(u, state)
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(steps):
            _, state = model.step(u, state)
        torch.cuda.synchronize()
    return batch * steps / (time.perf_counter() - start)


def decoding(width: int, layers: int, context: int, steps: int) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name in ("hybrid", "attention"):
        model = build(patterns(layers)[name], width, context + steps).to(torch.bfloat16)
        rates: dict[int, float] = {}
        batch = 1
        while True:
            try:
                decode_rate(model, batch, context, 8)
                rates[batch] = decode_rate(model, batch, context, steps)
            except torch.OutOfMemoryError:
                break
            batch *= 4
            if batch > 1024:
                break
        torch.cuda.empty_cache()
        out[name] = {"tokens_per_s_by_batch": rates, "best": max(rates.values(), default=0.0)}
        del model
        torch.cuda.empty_cache()
    out["hybrid_over_attention"] = out["hybrid"]["best"] / max(out["attention"]["best"], 1e-9)
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes; not for quoting")
    parser.add_argument("--json", type=Path, default=Path("gpu-stacks.json"))
    asked = parser.parse_args()
    if not torch.cuda.is_available():
        print("No CUDA device: this benchmark needs one; nothing was measured.", file=sys.stderr)
        return 3
    width, layers, quick = (128, 12, True) if asked.quick else (512, 24, False)
    out: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "width": width,
        "layers": layers,
    }
    parts: dict[str, Callable[[], Any]] = {
        "training": lambda: training(width, layers, 8, 512 if quick else 2048, 3 if quick else 10),
        "curves": lambda: curves(128, 12, 64, 256, 50 if quick else 600),
        "decoding": lambda: decoding(width, layers, 4096 if quick else 65_536, 64 if quick else 1024),
    }
    for name, part in parts.items():
        out[name] = part()
        asked.json.write_text(json.dumps(out, indent=2) + "\n")
        print(f"{name}: {json.dumps(out[name])}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
