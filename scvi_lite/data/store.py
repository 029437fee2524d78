"""Cells as compact CSR on a device: rows in, :class:`~scvi_lite.data.batch.Batch` out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from scvi_lite.data.batch import Batch, Counts
from scvi_lite.data.fields import CHUNK, Matrix

if TYPE_CHECKING:
    from anndata import AnnData

    from scvi_lite.data.registry import Registry


@dataclass
class CompactCSR:
    """A cells × features matrix with 3 to 5 bytes for each non-zero of a typical count matrix."""

    start: Tensor  #: (n + 1,) int64
    col: Tensor  #: (m,) int16 or int32
    value: Tensor  #: (m,) uint8, int16, int32 or float32: the narrowest that holds the numbers
    n_features: int

    @classmethod
    def from_matrix(cls, matrix: Any) -> CompactCSR:
        """From a SciPy sparse matrix or a dense array."""
        csr = sparse.csr_matrix(matrix)
        if not csr.has_canonical_format:
            csr = csr.copy() if csr is matrix else csr
            csr.sum_duplicates()
        if csr.nnz and not csr.data.all():
            csr = csr.copy()
            csr.eliminate_zeros()
        col_type = np.int16 if csr.shape[1] <= np.iinfo(np.int16).max else np.int32
        return cls(
            torch.from_numpy(csr.indptr.astype(np.int64)),
            torch.from_numpy(csr.indices.astype(col_type)),
            torch.from_numpy(csr.data.astype(narrowest(csr.data))),
            csr.shape[1],
        )

    @classmethod
    def join(cls, parts: list[CompactCSR]) -> CompactCSR:
        """Stack the cells of several."""
        offsets = np.cumsum([0] + [int(part.start[-1]) for part in parts[:-1]])
        starts = [part.start[1:] + int(offset) for part, offset in zip(parts, offsets, strict=True)]
        return cls(
            torch.cat([parts[0].start[:1], *starts]),
            torch.cat([part.col for part in parts]),
            torch.cat([part.value.to(_common(parts)) for part in parts]),
            parts[0].n_features,
        )

    def __len__(self) -> int:
        return self.start.shape[0] - 1

    def totals(self) -> Tensor:
        """Sum of each row, (n,) float32."""
        cumulative = torch.zeros(self.value.shape[0] + 1, dtype=torch.float64)
        torch.cumsum(self.value, 0, dtype=torch.float64, out=cumulative[1:])
        return (cumulative[self.start[1:]] - cumulative[self.start[:-1]]).float()

    def _positions(self, row_n: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For rows: the new starts, the row of each non-zero, and its position in this matrix."""
        first_n = self.start[row_n]
        length_n = self.start[row_n + 1] - first_n
        start = torch.zeros(row_n.shape[0] + 1, dtype=torch.int64, device=row_n.device)
        torch.cumsum(length_n, 0, out=start[1:])
        row_m = torch.repeat_interleave(length_n)
        position_m = torch.arange(row_m.shape[0], device=row_n.device) + (first_n - start[:-1])[row_m]
        return start, row_m, position_m

    def take(self, row_n: Tensor) -> CompactCSR:
        """Some of the rows, in the order asked for."""
        start, _, position_m = self._positions(row_n)
        return replace(self, start=start, col=self.col[position_m], value=self.value[position_m])

    def gather(self, row_n: Tensor) -> Counts:
        """The counts of some rows as a minibatch reads them."""
        start, row_m, position_m = self._positions(row_n)
        return Counts(start, row_m, self.col[position_m].long(), self.value[position_m].float(), self.n_features)

    def to(self, device: torch.device | str) -> CompactCSR:
        return replace(self, start=self.start.to(device), col=self.col.to(device), value=self.value.to(device))


