"""Where training starts: how far back the units of a layer look before they have learnt anything."""

from __future__ import annotations

import math

import torch
from torch import Tensor

LONGEST = 500
"""Memory in bars of the slowest unit at the start of training."""


def memory_bias(n: int) -> Tensor:
    """(n,) biases b of a forget gate such that σ(b) = 1 − 1/τ, log τ uniform between a few bars and 500.

    The smallest bias is 1 (Jozefowicz et al. 2015); that the biases of a layer should spread over the time scales
    wanted is Tallec & Ollivier 2018 (arXiv:1804.11188). With 1 for all, σ(1)^200 = 10⁻²⁷ of a gradient is left
    after 200 bars.
    """
    tau = torch.empty(n).uniform_(math.log(1 + math.e), math.log(LONGEST)).exp()
    return torch.log(tau - 1)
