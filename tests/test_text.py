"""Normalisation keeps what carries sentiment, and the vocabulary knows every text."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from recur.pipeline.text import EOS, MARKS, MAX_CHARS, PAD, TextCodec, clean, fingerprint, normalise
from recur.vocabulary import DataMissing, UsageError

CODEC = TextCodec.train(
    ["Bitcoin rises to $50,000 from $40,000", "bitcoin did not fall", "rises and falls"] * 3, 320
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Profit rose to EUR 13.1 mn from EUR 8.7 mn", "profit rose to eur <n_gt> million from eur <n> million"),
        ("Loss of $980m vs. $1.2bn", "loss of usd <n_lt> million vs . usd <n> billion"),
        ("from 7 % to 5 pct", "from <n_gt> % to <n> %"),
        ("EUR 5 mn and 7 %", "eur <n> million and <n> %"),
        ("Sales were 5. Costs were 7", "sales were <n> . costs were <n>"),
        ("$BTC +5.2% today", "<ticker> btc <plus> <n> % today"),
        ("down -3.5%", "down <minus> <n> %"),
        ("pages 12-14", "pages <n_lt> - <n>"),
        ("in Q1 2009 or 1850", "in q <n> <year> or <n>"),
        ("30 September 2009", "<n> september <year>"),
        ("12.000,5 against 12,000.4", "<n_gt> against <n>"),
        ("It didn't, can’t and won't", "it did n't , ca n't and wo n't"),
        ("NOT selling, HUGE gain, BTC ETF up, SEC out", "not selling , <caps> huge gain , <caps> btc etf up , sec out"),
        ("to the moon 🚀🚀", "to the moon 🚀 🚀"),
        ("see https://t.co/HM?x=1 @elon", "see <url> <user>"),
        ("a<br /><br />b &amp; c", "a b & c"),
        ("ﬁne １２", "fine <n>"),
        ("比特币上涨 10%", "比特币上涨 <n> %"),
        ("sooooo!!!!!!", "sooo ! ! !"),
        ("zero\u200bwidth \x00\x07 bell", "zerowidth bell"),
        ("<n> <pad>", "< n > < pad >"),
        ("", ""),
    ],
)  # fmt: skip
def test_a_text_is_normalised_to_words_and_marks(text: str, words: str) -> None:
    assert normalise(text) == words


@given(st.text(max_size=200))
def test_every_text_is_encoded_without_marks_for_padding_or_end(text: str) -> None:
    tokens = CODEC.encode([text])[0]
    assert all(0 <= token < CODEC.size for token in tokens)
    assert PAD not in tokens and EOS not in tokens
    assert bool(tokens) == bool(normalise(text))


@given(st.text(max_size=100))
def test_cleaning_leaves_no_control_characters(text: str) -> None:
    assert all(c.isprintable() or c.isspace() or ord(c) > 127 for c in clean(text))


@given(st.lists(st.text(max_size=50), max_size=5))
def test_encoding_together_is_encoding_alone(texts: list[str]) -> None:
    assert CODEC.encode(texts) == [CODEC.encode([text])[0] for text in texts]


def test_a_vocabulary_survives_its_file() -> None:
    again = TextCodec.from_json(CODEC.to_json())
    assert again.encode(["bitcoin rises 🚀"]) == CODEC.encode(["bitcoin rises 🚀"])
    assert again.token(2) == "<n>"
    assert "".join(again.tokens(again.encode(["bitcoin fell"])[0])) == " bitcoin fell"


def test_words_of_new_texts_become_tokens_that_know_their_pieces() -> None:
    more, pieces = CODEC.extended(["turnover rises <n>", "turnover and ether", "Turnover 5"], 2)
    assert more.size == CODEC.size + 1
    assert pieces == [CODEC.encode(["turnover"])[0]]
    assert more.encode(["turnover rises 5"])[0] == [CODEC.size, *CODEC.encode(["rises 5"])[0]]
    assert more.token(CODEC.size) == " turnover"
    assert TextCodec.from_json(more.to_json()).encode(["turnovers turnover"]) == more.encode(
        ["turnovers turnover"]
    )


def test_a_broken_vocabulary_is_refused() -> None:
    with pytest.raises(DataMissing, match="cannot be read"):
        TextCodec.from_json("{")
    with pytest.raises(DataMissing, match="lacks the marks"):
        TextCodec.from_json(
            json.dumps({"tokenizer": json.loads(Tokenizer(models.BPE()).to_str()), "words": []})
        )


def test_a_text_beyond_the_limit_is_refused_by_its_number() -> None:
    with pytest.raises(UsageError, match="Text 2 has 1,100,001 characters"):
        CODEC.encode(["short", "x" * (MAX_CHARS + 1)])


def test_fingerprints_differ_by_numbers_and_not_by_case_blanks_or_markup() -> None:
    assert fingerprint("Sales  rose to 5<br>") == fingerprint("sales rose TO 5")
    assert fingerprint("Sales rose to 5") != fingerprint("Sales rose to 6")
    assert len(fingerprint("")) == 16


def test_the_marks_come_first_in_every_vocabulary() -> None:
    assert [CODEC.token(k) for k in range(len(MARKS))] == list(MARKS)
