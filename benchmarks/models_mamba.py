"""Mamba-2 and its neighbours beside public implementations on a CPU: training, memory, steps, growth with length.

Peers: ``Mamba2Mixer`` and ``mamba2_chunk_scan`` of transformers (plain torch path), mambapy's parallel scan, and the
short listing of the Mamba-2 paper written out in ``mamba_peers.py``, which stands for the minimal implementations
that no package index carries. Ratios of times are taken between jobs that took turns in one process; both sides run
with freed memory kept (``models/allocator.py``). With OMP_NUM_THREADS=1 the times are CPU times of the process, which
other load on the machine disturbs less than wall time; with more threads they are wall times of an idle machine.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from common import Results, goal, main, show
from mamba_peers import ListingMixer, listing, mambapy_block, transformers_core, transformers_mixer
from torch import Tensor, nn

from recur.models import ssd as ssd_module
from recur.models.allocator import keep_freed_memory
from recur.models.mamba import MambaMixer
from recur.models.mamba2 import Mamba2Mixer
from recur.models.registry import MODELS, table_core
from recur.models.residual import Attention, Mamba, Mamba2, Stack
from recur.models.ssd import ssd

WIDTH, STATE, HEAD, BATCH = 64, 64, 64, 64
Job = Callable[[], object]
COMPILER = any(map(shutil.which, ("g++", "clang++")))


def interleaved(jobs: dict[str, Job], rounds: int, warm: int = 1) -> dict[str, float]:
    """Median seconds of jobs that take turns; see above for the clock."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    taken: dict[str, list[float]] = {name: [] for name in jobs}
    for turn in range(warm + rounds):
        for name, job in jobs.items():
            start = clock()
            job()
            if turn >= warm:
                taken[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in taken.items()}


def _ours(mixer: Any) -> Callable[[Tensor], Tensor]:
    return lambda u: mixer(u, mixer.init_state(u.shape[0]))[0]


def _layers() -> dict[str, tuple[nn.Module, Callable[[Tensor], Tensor]]]:
    """Layers of equal width and equal weights where they are the same function; absent peers say so."""
    torch.manual_seed(0)
    ours = Mamba2Mixer(WIDTH, STATE, HEAD)
    made: dict[str, tuple[nn.Module, Callable[[Tensor], Tensor]]] = {"recur Mamba-2": (ours, _ours(ours))}
    for chunk in (32, 64):
        plain = ListingMixer(WIDTH, STATE, HEAD, chunk)
        plain.load_state_dict(ours.state_dict())
        made[f"paper listing, Q {chunk}"] = (plain, plain)
    theirs = transformers_mixer(WIDTH, STATE, HEAD, 64)
    if theirs is None:
        print("transformers is not installed: its Mamba2Mixer is left out")
    else:
        theirs.load_state_dict(ours.state_dict())
        made["transformers Mamba2Mixer"] = (theirs, theirs)
    first = MambaMixer(WIDTH)
    made["recur Mamba"] = (first, _ours(first))
    block = mambapy_block(WIDTH)
    if block is None:
        print("mambapy is not installed: its parallel scan is left out")
    else:
        block.load_state_dict(first.state_dict())
        made["mambapy Mamba, pscan"] = (block, block)
    return made


def _train(module: nn.Module, run: Callable[[Tensor], Tensor], u: Tensor, dy: Tensor) -> Job:
    optimizer = torch.optim.AdamW(module.parameters())

    def step() -> None:
        optimizer.zero_grad()
        u.grad = None
        torch.autograd.backward(run(u), dy)
        optimizer.step()

    return step


def _ratio(taken: dict[str, float], ours: str, peers: tuple[str, ...]) -> float:
    return min(v for k, v in taken.items() if k.startswith(peers)) / taken[ours]


def train_step(length: int, rounds: int) -> Results:
    u, dy = torch.randn(BATCH, length, WIDTH, requires_grad=True), torch.randn(BATCH, length, WIDTH)
    layers = _layers()
    if length > 256:
        layers.pop("mambapy Mamba, pscan", None)  # gigabytes of saved values
    taken = interleaved({k: _train(*v, u, dy) for k, v in layers.items()}, rounds)
    ratio, tokens = _ratio(taken, "recur Mamba-2", ("paper", "transformers")), BATCH * length / 1000
    show(
        f"Training step of one layer, B {BATCH} L {length} d {WIDTH} N {STATE} (Mamba: N 16)",
        ("", "ms", "ktok/s", "time / ours", "goal"),
        [
            (
                k,
                f"{1000 * s:.1f}",
                f"{tokens / s:.0f}",
                f"{s / taken['recur Mamba-2']:.2f}",
                goal(round(ratio, 2), 1.45 if length <= 256 else 2.0) if k == "recur Mamba-2" else "",
            )
            for k, s in taken.items()
        ],
    )
    out: Results = {"seconds": taken, "best_public_over_ours": ratio}
    if "mambapy Mamba, pscan" in taken:
        out["mambapy_over_ours"] = taken["mambapy Mamba, pscan"] / taken["recur Mamba"]
    return out


