"""The recurrence that reads text: parity of its ways of running, packed batches, sampled loss, calibration."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from recur.models.interface import SequenceModel, Steps
from recur.models.text.classifier import Pool, TextClassifier, reversed_rows
from recur.models.text.encoder import Drops, Encoder, EncoderSpec
from recur.models.text.language import LanguageModel, draw_sample
from recur.models.text.recurrence import Recurrence
from recur.pipeline.sentiment_fit import FinePlan, class_weights, fine_tune, layer_groups, logits_of
from recur.pipeline.sentiment_language import LanguagePlan, pretrain, stretches
from recur.pipeline.sentiment_metrics import auc, calibration_error, evaluate, fit_temperature

SPEC = EncoderSpec(vocabulary=40, width=6, hidden=9, layers=3)


def test_stepping_equals_reading_a_sequence() -> None:
    torch.manual_seed(0)
    model = Recurrence(5, 9, 6, 3).eval()
    assert isinstance(model, SequenceModel)
    u = torch.randn(4, 11, 5)
    y, last = model(u)
    state = model.init_state(4)
    for t in range(11):
        y_t, state = model.step(u[:, t], state)
        torch.testing.assert_close(y_t, y[:, t], atol=1e-6, rtol=1e-5)
    for name, value in last.items():
        torch.testing.assert_close(state[name], value, atol=1e-6, rtol=1e-5)
    first, middle = model(u[:, :4])
    second, _ = model(u[:, 4:], middle)
    torch.testing.assert_close(torch.cat([first, second], 1), y, atol=1e-6, rtol=1e-5)


def test_marks_reset_and_skip_steps() -> None:
    torch.manual_seed(0)
    model = Recurrence(5, 9, 6, 2).eval()
    u = torch.randn(1, 6, 5)
    reset = torch.tensor([[False, False, False, True, False, False]])
    y, _ = model(u, None, Steps(reset=reset))
    torch.testing.assert_close(y[:, 3:], model(u[:, 3:])[0], atol=1e-6, rtol=1e-5)
    valid = torch.tensor([[True, False, True, True, True, True]])
    y, _ = model(u, None, Steps(valid=valid))
    assert (y[:, 1] == 0).all()
    torch.testing.assert_close(
        y[:, 2:], model(torch.cat([u[:, :1], u[:, 2:]], 1))[0][:, 1:], atol=1e-6, rtol=1e-5
    )


def test_a_packed_row_ends_at_its_own_end() -> None:
    torch.manual_seed(0)
    model = Recurrence(5, 9, 6, 2).eval()
    u = torch.randn(3, 7, 5)
    lengths = torch.tensor([7, 4, 1])
    y, state = model.read(u, lengths)
    for k, n in enumerate(lengths.tolist()):
        alone, last = model(u[k : k + 1, :n])
        torch.testing.assert_close(y[k, :n], alone[0], atol=1e-6, rtol=1e-5)
        assert (y[k, n:] == 0).all()
        if n == 7:
            torch.testing.assert_close(state["c.1"][k], last["c.1"][0], atol=1e-6, rtol=1e-5)
    model.half_precision = True
    half, _ = model.read(u, lengths)
    torch.testing.assert_close(half.float(), y, atol=0.02, rtol=0.05)


def test_dropout_repeats_with_its_seed_and_is_off_when_judging() -> None:
    encoder = Encoder(SPEC)
    model = LanguageModel(encoder)
    tokens = torch.arange(20).view(2, 10)
    found = []
    for seed in (1, 1, 2):
        encoder.regularise(Drops(0.2, 0.2, 0.2, 0.2, 0.5), seed)
        found.append(model.train().hidden(tokens, False, None)[0])
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    model.eval()
    assert torch.equal(model.hidden(tokens, True, None)[0], model.hidden(tokens, True, None)[0])


def test_rows_are_reversed_within_their_lengths() -> None:
    tokens = torch.tensor([[1, 2, 3], [4, 5, 0]])
    assert reversed_rows(tokens, torch.tensor([3, 2])).tolist() == [[3, 2, 1], [5, 4, 0]]


def test_pooling_in_pieces_is_pooling_at_once() -> None:
    torch.manual_seed(0)
    y, scores = torch.randn(3, 8, 4), 30 * torch.randn(3, 8)
    lengths = torch.tensor([8, 5, 2])
    valid = torch.arange(8) < lengths[:, None]
    pool = Pool(3, 4, y)
    for at, end, rows in ((0, 2, 3), (2, 5, 2), (5, 8, 1)):
        pool.add(y[:rows, at:end], scores[:rows, at:end], valid[:rows, at:end])
    for k, n in enumerate(lengths.tolist()):
        share = scores[k, :n].softmax(0)
        expected = torch.cat([share @ y[k, :n], y[k, :n].amax(0), y[k, :n].mean(0)])
        torch.testing.assert_close(pool.result()[k], expected, atol=1e-5, rtol=1e-5)


def test_scoring_a_sample_of_the_vocabulary_is_right_on_average() -> None:
    torch.manual_seed(0)
    model = LanguageModel(Encoder(EncoderSpec(vocabulary=300, width=8, hidden=8, layers=1))).eval()
    frequency = 1 / torch.arange(1, 301)
    frequency /= frequency.sum()
    rng = torch.Generator().manual_seed(0)
    hidden = 3 * torch.randn(8, 50, 8)
    exact, sampled = [], []
    for _ in range(40):
        targets = torch.multinomial(frequency, 400, replacement=True, generator=rng).view(8, 50)
        full = torch.nn.functional.cross_entropy(model.logits(hidden, False).flatten(0, 1), targets.flatten())
        sample, chance = draw_sample(targets, frequency, 50, rng)
        assert len(sample) < 250
        # the correction shifts a target's own score by its log-chance too: take that out to compare
        own = chance[torch.searchsorted(sample, targets.flatten())].log().mean()
        exact.append(full.item())
        sampled.append((model.loss(hidden, targets, False, sample, chance) - own).item())
    assert np.mean(sampled) == pytest.approx(np.mean(exact), abs=0.03)


def test_a_language_model_begins_with_how_common_words_are_and_not_from_scratch_again() -> None:
    model = LanguageModel(Encoder(EncoderSpec(vocabulary=4, width=2, hidden=2, layers=1)))
    model.begin_with(torch.tensor([6.0, 2.0, 0.0, 0.0]))
    start = torch.tensor([0.65, 0.25, 0.05, 0.05])
    torch.testing.assert_close(model.bias.exp(), start.expand(2, -1))
    pretrain(model, [[2, 3] * 40], LanguagePlan(epochs=1, streams=2, stretch=4, lr=1e-9))
    torch.testing.assert_close(model.bias.exp(), start.expand(2, -1))


def test_stretches_cover_every_stream_in_order_and_predict_the_next_token() -> None:
    pieces = list(stretches(torch.arange(107), 4, 8))
    expected = torch.arange(104).view(4, 26)[:, :24]
    assert torch.equal(torch.cat([x for x, _ in pieces], 1), expected)
    assert all(torch.equal(y, x + 1) for x, y in pieces)


def test_layers_are_grouped_from_the_head_down_and_all_are_there() -> None:
    net = TextClassifier(Encoder(SPEC))
    groups = layer_groups(net)
    assert len(groups) == 5
    assert groups[-1][0] is net.encoder.embedding.weight
    assert groups[1][0] is net.encoder.direction(False).cells[2].weight_ih_l0
    assert sum(len(g) for g in groups) == len(list(net.parameters()))


def test_class_weights_are_one_on_average() -> None:
    label = np.repeat([0, 1, 2], [10, 60, 30])
    weight = class_weights(label, 3, 1.0)
    assert weight[label].mean().item() == pytest.approx(1.0)
    assert (weight[0] / weight[1]).item() == pytest.approx(6.0)
    assert class_weights(np.array([0, 2]), 3, 0.5)[1] == 0


def test_metrics_of_a_small_case_by_hand() -> None:
    p = np.array([[0.8, 0.1, 0.1], [0.2, 0.5, 0.3], [0.1, 0.2, 0.7], [0.1, 0.6, 0.3], [np.nan] * 3])
    found = evaluate(p, np.array([0, 1, 2, 2, 1]))
    assert found["accuracy"] == pytest.approx(3 / 5)
    assert found["confusion"] == [[1, 0, 0], [0, 1, 0], [0, 1, 1]]
    assert found["per_class"]["neutral"] == {"precision": 0.5, "recall": 0.5, "f1": 0.5, "n": 2}
    assert found["macro_f1"] == pytest.approx((1 + 0.5 + 2 / 3) / 3)
    assert found["weighted_f1"] == pytest.approx((1 + 2 * 0.5 + 2 * 2 / 3) / 5)
    assert found["auc"] == 1.0
    assert found["n"] == 5


def test_calibration_error_and_temperature() -> None:
    rng = np.random.default_rng(0)
    logits = 2 * rng.normal(size=(6000, 3))
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    label = np.array([rng.choice(3, p=row) for row in p])
    assert calibration_error(p, label) < 0.02
    assert fit_temperature(3 * logits, label) == pytest.approx(3.0, abs=0.15)
    assert calibration_error(np.array([[0.9, 0.1, 0.0]] * 10), np.zeros(10, dtype=int)) == pytest.approx(0.1)


def test_auc_counts_ties_half_and_needs_both_classes() -> None:
    assert auc(np.array([0.1, 0.5, 0.5, 9.0]), np.array([0, 2, 0, 1])) == pytest.approx(0.75)
    assert auc(np.array([0.1, 0.5]), np.array([2, 2])) is None


def test_layers_are_held_back_until_their_epoch() -> None:
    torch.manual_seed(0)
    net = TextClassifier(Encoder(SPEC))
    groups = layer_groups(net)
    before = [[p.detach().clone() for p in group] for group in groups]
    moved: list[list[bool]] = []

    def look(epoch: int, _: TextClassifier) -> bool:
        now = [
            not all(torch.equal(p, q) for p, q in zip(g, b, strict=True))
            for g, b in zip(groups, before, strict=True)
        ]
        moved.append(now)
        return False

    texts = [[12, 13, 14], [15, 16], [17], [18, 12]]
    fine_tune(net, texts, np.array([0, 1, 2, 0]), FinePlan(epochs=3, batch=2, unfreeze=1), look)
    assert [row.count(True) for row in moved] == [1, 2, 3]
    assert all(p.requires_grad for p in net.parameters())


def test_reading_without_gradients_gives_what_reading_with_them_gives() -> None:
    torch.manual_seed(0)
    model = Recurrence(5, 9, 6, 2).eval()
    distinct, index = torch.randn(7, 5), torch.randint(0, 7, (12, 8))
    lengths = torch.tensor([8, 8, 8, 7, 5, 5, 4, 2, 1, 1, 1, 1])
    before = {name: torch.randn_like(part) for name, part in model.init_state(12).items()}
    with torch.inference_mode():
        y, after = model.read_distinct(distinct, index, lengths, before)
        few, _ = model.read_distinct(distinct, index[:3], lengths[:3])
    expected, _ = model.read(distinct[index], lengths, before)
    torch.testing.assert_close(y, expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(few, model.read(distinct[index[:3]], lengths[:3])[0], atol=1e-6, rtol=1e-5)
    for k, n in enumerate(lengths.tolist()):  # the state of every row is that after its own end
        _, last = model(
            distinct[index[k : k + 1, :n]], {name: part[k : k + 1] for name, part in before.items()}
        )
        for name in last:
            torch.testing.assert_close(after[name][k], last[name][0], atol=1e-6, rtol=1e-5)


def test_texts_that_are_the_same_to_the_network_are_read_once() -> None:
    torch.manual_seed(0)
    net = TextClassifier(Encoder(SPEC))
    read: list[int] = []
    net.register_forward_hook(lambda module, inputs, output: read.append(len(output)))
    logits = logits_of(net, [[12, 13], [14], [], [12, 13], [14, 15, 16], [12, 13]])
    assert sum(read) == 3
    assert np.isnan(logits[2]).all()
    assert (logits[0] == logits[3]).all()
    assert (logits[0] == logits[5]).all()
    np.testing.assert_allclose(logits[[0, 1, 4]], logits_of(net, [[12, 13], [14], [14, 15, 16]]), atol=1e-6)
