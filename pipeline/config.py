"""The configuration: one frozen dataclass per TOML section with every default; ``settings.py`` fills it.

Standard library only. Nothing secret is ever configured here: secrets come from the environment only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import date
from typing import Any, get_args, get_origin, get_type_hints
from urllib.parse import urlsplit

from recur.vocabulary import (
    CATEGORIES,
    INTERVALS,
    PATTERNED,
    UsageError,
    did_you_mean,
    parse_symbol,
    parse_time,
)

FETCH_KINDS = (
    "candles", "mark", "index", "premium", "funding", "open_interest", "long_short", "instruments",
)  # fmt: skip
"""What ``recur fetch`` can bring of the market; ``candles`` are the trade candles."""

TEXT_KINDS = ("announcements", "news")
"""The texts it can bring: the venue's announcements, and the feeds of ``news.feeds``."""

SCHEDULES = tuple(name for name, ms in INTERVALS.items() if 0 < ms <= INTERVALS["1d"])
"""Periods that a schedule can have: those that divide a day."""

MOST_LAYERS = 128


class ConfigProblems(UsageError):
    """Everything that is wrong with a configuration, at once: ``problems`` holds (``section.key``, text)."""

    def __init__(self, problems: Sequence[tuple[str, str]]) -> None:
        self.problems = list(problems)
        text = "; ".join(f"{key} {what}".replace(" : ", ": ", 1) for key, what in self.problems)
        super().__init__(f"Configuration: {text}.", "Commented defaults: recur init.")


def _within(low: float, high: float, *, open_low: bool = False) -> _Rule:
    text = f"expected {'more than' if open_low else 'from'} {low:g} {'and at most' if open_low else 'to'} {high:g}"
    return _Rule(text, lambda x: low < x <= high if open_low else low <= x <= high)


def _one_of(*known: str) -> _Rule:
    return _Rule(f"expected one of {' '.join(known)}", lambda x: x in known, known)


@dataclass(frozen=True)
class _Rule:
    """What a value must satisfy, in words and as a test."""

    text: str
    holds: Any
    known: tuple[str, ...] = ()


def _is_time(text: str) -> bool:
    try:
        parse_time(text)
    except UsageError:
        return False
    return True


_TIME = _Rule("expected an ISO-8601 UTC time such as 2025-07-01, or empty", lambda x: not x or _is_time(x))


def is_pattern(word: str) -> bool:
    """Whether a word of ``--symbols`` stands for symbols that have yet to be found: ``*USDT`` or ``top:20``."""
    return "*" in word or "?" in word or word.lower().startswith("top:")


def _is_url(text: str) -> bool:
    try:
        parts = urlsplit(text)
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.netloc) and "@" not in parts.netloc


def _type_words(hint: Any) -> str:
    if get_origin(hint) is tuple:
        return f"a list of {_type_words(get_args(hint)[0])}s"
    return {bool: "true or false", int: "whole number", float: "number", str: "text"}[hint]


def _typed(hint: Any, value: object) -> Any:
    """``value`` as ``hint`` (list to tuple, int to float, TOML date to text); TypeError when it does not fit."""
    if get_origin(hint) is tuple and isinstance(value, list | tuple):
        return tuple(_typed(get_args(hint)[0], item) for item in value)
    if hint is str and isinstance(value, date):  # covers datetime
        return value.isoformat()
    if (
        hint is float
        and isinstance(value, int | float)
        and not isinstance(value, bool)
        and math.isfinite(value)
    ):
        return float(value)
    if isinstance(hint, type) and type(value) is hint and hint is not float:
        return value
    raise TypeError


def _verify(section: Any, name: str, rules: Mapping[str, _Rule]) -> None:
    """Check types and rules of every field of ``section``; raise all problems at once."""
    problems = []
    for key, hint in get_type_hints(type(section)).items():
        value = getattr(section, key)
        try:
            value = _typed(hint, value)
        except TypeError:
            problems.append((f"{name}.{key}", f"= {value!r}: expected {_type_words(hint)}"))
            continue
        object.__setattr__(section, key, value)
        rule = rules.get(key)
        for item in value if isinstance(value, tuple) else (value,):
            if rule and not rule.holds(item):
                shown = "" if "url" in key else f"= {item!r}"  # an address may carry a password
                guess = did_you_mean(str(item), rule.known).rstrip()
                problems.append((f"{name}.{key}", f"{shown}: {rule.text}{'.' if guess else ''}{guess}"))
    if problems:
        raise ConfigProblems(problems)