def core(length: int, rounds: int) -> Results:
    """The state-space dual alone, forward and backward, in both forms, on the same inputs."""
    heads = 2 * WIDTH // HEAD
    torch.manual_seed(0)
    args = [
        torch.randn(BATCH, length, heads, HEAD),
        torch.rand(BATCH, length, heads) * 0.03,
        -torch.linspace(3.0, 9.0, heads),
        torch.randn(BATCH, length, 1, STATE),
        torch.randn(BATCH, length, 1, STATE),
        torch.ones(heads),
    ]
    for a in args:
        a.requires_grad_()
    dy = torch.randn(BATCH, length, heads, HEAD)

    def job(run: Callable[[], Tensor], below: float = ssd_module.SCALED_BELOW) -> Job:
        def go() -> None:
            for a in args:
                a.grad = None
            usual, ssd_module.SCALED_BELOW = ssd_module.SCALED_BELOW, below
            try:
                torch.autograd.backward(run(), dy)
            finally:
                ssd_module.SCALED_BELOW = usual

        return go

    x, dt, A, B, C, D = args
    jobs = {
        "recur, scaled": job(lambda: ssd(x, dt, A, B, C, D)[0]),
        "recur, exact": job(lambda: ssd(x, dt, A, B, C, D)[0], 0.0),
        "paper listing, Q 32": job(lambda: listing(x, dt, A, B, C, D, 32)),
        "paper listing, Q 64": job(lambda: listing(x, dt, A, B, C, D, 64)),
    }
    theirs = transformers_core()
    if theirs is not None:
        jobs["transformers mamba2_chunk_scan"] = job(lambda: theirs(x, dt, A, B, C, 64, D=D))
    left, right, product = torch.randn(64, 64, 64), torch.randn(64, 64, 128), torch.empty(64, 64, 128)
    jobs["products"] = lambda: [torch.bmm(left, right, out=product) for _ in range(10)]
    taken = interleaved(jobs, rounds)
    rate = 10 * 2 * left.numel() * right.shape[-1] / taken.pop("products") / 1e9
    ratios = {k: _ratio(taken, k, ("paper", "transformers")) for k in ("recur, scaled", "recur, exact")}
    goals = {"recur, scaled": 2.0, "recur, exact": 1.55}
    show(
        f"State-space dual alone, forward and backward, B {BATCH} L {length}, {heads} heads of {HEAD}, N {STATE}",
        ("", "ms", "best public / this", "goal"),
        [
            (
                k,
                f"{1000 * s:.1f}",
                f"{ratios[k]:.2f}" if k in ratios else "",
                goal(round(ratios[k], 2), goals[k]) if k in ratios else "",
            )
            for k, s in taken.items()
        ],
    )
    print(f"64 products of 64 x 64 by 64 x 128 between these jobs: {rate:.0f} GFLOP/s")
    return {"seconds": taken, "best_public_over_ours": ratios, "gflops_of_products": rate}


_PEAK = """
import sys; sys.path.insert(0, {here!r})
import torch, models_mamba as m
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024
module, run = m._layers()[{name!r}]
m._train(module, run, *(torch.randn(2, 64, m.WIDTH, requires_grad=r) for r in (True, False)))()
before = peak()
u, dy = torch.randn(m.BATCH, {length}, m.WIDTH, requires_grad=True), torch.randn(m.BATCH, {length}, m.WIDTH)
m._train(module, run, u, dy)()
print(peak() - before)
"""


def memory(length: int, rounds: int) -> Results:
    """Peak of the resident size of one training step above the loaded process; a process each, stock allocator."""
    if not os.path.exists("/proc/self/status"):
        print("no /proc: peak memory is left out")
        return {}
    taken = {}
    for name in _layers():
        if length > 256 and name.startswith("mambapy"):
            continue
        code = _PEAK.format(here=os.path.dirname(os.path.abspath(__file__)), name=name, length=length)
        peaks = [
            float(
                subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
                .stdout.strip()
                .splitlines()[-1]
            )
            for _ in range(rounds)
        ]
        taken[name] = statistics.median(peaks)
    ratio = _ratio(taken, "recur Mamba-2", ("paper", "transformers"))
    show(
        f"Peak memory of one training step, B {BATCH} L {length} d {WIDTH}",
        ("", "MiB", "KiB / token", "goal"),
        [
            (
                k,
                f"{v:.0f}",
                f"{1024 * v / BATCH / length:.1f}",
                goal(round(ratio, 2), 2.3) if k == "recur Mamba-2" else "",
            )
            for k, v in taken.items()
        ],
    )
    return {"mib": taken, "best_public_over_ours": ratio}


