"""From text to token numbers: what a headline says is kept, how it was typed is not.

``normalise`` gives words and marks separated by blanks, ``TextCodec`` turns them into numbers by a sub-word
vocabulary (byte-level BPE, Sennrich et al. 2016, arXiv:1508.07909) trained on the corpus at hand. Byte level means
that nothing is unknown: other scripts, rare emoji and broken encodings become bytes.

What is kept because it carries sentiment:

* numbers as classes: ``<n>``; ``<n_gt>`` and ``<n_lt>`` when the next number of the same unit in the sentence is
  smaller or larger ("profit rose to EUR 13.1 mn from EUR 8.7 mn" reads "eur <n_gt> million from eur <n> million");
  signs as ``<plus>`` and ``<minus>``; years as ``<year>``;
* ``$BTC`` as ``<ticker> btc``; addresses as ``<url>``; people as ``<user>``;
* emoji as they are; words in capitals after one ``<caps>``; negation apart from its verb ("didn't" reads "did n't").

Texts are never cut: whoever reads many tokens reads them in pieces and carries the state along.
"""

from __future__ import annotations

import html
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from recur.vocabulary import DataMissing, UsageError

PAD, EOS = 0, 1
MARKS = (
    "<pad>", "<eos>", "<n>", "<n_gt>", "<n_lt>", "<plus>", "<minus>", "<year>", "<ticker>", "<url>", "<user>", "<caps>",
)  # fmt: skip
"""Tokens that stand for a class of words. Text can never spell them: its own ``<`` always stands alone."""

MAX_CHARS = 1_100_000
"""Longest text that is read (a megabyte); more is refused as a mistake rather than read for hours."""

_SCALES = {
    **dict.fromkeys(("k", "thousand", "tsd"), ("thousand", 1e3)),
    **dict.fromkeys(("m", "mn", "mln", "mio", "million", "millions", "mm"), ("million", 1e6)),
    **dict.fromkeys(("b", "bn", "bln", "billion", "billions"), ("billion", 1e9)),
    **dict.fromkeys(("t", "tn", "trn", "trillion"), ("trillion", 1e12)),
}
_UNITS = {
    "%": "%",
    "pct": "%",
    "percent": "%",
    "percentage": "%",
    "€": "eur",
    "$": "usd",
    "£": "gbp",
    "¥": "jpy",
}
_CURRENCIES = {
    "eur",
    "usd",
    "gbp",
    "jpy",
    "sek",
    "nok",
    "dkk",
    "chf",
    "cny",
    "inr",
    "rub",
    "lvl",
    "ltl",
    "eek",
    "cad",
}
_CURRENCIES |= {"btc", "eth", "euro", "euros", "dollars", "bps"}
_MONTHS = {"january", "february", "march", "april", "may", "june", "july", "august", "september", "october"}
_MONTHS |= {
    "november",
    "december",
    "jan",
    "feb",
    "mar",
    "apr",
    "jun",
    "jul",
    "aug",
    "sep",
    "sept",
    "oct",
    "nov",
    "dec",
}

_TAG = re.compile(r"<\s*/?\s*(?:br|p|div|span|a|b|i|em|strong|li|ul|h\d)\b[^>]{0,200}>", re.IGNORECASE)
_WORD = re.compile(
    r"""(?P<url>(?:https?://|www\.)\S+)
    |(?P<user>@\w{2,})
    |(?P<ticker>\$[A-Za-z][A-Za-z0-9_.]{0,9}\b)
    |(?P<number>\d+(?:[.,]\d+)*)
    |(?P<not>n['’]t\b)
    |(?P<word>[^\W\d_]+(?:-[^\W\d_]+)*?(?=n['’]t\b)|[^\W\d_]+(?:-[^\W\d_]+)*)
    |(?P<clitic>['’](?:s|re|ve|ll|d|m)\b)
    |(?P<other>[^\s])""",
    re.VERBOSE | re.IGNORECASE,
)
_YEAR = re.compile(r"(?:19|20)\d\d")
_REPEAT = re.compile(r"(.)\1{3,}", re.DOTALL)


@dataclass(frozen=True, slots=True)
class _Piece:
    """One match of ``_WORD``; ``glued`` when no blank stands before it."""

    kind: str
    text: str
    glued: bool


_NOTHING = _Piece("", "", False)


@dataclass(frozen=True, slots=True)
class _Number:
    """A number at ``place`` in the word list: its value with scale, its unit, and the sentence it stands in."""

    place: int
    value: float
    unit: str
    sentence: int


