"""From one form of the GRU to the other, exactly, or not at all.

The update gates mean the opposite of each other, which is only a matter of sign: σ(−x) = 1 − σ(x). The reset gate is
what differs: r ∘ (U_n h + c_n) against U_n (r ∘ h). In unit i the two are

    r_i Σ_j U_ij h_j + r_i c_i      and      Σ_j U_ij r_j h_j

and they are equal for every input and state exactly when

1. r_i = r_j wherever U_ij ≠ 0: units that are joined by U_n share their reset gate (equal rows of W_r, U_r and of the
   biases). A diagonal U_n always does.
2. c_i = 0, or r_i is a constant (rows of W_r and U_r that are zero): then r_i c_i is part of the bias b_n.

Other weights have no counterpart in the other form, and are refused.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from recur.models.gru import GRU, StandardGRU, StandardGRULayer
from recur.vocabulary import UsageError


def as_standard(gru: GRU) -> StandardGRU:
    """The same function in the paper's form; UsageError where there is none."""
    out = StandardGRU(gru.d_in, gru.d_out, gru.layers, gru.rnn.dropout).to(gru.weights(0)[0])
    for layer, cell in enumerate(out.cells):
        assert isinstance(cell, StandardGRULayer)
        w, u, b, c = (x.detach() for x in gru.weights(layer))
        both = b + c
        _check_shared_reset(w, u, both, layer)
        fixed = (w[: gru.d_out] == 0).all(1) & (u[: gru.d_out] == 0).all(1)
        r, c_n = torch.sigmoid(both[: gru.d_out]), c[2 * gru.d_out :]
        moving = int(((c_n != 0) & ~fixed).sum())
        if moving:
            raise UsageError(
                f"Layer {layer} has no form with the reset before the product: {moving} units have a bias c_n behind"
                " a reset gate that moves.",
                "Set those biases to 0.",
            )
        bias = torch.cat([both[: 2 * gru.d_out], b[2 * gru.d_out :] + r * c_n])
        with torch.no_grad():
            for theirs, ours in ((cell.w, w), (cell.u, u), (cell.bias, bias)):
                theirs.copy_(_other_update(ours))
    return out


def as_cudnn(standard: StandardGRU) -> GRU:
    """The same function in the form of cuDNN and ``torch.nn.GRU``; UsageError where there is none."""
    out = GRU(standard.d_in, standard.d_out, standard.layers, standard.drop.p)
    for layer, cell in enumerate(standard.cells):
        assert isinstance(cell, StandardGRULayer)
        _check_shared_reset(cell.w.detach(), cell.u.detach(), cell.bias.detach(), layer)
        out.to(cell.w)
        with torch.no_grad():
            w, u, b, c = out.weights(layer)
            for ours, theirs in ((w, cell.w), (u, cell.u), (b, cell.bias)):
                ours.copy_(_other_update(theirs))
            nn.init.zeros_(c)
    return out


def _other_update(x: Tensor) -> Tensor:
    """Rows of r, z, n with the sign of z turned."""
    r, z, n = x.chunk(3)
    return torch.cat([r, -z, n])


def _check_shared_reset(w: Tensor, u: Tensor, bias: Tensor, layer: int) -> None:
    d = u.shape[1]
    rows = torch.cat([w[:d], u[:d], bias[:d, None]], dim=1)  # what makes a reset gate
    same = (rows[:, None] == rows[None]).all(-1)
    apart = int(((u[2 * d :] != 0) & ~same).sum())
    if apart:
        raise UsageError(
            f"Layer {layer} has no other form: U_n joins {apart} pairs of units with different reset gates.",
            "The forms agree only where joined units share their reset gate, as with a diagonal U_n.",
        )
