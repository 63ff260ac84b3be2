"""Three classes from a text of any length: two directions of reading, three ways of pooling, one small head.

Each direction's vectors are pooled by attention (Yang et al. 2016, NAACL, eq. 5-7), maximum and mean (Howard & Ruder
2018, arXiv:1801.06146, §3.3). Pools are kept as running sums, so a long text is read in chunks with the state carried
and gives what reading it at once gives. In training the gradient runs through the last chunks of a direction.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from recur.models.interface import State
from recur.models.text.encoder import Encoder

CHUNK = 256
"""Tokens that are read at once."""
GRADIENT_CHUNKS = 2


class Attention(nn.Module):
    """A score for each token: v · tanh(W y + b)."""

    def __init__(self, width: int, inner: int = 64) -> None:
        super().__init__()
        self.inner = nn.Linear(width, inner)
        self.score = nn.Linear(inner, 1, bias=False)

    def forward(self, y: Tensor) -> Tensor:
        """y (B, T, D) → (B, T)."""
        scores: Tensor = self.score(torch.tanh(self.inner(y)))
        return scores.squeeze(-1)


class Pool:
    """Running attention, maximum and mean over the tokens seen so far, for rows that may end early."""

    def __init__(self, batch: int, width: int, like: Tensor) -> None:
        low = torch.finfo(like.dtype).min
        self.top = like.new_full((batch, width), low)
        self.total = like.new_zeros(batch, width)
        self.count = like.new_zeros(batch, 1)
        self.peak = like.new_full((batch, 1), low)
        self.weighted = like.new_zeros(batch, width)
        self.weight = like.new_zeros(batch, 1)

    def add(self, y: Tensor, scores: Tensor, valid: Tensor) -> None:
        """y (A, T, D), scores and valid (A, T) of the first A rows."""
        rows = y.shape[0]
        low = torch.finfo(y.dtype).min
        mask = valid[..., None]
        self._put("top", torch.maximum(self.top[:rows], y.masked_fill(~mask, low).amax(1)))
        self._put("total", self.total[:rows] + (y * mask).sum(1))
        self._put("count", self.count[:rows] + valid.sum(1, keepdim=True))
        scores = scores.masked_fill(~valid, low)
        peak = torch.maximum(self.peak[:rows], scores.amax(1, keepdim=True)).detach()
        shrink, share = (self.peak[:rows] - peak).exp(), (scores - peak).exp() * valid
        self._put("weighted", self.weighted[:rows] * shrink + (share[..., None] * y).sum(1))
        self._put("weight", self.weight[:rows] * shrink + share.sum(1, keepdim=True))
        self._put("peak", peak)

    def _put(self, name: str, first: Tensor) -> None:
        before: Tensor = getattr(self, name)
        setattr(self, name, first if len(first) == len(before) else torch.cat([first, before[len(first) :]]))

    def result(self) -> Tensor:
        """(B, 3 D): attention, maximum, mean."""
        return torch.cat([self.weighted / self.weight, self.top, self.total / self.count], 1)


def reversed_rows(tokens: Tensor, lengths: Tensor) -> Tensor:
    """Each row of tokens (B, T) from its own end to its begin; what is behind the end stays 0."""
    place = lengths[:, None] - 1 - torch.arange(tokens.shape[1])
    return torch.where(place >= 0, tokens.gather(1, place.clamp(min=0)), 0)


class TextClassifier(nn.Module):
    """``classes`` logits over an :class:`Encoder`."""

    def __init__(self, encoder: Encoder, classes: int = 3, inner: int = 96) -> None:
        super().__init__()
        self.encoder = encoder
        width = encoder.spec.width
        self.attention = nn.ModuleList(Attention(width) for _ in range(2))
        self.inner = nn.Linear(6 * width, inner)
        self.out = nn.Linear(inner, classes)
        self.drop = 0.0

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """tokens (B, T) and lengths (B,), longest row first, none empty → logits (B, classes)."""
        pooled = torch.cat([self._pooled(tokens, lengths, way) for way in (False, True)], 1)
        pooled = nn.functional.dropout(pooled, self.drop, self.training)
        inner = nn.functional.dropout(torch.relu(self.inner(pooled)), self.drop / 2, self.training)
        logits: Tensor = self.out(inner)
        return logits

    def _pooled(self, tokens: Tensor, lengths: Tensor, backward: bool) -> Tensor:
        part = self.encoder.direction(backward)
        if backward:
            tokens = reversed_rows(tokens, lengths)
        pool = Pool(len(tokens), part.d_out, self.inner.weight)
        state: State | None = None
        starts = range(0, int(lengths[0]), CHUNK)
        for nth, at in enumerate(starts):
            rows = int((lengths > at).sum())
            piece, left = tokens[:rows, at : at + CHUNK], (lengths[:rows] - at).clamp(max=CHUNK)
            if state is not None:
                state = {k: v[:rows] for k, v in state.items()}
            with torch.set_grad_enabled(torch.is_grad_enabled() and len(starts) - nth <= GRADIENT_CHUNKS):
                if torch.is_inference_mode_enabled():
                    known, index = torch.unique(piece, return_inverse=True)
                    vectors = self.encoder.embed(known[None], part.rng)[0]
                    y, state = part.read_distinct(vectors, index, left, state)
                else:
                    y, state = part.read(self.encoder.embed(piece, part.rng), left, state)
                y = y.float()
                valid = torch.arange(piece.shape[1]) < left[:, None]
                pool.add(y, self.attention[int(backward)](y), valid)
        return pool.result()
