"""Training, saving, resuming, scoring and judging a sentiment model, on texts whose truth is known."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from recur import cli
from recur.models.text.encoder import Drops
from recur.pipeline.labelled import CLASSES, read_labelled
from recur.pipeline.score_news import score_stored
from recur.pipeline.sentiment import contaminated, evaluate_file, open_sentiment, score_texts
from recur.pipeline.sentiment_fit import FinePlan
from recur.pipeline.sentiment_language import LanguagePlan
from recur.pipeline.sentiment_trace import trace
from recur.pipeline.sentiment_train import SentimentPlan, deciding, known_to, train_sentiment
from recur.pipeline.settings import load_config
from recur.pipeline.text import fingerprint
from recur.storage.runs import RunFolder
from recur.storage.store import Store
from recur.vocabulary import DataMissing, UsageError, parse_time

SMALL = SentimentPlan(
    vocabulary=400, width=24, hidden=24, members=1,
    language=LanguagePlan(epochs=2, streams=8, stretch=16),
    adapt=LanguagePlan(epochs=1, streams=8, stretch=16, lr=2e-3),
    fine=FinePlan(epochs=10, batch=8, lr=1e-2, decay=1.0, unfreeze=0, patience=10, drops=Drops(0, 0.1, 0.1, 0, 0.1)),
)  # fmt: skip
VERBS = {
    "negative": ["falls", "plunges", "loses"],
    "neutral": ["names", "meets", "moves"],
    "positive": ["rises", "gains", "soars"],
}


def headlines(n: int, seed: int = 0) -> pl.DataFrame:
    """Invented headlines whose verb decides the label, published an hour apart from 2024-01-01."""
    rng = np.random.default_rng(seed)
    rows = []
    for k in range(n):
        label = CLASSES[k % 3]
        who, verb, when = (
            rng.choice(["Acme", "Bitcoin", "Nokia", "Ether"]),
            rng.choice(VERBS[label]),
            rng.choice(["today", "again", "at last"]),
        )
        rows.append((f"{who} {verb} {rng.integers(2, 90)} times {when}, report {seed}-{k} says", label))
    frame = pl.DataFrame(rows, schema=["text", "label"], orient="row")
    start = pl.datetime(2024, 1, 1, time_unit="ms", time_zone="UTC")
    return frame.with_columns(published_at=start + pl.duration(hours=pl.int_range(pl.len())))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    home = tmp_path_factory.mktemp("home")
    frame = headlines(240).with_columns(
        split=pl.when(pl.int_range(pl.len()) < 180).then(pl.lit("train")).otherwise(pl.lit("test"))
    )
    frame.write_parquet(home / "data.parquet")
    headlines(120, seed=1).select("text", "published_at").write_parquet(home / "plain.parquet")
    return home, train_sentiment(home, [home / "data.parquet"], [home / "plain.parquet"], plan=SMALL)


def test_a_model_learns_verbs_and_is_judged_on_the_test_part(trained: tuple[Path, dict[str, Any]]) -> None:
    _, metrics = trained
    assert metrics["test"]["n"] == 60
    assert metrics["test"]["accuracy"] > 0.9
    assert metrics["validation"]["n"] == 18
    assert sum(map(sum, metrics["test"]["confusion"])) == 60


def test_the_manifest_tells_when_the_training_texts_were_published(
    trained: tuple[Path, dict[str, Any]],
) -> None:
    home, metrics = trained
    manifest = RunFolder(home, metrics["run_id"]).read_manifest()
    assert manifest["kind"] == "sentiment"
    assert metrics["run_id"].startswith("sentiment-lstm-")
    # 120 plain texts an hour apart, and the training part with the tenth that was drawn from it for validation
    assert manifest["training_window"]["since"] == "2024-01-01T00:00:00Z"
    assert manifest["training_window"]["until"] == "2024-01-08T11:00:00Z"
    assert manifest["training_texts"] == 180 + 120


def test_texts_of_the_test_part_are_not_known_and_training_texts_are(
    trained: tuple[Path, dict[str, Any]],
) -> None:
    home, metrics = trained
    model = open_sentiment(home)
    texts = headlines(240)["text"].to_list()
    assert not any(contaminated(model, texts[180:]))
    assert sum(contaminated(model, texts[:180])) == 180
    assert contaminated(model, ["New text", "New text"], [1_704_070_000_000, 1_704_067_199_999]) == [
        True,
        False,
    ]
    assert metrics["test"]["clean"]["n"] == 60


def test_reading_a_long_text_in_chunks_gives_what_reading_it_at_once_gives(
    trained: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = open_sentiment(trained[0])
    texts = ["Acme rises today. " * 30, "Nokia falls", "Bitcoin meets Ether. " * 11]
    at_once = score_texts(model, texts)
    monkeypatch.setattr("recur.models.text.classifier.CHUNK", 7)
    np.testing.assert_allclose(score_texts(model, texts), at_once, atol=1e-6)


def test_a_text_scores_alike_alone_and_among_others(trained: tuple[Path, dict[str, Any]]) -> None:
    model = open_sentiment(trained[0])
    texts = headlines(30, seed=5)["text"].to_list()
    together = score_texts(model, texts)
    alone = np.concatenate([score_texts(model, [text]) for text in texts])  # by another kernel: they are few
    np.testing.assert_allclose(together, alone, atol=1e-6)
    np.testing.assert_allclose(together.sum(1), 1, atol=1e-6)


def test_nothing_to_read_has_no_probability_and_counts_as_wrong(
    trained: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    home, _ = trained
    model = open_sentiment(home)
    assert np.isnan(score_texts(model, ["", "  \n", "\x00\x01"])).all()
    pl.DataFrame(
        {"text": ["Acme rises", "\u200b", "Acme falls"], "label": ["positive", "neutral", "negative"]}
    ).write_csv(tmp_path / "x.csv")
    found = evaluate_file(model, tmp_path / "x.csv")
    assert found["n"] == 3
    assert found["accuracy"] == pytest.approx(2 / 3)


def test_more_than_a_megabyte_is_refused(trained: tuple[Path, dict[str, Any]]) -> None:
    with pytest.raises(UsageError, match="Text 2 has 1,200,000 characters"):
        score_texts(open_sentiment(trained[0]), ["short", "ab " * 400_000])


def test_a_killed_training_goes_on_and_ends_as_an_undisturbed_one(
    trained: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    home, metrics = trained
    files = [home / "data.parquet"], [home / "plain.parquet"]

    def killed(stage: str, done: int, total: int) -> None:
        if stage == "pretraining" and done > total // 2 + 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_sentiment(tmp_path, *files, plan=SMALL, say=killed)
    run = RunFolder(tmp_path, next((tmp_path / "runs").iterdir()).name)
    assert run.status() == "running"
    assert (run.path / "language.safetensors").exists()
    other = SMALL.with_choices(1, 5)  # the run goes on with the epochs and the seed that it began with
    resumed = train_sentiment(tmp_path, *files, plan=other, resume="last")
    assert resumed["run_id"] == run.run_id
    assert resumed["test"] | {"run_id": ""} == metrics["test"] | {"run_id": ""}
    texts = headlines(20, seed=9)["text"].to_list()
    np.testing.assert_array_equal(
        score_texts(open_sentiment(home), texts), score_texts(open_sentiment(tmp_path), texts)
    )


def test_resuming_on_other_files_is_refused(trained: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    home, metrics = trained
    headlines(90, seed=3).write_csv(tmp_path / "other.csv")
    with pytest.raises(UsageError, match="was started on other files"):
        train_sentiment(home, [tmp_path / "other.csv"], [], plan=SMALL, resume=metrics["run_id"])


def test_a_run_begun_from_another_remembers_its_texts(
    trained: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    home, metrics = trained
    headlines(60, seed=4).drop("published_at").write_csv(tmp_path / "more.csv")
    found = train_sentiment(home, [tmp_path / "more.csv"], [], base=metrics["run_id"], plan=SMALL)
    manifest = RunFolder(home, found["run_id"]).read_manifest()
    assert manifest["parent"] == metrics["run_id"]
    assert manifest["training_texts"] == 180 + 120 + 60
    assert manifest["training_window"]["since"] == "2024-01-01T00:00:00Z"
    model = open_sentiment(home, found["run_id"])
    assert sum(contaminated(model, headlines(240)["text"].to_list())) == 180
    # its language model went on from the classifier that it was begun from, over the new texts
    parent = open_sentiment(home, metrics["run_id"])
    moved = [
        (a.language.encoder.embedding.weight - parent.net.encoder.embedding.weight).norm().item()
        for a in (parent, model)
    ]
    assert 0 < moved[1] < moved[0]


def test_validation_texts_that_the_parent_learned_from_have_no_say(
    trained: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    home, metrics = trained
    plan = replace(SMALL, fine=replace(SMALL.fine, epochs=3))
    new, old = headlines(90, seed=6), headlines(30)
    turned = old.with_columns(label=pl.col("label").replace({"negative": "positive", "positive": "negative"}))
    runs = []
    for k, told in enumerate((old, turned)):
        parts = [
            new[:60].with_columns(split=pl.lit("train")),
            pl.concat([new[60:], told]).with_columns(split=pl.lit("validation")),
        ]
        pl.concat(parts).drop("published_at").write_csv(tmp_path / f"{k}.csv")
        runs.append(train_sentiment(home, [tmp_path / f"{k}.csv"], [], base=metrics["run_id"], plan=plan))
    assert [run["validation"]["contaminated"] for run in runs] == [30, 30]
    assert [run["validation"]["clean"]["n"] for run in runs] == [30, 30]
    assert runs[0]["validation"]["clean"] == runs[1]["validation"]["clean"]
    folders = [RunFolder(home, run["run_id"]) for run in runs]
    assert folders[0].read_manifest()["validation"] == {"texts": 60, "known_to_parent": 30, "choosing": 30}
    first, second = (
        (f.read_json("sentiment.json")["blend"], f.read_manifest()["weights_sha256"]) for f in folders
    )
    assert first == second
    for folder in folders:
        shutil.rmtree(folder.path)


def test_when_the_parent_learned_from_nearly_all_of_the_validation_part_it_is_said(
    trained: tuple[Path, dict[str, Any]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    parent = open_sentiment(trained[0], trained[1]["run_id"])
    pl.concat([headlines(30), headlines(9, seed=7)]).write_csv(tmp_path / "x.csv")
    part = read_labelled([tmp_path / "x.csv"])
    known = known_to(parent, part, by_time=False)
    assert known.sum() == 30
    assert deciding(part, known, parent.run_id).all()
    assert "30 of the 39 validation texts were learned from" in caplog.text
    assert known_to(parent, part, by_time=True).all()  # the other nine were published in its time


def test_a_training_cut_off_while_it_is_judged_is_not_finished_and_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def killed(*_: object) -> dict[str, Any]:
        raise KeyboardInterrupt

    plan = replace(SMALL, fine=replace(SMALL.fine, epochs=1))
    headlines(90).with_columns(
        split=pl.when(pl.int_range(pl.len()) < 60).then(pl.lit("train")).otherwise(pl.lit("test"))
    ).write_parquet(tmp_path / "x.parquet")
    with monkeypatch.context() as patch:
        patch.setattr("recur.pipeline.sentiment_train.evaluate_texts", killed)
        with pytest.raises(KeyboardInterrupt):
            train_sentiment(tmp_path, [tmp_path / "x.parquet"], [], plan=plan)
    run = RunFolder(tmp_path, next((tmp_path / "runs").iterdir()).name)
    assert run.status() == "running"
    with pytest.raises(DataMissing, match="not finished") as refused:
        open_sentiment(tmp_path, run.run_id)
    assert f"recur train sentiment --resume {run.run_id}" in refused.value.hint
    with pytest.raises(UsageError, match="was begun from nothing, not from other"):
        train_sentiment(tmp_path, [tmp_path / "x.parquet"], [], plan=plan, resume="last", base="other")
    found = train_sentiment(tmp_path, [tmp_path / "x.parquet"], [], plan=plan, resume="last")
    assert found == run.read_json("metrics.json")
    assert run.status() == "complete"


def test_the_command_line_scores_and_judges(
    trained: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    home, metrics = trained
    run = ["--home", str(home), "--json", "sentiment", "--run", metrics["run_id"]]
    assert cli.run([*run, "Acme soars today", ""]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["label"] for row in found["texts"]] == ["positive", None]
    assert found["texts"][1]["p_neutral"] is None
    assert cli.run([*run, "--evaluate", str(home / "data.parquet")]) == 0
    assert json.loads(capsys.readouterr().out)["n"] == 60
    assert cli.run([*run, "--file", str(home / "plain.parquet")]) == 0
    assert len(json.loads(capsys.readouterr().out)["texts"]) == 120


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["sentiment"], 2, "Expected one of TEXT"),
        (["sentiment", "x"], 3, "There is no sentiment model"),
        (["train", "sentiment"], 2, "needs labelled texts"),
        (["train", "sentiments"], 2, "Did you mean 'sentiment'?"),
        (["train", "price", "--data", "x.csv"], 2, "belong to recur train sentiment"),
        (["train", "sentiment", "--data", "absent.csv"], 2, "There is no file absent.csv"),
    ],
)
def test_wrong_use_is_one_line_with_its_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, said: str
) -> None:
    assert cli.run(["--home", str(tmp_path), *arguments]) == code
    assert said in capsys.readouterr().err


def test_a_run_holds_what_every_run_holds(trained: tuple[Path, dict[str, Any]]) -> None:
    folder = RunFolder(trained[0], trained[1]["run_id"])
    config, _ = load_config([folder.config], [], {})
    assert (config.train.seed, config.sentiment.epochs) == (0, SMALL.fine.epochs)
    features = folder.read_json("features.json")
    assert [f["name"] for f in features["features"]] == ["tokens"]
    assert features["targets"] == list(CLASSES)
    curves = pl.read_csv(next(folder.logs.glob("csv/*/metrics.csv")))
    losses = curves["language_loss"].drop_nulls().to_list()
    assert len(losses) == SMALL.language.epochs
    assert losses[-1] < losses[0]
    assert len(curves["validation_loss"].drop_nulls()) == SMALL.fine.epochs
    assert list(folder.logs.glob("tensorboard/*/events*"))
    assert folder.read_manifest()["labels"] == "human"


def damage(folder: Path, name: str) -> None:
    """Cut the weights short, change one of them, or take a part out of a description."""
    path = folder / name
    if name == "model.safetensors.cut":
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:1000])
    elif path.suffix == ".safetensors":
        data = bytearray(path.read_bytes())
        data[-1] ^= 0x40
        path.write_bytes(bytes(data))
    elif path.suffix == ".json":
        held = json.loads(path.read_text("utf-8"))
        held.pop(
            {"sentiment.json": "encoder", "tokenizer.json": "words", "manifest.json": "training_window"}[name]
        )
        path.write_text(json.dumps(held), "utf-8")
    else:
        path.unlink()


@pytest.mark.parametrize(
    "name",
    ["model.safetensors.cut", "model.safetensors", "sentiment.json", "tokenizer.json", "manifest.json",
     "training_texts.txt"],
)  # fmt: skip
def test_a_damaged_run_is_named(trained: tuple[Path, dict[str, Any]], tmp_path: Path, name: str) -> None:
    run = trained[1]["run_id"]
    shutil.copytree(RunFolder(trained[0], run).path, tmp_path / "runs" / run)
    assert open_sentiment(tmp_path).run_id == run
    damage(tmp_path / "runs" / run, name)
    with pytest.raises(DataMissing, match=r"cannot be (loaded|read)"):
        open_sentiment(tmp_path)


def test_a_validation_part_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    rows = [
        (f"{way} {k}", label, "train")
        for k in range(20)
        for way, label in (("up", "positive"), ("down", "negative"))
    ]
    rows += [("\x01\x02", "positive", "validation")]
    pl.DataFrame(rows, schema=["text", "label", "split"], orient="row").write_csv(tmp_path / "x.csv")
    with pytest.raises(UsageError, match="None of the 1 texts of the validation part can be read"):
        train_sentiment(tmp_path, [tmp_path / "x.csv"], [], plan=SMALL)


def test_too_few_texts_leave_no_run_behind(tmp_path: Path) -> None:
    rows = ["text,label", *(f"up {k},positive" for k in range(2)), *(f"down {k},negative" for k in range(2))]
    (tmp_path / "few.csv").write_text("\n".join(rows) + "\n", "utf-8")
    with pytest.raises((DataMissing, UsageError), match="too few"):
        train_sentiment(tmp_path, [tmp_path / "few.csv"], [], plan=SMALL)
    assert not list((tmp_path / "runs").glob("*"))


def test_a_trace_ends_with_the_score_of_the_text(trained: tuple[Path, dict[str, Any]]) -> None:
    model = open_sentiment(trained[0])
    rows = trace(model, "Acme rises 5 times today, report 0", top=3)
    assert [row["token"] for row in rows[:2]] == [" acme", " rises"]
    score = score_texts(model, ["Acme rises 5 times today, report 0"])[0]
    assert [rows[-1][f"p_{name}"] for name in CLASSES] == pytest.approx(score.tolist(), abs=1e-6)
    assert rows[0]["p_positive"] < rows[1]["p_positive"]
    assert all(len(row["next"]) == 3 and row["next"][0]["p"] >= row["next"][2]["p"] for row in rows)
    with pytest.raises(UsageError, match="has 0 tokens"):
        trace(model, " ")


def test_stored_news_are_scored_once_and_marked_where_the_model_may_have_learned_from_them(
    trained: tuple[Path, dict[str, Any]],
) -> None:
    home, metrics = trained
    store = Store(home)
    known = headlines(240)["text"][0]
    window = RunFolder(home, metrics["run_id"]).read_manifest()["training_window"]
    inside, later = parse_time(window["since"]), parse_time(window["until"]) + 86_400_000
    items = pl.DataFrame(
        {
            "news_id": ["old", "new", "told"],
            "published_at": pl.Series([inside, later, later]).cast(pl.Datetime("ms", "UTC")),
            "published_precision": ["s", "s", "s"],
            "title": ["Something else entirely happened", "Prices will rise tomorrow", known],
        }
    )
    store.put_news(items, source="test", now_ms=later)
    done = score_stored(home, store, metrics["run_id"], later)
    assert (done["run_id"], done["scored"], done["unread"]) == (metrics["run_id"], 3, 0)
    marks = dict(store.sentiment(done["run_id"]).select("news_id", "contaminated").iter_rows())
    assert marks == {"old": True, "new": False, "told": True}
    assert score_stored(home, store, metrics["run_id"], later)["scored"] == 0


def test_an_item_whose_body_was_learned_from_is_marked_and_one_without_body_is_not(
    trained: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    home, metrics = trained
    folder = tmp_path / "runs" / metrics["run_id"]
    shutil.copytree(RunFolder(home, metrics["run_id"]).path, folder)
    with (folder / "training_texts.txt").open(
        "a"
    ) as file:  # as a training text that cannot be read leaves it
        file.write(fingerprint("\u200b") + "\n")
    later = parse_time("2026-01-01")
    items = pl.DataFrame(
        {
            "news_id": ["known body", "no body"],
            "published_at": pl.Series([later, later]).cast(pl.Datetime("ms", "UTC")),
            "published_precision": ["s", "s"],
            "title": ["A headline of today", "Another headline of today"],
            "body": [headlines(240)["text"][0], ""],
        }
    )
    store = Store(tmp_path)
    store.put_news(items, source="test", now_ms=later)
    score_stored(tmp_path, store, metrics["run_id"], later)
    marks = dict(store.sentiment(metrics["run_id"]).select("news_id", "contaminated").iter_rows())
    assert marks == {"known body": True, "no body": False}


def test_a_home_of_a_sentiment_run_alone_says_what_can_be_done_with_it(
    trained: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    home = ["--home", str(trained[0])]
    for command, does in (
        ("inspect", "recur inspect --trace TEXT"),
        ("report", "recur sentiment --evaluate FILE"),
    ):
        assert cli.run([*home, command]) == 3
        assert f"is a sentiment model: '{does}'" in capsys.readouterr().err


def test_the_command_line_traces_a_text(
    trained: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["--home", str(trained[0]), "inspect", trained[1]["run_id"]]) == 2
    assert "reads texts, not bars" in capsys.readouterr().err
    words = ["--home", str(trained[0]), "--json", "inspect", trained[1]["run_id"], "--trace", "Acme rises"]
    assert cli.run(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert [token["token"] for token in found["tokens"]] == [" acme", " rises"]


def test_a_report_of_a_sentiment_run_says_what_can_be_done_instead(
    trained: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    home, run = trained[0], trained[1]["run_id"]
    assert cli.run(["--home", str(home), "report", run, "--no-open"]) == 2
    assert "--evaluate" in capsys.readouterr().err
    assert not RunFolder(home, run).report.exists()
