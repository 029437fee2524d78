"""The non-zeros of a minibatch in the order of their features, compiled for the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from scvi_lite._compiled import compiled
from scvi_lite.distributions.kernels import U


def by_feature(start: Tensor, col_m: Tensor, value_m: Tensor, n_features: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where each feature begins (g + 1), and cell and value of each non-zero, sorted by feature: a counting sort.

    >>> by_feature(torch.tensor([0, 2, 3]), torch.tensor([0, 2, 0]), torch.tensor([5.0, 6.0, 7.0]), 3)
    (tensor([0, 2, 2, 3]), tensor([0, 1, 0]), tensor([5., 7., 6.]))
    """
    sorted_ = start.new_zeros(n_features + 1), torch.empty_like(col_m), torch.empty_like(value_m)
    compiled(_by_feature)(*(t.numpy() for t in (start, col_m, value_m, *sorted_)))
    return sorted_


def _by_feature(start, col_m, value_m, start_g, row_to, value_to):
    for m in range(col_m.shape[0]):
        start_g[U(col_m[m] + 1)] += 1
    for j in range(1, start_g.shape[0]):
        start_g[j] += start_g[j - 1]
    for i in range(start.shape[0] - 1):
        for m in range(start[i], start[i + 1]):
            column = U(col_m[m])
            to = U(start_g[column])
            row_to[to], value_to[to] = i, value_m[m]
            start_g[column] += 1
    for j in range(start_g.shape[0] - 1, 0, -1):  # each points behind its feature by now: to the next one's beginning
        start_g[j] = start_g[j - 1]
    start_g[0] = 0
