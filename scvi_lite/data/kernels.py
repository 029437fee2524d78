"""Copies of the rows of a sparse matrix in one pass, compiled for the CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numba
import numpy as np
import torch
from torch import Tensor

from scvi_lite._compiled import CHEAP, compiled, on_threads
from scvi_lite.distributions.elementary_kernels import U

if TYPE_CHECKING:
    from scvi_lite.data.batch import Counts


def copy_rows(row_n: Tensor, start: Tensor, col: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Some rows of a matrix: where each begins, and column and number of each of their non-zeros.

    Parameters
    ----------
    row_n
        (n,) int64: the rows.
    start, col, value
        Where the rows of the matrix begin, their columns and numbers, of any type.

    Returns
    -------
    int64 (n + 1,), int64 (m,) and float32 (m,).

    >>> copy_rows(torch.tensor([1]), torch.tensor([0, 2, 3]), torch.tensor([0, 1, 2]), torch.tensor([5, 6, 7]))
    (tensor([0, 1]), tensor([2]), tensor([7.]))
    """
    arrays = compiled(_copy_rows)(*(t.numpy() for t in (row_n, start, col, value)))
    start_n, col_m, value_m = map(torch.from_numpy, arrays)
    return start_n, col_m, value_m


def _copy_rows(row_n, start, col, value):
    n = len(row_n)
    start_n = np.zeros(n + 1, np.int64)
    for i in range(n):
        start_n[i + 1] = start_n[i] + start[row_n[i] + 1] - start[row_n[i]]
    m = start_n[n]
    col_m, value_m = np.empty(m, np.int64), np.empty(m, np.float32)
    for i in range(n):
        # Slices, whose indices start at 0: the compiler then copies many numbers at once.
        here, there = slice(start[row_n[i]], start[row_n[i] + 1]), slice(start_n[i], start_n[i + 1])
        _copy_row(col[here], value[here], col_m[there], value_m[there])
    return start_n, col_m, value_m


@numba.njit
def _copy_row(col, value, col_m, value_m):
    for k in range(len(col)):
        col_m[k] = col[k]
    for k in range(len(value)):
        value_m[k] = value[k]