def clean(text: str) -> str:
    """NFKC without control characters, markup and HTML entities; four and more equal characters become three."""
    if "<" in text:
        text = _TAG.sub(" ", text)
    if "&" in text:
        text = html.unescape(text)
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
        text = "".join(
            c
            if (kind := unicodedata.category(c)) not in ("Cc", "Cf", "Mn", "Cs")
            else " "
            if kind == "Cc"
            else ""
            for c in text
        )
    elif not text.isprintable():
        text = "".join(c if c.isprintable() else " " for c in text)
    return _REPEAT.sub(r"\1\1\1", text)


def normalise(text: str) -> str:
    """Words and marks of ``text``, separated by single blanks."""
    pieces, end = [], -1
    for match in _WORD.finditer(clean(text)):
        pieces.append(_Piece(match.lastgroup or "", match.group(), match.start() == end))
        end = match.end()
    shouted = _shouted(pieces)
    words: list[str] = []
    numbers: list[_Number] = []
    sentence = 0
    for at, piece in enumerate(pieces):
        kind, word = piece.kind, piece.text
        if shouted[at]:
            words.append("<caps>")
        if kind == "number":
            _append_number(words, numbers, pieces, at, sentence)
        elif kind in ("url", "user"):
            words.append(f"<{kind}>")
        elif kind == "ticker":
            words += ["<ticker>", word[1:].rstrip("._").lower()]
        elif kind == "not":
            words.append("n't")
        elif kind == "clitic":
            words.append("'" + word[1:].lower())
        else:
            lower = word.lower()
            if at and pieces[at - 1].kind == "number" and lower in _SCALES:
                lower = _SCALES[lower][0]
            words.append(_UNITS.get(lower, lower))
            sentence += word in ";!?" or (
                word == "." and pieces[at + 1 : at + 2] != [] and pieces[at + 1].text[0].isupper()
            )
    return " ".join(_compared(words, numbers))


def _shouted(pieces: Sequence[_Piece]) -> list[bool]:
    """True where a shout begins: one word of at least four capitals, or several words in capitals."""
    loud = [p.kind == "word" and len(p.text) > 1 and p.text.isupper() for p in pieces]
    begins, at = [False] * len(pieces), 0
    while at < len(pieces):
        end = at
        while end < len(pieces) and loud[end]:
            end += 1
        begins[at] = end - at > 1 or (end > at and len(pieces[at].text) > 3)
        at = max(end, at + 1)
    return begins


def _append_number(
    words: list[str], numbers: list[_Number], pieces: Sequence[_Piece], at: int, sentence: int
) -> None:
    piece = pieces[at]
    previous = pieces[at - 1] if at else _NOTHING
    before = previous.text.lower()
    after = pieces[at + 1].text.lower() if at + 1 < len(pieces) else ""
    if piece.glued and previous.text in ("+", "-", "−") and not previous.glued:
        words[-1] = "<plus>" if before == "+" else "<minus>"
    if (
        _YEAR.fullmatch(piece.text)
        and after not in _UNITS
        and before not in _UNITS
        and before not in _CURRENCIES
    ):
        words.append("<year>")
        return
    words.append("<n>")
    named = (
        piece.glued and previous.kind == "word" and before not in _CURRENCIES
    )  # Q1, H1N1: a name, no amount
    if named or after in _MONTHS or before in _MONTHS:
        return
    scale = _SCALES.get(after, ("", 1.0))[1]
    unit = _UNITS.get(after) or (before if before in _CURRENCIES else _UNITS.get(before, ""))
    if not unit and scale != 1.0 and at + 2 < len(pieces) and pieces[at + 2].text.lower() in _CURRENCIES:
        unit = pieces[at + 2].text.lower()
    numbers.append(_Number(len(words) - 1, _value(piece.text) * scale, unit, sentence))


def _value(text: str) -> float:
    """12,000.5 and 12.000,5 alike: the last mark is the decimal one unless three digits follow it and it is a comma."""
    head, mark, tail = text.rpartition("." if text.rfind(".") > text.rfind(",") else ",")
    if not mark:
        return float(text)
    whole = re.sub(r"[.,]", "", head)
    return float(whole + tail) if mark == "," and len(tail) == 3 else float(f"{whole or 0}.{tail}")


def _compared(words: list[str], numbers: Sequence[_Number]) -> list[str]:
    for i, number in enumerate(numbers):
        for later in numbers[i + 1 : i + 4]:
            if later.sentence == number.sentence and later.unit == number.unit:
                if later.value != number.value:
                    words[number.place] = "<n_gt>" if number.value > later.value else "<n_lt>"
                break
    return words


