"""Training targets per second: recur's GRU against neuralforecast's GRU of the same width on the same candles.

A target is one (series, step, horizon) label whose gradient was taken. Ours has one at every step of a window;
neuralforecast draws windows and has one per step of its horizon. Each time is that of more steps minus that of
fewer, so that start-up does not count. Both get the same number of threads.
"""

from __future__ import annotations

import logging
import sys
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
from common import START_MS, Results, bars, main, show

from recur.connectors.files import read_candles
from recur.pipeline.config import Config
from recur.pipeline.dataset import arrays, fit_transform, make_split, raw_series
from recur.pipeline.fit import fit
from recur.pipeline.train import build_net, symbol_table
from recur.vocabulary import HOUR_MS

REAL = Path(__file__).resolve().parents[2] / "shared" / "data" / "candles_bybit_perp_1h.parquet"
HIDDEN, WINDOW = 64, 512


def candles() -> pl.DataFrame:
    if REAL.exists():
        return read_candles(REAL)
    symbols = ("BTCUSDT", "ETHUSDT", "SOLUSDT", "BNBUSDT")
    return pl.concat([bars(s, 18_800, "1h", seed=k) for k, s in enumerate(symbols)])


def ours(frame: pl.DataFrame, epochs: tuple[int, int]) -> float:
    """Targets per second of one epoch more."""
    config = Config()
    series = raw_series(frame, "store")
    end = START_MS if frame.is_empty() else int(frame["open_time"].dt.epoch("ms").max()) + HOUR_MS  # type: ignore[arg-type]
    split = make_split(end, end, 20, 24 * HOUR_MS)
    transform = fit_transform(series, "1h", config.train.horizons, split.train_until_ms)
    data, symbols = arrays(series, transform), symbol_table(series)
    seconds, targets = [], 0
    for n in epochs:
        train = replace(config.train, epochs=n, patience=99, device="cpu")
        net = build_net(replace(config, train=train), transform, symbols)
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            targets = fit(net, data, symbols, split, train, Path(folder), progress=False)["targets_per_epoch"]
            seconds.append(time.perf_counter() - start)
    return targets * (epochs[1] - epochs[0]) / (seconds[1] - seconds[0])


def theirs(frame: pl.DataFrame, steps: tuple[int, int]) -> float:
    """Targets per second of the further optimiser steps."""
    from neuralforecast import NeuralForecast
    from neuralforecast.losses.pytorch import MQLoss
    from neuralforecast.models import GRU

    returns = frame.select(
        pl.col("symbol").alias("unique_id"),
        pl.col("open_time").dt.replace_time_zone(None).alias("ds"),
        pl.col("close").log().diff().over("symbol").fill_null(0.0).alias("y"),
    ).to_pandas()
    batch, horizon, seconds = 1024, 24, []  # 1024 windows per step is its own default
    for n in steps:
        model = GRU(
            h=horizon, input_size=WINDOW, encoder_n_layers=1, encoder_hidden_size=HIDDEN, decoder_layers=1,
            decoder_hidden_size=HIDDEN, loss=MQLoss(level=[50, 90]), max_steps=n, batch_size=4,
            windows_batch_size=batch, scaler_type="standard", accelerator="cpu", logger=False,
            enable_progress_bar=False, enable_checkpointing=False, enable_model_summary=False,
        )  # fmt: skip
        start = time.perf_counter()
        NeuralForecast(models=[model], freq="1h").fit(returns)
        seconds.append(time.perf_counter() - start)
    return batch * horizon * (steps[1] - steps[0]) / (seconds[1] - seconds[0])


def measure(quick: bool) -> Results:
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        import neuralforecast  # noqa: F401
    except ImportError:
        sys.exit("neuralforecast is not installed: pip install '.[bench]'")
    frame = candles()
    if quick:
        frame = frame.group_by("symbol", maintain_order=True).tail(4000)
    rounds = 1 if quick else 3
    a, b = [], []
    for _ in range(rounds):
        a.append(ours(frame, (1, 3)))
        b.append(theirs(frame, (2, 4) if quick else (2, 8)))
    mine, peer = float(np.median(a)), float(np.median(b))
    show(
        f"Training, GRU of width {HIDDEN}, window {WINDOW}",
        ("", "targets/s", "ratio"),
        [("recur", f"{mine:,.0f}", f"{mine / peer:.1f}"), ("neuralforecast", f"{peer:,.0f}", "1.0")],
    )
    return {"training": {"recur": mine, "neuralforecast": peer, "ratio": mine / peer}}


if __name__ == "__main__":
    main(measure, __doc__)
