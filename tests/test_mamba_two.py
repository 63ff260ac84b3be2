"""The Mamba-2 layer: its two ways of computing agree, and it reads and equals the published one."""

from __future__ import annotations

import math
import shutil
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from recur.models import mamba2_fused, ssd
from recur.models.mamba2 import Mamba2Mixer, dt_bias_init


def mixer(groups: int = 1, d_model: int = 12, **sizes: int) -> Mamba2Mixer:
    torch.manual_seed(0)
    made = Mamba2Mixer(d_model, d_state=5, head=6, groups=groups, **sizes).double()
    for p in made.parameters():
        nn.init.normal_(p, std=0.5)
    return made


def gradients(
    made: Mamba2Mixer, way: Any, u: Tensor, lengths: Tensor | None, segment: Tensor | None
) -> dict[str, Tensor]:
    make = torch.Generator().manual_seed(3)

    def normal(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=make, dtype=torch.float64).to(like.dtype)

    state = {k: normal(v).requires_grad_() for k, v in made.init_state(len(u)).items()}
    u = u.clone().requires_grad_()
    made.zero_grad()
    y, end = way(u, state, lengths, segment)
    loss = sum((v * normal(v)).sum() for v in (y, end["conv"], end["ssm"]))
    assert isinstance(loss, Tensor)
    torch.autograd.backward(loss)
    out = (
        {k: p.grad for k, p in made.named_parameters()}
        | {k: v.grad for k, v in state.items()}
        | {"u": u.grad}
    )
    return {"y": y.detach(), **{k: v.clone() for k, v in out.items() if v is not None}}


@pytest.mark.full
@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="no C++ compiler")
@pytest.mark.parametrize("kind", ["plain", "padded", "resets"])
def test_compiled_the_layer_gives_the_same_output_and_gradients(kind: str) -> None:
    made, u = mixer(2), torch.randn(3, 70, 12, dtype=torch.float64)
    lengths = torch.tensor([70, 35, 0]) if kind == "padded" else None
    segment = (torch.arange(70) >= torch.tensor([[20], [69], [70]])).long() if kind == "resets" else None
    one, other = (
        gradients(made, way, u, lengths, segment) for way in (made.forward, torch.compile(made.forward))
    )
    assert one.keys() == other.keys() and len(one) == 12
    for name in one:
        assert (one[name] - other[name]).abs().max() < 1e-11, name


def test_a_loss_of_the_output_alone_from_a_fresh_state_has_the_same_gradients_in_one_node() -> None:
    made, u = mixer(2), torch.randn(3, 70, 12, dtype=torch.float64, requires_grad=True)
    found = []
    for way in (made.forward, made.composed):
        y, _ = way(u, made.init_state(3))
        found.append(torch.autograd.grad(y.square().sum(), [u, *made.parameters()]))
    for one, other in zip(*found, strict=True):
        assert (one - other).abs().max() < 1e-11


@pytest.mark.parametrize("length", [1, 2, 3, 31, 33, 70])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kind", ["plain", "padded", "resets", "both"])
@pytest.mark.parametrize("form", ["scaled", "exact"])
def test_one_node_in_pieces_and_the_composed_layer_give_the_same_output_and_gradients(
    form: str, groups: int, length: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mamba2_fused, "tile_of_rows", lambda *_: 2)
    monkeypatch.setattr(ssd, "SCALED_BELOW", 0.0 if form == "exact" else 1e9)
    made, u = mixer(groups), torch.randn(3, length, 12, dtype=torch.float64)
    lengths = torch.tensor([length, length // 2, 0]) if kind in ("padded", "both") else None
    segment = torch.zeros(3, length, dtype=torch.long)
    segment[0, length // 3 :] = 1
    segment[1, -1:] += 1
    given_ = segment if kind in ("resets", "both") else None
    one, other = (gradients(made, way, u, lengths, given_) for way in (made.forward, made.composed))
    assert one.keys() == other.keys() and len(one) == 12
    for name in one:
        assert torch.allclose(one[name], other[name], atol=1e-10, rtol=1e-10), name


def test_float32_gradients_of_the_layer_stay_within_two_millionths_of_float64() -> None:
    torch.manual_seed(0)
    made, u = Mamba2Mixer(64, head=32), torch.randn(2, 200, 64)
    single = gradients(made, made.forward, u, None, None)
    double = gradients(made.double(), made.forward, u.double(), None, None)
    for name, value in single.items():
        assert (value.double() - double[name]).abs().max() < 2e-6 * double[name].abs().max(), name


def test_the_published_layer_has_the_same_weights_by_name_and_gives_the_same_numbers() -> None:
    transformers = pytest.importorskip("transformers")
    theirs = pytest.importorskip("transformers.models.mamba2.modeling_mamba2").Mamba2Mixer(
        transformers.Mamba2Config(
            hidden_size=32, state_size=16, head_dim=16, num_heads=4, n_groups=2, expand=2, chunk_size=16,
            num_hidden_layers=1, vocab_size=8, layer_norm_epsilon=1e-5,
        ),
        0,
    )  # fmt: skip
    torch.manual_seed(1)
    ours = Mamba2Mixer(32, d_state=16, head=16, groups=2)
    nn.init.normal_(ours.norm.weight)
    assert set(ours.state_dict()) == set(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    back = Mamba2Mixer(32, d_state=16, head=16, groups=2)
    back.load_state_dict(theirs.state_dict())
    u = torch.randn(2, 75, 32)
    grads = []
    for layer in (lambda x: back(x, back.init_state(2))[0], theirs):
        x = u.clone().requires_grad_()
        y = layer(x)
        torch.autograd.backward(y.square().sum())
        grads.append((y.detach(), x.grad))
    for a, b in zip(*grads, strict=True):
        assert a is not None and b is not None
        assert (a - b).abs().max() / b.abs().max() < 2e-6


def test_initial_step_sizes_and_decays_lie_in_the_published_ranges() -> None:
    torch.manual_seed(2)
    dt = nn.functional.softplus(dt_bias_init(4000).double())
    assert 0.00099 < dt.min() < 0.0011 and 0.095 < dt.max() < 0.1001
    assert dt.log().mean().item() == pytest.approx(math.log(0.01), abs=0.1)
    made = Mamba2Mixer(512)
    assert made.A_log.exp().min() >= 1 and made.A_log.exp().max() <= 16.0001
    assert torch.equal(made.D, torch.ones(16))
    marked = {n for n, p in made.named_parameters() if getattr(p, "_no_weight_decay", False)}
    assert marked == {"dt_bias", "A_log", "D"}


def test_mixed_precision_keeps_step_sizes_and_states_in_float32() -> None:
    torch.manual_seed(0)
    made, u = Mamba2Mixer(32, d_state=16), torch.randn(2, 100, 32)
    exact, _ = made(u, made.init_state(2))
    with torch.autocast("cpu", torch.bfloat16):
        y, state = made(u, made.init_state(2))
        one, _ = made.step(u[:, 0], made.init_state(2))
    assert y.dtype == one.dtype == torch.bfloat16 and state["ssm"].dtype == torch.float32
    assert (y.float() - exact).abs().max() < 0.03 * exact.abs().max()
    torch.autograd.backward(y.float().square().sum())
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in made.parameters())


def test_a_layer_whose_channels_do_not_fit_its_groups_is_refused() -> None:
    with pytest.raises(ValueError, match="d_inner 24 is not a multiple of 5 groups"):
        Mamba2Mixer(12, groups=5)
