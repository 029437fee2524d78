"""Cells as compact CSR on a device: rows in, :class:`~scvi_lite.data.batch.Batch` out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from scvi_lite._triton import gpu_kernels
from scvi_lite.data.batch import Batch, Counts
from scvi_lite.data.checks import CHUNK, has_fractions
from scvi_lite.data.fields import Matrix
from scvi_lite.data.resident import ResidentCounts
from scvi_lite.data.rows import Rows, canonical, row_sums

if TYPE_CHECKING:
    from scvi_lite._typing import AnnData, MuData, Registry

ROWS = 1024  # rows copied in one go
KERNELS = "scvi_lite.data.triton_kernels"
WIDTHS = (torch.uint8, torch.int16, torch.int32, torch.float32)  # how counts are stored, narrowest first


@dataclass
class CompactCSR:
    """A cells × features matrix: in the user's own arrays, or with 3 to 5 bytes for each non-zero of typical counts."""

    start: Tensor  #: (n + 1,) int64, always on the CPU: the size of a minibatch is known without asking the device
    col: Tensor  #: (m,) int16 or int32, when compact
    value: Tensor  #: (m,) uint8, int16, int32 or float32, when compact: the narrowest that holds the numbers
    n_features: int
    start_there: Tensor | None = None  #: ``start`` beside the numbers, on a GPU whose kernels read it there

    @classmethod
    def from_matrix(cls, matrix: Any) -> CompactCSR:
        """From a SciPy sparse matrix or a dense array."""
        csr = canonical(matrix)
        width = narrowest(csr.data)
        return cls.view(sparse.csr_matrix((csr.data.astype(width), csr.indices, csr.indptr), csr.shape)).compact()

    @classmethod
    def view(cls, csr: sparse.csr_matrix) -> CompactCSR:
        """A SciPy matrix in canonical form as it is, without a copy."""
        start, col, value = (torch.from_numpy(a) for a in (csr.indptr.astype(np.int64), csr.indices, csr.data))
        return cls(start, col, value, csr.shape[1])

    def compact(self) -> CompactCSR:
        """The same in the narrowest types."""
        col_type = torch.int16 if self.n_features <= torch.iinfo(torch.int16).max else torch.int32
        value_type = torch.from_numpy(np.empty(0, narrowest(self.value.numpy()))).dtype
        return replace(self, col=self.col.to(col_type), value=self.value.to(value_type))

    @classmethod
    def join(cls, parts: list[CompactCSR]) -> CompactCSR:
        """Stack the cells of several."""
        width = max((part.value.dtype for part in parts), key=WIDTHS.index)
        length_n = torch.cat([part.start.diff() for part in parts])
        return cls(
            torch.cat([torch.zeros(1, dtype=torch.int64), length_n.cumsum(0)]),
            torch.cat([part.col for part in parts]),
            torch.cat([part.value.to(width) for part in parts]),
            parts[0].n_features,
        )

    def __len__(self) -> int:
        return self.start.shape[0] - 1

    def totals(self) -> Tensor:
        """Sum of each row, (n,) float32."""
        return torch.from_numpy(row_sums(self.start.numpy(), self.value.cpu().numpy()))

    def _ranges(self, row_n: Tensor) -> tuple[Tensor, Tensor]:
        """Where rows begin in this matrix (n,), and where in a matrix of them alone (n + 1,)."""
        row_n = row_n.cpu()
        first_n = self.start[row_n]
        start = torch.zeros(row_n.shape[0] + 1, dtype=torch.int64)
        torch.cumsum(self.start[row_n + 1] - first_n, 0, out=start[1:])
        return first_n, start

    def take(self, row_n: Tensor) -> CompactCSR:
        """Some of the rows, in the order asked for."""
        first_n, start = self._ranges(row_n)
        m = int(start[-1])
        part = replace(self, start=start, col=self.col.new_empty(m), value=self.value.new_empty(m))
        for i in range(0, len(row_n), ROWS):  # in blocks: positions take more memory than what they point to
            here = start[i : i + ROWS + 1]
            position_m, _ = positions(first_n[i : i + ROWS], here - here[0], self.col.device)
            span = slice(int(here[0]), int(here[-1]))
            torch.index_select(self.col, 0, position_m, out=part.col[span])
            torch.index_select(self.value, 0, position_m, out=part.value[span])
        return part

    def gather(self, row_n: Tensor) -> Counts:
        """The counts of some rows as a minibatch reads them."""
        if self.start_there is None and self.col.device.type == "cpu":
            from scvi_lite.data.kernels import copy_rows

            return Counts(*copy_rows(row_n, self.start, self.col, self.value), self.n_features)
        if self.start_there is not None:
            return ResidentCounts(
                len(row_n), self.n_features, lambda: self._dense(row_n), lambda: self._coordinates(row_n)
            )
        return self._coordinates(row_n)

    def _dense(self, row_n: Tensor) -> Tensor:
        parts = self.start_there, self.col, self.value, self.n_features
        return gpu_kernels(KERNELS).dense_rows(row_n.to(self.col.device, non_blocking=True), *parts)

    def _coordinates(self, row_n: Tensor) -> Counts:
        first_n, start = self._ranges(row_n)
        position_m, row_m = positions(first_n, start, self.col.device)
        col_m, value_m = self.col[position_m].long(), self.value[position_m].float()
        return Counts(start.to(self.col.device, non_blocking=True), col_m, value_m, self.n_features, row_m)

    def to(self, device: torch.device | str) -> CompactCSR:
        """The same rows with their numbers on a device."""
        with_kernels = torch.device(device).type == "cuda" and gpu_kernels(KERNELS) is not None
        start_there = self.start.to(device) if with_kernels else None
        return replace(self, col=self.col.to(device), value=self.value.to(device), start_there=start_there)


