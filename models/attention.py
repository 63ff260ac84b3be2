"""Causal attention with grouped queries and a ring of keys and values: the comparison to the recurrences.

    y_t = W_o Σ_{t−W < s ≤ t} softmax_s(q_t·k_s / √d_head) v_s        (Vaswani et al. 2017, arXiv:1706.03762, eq. 1)

with several query heads per key-value head (Ainslie et al. 2023, arXiv:2305.13245), over the last W steps. There is
no position embedding: in the hybrid the recurrent layers carry the order, as in Nemotron-H (arXiv:2504.03624).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recur.models.interface import State
from recur.models.mamba2 import largest_divisor

CONTEXT = 512
"""Steps that a layer looks back, the current one included."""


class AttentionMixer(nn.Module):
    """u (B, T, d_model) → (B, T, d_model).

    State: ``k`` and ``v`` (B, W, H_kv, d_head), rings in which step n of a sequence has slot n mod W, and ``n`` (B,),
    the number of steps so far. Time and memory per step depend on the context W, not on the history.
    """

    def __init__(
        self, d_model: int, context: int = CONTEXT, head: int = 32, queries_per_key: int = 4
    ) -> None:
        super().__init__()
        self.context, self.head = context, largest_divisor(d_model, head)
        self.heads = d_model // self.head
        self.kv_heads = self.heads // largest_divisor(self.heads, queries_per_key)
        self.q_proj = nn.Linear(d_model, d_model, bias=False)
        self.kv_proj = nn.Linear(d_model, 2 * self.kv_heads * self.head, bias=False)
        self.out_proj = nn.Linear(d_model, d_model, bias=False)

    def init_state(self, batch: int) -> State:
        like = self.q_proj.weight
        ring = like.new_zeros(batch, self.context, self.kv_heads, self.head)
        return {"k": ring, "v": ring.clone(), "n": torch.zeros(batch, dtype=torch.long, device=like.device)}

    def _project(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(…, d) → q (…, H, d_head), k and v (…, H_kv, d_head)."""
        k, v = torch.unflatten(self.kv_proj(u), -1, (2, self.kv_heads, self.head)).unbind(-3)
        return torch.unflatten(self.q_proj(u), -1, (self.heads, self.head)), k, v

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """q (B, T, H, ·), k, v (B, S, H_kv, ·), mask (B or 1, T, S) or None for causal → (B, T, d).

        Keys and values are repeated for the heads of their group: the fused kernels of a CPU, and those of a GPU in
        float32, know no groups, and what takes their place keeps T × S scores.
        """
        q, k, v = (t.transpose(1, 2) for t in (q, k.to(q.dtype), v.to(q.dtype)))
        k, v = (t.repeat_interleave(self.heads // self.kv_heads, 1) for t in (k, v))
        seen = None if mask is None else mask.unsqueeze(1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=mask is None)
        out: Tensor = self.out_proj(y.transpose(1, 2).flatten(2))
        return out

    def forward(
        self, u: Tensor, state: State, lengths: Tensor | None = None, segment: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """``lengths`` (B,): real steps before padding on the right; ``segment`` (B, T): counts beginnings."""
        b, length, _ = u.shape
        n, w = state["n"], self.context
        q, k, v = self._project(u)
        k_all, v_all = (torch.cat([state[name].to(t.dtype), t], 1) for name, t in (("k", k), ("v", v)))
        t, slot = torch.arange(length, device=u.device), torch.arange(w, device=u.device)
        if segment is None and length <= w and bool((n == 0).all()):
            y = self._attend(q, k, v, None)
        else:
            at = n.unsqueeze(1) + t  # (B, T): number of the step in its row
            held = n.unsqueeze(1) - 1 - (n.unsqueeze(1) - 1 - slot) % w  # number of the step in each slot
            keys = torch.cat([held, at], 1).unsqueeze(1)
            mask = (keys >= 0) & (keys <= at.unsqueeze(2)) & (keys > at.unsqueeze(2) - w)
            if segment is not None:
                of_key = torch.cat([segment.new_zeros(b, w), segment], 1)
                mask &= of_key.unsqueeze(1) == segment.unsqueeze(2)
            y = self._attend(q, k_all, v_all, mask)
        real = torch.full_like(n, length) if lengths is None else lengths
        begin = torch.zeros_like(n)
        if (
            segment is not None
        ):  # the last sequence of each row: where it begins, and whether it is the carried one
            last = segment[:, -1:]
            begin = torch.where(last[:, 0] > 0, (segment < last).sum(1), begin)
            n = torch.where(last[:, 0] > 0, 0, n)
        total = n + (real - begin).clamp(min=0)
        held = total.unsqueeze(1) - 1 - (total.unsqueeze(1) - 1 - slot) % w
        source = held - n.unsqueeze(1) + begin.unsqueeze(1)
        source = torch.where(held >= n.unsqueeze(1), source + w, slot)
        there = (held >= 0)[..., None, None]

        def ring(t: Tensor) -> Tensor:
            return t.gather(1, source.clamp(min=0)[..., None, None].expand(b, w, *t.shape[2:])) * there

        return y, {"k": ring(k_all), "v": ring(v_all), "n": total}

    def step(self, u_t: Tensor, state: State, inplace: bool = False) -> tuple[Tensor, State]:
        """u_t (B, d_model) → (B, d_model); ``inplace`` as in :meth:`recur.models.residual.Stack.step`."""
        q, k, v = self._project(u_t.unsqueeze(1))
        n, slot = state["n"], torch.arange(self.context, device=u_t.device)
        own = inplace and not torch.is_grad_enabled()
        at = (torch.arange(len(n), device=n.device), n % self.context)
        ring = {
            name: (state[name] if own else state[name].clone()).index_put_(
                at, new[:, 0].to(state[name].dtype)
            )
            for name, new in (("k", k), ("v", v))
        }
        # The query heads of a group see the same keys: they are rows of one product, and nothing is repeated.
        rows = q.view(len(q), self.kv_heads, -1, self.head)
        keys, values = (ring[name].transpose(1, 2).to(q.dtype) for name in ("k", "v"))
        y = F.scaled_dot_product_attention(
            rows, keys, values, attn_mask=(slot <= n.unsqueeze(1))[:, None, None]
        )
        return self.out_proj(y.flatten(1)), {**ring, "n": n + 1}
