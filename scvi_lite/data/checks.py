"""Whether a matrix can be counts: one pass over its numbers, in blocks of bounded size."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from scipy import sparse

from scvi_lite.errors import warn

CHUNK = 1 << 22  # numbers looked at in one go
LARGEST = float(np.finfo(np.float32).max)


def check_counts(matrix: Any, where: str, counts: bool = True, cure: str = "name their layer: layer=...") -> None:
    """Refuse what cannot be counts; warn of fractions.

    Parameters
    ----------
    matrix
        Cells × features.
    where
        What to call it in a message, as in ``"adata.X"``.
    counts
        False allows negative numbers and fractions.
    cure
        What to do in a message about counts that are elsewhere.

    Raises
    ------
    TypeError
        If the matrix is of a kind that is not read.
    ValueError
        If it holds something else than numbers, NaN, infinity, or, for counts, negative numbers.
    """
    check_kind(matrix, where)
    fractions = False
    for block in value_blocks(matrix):
        if block.size == 0:
            continue
        low, high = float(block.min()), float(block.max())  # NaN if there is one
        if not (low >= -LARGEST and high <= LARGEST):
            raise ValueError(
                f"{where} holds {'NaN' if np.isnan(low) else 'infinite values'}. Counts are needed: look where these "
                "come from, or leave the cells or genes out."
            )
        if counts and low < 0:
            raise ValueError(
                f"{where} holds negative values (down to {low:g}). Raw counts are needed; scaled or centred data do "
                f"not fit. If the counts are elsewhere, {cure}"
            )
        fractions = fractions or (counts and has_fractions(block))
    if fractions:
        warn(f"{where} holds fractions, not counts. The model is made for raw counts: if you have them, {cure}")


def check_kind(matrix: Any, where: str) -> None:
    """Refuse arrays that cannot be read by rows, and those that hold no numbers."""
    kind = type(matrix)
    if not (is_rows_in_memory(matrix) or is_file(matrix)):
        raise TypeError(
            f"{where} is a {kind.__module__}.{kind.__name__}. A NumPy array, a SciPy CSR or CSC matrix, or one of them "
            f"in a backed file is needed. Convert it, as in {where} = scipy.sparse.csr_matrix({where}); for a dask "
            f"array {where} = {where}.compute(), for one on a GPU {where} = {where}.get()."
        )
    if np.dtype(matrix.dtype).kind not in "uifb":
        raise ValueError(f'{where} holds {matrix.dtype}, not numbers. Convert it: {where} = {where}.astype("float32").')


def is_rows_in_memory(matrix: Any) -> bool:
    """Whether it is a NumPy array or a SciPy matrix from which rows are read."""
    if sparse.issparse(matrix):
        return matrix.format in ("csr", "csc")
    return isinstance(matrix, np.ndarray) and not isinstance(matrix, np.ma.MaskedArray) and matrix.ndim == 2


def is_file(matrix: Any) -> bool:
    """Whether it is a matrix in a file, dense or sparse."""
    import h5py

    return isinstance(matrix, h5py.Dataset) or is_sparse_file(matrix)


def is_sparse_file(matrix: Any) -> bool:
    """Whether it is a sparse matrix in a file."""
    from anndata.abc import CSCDataset, CSRDataset

    return isinstance(matrix, CSRDataset | CSCDataset)


def value_blocks(matrix: Any) -> Iterator[np.ndarray]:
    """The numbers that a matrix stores, in memory or in a file, in blocks of bounded size."""
    if sparse.issparse(matrix) or is_sparse_file(matrix):
        stored = matrix.data if sparse.issparse(matrix) else matrix.group["data"]
        step = CHUNK
    else:
        stored = matrix
        step = max(1, CHUNK // max(1, matrix.shape[1]))
    for i in range(0, stored.shape[0], step):
        yield np.asarray(stored[i : i + step])


def has_fractions(values: np.ndarray) -> bool:
    """Whether some number is not whole.

    >>> has_fractions(np.array([1.0, 2.0])), has_fractions(np.array([0.5]))
    (False, True)
    """
    return values.dtype.kind == "f" and bool((values != np.rint(values)).any())