@dataclass
class CellStore:
    """Counts and cell-level tensors of a data set, or of one rank's share of it.

    ``store[rows]`` gathers a minibatch on the device of the store in one vectorised step.
    """

    counts: dict[str, CompactCSR]  #: by name of the Batch attribute: ``x``, and further modalities
    cells: dict[str, Tensor]  #: by name of the Batch attribute, each with n rows
    row_n: Tensor | None = None  #: which of these cells make up the store, in its order; None for all

    @property
    def x(self) -> CompactCSR:
        """The first counts, which all data have."""
        return self.counts["x"]

    def __len__(self) -> int:
        return len(self.x if self.row_n is None else self.row_n)

    @property
    def device(self) -> torch.device:
        """Where the minibatches are made."""
        return self.x.col.device

    @property
    def row_device(self) -> torch.device:
        """Where the numbers of rows are best: the device, if nothing waits there for how many non-zeros they have."""
        return self.device if all(x.start_there is not None for x in self.counts.values()) else torch.device("cpu")

    @property
    def n_features(self) -> int:
        """Of all kinds of counts together."""
        return sum(counts.n_features for counts in self.counts.values())

    @property
    def n_bytes(self) -> int:
        """Memory that the store takes."""
        tensors = [t for x in self.counts.values() for t in (x.start, x.col, x.value)] + list(self.cells.values())
        return sum(t.numel() * t.element_size() for t in tensors)

    def __getitem__(self, row_n: Tensor) -> Batch:
        row_n = row_n if self.row_n is None else self.row_n[row_n]
        on_device = row_n.to(self.device, non_blocking=True)
        parts: dict[str, Any] = {name: values.index_select(0, on_device) for name, values in self.cells.items()}
        parts |= {name: x.gather(row_n) for name, x in self.counts.items()}
        return Batch(**parts)

    def take(self, row_n: Tensor) -> CellStore:
        """A store of some of the cells, without a copy; ``row_n`` of its batches counts in the whole data set."""
        return replace(self, row_n=row_n if self.row_n is None else self.row_n[row_n])

    def to(self, device: torch.device | str) -> CellStore:
        """The same cells on a device; of a part of a store, only that part is copied there."""
        if torch.device(device) == self.device:
            return self
        counts, cells = self.counts, self.cells
        if self.row_n is not None:
            counts = {name: x.take(self.row_n) for name, x in counts.items()}
            cells = {name: values[self.row_n] for name, values in cells.items()}
        return CellStore(
            {name: x.compact().to(device) for name, x in counts.items()},
            {name: values.to(device) for name, values in cells.items()},
        )

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """All cells in order."""
        for row_n in torch.arange(len(self)).split(batch_size):
            yield self[row_n]