_STOCK = """
import sys; sys.path.insert(0, {here!r})
import torch, models_mamba as m
if {keep}: m.keep_freed_memory()
u, dy = (torch.randn(m.BATCH, {length}, m.WIDTH, requires_grad=r) for r in (True, False))
module, run = m._layers()[{name!r}]
step = m._train(module, run, u, dy)
for turn in range(3): step()
print("ready", flush=True)
for line in sys.stdin:
    print(m.interleaved({{"": step}}, 1)[""], flush=True)
"""


def against_stock(length: int, rounds: int) -> Results:
    """One training step as a user meets it: ours with freed memory kept, as our training does, the public ones with the
    allocator as it is. Each runs in a process of its own, after three steps in which ours takes its memory. The processes
    take turns of two steps, of which the second counts: a slow minute of the machine strikes all of them, and none
    begins with what another one left in the cache."""
    names = [n for n in _layers() if n.startswith(("recur Mamba-2", "paper", "transformers"))]
    here, taken = os.path.dirname(os.path.abspath(__file__)), {n: [] for n in names}
    with ExitStack() as running:
        workers: dict[str, subprocess.Popen[str]] = {}
        for name in names:
            code = _STOCK.format(here=here, name=name, length=length, keep=name.startswith("recur"))
            workers[name] = running.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
                )
            )
            _answer(workers[name], "ready")
        for _ in range(rounds):
            for name, worker in workers.items():
                assert worker.stdin is not None
                worker.stdin.write("\n")
                worker.stdin.flush()
                taken[name].append(float(_answer(worker)))
    seconds = {n: statistics.median(v) for n, v in taken.items()}
    ratio = _ratio(seconds, "recur Mamba-2", ("paper", "transformers"))
    show(
        f"The same in processes of their own, the public ones with the allocator as it is, L {length}",
        ("", "ms", "time / ours", "goal"),
        [
            (
                k,
                f"{1000 * s:.1f}",
                f"{s / seconds['recur Mamba-2']:.2f}",
                goal(round(ratio, 2), 4.0) if k == "recur Mamba-2" else "",
            )
            for k, s in seconds.items()
        ],
    )
    return {"seconds": seconds, "best_public_over_ours": ratio}


def _answer(worker: subprocess.Popen[str], expected: str = "") -> str:
    """The next line of a worker; imports may print lines of their own before ``expected``."""
    assert worker.stdout is not None
    for line in worker.stdout:
        if not expected or line.strip() == expected:
            return line
    raise RuntimeError(f"a layer's process ended early, exit code {worker.wait()}")