@dataclass
class CellStore:
    """Counts and cell-level tensors of a data set, or of one rank's share of it.

    ``store[rows]`` gathers a minibatch on the device of the store in one vectorised step.
    """

    x: CompactCSR
    cells: dict[str, Tensor]  #: by name of the Batch attribute, each with n rows

    def __len__(self) -> int:
        return len(self.x)

    @property
    def device(self) -> torch.device:
        return self.x.start.device

    @property
    def n_bytes(self) -> int:
        """Memory that the store takes."""
        tensors = [self.x.start, self.x.col, self.x.value, *self.cells.values()]
        return sum(t.numel() * t.element_size() for t in tensors)

    def __getitem__(self, row_n: Tensor) -> Batch:
        row_n = row_n.to(self.device)
        return Batch(x=self.x.gather(row_n), **{name: values[row_n] for name, values in self.cells.items()})

    def take(self, row_n: Tensor) -> CellStore:
        """A store of some of the cells; ``row_n`` of its batches still counts in the whole data set."""
        return CellStore(self.x.take(row_n), {name: values[row_n] for name, values in self.cells.items()})

    def to(self, device: torch.device | str) -> CellStore:
        return CellStore(self.x.to(device), {name: values.to(device) for name, values in self.cells.items()})

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """All cells in order."""
        for row_n in torch.arange(len(self)).split(batch_size):
            yield self[row_n]


def cell_tensors(adata: AnnData, registry: Registry) -> dict[str, Tensor]:
    """The cell-level fields of ``adata``, each with one row a cell, and the cells' numbers."""
    tensors = {"row_n": torch.arange(adata.n_obs)}
    for name, state in registry.fields.items():
        if state["kind"] != Matrix.kind:
            tensors[name] = torch.from_numpy(registry.read(adata, name))
    return tensors


def load(adata: AnnData, registry: Registry) -> CellStore:
    """Read all cells into a store on the CPU. Backed files are read a block of rows at a time."""
    counts = read_rows(registry.read(adata, "x"))
    cells = cell_tensors(adata, registry)
    cells.setdefault("total_n", counts.totals())
    return CellStore(counts, cells)


def read_rows(matrix: Any, row_n: np.ndarray | None = None) -> CompactCSR:
    """Rows of an in-memory or backed matrix as compact CSR, in the order asked for."""
    if sparse.issparse(matrix):
        return CompactCSR.from_matrix(matrix if row_n is None else matrix.tocsr()[row_n])
    # Dense and backed matrices are read in blocks. Files want increasing row numbers without repeats.
    wanted = np.arange(matrix.shape[0]) if row_n is None else np.unique(row_n)
    step = max(1, CHUNK // matrix.shape[1])
    parts = [_read_block(matrix, wanted[i : i + step]) for i in range(0, len(wanted), step)]
    whole = CompactCSR.join(parts)
    if row_n is None or np.array_equal(wanted, row_n):
        return whole
    return whole.take(torch.from_numpy(np.searchsorted(wanted, row_n)))


def _read_block(matrix: Any, row_n: np.ndarray) -> CompactCSR:
    contiguous = row_n[-1] - row_n[0] + 1 == len(row_n)
    return CompactCSR.from_matrix(matrix[int(row_n[0]) : int(row_n[-1]) + 1] if contiguous else matrix[row_n])


def narrowest(values: np.ndarray) -> type[np.generic]:
    """The narrowest of uint8, int16, int32 and float32 that holds the values.

    >>> narrowest(np.array([0.0, 255.0])).__name__, narrowest(np.array([0.5])).__name__
    ('uint8', 'float32')
    """
    if values.size == 0:
        return np.uint8
    low, high = values.min(), values.max()
    if values.dtype.kind == "f":
        blocks = (values[i : i + CHUNK] for i in range(0, len(values), CHUNK))
        if any((block != np.rint(block)).any() for block in blocks):
            return np.float32
    for candidate in (np.uint8, np.int16, np.int32):
        if np.iinfo(candidate).min <= low and high <= np.iinfo(candidate).max:
            return candidate
    return np.float32


def _common(parts: list[CompactCSR]) -> torch.dtype:
    dtypes = [part.value.dtype for part in parts]
    order = [torch.uint8, torch.int16, torch.int32, torch.float32]
    widest = max(dtypes, key=order.index)
    # int32 beside float32 would lose nothing that float32 training could use.
    return widest
