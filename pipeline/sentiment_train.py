"""``recur train sentiment``: from files of texts to a run folder with a sentiment model in it.

1. Vocabulary and language model from the unlabelled files (``--pretrain``) and the labelled training part.
2. A few more passes of the language model over the texts of the training part.
3. Fine-tuning on its labels: a scout finds by the validation part (the file's own, else a tenth of the training part)
   how long to learn and how to mix its probabilities with those of n-grams; then several networks learn from different
   seeds, from the tenth too, and their weights are averaged.

With ``--from`` an earlier run takes the place of 1: the words of the new texts that its vocabulary would break into
pieces become tokens, and 2 and 3 go on from its classifier.

Texts of the test and validation parts are kept out of all of it, wherever else they occur. Where an earlier run has
learned from some of the validation part, the others choose.
"""

from __future__ import annotations

import copy
import logging
import time
import tomllib
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from recur.models.text.classifier import TextClassifier
from recur.models.text.encoder import Encoder, EncoderSpec, load_weights
from recur.models.text.language import LanguageModel, grown, grown_classifier
from recur.models.text.ngrams import NGrams
from recur.pipeline.artefact import environment
from recur.pipeline.config import Config
from recur.pipeline.labelled import Texts, read_labelled, read_texts, stratified
from recur.pipeline.market_labels import MarketTexts, against_majority
from recur.pipeline.sentiment import (
    KIND,
    SentimentModel,
    clean_part,
    contaminated,
    evaluate_texts,
    open_sentiment,
    read_model,
    save_model,
    score_texts,
    sha256_of,
)
from recur.pipeline.sentiment_blend import Blend, fit_blend, fit_ngrams, ngram_logits, spread
from recur.pipeline.sentiment_fit import FinePlan, FloatArray, early_stopped, fine_tune, logits_of
from recur.pipeline.sentiment_language import LanguagePlan, Progress, bf16_pays, pretrain
from recur.pipeline.sentiment_metrics import evaluate
from recur.pipeline.sentiment_run import begin, describe, write_curves
from recur.pipeline.text import TextCodec, normalise
from recur.storage.runs import COMPLETE, RUNNING, RunFolder, list_runs, new_run_id
from recur.vocabulary import DataMissing, UsageError, did_you_mean, iso, parse_time

Say = Callable[[str, int, int], None]
STATE = "language.safetensors"
FEW = 10
"""Validation texts that nothing has learned from, at least, before they alone choose."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SentimentPlan:
    """Sizes and stages of a training, as recorded in ``sentiment.json``."""

    vocabulary: int = 6000
    width: int = 256
    hidden: int = 256
    layers: int = 1
    language: LanguagePlan = field(default_factory=LanguagePlan)
    adapt: LanguagePlan = field(default_factory=lambda: LanguagePlan(epochs=3, streams=24, lr=2e-3))
    fine: FinePlan = field(default_factory=FinePlan)
    validation: float = 0.1
    members: int = 3
    """Fine-tunings, each from another seed, whose weights are averaged."""
    new_words: int = 3
    """Words of the training texts that occur so often become tokens when the vocabulary is an earlier run's."""

    def with_choices(self, epochs: int | None, seed: int | None) -> SentimentPlan:
        """The plan with other passes of fine-tuning at most and another seed of every stage; None changes nothing."""
        plan = self if epochs is None else replace(self, fine=replace(self.fine, epochs=epochs))
        if seed is None:
            return plan
        stages = {name: replace(getattr(plan, name), seed=seed) for name in ("language", "adapt", "fine")}
        return replace(plan, **stages)


@dataclass(frozen=True, slots=True)
class Parts:
    """Labelled texts by their use; ``test`` may be empty. ``drawn``: whether the validation part is a part of the
    training part that was drawn for it, and not one of the file's own."""

    train: Texts
    validation: Texts
    test: Texts
    drawn: bool


