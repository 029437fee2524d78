"""Files and AnnData of 10x Genomics, brought into the form that the models read.

The folders are those of Cell Ranger ATAC and ARC (``filtered_peak_bc_matrix``, ``filtered_feature_bc_matrix``):
https://www.10xgenomics.com/support/software/cell-ranger-arc/latest/analysis/outputs/feature-barcode-matrices.
"""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy import io, sparse

from scvi_lite.data.multiome import COLUMNS, genes_of
from scvi_lite.errors import NotThereError, UnknownKeyError, unknown

if TYPE_CHECKING:
    from anndata import AnnData

PLACE = ["chr", "start", "end"]
PROTEINS = "protein_expression"


def read_10x_atac(base_path: str | Path) -> AnnData:
    """Read the folder of a peak matrix: ``matrix.mtx``, ``barcodes.tsv`` and ``peaks.bed``, compressed or not.

    Returns
    -------
    anndata.AnnData
        Cells × regions, in CSR form; ``var`` has ``chr``, ``start``, ``end``, and ``obs`` the ``batch_id`` that follows
        the barcode.

    Raises
    ------
    FileNotFoundError
        If a file is missing.
    """
    peaks = pd.read_csv(_find(base_path, "peaks.bed"), sep="\t", header=None, comment="#", usecols=[0, 1, 2])
    peaks.columns = PLACE
    peaks.index = pd.Index([f"{c}:{start}-{end}" for c, start, end in peaks.itertuples(index=False)])
    return _read(base_path, peaks)


def read_10x_multiome(base_path: str | Path) -> AnnData:
    """Read the folder of genes and peaks: ``matrix.mtx``, ``barcodes.tsv`` and ``features.tsv``, compressed or not.

    Returns
    -------
    anndata.AnnData
        Cells × genes and regions, in CSR form; ``var`` has ``ID``, ``modality`` (``"Gene Expression"``, ``"Peaks"``),
        ``chr``, ``start``, ``end``, and ``obs`` the ``batch_id`` that follows the barcode.

    Raises
    ------
    FileNotFoundError
        If a file is missing.
    """
    features = pd.read_csv(_find(base_path, "features.tsv"), sep="\t", header=None, index_col=1)
    features.columns = ["ID", "modality", *PLACE][: features.shape[1]]
    return _read(base_path, features.rename_axis(None))


def organize_cite_seq_10x(adata: AnnData, copy: bool = False) -> AnnData | None:
    """Move the counts of proteins out of the genes, into ``obsm["protein_expression"]``, where TOTALVI reads them.

    Parameters
    ----------
    adata
        Cells × genes and proteins, as read by ``scanpy.read_10x_mtx(path, gex_only=False)``: ``var["feature_types"]``
        tells which are which. It is changed in place.
    copy
        Leave it as it is, and give a changed copy.

    Raises
    ------
    ValueError
        If no column of ``var`` tells genes from proteins.

    Examples
    --------
    >>> import scvi_lite
    >>> cells = scvi_lite.data.synthetic_iid(batch_size=5, n_genes=4)
    >>> cells.var["feature_types"] = ["Gene Expression"] * 3 + ["Antibody Capture"]
    >>> cells = organize_cite_seq_10x(cells, copy=True)
    >>> cells.n_vars, cells.obsm["protein_expression"].columns.tolist()
    (3, ['gene_3'])
    """
    is_gene = genes_of(adata)
    if is_gene is None:
        raise ValueError(
            f"adata.var has no column of {' and '.join(COLUMNS)} with 'Gene Expression': nothing tells genes from "
            "proteins. Read the files with scanpy.read_10x_mtx(path, gex_only=False)."
        )
    adata = adata.copy() if copy else adata
    counts = adata[:, ~is_gene].to_df()
    adata._inplace_subset_var(is_gene)
    adata.obsm[PROTEINS] = counts
    return adata if copy else None


def reads_to_fragments(adata: AnnData, read_layer: str | None = None, fragment_layer: str = "fragments") -> None:
    """Write the counts of fragments to ``layers[fragment_layer]``: a fragment has two ends, each of which is a read.

    Half the reads, rounded up (Martens et al. 2024, doi:10.1038/s41592-023-02112-6).

    >>> import scvi_lite
    >>> cells = scvi_lite.data.synthetic_iid(batch_size=5, n_genes=4)
    >>> reads_to_fragments(cells)
    >>> bool((cells.layers["fragments"] >= cells.X / 2).all())
    True
    """
    if read_layer is not None and read_layer not in adata.layers:
        raise UnknownKeyError(unknown("read_layer", read_layer, adata.layers, "a key of adata.layers", "Layers"))
    reads = adata.X if read_layer is None else adata.layers[read_layer]
    adata.layers[fragment_layer] = (reads / 2).ceil() if sparse.issparse(reads) else np.ceil(reads / 2)


def _find(folder: str | Path, name: str) -> Path:
    """A file of the folder, compressed or not."""
    for file in (Path(folder).expanduser() / name, Path(folder).expanduser() / f"{name}.gz"):
        if file.is_file():
            return file
    raise NotThereError(f"{folder} has no {name} and no {name}.gz. Give the folder that holds matrix.mtx.")


def _read(folder: str | Path, var: pd.DataFrame) -> AnnData:
    """The matrix of a folder, as cells × features."""
    from anndata import AnnData

    file = _find(folder, "matrix.mtx")
    with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
        x_ng = sparse.csr_matrix(io.mmread(stream).T)
    barcodes = pd.read_csv(_find(folder, "barcodes.tsv"), sep="\t", header=None, dtype=str)[0]
    parts = barcodes.str.extract(r"^(?P<barcode>.*?)(?:-(?P<batch_id>\d+))?$")
    names = parts["barcode"] if parts["barcode"].is_unique else barcodes  # of several wells, barcodes may repeat
    obs = pd.DataFrame({"batch_id": pd.to_numeric(parts["batch_id"]).fillna(1).astype(int).to_numpy()})
    obs.index = pd.Index(names, name="barcode")
    return AnnData(x_ng, obs, var)
