"""What a training step sees: windows of bars with a target at every bar, drawn anew for each epoch.

Two ways to run through the bars, both with random offsets that depend on (seed, epoch) alone::

    fresh     every window stands for itself and overlaps the one before it by ``burn_in`` bars, in which the state
              warms up from nothing and no loss is taken; windows come in random order
    carried   each row of the batch walks along its own stretch of a series, window after window without overlap;
              the state at the end of a window is where the next one begins. Only the first ``burn_in`` bars of a
              stretch carry no loss
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import IterableDataset

from recur.pipeline.dataset import SeriesArrays, elapsed_bars, label_mask

SYMBOL_DROP = 0.1
"""Share of windows whose symbol is hidden, so that embedding 0 learns to stand for any other market."""


class Batch(NamedTuple):
    """B windows of W bars. ``fresh``: rows whose state begins anew; the others go on from the batch before."""

    x: Tensor  # (B, W, F)
    symbol: Tensor  # (B,)
    target: Tensor  # (B, W, H) in units of scale
    mask: Tensor  # (B, W, H)
    observed: Tensor  # (B, W)
    elapsed: Tensor  # (B, W)
    fresh: Tensor  # (B,)


@dataclass(frozen=True, slots=True)
class Samples:
    """One series ready for the network.

    ``x`` (T, F), ``target`` (T, H) in units of scale, ``mask`` (T, H), ``observed`` and ``elapsed`` (T,).
    """

    symbol: int
    x: Tensor
    target: Tensor
    mask: Tensor
    observed: Tensor
    elapsed: Tensor

    @property
    def live(self) -> tuple[int, int]:
        """First and last bar with a label."""
        rows = torch.nonzero(self.mask.any(1)).flatten()
        return int(rows[0]), int(rows[-1])


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
                torch.from_numpy(s.observed[first:end].copy()),
                torch.from_numpy(elapsed_bars(s.observed)[first:end]),
            )
        )
    return out


class Window(NamedTuple):
    """Bars ``start`` to ``start + window`` of ``samples[series]``; bars before 0 and after the end are not there.

    ``warm`` bars at its beginning carry no loss. ``hidden``: the symbol is not shown.
    """

    series: int
    start: int
    warm: int
    fresh: bool
    hidden: bool


NOTHING = Window(-1, 0, 0, True, True)
"""Fills rows that have come to their end."""


class Windows(IterableDataset[Batch]):
    """Batches of windows in the fresh way. ``shuffle`` draws offsets and an order for each epoch; else all is fixed."""

    def __init__(
        self, samples: Sequence[Samples], window: int, burn_in: int, batch: int, seed: int, shuffle: bool
    ):
        self.samples, self.window, self.burn_in, self.batch = samples, window, burn_in, batch
        self.seed, self.shuffle, self.epoch = seed, shuffle, 0

    def __len__(self) -> int:
        return len(self._plan())

    def __iter__(self) -> Iterator[Batch]:
        for windows in self._plan():
            yield self._collate(windows)

    def _plan(self) -> list[list[Window]]:
        """The windows of every batch."""
        rng = np.random.default_rng((self.seed, self.epoch))
        pairs = []
        stride = self.window - self.burn_in
        for i, s in enumerate(self.samples):
            offset = -int(rng.integers(0, stride)) if self.shuffle else 0
            first, last = s.live
            for start in range(first + offset - self.burn_in, last + 1 - self.burn_in, stride):
                pairs.append((i, start))
        order: NDArray[np.int64] = np.array(pairs, dtype=np.int64).reshape(-1, 2)
        if self.shuffle:
            rng.shuffle(order)
        out = []
        for at in range(0, len(order), self.batch):
            hidden = [self.shuffle and rng.random() < SYMBOL_DROP for _ in order[at : at + self.batch]]
            out.append(
                [
                    Window(int(i), int(start), self._warm(int(start)), True, hide)
                    for (i, start), hide in zip(order[at : at + self.batch], hidden, strict=True)
                ]
            )
        return out

    def _warm(self, start: int) -> int:
        # Nothing is before the first bar of a series, so a window there has nothing to warm up from.
        return self.burn_in if start > 0 else max(0, self.burn_in + start)

    def _collate(self, windows: Sequence[Window]) -> Batch:
        n, first = len(windows), self.samples[0]
        x = torch.zeros(n, self.window, first.x.shape[1])
        y = torch.zeros(n, self.window, first.target.shape[1])
        mask = torch.zeros(n, self.window, first.target.shape[1], dtype=torch.bool)
        symbol = torch.zeros(n, dtype=torch.long)
        # Padding stands at the end only, where no output is used: it may as well count as observed.
        observed, elapsed = torch.ones(n, self.window, dtype=torch.bool), torch.ones(n, self.window)
        fresh = torch.tensor([w.fresh for w in windows])
        for row, w in enumerate(windows):
            if w.series < 0:
                continue
            s = self.samples[w.series]
            low, high = max(w.start, 0), min(w.start + self.window, len(s.x))
            # A stretch that begins before the series begins sits at the left edge: nothing is padded before it.
            k = max(high - low, 0)
            x[row, :k], y[row, :k], mask[row, :k] = s.x[low:high], s.target[low:high], s.mask[low:high]
            observed[row, :k], elapsed[row, :k] = s.observed[low:high], s.elapsed[low:high]
            mask[row, : w.warm] = False
            symbol[row] = 0 if w.hidden else s.symbol
        return Batch(x, symbol, y, mask, observed, elapsed, fresh)


class Streams(Windows):
    """Batches of windows in the carried way: the batch has the same rows throughout an epoch.

    All series are laid end to end in random order and cut into as many equal parts as the batch has rows; a row
    begins anew where its part begins and where a new series begins in it. Each epoch leaves out a random part of a
    window at the begin of each series, so that the cuts fall elsewhere.
    """

    def _plan(self) -> list[list[Window]]:
        rng = np.random.default_rng((self.seed, self.epoch))
        laid: list[tuple[int, int]] = []
        for i in rng.permutation(len(self.samples)):
            first, last = self.samples[i].live
            # No window but the last of a series may hold padding: the state goes on from its last bar.
            begin = max(0, first - self.burn_in)
            begin += int(rng.integers(0, min(self.window, (last - begin) // 2 + 1)))
            laid += [(int(i), start) for start in range(begin, last + 1, self.window)]
        steps = math.ceil(len(laid) / min(self.batch, len(laid)))
        rows = []
        for at in range(0, len(laid), steps):
            row: list[Window] = []
            for i, start in laid[at : at + steps]:
                new = not row or row[-1].series != i
                warm = self._warm(start) if new else 0
                hidden = bool(rng.random() < SYMBOL_DROP) if new else row[-1].hidden
                row.append(Window(i, start, warm, new, hidden))
            rows.append(row + [NOTHING] * (steps - len(row)))
        return [list(column) for column in zip(*rows, strict=True)]