def divide(texts: Texts, share: float, seed: int) -> Parts:
    """The file's own parts; without a validation part, ``share`` of each class of the training part becomes it."""
    names = np.array(texts.split)
    train = np.flatnonzero((names == "") | (names == "train"))
    validation, test = np.flatnonzero(names == "validation"), np.flatnonzero(names == "test")
    drawn = not len(validation)
    if drawn:
        kept, out = stratified(texts.label[train], share, seed)
        train, validation = train[kept], train[out]
    if not len(train) or not len(validation) or len(np.unique(texts.label[train])) < 2:
        raise UsageError(
            f"{len(texts)} labelled texts leave {len(train)} to train on and {len(validation)} to validate: too few.",
            "At least ten texts of each of two classes are needed.",
        )
    for name, rows in (("training", train), ("validation", validation)):
        if not any(normalise(texts.text[i]) for i in rows):
            raise UsageError(
                f"None of the {len(rows)} texts of the {name} part can be read.", "Is it the right column?"
            )
    return Parts(texts.take(train), texts.take(validation), texts.take(test), drawn)


def known_to(parent: SentimentModel | None, part: Texts, by_time: bool) -> NDArray[np.bool_]:
    """Which texts of ``part`` an earlier run has learned from; ``by_time``: or from others of their time.

    Prices tell the same of all texts of a time: where the market labels, the time counts.
    """
    if parent is None:
        return np.zeros(len(part), dtype=bool)
    return np.array(contaminated(parent, part.text, part.published if by_time else None), dtype=bool)


def deciding(validation: Texts, known: NDArray[np.bool_], parent: str | None) -> NDArray[np.bool_]:
    """Which texts of the validation part choose: those that are not ``known`` to the ``parent``, all when too few are left."""
    fresh = ~known & np.array([bool(normalise(text)) for text in validation.text])
    if not known.any() or (fresh.sum() >= FEW and len(np.unique(validation.label[fresh])) > 1):
        return ~known
    _log.warning(
        "%d of the %d validation texts were learned from by %s and too few are left to choose by: the validation metrics and"
        " the probabilities' confidence are too kind, the weight of the n-grams is too small; give a validation part of new texts",
        known.sum(), len(validation), parent,
    )  # fmt: skip
    return np.ones(len(validation), dtype=bool)


def _refuse_later(parent: SentimentModel, market: MarketTexts) -> None:
    """A parent that learned from the time of the test part knows what is asked there."""
    if parent.window and parent.window[1] > market.known_until_ms:
        raise UsageError(
            f"Run {parent.run_id} learned from texts up to {iso(parent.window[1])}, and the test part begins at"
            f" {iso(market.known_until_ms)}: it would be judged on what it knows.",
            f"Begin with a run that ends before, or give --since {iso(parent.window[1])} and later texts.",
        )


def adapt(
    language: LanguageModel,
    net: TextClassifier,
    texts: Sequence[Sequence[int]],
    plan: SentimentPlan,
    say: Say,
) -> None:
    """Step 2: the language model goes on from the classifier's encoder over ``texts``, and gives it back."""
    language.encoder.load_state_dict(net.encoder.state_dict())
    if plan.adapt.epochs:
        language.encoder.halve(bf16_pays())
        pretrain(language, texts, plan.adapt, on_step=lambda k, n, _: say("adapting to the texts", k, n))
        language.encoder.halve(False)
    net.encoder.load_state_dict(language.encoder.state_dict())


