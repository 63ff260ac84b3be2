"""The configuration: defaults, layers, errors, TOML."""

import dataclasses
import re
import tomllib
from pathlib import Path

import pytest

from recur.pipeline.config import (
    SECTIONS,
    BacktestConfig,
    Config,
    FetchConfig,
    MarketConfig,
    ModelConfig,
    TrainConfig,
)
from recur.pipeline.settings import dump_toml, load_config, starter_toml
from recur.vocabulary import UsageError


def test_without_anything_the_defaults_hold() -> None:
    config, provenance = load_config([], [], {})
    assert config == Config()
    assert config.market.symbols == ("BTCUSDT", "ETHUSDT", "SOLUSDT", "BNBUSDT")
    assert provenance["train.epochs"] == (4, "default")
    assert len(provenance) == 57


def test_later_files_win_then_set_then_flags(tmp_path: Path) -> None:
    one, two = tmp_path / "one.toml", tmp_path / "two.toml"
    one.write_text("[train]\nepochs = 5\nseed = 5\nbatch = 5\nlr = 1\n")
    two.write_text("[train]\nseed = 6\nbatch = 6\nuntil = 2025-07-01\n")
    config, provenance = load_config(
        [one, two], ["train.batch=7", "train.clip=2"], {"train.clip": 3, "model.name": None}
    )
    train = config.train
    assert (train.epochs, train.seed, train.batch, train.clip, train.lr) == (5, 6, 7, 3.0, 1.0)
    assert train.until == "2025-07-01"
    assert [provenance[f"train.{key}"][1] for key in ("epochs", "seed", "batch", "clip")] == [
        str(one), str(two), "--set", "flag",
    ]  # fmt: skip
    assert provenance["model.name"] == ("gru", "default")


def test_text_values_are_read_by_the_type_of_their_key() -> None:
    sets = [
        "model.drift=true",
        "train.horizons=1,24",
        'train.pool=["a b.csv"]',
        "features.fine=5m",
        "model.name='x'",
    ]
    config, _ = load_config([], sets, {"fetch.kinds": "candles,mark"})
    assert config.model.drift is True
    assert config.train.horizons == (1, 24)
    assert config.train.pool == ("a b.csv",)
    assert (config.features.fine, config.model.name) == ("5m", "x")
    assert config.fetch.kinds == ("candles", "mark")


def test_ccxt_spellings_are_accepted_and_settle_the_category() -> None:
    config, provenance = load_config([], [], {"market.symbols": ["BTC/USDT", "ETH/USDT"]})
    assert (config.market.symbols, config.market.category) == (("BTCUSDT", "ETHUSDT"), "spot")
    assert provenance["market.category"] == ("spot", "flag")
    assert provenance["fetch.kinds"] == (("candles",), "default for spot")  # it has no funding
    asked, _ = load_config([], [], {"market.category": "spot", "fetch.kinds": "candles,funding"})
    assert asked.fetch.kinds == ("candles", "funding")
    with pytest.raises(UsageError, match=r"'BTC/USDT': is spot, but market\.category is linear"):
        MarketConfig(symbols=("BTC/USDT",))


def test_every_problem_is_told_at_once_in_one_line_with_suggestion_and_origin(tmp_path: Path) -> None:
    file = tmp_path / "recur.toml"
    file.write_text('stray = 1\n[train]\nepoch = 3\nepochs = 0\nlr = "fast"\n[modle]\nhidden = 2\n')
    with pytest.raises(UsageError) as caught:
        load_config([file], ["market.interval=7h", "nonsense"], {})
    text = caught.value.message
    assert "train.epoch is unknown. Did you mean 'train.epochs'?" in text
    assert "[modle] is unknown. Did you mean 'model'?" in text
    assert f"train.epochs = 0: expected from 1 to 10000 ({file})" in text
    assert "train.lr = 'fast': expected number" in text
    assert "market.interval = '7h': expected one of 1m 3m 5m" in text
    assert "stray stands outside a [section]" in text
    assert "'nonsense': expected section.key=value" in text
    assert "\n" not in text
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("section", "values", "words"),
    [
        (TrainConfig, {"epochs": True}, "expected whole number"),
        (TrainConfig, {"lr": float("nan")}, "expected number"),
        (TrainConfig, {"lr": 0}, "more than 0"),
        (TrainConfig, {"horizons": (6, 1)}, "increasing"),
        (TrainConfig, {"horizons": ()}, "increasing"),
        (TrainConfig, {"window": 128}, "less than window = 128"),
        (TrainConfig, {"since": "2025-02-01", "until": "2025-01-01"}, "before until"),
        (TrainConfig, {"since": "soon"}, "ISO-8601"),
        (MarketConfig, {"symbols": ()}, "at least one"),
        (FetchConfig, {"kinds": ("candle",)}, "Did you mean 'candles'"),
        (BacktestConfig, {"folds": 0}, "from 1 to 100"),
    ],
)
def test_a_bad_value_is_refused(section: type, values: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        section(**values)


def test_the_number_of_layers_must_be_that_of_the_pattern() -> None:
    assert ModelConfig(name="hybrid:M-M*-", layers=5).layers == 5
    assert ModelConfig(name="hybrid:M-M*-").layers == 0
    with pytest.raises(UsageError, match=r"model\.layers = 4: hybrid:M-M\*- has 5"):
        ModelConfig(name="hybrid:M-M*-", layers=4)
    with pytest.raises(UsageError, match=r"model\.name has 300 layers: expected at most 128"):
        ModelConfig(name="hybrid:" + 150 * "M-")


def test_a_password_in_an_address_is_refused_and_never_repeated() -> None:
    with pytest.raises(UsageError) as caught:
        load_config([], ["fetch.base_url=http://me:s3cret@host"], {})
    assert "without credentials" in caught.value.message
    assert "s3cret" not in caught.value.message


def test_the_traded_horizon_must_be_forecast() -> None:
    with pytest.raises(
        UsageError, match=r"backtest\.trade_horizon = 24: expected one of train\.horizons = \[1, 6\]"
    ):
        Config(train=TrainConfig(horizons=(1, 6)))


def test_missing_and_broken_files_are_usage_errors(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Cannot read the configuration"):
        load_config([tmp_path / "absent.toml"], [], {})
    broken = tmp_path / "broken.toml"
    broken.write_text("[train\n")
    with pytest.raises(UsageError, match="not valid TOML"):
        load_config([broken], [], {})


def test_dumped_toml_reads_back_equal(tmp_path: Path) -> None:
    config = Config(
        market=MarketConfig(symbols=("BTCUSDT",), interval="1M"),
        train=TrainConfig(pool=('quote".csv', "back\\slash", "é\x7f\n"), lr=1e-5),
    )
    file = tmp_path / "config.toml"
    file.write_text(dump_toml(config), "utf-8")
    assert load_config([file], [], {})[0] == config


def test_the_starter_file_explains_every_key_and_changes_nothing() -> None:
    text = starter_toml()
    assert tomllib.loads(text) == {name: {} for name in SECTIONS}
    active = tomllib.loads(re.sub(r"^#(?=\w)", "", text, flags=re.MULTILINE))
    assert {name: set(table) for name, table in active.items()} == {
        name: {item.name for item in dataclasses.fields(cls)} for name, cls in SECTIONS.items()
    }
    assert active["backtest"]["fee_bps"] == 5.5
    assert "# Width of the recurrent state, 1 to 4096.\n#hidden = 64" in text
