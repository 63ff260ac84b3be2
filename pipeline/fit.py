"""Training: whole contiguous stretches with a target at every step, by Lightning, resumable after a kill.

Windows of ``window`` bars start at a random offset each epoch and overlap by ``burn_in`` bars, in which the state
warms up and no loss is taken (truncated BPTT from a fresh state). After every epoch weights, optimiser, and history
are written as safetensors and JSON in one atomic step; a killed run continues from there and ends as an undisturbed
one would, since the randomness of an epoch depends on (seed, epoch) alone.
"""

from __future__ import annotations

import json
import logging
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, RichProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from recur.models.forecaster import Forecaster, forecast_loss, pinball_loss
from recur.pipeline.config import TrainConfig
from recur.pipeline.dataset import SeriesArrays, Split, label_mask
from recur.vocabulary import DataMissing, RecurError, UsageError

Batch = tuple[Tensor, Tensor, Tensor, Tensor]  # x (B,W,F), symbol (B,), target (B,W,H), mask (B,W,H)
SYMBOL_DROP = 0.1
"""Share of windows whose symbol is hidden, so that embedding 0 learns to stand for any other market."""


@dataclass(frozen=True, slots=True)
class Samples:
    """One series ready for the network: ``x`` (T, F), ``target`` (T, H) in units of scale, ``mask`` (T, H)."""

    symbol: int
    x: Tensor
    target: Tensor
    mask: Tensor


def make_samples(
    series: Sequence[SeriesArrays],
    symbols: dict[str, int],
    horizons: Sequence[int],
    since_ms: int,
    until_ms: int,
) -> list[Samples]:
    """Samples of every series with at least one label inside ``[since, until)``; bars after ``until`` are cut off."""
    out = []
    for s in series:
        mask = label_mask(s, horizons, since_ms, until_ms)
        if not mask.any():
            continue
        end = int(np.searchsorted(s.close_ms, until_ms, side="right"))
        first = max(0, int(np.argmax(mask.any(axis=1))) - 4096)  # enough earlier bars for any warm-up
        y = np.where(mask, s.target / s.scale, 0.0)[first:end]
        out.append(
            Samples(
                symbols.get(s.symbol, 0),
                torch.from_numpy(s.x[first:end]),
                torch.from_numpy(y.astype(np.float32)),
                torch.from_numpy(mask[first:end]),
            )
        )
    return out


class Windows(IterableDataset[Batch]):
    """Batches of windows. ``shuffle`` draws new offsets and a new order for each epoch from (seed, epoch)."""

    def __init__(
        self, samples: Sequence[Samples], window: int, burn_in: int, batch: int, seed: int, shuffle: bool
    ):
        self.samples, self.window, self.burn_in, self.batch = samples, window, burn_in, batch
        self.seed, self.shuffle, self.epoch = seed, shuffle, 0

    def _starts(self, rng: np.random.Generator) -> NDArray[np.int64]:
        pairs = []
        stride = self.window - self.burn_in
        for i, s in enumerate(self.samples):
            offset = -int(rng.integers(0, stride)) if self.shuffle else 0
            live = torch.nonzero(s.mask.any(1)).flatten()
            first, last = int(live[0]), int(live[-1])
            for start in range(first + offset - self.burn_in, last + 1 - self.burn_in, stride):
                pairs.append((i, start))
        return np.array(pairs, dtype=np.int64).reshape(-1, 2)

    def __len__(self) -> int:
        return math.ceil(len(self._starts(np.random.default_rng((self.seed, self.epoch)))) / self.batch)

    def __iter__(self) -> Iterator[Batch]:
        rng = np.random.default_rng((self.seed, self.epoch))
        pairs = self._starts(rng)
        if self.shuffle:
            rng.shuffle(pairs)
        for at in range(0, len(pairs), self.batch):
            yield self._collate(pairs[at : at + self.batch], rng)

    def _collate(self, pairs: NDArray[np.int64], rng: np.random.Generator) -> Batch:
        first = self.samples[0]
        x = torch.zeros(len(pairs), self.window, first.x.shape[1])
        y = torch.zeros(len(pairs), self.window, first.target.shape[1])
        mask = torch.zeros(len(pairs), self.window, first.target.shape[1], dtype=torch.bool)
        symbol = torch.zeros(len(pairs), dtype=torch.long)
        for row, (i, start) in enumerate(pairs):
            s = self.samples[i]
            low, high = max(start, 0), min(start + self.window, len(s.x))
            # A stretch that begins before the series begins sits at the left edge: nothing is padded before it.
            n = max(high - low, 0)
            x[row, :n], y[row, :n], mask[row, :n] = s.x[low:high], s.target[low:high], s.mask[low:high]
            warm = self.burn_in if start > 0 else max(0, self.burn_in + start)
            mask[row, :warm] = False
            hidden = self.shuffle and rng.random() < SYMBOL_DROP
            symbol[row] = 0 if hidden else s.symbol
        return x, symbol, y, mask


