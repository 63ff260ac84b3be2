"""Training: whole contiguous stretches with a target at every step, by Lightning, resumable after a kill.

Windows of ``train.window`` bars are what gradients flow through (truncated BPTT, Williams & Peng 1990); whether a
window begins from nothing or from the state that the one before it left is ``train.state`` (see
:mod:`recur.pipeline.samples`). After every epoch weights, optimiser, and history are written as safetensors and JSON
in one atomic step; a killed run continues from there and ends as an undisturbed one would, since the randomness of
an epoch depends on (seed, epoch) alone and no state is carried from one epoch into the next.
"""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, RichProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from recur.models.allocator import keep_freed_memory
from recur.models.forecaster import Forecaster, Outputs, forecast_loss, pinball_loss
from recur.models.interface import State
from recur.pipeline.config import TrainConfig
from recur.pipeline.dataset import SeriesArrays, Split
from recur.pipeline.samples import Batch, Streams, Windows, make_samples
from recur.vocabulary import DataMissing, RecurError, UsageError

_UNDECAYED_NAMES = ("bias", "A_log", "dt_bias", "D")


def decay_groups(net: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(decayed, plain): weight decay is for matrices that mix; pulling anything else to zero has no sense.

    Plain are biases, embeddings, the gains of norms and whatever else has one dimension, what a state-space model
    calls ``A_log``, ``dt_bias`` and ``D``, and every parameter with a true ``_no_weight_decay``.
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for module in net.modules():
        whole = isinstance(module, nn.Embedding | nn.LayerNorm | nn.RMSNorm)
        for name, p in module.named_parameters(recurse=False):
            free = whole or p.ndim < 2 or getattr(p, "_no_weight_decay", False)
            free = free or any(name == n or name.startswith((f"{n}_", "bias")) for n in _UNDECAYED_NAMES)
            (plain if free else decayed).append(p)
    return decayed, plain


class ForecasterModule(L.LightningModule):
    """Loss, optimiser and schedule around a :class:`Forecaster`."""

    def __init__(
        self,
        net: Forecaster,
        config: TrainConfig,
        steps_per_epoch: int,
        first_step: int = 0,
        compiled: bool = False,
    ) -> None:
        super().__init__()
        self.net, self.config, self.first_step = net, config, first_step
        # The function alone: the network itself stays as it is, also for what comes after training.
        self.run: Callable[..., tuple[Outputs, State]] = (
            torch.compile(net.forward) if compiled else net.forward
        )
        self.total_steps = max(1, steps_per_epoch * config.epochs)
        self.val_sums: list[tuple[Tensor, Tensor]] = []
        self.state: State | None = None

    def on_train_epoch_start(self) -> None:
        self.state = None

    def training_step(self, batch: Batch, _: int) -> Tensor:
        steps = self.net.steps(batch.observed, batch.elapsed)
        out, state = self.run(batch.x, batch.symbol, self._begin(batch.fresh), steps)
        if self.config.state == "carried":
            self.state = {k: v.detach() for k, v in state.items()}
        loss = forecast_loss(out, batch.target, batch.mask)
        if not torch.isfinite(loss):
            raise RecurError(
                f"The training loss became {loss.item()} at step {self._step}: stopped before the update.",
                _REMEDY,
            )
        if self.global_step % 10 == 0:
            self.log("train_loss", loss, prog_bar=True)
        return loss

    def _begin(self, fresh: Tensor) -> State | None:
        """The state before a batch: nothing for ``fresh`` rows, what the last batch left for the others."""
        if self.state is None:
            return None
        start = self.net.init_state(len(fresh))
        return {
            k: torch.where(fresh.view(-1, *(1,) * (v.ndim - 1)), v, self.state[k].to(v.dtype))
            for k, v in start.items()
        }

    @property
    def _step(self) -> int:
        return self.first_step + self.global_step

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Scale all gradients to a norm of at most ``train.clip``; stop when the norm is not a number."""
        norm = nn.utils.clip_grad_norm_(self.net.parameters(), gradient_clip_val or math.inf)
        if not torch.isfinite(norm):
            raise RecurError(
                f"The gradient norm became {norm.item()} at step {self._step}: stopped before the update.",
                _REMEDY,
            )
        if self.global_step % 10 == 0:
            self.log("gradient_norm", norm)

    def validation_step(self, batch: Batch, _: int) -> None:
        steps = self.net.steps(batch.observed, batch.elapsed)
        out, _state = self.net(batch.x, batch.symbol, None, steps)
        weight = batch.mask.sum((0, 1)).float()
        self.val_sums.append((pinball_loss(out, batch.target, batch.mask) * weight, weight))

    def on_validation_epoch_end(self) -> None:
        total = torch.stack([s for s, _ in self.val_sums]).sum(0)
        weight = torch.stack([w for _, w in self.val_sums]).sum(0)
        self.val_sums.clear()
        self.log("val_pinball", (total / weight.clamp(min=1)).mean(), prog_bar=True)

    def configure_optimizers(self) -> Any:
        """AdamW (Loshchilov & Hutter 2019) with a linear warm-up over a twentieth of all steps, then half a cosine
        down to a fiftieth of the peak."""
        decayed, plain = decay_groups(self.net)
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


_REMEDY = "Lower train.lr, or look for broken bars with 'recur status'."


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
    """Tensors and progress of :func:`save_state`. Raises DataMissing for a file that is damaged."""
    try:
        with safe_open(path, framework="pt") as f:
            tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118 (the file object is not a dict)
            return tensors, Progress(**json.loads(f.metadata()["progress"]))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise DataMissing(
            f"{path} cannot be read: {str(error).splitlines()[0].rstrip('.')}.",
            "Remove it to begin that run anew, or start another one without --resume.",
        ) from error


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


def _precision(precision: str, device: str) -> Any:
    """Lightning's word for ``train.precision``: weights stay float32, ``bf16`` is for the products."""
    half = precision == "bf16" or (precision == "auto" and device == "cuda")
    return "bf16-mixed" if half else "32-true"


@contextmanager
def _deterministic(asked: bool) -> Iterator[None]:
    """Put torch's global switch, which Lightning turns on when ``asked``, back to where it was."""
    before = torch.are_deterministic_algorithms_enabled()
    try:
        yield
    finally:
        if asked:
            torch.use_deterministic_algorithms(before)


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what Lightning says about itself."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"lightning\..*")
        warnings.filterwarnings("ignore", module=r"torch\..*", category=DeprecationWarning)
        warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\).*")
        warnings.filterwarnings("ignore", message=r".*lr_scheduler\.step\(\).*")
        yield


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
    way = Streams if config.state == "carried" else Windows
    batches = way(learn, config.window, config.burn_in, config.batch, config.seed, shuffle=True)
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
        device = choose_device(config.device)
        keep_freed_memory()
        compiled = config.compile and device == "cuda"
        module = ForecasterModule(net, config, steps, first_step=done.step, compiled=compiled)
        logs = folder / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        callbacks.append(keeper)
        if progress:
            callbacks.append(RichProgressBar(leave=False))
        net.chunk = config.checkpoint
        with _quiet(), _deterministic(config.deterministic):
            trainer = L.Trainer(
                accelerator="gpu" if device == "cuda" else "cpu",
                devices=1,
                precision=_precision(config.precision, device),
                max_epochs=left,
                gradient_clip_val=config.clip,
                deterministic=config.deterministic,
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
            on_interrupt = signal.getsignal(signal.SIGINT)
            try:
                trainer.fit(
                    module,
                    DataLoader(batches, batch_size=None),
                    DataLoader(held_out, batch_size=None),
                )
            except SystemExit:  # what Lightning makes of Ctrl-C, and it ignores the signal from then on
                if not trainer.interrupted:
                    raise
                signal.signal(signal.SIGINT, on_interrupt)
                raise KeyboardInterrupt from None
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
        "n_series": len(learn),
    }
