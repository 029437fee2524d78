"""The formulas of :mod:`scvi_lite.distributions.bernoulli` as one pass over the rows of a minibatch, for the CPU."""

from __future__ import annotations

import math

import numpy as np
import torch
from numba import njit
from torch import Tensor
from torch.nn.functional import logsigmoid

from scvi_lite._compiled import AT_ONCE, compiled, on_threads
from scvi_lite.distributions.elementary_kernels import F, exp, log1p, wide
from scvi_lite.distributions.kernels import BLOCK


@njit(**AT_ONCE)
def zeros_row(i, weight, depth, rest, zero_r, logit_nr, factor_r, closed_r, dlogit_nr, w_r):
    """Log-probability of the zeros of row i and the sum of their odds; fill the derivatives, and add to w."""
    wide()
    value, total = F(0), F(0)
    for j in range(zero_r.shape[0]):
        e = exp(-logit_nr[i, j])
        odds = zero_r[j] * (depth * factor_r[j] / (e + (rest + depth * closed_r[j])))
        value -= log1p(odds)
        total += odds
        if dlogit_nr is not None:
            w_r[j] -= weight * odds
            dlogit_nr[i, j] = -weight * odds * e / (F(1) + e)
    return value, total


def score_rows(
    first, last, start, col_m, logit_nr, depth_n, rest_n, log_depth_n, factor_r, closed_r, log_factor_r, value_n,
    w_n, weight_n, dlogit_nr, w_or,
):  # fmt: skip
    """Fill value and derivatives of the cells first:last; w is added up over blocks of cells."""
    zero_r = np.ones(logit_nr.shape[1], F)
    for i in range(first, last):
        weight, w_r = F(0) if weight_n is None else weight_n[i], w_or[i // BLOCK]
        for m in range(start[i], start[i + 1]):
            zero_r[col_m[m]] = F(0)
        zeros, odds = zeros_row(i, weight, depth_n[i], rest_n[i], zero_r, logit_nr, factor_r, closed_r, dlogit_nr, w_r)
        ones = (start[i + 1] - start[i]) * float(log_depth_n[i])
        for m in range(start[i], start[i + 1]):
            j = col_m[m]
            zero_r[j] = F(1)
            y = logit_nr[i, j]
            q = math.exp(-abs(y))
            ones += log_factor_r[j] + min(y, F(0)) - math.log1p(q)
            if dlogit_nr is not None:
                w_r[j] += weight
                dlogit_nr[i, j] = weight * ((q if y > 0 else 1.0) / (1.0 + q))
        value_n[i], w_n[i] = zeros + ones, (start[i + 1] - start[i]) - odds


def score(
    start: Tensor, col_m: Tensor, logit_nr: Tensor, depth_n: Tensor, factor_r: Tensor, weight_n: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Value (n,), and of the weighted sum of values: its derivative with respect to the logit (n, r), w summed over
    cells (r,) and, without weights, over regions (n,).

    No derivatives without weights.
    """
    n, n_regions = logit_nr.shape
    value_n, w_n = logit_nr.new_empty(n), logit_nr.new_empty(n)
    inputs = [start, col_m, logit_nr]
    for t in (depth_n, factor_r):
        inputs += [torch.sigmoid(t), torch.sigmoid(-t), logsigmoid(t)]
    dlogit_nr = None if weight_n is None else logit_nr.new_empty(n, n_regions)
    w_or = logit_nr.new_zeros(-(-n // BLOCK), n_regions)
    tensors = *inputs, value_n, w_n, weight_n, dlogit_nr, w_or
    arrays = [None if t is None else t.detach().contiguous().numpy() for t in tensors]
    kernel = compiled(score_rows)
    on_threads(lambda first, last: kernel(first * BLOCK, min(last * BLOCK, n), *arrays), len(w_or), n * n_regions)
    return value_n, dlogit_nr, w_or.sum(0), w_n