def fingerprint(text: str) -> str:
    """Sixteen hexadecimal digits that are equal for texts which differ only in case, blanks and markup."""
    return blake2b(" ".join(clean(text).lower().split()).encode(), digest_size=8).hexdigest()


class TextCodec:
    """Sub-word vocabulary with its normalisation: text to token numbers and back.

    Beside the pieces that the tokenizer learned there may be whole ``words`` that were added later.
    """

    def __init__(self, tokenizer: Tokenizer, words: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._pieces: int = tokenizer.get_vocab_size()
        self._words = list(words)
        self._known = {word: [number] for number, word in enumerate(words, self._pieces)}
        self._known |= {mark: [number] for number, mark in enumerate(MARKS)}
        self.size = self._pieces + len(self._words)

    @classmethod
    def train(cls, texts: Iterable[str], size: int = 8000) -> TextCodec:
        """Learn at most ``size`` tokens from ``texts``: the 256 bytes, the marks, and the commonest pieces."""
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.WhitespaceSplit(),
                pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False),
            ]
        )
        trainer = trainers.BpeTrainer(
            vocab_size=max(size, 256 + len(MARKS)), min_frequency=2, special_tokens=list(MARKS), show_progress=False,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        )  # fmt: skip
        tokenizer.decoder = decoders.ByteLevel()
        plain = (" ".join(w for w in normalise(text).split() if w not in MARKS) for text in texts)
        tokenizer.train_from_iterator(plain, trainer)
        return cls(tokenizer)

    def extended(self, texts: Iterable[str], least: int) -> tuple[TextCodec, list[list[int]]]:
        """A vocabulary with every word of ``texts`` as one token that occurs ``least`` times and is in pieces here.

        Also gives the pieces of each new word: what its embedding can begin with.
        """
        counts = Counter(word for text in texts for word in normalise(text).split())
        wanted = sorted(word for word, n in counts.items() if n >= least and word not in self._known)
        pieces = dict(zip(wanted, self._in_pieces(wanted), strict=True))
        split = [word for word in wanted if len(pieces[word]) > 1]
        return TextCodec(self._tokenizer, [*self._words, *split]), [pieces[word] for word in split]

    @classmethod
    def from_json(cls, text: str) -> TextCodec:
        """The vocabulary that :meth:`to_json` wrote; DataMissing when it is broken or lacks the marks."""
        try:
            found = json.loads(text)
            words = [str(word) for word in found["words"]]
            tokenizer = Tokenizer.from_str(json.dumps(found["tokenizer"]))
        except Exception as error:
            raise DataMissing(f"The vocabulary cannot be read: {error}.", "Train the run again.") from error
        if [tokenizer.token_to_id(mark) for mark in MARKS] != list(range(len(MARKS))):
            raise DataMissing("The vocabulary lacks the marks of this version.", "Train the run again.")
        return cls(tokenizer, words)

    def to_json(self) -> str:
        found = {"tokenizer": json.loads(self._tokenizer.to_str()), "words": self._words}
        return json.dumps(found, ensure_ascii=False)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token numbers of each text; an empty list where nothing readable is left.

        Raises UsageError for a text of more than ``MAX_CHARS`` characters.
        """
        for row, text in enumerate(texts):
            if len(text) > MAX_CHARS:
                raise UsageError(
                    f"Text {row + 1} has {len(text):,} characters: at most {MAX_CHARS:,} are read.",
                    "Split it into its articles.",
                )
        split = [normalise(text).split() for text in texts]
        others = sorted({word for words in split for word in words if word not in self._known})
        known = self._known | dict(zip(others, self._in_pieces(others), strict=True))
        return [list(self._numbers(words, known)) for words in split]

    @staticmethod
    def _numbers(words: Sequence[str], known: dict[str, list[int]]) -> Iterator[int]:
        """Numbers of ``words``; the name of a ticker only where it is one token: pieces of a name mean nothing."""
        before = ""
        for word in words:
            numbers = known[word]
            if before != "<ticker>" or len(numbers) == 1:
                yield from numbers
            before = word

    def _in_pieces(self, words: Sequence[str]) -> list[list[int]]:
        found = self._tokenizer.encode_batch_fast(words, add_special_tokens=False)
        return [encoding.ids for encoding in found]

    def token(self, number: int) -> str:
        """The text of one token as people read it: a leading blank begins a word."""
        if number >= self._pieces:
            return f" {self._words[number - self._pieces]}"
        return str(self._tokenizer.decode([number], skip_special_tokens=False)) or MARKS[number]

    def tokens(self, numbers: Sequence[int]) -> list[str]:
        return [self.token(number) for number in numbers]