def gather_rows(
    first_n: np.ndarray, start: np.ndarray, col: np.ndarray, value: np.ndarray
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Column and number of each non-zero, and the total of each row (n,); None if columns are not in order or
    a number is 0.

    Parameters
    ----------
    first_n
        (n,): where each row begins in ``col`` and ``value``.
    start
        (n + 1,): where each row begins in the answer.
    col, value
        Columns and numbers of a matrix, of any type.

    >>> gather_rows(np.array([1]), np.array([0, 2]), np.array([4, 0, 2]), np.array([5, 6, 7]))
    (tensor([0, 2]), tensor([6., 7.]), tensor([13.]))
    """
    n, m = len(first_n), int(start[-1])
    col_m, value_m = torch.empty(m, dtype=torch.int64), torch.empty(m, dtype=torch.float32)
    total_n = torch.empty(n, dtype=torch.float32)
    kernel = compiled(_gather_rows)
    arrays = (first_n, start, col, value, *(t.numpy() for t in (col_m, value_m, total_n)))
    wrong = on_threads(lambda first, last: kernel(first, last, *arrays), n, m)
    return None if any(wrong) else (col_m, value_m, total_n)


def _gather_rows(begin, end, first_n, start, col, value, col_m, value_m, total_n):
    wrong = 0
    for i in range(begin, end):
        lo, hi = start[i], start[i + 1]
        here = slice(first_n[i], first_n[i] + hi - lo)
        total_n[i], n_wrong = _gather_row(col[here], value[here], col_m[lo:hi], value_m[lo:hi])
        wrong += n_wrong
    return wrong


@numba.njit(fastmath={"reassoc", "contract", "nsz"})
def _gather_row(col, value, col_m, value_m):
    _copy_row(col, value, col_m, value_m)
    wrong, total = 0, 0.0
    for k in range(len(value)):
        total += value[k]
        wrong += value[k] == 0
    for k in range(len(col) - 1):
        wrong += col[k + 1] <= col[k]
    return total, wrong


def add_rows(counts: Counts, kind_n: np.ndarray, weight_n: np.ndarray, sums: np.ndarray) -> None:
    """Add rows to the sums of their kind: sums of counts, of non-zeros, and of counts times the row's weight.

    Parameters
    ----------
    counts
        n rows.
    kind_n
        (n,) int64: kind of each row.
    weight_n
        (n,) float64.
    sums
        (3, kinds, g) float64, which is added to.
    """
    arrays = (t.numpy() for t in (counts.start, counts.col_m, counts.value_m))
    compiled(_add_rows)(*arrays, kind_n, weight_n, *sums)


def _add_rows(start, col_m, value_m, kind_n, weight_n, sum_kg, nonzero_kg, weighted_kg):
    for i in range(len(kind_n)):
        k = kind_n[i]
        for m in range(start[i], start[i + 1]):
            j, x = col_m[m], value_m[m]
            sum_kg[k, j] += x
            nonzero_kg[k, j] += 1
            weighted_kg[k, j] += x * weight_n[i]


def block_rows(
    start: Tensor, col_m: Tensor, value_m: Tensor, n_features: int, n_block: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The non-zeros of n rows by block of features: all rows of the first ``n_block`` features, then of the next.

    Returns
    -------
    Where each row begins in each block (blocks, n), and the columns and numbers in that order, (m,) int32 and float32.

    >>> block_rows(torch.tensor([0, 2, 3]), torch.tensor([0, 2, 1]), torch.tensor([5.0, 6.0, 7.0]), 3, 2)[1:]
    (tensor([0, 1, 2], dtype=torch.int32), tensor([5., 7., 6.]))
    """
    n, m = start.shape[0] - 1, col_m.shape[0]
    count_bn = torch.empty(-(-n_features // n_block), n, dtype=torch.int32)
    arrays = start.numpy(), col_m.numpy()
    counter, copier = compiled(_count_blocks), compiled(_copy_blocks)
    on_threads(lambda first, last: counter(first, last, *arrays, n_block, count_bn.numpy()), n, m)
    start_bn = (count_bn.flatten().cumsum(0, dtype=torch.int32) - count_bn.flatten()).view_as(count_bn)
    col_to, value_to = torch.empty(m, dtype=torch.int32), torch.empty(m, dtype=torch.float32)
    more = [t.numpy() for t in (value_m, count_bn, start_bn, col_to, value_to)]
    on_threads(lambda first, last: copier(first, last, *arrays, *more), n, m)
    return start_bn, col_to, value_to


def _count_blocks(begin, end, start, col, n_block, count_bn):
    for i in range(begin, end):
        k = start[i]
        for b in range(count_bn.shape[0]):
            first = k
            while k < start[i + 1] and col[k] < (b + 1) * n_block:
                k += 1
            count_bn[b, i] = k - first


def _copy_blocks(begin, end, start, col, value, count_bn, start_bn, col_to, value_to):
    for i in range(begin, end):
        k = start[i]
        for b in range(count_bn.shape[0]):
            here, there = slice(k, k + count_bn[b, i]), slice(start_bn[b, i], start_bn[b, i] + count_bn[b, i])
            col_to[there], value_to[there] = col[here], value[here]
            k += count_bn[b, i]


def fill_rows(start: Tensor, col_m: Tensor, value_m: Tensor, n_features: int) -> Tensor:
    """A dense matrix (n, g) of the non-zeros of n rows.

    >>> fill_rows(torch.tensor([0, 1]), torch.tensor([1]), torch.tensor([3.0]), 2)
    tensor([[0., 3.]])
    """
    x_ng = value_m.new_empty(start.shape[0] - 1, n_features)
    kernel, arrays = compiled(_fill_rows), [t.numpy() for t in (start, col_m, value_m, x_ng)]
    on_threads(lambda first, last: kernel(first, last, *arrays), x_ng.shape[0], x_ng.numel() // CHEAP)
    return x_ng


def _fill_rows(begin, end, start, col_m, value_m, x_ng):
    for i in range(begin, end):
        x_ng[i] = 0
        for m in range(U(start[i]), U(start[i + 1])):
            x_ng[i, U(col_m[U(m)])] = value_m[U(m)]
