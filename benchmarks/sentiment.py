"""Sentiment on public texts: the recurrent model beside a linear SVM, on the same folds.

One base run is pretrained on the unlabelled texts of all files but Financial PhraseBank and every test part, and
fine-tuned on the training parts of Twitter and the crypto headlines. The models of PhraseBank and IMDb start from it
(``--from``). It knows the labels of Twitter and the crypto headlines, so nothing would be left to choose by: the model of
Twitter is pretrained on the unlabelled texts itself, and that of the crypto headlines starts from it.

Steps (``--steps``, in this order, each recorded in the results file and not repeated when it is there):

base      pretraining, with time and memory
splits    PhraseBank, stratified 80/20 splits with seeds 0, 1, 2
cv        PhraseBank, stratified 10-fold cross-validation
twitter, crypto, imdb   own 80/20 split (IMDb: its own split)
cross     each model on the test part of each other file
speed     headlines per second on one core, and a megabyte of text

Run with the data folder beside the checkout: ``python benchmarks/sentiment.py [--data ../shared/data]``. Needs
scikit-learn (the extra ``bench``).
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.model_selection import StratifiedKFold, train_test_split
from sklearn.pipeline import Pipeline, make_pipeline, make_union
from sklearn.svm import LinearSVC

from recur.pipeline.labelled import CLASSES, Texts, read_labelled
from recur.pipeline.sentiment import open_sentiment, score_texts
from recur.pipeline.sentiment_fit import logits_of
from recur.pipeline.sentiment_language import LanguagePlan
from recur.pipeline.sentiment_metrics import evaluate
from recur.pipeline.sentiment_train import SentimentPlan, train_sentiment
from recur.pipeline.text import fingerprint

FILES = {
    "phrasebank": "text_financial_phrasebank.parquet",
    "twitter": "text_twitter_financial_news.parquet",
    "crypto": "text_crypto_headlines_5level.parquet",
    "imdb": "text_imdb_20k.parquet",
}
PLAIN = (
    "news_bitcoin_2021_2024.parquet", "news_coindesk_btc_2013_2024.parquet", "news_cryptonews_2021_2022.parquet",
    "news_crypto_2024q2.parquet",
)  # fmt: skip
BASE = replace(SentimentPlan(), members=1)
"""One network: what is fine-tuned from it begins anew with several."""
LONG = replace(
    SentimentPlan().with_choices(2, None),
    members=1,
    new_words=20,
    adapt=LanguagePlan(epochs=1, streams=24, lr=2e-3),
)
"""For reviews of 270 tokens, ten times as many as the other files have: fewer passes, and fewer new words."""
MANY = 2_000
"""Texts of another file that a model is tried on, at most."""
STEPS = ("base", "splits", "cv", "twitter", "crypto", "imdb", "cross", "speed")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--home", type=Path, help="where the runs go; else a temporary folder")
    parser.add_argument(
        "--json", type=Path, default=Path("sentiment.json"), help="results, taken up again if there"
    )
    parser.add_argument("--steps", default=",".join(STEPS))
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(asked.data, asked.home or Path(scratch), asked.json)
        for step in asked.steps.split(","):
            getattr(bench, step)()
    print(json.dumps(bench.results, indent=2))


class Bench:
    """The steps, their files and their results."""

    def __init__(self, data: Path, home: Path, log: Path) -> None:
        self.data, self.home, self.log = data, home, log
        home.mkdir(parents=True, exist_ok=True)
        self.results: dict[str, Any] = json.loads(log.read_text()) if log.exists() else {}
        self.texts = {name: read_labelled([data / file]) for name, file in FILES.items()}
        agreement = pl.read_parquet(data / FILES["phrasebank"])
        agreed = dict(zip(map(fingerprint, agreement["text"]), agreement["agreement_pct"], strict=True))
        self.certain = np.array([agreed[f] == 100 for f in self.texts["phrasebank"].fingerprints])

    # -- steps -----------------------------------------------------------------------------------------------------

    def base(self) -> None:
        def make() -> dict[str, Any]:
            test = {f for name in ("twitter", "crypto") for f in self._part(name)[1].fingerprints}
            test |= set(self.texts["phrasebank"].fingerprints)
            plain = []
            for file in PLAIN:
                frame = pl.read_parquet(self.data / file)
                plain += [
                    t for c in ("text", "description") if c in frame.columns for t in frame[c].to_list() if t
                ]
            plain_file = self.home / "plain.parquet"
            pl.DataFrame({"text": [t for t in plain if fingerprint(t) not in test]}).write_parquet(plain_file)
            train = [self._file(name, *self._part(name)) for name in ("twitter", "crypto")]
            found = train_sentiment(self.home, train, [plain_file], plan=BASE)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            return {
                key: found[key] for key in ("run_id", "wall_s", "cpu_s", "pretrain_s", "pretrain_cpu_s")
            } | {"peak_mb": peak}

        self._once("base", make)

    def splits(self) -> None:
        label = self.texts["phrasebank"].label
        for seed in range(3):
            rows = train_test_split(np.arange(len(label)), test_size=0.2, stratify=label, random_state=seed)
            self._once(f"phrasebank split {seed}", lambda rows=rows: self._fold("phrasebank", *rows))

    def cv(self) -> None:
        label = self.texts["phrasebank"].label
        folds = StratifiedKFold(10, shuffle=True, random_state=0).split(label, label)
        for k, rows in enumerate(folds):
            self._once(f"phrasebank fold {k}", lambda rows=rows: self._fold("phrasebank", *rows))

    def twitter(self) -> None:
        self._once("twitter", lambda: self._fold("twitter", *self._rows("twitter"), afresh=True))

    def crypto(self) -> None:
        if "twitter" in self.results:
            base = self.results["twitter"]["lstm"]["run_id"]
            self._once("crypto", lambda: self._fold("crypto", *self._rows("crypto"), base=base))

    def imdb(self) -> None:
        self._once("imdb", lambda: self._fold("imdb", *self._rows("imdb")))

    def cross(self) -> None:
        for source in ("phrasebank", "twitter", "crypto", "imdb"):
            done = self.results.get("phrasebank split 0" if source == "phrasebank" else source)
            if done is None:
                continue
            model = open_sentiment(self.home, done["lstm"]["run_id"])
            for target in ("phrasebank", "twitter", "crypto", "imdb"):
                test = self._part(target)[1]
                if len(test) > MANY:
                    test = test.take(np.random.default_rng(0).choice(len(test), MANY, replace=False))
                self._once(
                    f"{source} on {target}",
                    lambda test=test, model=model: evaluate(score_texts(model, test.text), test.label),
                )

    def speed(self) -> None:
        def make() -> dict[str, Any]:
            model = open_sentiment(self.home, self.results["twitter"]["lstm"]["run_id"])
            train, test = self._part("twitter")
            opponent = svm().fit(train.text, train.label)
            before = torch.get_num_threads()
            torch.set_num_threads(1)
            taken: dict[str, list[float]] = {"lstm": [], "svm": [], "megabyte": []}
            megabyte = " ".join(test.text) * (1 + 1_000_000 // len(" ".join(test.text)))
            for _ in range(5):
                for name, job in (
                    ("lstm", lambda: score_texts(model, test.text)),
                    ("svm", lambda: opponent.predict(test.text)),
                ):
                    start = time.process_time()
                    job()
                    taken[name].append(time.process_time() - start)
            start = time.process_time()
            score_texts(model, [megabyte[:1_000_000]])
            torch.set_num_threads(before)
            rates = {name: len(test) / float(np.median(taken[name])) for name in ("lstm", "svm")}
            return {"headlines_per_s": rates, "megabyte_s": time.process_time() - start}

        self._once("speed", make)

    # -- parts -----------------------------------------------------------------------------------------------------

    def _rows(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        texts = self.texts[name]
        part = np.array(texts.split)
        if (part == "test").any():
            return np.flatnonzero(part == "train"), np.flatnonzero(part == "test")
        train, test = train_test_split(
            np.arange(len(texts)), test_size=0.2, stratify=texts.label, random_state=0
        )
        return train, test

    def _part(self, name: str) -> tuple[Texts, Texts]:
        train, test = self._rows(name)
        return self.texts[name].take(train), self.texts[name].take(test)

    def _file(self, name: str, train: Texts, test: Texts) -> Path:
        path = self.home / f"{name}-{fingerprint(' '.join(test.fingerprints))}.parquet"
        frame = {
            "text": train.text + test.text,
            "label": [CLASSES[k] for k in (*train.label, *test.label)],
            "split": ["train"] * len(train) + ["test"] * len(test),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        pl.DataFrame(frame).write_parquet(path)
        return path

    def _fold(
        self, name: str, train: np.ndarray, test: np.ndarray, afresh: bool = False, base: str | None = None
    ) -> dict[str, Any]:
        """``afresh``: pretrained on the unlabelled texts; else from ``base``, the base run if it is None."""
        texts = self.texts[name]
        one, two = texts.take(train), texts.take(test)
        start, cpu = time.monotonic(), time.process_time()
        opponent = svm().fit(one.text, one.label)
        guess = np.eye(3)[opponent.predict(two.text)]
        score = opponent.decision_function(two.text)
        out: dict[str, Any] = {
            "svm": _short(evaluate(guess, two.label)) | {"wall_s": time.monotonic() - start}
        }
        out["svm"]["auc"] = _binary_auc(score, two.label)
        start, cpu = time.monotonic(), time.process_time()
        found = train_sentiment(
            self.home,
            [self._file(name, one, two)],
            [self.home / "plain.parquet"] if afresh else [],
            base=None if afresh else base or self.results["base"]["run_id"],
            plan=LONG if name == "imdb" else None,
        )
        out["lstm"] = _short(found["test"]) | {
            "run_id": found["run_id"], "wall_s": time.monotonic() - start, "cpu_s": time.process_time() - cpu,
        }  # fmt: skip
        model = open_sentiment(self.home, found["run_id"])
        alone = replace(model.blend, share=0.0)(*[logits_of(model.net, model.codec.encode(two.text))] * 2)
        out["network alone"] = _short(evaluate(alone, two.label)) | {"share_of_ngrams": model.blend.share}
        if name == "phrasebank":
            sure = self.certain[test]
            p = score_texts(model, two.text)
            out["lstm"]["agreed"] = _short(evaluate(p[sure], two.label[sure]))
            out["network alone"]["agreed"] = _short(evaluate(alone[sure], two.label[sure]))
            out["svm"]["agreed"] = _short(evaluate(guess[sure], two.label[sure]))
        return out

    def _once(self, name: str, make: Callable[[], dict[str, Any]]) -> None:
        if name not in self.results:
            self.results[name] = make()
            self.log.write_text(json.dumps(self.results, indent=2) + "\n")
            print(name, json.dumps(self.results[name]), flush=True)


def _short(found: dict[str, Any]) -> dict[str, Any]:
    return {key: found[key] for key in ("accuracy", "macro_f1", "ece", "auc", "n")}


def _binary_auc(score: np.ndarray, label: np.ndarray) -> float | None:
    from recur.pipeline.sentiment_metrics import auc

    return auc(score if score.ndim == 1 else score[:, -1] - score[:, 0], label)


def svm() -> Pipeline:
    """TF-IDF of words (1 to 3) and characters (2 to 6) with a linear SVM: the opponent that takes four seconds."""
    words = TfidfVectorizer(ngram_range=(1, 3), sublinear_tf=True, min_df=2)
    letters = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 6), sublinear_tf=True, min_df=2)
    return make_pipeline(make_union(words, letters), LinearSVC(class_weight="balanced"))


if __name__ == "__main__":
    main()
