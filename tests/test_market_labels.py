"""Training on labels that the market made: texts joined to stored candles, parts in order of time, nothing from later."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from safetensors.torch import load_file

from recur import cli
from recur.models.text.encoder import Drops
from recur.pipeline.config import Config, FeatureConfig, MarketConfig
from recur.pipeline.labelled import Texts
from recur.pipeline.load import stored_news
from recur.pipeline.market_labels import MarketTexts, against_majority, label_from_market
from recur.pipeline.news import put_items
from recur.pipeline.sentiment_fit import FinePlan
from recur.pipeline.sentiment_language import LanguagePlan
from recur.pipeline.sentiment_train import SentimentPlan, train_sentiment
from recur.pipeline.settings import load_config
from recur.storage.runs import RunFolder
from recur.storage.store import Store
from recur.vocabulary import DAY_MS, HOUR_MS, DataMissing, UsageError, from_ms, parse_time
from tests.market import candles

START = parse_time("2025-01-01")
BARS = 1400
TINY = SentimentPlan(
    vocabulary=300, width=12, hidden=12, members=1,
    language=LanguagePlan(epochs=1, streams=4, stretch=16), adapt=LanguagePlan(epochs=0),
    fine=FinePlan(epochs=2, batch=16, drops=Drops()),
)  # fmt: skip


def config(*symbols: str, interval: str = "1h") -> Config:
    return replace(Config(), market=MarketConfig(symbols=symbols or ("BTCUSDT",), interval=interval))


def news(hours: list[int], titles: list[str] | None = None) -> pl.DataFrame:
    """An item at seven minutes past each of ``hours`` after the first candle."""
    n = len(hours)
    return pl.DataFrame(
        {
            "news_id": [str(k) for k in range(n)],
            "published_at": pl.Series([START + h * HOUR_MS + 7 * 60_000 for h in hours]).cast(
                pl.Datetime("ms", "UTC")
            ),
            "published_precision": ["minute"] * n,
            "title": titles or [f"Bitcoin item {k} of many, said at hour {hours[k]}" for k in range(n)],
            "source": ["paper"] * n,
            "tags": ["[]"] * n,
        }
    ).with_columns(pl.lit(None, dtype=pl.String).alias(name) for name in ("body", "url"))


def store_with(home: Path, bars: pl.DataFrame, items: pl.DataFrame | None = None) -> Store:
    store = Store(home)
    store.put_candles(bars, source="test", now_ms=START)
    if items is not None:
        put_items(store, items, source="test", now_ms=START, languages=("en",), backfill=True)
    return store


def poisoned(bars: pl.DataFrame, since_ms: int) -> pl.DataFrame:
    """The same bars, those that open at or after ``since_ms`` at other prices that jump about."""
    wild = pl.col("open_time") >= from_ms(since_ms)
    jumps = pl.Series(np.random.default_rng(3).choice([0.5, 2.0], bars.height))
    changed = bars.with_columns(pl.when(wild).then(pl.col("close") * jumps).otherwise("close").alias("close"))
    top, low = pl.max_horizontal("open", "close", "high"), pl.min_horizontal("open", "close", "low")
    return changed.with_columns(high=top, low=low)


HOURS = list(range(200, 1390, 5))


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, MarketTexts]:
    store = store_with(tmp_path_factory.mktemp("home"), candles("BTCUSDT", START, BARS, seed=1), news(HOURS))
    return store, label_from_market(store, config(), [], 0.1)


def part(found: MarketTexts, name: str) -> Texts:
    return found.texts.take([i for i, split in enumerate(found.texts.split) if split == name])


def test_parts_follow_one_another_and_no_label_reaches_into_the_next(
    labelled: tuple[Store, MarketTexts],
) -> None:
    _, found = labelled
    window = 4 * HOUR_MS
    end = {name: max(p for p in part(found, name).published if p) for name in ("train", "validation", "test")}
    begin = {name: min(p for p in part(found, name).published if p) for name in end}
    # published at 07, usable at 08, the first bar opens at the next full hour and the window closes four bars later
    closes = {name: (at // HOUR_MS + 1) * HOUR_MS + window for name, at in end.items()}
    assert closes["train"] <= found.train_until_ms <= begin["validation"] + 60_000
    assert closes["validation"] <= found.known_until_ms <= begin["test"] + 60_000
    assert len(found.texts) + found.summary["purged"] == len(HOURS) == 238
    assert 0.18 < len(part(found, "test")) / len(HOURS) < 0.22
    assert found.summary["unlabelled"] == {}
    assert {name: sum(n.values()) for name, n in found.summary["classes"].items()} == {
        name: len(part(found, name)) for name in ("train", "validation", "test")
    }


def test_a_label_says_what_the_price_did_next(labelled: tuple[Store, MarketTexts]) -> None:
    store, found = labelled
    bars = store.candles("linear", ["BTCUSDT"], "1h")
    r = np.log(bars["close"].to_numpy() / bars["open"].to_numpy())
    for k in (0, 57, len(found.texts) - 1):
        at = found.texts.published[k]
        assert at is not None
        i = (at - START) // HOUR_MS + 1
        z = r[i : i + 4].sum() / (2 * r[i - 168 : i].std(ddof=1))
        assert found.texts.label[k] == (2 if z > 0.75 else 0 if z < -0.75 else 1)


@pytest.mark.parametrize("hour", [203, 700, 1300])
def test_later_candles_change_no_earlier_label(
    labelled: tuple[Store, MarketTexts], tmp_path: Path, hour: int
) -> None:
    _, before = labelled
    since = START + hour * HOUR_MS
    store = store_with(tmp_path, poisoned(candles("BTCUSDT", START, BARS, seed=1), since), news(HOURS))
    after = label_from_market(store, config(), [], 0.1)
    assert (after.train_until_ms, after.known_until_ms) == (before.train_until_ms, before.known_until_ms)
    closed = [
        k
        for k, at in enumerate(before.texts.published)
        if at and at // HOUR_MS * HOUR_MS + 5 * HOUR_MS <= since
    ]
    assert after.texts.text == before.texts.text
    assert (after.texts.label[closed] == before.texts.label[closed]).all()
    later = [k for k in range(len(before.texts)) if k not in closed]
    assert (after.texts.label[later] != before.texts.label[later]).any()


def weights(home: Path, store: Store) -> tuple[dict[str, Any], dict[str, Any]]:
    market = label_from_market(store, config(), [], TINY.validation)
    metrics = train_sentiment(home, [], [], plan=TINY, market=market, config=config())
    return metrics, load_file(RunFolder(home, metrics["run_id"]).weights)


def test_candles_after_the_training_change_no_weight(
    labelled: tuple[Store, MarketTexts], tmp_path: Path
) -> None:
    store, found = labelled
    metrics, one = weights(store.home, store)
    bars = poisoned(candles("BTCUSDT", START, BARS, seed=1), found.known_until_ms)
    others, two = weights(tmp_path, store_with(tmp_path, bars, news(HOURS)))
    assert one.keys() == two.keys()
    assert all(np.array_equal(one[name], two[name]) for name in one)
    assert metrics["test"]["confusion"] != others["test"]["confusion"]
    # and the proof can fail: an hour of the training part does change them
    bars = poisoned(candles("BTCUSDT", START, BARS, seed=1), found.train_until_ms - 100 * HOUR_MS)
    _, three = weights(tmp_path / "b", store_with(tmp_path / "b", bars, news(HOURS)))
    assert not all(np.array_equal(one[name], three[name]) for name in one)
    manifest = RunFolder(store.home, metrics["run_id"]).read_manifest()
    assert manifest["labels"]["labels"] == "reaction"
    assert manifest["labels"]["plan"] == {"bars": 4, "threshold": 0.75, "history": 168, "latency_ms": 60_000}
    assert parse_time(manifest["training_window"]["until"]) == found.learned_until_ms <= found.known_until_ms
    assert metrics["test"]["clean"]["n"] == metrics["test"]["n"] == len(part(found, "test"))
    usual = metrics["test"]["majority"]
    assert usual["gain"] == pytest.approx(metrics["test"]["accuracy"] - usual["accuracy"])
    assert usual["days"] == len({at // DAY_MS for at in part(found, "test").published if at})


def test_what_cannot_be_labelled_is_counted_with_its_reason(tmp_path: Path) -> None:
    bars = candles("BTCUSDT", START, BARS, seed=1).filter(pl.int_range(pl.len()) != 601)
    hours = [*range(200, 1300, 8), 3, 598, 1396, 5000]
    titles = [f"Bitcoin item {k}" for k in range(len(hours))]
    titles[0], titles[5] = "Cardano item", titles[4].upper()
    store = store_with(tmp_path, bars, news(hours, titles))
    found = label_from_market(store, config("BTCUSDT", "SOLUSDT"), [], 0.1)
    assert found.summary["unlabelled"] == {
        "after the candles": 2,
        "bars are missing": 2,  # at 598, and at 600 in steps of eight
        "before the candles and their history": 1,
        "speaks of no symbol": 1,
    }
    assert found.texts.counts == {"rows": 142, "duplicates": 1, "unlabelled": 6}


def test_another_coin_is_measured_against_bitcoin(tmp_path: Path) -> None:
    lead = candles("BTCUSDT", START, BARS, seed=1)
    store = store_with(tmp_path, lead, news(HOURS, [f"Solana item {h}" for h in HOURS]))
    # its own price is Bitcoin's to the second power: what it does beyond Bitcoin is nothing but rounding
    same = lead.with_columns(
        symbol=pl.lit("SOLUSDT"), **{c: pl.col(c) ** 2 for c in ("open", "high", "low", "close")}
    )
    noise = np.random.default_rng(0).normal(0, 1e-4, BARS)
    store.put_candles(
        same.with_columns(
            close=pl.col("close") * np.exp(noise), high=pl.col("high") * 1.01, low=pl.col("low") * 0.99
        ),
        source="test",
        now_ms=START,
    )
    found = label_from_market(store, config("SOLUSDT"), [], 0.1)
    assert found.summary["market"] == "BTCUSDT"
    k = 20
    at = found.texts.published[k]
    assert at is not None
    i = (at - START) // HOUR_MS + 1
    z = noise[i : i + 4].sum() / (2 * noise[i - 168 : i].std(ddof=1))
    assert found.texts.label[k] == (2 if z > 0.75 else 0 if z < -0.75 else 1)


FILED = HOURS[::3]


def dated_file(folder: Path, **more: object) -> Path:
    """Texts of 270 words every fifteen hours, whose words tell nothing."""
    rng = np.random.default_rng(0)
    words = np.array(["profit", "loss", "the", "company", "quarter", "rose", "fell", "coin"])
    frame = pl.DataFrame(
        {
            "text": [f"Filing {k}. " + " ".join(rng.choice(words, 270)) for k in range(len(FILED))],
            "published_at": [from_ms(START + h * HOUR_MS).strftime("%Y-%m-%dT%H:%M:%SZ") for h in FILED],
            "symbol": ["btcusdt"] * len(FILED),
            **more,
        }
    )
    frame.write_csv(folder / "filings.csv")
    return folder / "filings.csv"


def test_the_command_line_trains_on_long_dated_texts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store_with(tmp_path, candles("BTCUSDT", START, BARS, seed=1))
    monkeypatch.setattr("recur.pipeline.sentiment_train.SentimentPlan", lambda: TINY)
    path = dated_file(tmp_path)
    words = ["train", "sentiment", "--label-from-market", "-s", "BTCUSDT", "--data", str(path), "--seed", "4"]
    assert cli.run(["--home", str(tmp_path), "--json", "--set", "sentiment.reaction_bars=2", *words]) == 0
    metrics = json.loads(capsys.readouterr().out)
    assert metrics["labels"]["plan"]["bars"] == 2
    assert metrics["labels"]["texts_from"] == [str(path)]
    assert metrics["test"]["n"] == 16
    folder = RunFolder(tmp_path, metrics["run_id"])
    kept, _ = load_config([folder.config], [], {})
    assert (kept.sentiment.reaction_bars, kept.train.seed, kept.sentiment.epochs) == (2, 4, 2)
    assert folder.read_json("features.json")["targets"] == ["negative", "neutral", "positive"]
    assert (
        cli.run(["--home", str(tmp_path), "train", "sentiment", "--label-from-market", "-s", "BTCUSDT"]) == 3
    )
    assert "holds no news to label" in capsys.readouterr().err


def test_pretraining_reads_nothing_from_after_the_training_part(
    labelled: tuple[Store, MarketTexts], tmp_path: Path
) -> None:
    store, found = labelled
    times = [found.train_until_ms - 1, found.train_until_ms, None]
    pl.DataFrame(
        {
            "text": ["An early plain text", "A late plain text", "An undated plain text"],
            "published_at": times,
        },
        schema_overrides={"published_at": pl.Int64},
    ).write_parquet(tmp_path / "plain.parquet")
    metrics = train_sentiment(store.home, [], [tmp_path / "plain.parquet"], plan=TINY, market=found)
    manifest = RunFolder(store.home, metrics["run_id"]).read_manifest()
    assert manifest["training_texts"] == len(part(found, "train")) + 2


def dated_texts(path: Path, begin: int) -> Path:
    """Sixty labelled texts, an hour apart from ``begin`` (UTC ms) on."""
    pl.DataFrame(
        {
            "text": [f"Gold {'rises' if k % 2 else 'falls'} on day {k} of trading" for k in range(60)],
            "label": ["positive" if k % 2 else "negative" for k in range(60)],
            "published_at": [begin + k * HOUR_MS for k in range(60)],
        }
    ).write_parquet(path)
    return path


def test_a_run_that_learned_in_the_time_of_the_test_part_is_no_parent(
    labelled: tuple[Store, MarketTexts], tmp_path: Path
) -> None:
    store, found = labelled
    late = dated_texts(tmp_path / "late.parquet", found.known_until_ms - 30 * HOUR_MS)
    parent = train_sentiment(store.home, [late], [], plan=TINY)
    before = len(list((store.home / "runs").iterdir()))
    with pytest.raises(UsageError, match=r"learned from texts up to 2025-02-.*judged on what it knows"):
        train_sentiment(store.home, [], [], base=parent["run_id"], plan=TINY, market=found)
    assert len(list((store.home / "runs").iterdir())) == before


def test_validation_texts_of_the_time_of_a_parent_have_no_say(
    labelled: tuple[Store, MarketTexts], tmp_path: Path
) -> None:
    store, found = labelled
    until = found.train_until_ms + 30 * HOUR_MS
    early = dated_texts(tmp_path / "early.parquet", until - 59 * HOUR_MS)
    parent = train_sentiment(store.home, [early], [], plan=TINY)
    child = train_sentiment(store.home, [], [], base=parent["run_id"], plan=TINY, market=found)
    published = part(found, "validation").published
    known = sum(at is not None and at <= until for at in published)
    assert 0 < known <= len(published) - 10
    said = RunFolder(store.home, child["run_id"]).read_manifest()["validation"]
    assert said == {"texts": len(published), "known_to_parent": known, "choosing": len(published) - known}


def test_scores_of_a_run_that_learned_the_prices_after_an_item_are_no_feature(
    labelled: tuple[Store, MarketTexts], caplog: pytest.LogCaptureFixture
) -> None:
    store, found = labelled
    run = RunFolder(store.home, "sentiment-lstm-20250301T000000-aaaaaa")
    child = RunFolder(store.home, "sentiment-lstm-20250302T000000-bbbbbb")
    window = {"since": from_ms(START).isoformat(), "until": from_ms(found.learned_until_ms).isoformat()}
    run.write_json("manifest.json", {"labels": found.summary, "training_window": window, "parent": None})
    child.write_json("manifest.json", {"labels": "human", "training_window": window, "parent": run.run_id})
    items = store.news_versions()
    known = items.filter(pl.col("published_at").dt.epoch("ms") <= found.learned_until_ms).height
    assert 150 < known < 238
    for folder in (run, child):
        rows = items.select("news_id", "version").with_columns(
            pl.lit(folder.run_id).alias("run_id"),
            pl.lit(from_ms(START)).cast(pl.Datetime("ms", "UTC")).alias("scored_at"),
            pl.lit(0.1).alias("p_negative"),
            pl.lit(0.2).alias("p_neutral"),
            pl.lit(0.7).alias("p_positive"),
            pl.lit(False).alias("contaminated"),
        )
        assert store.put_sentiment(rows) == 238
        features = FeatureConfig(news=True, news_run=folder.run_id)
        read = stored_news(store, replace(config(), features=features))
        assert read is not None
        assert np.isfinite(read.score).sum() == 238 - known
        assert len(read.text) == 238
        assert f"{known} of 238 scores of {folder.run_id} are left out" in caplog.text
    run.write_json(
        "manifest.json",
        {
            "labels": found.summary,
            "training_window": {**window, "until": "2026-01-01T00:00:00Z"},
            "parent": None,
        },
    )
    with pytest.raises(DataMissing, match=r"All 238 scores of .* the prices after them are its labels"):
        stored_news(store, replace(config(), features=FeatureConfig(news=True, news_run=run.run_id)))
    shutil.rmtree(run.path)
    with pytest.raises(
        DataMissing, match=f"{child.run_id} was begun from {run.run_id}, which is no longer in"
    ):
        stored_news(store, replace(config(), features=FeatureConfig(news=True, news_run=child.run_id)))
    shutil.rmtree(child.path)
    with pytest.raises(
        DataMissing, match=f"^{child.run_id} is no longer in .* whether its labels were prices"
    ):
        stored_news(store, replace(config(), features=FeatureConfig(news=True, news_run=child.run_id)))


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        ({"published_at": [None] * len(FILED)}, "tells of no text when it was published"),
        ({"published_precision": ["hour"] * len(FILED)}, "published_precision is 'hour'"),
        (
            {"symbol": ["DOGEUSDT"] * len(FILED)},
            "80 texts leave 0 inside the candles: 80 speaks of no symbol",
        ),
    ],
)
def test_files_that_cannot_be_labelled_are_refused(tmp_path: Path, texts: dict[str, Any], said: str) -> None:
    store = store_with(tmp_path, candles("BTCUSDT", START, BARS, seed=1))
    with pytest.raises(UsageError, match=said):
        label_from_market(store, config(), [dated_file(tmp_path, **texts)], 0.1)


def test_without_candles_the_labels_are_asked_for(tmp_path: Path) -> None:
    store = store_with(tmp_path, candles("ETHUSDT", START, BARS), news(HOURS))
    with pytest.raises(DataMissing, match="no linear 1h candles of BTCUSDT"):
        label_from_market(store, config(), [], 0.1)
    with pytest.raises(UsageError, match="not measured in bars of 1M"):
        label_from_market(store, config(interval="1M"), [], 0.1)


def test_the_error_of_the_gain_counts_a_day_once() -> None:
    test = Texts(list("abcd"), np.array([2, 2, 0, 0]), [""] * 4, [None] * 4, list("abcd"))
    train = Texts(list("xyz"), np.array([2, 2, 0]), [""] * 3, [None] * 3, list("xyz"))
    p = np.array([[0, 0, 1.0], [0, 0, 1], [1, 0, 0], [1, 0, 0]])
    alone = against_majority(p, test, train, {"a": 1, "b": 2, "c": 3, "d": 4})
    assert (alone["class"], alone["accuracy"], alone["gain"]) == ("positive", 0.5, 0.5)
    assert alone["se"] == pytest.approx(np.sqrt(4 * 0.25) / 4)
    paired = against_majority(p, test, train, {"a": 1, "b": 1, "c": 2, "d": 2})
    assert paired["se"] == pytest.approx(np.sqrt(2) / 4)
    assert paired["days"] == 2


def test_the_day_of_a_date_only_item_counts_as_over(tmp_path: Path) -> None:
    items = news(HOURS).with_columns(
        published_at=pl.col("published_at").dt.truncate("1d"), published_precision=pl.lit("day")
    )
    found = label_from_market(
        store_with(tmp_path, candles("BTCUSDT", START, BARS, seed=1), items), config(), [], 0.1
    )
    published = np.array(found.texts.published, dtype=np.int64)
    days = np.array([found.days[f] for f in found.texts.fingerprints])
    assert (days == published // DAY_MS + 1).all()


def test_without_a_text_to_validate_on_no_part_is_drawn_at_random_instead(tmp_path: Path) -> None:
    store = store_with(tmp_path, candles("BTCUSDT", START, BARS, seed=1), news(list(range(200, 240))))
    with pytest.raises(UsageError, match="none to validate"):
        label_from_market(store, config(), [], 0.1)


def test_a_date_is_before_a_time_only_when_its_day_is_over() -> None:
    noon = START + DAY_MS // 2
    times = [START, START + HOUR_MS, None, START - DAY_MS]
    texts = Texts(list("abcd"), np.zeros(4, dtype=np.int64), [""] * 4, times, list("abcd"))
    assert texts.before(noon).text == ["b", "c", "d"]
    assert texts.before(START + DAY_MS).text == ["a", "b", "c", "d"]
