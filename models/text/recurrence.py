"""LSTM with dropped recurrent weights and dropout masks that stay the same over time.

Cell (Hochreiter & Schmidhuber 1997; in the form of ``torch.nn.LSTM``)::

    i, f, g, o = W u + b + U h + c
    c' = σ(f) ∘ c + σ(i) ∘ tanh(g)
    h' = σ(o) ∘ tanh(c')

Weight drop sets entries of U to zero for a whole sequence (Merity et al. 2018, arXiv:1708.02182, §2); variational
dropout uses one mask for all steps (Gal & Ghahramani 2016, arXiv:1512.05287, §4). Masks come from a generator of this
module, so that two directions can train in two threads and still repeat exactly.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from recur.models.interface import State, Steps
from recur.models.steps import keep_invalid, restart, scan_steps
from recur.models.text.reading import read_layers

FEW = 10
"""Rows below which torch's own kernel is the faster one."""


def locked_dropout(x: Tensor, p: float, rng: torch.Generator) -> Tensor:
    """x (B, T, D) with the same entries of D set to zero at every step of a sequence, the others scaled up."""
    if p <= 0:
        return x
    mask = torch.empty(x.shape[0], 1, x.shape[2], dtype=x.dtype, device=x.device)
    return x * mask.bernoulli_(1 - p, generator=rng).div_(1 - p)


class Recurrence(nn.Module):
    """Layers of LSTM over one direction; all but the last have ``hidden`` units, the last ``d_out``.

    State: ``h.<layer>`` and ``c.<layer>`` (B, units of the layer).
    """

    def __init__(self, d_in: int, hidden: int, d_out: int, layers: int) -> None:
        super().__init__()
        self.d_in, self.d_out = d_in, d_out
        sizes = [d_in, *[hidden] * (layers - 1), d_out]
        self.cells = nn.ModuleList(nn.LSTM(n, m, batch_first=True) for n, m in pairwise(sizes))
        for cell in self._lstms():
            for name, weight in cell.named_parameters():
                if name.startswith("bias_ih"):
                    nn.init.zeros_(weight)
                    weight.data[cell.hidden_size : 2 * cell.hidden_size] = 1.0  # remember at first
                elif name.startswith("bias_hh"):
                    nn.init.zeros_(weight)
        self.weight_drop = self.dropout = 0.0
        self.half_precision = False
        self.rng = torch.Generator()

    def _lstms(self) -> list[nn.LSTM]:
        return [cell for cell in self.cells if isinstance(cell, nn.LSTM)]

    def init_state(self, batch: int) -> State:
        state = {}
        for k, cell in enumerate(self._lstms()):
            like = cell.weight_hh_l0
            assert isinstance(like, Tensor)
            for part in "hc":
                state[f"{part}.{k}"] = like.new_zeros(batch, cell.hidden_size)
        return state

    def forward(
        self, u: Tensor, state: State | None = None, steps: Steps | None = None
    ) -> tuple[Tensor, State]:
        """u (B, T, d_in) → y (B, T, d_out) and the state after the last step."""
        if steps is not None:
            return scan_steps(self, u, state, steps)
        return self._layers(u, None, state)

    def read(self, u: Tensor, lengths: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """As ``forward`` on a packed batch: ``lengths`` (B,) on the processor, longest first, none zero.

        y is zero after the end of a row; the state of a row that ends before the others means nothing. In half
        precision the batch stays padded, which is exact, since no direction looks ahead, and twice as fast there.
        """
        return self._layers(u, lengths, state)

    def read_distinct(
        self, distinct: Tensor, index: Tensor, lengths: Tensor, state: State | None = None
    ) -> tuple[Tensor, State]:
        """As ``read`` of ``distinct[index]``, (U, d_in) and (B, T), without gradients and dropout, and faster."""
        state = self.init_state(len(index)) if state is None else state
        if self.half_precision or len(index) < FEW:
            return self._layers(distinct[index], lengths, state)
        return read_layers(self._lstms(), distinct, index, lengths, state)

    def _layers(self, u: Tensor, lengths: Tensor | None, state: State | None) -> tuple[Tensor, State]:
        state = self.init_state(u.shape[0]) if state is None else state
        ends = None if lengths is None else torch.arange(u.shape[1]) < lengths[:, None]
        if self.half_precision:
            lengths = None
        after: State = {}
        for k, cell in enumerate(self._lstms()):
            if k and self.training:
                u = locked_dropout(u, self.dropout, self.rng)
            if self.half_precision:
                u = u.bfloat16()
            packed: Tensor | PackedSequence = (
                u if lengths is None else pack_padded_sequence(u, lengths, batch_first=True)
            )
            hc = (state[f"h.{k}"][None].to(u.dtype), state[f"c.{k}"][None].to(u.dtype))
            y, (h, c) = functional_call(cell, self._dropped(cell), (packed, hc))
            u = y if lengths is None else pad_packed_sequence(y, batch_first=True, total_length=u.shape[1])[0]
            after |= {f"h.{k}": h[0], f"c.{k}": c[0]}
        return (u if ends is None else u * ends[..., None]), after

    def _dropped(self, cell: nn.LSTM) -> dict[str, Tensor]:
        weight = cell.weight_hh_l0
        assert isinstance(weight, Tensor)
        parts: dict[str, Tensor] = dict(cell.named_parameters())
        if self.training and self.weight_drop > 0:
            kept = torch.empty_like(weight).bernoulli_(1 - self.weight_drop, generator=self.rng)
            parts["weight_hh_l0"] = weight * kept.div_(1 - self.weight_drop)
        return {name: part.bfloat16() for name, part in parts.items()} if self.half_precision else parts

    def step(self, u_t: Tensor, state: State, steps: Steps | None = None) -> tuple[Tensor, State]:
        """One token by the equations above, without ``nn.LSTM`` and without dropout: u_t (B, d_in) → (B, d_out)."""
        state = restart(steps, state, self.init_state(u_t.shape[0]))
        after: State = {}
        x = u_t
        for k, cell in enumerate(self._lstms()):
            weight = dict(cell.named_parameters())
            gates = nn.functional.linear(x, weight["weight_ih_l0"], weight["bias_ih_l0"])
            gates = gates + nn.functional.linear(
                state[f"h.{k}"], weight["weight_hh_l0"], weight["bias_hh_l0"]
            )
            i, f, g, o = gates.chunk(4, dim=-1)
            c = torch.sigmoid(f) * state[f"c.{k}"] + torch.sigmoid(i) * torch.tanh(g)
            x = torch.sigmoid(o) * torch.tanh(c)
            after |= {f"h.{k}": x, f"c.{k}": c}
        return keep_invalid(steps, x, after, state)
