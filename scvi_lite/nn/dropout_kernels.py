"""Which hidden units dropout leaves out, from a few drawn numbers, compiled for the CPU."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from scvi_lite._compiled import compiled
from scvi_lite.distributions.elementary_kernels import F, wide

U32 = np.uint32
# Rates are told apart by so many steps.
STEPS = 1 << 24


def kept_units(n: int, n_hidden: int, rate: float) -> Tensor:
    """0 for the units (n, h) that are left out, 1 / (1 - rate) for others; drawn by the generator of PyTorch.

    >>> kept_units(2, 3, 0.0)
    tensor([[1., 1., 1.],
            [1., 1., 1.]])
    """
    kept_nh = torch.empty(n, n_hidden, dtype=torch.float32)
    seeds = torch.randint(2**32, (2,)).tolist()
    compiled(_fill, at_once=True)(kept_nh.view(-1).numpy(), min(round(rate * STEPS), STEPS - 1), *seeds)
    return kept_nh


def _fill(kept_m, n_out, seed, other_seed):
    """Numbers 0, 1, ... whose bits are mixed, as MurmurHash3 does at its end, until they look drawn."""
    wide()
    factor, limit = F(STEPS / (STEPS - n_out)), U32(n_out)
    for i in range(kept_m.shape[0]):
        u = U32(U32(i) * U32(0x9E3779B9) + U32(seed))
        u = U32(U32((u ^ (u >> U32(16))) * U32(0x85EBCA6B)) + U32(other_seed))
        u = U32((u ^ (u >> U32(13))) * U32(0xC2B2AE35))
        kept_m[i] = F(0) if U32((u ^ (u >> U32(16))) >> U32(8)) < limit else factor
