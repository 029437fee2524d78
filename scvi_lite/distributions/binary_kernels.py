"""The formulas of :mod:`scvi_lite.distributions.bernoulli` as one pass over the rows of a minibatch, for the CPU."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor
from torch.nn.functional import logsigmoid

from scvi_lite._compiled import compiled, on_threads
from scvi_lite.distributions.kernels import ANY_ORDER, F, exp, log1p


@njit(fastmath=ANY_ORDER, error_model="numpy")
def zeros_row(i, o, weight, depth, rest, zero_r, logit_nr, factor_r, closed_r, dlogit_nr, w_nr):
    """Log-probability of the zeros of row i and the sum of their odds; the derivatives go into row o."""
    value, total = F(0), F(0)
    for j in range(zero_r.shape[0]):
        e = exp(-logit_nr[i, j])
        odds = zero_r[j] * (depth * factor_r[j] / (e + (rest + depth * closed_r[j])))
        value -= log1p(odds)
        total += odds
        w_nr[o, j] = -weight * odds
        dlogit_nr[o, j] = -weight * odds * e / (F(1) + e)
    return value, total


def score_rows(
    first, last, start, col_m, logit_nr, depth_n, rest_n, log_depth_n, factor_r, closed_r, log_factor_r, value_n,
    w_n, weight, dlogit_nr, w_nr,
):  # fmt: skip
    """Fill value and derivatives of the cells first:last."""
    zero_r = np.ones(logit_nr.shape[1], F)
    for i in range(first, last):
        o = i % dlogit_nr.shape[0]
        for m in range(start[i], start[i + 1]):
            zero_r[col_m[m]] = F(0)
        zeros, odds = zeros_row(
            i, o, weight, depth_n[i], rest_n[i], zero_r, logit_nr, factor_r, closed_r, dlogit_nr, w_nr
        )
        ones = (start[i + 1] - start[i]) * float(log_depth_n[i])
        for m in range(start[i], start[i + 1]):
            j = col_m[m]
            zero_r[j] = F(1)
            y = logit_nr[i, j]
            q = math.exp(-abs(y))
            ones += log_factor_r[j] + min(y, F(0)) - math.log1p(q)
            w_nr[o, j] = weight
            dlogit_nr[o, j] = weight * ((q if y > 0 else 1.0) / (1.0 + q))
        value_n[i], w_n[i] = zeros + ones, (start[i + 1] - start[i]) - odds


def score(
    start: Tensor, col_m: Tensor, logit_nr: Tensor, depth_n: Tensor, factor_r: Tensor, weight: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Value (n,), its derivative with respect to the logit (n, r), w (n, r), both times ``weight``, and sums of w (n,).

    No derivatives without a weight.
    """
    n, n_regions = logit_nr.shape
    value_n, w_n = logit_nr.new_empty(n), logit_nr.new_empty(n)
    tensors = [start, col_m, logit_nr]
    for t in (depth_n, factor_r):
        tensors += [torch.sigmoid(t), torch.sigmoid(-t), logsigmoid(t)]
    inputs: list[Any] = [t.detach().contiguous().numpy() for t in [*tensors, value_n, w_n]] + [F(weight or 0)]
    full = [logit_nr.new_empty(0 if weight is None else n, n_regions) for _ in range(2)]

    kernel = compiled(score_rows)

    def share(first: int, last: int) -> None:  # without gradients, each thread has one row to write to
        outputs = [logit_nr.new_empty(1, n_regions)] * 2 if weight is None else full
        kernel(first, last, *inputs, *(t.numpy() for t in outputs))

    on_threads(share, n, n * n_regions)
    return value_n, full[0], full[1], w_n
