"""The score of :class:`scvi_lite.nn.protein.ProteinRates` and its gradients in one pass, compiled for the CPU.

Let v1 and v2 be the log-probabilities of a count as background and as foreground, w the probability that it is
background given that count, and S the sigmoid. The value log(S(pi) exp(v1) + S(-pi) exp(v2)) has derivative w - S(pi)
for pi, and for all else the mean of the derivatives of v1 and v2, of weights w and 1 - w.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from scvi_lite._compiled import compiled, on_threads
from scvi_lite.distributions.counts import LOG_THETA_RANGE
from scvi_lite.distributions.kernels import nb_any

COST_OF_A_COUNT = 16  # beside a step of a loop over floats


class Score(torch.autograd.Function):
    """Log-likelihood and KL of each cell, (n,), from what :class:`~scvi_lite.nn.protein.ProteinRates` holds, (n, p)."""

    @staticmethod
    def forward(ctx: Any, y_np: Tensor, measured_np: Tensor, log_theta: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        n, n_proteins = y_np.shape
        value_2n = y_np.new_empty(2, n)
        d_4np, dkl_4np = (y_np.new_zeros(4, n, n_proteins) for _ in range(2))
        tensors = y_np, measured_np, log_theta.clamp(*LOG_THETA_RANGE).expand(n, -1), *inputs, value_2n, d_4np, dkl_4np
        arrays = [t.detach().contiguous().numpy() for t in tensors]
        kernel = compiled(_score)
        on_threads(lambda first, last: kernel(first, last, *arrays), n, COST_OF_A_COUNT * y_np.numel())
        ctx.save_for_backward(d_4np, dkl_4np)
        ctx.shared_theta = log_theta.dim() == 1
        return value_2n[0], value_2n[1]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, up_n: Tensor, up_kl_n: Tensor) -> tuple[Tensor | None, ...]:
        d_4np, dkl_4np = ctx.saved_tensors
        dback_np, dratio_np, dmixing_np, dtheta_np = d_4np * up_n[:, None]
        dloc_np, dscale_np, dprior_loc_np, dprior_scale_np = dkl_4np * up_kl_n[:, None]
        dtheta = dtheta_np.sum(0) if ctx.shared_theta else dtheta_np
        of_prior = dprior_loc_np, dprior_scale_np
        return None, None, dtheta, dback_np, dback_np, dratio_np, dmixing_np, dloc_np, dscale_np, *of_prior


@njit(error_model="numpy")
def _softplus(x):
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def _score(
    first, last, y, measured, log_theta, log_efficiency, log_back, ratio, mixing, loc, scale, prior_loc, prior_scale,
    value, d, dkl,
):  # fmt: skip
    """Fill in both values of the cells first:last, and their derivatives where a protein was measured."""
    for i in range(first, last):
        log_p, kl = 0.0, 0.0
        for j in range(y.shape[1]):
            if not measured[i, j]:
                continue
            x, theta, pi = np.float64(y[i, j]), np.float64(log_theta[i, j]), np.float64(mixing[i, j])
            log_mu = np.float64(log_back[i, j]) + np.float64(log_efficiency[i, j])
            back, dback, dback_theta = nb_any(x, log_mu, theta)
            fore, dfore, dfore_theta = nb_any(x, log_mu + math.log(ratio[i, j]), theta)
            back, fore = back - _softplus(-pi), fore - _softplus(pi)
            log_p += fore + _softplus(back - fore)
            w = 1 / (1 + math.exp(fore - back))
            d[0, i, j] = w * dback + (1 - w) * dfore
            d[1, i, j] = (1 - w) * dfore / ratio[i, j]
            d[2, i, j] = w - 1 / (1 + math.exp(-pi))
            d[3, i, j] = w * dback_theta + (1 - w) * dfore_theta
            rate, s = 1 / np.float64(prior_scale[i, j]), np.float64(scale[i, j])
            gap = (np.float64(loc[i, j]) - prior_loc[i, j]) * rate
            square = (s * rate) ** 2 + gap * gap
            kl += (square - 1) / 2 - math.log(s * rate)
            dkl[0, i, j], dkl[1, i, j] = gap * rate, s * rate * rate - 1 / s
            dkl[2, i, j], dkl[3, i, j] = -gap * rate, (1 - square) * rate
        value[0, i], value[1, i] = log_p, kl