def stepping(symbols: int, rounds: int) -> Results:
    """One bar of every symbol with the state carried, without gradients."""
    layers = _layers()
    ours, plain = layers["recur Mamba-2"][0], layers["paper listing, Q 64"][0]
    assert isinstance(ours, Mamba2Mixer) and isinstance(plain, ListingMixer)
    u = torch.randn(symbols, WIDTH)
    held: dict[str, Any] = {
        "recur": ours.init_state(symbols),
        "compiled": ours.init_state(symbols),
        "in place": ours.init_state(symbols),
        "compiled in place": ours.init_state(symbols),
        "plain": (
            torch.zeros(symbols, 2 * WIDTH + 2 * STATE, 4),
            torch.zeros(symbols, 2 * WIDTH // HEAD, HEAD, STATE),
        ),
    }

    def eager() -> None:
        with torch.no_grad():
            _, held["recur"] = ours.step(u, held["recur"])

    def over() -> None:
        with torch.no_grad():
            _, held["in place"] = ours.step(u, held["in place"], inplace=True)

    def public() -> None:
        with torch.no_grad():
            _, *held["plain"] = plain.step(u, *held["plain"])

    window = torch.randn(symbols, 256, WIDTH)

    def again() -> None:
        with torch.no_grad():
            ours(window, ours.init_state(symbols))

    jobs: dict[str, Job] = {
        "recur, eager": eager,
        "recur, eager, in place": over,
        "paper recurrence, eager": public,
    }
    fast = torch.compile(ours.step)

    def compiled() -> None:
        with torch.no_grad():
            _, held["compiled"] = fast(u, held["compiled"])

    def compiled_over() -> None:
        with torch.no_grad():
            _, held["compiled in place"] = fast(u, held["compiled in place"], inplace=True)

    if COMPILER:
        jobs |= {"recur, compiled": compiled, "recur, compiled, in place": compiled_over}
    else:
        print("no C++ compiler: the compiled step is left out")
    taken = interleaved(jobs, rounds, warm=5)
    taken["recur, 256 bars again"] = interleaved({"again": again}, max(3, rounds // 20))["again"]
    base = taken["paper recurrence, eager"]
    best = min(v for k, v in taken.items() if k.startswith("recur") and "again" not in k)
    show(
        f"One bar of {symbols} symbols, d {WIDTH} N {STATE}",
        ("", "ms", "us / symbol", "paper / this", "goal"),
        [
            (
                k,
                f"{1000 * v:.2f}",
                f"{1e6 * v / symbols:.2f}",
                f"{base / v:.2f}",
                goal(round(base / v, 2), 4.0) if v == best else "",
            )
            for k, v in taken.items()
        ],
    )
    return {"seconds": taken, "paper_over_ours": base / best}


def history(rounds: int) -> Results:
    """Time of one step and size of the state of every model after 1,000 and after 10,000 bars of history."""
    after, jobs, sizes = (1000, 10_000), {}, {}
    for name in MODELS:
        core = table_core(name)
        model = core.make(8, WIDTH, core.layers, 0.0)
        with torch.no_grad():
            state, held = None, {}
            for i, part in enumerate(torch.randn(1, after[1], 8).split(after[0], 1)):
                _, state = model(part, state)
                held |= {after[0]: state} if i == 0 else {after[1]: state}
        for bars, was in {0: state, **held}.items():  # whatever comes first finds nothing in the cache

            def one(model: Any = model, was: Any = was) -> None:
                with torch.no_grad():
                    model.step(torch.zeros(1, 8), was)

            jobs[f"{name} after {bars}"] = one
            sizes[f"{name} after {bars}"] = sum(v.nbytes for v in was.values())
    taken = interleaved(jobs, rounds, warm=5)
    ratios = {n: taken[f"{n} after {after[1]}"] / taken[f"{n} after {after[0]}"] for n in MODELS}
    show(
        "One step of one symbol against history",
        ("", *(f"us after {b:,}" for b in after), "ratio", *(f"state after {b:,}, bytes" for b in after)),
        [
            (
                n,
                *(f"{1e6 * taken[f'{n} after {b}']:.0f}" for b in after),
                f"{ratios[n]:.2f}",
                *(f"{sizes[f'{n} after {b}']:,}" for b in after),
            )
            for n in MODELS
        ],
    )
    return {"seconds": taken, "ratio": ratios, "bytes": sizes}


def growth(lengths: tuple[int, ...], rounds: int) -> Results:
    """Forward and backward of one layer against length, batch 4; attention looks back over everything."""
    models: dict[str, Stack] = {
        "mamba": Mamba(WIDTH, WIDTH),
        "mamba2": Mamba2(WIDTH, WIDTH),
        "attention": Attention(WIDTH, WIDTH),
    }
    models["attention"].mixers[0].context = lengths[-1]  # type: ignore[assignment]
    rates: dict[str, list[float]] = {name: [] for name in models}
    for length in lengths:
        u = torch.randn(4, length, WIDTH)
        jobs = {
            name: (lambda m=m, u=u: torch.autograd.backward(m(u)[0].sum()))  # type: ignore[misc]
            for name, m in models.items()
        }
        for name, seconds in interleaved(jobs, rounds).items():
            rates[name].append(1e6 * seconds / 4 / length)
    show(
        "Microseconds per token against length, forward and backward, batch 4",
        ("", *(str(n) for n in lengths)),
        [(name, *(f"{v:.1f}" for v in values)) for name, values in rates.items()],
    )
    return {"lengths": list(lengths), "us_per_token": rates}


def measure(quick: bool) -> Results:
    keep_freed_memory()
    rounds = 3 if quick else 9
    out: Results = {"threads": torch.get_num_threads()}
    out["train_256"] = train_step(256, rounds)
    out["train_1024"] = train_step(1024, 2 if quick else 5)
    out["stock_1024"] = against_stock(1024, 3 if quick else 15)
    out["core_256"] = core(256, rounds)
    out["core_1024"] = core(1024, 2 if quick else 5)
    out["memory_256"] = memory(256, 1 if quick else 3)
    out["memory_1024"] = memory(1024, 1 if quick else 3)
    out["step_500"] = stepping(500, 20 if quick else 200)
    out["history"] = history(20 if quick else 200)
    out["growth"] = growth((256, 1024) if quick else (256, 512, 1024, 2048, 4096, 8192), 2 if quick else 3)
    return {"models_mamba": out}


if __name__ == "__main__":
    main(measure, __doc__)
