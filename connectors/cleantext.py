"""Text from strangers made harmless and comparable: no markup, no control characters, bounded length.

What carries meaning stays as it was written: case, punctuation, `$BTC`, `+5.2%`, emoji.
"""

from __future__ import annotations

import re
import unicodedata
from html.parser import HTMLParser

TITLE_LIMIT = 500
BODY_LIMIT = 20_000
"""Characters kept of a body; a longer one is cut at the last space before it."""
_INPUT_LIMIT = 50 * BODY_LIMIT  # markup beyond it is not even parsed
_SILENT = {"script", "style", "template", "noscript", "iframe", "object", "svg"}
_INLINE = {"a", "abbr", "b", "em", "i", "mark", "s", "small", "span", "strong", "sub", "sup", "u"}
_KEPT_FORMAT = {"\u200d", "\ufe0f"}  # joiner and emoji style: they hold emoji together
_SPACE = re.compile(r"\s+")
_MARKUP = re.compile(r"<[a-zA-Z/!?]|&[#a-zA-Z]")


class _Text(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._silent = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self._silent += tag in _SILENT
        if tag not in _INLINE:
            self.parts.append(" ")

    def handle_endtag(self, tag: str) -> None:
        self._silent -= tag in _SILENT and self._silent > 0
        if tag not in _INLINE:
            self.parts.append(" ")

    def handle_data(self, data: str) -> None:
        if not self._silent:
            self.parts.append(data)


def clean(text: object, limit: int) -> str:
    """``text`` without markup and control characters, white space collapsed, at most ``limit`` characters.

    Anything that is not a string gives the empty string.
    """
    if not isinstance(text, str):
        return ""
    text = text[:_INPUT_LIMIT]
    if _MARKUP.search(text):
        parser = _Text()
        parser.feed(text)
        parser.close()
        text = "".join(parser.parts)
    text = unicodedata.normalize("NFC", text)
    if not text.isascii() or not text.isprintable():
        text = "".join(map(_kept, text))
    text = _SPACE.sub(" ", text).strip()
    if len(text) <= limit:
        return text
    cut = text.rfind(" ", limit // 2, limit)
    return text[: cut if cut > 0 else limit].rstrip()


def _kept(char: str) -> str:
    if char in "\t\n\r\x0b\x0c":
        return " "
    if char in _KEPT_FORMAT:
        return char
    # Cc control, Cf format (bidirectional overrides among them), Cs surrogates, Co private, Cn unassigned
    return "" if unicodedata.category(char)[0] == "C" else char


def latin_share(text: str) -> float:
    """Share of the letters of ``text`` that are Latin; 1 when it has no letters."""
    letters = [c for c in text if c.isalpha()]
    if not letters:
        return 1.0
    return sum(c < "\u0250" or unicodedata.name(c, "").startswith("LATIN") for c in letters) / len(letters)
