"""Stacks of Mamba, Mamba-2, attention and feed-forward layers as one recurrence."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from recur.models.attention import AttentionMixer
from recur.models.interface import SequenceModel, State, Steps
from recur.models.parity import check_parity
from recur.models.registry import model_label, table_core
from recur.models.residual import Attention, FeedForward, Hybrid, Mamba, Mamba2, Stack, nemotron_pattern
from recur.models.steps import scan_steps
from recur.vocabulary import UsageError
from tests.parity import largest

MODELS = {"mamba": Mamba, "mamba2": Mamba2, "attention": Attention, "hybrid": Hybrid}
LAYERS = {"mamba": 2, "mamba2": 2, "attention": 2, "hybrid": 5}


def model(name: str, dtype: torch.dtype = torch.float64, context: int = 40) -> Stack:
    torch.manual_seed(1)
    made: Stack = MODELS[name](5, 8, LAYERS[name])
    for mixer in made.mixers:
        if isinstance(mixer, AttentionMixer):
            mixer.context = context
    return made.to(dtype).eval()


def inputs(length: int, batch: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(batch, length, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(
        dtype
    )


def far(a: State, b: State) -> float:
    assert a.keys() == b.keys() and a
    return largest((a[k].double() - b[k].double()).abs().max().item() for k in a)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("length", [1, 31, 32, 33, 103, 257])
def test_step_by_step_equals_the_whole_sequence(name: str, length: int) -> None:
    made, u = model(name), inputs(length)
    assert isinstance(made, SequenceModel)
    with torch.no_grad():
        whole, end = made(u)
        steps, state = scan_steps(made, u, None, None)
    assert whole.shape == (3, length, 8)
    assert (steps - whole).abs().max() < 1e-9
    assert far(state, end) < 1e-9


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=12, deadline=None)
@given(
    length=st.integers(1, 100),
    cuts=st.lists(st.integers(0, 100), max_size=3),
    seed=st.integers(0, 1000),
    gone=st.sampled_from([0.0, 0.3, 1.0]),
    begins=st.sampled_from([0.0, 0.05, 0.5]),
)
def test_any_split_with_gaps_and_beginnings_equals_the_step_by_step_run(
    name: str, length: int, cuts: list[int], seed: int, gone: float, begins: float
) -> None:
    made, u, make = model(name, context=16), inputs(length), torch.Generator().manual_seed(seed)
    marks = Steps(
        valid=torch.rand(3, length, generator=make) >= gone,
        reset=torch.rand(3, length, generator=make) < begins,
    )
    with torch.no_grad():
        _, first = made(inputs(7))
        want, end = scan_steps(made, u, first, marks)
        edges = sorted({0, length, *(min(c, length) for c in cuts)})
        state, parts = first, []
        for low, high in pairwise(edges):
            y, state = made(u[:, low:high], state, marks.slice(low, high))
            parts.append(y)
    assert (torch.cat(parts, 1) - want).abs().max() < 1e-9
    assert far(state, end) < 1e-9


@pytest.mark.parametrize("name", MODELS)
def test_padding_changes_neither_the_outputs_before_it_nor_the_state(name: str) -> None:
    made, u = model(name), inputs(60)
    valid = torch.ones(3, 60, dtype=torch.bool)
    valid[:, 41:] = False
    spoiled = torch.where(valid.unsqueeze(-1), u, torch.full_like(u, 1e3))
    with torch.no_grad():
        short, end = made(u[:, :41])
        padded, state = made(spoiled, None, Steps(valid=valid))
    assert (padded[:, :41] - short).abs().max() < 1e-12
    assert padded[:, 41:].abs().max() == 0.0
    assert far(state, end) < 1e-12


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("spoiled", [float("nan"), float("inf")])
def test_missing_steps_leave_no_trace_whatever_stands_there(name: str, spoiled: float) -> None:
    made, u = model(name), inputs(30)
    there = torch.ones(30, dtype=torch.bool)
    there[[0, 5, 6, 7, 20, 29]] = False
    y, end = made(u[:, there])
    full, last = made(
        torch.where(there[:, None], u, torch.full_like(u, spoiled)), None, Steps(valid=there.expand(3, -1))
    )
    assert (full[:, there] - y).abs().max() < 1e-9
    assert (full[:, ~there] == 0).all()
    assert far(last, end) < 1e-9
    found = torch.autograd.grad(full.square().sum(), list(made.parameters()), allow_unused=True)
    assert all(g is None or g.isfinite().all() for g in found)


@pytest.mark.parametrize("name", MODELS)
def test_a_state_is_as_large_after_a_thousand_bars_as_after_none(name: str) -> None:
    made = model(name, torch.float32)
    first = made.init_state(3)
    with torch.no_grad():
        _, last = made(inputs(1000, dtype=torch.float32))
    assert {k: (v.shape, v.dtype) for k, v in first.items()} == {
        k: (v.shape, v.dtype) for k, v in last.items()
    }
    assert all(v.shape[0] == 3 for v in last.values())


@pytest.mark.parametrize(
    ("layers", "pattern"),
    [
        (1, "M"),
        (2, "M-"),
        (3, "M*-"),
        (12, "MM-M-M*-M-M-"),
        (13, "M-M-M-M*-M-M-"),
        (24, "M-M-M-M*-M-M-M-M-M*-M-M-"),
        (52, "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-"),
    ],
)
def test_the_hybrid_has_the_published_layer_pattern(layers: int, pattern: str) -> None:
    assert nemotron_pattern(layers) == pattern


def test_the_published_8b_pattern_has_attention_at_7_18_29_and_40() -> None:
    assert [i for i, c in enumerate(nemotron_pattern(52)) if c == "*"] == [7, 18, 29, 40]


@given(st.integers(3, 400))
def test_every_depth_has_8_percent_attention_between_a_mamba_and_a_feed_forward_layer(n: int) -> None:
    made = nemotron_pattern(n)
    at = [i for i, c in enumerate(made) if c == "*"]
    assert len(made) == n and made[0] == "M" and made[-1] == "-" and len(at) == max(1, round(0.08 * n))
    assert all(made[i - 1] == "M" and made[i + 1] == "-" for i in at)
    gaps = [b - a for a, b in pairwise(at)]
    assert not gaps or max(gaps) - min(gaps) <= 2


def test_attention_equals_the_softmax_formula_within_its_context() -> None:
    torch.manual_seed(0)
    made, u = (
        AttentionMixer(16, context=6, head=4, queries_per_key=2).double(),
        torch.randn(2, 20, 16).double(),
    )
    assert (made.heads, made.kv_heads) == (4, 2)
    with torch.no_grad():
        y, _ = made(u, made.init_state(2))
        q, k, v = made._project(u)
        want = torch.zeros(2, 20, 4, 4, dtype=torch.float64)
        for t in range(20):
            s = slice(max(0, t - 5), t + 1)
            for h in range(4):
                score = torch.einsum("bd,bsd->bs", q[:, t, h], k[:, s, h // 2]) / 2.0
                want[:, t, h] = torch.einsum("bs,bsd->bd", score.softmax(-1), v[:, s, h // 2])
        assert (y - made.out_proj(want.flatten(2))).abs().max() < 1e-12


def test_the_feed_forward_layer_is_a_squared_rectifier_without_gate_or_bias() -> None:
    made, u = FeedForward(4), torch.randn(3, 4)
    want = torch.clamp(u @ made.up.weight.T, min=0) ** 2 @ made.out_proj.weight.T
    assert torch.allclose(made(u, {})[0], want, atol=1e-6)
    assert {n: tuple(p.shape) for n, p in made.named_parameters()} == {
        "up.weight": (16, 4),
        "out_proj.weight": (4, 16),
    }


def test_output_projections_begin_smaller_with_depth_and_dropout_acts_in_training_only() -> None:
    torch.manual_seed(3)
    one, nine = (Stack(4, 64, "-" * n).mixers[0] for n in (1, 9))
    assert isinstance(one, FeedForward) and isinstance(nine, FeedForward)
    assert (one.out_proj.weight.std() / nine.out_proj.weight.std()).item() == pytest.approx(3.0, rel=0.05)
    made, u = Stack(5, 8, "M", dropout=0.5), inputs(9, dtype=torch.float32)
    assert not torch.equal(made(u)[0], made(u)[0])
    made.eval()
    assert torch.equal(made(u)[0], made(u)[0])


def test_a_name_may_spell_the_layers_of_a_hybrid() -> None:
    core = table_core("hybrid:M-M*-S")
    made = core.make(5, 8, core.layers, 0.0)
    assert isinstance(made, Stack)
    assert (made.pattern, core.layers, core.continuous) == ("M-M*-S", 6, False)
    assert check_parity(lambda: core.make(5, 8, 0, 0.0)).passed
    assert model_label("hybrid:M-M*-S") == "hybrid:M-M*-S"


def test_a_hybrid_has_attention_where_nobody_asks_for_a_number_of_layers() -> None:
    core = table_core("hybrid")
    assert core.layers == 13
    assert nemotron_pattern(core.layers) == "M-M-M-M*-M-M-"


@pytest.mark.parametrize(
    ("name", "expected"),
    [("hybrid:", "found ''"), ("hybrid:M-X", "found 'M-X'"), ("gru:M-", "Unknown model")],
)
def test_a_name_that_spells_no_layers_is_refused(name: str, expected: str) -> None:
    with pytest.raises(UsageError, match=expected):
        table_core(name)


def test_an_unknown_layer_and_a_hybrid_without_layers_are_refused() -> None:
    with pytest.raises(UsageError, match="found 'M-x'"):
        Stack(4, 8, "M-x")
    with pytest.raises(UsageError, match="at least 1 layer, not 0"):
        Hybrid(4, 8, 0)


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_stays_near_float32_in_sequence_and_steps(autocast: bool) -> None:
    torch.manual_seed(4)
    made, u = Stack(5, 32, "M-*-S").eval(), inputs(40, dtype=torch.float32)
    with torch.no_grad():
        exact, _ = made(u)
        if not autocast:
            made, u = made.to(torch.bfloat16), u.to(torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            whole, state = made(u)
            steps, _ = scan_steps(made, u, None, None)
    assert state["0.ssm"].dtype == state["4.ssm"].dtype == torch.float32
    for y in (whole, steps):
        assert (y.float() - exact).abs().max() < 0.05 * exact.abs().max()


def test_a_narrow_layer_has_eight_heads_and_a_wide_one_the_published_width() -> None:
    heads = {
        width: len(dict(Mamba2(4, width).named_parameters())["mixers.0.D"]) for width in (32, 64, 256, 512)
    }
    assert heads == {32: 8, 64: 8, 256: 8, 512: 16}