def _ordered(section: Any, name: str, first: str, last: str) -> None:
    since, until = getattr(section, first), getattr(section, last)
    if since and until and parse_time(since) >= parse_time(until):
        raise ConfigProblems([(f"{name}.{first}", f"= {since}: expected a time before {last} = {until}")])


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreConfig:
    """How the data store is opened."""

    wait_s: float = 30.0
    """Seconds to wait while another process holds the store, 0 to 86400."""

    def __post_init__(self) -> None:
        _verify(self, "store", {"wait_s": _within(0, 86_400)})


@dataclass(frozen=True, kw_only=True, slots=True)
class MarketConfig:
    """Which series all commands are about."""

    symbols: tuple[str, ...] = ("BTCUSDT", "ETHUSDT", "SOLUSDT", "BNBUSDT")
    """Instruments of one category: BTCUSDT, or the ccxt spellings BTC/USDT:USDT (linear) and BTC/USDT (spot)."""

    category: str = "linear"
    """Market: linear, inverse or spot."""

    interval: str = "1h"
    """Length of a bar: 1m 3m 5m 15m 30m 1h 2h 4h 6h 12h 1d 1w 1M."""

    def __post_init__(self) -> None:
        _verify(self, "market", {"category": _one_of(*CATEGORIES), "interval": _one_of(*INTERVALS)})
        if not self.symbols:
            raise ConfigProblems([("market.symbols", "= []: expected at least one symbol")])
        problems, symbols = [], []
        for text in self.symbols:
            try:
                category, symbol = parse_symbol(text, self.category)
            except UsageError as error:
                problems.append(("market.symbols", f": {error.message.rstrip('.')}"))
                continue
            symbols.append(symbol)
            if category != self.category:
                problems.append(
                    ("market.symbols", f"= {text!r}: is {category}, but market.category is {self.category}")
                )
        if problems:
            raise ConfigProblems(problems)
        object.__setattr__(self, "symbols", tuple(dict.fromkeys(symbols)))


