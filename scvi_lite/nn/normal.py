"""Independent normal distributions in closed form, for the training step."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def draw_normal(loc: Tensor, scale: Tensor, n_samples: int | None = None) -> Tensor:
    """A reparametrised draw; a leading dimension of samples if their number is given."""
    shape = loc.shape if n_samples is None else (n_samples, *loc.shape)
    return loc + scale * torch.randn(shape, device=loc.device, dtype=loc.dtype)


def log_normal(x: Tensor, loc: Tensor | float, scale: Tensor | float) -> Tensor:
    """Log-density of N(loc, scale²) at ``x``, elementwise.

    >>> log_normal(torch.zeros(1), torch.zeros(1), torch.ones(1))
    tensor([-0.9189])
    """
    scale = scale if isinstance(scale, Tensor) else x.new_full((), scale)  # a number copied to a GPU would wait for it
    return -0.5 * ((x - loc) / scale) ** 2 - scale.log() - 0.5 * math.log(2 * math.pi)


def kl_normal(loc: Tensor, scale: Tensor, prior_loc: Tensor | float = 0.0, prior_var: Tensor | float = 1.0) -> Tensor:
    """KL(N(loc, scale²) ‖ N(prior_loc, prior_var)), elementwise.

    >>> kl_normal(torch.zeros(1), torch.ones(1))
    tensor([0.])
    """
    variance = scale * scale
    if isinstance(prior_loc, float) and isinstance(prior_var, float) and (prior_loc, prior_var) == (0.0, 1.0):
        return 0.5 * (variance + loc * loc - 1) - scale.log()
    prior_var = prior_var if isinstance(prior_var, Tensor) else loc.new_full((), prior_var)
    return 0.5 * ((variance + (loc - prior_loc) ** 2) / prior_var - 1 - variance.log() + prior_var.log())
