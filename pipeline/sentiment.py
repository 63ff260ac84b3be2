"""A trained sentiment model: opening it, scoring texts, judging it on labelled files.

A run of kind ``sentiment`` holds ``model.safetensors`` (classifier, language model, n-grams), ``tokenizer.json``,
``sentiment.json`` (sizes, plan, blend) and ``training_texts.txt`` (a fingerprint of every text it learned from).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import file_digest
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from recur.models.text.classifier import TextClassifier
from recur.models.text.encoder import Encoder, EncoderSpec, load_weights
from recur.models.text.language import LanguageModel
from recur.models.text.ngrams import NGrams
from recur.pipeline.labelled import CLASSES, Texts, read_labelled
from recur.pipeline.sentiment_blend import Blend, ngram_logits
from recur.pipeline.sentiment_fit import FloatArray, logits_of
from recur.pipeline.sentiment_metrics import evaluate
from recur.pipeline.text import TextCodec, fingerprint
from recur.storage.runs import RunFolder, latest_run, open_run
from recur.vocabulary import DataMissing, parse_time

KIND = "sentiment"


@dataclass(frozen=True, slots=True)
class SentimentModel:
    """What a run holds. ``seen`` are fingerprints of its training texts, ``window`` when they were published (ms)."""

    run_id: str
    net: TextClassifier
    language: LanguageModel
    codec: TextCodec
    ngrams: NGrams
    blend: Blend
    seen: frozenset[str]
    window: tuple[int, int] | None


def save_model(folder: RunFolder, net: TextClassifier, language: LanguageModel, ngrams: NGrams) -> None:
    """Write the weights: the classifier's under ``classifier.``, the language model's under ``language.``, and ``ngrams.``.

    After fine-tuning the two have different encoders; both are kept.
    """
    tensors: dict[str, Tensor] = {f"classifier.{k}": v.contiguous() for k, v in net.state_dict().items()}
    tensors |= {f"language.{k}": v.contiguous().clone() for k, v in language.state_dict().items()}
    tensors |= {f"ngrams.{k}": v.contiguous() for k, v in ngrams.state_dict().items()}
    beside = folder.path / ".model.tmp"
    save_file(tensors, beside)
    beside.replace(folder.weights)


def open_sentiment(home: Path, run_id: str | None = None) -> SentimentModel:
    """The model of a complete run, by default the newest. Raises DataMissing when there is none or it is damaged."""
    name = run_id or latest_run(home, KIND)
    if name is None:
        raise DataMissing(
            f"There is no sentiment model in {home}.", "recur train sentiment --data FILE makes one."
        )
    folder = open_run(home, name)
    if not name.startswith(f"{KIND}-"):
        raise DataMissing(f"Run '{name}' is no sentiment model.", "Their ids begin with 'sentiment-'.")
    return read_model(folder)


def read_model(folder: RunFolder) -> SentimentModel:
    """The model in a folder, whatever the status of its run. Raises DataMissing when it is damaged."""
    try:
        spec, manifest = folder.read_json("sentiment.json"), folder.read_manifest()
        if manifest.get("weights_sha256") not in (
            None,
            sha256_of(folder.weights),
        ):  # None: before there was one
            raise ValueError("the weights are not those that were trained")
        sizes = EncoderSpec(**spec["encoder"])
        net, language = TextClassifier(Encoder(sizes)), LanguageModel(Encoder(sizes))
        tensors = load_file(folder.weights)
        load_weights(net, tensors, "classifier.")
        load_weights(language, tensors, "language.")
        ngrams = NGrams(len(CLASSES))
        load_weights(ngrams, tensors, "ngrams.")
        codec = TextCodec.from_json((folder.path / "tokenizer.json").read_text("utf-8"))
        if codec.size != sizes.vocabulary:
            raise ValueError(f"the vocabulary has {codec.size} tokens, the network {sizes.vocabulary}")
        seen = frozenset((folder.path / "training_texts.txt").read_text("utf-8").split())
        seen -= {fingerprint("")}  # nothing is learned from what cannot be read
        window, blend = manifest["training_window"], Blend(**spec["blend"])
        span = (parse_time(window["since"]), parse_time(window["until"])) if window["since"] else None
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise DataMissing(
            f"Run {folder.run_id} cannot be loaded: {_first_line(error)}.",
            "Train again with 'recur train sentiment'.",
        ) from error
    return SentimentModel(folder.run_id, net.eval(), language.eval(), codec, ngrams, blend, seen, span)


def _first_line(error: Exception) -> str:
    said = f"no {error}" if isinstance(error, KeyError) else str(error)
    return (said.splitlines() or [type(error).__name__])[0].rstrip(".")


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def score_texts(model: SentimentModel, texts: Sequence[str]) -> FloatArray:
    """Probabilities (N, 3) of negative, neutral and positive; a row of NaN for a text with nothing to read.

    A text longer than ``CHUNK`` tokens is read in chunks with the state carried, none is cut. Raises UsageError for a
    text of more than a megabyte.
    """
    return score_tokens(model, model.codec.encode(texts))


def score_tokens(model: SentimentModel, tokens: Sequence[Sequence[int]]) -> FloatArray:
    """As :func:`score_texts`, of texts as token numbers."""
    return model.blend(logits_of(model.net, tokens), ngram_logits(model.ngrams, tokens))


def contaminated(
    model: SentimentModel, texts: Sequence[str], published: Sequence[int | None] | None = None
) -> list[bool]:
    """Whether the model may have learned from a text: it was one of its texts, or was published in their time."""
    known = [fingerprint(text) in model.seen for text in texts]
    if published is None or model.window is None:
        return known
    first, last = model.window
    return [
        seen or (at is not None and first <= at <= last) for seen, at in zip(known, published, strict=True)
    ]


def score_rows(model: SentimentModel, texts: Sequence[str]) -> list[dict[str, Any]]:
    """One JSON-ready row per text; ``label`` and probabilities are None where nothing could be read."""
    rows = []
    scores, known = score_texts(model, texts), contaminated(model, texts)
    for text, p, seen in zip(texts, scores, known, strict=True):
        read = bool(np.isfinite(p).all())
        chances = {f"p_{name}": float(p[k]) if read else None for k, name in enumerate(CLASSES)}
        label = CLASSES[int(p.argmax())] if read else None
        rows.append({"text": text, "label": label, **chances, "in_training": seen})
    return rows


def evaluate_texts(model: SentimentModel, texts: Texts) -> dict[str, Any]:
    """Metrics on labelled texts, and under ``clean`` the same without those that the model may have learned from.

    ``clean`` is None when fewer than two texts or only one class would be left.
    """
    scores = score_texts(model, texts.text)
    known = np.array(contaminated(model, texts.text, texts.published))
    return evaluate(scores, texts.label) | {"run_id": model.run_id} | clean_part(scores, texts.label, known)


def clean_part(scores: FloatArray, label: NDArray[np.int64], known: NDArray[np.bool_]) -> dict[str, Any]:
    """``contaminated``: how many rows are ``known``; ``clean``: the metrics of the others, None when fewer than two of
    them or only one class are left.
    """
    left = ~known
    judged = left.sum() > 1 and len(np.unique(label[left])) > 1
    return {
        "contaminated": int(known.sum()),
        "clean": evaluate(scores[left], label[left]) if judged else None,
    }


def evaluate_file(model: SentimentModel, path: Path) -> dict[str, Any]:
    """As :func:`evaluate_texts` on a labelled file, on its test part when it has a ``split`` column."""
    texts = read_labelled([path])
    test = [i for i, part in enumerate(texts.split) if part == "test"]
    return evaluate_texts(model, texts.take(test) if test else texts) | {"texts": texts.counts}
