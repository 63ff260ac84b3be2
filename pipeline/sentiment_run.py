"""What the folder of a sentiment run holds beside the weights, so that it is read like any other run's.

``config.toml`` with everything resolved, ``features.json`` with what the network reads and what it answers, ``logs``
with the curves of its training.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from recur.models.text.classifier import CHUNK
from recur.pipeline.config import Config
from recur.pipeline.labelled import CLASSES
from recur.pipeline.settings import dump_toml
from recur.pipeline.text import MARKS, MAX_CHARS, TextCodec
from recur.storage.runs import RunFolder


def begin(folder: RunFolder, config: Config, epochs: int, seed: int, manifest: dict[str, Any]) -> None:
    """Write the configuration, with the numbers that the plan filled in, and the manifest."""
    resolved = replace(
        config,
        train=replace(config.train, seed=seed),
        sentiment=replace(config.sentiment, epochs=epochs),
    )
    folder.write_text("config.toml", dump_toml(resolved))
    folder.write_json("manifest.json", manifest)


def write_curves(folder: RunFolder, curves: Mapping[str, Sequence[float]]) -> None:
    """Write each curve, one value per pass or epoch, for TensorBoard and as CSV, where a price run has its own."""
    from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

    if folder.logs.exists():  # a training that was cut off after it had written them
        shutil.rmtree(folder.logs)
    folder.logs.mkdir(parents=True)
    loggers = [
        TensorBoardLogger(folder.logs, name="tensorboard", version="whole"),
        CSVLogger(folder.logs, name="csv", version="whole"),
    ]
    for logger in loggers:
        for name, values in curves.items():
            for step, value in enumerate(values):
                logger.log_metrics({name: value}, step)
        logger.save()
        logger.finalize("success")


def describe(folder: RunFolder, codec: TextCodec) -> None:
    """Write what one text becomes: its tokens in order, of any number, and the classes of the answer."""
    reading = {
        "name": "tokens",
        "vocabulary": codec.size,
        "marks": list(MARKS),
        "lookback": f"the whole text, in chunks of {CHUNK} tokens with the state carried",
        "longest": f"{MAX_CHARS} characters",
    }
    folder.write_json("features.json", {"features": [reading], "scaler": None, "targets": list(CLASSES)})