def positions(first_n: Tensor, start: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Of each non-zero of some rows: its position in the matrix that they come from, and its row among them.

    >>> positions(torch.tensor([7, 2]), torch.tensor([0, 1, 3]), torch.device("cpu"))
    (tensor([7, 2, 3]), tensor([0, 1, 1]))
    """
    m = int(start[-1])  # known on the CPU, so that nothing waits for the device
    row_m = torch.repeat_interleave(start.diff().to(device, non_blocking=True), output_size=m)
    return (first_n - start[:-1]).to(device, non_blocking=True)[row_m] + torch.arange(m, device=device), row_m


def cell_tensors(adata: AnnData | MuData, registry: Registry) -> dict[str, Tensor]:
    """The cell-level fields of ``adata``, each with one row a cell, the cells' numbers, and what they lack."""
    tensors = {"row_n": torch.arange(adata.n_obs)}
    for name, state in registry.fields.items():
        if state["kind"] != Matrix.kind:
            tensors[name] = torch.from_numpy(registry.read(adata, name))
    for name in registry.modalities:
        place_n = registry.place(adata, name)
        if place_n is not None and (place_n < 0).any():
            tensors[f"has_{name.split('_')[0]}_n"] = torch.from_numpy(place_n >= 0)
    return tensors


def load(adata: AnnData | MuData, registry: Registry) -> CellStore:
    """All cells in a store on the CPU; what is in memory in canonical form stays where it is."""
    counts = {name: _load(registry.read(adata, name), registry.place(adata, name)) for name in registry.matrices}
    cells = cell_tensors(adata, registry)
    cells.setdefault("total_n", counts["x"].totals())
    return CellStore(counts, cells)


def _load(matrix: Any, place_n: np.ndarray | None) -> CompactCSR:
    csr = canonical(matrix) if place_n is None and sparse.issparse(matrix) and matrix.format == "csr" else None
    as_it_is = csr is not None and np.shares_memory(csr.data, matrix.data) and csr.data.dtype in (np.float32, np.int32)
    return CompactCSR.view(csr) if as_it_is else read_rows(matrix if csr is None else csr, place_n)


def read_rows(matrix: Any, place_n: np.ndarray | None = None) -> CompactCSR:
    """All rows of a matrix as compact CSR; dense ones and files are read a block of rows at a time."""
    if sparse.issparse(matrix) and place_n is None:
        return CompactCSR.from_matrix(matrix)
    rows = Rows(matrix, place_n)
    return CompactCSR.join([CompactCSR.from_matrix(rows[block]) for block in rows.blocks()])


def narrowest(values: np.ndarray) -> type[np.generic]:
    """The narrowest of uint8, int16, int32 and float32 that holds the values.

    >>> narrowest(np.array([0.0, 255.0])).__name__, narrowest(np.array([0.5])).__name__
    ('uint8', 'float32')
    """
    if values.size == 0:
        return np.uint8
    if any(has_fractions(values[i : i + CHUNK]) for i in range(0, len(values), CHUNK)):
        return np.float32
    low, high = values.min().item(), values.max().item()  # as Python's numbers, which compare without rounding
    fits = (t for t in (np.uint8, np.int16, np.int32) if np.iinfo(t).min <= low and high <= np.iinfo(t).max)
    return next(fits, np.float32)
