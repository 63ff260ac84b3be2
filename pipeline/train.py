"""``recur train price``: from the store (and pool files) to a run folder with a forecaster in it."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from recur.models.forecaster import Forecaster, ForecasterSpec
from recur.models.own import source_sha256
from recur.models.registry import Core, find_core, is_own, model_label
from recur.models.widen import begin_as
from recur.pipeline import artefact as art
from recur.pipeline.config import Config
from recur.pipeline.dataset import RawSeries, SeriesArrays, Split, arrays, fit_transform, make_split
from recur.pipeline.features import FeatureTransform
from recur.pipeline.fit import choose_device, fit
from recur.pipeline.load import (
    data_end_ms,
    open_store,
    pool_series,
    refuse_unexplained,
    snapshot,
    stored_news,
    stored_series,
)
from recur.pipeline.newsfeatures import NAMES as NEWS
from recur.pipeline.settings import dump_toml, load_config
from recur.storage.runs import COMPLETE, RUNNING, RunFolder, list_runs, new_run_id
from recur.vocabulary import INTERVALS, UsageError, did_you_mean, iso, next_open, parse_time

_log = logging.getLogger(__name__)


def build_net(
    config: Config, transform: FeatureTransform, symbols: dict[str, int], core: Core | None = None
) -> Forecaster:
    """A fresh network around ``core`` (else the configured model); its weights depend on ``train.seed`` alone.

    With news it begins as the same network without them: their weights start at zero, so that what the two forecast
    differs by what they learned and not by where they began.
    """
    core = core or find_core(config.model.name)
    names = transform.names
    net = _fresh_net(config, len(names), transform.horizons, len(symbols) + 1, core)
    if transform.has_news:
        rest = len(names) - len(NEWS)
        narrow = _fresh_net(config, rest, transform.horizons, len(symbols) + 1, core)
        if not begin_as(net, narrow, names.index(NEWS[0]), len(NEWS)):
            _log.warning(
                "with news, %s begins from other weights than without: do not compare single runs of the two",
                model_label(core.name),
            )
    return net


def _fresh_net(
    config: Config, n_features: int, horizons: tuple[int, ...], n_symbols: int, core: Core
) -> Forecaster:
    torch.manual_seed(config.train.seed)
    return Forecaster(
        ForecasterSpec(
            model=Path(core.name).name,
            n_features=n_features,
            n_symbols=n_symbols,
            horizons=horizons,
            hidden=config.model.hidden,
            layers=config.model.layers or core.layers,
            embed=config.model.embed,
            dropout=config.model.dropout,
            drift=config.model.drift,
            continuous=core.continuous,
            sha256=source_sha256(core.source) if core.source else "",
        ),
        core,
    )


def gap_ms(config: Config) -> int:
    """Length of a purge gap: the longest horizon."""
    step = INTERVALS[config.market.interval] or 31 * 86_400_000
    return max(config.train.horizons) * step


def symbol_table(series: Sequence[RawSeries]) -> dict[str, int]:
    """Embedding row of every symbol; 0 is left for symbols never seen."""
    return {name: i + 1 for i, name in enumerate(sorted({s.symbol for s in series}))}


def fit_fold(
    series: Sequence[RawSeries], split: Split, config: Config, folder: RunFolder, *, progress: bool
) -> tuple[art.Artefact, list[SeriesArrays], dict[str, Any]]:
    """Features, network and training of one split; everything fitted sees the training span alone."""
    horizons, interval = config.train.horizons, config.market.interval
    f = config.features
    transform = fit_transform(series, interval, horizons, split.train_until_ms, bool(f.fine), f.news)
    data = arrays(series, transform)
    symbols, core = symbol_table(series), find_core(config.model.name)
    made = art.Artefact(build_net(config, transform, symbols, core), transform, symbols)
    art.save_spec(folder, made, core)
    summary = fit(made.net, data, symbols, split, config.train, folder.path, progress=progress)
    art.save_weights(folder, made.net)
    return made, data, summary


def train_price(
    home: Path, config: Config, *, resume: str | None, progress: bool, allow_gaps: bool = False
) -> dict[str, Any]:
    """Train one price forecaster and return its metrics (``run_id``, ``val_pinball`` per epoch, …).

    The last ``train.val_days`` before ``train.until`` (the end of the data) validate. Raises DataMissing when the
    store lacks the series or, unless ``allow_gaps``, has unexplained holes in them, UsageError when ``resume`` names a run that does not fit the configuration.
    """
    started = time.monotonic()
    choose_device(config.train.device)
    now = resolved(config)  # a model that cannot be built is refused before anything is read
    if resume:
        folder, config = _resumed(home, config, resume)
        if folder.status() == COMPLETE:
            return folder.read_json("metrics.json")
    else:
        config = now
    store = open_store(home, config)
    since = parse_time(config.train.since) if config.train.since else None
    until = parse_time(config.train.until) if config.train.until else None
    news = stored_news(store, config)
    own = stored_series(store, config, since, until, news=news)
    if not allow_gaps:
        refuse_unexplained(store, config, since, until)
    series = own + pool_series(config.train.pool, config, news)
    end = until or data_end_ms(own)
    # Cutoffs are closes, and the last bar's close is the end itself: one bar more keeps it inside the span.
    split = make_split(next_open(end, config.market.interval), end, config.train.val_days, 0)
    split = replace(split, train_until_ms=split.val_since_ms - gap_ms(config))
    if resume:
        _refuse_other_data(folder, series)
    else:
        config = replace(config, train=replace(config.train, until=iso(end)))
        folder = RunFolder(home, new_run_id("train", model_label(config.model.name), int(time.time() * 1000)))
        folder.write_text("config.toml", dump_toml(config))
        folder.write_json("manifest.json", _manifest(config, folder, own, series, split, RUNNING, 0.0))
    with folder.at_work():
        with nullcontext() if resume else folder.unless_data_missing():
            made, _, summary = fit_fold(series, split, config, folder, progress=progress)
        metrics: dict[str, Any] = {
            "run_id": folder.run_id,
            "model": model_label(config.model.name),
            "series": [s.unique_id for s in own],
            "horizons": list(config.train.horizons),
            "parameters": sum(p.numel() for p in made.net.parameters()),
            **summary,
        }
        folder.write_json("metrics.json", metrics)
        seconds = time.monotonic() - started
        folder.write_json("manifest.json", _manifest(config, folder, own, series, split, COMPLETE, seconds))
        (folder.path / "state.safetensors").unlink(missing_ok=True)
    return metrics


def resolved(config: Config) -> Config:
    """``config`` with as many layers as its model has by itself, where it asks for none. UsageError for a model that
    cannot be built."""
    core = find_core(config.model.name)
    return replace(config, model=replace(config.model, layers=config.model.layers or core.layers))


def _refuse_other_data(folder: RunFolder, series: Sequence[RawSeries]) -> None:
    """A run goes on with the bars that it began with: others would change its scaler and what its epochs compare."""
    before = {row["series"]: row for row in folder.read_manifest().get("data", [])}
    for row in snapshot(series):
        was = before.pop(row["series"], None)
        if was != row:
            told = "was not there" if was is None else f"had {was['rows']} bars since {was['first']}"
            raise UsageError(
                f"{row['series']} has changed since run {folder.run_id} began: it {told},"
                f" now it has {row['rows']} since {row['first']}.",
                "Start a new run without --resume.",
            )
    if before:
        raise UsageError(
            f"{', '.join(before)} of run {folder.run_id} is no longer there.",
            "Start a new run without --resume.",
        )


def _manifest(
    config: Config,
    folder: RunFolder,
    own: Sequence[RawSeries],
    series: Sequence[RawSeries],
    split: Split,
    status: str,
    seconds: float,
) -> dict[str, Any]:
    return {
        "run_id": folder.run_id,
        "kind": "train",
        "model": model_label(config.model.name),
        "status": status,
        "seed": config.train.seed,
        "device": choose_device(config.train.device),
        "known_until": iso(data_end_ms(series)),
        "split": split.as_dict(),
        "data": snapshot(series),
        "series": [s.unique_id for s in own],
        "wall_s": round(seconds, 3),
        "parent": None,
        **art.environment(),
    }


def _resumed(home: Path, config: Config, resume: str) -> tuple[RunFolder, Config]:
    """The folder and configuration of the run to go on with; its features must be those configured now."""
    runs = [r for r in list_runs(home) if r.run_id.startswith("train-")]
    names = [r.run_id for r in runs]
    wanted = names[-1] if resume == "last" and names else resume
    if wanted not in names:
        raise UsageError(
            f"There is no training run '{resume}' in {home / 'runs'}.{did_you_mean(resume, names)}",
            "'recur status' lists the runs; '--resume last' takes the newest.",
        )
    folder = RunFolder(home, wanted)
    if not folder.config.exists() or folder.status() == "broken":
        raise UsageError(
            f"Run {wanted} was cut off before it recorded its configuration: there is nothing to go on with.",
            f"Remove {folder.path} and train again.",
        )
    theirs, _ = load_config([folder.config], [], {})
    if is_own(theirs.model.name):
        theirs = replace(theirs, model=replace(theirs.model, name=_same_file(folder, config, theirs)))
    if folder.features.exists():
        before = [f["name"] for f in folder.read_json("features.json")["features"]]
        now = FeatureTransform(
            config.market.interval, config.train.horizons, bool(config.features.fine), config.features.news
        ).names
        if before != now or theirs.market.interval != config.market.interval:
            changed = sorted(set(before) ^ set(now)) or [f"interval {theirs.market.interval}"]
            raise UsageError(
                f"Run {wanted} was trained on other features than configured now: {', '.join(changed[:6])} differ.",
                f"Use the configuration {folder.config}, or start a new run without --resume.",
            )
    if unheard := _unheard(config, theirs):
        _log.warning(
            "run %s goes on with its own configuration: %s given now is not used", wanted, ", ".join(unheard)
        )
    return folder, theirs


def _unheard(config: Config, theirs: Config) -> list[str]:
    """What was configured of the training now (it is not the default) and differs from the run's own."""
    default, found = Config(), []
    for name in ("market", "features", "model", "train"):
        now, before, usual = (getattr(c, name) for c in (config, theirs, default))
        for item in fields(usual):
            value = getattr(now, item.name)
            if value not in (getattr(before, item.name), getattr(usual, item.name)):
                found.append(f"{name}.{item.name} = {value}")
    return found


def _same_file(folder: RunFolder, config: Config, theirs: Config) -> str:
    """The file named now for a run of a user's own model; resuming runs its code, so it must be named again."""
    if model_label(config.model.name) != model_label(theirs.model.name):
        raise UsageError(
            f"Run {folder.run_id} trains a model of its own, {model_label(theirs.model.name)}, and going on runs its code.",
            f"Name it again: --model {theirs.model.name}",
        )
    if (folder.path / art.OWN_SOURCE).exists():
        before = source_sha256((folder.path / art.OWN_SOURCE).read_bytes())
        now = source_sha256(find_core(config.model.name).source)
        if before != now:
            raise UsageError(
                f"{config.model.name} has changed since run {folder.run_id} began: sha256 {now[:12]}…, was {before[:12]}….",
                "Put the file back as it was, or start a new run without --resume.",
            )
    return config.model.name