@dataclass(frozen=True, kw_only=True, slots=True)
class FetchConfig:
    """What is brought into the store, and how."""

    kinds: tuple[str, ...] = ("candles", "funding")
    """Any of candles, mark, index, premium, funding, open_interest, long_short, instruments, announcements, news. For spot: candles."""

    days: int = 730
    """Days of history brought when a series is new, 1 to 10000; later runs continue from what is stored."""

    workers: int = 40
    """Requests in flight at once, 1 to 64."""

    rate: float = 110.0
    """Requests per second of this machine, all programs together, above 0, at most 120, which is the venue's limit."""

    lag_s: float = 2.0
    """Seconds that a bar must have been closed by the venue's clock before it is asked for, 0 to 3600."""

    base_url: str = ""
    """Other address of the venue, http(s)://host[:port]; empty for the venue itself. No credentials in it."""

    def __post_init__(self) -> None:
        url = _Rule("expected http(s)://host[:port] without credentials", lambda x: not x or _is_url(x))
        rules = {
            "kinds": _one_of(*FETCH_KINDS, *TEXT_KINDS),
            "days": _within(1, 10_000),
            "workers": _within(1, 64),
        }
        rules |= {"rate": _within(0, 120, open_low=True), "lag_s": _within(0, 3600)}
        _verify(self, "fetch", rules | {"base_url": url})
        if not self.kinds:
            raise ConfigProblems(
                [("fetch.kinds", f"= []: expected some of {' '.join((*FETCH_KINDS, *TEXT_KINDS))}")]
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class NewsConfig:
    """Where texts come from."""

    feeds: tuple[str, ...] = ()
    """Addresses of RSS or Atom feeds, http(s)://…; read by 'recur fetch --kinds news'."""

    locale: str = "en-US"
    """Language edition of the venue's announcements."""

    languages: tuple[str, ...] = ("en",)
    """Two-letter languages to keep; items that are for certain in another one are left out and counted."""

    def __post_init__(self) -> None:
        feed = _Rule("expected http(s):// addresses", lambda x: str(x).startswith(("http://", "https://")))
        _verify(self, "news", {"feeds": feed, "locale": _Rule("expected a locale such as en-US", bool)})


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureConfig:
    """What the model sees."""

    fine: str = ""
    """Interval of finer bars to measure volatility within each bar, shorter than market.interval; empty for none."""

    news: bool = False
    """Whether the model sees what the stored news said, as of each bar's close."""

    news_run: str = ""
    """Sentiment run whose scores of the news are used; empty for counts and silence without a tone."""

    news_latency_s: float = 60.0
    """Seconds between an item being known and a forecast using it, 0 to 86400."""

    def __post_init__(self) -> None:
        _verify(self, "features", {"fine": _one_of("", *INTERVALS), "news_latency_s": _within(0, 86_400)})


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The network."""

    name: str = "gru"
    """Name of the model; hybrid:M-M*- for layers of your choice; path/to/file.py:Class for a model of your own."""

    hidden: int = 64
    """Width of the recurrent state, 1 to 4096."""

    layers: int = 0
    """Layers, 1 to 128; 0 for as many as the model has by itself: 13 in a hybrid, those of its pattern, else 1."""

    embed: int = 4
    """Width of the learned vector of each symbol, 0 (none) to 256."""

    dropout: float = 0.1
    """Share of values dropped in training, 0 to 0.9."""

    drift: bool = False
    """Whether the centre of the forecast may leave zero: true lets the model bet on direction."""

    def __post_init__(self) -> None:
        rules = {
            "name": _Rule("expected a name", bool),
            "hidden": _within(1, 4096),
            "layers": _within(0, MOST_LAYERS),
        }
        _verify(self, "model", rules | {"embed": _within(0, 256), "dropout": _within(0, 0.9)})
        pattern = self.name.removeprefix(PATTERNED)
        if pattern != self.name and len(pattern) > MOST_LAYERS:
            raise ConfigProblems(
                [("model.name", f"has {len(pattern)} layers: expected at most {MOST_LAYERS}")]
            )
        if pattern != self.name and self.layers not in (0, len(pattern)):
            raise ConfigProblems([("model.layers", f"= {self.layers}: {self.name} has {len(pattern)}")])


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """How the model is fitted."""

    horizons: tuple[int, ...] = (1, 6, 24)
    """Forecast horizons in bars, increasing, each 1 to 1000."""

    epochs: int = 4
    """Most passes over the training data, 1 to 10000."""

    batch: int = 32
    """Windows per step, 1 to 65536."""

    window: int = 512
    """Bars per training window, 2 to 65536."""

    burn_in: int = 128
    """First bars of a window that only warm the state up and carry no loss, 0 to window - 1."""

    state: str = "fresh"
    """fresh: every window begins from nothing; carried: windows follow one another and hand their state on."""

    checkpoint: int = 0
    """Bars per piece of a window that is computed again in the backward pass to save memory, 0 (off) to 65536."""

    lr: float = 3e-3
    """Peak learning rate, above 0, at most 1."""

    weight_decay: float = 1e-3
    """Decoupled weight decay, 0 to 1."""

    clip: float = 1.0
    """Largest gradient norm, above 0, at most 1000."""

    seed: int = 0
    """Seed of every random draw, 0 to 4294967295."""

    device: str = "auto"
    """auto, cpu or cuda."""

    precision: str = "auto"
    """float32, bf16 (weights stay float32), or auto: bf16 on a GPU and float32 elsewhere."""

    compile: bool = False
    """Whether a GPU runs the network through torch.compile; without a GPU it makes no difference."""

    deterministic: bool = False
    """Whether only algorithms that give the same bits every time are used, also on a GPU, where it costs speed."""

    val_days: int = 60
    """Last days of the training range that decide when to stop, 1 to 10000."""

    patience: int = 3
    """Passes without improvement before stopping, 1 to 10000."""

    pool: tuple[str, ...] = ()
    """Files of further candles that are used for training only."""

    since: str = ""
    """First instant to train on, ISO-8601 UTC; empty for all that is stored."""

    until: str = ""
    """Instant before which training ends, ISO-8601 UTC; empty for all that is stored."""

    def __post_init__(self) -> None:
        count = _within(1, 10_000)
        rules = {
            "horizons": _within(1, 1000), "epochs": count, "batch": _within(1, 65_536),
            "window": _within(2, 65_536), "burn_in": _within(0, 65_535), "lr": _within(0, 1, open_low=True),
            "weight_decay": _within(0, 1), "clip": _within(0, 1000, open_low=True), "seed": _within(0, 2**32 - 1),
            "state": _one_of("fresh", "carried"), "checkpoint": _within(0, 65_536),
            "precision": _one_of("auto", "float32", "bf16"),
            "device": _one_of("auto", "cpu", "cuda"), "val_days": count, "patience": count,
            "pool": _Rule("expected a file name", bool), "since": _TIME, "until": _TIME,
        }  # fmt: skip
        _verify(self, "train", rules)
        problems = []
        if not self.horizons or list(self.horizons) != sorted(set(self.horizons)):
            problems.append(
                ("train.horizons", f"= {list(self.horizons)}: expected increasing numbers of bars")
            )
        if self.burn_in >= self.window:
            problems.append(("train.burn_in", f"= {self.burn_in}: expected less than window = {self.window}"))
        if problems:
            raise ConfigProblems(problems)
        _ordered(self, "train", "since", "until")


@dataclass(frozen=True, kw_only=True, slots=True)
class SentimentConfig:
    """How texts are learned from."""

    epochs: int = 0
    """Most passes of each fine-tuning, 1 to 10000; 0 for as many as the shipped plan has."""

    reaction_bars: int = 4
    """With --label-from-market: bars that the price has to react, 1 to 1000."""

    reaction_threshold: float = 0.75
    """Standard deviations beyond which a reaction is positive or negative, above 0, at most 100."""

    reaction_history: int = 168
    """Bars before a text that say how far prices move anyway, 24 to 100000."""

    reaction_latency_s: float = 60.0
    """Seconds from publication to the earliest bar whose move counts, 0 to 86400."""

    def __post_init__(self) -> None:
        rules = {
            "epochs": _within(0, 10_000), "reaction_bars": _within(1, 1000),
            "reaction_threshold": _within(0, 100, open_low=True), "reaction_history": _within(24, 100_000),
            "reaction_latency_s": _within(0, 86_400),
        }  # fmt: skip
        _verify(self, "sentiment", rules)


@dataclass(frozen=True, kw_only=True, slots=True)
class BacktestConfig:
    """How the model is judged out of sample."""

    folds: int = 2
    """Parts of the test range, each forecast by a model trained on what came before it, 1 to 100."""

    test_since: str = ""
    """First instant forecast, ISO-8601 UTC; empty for test_days before the end."""

    test_until: str = ""
    """Instant before which the test ends, ISO-8601 UTC; empty for the end of the data."""

    test_days: int = 180
    """Length of the test range in days when test_since is empty, 1 to 10000."""

    fee_bps: float = 5.5
    """Taker fee per traded value in basis points, -100 to 1000."""

    slippage_bps: float = 1.0
    """Price lost per traded value in basis points, 0 to 1000."""

    trade_horizon: int = 24
    """Horizon in bars that the simulated trading follows: one of train.horizons."""

    def __post_init__(self) -> None:
        rules = {
            "folds": _within(1, 100), "test_since": _TIME, "test_until": _TIME, "test_days": _within(1, 10_000),
            "fee_bps": _within(-100, 1000), "slippage_bps": _within(0, 1000), "trade_horizon": _within(1, 1000),
        }  # fmt: skip
        _verify(self, "backtest", rules)
        _ordered(self, "backtest", "test_since", "test_until")


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleConfig:
    """When fetch and predict run by themselves."""

    every: str = "1h"
    """Period: 1m 3m 5m 15m 30m 1h 2h 4h 6h 12h 1d, counted from midnight UTC."""

    delay_s: int = 20
    """Seconds after the bar's close before fetching, 0 to 3599 and shorter than the period."""

    def __post_init__(self) -> None:
        _verify(self, "schedule", {"every": _one_of(*SCHEDULES), "delay_s": _within(0, 3599)})
        if self.delay_s * 1000 >= INTERVALS[self.every]:
            what = f"= {self.delay_s}: expected less than the period, {INTERVALS[self.every] // 1000} s"
            raise ConfigProblems([("schedule.delay_s", what)])


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Everything; one field per TOML section."""

    store: StoreConfig = field(default_factory=StoreConfig)
    market: MarketConfig = field(default_factory=MarketConfig)
    fetch: FetchConfig = field(default_factory=FetchConfig)
    news: NewsConfig = field(default_factory=NewsConfig)
    features: FeatureConfig = field(default_factory=FeatureConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sentiment: SentimentConfig = field(default_factory=SentimentConfig)
    backtest: BacktestConfig = field(default_factory=BacktestConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)

    def __post_init__(self) -> None:
        problems = []
        fine, interval = self.features.fine, self.market.interval
        if fine and (INTERVALS[fine] or math.inf) >= (INTERVALS[interval] or math.inf):
            problems.append(
                ("features.fine", f"= {fine!r}: expected shorter than market.interval = {interval}")
            )
        if self.backtest.trade_horizon not in self.train.horizons:
            what = f"= {self.backtest.trade_horizon}: expected one of train.horizons = {list(self.train.horizons)}"
            problems.append(("backtest.trade_horizon", what))
        if problems:
            raise ConfigProblems(problems)


SECTIONS: dict[str, type] = {item.name: get_type_hints(Config)[item.name] for item in fields(Config)}
"""TOML section to its dataclass."""
