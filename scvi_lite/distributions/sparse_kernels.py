"""The non-zeros of a minibatch in the order of their features, compiled for the CPU."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from scvi_lite._compiled import compiled, on_threads
from scvi_lite.distributions.elementary_kernels import U


def by_feature(start: Tensor, col_m: Tensor, value_m: Tensor, n_features: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where each feature begins (g + 1), and cell and value of each non-zero, sorted by feature: a counting sort.

    >>> by_feature(torch.tensor([0, 2, 3]), torch.tensor([0, 2, 0]), torch.tensor([5.0, 6.0, 7.0]), 3)
    (tensor([0, 2, 2, 3]), tensor([0, 1, 0]), tensor([5., 7., 6.]))
    """
    start_g, row_to, value_to = start.new_zeros(n_features + 1), torch.empty_like(col_m), torch.empty_like(value_m)
    inputs, work = [start.numpy(), col_m.numpy()], len(col_m) // 2  # each thread looks at all
    counter, placer, count_g = compiled(_count), compiled(_place), start_g[1:].numpy()
    on_threads(lambda first, last: counter(first, last, *inputs, count_g), n_features, work)
    torch.cumsum(start_g, 0, out=start_g)
    arrays = [t.numpy() for t in (value_m, start_g[:-1].clone(), row_to, value_to)]
    on_threads(lambda first, last: placer(first, last, *inputs, *arrays), n_features, work)
    return start_g, row_to, value_to


def _count(first, last, start, col, count_g):
    for i in range(start.shape[0] - 1):
        k = start[i] + np.searchsorted(col[start[i] : start[i + 1]], first)
        while k < start[i + 1] and col[U(k)] < last:
            count_g[U(col[U(k)])] += 1
            k += 1


def _place(first, last, start, col, value, next_g, row_to, value_to):
    for i in range(start.shape[0] - 1):
        k = start[i] + np.searchsorted(col[start[i] : start[i + 1]], first)
        while k < start[i + 1] and col[U(k)] < last:
            column = U(col[U(k)])
            to = U(next_g[column])
            row_to[to], value_to[to] = i, value[U(k)]
            next_g[column] += 1
            k += 1
