"""The n-grams beside the recurrent network, and how the two are mixed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recur.models.text.ngrams import BUCKETS, NGrams, hashed
from recur.pipeline.sentiment_blend import Blend, fit_blend, spread

TEXTS = [[5, 6], [5, 7], [8, 6], [8, 7], [5, 6, 9], [8, 7, 9]]
LABELS = np.array([2, 2, 0, 0, 2, 0])
EVEN = torch.ones(3)


def learned(strength: float = 10.0) -> NGrams:
    grams = NGrams()
    grams.fit(TEXTS, LABELS, EVEN, strength)
    return grams


def said(grams: NGrams, texts: list[list[int]]) -> np.ndarray:
    with torch.no_grad():
        return grams(grams.bags(texts)).numpy()  # type: ignore[no-any-return]


@given(st.lists(st.integers(0, 50_000), max_size=30))
def test_a_text_of_n_tokens_has_all_its_runs_of_one_to_three(text: list[int]) -> None:
    n = len(text)
    found = hashed(text)
    assert len(found) == sum(max(0, n - k) for k in range(3))
    assert ((found >= 0) & (found < BUCKETS)).all()


def test_a_run_has_the_same_bucket_wherever_it_stands_and_another_when_turned() -> None:
    assert hashed([7, 8])[-1] == hashed([7, 8, 9])[3]
    assert hashed([7, 8])[-1] != hashed([8, 7])[-1]


def test_buckets_are_the_same_in_every_process() -> None:
    assert hashed([7, 8]).tolist() == [102135, 24726, 59221]


def test_what_decides_is_learned_and_what_does_not_is_not() -> None:
    logits = said(learned(), [[5], [8], [6]])
    assert logits[0].argmax() == 2
    assert logits[1].argmax() == 0
    assert abs(logits[2, 2] - logits[2, 0]) < 0.2


def test_a_run_that_only_one_text_has_is_left_out() -> None:
    grams = NGrams()
    grams.fit([[5, 6], [5, 7], [8, 9]], np.array([2, 2, 0]), EVEN, 10.0)
    kept = torch.nonzero(grams.idf)[:, 0].tolist()
    assert kept == [int(hashed([5])[0])]


def test_a_text_without_a_known_run_gets_the_bias() -> None:
    grams = learned()
    np.testing.assert_array_equal(said(grams, [[99], []]), np.tile(grams.bias.detach().numpy(), (2, 1)))


def test_a_text_scores_the_same_alone_and_among_others() -> None:
    grams = learned()
    together = said(grams, TEXTS)
    for i, text in enumerate(TEXTS):
        np.testing.assert_allclose(said(grams, [text])[0], together[i], rtol=1e-6)


def test_the_fit_is_where_the_gradient_vanishes() -> None:
    grams = learned(2.0).double()
    loss = torch.nn.functional.cross_entropy(
        grams(grams.bags(TEXTS)), torch.from_numpy(LABELS), EVEN.double(), reduction="sum"
    )
    total = loss + grams.weight.square().sum() / 4
    gradient = torch.autograd.grad(total, [grams.weight, grams.bias])
    assert max(float(g.abs().max()) for g in gradient) < 1e-4


def test_two_fits_are_equal_to_the_last_bit() -> None:
    assert torch.equal(learned().weight, learned().weight)


def test_a_blend_is_a_mean_of_probabilities() -> None:
    blend = Blend(temperature=2.0, ngram_temperature=1.0, share=0.25)
    network = np.log(np.array([[0.81, 0.01, 0.18]], dtype=np.float32))
    ngrams = np.log(np.array([[0.2, 0.4, 0.4]], dtype=np.float32))
    root = np.sqrt([0.81, 0.01, 0.18])
    expected = 0.75 * root / root.sum() + 0.25 * np.array([0.2, 0.4, 0.4])
    np.testing.assert_allclose(blend(network, ngrams)[0], expected, rtol=1e-5)


def test_what_the_network_could_not_read_has_no_probabilities() -> None:
    blend = Blend(1.0, 1.0, 0.5)
    assert np.isnan(blend(np.full((1, 3), np.nan, np.float32), np.zeros((1, 3), np.float32))).all()


def test_the_better_reader_gets_the_greater_share() -> None:
    rng = np.random.default_rng(0)
    label = rng.integers(0, 3, 3000)

    def reader(skill: float) -> np.ndarray:
        return (skill * np.eye(3)[label] + rng.normal(size=(3000, 3))).astype(np.float32)

    assert fit_blend(reader(3.0), reader(0.5), label).share < 0.2
    assert fit_blend(reader(0.5), reader(3.0), label).share > 0.8
    assert fit_blend(reader(2.0), reader(2.0), label).share == pytest.approx(0.5, abs=0.1)


def test_how_large_logits_are_leaves_out_what_was_not_read() -> None:
    logits = np.array([[0.0, 3.0, -3.0], [np.nan] * 3, [1.0, 1.0, 1.0]], dtype=np.float32)
    assert spread(logits) == pytest.approx(np.sqrt(6) / 2)
