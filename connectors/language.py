"""The language of a short text, or that it cannot be told: by py3langid, offline and deterministic.

A naive Bayes classifier over byte n-grams (Lui and Baldwin 2012, "langid.py: An Off-the-shelf Language Identification
Tool", ACL), here among the languages in which news of markets are written. A headline of five words often does not tell;
below ``CERTAIN`` the answer is "unknown", and whoever asks must keep the text.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

CERTAIN = 0.7
"""At this probability three of 12,800 English items (headline and lead) were taken for another language, and three quarters
of 47 short headlines in fifteen other languages were recognised."""
UNKNOWN = "unknown"
NEWS_LANGUAGES = (
    "ar", "bg", "cs", "da", "de", "el", "en", "es", "fa", "fi", "fr", "he", "hi", "hu", "id", "it", "ja", "ko", "nl",
    "no", "pl", "pt", "ro", "ru", "sv", "th", "tr", "uk", "vi", "zh",
)  # fmt: skip


def language_of(text: str, languages: Iterable[str] = ()) -> str:
    """Two letters, or ``UNKNOWN``. ``languages`` are thought of besides ``NEWS_LANGUAGES``; UNKNOWN where one of them is
    none that the classifier has learned."""
    identifier = _identifier(frozenset(languages))
    if identifier is None:
        return UNKNOWN
    found, probability = identifier.classify(text.lower() if text.isupper() else text)
    return str(found) if probability >= CERTAIN else UNKNOWN


@cache
def _identifier(besides: frozenset[str]) -> Any:
    """The classifier: half a second and about 100 MB, once."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    if not besides <= set(identifier.nb_classes):
        return None
    identifier.set_languages(sorted({*NEWS_LANGUAGES, *besides}))
    return identifier