def fine_tuned(
    net: TextClassifier,
    codec: TextCodec,
    texts: Sequence[Sequence[int]],
    parts: Parts,
    choosing: NDArray[np.bool_],
    plan: SentimentPlan,
    say: Say,
    curves: dict[str, list[float]],
) -> tuple[NGrams, Blend, FloatArray]:
    """Step 3: trains ``net`` in place and n-grams beside it; returns these, how the two are mixed, and the scout's
    probabilities of the validation part.

    The scout learns from the training part alone; the ``choosing`` rows of the validation part choose its epoch and how
    it is mixed. Then ``plan.members`` networks learn as long from the same start, from the validation part too where that
    was drawn from the training part, and the weights are their mean (Wortsman et al. 2022, arXiv:2203.05482): most of
    what an ensemble gains, at the price of one network. The logits of the mean are smaller than those of its parts, the more
    so the further these went apart; the scout's temperature is lowered by as much. The n-grams learn from the same texts. ``texts`` are the tokens of
    the training part; ``curves`` gets the scout's validation loss.
    """
    labels = parts.train.label
    tokens = codec.encode(parts.validation.text)
    check = (
        [text for text, chooses in zip(tokens, choosing, strict=True) if chooses],
        parts.validation.label[choosing],
    )
    begin = copy.deepcopy(net.state_dict())
    net.encoder.halve(bf16_pays())
    total = (1 + plan.members) * plan.fine.epochs
    curve = early_stopped(net, texts, labels, check, plan.fine, lambda k, _: say("fine-tuning", k, total))
    curves["validation_loss"] = curve
    net.encoder.halve(False)
    logits = logits_of(net, tokens)
    read = np.asarray(np.isfinite(logits).all(axis=1)) & choosing
    aside = ngram_logits(fit_ngrams(texts, labels, net.out.out_features), tokens)
    blend = fit_blend(logits[read], aside[read], parts.validation.label[read])
    if parts.drawn:
        texts, labels = [*texts, *tokens], np.concatenate([labels, parts.validation.label])
    enough = int(np.argmin(curve)) + 1
    mean, sizes = {name: torch.zeros_like(value) for name, value in begin.items()}, []
    net.encoder.halve(bf16_pays())
    for member in range(plan.members):
        net.load_state_dict(begin)

        def told(epoch: int, _: TextClassifier, member: int = member) -> bool:
            say("fine-tuning", (1 + member) * plan.fine.epochs + epoch + 1, total)
            return epoch + 1 == enough

        fine_tune(net, texts, labels, replace(plan.fine, seed=plan.members * plan.fine.seed + member), told)
        sizes.append(spread(logits_of(net, tokens)))
        for name, value in net.state_dict().items():
            mean[name] += value / plan.members
    net.load_state_dict(mean)
    net.encoder.halve(False)
    softer = spread(logits_of(net, tokens)) / float(np.mean(sizes))
    final = replace(blend, temperature=blend.temperature * softer)
    return fit_ngrams(texts, labels, net.out.out_features), final, blend(logits, aside)


