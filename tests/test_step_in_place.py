"""A step that writes the next state over the last one gives what a step that does not gives."""

from __future__ import annotations

import shutil

import pytest
import torch

from recur.models.interface import State, Steps
from recur.models.mamba2 import Mamba2Mixer
from recur.models.residual import Stack

PATTERNS = ["M", "S", "*", "M-M*-"]


def copied(state: State) -> State:
    return {name: part.clone() for name, part in state.items()}


def run(pattern: str, batch: int) -> tuple[Stack, torch.Tensor, State]:
    torch.manual_seed(0)
    model = Stack(3, 16, pattern).double().eval()
    u = torch.randn(600 if "*" in pattern else 7, batch, 3, dtype=torch.float64)
    return model, u, model.init_state(batch)


@pytest.mark.parametrize("batch", [1, 5, 70])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_outputs_and_states_are_those_of_the_step_that_leaves_its_state_alone(
    pattern: str, batch: int
) -> None:
    if "*" in pattern and batch == 70:
        batch = 6  # the ring goes round within 600 steps; that many rows would take a minute
    model, u, state = run(pattern, batch)
    own = copied(state)
    with torch.no_grad():
        for u_t in u:
            y, state = model.step(u_t, state)
            y_own, own = model.step(u_t, own, inplace=True)
            assert torch.equal(y_own, y)
    for name, part in state.items():
        assert torch.equal(own[name], part), name


@pytest.mark.parametrize("batch", [5, 70])
@pytest.mark.parametrize(("pattern", "large"), [("M", "0.ssm"), ("S", "0.ssm"), ("*", "0.k")])
def test_the_next_state_lies_where_the_last_one_lay(pattern: str, large: str, batch: int) -> None:
    model, u, state = run(pattern, batch)
    with torch.no_grad():
        _, after = model.step(u[0], state, inplace=True)
    assert after[large].data_ptr() == state[large].data_ptr()


@pytest.mark.parametrize("pattern", PATTERNS)
def test_without_being_asked_a_step_leaves_the_state_it_was_given_alone(pattern: str) -> None:
    model, u, state = run(pattern, 70)
    with torch.no_grad():
        _, state = model.step(u[0], state)
        before = copied(state)
        model.step(u[1], state)
    for name, part in state.items():
        assert torch.equal(part, before[name]), name


@pytest.mark.parametrize("pattern", PATTERNS)
def test_where_bars_are_missing_their_states_pass_unchanged_all_the_same(pattern: str) -> None:
    model, u, state = run(pattern, 4)
    marks = Steps(valid=torch.tensor([True, False, True, False]))
    with torch.no_grad():
        _, state = model.step(u[0], state)
        before = copied(state)
        y, after = model.step(u[1], state, marks, inplace=True)
    for name, part in after.items():
        assert torch.equal(part[[1, 3]], before[name][[1, 3]]), name
    assert torch.equal(y[[1, 3]], torch.zeros(2, 16, dtype=torch.float64))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_with_gradients_nothing_is_written_over(pattern: str) -> None:
    model, u, state = run(pattern, 4)
    y, state = model.step(u[0], state, inplace=True)
    before = copied(state)
    y, _ = model.step(u[1], state, inplace=True)
    y.sum().backward()  # type: ignore[no-untyped-call]
    for name, part in state.items():
        assert torch.equal(part, before[name]), name


@pytest.mark.parametrize("groups", [1, 2])
def test_a_state_of_every_second_symbol_is_written_over_where_it_lies(groups: int) -> None:
    torch.manual_seed(0)
    mixer = Mamba2Mixer(16, groups=groups).double()
    held = {name: torch.randn(10, *part.shape[1:]).double() for name, part in mixer.init_state(1).items()}
    before, u = copied(held), torch.randn(5, 16).double()
    with torch.no_grad():
        _, after = mixer.step(u, {name: part[::2].clone() for name, part in held.items()})
        mixer.step(u, {name: part[::2] for name, part in held.items()}, inplace=True)
    for name, part in held.items():
        assert torch.equal(part[::2], after[name]) and torch.equal(part[1::2], before[name][1::2]), name


@pytest.mark.full
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="no C++ compiler")
def test_compiled_and_written_over_its_state_a_step_gives_the_same() -> None:
    torch.manual_seed(0)
    mixer = Mamba2Mixer(16, groups=2).double()
    step, plain = torch.compile(mixer.step), mixer.init_state(70)
    parts = copied(plain)
    where = {name: part.data_ptr() for name, part in parts.items()}
    with torch.no_grad():
        for u_t in torch.randn(3, 70, 16, dtype=torch.float64):
            y, plain = mixer.step(u_t, plain)
            y_own, parts = step(u_t, parts, inplace=True)
            assert (y_own - y).abs().max() < 1e-12
    for name, part in plain.items():
        assert (parts[name] - part).abs().max() < 1e-12, name
        assert parts[name].data_ptr() == where[name], name
