"""A store in memory-mapped files, for worker processes to read their share from without a copy for each."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from scvi_lite.data.disk import LazyStore
from scvi_lite.data.rows import Rows
from scvi_lite.data.store import CellStore, CompactCSR

if TYPE_CHECKING:
    from scvi_lite.data.registry import Registry

SOURCE = "source.pkl"


def write_store(store: CellStore | LazyStore, source: tuple[str, Registry] | None, folder: Path) -> None:
    """Write the cells of a store, one file a tensor; of a backed one only where its file is.

    Parameters
    ----------
    store
        The cells.
    source
        For a backed AnnData its file and its setup, from which a worker opens it again.
    folder
        Where to write. Files are read back by this session's workers only.
    """
    tensors = {f"cells.{name}": values for name, values in store.cells.items()}
    if isinstance(store, LazyStore):
        if source is None or not store.matrix.in_file:
            raise ValueError(
                "adata is a view of a backed file, which another process cannot open. Train on adata.to_memory(), or "
                "write it to a file of its own with adata.copy(filename)."
            )
        (folder / SOURCE).write_bytes(pickle.dumps(source))
        tensors["rows"] = store.row_n
    else:
        x = store.x.compact()
        tensors |= {"x.start": x.start, "x.col": x.col, "x.value": x.value}
        (folder / "n_features").write_text(str(x.n_features))
    for name, values in tensors.items():
        np.save(folder / f"{name}.npy", values.cpu().numpy())


def read_store(folder: Path) -> CellStore | LazyStore:
    """The store that :func:`write_store` wrote; its tensors are read as they are used."""
    cells = {path.stem.removeprefix("cells."): _map(path) for path in folder.glob("cells.*.npy")}
    if (folder / SOURCE).exists():
        import anndata

        filename, registry = pickle.loads((folder / SOURCE).read_bytes())
        matrix = registry.read(anndata.read_h5ad(filename, backed="r"), "x")
        return LazyStore.of(Rows(matrix), cells, _map(folder / "rows.npy"))
    x: dict[str, Any] = {name: _map(folder / f"x.{name}.npy") for name in ("start", "col", "value")}
    return CellStore(CompactCSR(**x, n_features=int((folder / "n_features").read_text())), cells)


def _map(path: Path) -> Tensor:
    array = np.load(path, mmap_mode="c") if path.stat().st_size > 4096 else np.load(path)  # empty files do not map
    return torch.from_numpy(array)