def train_sentiment(
    home: Path,
    data: Sequence[Path],
    pretraining: Sequence[Path],
    *,
    base: str | None = None,
    plan: SentimentPlan | None = None,
    resume: str | None = None,
    market: MarketTexts | None = None,
    config: Config | None = None,
    say: Say = lambda what, done, total: None,
) -> dict[str, Any]:
    """Train one sentiment model; returns its metrics (validation, and test where the data has such a part).

    ``market`` holds the texts where the market labels them; ``data`` are then the files they come from, if any. Texts of
    ``pretraining`` that bear a time after its training part are not read. ``config`` is kept in the run.
    ``resume`` goes on with an unfinished run on the same files, from the last finished pass of its language model;
    fine-tuning, which takes minutes, begins again. Raises UsageError for files that do not fit.
    """
    started, cpu = time.monotonic(), time.process_time()
    if base and pretraining:
        raise UsageError("Both --from and --pretrain were given.", "A run is either taken up or made afresh.")
    plan = plan or SentimentPlan()
    texts = market.texts if market else read_labelled(data)
    corpus = read_texts(pretraining) if pretraining else None
    if corpus and market:
        corpus = corpus.before(market.train_until_ms)
    files = [_file(path) for path in (*data, *pretraining)]
    if market:
        files.append({"path": "labels from the market", "sha256": market.sha256, "rows": len(texts)})
    folder = (
        _resumed(home, resume, files)
        if resume
        else RunFolder(home, new_run_id(KIND, "lstm", int(time.time() * 1000)))
    )
    if resume:
        if folder.status() == COMPLETE:
            return folder.read_json("metrics.json")
        begun = tomllib.loads((folder.path / "config.toml").read_text("utf-8"))
        plan = plan.with_choices(begun["sentiment"]["epochs"], int(folder.read_manifest()["seed"]))
        begun_from = folder.read_manifest()["parent"]
        if base not in (None, begun_from):
            raise UsageError(
                f"Run {folder.run_id} was begun from {begun_from or 'nothing'}, not from {base}.",
                "Leave --from out to go on with it.",
            )
        base = begun_from
    parent = open_sentiment(home, base) if base else None
    if parent and market:
        _refuse_later(parent, market)
    parts = divide(texts, plan.validation, plan.fine.seed)
    known = known_to(parent, parts.validation, market is not None)
    choosing = deciding(parts.validation, known, base)
    held_out = set(parts.validation.fingerprints) | set(parts.test.fingerprints)
    plain = (
        [t for t, f in zip(corpus.text, corpus.fingerprints, strict=True) if f not in held_out]
        if corpus
        else []
    )
    seen = sorted(
        (set(corpus.fingerprints if corpus else ()) - held_out)
        | set(parts.train.fingerprints)
        | set(parts.validation.fingerprints if parts.drawn else ())
        | set(parent.seen if parent else ())
    )
    labelled = [parts.train, *([parts.validation] if parts.drawn else [])]
    windows = [*(part.window() for part in labelled), *([corpus.window()] if corpus else [])]
    if market:  # prices up to here have decided when to stop
        windows.append({"since": None, "until": iso(market.learned_until_ms)})
    if parent and parent.window:
        windows.append(open_run_window(home, parent.run_id))
    manifest: dict[str, Any] = {
        "run_id": folder.run_id, "kind": KIND, "model": "lstm", "status": RUNNING, "seed": plan.fine.seed,
        "device": "cpu", "parent": parent.run_id if parent else None, "data": files, "texts": texts.counts,
        "training_window": _joined(windows), "training_texts": len(seen),
        "labels": market.summary if market else "human",
        "validation": {"texts": len(known), "known_to_parent": int(known.sum()), "choosing": int(choosing.sum())},
        **environment(),
    }  # fmt: skip
    if not resume:
        begin(folder, config or Config(), plan.fine.epochs, plan.fine.seed, manifest)
    if parent:
        codec, pieces = parent.codec.extended(parts.train.text, plan.new_words)
        tokens = codec.encode(parts.train.text)
        language, net = grown(parent.language, pieces), grown_classifier(parent.net, pieces)
    else:
        with nullcontext() if resume else folder.unless_data_missing():
            codec, language = _pretrained(folder, [*plain, *parts.train.text], plan, say)
        tokens = codec.encode(parts.train.text)
        torch.manual_seed(plan.fine.seed)
        net = TextClassifier(Encoder(language.encoder.spec))
        net.encoder.load_state_dict(language.encoder.state_dict())
    adapt(language, net, [text for text in tokens if text], plan, say)
    spent = {"pretrain_s": time.monotonic() - started, "pretrain_cpu_s": time.process_time() - cpu}
    curves: dict[str, list[float]] = (
        {} if parent else {"language_loss": folder.read_json("language.json")["losses"]}
    )
    ngrams, blend, scouted = fine_tuned(net, codec, tokens, parts, choosing, plan, say, curves)
    write_curves(folder, curves)
    save_model(folder, net, language, ngrams)
    folder.write_text("tokenizer.json", codec.to_json())
    describe(folder, codec)
    folder.write_text("training_texts.txt", "\n".join(seen) + "\n")
    spec = {"encoder": language.encoder.spec.as_dict(), "blend": asdict(blend), "plan": asdict(plan)}
    folder.write_json("sentiment.json", spec)
    manifest |= {
        "weights_sha256": sha256_of(folder.weights),
        "wall_s": time.monotonic() - started,
        "cpu_s": time.process_time() - cpu,
        **spent,
    }
    metrics = _judged(folder, manifest, parts, (scouted, known), market)
    folder.write_json("manifest.json", manifest | {"status": COMPLETE})
    (folder.path / STATE).unlink(missing_ok=True)
    return metrics


def _judged(
    folder: RunFolder,
    manifest: dict[str, Any],
    parts: Parts,
    scouted: tuple[FloatArray, NDArray[np.bool_]],
    market: MarketTexts | None,
) -> dict[str, Any]:
    """Write the metrics: on the validation part the scout's (its probabilities, and which texts were known before), on the
    test part those of the model as it is read back from disk."""
    folder.write_json("manifest.json", manifest)
    model = read_model(folder)
    label = parts.validation.label
    metrics: dict[str, Any] = {
        "run_id": folder.run_id,
        "model": "lstm",
        "validation": evaluate(scouted[0], label) | clean_part(scouted[0], label, scouted[1]),
    }
    if len(parts.test):
        metrics["test"] = evaluate_texts(model, parts.test)
    if market and len(parts.test):
        p = score_texts(model, parts.test.text)
        metrics["test"]["majority"] = against_majority(p, parts.test, parts.train, market.days)
    if market:
        metrics["labels"] = market.summary
    metrics |= {key: manifest[key] for key in ("texts", "wall_s", "cpu_s", "pretrain_s", "pretrain_cpu_s")}
    folder.write_json("metrics.json", metrics)
    return metrics