class ForecasterModule(L.LightningModule):
    """Loss, optimiser and schedule around a :class:`Forecaster`."""

    def __init__(
        self, net: Forecaster, config: TrainConfig, steps_per_epoch: int, first_step: int = 0
    ) -> None:
        super().__init__()
        self.net, self.config, self.first_step = net, config, first_step
        self.total_steps = max(1, steps_per_epoch * config.epochs)
        self.val_sums: list[tuple[Tensor, Tensor]] = []

    def training_step(self, batch: Batch, _: int) -> Tensor:
        x, symbol, y, mask = batch
        out, _state = self.net(x, symbol)
        loss = forecast_loss(out, y, mask)
        if not torch.isfinite(loss):
            raise RecurError(
                f"The training loss became {loss.item()} at step {self.global_step}: stopped before the update.",
                "Lower train.lr, or look for broken bars with 'recur status'.",
            )
        if self.global_step % 10 == 0:
            self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Batch, _: int) -> None:
        x, symbol, y, mask = batch
        out, _state = self.net(x, symbol)
        weight = mask.sum((0, 1)).float()
        self.val_sums.append((pinball_loss(out, y, mask) * weight, weight))

    def on_validation_epoch_end(self) -> None:
        total = torch.stack([s for s, _ in self.val_sums]).sum(0)
        weight = torch.stack([w for _, w in self.val_sums]).sum(0)
        self.val_sums.clear()
        self.log("val_pinball", (total / weight.clamp(min=1)).mean(), prog_bar=True)

    def configure_optimizers(self) -> Any:
        decayed = [p for n, p in self.named_parameters() if p.ndim >= 2 and "embedding" not in n]
        plain = [p for n, p in self.named_parameters() if not (p.ndim >= 2 and "embedding" not in n)]
        optimizer = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": self.config.weight_decay},
                {"params": plain, "weight_decay": 0.0},
            ],
            lr=self.config.lr,
        )
        warm = max(1, self.total_steps // 20)

        def factor(step: int) -> float:
            at = step + self.first_step
            if at < warm:
                return (at + 1) / warm
            return 0.02 + 0.98 * 0.5 * (
                1 + math.cos(math.pi * min(1.0, (at - warm) / max(1, self.total_steps - warm)))
            )

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@dataclass(slots=True)
class Progress:
    """What a resumed run must know; saved in the header of ``state.safetensors``."""

    epoch: int = 0
    step: int = 0
    best: float = math.inf
    best_epoch: int = -1
    waited: int = 0
    history: list[float] | None = None


class EpochKeeper(Callback):
    """Seeds each epoch, keeps the best weights, stops early, and saves the state after each epoch atomically."""

    def __init__(self, path: Path, config: TrainConfig, windows: Windows, progress: Progress) -> None:
        self.path, self.config, self.windows, self.progress = path, config, windows, progress
        self.best: dict[str, Tensor] = {}

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        if batch_idx == 0:  # by now the loaders have drawn what they draw from the global generator
            torch.manual_seed(self.config.seed * 1_000_003 + self.progress.epoch)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, ForecasterModule)
        value = float(trainer.callback_metrics["val_pinball"])
        p = self.progress
        p.history = [*(p.history or []), value]
        if value < p.best:
            p.best, p.best_epoch, p.waited = value, p.epoch, 0
            self.best = {k: v.detach().cpu().clone() for k, v in pl_module.net.state_dict().items()}
        else:
            p.waited += 1
        p.epoch += 1
        p.step = pl_module.first_step + trainer.global_step
        self.windows.epoch = p.epoch
        save_state(self.path, pl_module.net, self.best, trainer.optimizers[0], p)
        if p.waited >= self.config.patience:
            trainer.should_stop = True


def save_state(
    path: Path, net: Forecaster, best: dict[str, Tensor], optimizer: torch.optim.Optimizer, progress: Progress
) -> None:
    """Everything that continues a run, in one safetensors file replaced in one step."""
    tensors = {f"net.{k}": v.detach().cpu().contiguous().clone() for k, v in net.state_dict().items()}
    tensors |= {f"best.{k}": v.contiguous() for k, v in best.items()}
    for index, slots in optimizer.state_dict()["state"].items():
        for name, value in slots.items():
            tensors[f"opt.{index}.{name}"] = torch.as_tensor(value).detach().cpu().contiguous().clone()
    header = {k: getattr(progress, k) for k in ("epoch", "step", "best", "best_epoch", "waited", "history")}
    temporary = path.with_suffix(".tmp")
    save_file(tensors, temporary, metadata={"progress": json.dumps(header)})
    os.replace(temporary, path)


