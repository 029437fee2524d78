"""Copies of the rows of a sparse matrix in one pass, compiled for the CPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numba
import torch
from torch import Tensor


@cache
def compiled(function: Callable[..., None]) -> Any:
    """A function compiled by Numba when it is first called; the result is kept on disk where that can be written."""
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:  # nowhere to keep the result
        return numba.njit(nogil=True)(function)


def copy_rows(first_n: Tensor, start: Tensor, col: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Row, column and number of each non-zero of some rows.

    Parameters
    ----------
    first_n
        (n,): where each row begins in ``col`` and ``value``.
    start
        (n + 1,): where each row begins in the answer.
    col, value
        Columns and numbers of a matrix, of any type.

    Returns
    -------
    int64, int64 and float32, each (m,).

    >>> copy_rows(torch.tensor([2]), torch.tensor([0, 1]), torch.tensor([0, 1, 2]), torch.tensor([5, 6, 7]))
    (tensor([0]), tensor([2]), tensor([7.]))
    """
    m = int(start[-1])
    row_m, col_m = torch.empty(m, dtype=torch.int64), torch.empty(m, dtype=torch.int64)
    value_m = torch.empty(m, dtype=torch.float32)
    tensors = (first_n, start, col, value, row_m, col_m, value_m)
    compiled(_copy_rows)(*(t.numpy() for t in tensors))
    return row_m, col_m, value_m


def _copy_rows(first_n, start, col, value, row_m, col_m, value_m):
    for i in range(len(first_n)):
        shift = first_n[i] - start[i]
        for m in range(start[i], start[i + 1]):
            row_m[m], col_m[m], value_m[m] = i, col[shift + m], value[shift + m]


def fill_rows(start: Tensor, col_m: Tensor, value_m: Tensor, n_features: int) -> Tensor:
    """A dense matrix (n, g) of the non-zeros of n rows.

    >>> fill_rows(torch.tensor([0, 1]), torch.tensor([1]), torch.tensor([3.0]), 2)
    tensor([[0., 3.]])
    """
    x_ng = value_m.new_empty(start.shape[0] - 1, n_features)
    compiled(_fill_rows)(*(t.numpy() for t in (start, col_m, value_m, x_ng)))
    return x_ng


def _fill_rows(start, col_m, value_m, x_ng):
    for i in range(x_ng.shape[0]):
        x_ng[i] = 0
        for m in range(start[i], start[i + 1]):
            x_ng[i, col_m[m]] = value_m[m]
