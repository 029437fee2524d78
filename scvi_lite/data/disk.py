"""The contract of :class:`~scvi_lite.data.store.CellStore` over data that stay where they are, as in a file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from scvi_lite.data.batch import Batch
from scvi_lite.data.checks import is_sparse_file
from scvi_lite.data.rows import Rows
from scvi_lite.data.store import CellStore, cell_tensors, load

if TYPE_CHECKING:
    from scvi_lite._typing import AnnData, MuData, Registry

BYTES_PER_NONZERO = 6  # a cautious guess of compact CSR: int16 or int32 columns, uint8 or int16 values
SHARE_OF_MEMORY = 0.5


class LazyStore:
    """Cells of an AnnData or a MuData, backed or not: ``store[rows]`` reads the counts from where they are.

    Parameters
    ----------
    adata
        The data; backed ones come from ``anndata.read_h5ad(path, backed="r")``.
    registry
        Their setup.
    row_n
        Cells of this store, in its order; all of them if not given.
    with_counts
        False gives cells without counts, for those who only ask for the rest.
    """

    device = row_device = torch.device("cpu")

    def __init__(
        self, adata: AnnData | MuData, registry: Registry, row_n: np.ndarray | None = None, with_counts: bool = True
    ):
        self.counts = {name: registry.rows(adata, name) for name in registry.matrices}
        if not with_counts:
            for name, rows in self.counts.items():
                empty = sparse.csr_matrix((0, rows.shape[1]), dtype=np.float32)
                self.counts[name] = Rows(empty, np.full(adata.n_obs, -1))
        self.cells = cell_tensors(adata, registry)
        self.row_n = torch.arange(adata.n_obs) if row_n is None else torch.from_numpy(row_n)

    def __len__(self) -> int:
        return len(self.row_n)

    def __getitem__(self, row_n: Tensor) -> Batch:
        row_n = self.row_n[row_n]
        found = {name: rows.gather(row_n.numpy()) for name, rows in self.counts.items()}
        cells: dict[str, Any] = {name: values.index_select(0, row_n) for name, values in self.cells.items()}
        cells.setdefault("total_n", found["x"][1])
        cells |= {name: counts for name, (counts, _) in found.items()}
        return Batch(**cells)

    @property
    def n_features(self) -> int:
        """Of all kinds of counts together."""
        return sum(rows.shape[1] for rows in self.counts.values())

    @classmethod
    def of(cls, counts: dict[str, Rows], cells: dict[str, Tensor], row_n: Tensor) -> LazyStore:
        """From what a store is made of."""
        store = object.__new__(cls)
        store.counts, store.cells, store.row_n = counts, cells, row_n
        return store

    def take(self, row_n: Tensor) -> LazyStore:
        """A store of some of the cells."""
        return self.of(self.counts, self.cells, self.row_n[row_n])

    def to(self, device: torch.device | str) -> LazyStore:
        """The same store: minibatches are moved, the data are not."""
        return self

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """All cells in order."""
        for row_n in torch.arange(len(self)).split(batch_size):
            yield self[row_n]


def load_for_training(adata: AnnData | MuData, registry: Registry) -> CellStore | LazyStore:
    """All cells in memory where they fit as compact CSR, which a backed file may not; else read as needed."""
    if adata.isbacked:
        n_bytes = sum(_compact_bytes(registry.read(adata, name)) for name in registry.matrices)
        if n_bytes > SHARE_OF_MEMORY * _free_memory():
            return LazyStore(adata, registry)
    return load(adata, registry)


def open_backed(filename: str) -> AnnData | MuData:
    """The data of a file, which stay there."""
    if filename.endswith(".h5mu"):
        import mudata

        return mudata.read_h5mu(filename, backed="r")
    import anndata

    return anndata.read_h5ad(filename, backed="r")


def _compact_bytes(matrix: Any) -> int:
    if sparse.issparse(matrix):
        return 0  # in memory already
    stored = matrix.group["data"].shape[0] if is_sparse_file(matrix) else np.prod(matrix.shape)
    return BYTES_PER_NONZERO * int(stored)


def _free_memory() -> int:
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):  # not every system tells
        return 8 << 30
