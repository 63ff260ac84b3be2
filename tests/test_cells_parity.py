"""Every recurrent model computes the same whole, in pieces and one step at a time, with and without marks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from recur.models.interface import Steps
from recur.models.registry import MODELS as NAMES
from recur.models.registry import model_label, table_core
from tests.parity import (
    BATCH,
    D_OUT,
    build,
    by_step,
    gap,
    gradient_gap,
    gradients,
    in_pieces,
    inputs,
    largest,
    marks,
)

PATTERN = {"hybrid": "hybrid:MS*-"}  # one block of each kind, where two layers of a hybrid have no attention
every_model = pytest.mark.parametrize("name", [PATTERN.get(name, name) for name in NAMES], ids=model_label)


def made(name: str, layers: int = 2, dtype: torch.dtype = torch.float64) -> Any:
    return build(table_core(name).make, layers, dtype)


@every_model
@pytest.mark.parametrize("length", [1, 2, 7, 64, 257])
def test_step_by_step_equals_the_whole_with_and_without_marks(name: str, length: int) -> None:
    model, u = made(name), inputs(length)
    with torch.no_grad():
        for steps in (None, marks(length)):
            assert gap(model(u, None, steps), by_step(model, u, None, steps)) < 1e-9


@pytest.mark.full
@every_model
def test_step_by_step_equals_the_whole_over_two_thousand_steps(name: str) -> None:
    model, u = made(name), inputs(2000)
    with torch.no_grad():
        for steps in (None, marks(2000)):
            whole = model(u, None, steps)
            assert gap(whole, by_step(model, u, None, steps)) < 1e-9
            assert gap(whole, in_pieces(model, u, (1, 500, 1111, 1999), steps)) < 1e-9


@every_model
@settings(max_examples=10, deadline=None)
@given(length=st.integers(1, 90), cuts=st.lists(st.integers(1, 90), max_size=4), marked=st.booleans())
def test_any_split_with_the_state_carried_equals_the_whole(
    name: str, length: int, cuts: list[int], marked: bool
) -> None:
    model, u = made(name), inputs(length)
    steps = marks(length) if marked else None
    with torch.no_grad():
        assert gap(in_pieces(model, u, cuts, steps), model(u, None, steps)) < 1e-9


@every_model
def test_single_precision_stays_within_1e_4_of_double(name: str) -> None:
    double, single = made(name), made(name, dtype=torch.float32)
    u, steps = inputs(257), marks(257)
    with torch.no_grad():
        for marked in (None, steps):
            exact, end = double(u, None, marked)
            for y, last in (single(u.float(), None, marked), by_step(single, u.float(), None, marked)):
                assert gap((y.double(), {k: v.double() for k, v in last.items()}), (exact, end)) < 1e-4
                assert y.dtype == torch.float32


@every_model
def test_gradients_of_the_whole_equal_autograd_through_the_steps(name: str) -> None:
    model, u = made(name), inputs(40)
    for steps in (None, marks(40), Steps(reset=marks(40).reset)):
        whole = gradients(model, lambda x, s, m=steps: model(x, s, m), u)  # type: ignore[misc]
        looped = gradients(model, lambda x, s, m=steps: by_step(model, x, s, m), u)  # type: ignore[misc]
        assert largest(gradient_gap(whole, looped).values()) < 1e-9


@every_model
def test_the_gradient_passes_through_a_carried_state(name: str) -> None:
    model, u = made(name), inputs(30)
    whole = gradients(model, lambda x, s: model(x, s), u)

    def pieces(x: torch.Tensor, s: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        first, s = model(x[:, :11], s)
        second, s = model(x[:, 11:], s)
        return torch.cat([first, second], 1), s

    carried = gradients(model, pieces, u)
    assert largest(gradient_gap(carried, whole).values()) < 1e-9
    assert whole["u"][:, :11].abs().max() > 1e-6


@every_model
def test_a_reset_is_the_beginning_of_another_sequence(name: str) -> None:
    model, u = made(name), inputs(30)
    steps = Steps(reset=(torch.arange(30) == 12).expand(BATCH, -1))
    with torch.no_grad():
        first, _ = model(u[:, :12])
        second, end = model(u[:, 12:])
        assert gap(model(u, None, steps), (torch.cat([first, second], 1), end)) < 1e-9


@every_model
def test_missing_steps_leave_no_trace_whatever_stands_there(name: str) -> None:
    model, u = made(name), inputs(30)
    there = torch.ones(30, dtype=torch.bool)
    there[[0, 5, 6, 7, 20, 29]] = False
    spoiled = torch.where(there[:, None], u, torch.full_like(u, float("nan")))
    steps = Steps(valid=there.expand(BATCH, -1))
    y, end = model(u[:, there])
    full, last = model(spoiled, None, steps)
    assert gap((full[:, there], last), (y, end)) < 1e-9
    assert (full[:, ~there] == 0).all()
    found = torch.autograd.grad(full.square().sum(), list(model.parameters()), allow_unused=True)
    assert all(g is None or g.isfinite().all() for g in found)


@every_model
@pytest.mark.parametrize("marked", [False, True])
def test_a_sequence_without_a_step_gives_nothing_and_leaves_its_state(name: str, marked: bool) -> None:
    model, u = made(name), inputs(6)
    with torch.no_grad():
        _, state = model(u)
        y, after = model(u[:, :0], state, marks(0) if marked else None)
        fresh, begin = model(u[:, :0])
    assert y.shape == fresh.shape == (BATCH, 0, D_OUT)
    assert all(torch.equal(v, after[k]) for k, v in state.items())
    assert all(torch.equal(v, begin[k]) for k, v in model.init_state(BATCH).items())


@every_model
def test_a_sequence_that_is_all_padding_keeps_its_state(name: str) -> None:
    model, u = made(name), inputs(6)
    with torch.no_grad():
        _, state = model(u)
        nothing = Steps(valid=torch.zeros(BATCH, 6, dtype=torch.bool))
        y, after = model(u, state, nothing)
    assert (y == 0).all()
    assert all(torch.equal(v, after[k]) for k, v in state.items())


@every_model
def test_a_series_does_not_depend_on_its_neighbours_in_the_batch(name: str) -> None:
    assert BATCH == D_OUT  # where times of a batch could be taken for those of units
    model, u, steps = made(name, layers=1), inputs(25), marks(25)
    with torch.no_grad():
        whole, _ = model(u, None, steps)
        for b in range(BATCH):
            parts = (None if x is None else x[b : b + 1] for x in (steps.valid, steps.reset, steps.elapsed))
            alone, _ = model(u[b : b + 1], None, Steps(*parts))
            assert (alone[0] - whole[b]).abs().max() < 1e-12


@pytest.mark.parametrize("name", [name for name in NAMES if table_core(name).continuous])
def test_elapsed_time_moves_a_continuous_model_and_one_bar_is_the_default(name: str) -> None:
    model, u = made(name), inputs(20)
    ones = torch.ones(BATCH, 20, dtype=torch.float64)
    with torch.no_grad():
        plain = model(u)
        assert gap(model(u, None, Steps(elapsed=ones)), plain) < 1e-12
        assert gap(model(u, None, Steps(elapsed=3 * ones)), plain) > 1e-3


@every_model
def test_the_past_does_not_know_the_future(name: str) -> None:
    model, u = made(name), inputs(40)
    changed = torch.cat([u[:, :25], 10 + u[:, 25:]], 1)
    with torch.no_grad():
        for steps in (None, marks(40)):
            a, b = model(u, None, steps)[0], model(changed, None, steps)[0]
            assert (a[:, :25] - b[:, :25]).abs().max() < 1e-13
            assert (a[:, 25:] - b[:, 25:]).abs().max() > 1e-3


@every_model
def test_a_state_is_saved_split_by_series_and_restored(name: str) -> None:
    model, u = made(name), inputs(20)
    with torch.no_grad():
        whole, _ = model(u)
        _, state = model(u[:, :10])
        assert all(v.shape[0] == BATCH and not v.is_complex() for v in state.values())
        restored = load(save(state))
        for b in (0, BATCH - 1):
            one = {k: v[b : b + 1] for k, v in restored.items()}
            y, _ = model(u[b : b + 1, 10:], one)
            assert (y[0] - whole[b, 10:]).abs().max() < 1e-12


@every_model
def test_half_precision_around_a_recurrence_does_not_reach_its_state(name: str) -> None:
    model, u, steps = made(name, dtype=torch.float32), inputs(40).float(), marks(40)
    steps = Steps(steps.valid, steps.reset, None if steps.elapsed is None else steps.elapsed.float())
    for marked in (None, steps):
        exact, _ = model(u, None, marked)
        with torch.autocast("cpu", torch.bfloat16):
            y, state = model(u, None, marked)
        torch.autograd.backward(y.float().square().sum())
        assert (y.float() - exact).abs().max() < 0.1
        kept = [
            v.dtype for k, v in state.items() if not k.endswith((".k", ".v", ".n"))
        ]  # a cache is no recurrence
        assert name in ("gru", "lstm") or set(kept) <= {torch.float32}
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@every_model
def test_dropout_acts_in_training_only(name: str) -> None:
    torch.manual_seed(0)
    core, u = table_core(name), inputs(20).float()
    model: Any = core.make(5, 8, 2, 0.5)
    with torch.no_grad():
        assert not torch.equal(model(u)[0], model(u)[0])
        model.eval()
        assert torch.equal(model(u)[0], model(u)[0])


@every_model
def test_what_stands_at_a_missing_step_does_not_reach_a_gradient_step_by_step(name: str) -> None:
    model, u = made(name), inputs(12)
    there = marks(12).valid
    assert there is not None and not there.all()
    spoiled = torch.where(there[..., None], u, torch.full_like(u, float("nan")))
    y, _ = by_step(model, spoiled, None, Steps(valid=there))
    found = torch.autograd.grad(y.square().sum(), list(model.parameters()), allow_unused=True)
    assert all(g is None or g.isfinite().all() for g in found)
