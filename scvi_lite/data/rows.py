"""Rows of a matrix in the order asked for, wherever it is: in memory or in a file, sparse or dense."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from scvi_lite.data.batch import Counts
from scvi_lite.data.checks import CHUNK, is_file, is_sparse_file

BLOCK = 1 << 18  # numbers summed in one go
COMPILED = (np.float32, np.float64, np.int32, np.int64)  # types that are gathered by compiled code


class Rows:
    """``rows[row_n]`` gives rows as canonical CSR; no more than these, or a block of them, are ever dense.

    A matrix stored by columns, as CSC, is turned into CSR in memory first.

    Parameters
    ----------
    matrix
        NumPy array, SciPy CSR or CSC matrix, or what ``adata.X`` is when the file is backed.
    place_n
        Row of the matrix for each row asked for; -1 for a row of zeros. All rows in their order if not given.

    Examples
    --------
    >>> Rows(np.array([[0, 1], [2, 0]]))[np.array([1, 0, 1])].toarray().tolist()
    [[2, 0], [0, 1], [2, 0]]
    >>> Rows(np.array([[0, 1], [2, 0]]), np.array([1, -1, 0]))[np.array([0, 1])].toarray().tolist()
    [[2, 0], [0, 0]]
    """

    def __init__(self, matrix: Any, place_n: np.ndarray | None = None):
        if is_sparse_file(matrix) and matrix.format == "csc":
            matrix = matrix.to_memory()
        self.matrix = matrix.tocsr() if sparse.issparse(matrix) else matrix
        self.in_file, self.place_n = is_file(matrix), place_n

    def gather(self, row_n: np.ndarray) -> tuple[Counts, Tensor]:
        """Rows as a minibatch reads them, and the total of each, (n,)."""
        if sparse.issparse(self.matrix) and self.matrix.dtype in COMPILED:
            from scvi_lite.data.kernels import gather_rows

            place_n = row_n if self.place_n is None else self.place_n[row_n]
            start = np.zeros(len(row_n) + 1, np.int64)
            first_n = self.matrix.indptr[place_n].astype(np.int64)
            length_n = self.matrix.indptr[place_n + 1] - first_n
            np.cumsum(np.where(place_n < 0, 0, length_n), out=start[1:])
            found = gather_rows(first_n, start, self.matrix.indices, self.matrix.data)
            if found is not None:
                return Counts(torch.from_numpy(start), *found[:2], self.shape[1]), found[2]
        csr = self[row_n]
        return Counts.from_csr(csr), torch.from_numpy(row_sums(csr.indptr, csr.data))

    def __len__(self) -> int:
        return int(self.matrix.shape[0]) if self.place_n is None else len(self.place_n)

    def __getitem__(self, row_n: np.ndarray) -> sparse.csr_matrix:
        if self.place_n is None:
            return self._read(row_n)
        place_n = self.place_n[row_n]
        found = self._read(place_n[place_n >= 0])
        length_n = np.zeros(len(row_n), np.int64)
        length_n[place_n >= 0] = np.diff(found.indptr)
        start = np.concatenate([[0], np.cumsum(length_n)])
        return sparse.csr_matrix((found.data, found.indices, start), (len(row_n), found.shape[1]))

    @property
    def shape(self) -> tuple[int, int]:
        return len(self), int(self.matrix.shape[1])

    def _read(self, row_n: np.ndarray) -> sparse.csr_matrix:
        found_n = np.unique(row_n) if self.in_file else row_n  # files want numbers that increase, each once
        found = canonical(self.matrix[_as_slice(found_n)])
        return found if np.array_equal(found_n, row_n) else found[np.searchsorted(found_n, row_n)]

    def blocks(self) -> Iterator[np.ndarray]:
        """All rows in blocks that hold about ``CHUNK`` numbers."""
        n, g = len(self), self.matrix.shape[1]
        stored = self.matrix.group["data"].shape[0] if is_sparse_file(self.matrix) else n * g
        step = max(1, CHUNK * n // max(1, stored))
        for i in range(0, n, step):
            yield np.arange(i, min(i + step, n))


def _as_slice(row_n: np.ndarray) -> np.ndarray | slice:
    """Rows that follow one another as a slice, which is read in one go."""
    if len(row_n) == 0:
        return slice(0, 0)
    one_by_one = row_n[-1] - row_n[0] + 1 == len(row_n) and bool((np.diff(row_n) == 1).all())
    return slice(int(row_n[0]), int(row_n[-1]) + 1) if one_by_one else row_n


def canonical(matrix: Any) -> sparse.csr_matrix:
    """CSR with sorted columns, each entry once and none of them zero; the matrix that was given stays as it is.

    >>> canonical(np.array([[0, 5]])).indices
    array([1], dtype=int32)
    """
    if matrix.dtype == np.float16 or not matrix.dtype.isnative:  # which SciPy does not know
        matrix = matrix.astype(np.float64)
    csr = sparse.csr_matrix(matrix)
    if not csr.has_canonical_format:
        csr = sparse.csr_matrix(csr, dtype=np.float64, copy=True)  # sums of narrow integers could overflow
        csr.sum_duplicates()
    if not csr.data.all():
        csr = csr.copy()
        csr.eliminate_zeros()
    return csr


def row_sums(start: np.ndarray, value_m: np.ndarray) -> np.ndarray:
    """Sum of the numbers between ``start[i]`` and ``start[i + 1]``, float32 of a float64 sum.

    >>> row_sums(np.array([0, 2, 2, 3]), np.array([1, 2, 5]))
    array([3., 0., 5.], dtype=float32)
    """
    sum_n = np.zeros(len(start) - 1, np.float32)
    row = np.flatnonzero(np.diff(start))  # reduceat knows no empty rows
    # In blocks, because reduceat turns all its numbers to float64 at once.
    for block in np.split(row, np.searchsorted(start[row], np.arange(BLOCK, start[-1], BLOCK))):
        if len(block):
            first, last = start[block[0]], start[block[-1] + 1]
            sum_n[block] = np.add.reduceat(value_m[first:last], start[block] - first, dtype=np.float64)
    return sum_n
