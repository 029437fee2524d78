"""A store in memory-mapped files, for worker processes to read their share from without a copy for each."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from scvi_lite.data.disk import LazyStore, open_backed
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
        if source is None or not all(rows.in_file for rows in store.counts.values()):
            raise ValueError(
                "adata is a view of a backed file, which another process cannot open. Train on adata.to_memory(), or "
                "write it to a file of its own with adata.copy(filename)."
            )
        (folder / SOURCE).write_bytes(pickle.dumps(source))
        tensors["rows"] = store.row_n
    else:
        for name, x in store.counts.items():
            x = x.compact()
            tensors |= {f"start.{name}": x.start, f"col.{name}": x.col, f"value.{name}": x.value}
            (folder / f"n_features.{name}").write_text(str(x.n_features))
    for name, values in tensors.items():
        np.save(folder / f"{name}.npy", values.cpu().numpy())


def read_store(folder: Path) -> CellStore | LazyStore:
    """The store that :func:`write_store` wrote; its tensors are read as they are used."""
    cells = {path.stem.removeprefix("cells."): _map(path) for path in folder.glob("cells.*.npy")}
    if (folder / SOURCE).exists():
        filename, registry = pickle.loads((folder / SOURCE).read_bytes())
        data = open_backed(filename)
        counts = {name: registry.rows(data, name) for name in registry.matrices}
        return LazyStore.of(counts, cells, _map(folder / "rows.npy"))
    return CellStore({path.suffix[1:]: _read_csr(path) for path in folder.glob("n_features.*")}, cells)


def _read_csr(path: Path) -> CompactCSR:
    """The matrix that the name of the file stands for."""
    name = path.suffix[1:]
    start, col, value = (_map(path.with_name(f"{part}.{name}.npy")) for part in ("start", "col", "value"))
    return CompactCSR(start, col, value, n_features=int(path.read_text()))


def _map(path: Path) -> Tensor:
    array = np.load(path, mmap_mode="c") if path.stat().st_size > 4096 else np.load(path)  # empty files do not map
    return torch.from_numpy(array)