def _pretrained(
    folder: RunFolder, texts: Sequence[str], plan: SentimentPlan, say: Say
) -> tuple[TextCodec, LanguageModel]:
    """Step 1, from the last finished pass that the folder keeps."""
    tokenizer, state = folder.path / "tokenizer.json", folder.path / STATE
    if tokenizer.exists():
        codec = TextCodec.from_json(tokenizer.read_text("utf-8"))
    else:
        codec = TextCodec.train(texts, plan.vocabulary)
        folder.write_text("tokenizer.json", codec.to_json())
    torch.manual_seed(plan.language.seed)
    language = LanguageModel(Encoder(EncoderSpec(codec.size, plan.width, plan.hidden, plan.layers)))
    done = Progress()
    if state.exists():
        tensors = load_file(state)
        load_weights(language, tensors, "net.")
        moments = {k.removeprefix("opt."): v for k, v in tensors.items() if k.startswith("opt.")}
        done = Progress(len(tensors["losses"]), tensors["losses"].tolist(), moments)

    def keep(progress: Progress) -> None:
        tensors: dict[str, Tensor] = {f"net.{k}": v.contiguous() for k, v in language.state_dict().items()}
        tensors |= {f"opt.{k}": v.contiguous() for k, v in progress.moments.items()}
        beside = state.with_suffix(".tmp")
        save_file(tensors | {"losses": torch.tensor(progress.losses, dtype=torch.float64)}, beside)
        beside.replace(state)

    language.encoder.halve(bf16_pays())
    tokens = [t for t in codec.encode(texts) if t]
    losses = pretrain(language, tokens, plan.language, done, keep, lambda k, n, _: say("pretraining", k, n))
    language.encoder.halve(False)
    folder.write_json(
        "language.json", {"losses": losses, "tokens": sum(map(len, tokens)), "texts": len(tokens)}
    )
    return codec, language


def _resumed(home: Path, resume: str, files: list[dict[str, Any]]) -> RunFolder:
    runs = [run for run in list_runs(home) if run.run_id.startswith(f"{KIND}-")]
    names = [run.run_id for run in runs]
    wanted = names[-1] if resume == "last" and names else resume
    if wanted not in names:
        raise UsageError(
            f"There is no sentiment run '{resume}' in {home / 'runs'}.{did_you_mean(resume, names)}",
            "'--resume last' takes the newest.",
        )
    folder = RunFolder(home, wanted)
    if folder.status() == "broken":
        raise DataMissing(
            f"Run {wanted} was cut off before it began.", f"Remove {folder.path} and train again."
        )
    before = folder.read_manifest()["data"]
    if [f["sha256"] for f in before] != [f["sha256"] for f in files]:
        raise UsageError(
            f"Run {wanted} was started on other files: {', '.join(f['path'] for f in before)}.",
            "Give the same files to go on, or start a new run without --resume.",
        )
    return folder


def _file(path: Path) -> dict[str, Any]:
    try:
        return {"path": str(path), "sha256": sha256_of(path)}
    except OSError as error:
        raise UsageError(f"Cannot read {path}: {error.strerror}.", "Check the path.") from error


def open_run_window(home: Path, run_id: str) -> dict[str, str | None]:
    """The training window in a run's manifest."""
    window: dict[str, str | None] = RunFolder(home, run_id).read_manifest()["training_window"]
    return window


def _joined(windows: Sequence[dict[str, str | None]]) -> dict[str, str | None]:
    since = [w["since"] for w in windows if w["since"]]
    until = [w["until"] for w in windows if w["until"]]
    return {
        "since": min(since, key=parse_time) if since else None,
        "until": max(until, key=parse_time) if until else None,
    }
