"""A residual stack of blocks with one mixer each, from a short string, and the models that are such stacks.

The notation is that of Nemotron-H (NVIDIA 2025, arXiv:2504.03624): ``M`` a Mamba-2 layer, ``-`` a feed-forward layer,
``*`` an attention layer, to which ``S`` adds the selective scan of the first Mamba::

    x ← W u + b;     x ← x + dropout(mixer(RMSNorm(x))) per block;     y = RMSNorm(x)

The feed-forward layer is W_down relu(W_up x)² without gate and biases, four times as wide as the stack. Output
projections begin smaller by 1/√(number of blocks), so that the sum over blocks keeps its size.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from recur.models.attention import AttentionMixer
from recur.models.interface import State, Steps
from recur.models.mamba import MambaMixer
from recur.models.mamba2 import Mamba2Mixer
from recur.models.norm import RMSNorm
from recur.models.packing import pack
from recur.models.steps import keep_invalid, nothing, readable, restart
from recur.vocabulary import UsageError


class FeedForward(nn.Module):
    """u (…, d) → W_down relu(W_up u)² (…, d); no state."""

    def __init__(self, d_model: int, expand: int = 4) -> None:
        super().__init__()
        self.up = nn.Linear(d_model, expand * d_model, bias=False)
        self.out_proj = nn.Linear(expand * d_model, d_model, bias=False)

    def init_state(self, batch: int) -> State:
        return {}

    def forward(
        self, u: Tensor, state: State, lengths: Tensor | None = None, segment: Tensor | None = None
    ) -> tuple[Tensor, State]:
        return self.out_proj(F.relu(self.up(u)).square()), {}

    def step(self, u_t: Tensor, state: State, inplace: bool = False) -> tuple[Tensor, State]:
        return self(u_t, state)  # type: ignore[no-any-return]


HEADS = 8
"""Least number of heads of a Mamba-2 layer. A head forgets at one rate: with the published 64 channels per head a layer of
width 32 would have a single one, whose rate is drawn by chance (docs/memory.md)."""


def _mamba2(d_model: int) -> Mamba2Mixer:
    return Mamba2Mixer(d_model, head=max(1, min(64, 2 * d_model // HEADS)), expand=2)


Mixer = Mamba2Mixer | MambaMixer | AttentionMixer | FeedForward
MIXERS: dict[str, Callable[[int], Mixer]] = {
    "M": _mamba2, "S": MambaMixer, "*": AttentionMixer, "-": FeedForward,
}  # fmt: skip


def nemotron_pattern(n_layers: int) -> str:
    """The hybrid's layers: about 8 % attention, each between a Mamba-2 and a feed-forward layer, evenly spread.

    Built of ``M-`` and ``M*-``, the first attention layer at 7 and the next ones 11 or more further where the depth
    allows, as in the published 8B and 56B models; a depth that these do not fill gets one ``M`` more in front. Fewer
    than three layers have no place for attention.
    """
    if n_layers < 1:
        raise UsageError(f"A hybrid needs at least 1 layer, not {n_layers}.")
    n_attention = max(1, round(0.08 * n_layers)) if n_layers >= 3 else 0
    pairs, odd = divmod(n_layers - 3 * n_attention, 2)
    units = pairs + n_attention
    first = min(3, units // 2)
    gap = max(5.0, (units - 3) / max(n_attention, 1))
    if n_attention > 1:
        gap = min(gap, (units - 1 - first) / (n_attention - 1))
    with_attention = {first + int(k * gap) for k in range(n_attention)}
    return "M" * odd + "".join("M*-" if i in with_attention else "M-" for i in range(units))


def checked_pattern(pattern: str) -> str:
    """``pattern`` itself; UsageError where it is empty or holds other letters than :data:`MIXERS`."""
    if not pattern or set(pattern) - MIXERS.keys():
        raise UsageError(f"A layer pattern consists of {' '.join(MIXERS)}, found '{pattern}'.")
    return pattern


class Stack(nn.Module):
    """A sequence model (B, T, d_in) → (B, T, d_out) with blocks of width d_out after ``pattern``.

    State: the states of the mixers, named ``<block>.<name>``.
    """

    def __init__(self, d_in: int, d_out: int, pattern: str, dropout: float = 0.0) -> None:
        super().__init__()
        self.d_in, self.d_out, self.pattern = d_in, d_out, checked_pattern(pattern)
        self.in_proj = nn.Linear(d_in, d_out)
        self.norms = nn.ModuleList([RMSNorm(d_out) for _ in pattern])
        self.mixers = nn.ModuleList([MIXERS[letter](d_out) for letter in pattern])
        self.norm = RMSNorm(d_out)
        self.dropout = nn.Dropout(dropout)
        for mixer in self._mixers():
            mixer.out_proj.weight.data.mul_(len(pattern) ** -0.5)

    def _mixers(self) -> list[Mixer]:
        return [m for m in self.mixers if isinstance(m, Mixer)]

    def init_state(self, batch: int) -> State:
        return {
            f"{i}.{name}": part
            for i, mixer in enumerate(self._mixers())
            for name, part in mixer.init_state(batch).items()
        }

    def _of(self, i: int, state: State) -> State:
        return {k.partition(".")[2]: v for k, v in state.items() if k.partition(".")[0] == str(i)}

    def forward(
        self, u: Tensor, state: State | None = None, steps: Steps | None = None
    ) -> tuple[Tensor, State]:
        if not u.shape[1]:
            return nothing(self, u, state)
        state = self.init_state(u.shape[0]) if state is None else state
        packed, out = pack(steps), State()
        if steps is not None and steps.reset is not None and not bool(steps.reset[:, 1:].any()):
            state = restart(steps.at(0), state, self.init_state(u.shape[0]))
            packed = pack(Steps(valid=steps.valid))
        x = self.in_proj(packed.gather(u))
        for i, (norm, mixer) in enumerate(zip(self.norms, self._mixers(), strict=True)):
            y, part = mixer(norm(x), self._of(i, state), packed.lengths, packed.segment)
            x = x + self.dropout(y)
            out |= {f"{i}.{name}": v for name, v in part.items()}
        return packed.scatter(self.norm(x)), out

    def step(
        self, u_t: Tensor, state: State, steps: Steps | None = None, inplace: bool = False
    ) -> tuple[Tensor, State]:
        """``inplace`` lets the next state take the memory of ``state``, which is then not to be used again: half the
        memory traffic for many series. Only without gradients, and where no step is marked as missing."""
        inplace = inplace and (steps is None or steps.valid is None)
        before = restart(steps, state, self.init_state(u_t.shape[0])) if steps is not None else state
        x, out = self.in_proj(readable(steps, u_t)), State()
        for i, (norm, mixer) in enumerate(zip(self.norms, self._mixers(), strict=True)):
            y, part = mixer.step(norm(x), self._of(i, before), inplace)
            x = x + self.dropout(y)
            out |= {f"{i}.{name}": v for name, v in part.items()}
        return keep_invalid(steps, self.norm(x), out, before)


class Mamba(Stack):
    """``layers`` selective-scan layers (:mod:`recur.models.mamba`)."""

    def __init__(self, d_in: int, d_out: int, layers: int = 1, dropout: float = 0.0) -> None:
        super().__init__(d_in, d_out, "S" * layers, dropout)


class Mamba2(Stack):
    """``layers`` Mamba-2 layers (:mod:`recur.models.mamba2`)."""

    def __init__(self, d_in: int, d_out: int, layers: int = 1, dropout: float = 0.0) -> None:
        super().__init__(d_in, d_out, "M" * layers, dropout)


class Attention(Stack):
    """``layers`` attention layers (:mod:`recur.models.attention`)."""

    def __init__(self, d_in: int, d_out: int, layers: int = 1, dropout: float = 0.0) -> None:
        super().__init__(d_in, d_out, "*" * layers, dropout)


class Hybrid(Stack):
    """``layers`` blocks of Mamba-2, feed-forward and about 8 % attention, after :func:`nemotron_pattern`."""

    usual_layers = 13
    """``M-M-M-M*-M-M-``: the fewest that have the published share of attention, one in thirteen."""

    def __init__(self, d_in: int, d_out: int, layers: int = 1, dropout: float = 0.0) -> None:
        super().__init__(d_in, d_out, nemotron_pattern(layers), dropout)
