"""Both directions over a text: padding changes nothing, and no causal place takes it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from recur.models.bidirectional import Bidirectional, mirror
from recur.models.ctrnn import CTRNN
from recur.models.gru import GRU
from recur.models.interface import SequenceModel, Steps
from recur.models.lstm import LSTM
from recur.models.mingru import MinGRU
from recur.vocabulary import UsageError


def _model(make: Any, layers: int = 2) -> Bidirectional:
    torch.manual_seed(0)
    return Bidirectional(make, 3, 8, layers).double().eval()


@pytest.mark.parametrize("make", [LSTM, GRU, MinGRU])
def test_padding_behind_a_text_changes_nothing(make: Any) -> None:
    model, lengths = _model(make), torch.tensor([9, 4, 1])
    u = torch.randn(3, 9, 3, dtype=torch.float64)
    valid = torch.arange(9) < lengths[:, None]
    u = torch.where(valid[..., None], u, torch.full_like(u, float("nan")))
    with torch.no_grad():
        y = model(u, Steps(valid=valid))
        for b, n in enumerate(lengths.tolist()):
            assert (y[b, :n] - model(u[b : b + 1, :n])[0]).abs().max() < 1e-12
            assert (y[b, n:] == 0).all()


def test_one_layer_equals_torch() -> None:
    model = _model(LSTM, layers=1)
    peer = torch.nn.LSTM(3, 4, batch_first=True, bidirectional=True).double()
    weights = dict(model.named_parameters())
    for side, suffix in (("onwards", ""), ("backwards", "_reverse")):
        for name in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"):
            getattr(peer, name + suffix).data.copy_(weights[f"{side}.0.cells.0.rnn.{name}"].data)
    u = torch.randn(2, 11, 3, dtype=torch.float64)
    with torch.no_grad():
        assert (model(u) - peer(u)[0]).abs().max() < 1e-13


def test_texts_packed_in_one_row_do_not_see_each_other() -> None:
    model, u = _model(GRU), torch.randn(1, 12, 3, dtype=torch.float64)
    reset = (torch.arange(12) == 5)[None]
    with torch.no_grad():
        apart = torch.cat([model(u[:, :5]), model(u[:, 5:])], 1)
        assert (model(u, Steps(reset=reset)) - apart).abs().max() < 1e-12


def test_elapsed_times_read_backwards_are_those_to_the_valid_step_after() -> None:
    marks = Steps(
        valid=torch.tensor([[True, False, True, True]]), elapsed=torch.tensor([[1.0, 9.0, 2.5, 0.5]])
    )
    back = mirror(marks)
    assert back.elapsed is not None and back.valid is not None
    assert back.valid.tolist() == [[True, True, False, True]]
    assert back.elapsed[back.valid].tolist() == [1.0, 0.5, 2.5]


def test_reading_a_mirrored_text_mirrors_the_backward_half() -> None:
    model, u = _model(CTRNN, layers=1), torch.randn(1, 6, 3, dtype=torch.float64)
    elapsed = torch.tensor([[1.0, 0.5, 2.0, 3.0, 1.5, 0.2]], dtype=torch.float64)
    with torch.no_grad():
        future = model(u, Steps(elapsed=elapsed))[..., 4:]
        mirrored = torch.tensor([[1.0, 0.2, 1.5, 3.0, 2.0, 0.5]], dtype=torch.float64)
        back: Any = model.backwards[0]
        expected, _ = back(u.flip(1), None, Steps(elapsed=mirrored))
    assert (future - expected.flip(1)).abs().max() < 1e-14


def test_the_future_is_seen_and_therefore_it_is_no_sequence_model() -> None:
    model, u = _model(GRU), torch.randn(1, 6, 3, dtype=torch.float64)
    changed = u.clone()
    changed[:, -1] += 1
    with torch.no_grad():
        assert (model(u)[:, 0] - model(changed)[:, 0]).abs().max() > 1e-6
    assert not isinstance(model, SequenceModel)


def test_an_odd_width_is_refused() -> None:
    with pytest.raises(UsageError, match="even width: got 7"):
        Bidirectional(GRU, 3, 7)
