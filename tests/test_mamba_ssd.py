"""The chunked state-space dual against its recurrence, token by token in float64."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from recur.models import ssd as ssd_module
from recur.models.ssd import CHUNK, chunk_length, fitting, ssd, ssd_step
from recur.models.ssd_pieces import by_group, by_head, piece_size, rooms, tile_of_rows
from tests.parity import largest

NAMES = ("x", "dt", "A", "B", "C", "D", "state")
LENGTHS = (1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 7, 257)


def loop(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    state: Tensor,
    segment: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """S = e^(dt A) S + dt B xᵀ, y = Cᵀ S + D x, one token and one head after the other."""
    length, h, g = x.shape[1], x.shape[2], B.shape[2]
    S = list(state.transpose(-1, -2).unbind(1))
    ys = []
    for t in range(length):
        if segment is not None:
            before = segment[:, t - 1] if t else torch.zeros_like(segment[:, 0])
            S = [s * (segment[:, t] == before)[:, None, None] for s in S]
        y = []
        for k in range(h):
            group = k // (h // g)
            S[k] = (dt[:, t, k] * A[k]).exp()[:, None, None] * S[k]
            S[k] = S[k] + dt[:, t, k, None, None] * B[:, t, group, :, None] * x[:, t, k, None, :]
            y.append(torch.einsum("bn,bnp->bp", C[:, t, group], S[k]) + D[k] * x[:, t, k])
        ys.append(torch.stack(y, 1))
    return torch.stack(ys, 1), torch.stack(S, 1).transpose(-1, -2)


def inputs(
    length: int, groups: int = 1, strong: bool = False, seed: int = 0, heads: int = 4, batch: int = 2
) -> dict[str, Tensor]:
    make = torch.Generator().manual_seed(seed)
    p, n = 6, 5

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=make, dtype=torch.float64)

    uniform = torch.rand(batch, length, heads, generator=make, dtype=torch.float64)
    return {
        "x": normal(batch, length, heads, p),
        "dt": uniform * (1.6 if strong else 0.1),
        "A": -torch.linspace(1, 16, heads, dtype=torch.float64),
        "B": normal(batch, length, groups, n),
        "C": normal(batch, length, groups, n),
        "D": normal(heads),
        "state": normal(batch, heads, p, n),
    }


def call(a: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return ssd(a["x"], a["dt"], a["A"], a["B"], a["C"], a["D"], a["state"])


def run(f: object, given_: dict[str, Tensor], segment: Tensor | None = None) -> dict[str, Tensor]:
    """Output, final state and every gradient of a random linear form of both."""
    args = {k: v.clone().requires_grad_() for k, v in given_.items()}
    y, end = f(*(args[k] for k in NAMES), segment)  # type: ignore[operator]
    make = torch.Generator().manual_seed(9)
    weights = [torch.randn(v.shape, generator=make, dtype=torch.float64).to(v.dtype) for v in (y, end)]
    torch.autograd.backward((y * weights[0]).sum() + (end * weights[1]).sum())
    out = {f"d{k}": v.grad for k, v in args.items() if v.grad is not None}
    return {"y": y.detach(), "end": end.detach(), **out}


def worst(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, float]:
    """Largest difference of each part, relative to its largest value."""
    assert ours.keys() == theirs.keys() and len(ours) == 9
    return {
        k: ((ours[k].double() - theirs[k]).abs().max() / theirs[k].abs().max().clamp(min=1e-12)).item()
        for k in ours
    }


@pytest.mark.parametrize("strong", [False, True])
@pytest.mark.parametrize("length", LENGTHS)
def test_output_state_and_all_gradients_equal_the_token_loop(length: int, strong: bool) -> None:
    given_ = inputs(length, strong=strong)
    assert largest(worst(run(ssd, given_), run(loop, given_)).values()) < 1e-12


@pytest.mark.parametrize("strong", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_every_number_of_groups_equals_the_token_loop(groups: int, strong: bool) -> None:
    given_ = inputs(71, groups, strong)
    assert largest(worst(run(ssd, given_), run(loop, given_)).values()) < 1e-12


@pytest.mark.parametrize("strong", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_sequences_that_begin_inside_a_row_equal_the_token_loop(groups: int, strong: bool) -> None:
    given_ = inputs(107, groups, strong, batch=3)
    begins = torch.zeros(3, 107, dtype=torch.long)
    begins[0, [0, 31, 32, 70]] = 1
    begins[1, [5, 6, 7, 106]] = 1
    segment = begins.cumsum(1)
    assert largest(worst(run(ssd, given_, segment), run(loop, given_, segment)).values()) < 1e-12


@pytest.mark.parametrize("strong", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_without_a_first_state_the_dual_begins_from_zeros_and_the_last_one_may_go_unused(
    groups: int, strong: bool
) -> None:
    given_ = inputs(150, groups, strong)
    parts = [given_[k].requires_grad_() for k in NAMES[:-1]]
    weight = torch.linspace(-1.0, 1.0, 150, dtype=torch.float64).view(1, -1, 1, 1)
    x, dt, A, B, C, D = parts
    expected = loop(x, dt, A, B, C, D, torch.zeros_like(given_["state"]))[0]
    got, end = ssd(x, dt, A, B, C, D)
    assert (got - expected).abs().max() < 1e-12 and end.shape == given_["state"].shape
    ours, theirs = (torch.autograd.grad((y * weight).sum(), parts) for y in (got, expected))
    for name, one, other in zip(NAMES, ours, theirs, strict=False):
        assert (one - other).abs().max() < 1e-12 * other.abs().max(), name


@pytest.mark.parametrize("size", [(1, 1), (2, 1), (3, 1), (1, 2), (1, 8), (2, 8)])
@pytest.mark.parametrize("strong", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_batch_worked_on_in_pieces_equals_the_token_loop(
    groups: int, strong: bool, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ssd_module, "piece_size", lambda *_: size)
    given_ = inputs(71, groups, strong, batch=3)
    segment = (torch.arange(71) >= torch.tensor([[30], [71], [64]])).long()
    for ends in (segment, None):
        assert (
            largest(worst(run(partial(ssd, chunk=16), given_, ends), run(loop, given_, ends)).values())
            < 1e-12
        )


def test_a_piece_has_about_the_numbers_asked_for_and_on_a_gpu_256_times_as_many() -> None:
    shape, cpu = (100, 4, 64, 2, 8, 16), torch.device("cpu")
    assert piece_size(shape, 16, True, cpu, 1 << 18) == (25, 1)
    assert piece_size(shape, 128, True, cpu, 1 << 18) == (15, 1)
    assert piece_size(shape, 16, False, cpu, 1 << 18) == (8, 1)
    assert piece_size(shape, 16, True, cpu, 1) == (1, 1)
    assert piece_size(shape, 16, True, cpu, 1 << 30) == (100, 4)
    assert piece_size(shape, 16, True, torch.device("cuda"), 1 << 12) == (100, 1)
    few = (5, 8, 64, 2, 8, 16)
    assert piece_size(few, 16, True, cpu, 1 << 18) == (5, 8)
    assert piece_size(few, 16, True, cpu, 1 << 16) == (5, 1)
    assert piece_size((5, 80, *few[2:]), 16, True, cpu, 1 << 18) == (1, 32)


def test_whole_rows_are_five_at_least_where_that_is_no_more_than_three_times_the_numbers() -> None:
    shape, cpu = (100, 4, 64, 2, 8, 16), torch.device("cpu")
    assert tile_of_rows(shape, True, cpu, 1 << 18) == 8
    assert tile_of_rows(shape, False, cpu, 1 << 18) == 5
    assert tile_of_rows(shape, True, cpu, 1 << 16) == 5
    assert tile_of_rows(shape, True, cpu, 1 << 15) == 3
    assert tile_of_rows(shape, True, cpu, 1) == 1
    assert tile_of_rows(shape, True, cpu, 1 << 30) == 100
    assert tile_of_rows(shape, True, torch.device("cuda"), 1 << 12) == 32


def test_a_piece_of_a_part_of_several_rows_is_refused_because_its_memory_has_gaps() -> None:
    with pytest.raises(ValueError, match=r"one chunk, whole rows or one row, not \(2, 2\)"):
        rooms(torch.empty(0), (3, 5, 16, 1, 2, 6), 5, False, (2, 2))


@pytest.mark.parametrize("seed", [0, 2, 4, 5, 7])
@pytest.mark.parametrize("strong", [False, True])
def test_float32_stays_within_two_millionths_of_the_float64_loop(strong: bool, seed: int) -> None:
    given_ = inputs(400, strong=strong, seed=seed)
    single = {k: v.float() for k, v in given_.items()}
    exact = run(loop, {k: v.double() for k, v in single.items()})
    off = worst(run(ssd, single), exact)
    assert off.pop("dA") < (1e-4 if strong else 1e-5)
    assert max(off.values()) < 2e-6


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_float32_holds_up_to_the_edge_of_the_scaled_form(seed: int) -> None:
    given_ = inputs(256, seed=seed, heads=1)
    given_["dt"] = torch.full_like(given_["dt"], 79.9 / CHUNK)
    given_["A"] = torch.full_like(given_["A"], -1.0)
    single = {k: v.float() for k, v in given_.items()}
    off = worst(run(ssd, single), run(loop, {k: v.double() for k, v in single.items()}))
    assert off.pop("dA") < 1e-4
    assert max(off.values()) < 2e-6


def test_the_final_state_has_memory_of_its_own() -> None:
    a = inputs(70, heads=1)
    a |= {"x": a["x"][..., :1].clone().requires_grad_(), "state": a["state"][:, :, :1].clone()}
    y, end = call(a)
    end.detach().zero_()
    torch.autograd.backward(y.sum())


def test_the_two_forms_agree_and_each_is_taken_where_it_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[bool] = []

    def spy(dt: Tensor, A: Tensor, chunk: int) -> tuple[int, bool]:
        out = fitting(dt, A, chunk)
        taken.append(out[1])
        return out

    monkeypatch.setattr(ssd_module, "fitting", spy)
    weak, strong = inputs(96), inputs(96, strong=True)
    scaled = run(ssd, weak)
    run(ssd, strong)
    monkeypatch.setattr(ssd_module, "SCALED_BELOW", 0.0)
    exact = run(ssd, weak)
    assert taken == [True, False, False]
    assert largest(worst(scaled, exact).values()) < 1e-12


@pytest.mark.parametrize(
    ("decay", "chunk", "scaled"), [(1.2, 64, True), (1.3, 32, True), (2.6, 16, True), (5.1, 32, False)]
)
def test_stronger_decay_takes_shorter_chunks_and_past_those_of_sixteen_the_exact_form(
    decay: float, chunk: int, scaled: bool
) -> None:
    a = inputs(128)
    a["dt"], a["A"] = torch.full_like(a["dt"], decay), torch.full_like(a["A"], -1.0)
    assert fitting(a["dt"], a["A"], 64) == (chunk, scaled)
    assert largest(worst(run(ssd, a), run(loop, a)).values()) < 1e-12


def test_a_chunk_that_cannot_be_halved_stays_as_it_is() -> None:
    dt, A = torch.full((1, 62, 1), 9.0), -torch.ones(1)
    assert fitting(dt[:, :15], A, 15) == (15, False)
    assert fitting(dt[:, :33], A, 33) == (33, False)
    assert fitting(dt, A, 62) == (31, False)
    assert fitting(dt[:, :40], A, 40) == (20, False)


@pytest.mark.parametrize("small", [1e-6, 1e-12])
@pytest.mark.parametrize("decay", [0.6, 1.2, 2.4, 4.8])
def test_small_upstream_gradients_keep_the_digits_of_time_steps_and_decays(
    decay: float, small: float
) -> None:
    given_ = inputs(256, heads=2, batch=4)
    given_["dt"], given_["A"] = given_["dt"] * 0.1 + decay / 8, torch.full_like(given_["A"], -8.0)

    def scaled(*given: Tensor | None) -> tuple[Tensor, Tensor]:
        y, end = call({k: v for k, v in zip(NAMES, given, strict=False) if v is not None})
        return y * small, end * small

    single = run(scaled, {k: v.float() for k, v in given_.items()})
    off = worst(single, run(scaled, given_))
    assert off.pop("dA") < 1e-4 and max(off.values()) < 4e-6


@pytest.mark.filterwarnings("ignore")
def test_between_compiled_operations_the_dual_gives_the_same_numbers() -> None:
    def doubled(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        y, end = ssd(2 * x, *rest)
        return 3 * y, end

    given_ = inputs(71, 2)
    compiled = run(torch.compile(doubled, backend="aot_eager"), given_)
    assert largest(worst(compiled, run(doubled, given_)).values()) < 1e-12


def test_marks_may_lie_in_memory_as_they_like() -> None:
    given_ = inputs(96, batch=3)
    segment = torch.zeros(96, 3, dtype=torch.long).t()
    assert largest(worst(run(ssd, given_, segment), run(ssd, given_)).values()) < 1e-13


def test_gradients_are_finite_under_a_decay_that_overflows_an_unmasked_exponential() -> None:
    given_ = {k: v.float() for k, v in inputs(64).items()}
    given_["dt"] = torch.full_like(given_["dt"], 8.0)
    given_["A"] = torch.full_like(given_["A"], -16.0)
    out = run(ssd, given_)
    assert all(bool(v.isfinite().all()) for v in out.values())
    exact = run(loop, {k: v.double() for k, v in given_.items()})
    assert (out["ddt"].double() - exact["ddt"]).abs().max() < 1e-3


@settings(max_examples=25, deadline=None)
@given(length=st.integers(1, 150), cuts=st.lists(st.integers(0, 150), max_size=4), strong=st.booleans())
def test_any_split_with_carried_state_equals_one_pass(length: int, cuts: list[int], strong: bool) -> None:
    a = inputs(length, 2, strong)
    whole, end = call(a)
    edges = sorted({0, length, *(min(c, length) for c in cuts)})
    state, parts = a["state"], []
    for low, high in pairwise(edges):
        x, dt, B, C = (a[k][:, low:high] for k in ("x", "dt", "B", "C"))
        y, state = ssd(x, dt, a["A"], B, C, a["D"], state)
        parts.append(y)
    assert (torch.cat(parts, 1) - whole).abs().max() < 1e-11
    assert (state - end).abs().max() < 1e-11


def test_a_step_equals_a_sequence_of_one_and_no_time_leaves_the_state() -> None:
    a = inputs(1, 2)
    y, end = call(a)
    one, state = ssd_step(a["x"][:, 0], a["dt"][:, 0], a["A"], a["B"][:, 0], a["C"][:, 0], a["D"], a["state"])
    assert torch.allclose(one, y[:, 0], atol=1e-13) and torch.allclose(state, end, atol=1e-13)
    a["dt"] = torch.zeros_like(a["dt"])
    assert torch.equal(call(a)[1], a["state"])


def test_a_gradient_through_the_carried_state_equals_that_of_one_pass() -> None:
    a = inputs(50)
    x = a["x"].clone().requires_grad_()

    def part(low: int, high: int, state: Tensor) -> tuple[Tensor, Tensor]:
        s = slice(low, high)
        return ssd(x[:, s], a["dt"][:, s], a["A"], a["B"][:, s], a["C"][:, s], a["D"], state)

    whole = torch.autograd.grad(part(0, 50, a["state"])[0][:, 40:].sum(), x)[0]
    _, state = part(0, 37, a["state"])
    split = torch.autograd.grad(part(37, 50, state)[0][:, 3:].sum(), x)[0]
    assert whole[:, :37].abs().max() > 1e-3
    assert torch.allclose(whole, split, atol=1e-12)


@pytest.mark.parametrize("groups", [1, 2])
def test_the_published_chunk_scan_gives_the_same_numbers(groups: int) -> None:
    theirs = pytest.importorskip("transformers.models.mamba2.modeling_mamba2")
    if not hasattr(theirs, "mamba2_chunk_scan"):
        pytest.skip("this version of transformers names its chunk scan otherwise")
    a = {k: v.float() for k, v in inputs(100, groups).items()}
    y, end = theirs.mamba2_chunk_scan(
        *(a[k] for k in ("x", "dt", "A", "B", "C")),
        32,
        D=a["D"],
        initial_states=a["state"],
        return_final_states=True,
    )
    ours, last = call(a)
    assert (ours - y).abs().max() / y.abs().max() < 1e-6
    assert (last - end).abs().max() / end.abs().max() < 1e-6


def test_chunks_are_as_long_as_they_may_be_and_leave_little_padding() -> None:
    assert [chunk_length(n, 64) for n in (1, 63, 64, 65, 96, 168, 257, 1000)] == [
        1,
        63,
        64,
        40,
        48,
        56,
        56,
        64,
    ]


def test_states_by_group_and_by_head_are_the_same_numbers() -> None:
    state = inputs(1, 2, batch=3)["state"]
    grouped = by_group(state, 2)
    assert grouped.shape == (2, 3, 5, 12)
    assert grouped[1, 2, 4, 6 + 5] == state[2, 3, 5, 4]
    assert torch.equal(by_head(grouped, 2), state)


def test_a_step_of_many_rows_equals_the_same_step_with_gradients() -> None:
    a = inputs(1, 2, batch=150)
    args = (a["x"][:, 0], a["dt"][:, 0], a["A"], a["B"][:, 0], a["C"][:, 0], a["D"], a["state"])
    y, state = ssd_step(*args)
    with torch.no_grad():
        tiled, after = ssd_step(*args)
    assert torch.allclose(tiled, y, atol=1e-14) and torch.allclose(after, state, atol=1e-14)


def test_freed_memory_is_kept_on_glibc_and_elsewhere_nothing_happens() -> None:
    code = "from recur.models.allocator import keep_freed_memory as k; import platform; "
    code += "print(k() == (platform.libc_ver()[0] == 'glibc'), k() is k())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "True"]