def load_state(path: Path) -> tuple[dict[str, Tensor], Progress]:
    """Tensors and progress of :func:`save_state`."""
    with safe_open(path, framework="pt") as f:
        tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118 (the file object is not a dict)
        return tensors, Progress(**json.loads(f.metadata()["progress"]))


class _Restore(Callback):
    """Puts the optimiser's moments back once Lightning has built the optimiser."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.slots: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith("opt."):
                _, index, name = key.split(".", 2)
                self.slots.setdefault(int(index), {})[name] = value

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        optimizer = trainer.optimizers[0]
        fresh = optimizer.state_dict()
        optimizer.load_state_dict({"state": self.slots, "param_groups": fresh["param_groups"]})


def choose_device(device: str) -> str:
    """'cuda' or 'cpu' for ``auto|cpu|cuda``; UsageError when a GPU is asked for and there is none."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            "--device cuda was asked for, and torch sees no GPU here.", "Use --device auto or cpu."
        )
    return "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"


def fit(
    net: Forecaster,
    train: Sequence[SeriesArrays],
    symbols: dict[str, int],
    split: Split,
    config: TrainConfig,
    folder: Path,
    *,
    progress: bool,
) -> dict[str, Any]:
    """Train ``net`` in place and leave it with the weights of the best validation epoch.

    Resumes from ``folder/state.safetensors`` when that is there. Returns epochs, best epoch, history and targets/s.
    Raises DataMissing when the train or validation span holds no label.
    """
    horizons = net.spec.horizons
    learn = make_samples(train, symbols, horizons, 0, split.train_until_ms)
    check = make_samples(train, symbols, horizons, split.val_since_ms, split.val_until_ms)
    for name, samples in (("training", learn), ("validation", check)):
        if not samples:
            raise DataMissing(
                f"The {name} span of {split.as_dict()} holds no complete label.",
                "Fetch a longer history ('recur fetch --days'), or lower train.val_days.",
            )
    batches = Windows(learn, config.window, config.burn_in, config.batch, config.seed, shuffle=True)
    held_out = Windows(check, config.window, config.burn_in, 4 * config.batch, config.seed, shuffle=False)
    steps = len(batches)
    state_path = folder / "state.safetensors"
    done = Progress()
    callbacks: list[Callback] = []
    keeper = EpochKeeper(state_path, config, batches, done)
    if state_path.exists():
        tensors, done = load_state(state_path)
        net.load_state_dict({k[4:]: v for k, v in tensors.items() if k.startswith("net.")})
        keeper.progress, batches.epoch = done, done.epoch
        keeper.best = {k[5:]: v for k, v in tensors.items() if k.startswith("best.")}
        callbacks.append(_Restore(tensors))
    left = config.epochs - done.epoch
    if left > 0 and done.waited < config.patience:
        module = ForecasterModule(net, config, steps, first_step=done.step)
        device = choose_device(config.device)
        logs = folder / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        callbacks.append(keeper)
        if progress:
            callbacks.append(RichProgressBar(leave=False))
        for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
            logging.getLogger(name).setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"lightning\..*")
            warnings.filterwarnings("ignore", module=r"torch\..*", category=DeprecationWarning)
            warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\).*")
            warnings.filterwarnings("ignore", message=r".*lr_scheduler\.step\(\).*")
            trainer = L.Trainer(
                accelerator="gpu" if device == "cuda" else "cpu",
                devices=1,
                precision="bf16-mixed" if device == "cuda" else "32-true",
                max_epochs=left,
                gradient_clip_val=config.clip,
                logger=[
                    TensorBoardLogger(logs, name="tensorboard", version=f"from_epoch_{done.epoch}"),
                    CSVLogger(logs, name="csv", version=f"from_epoch_{done.epoch}"),
                ],
                log_every_n_steps=10,
                callbacks=callbacks,
                enable_checkpointing=False,
                enable_model_summary=False,
                enable_progress_bar=progress,
                num_sanity_val_steps=2 if done.epoch == 0 else 0,
                reload_dataloaders_every_n_epochs=1,
            )
            trainer.fit(
                module,
                DataLoader(batches, batch_size=None),
                DataLoader(held_out, batch_size=None),
            )
            if trainer.interrupted:
                raise KeyboardInterrupt
    p = keeper.progress
    if keeper.best:
        net.load_state_dict(keeper.best)
    net.eval().to("cpu")
    targets = int(sum(int(s.mask.sum()) for s in learn))
    return {
        "epochs": p.epoch,
        "best_epoch": p.best_epoch,
        "val_pinball": p.history or [],
        "targets_per_epoch": targets,
        "series": len(learn),
    }
