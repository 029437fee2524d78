"""Cells with RNA and chromatin, and cells with one of them, as one AnnData."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy import sparse

from scvi_lite.data.rows import canonical
from scvi_lite.errors import warn

if TYPE_CHECKING:
    from anndata import AnnData

GENES = "Gene Expression"  # what files of 10x Genomics call the features that are genes
COLUMNS = ("modality", "feature_types")  # of var, that tell the kind of each feature


def genes_of(adata: AnnData) -> np.ndarray | None:
    """Which variables are genes, (v,) bool, by a column of ``var``; None where none tells."""
    for column in COLUMNS:
        if column in adata.var and (is_gene := (adata.var[column] == GENES).to_numpy(bool)).any():
            return is_gene
    return None


def organize_multiome_anndatas(
    multi_anndata: AnnData,
    rna_anndata: AnnData | None = None,
    atac_anndata: AnnData | None = None,
    modality_key: str = "modality",
) -> AnnData:
    """Join cells that have both modalities with cells that have RNA or chromatin alone.

    Parameters
    ----------
    multi_anndata
        Cells with genes and regions; its ``var["modality"]`` (or ``var["feature_types"]``) tells which are which:
        ``"Gene Expression"``, and anything else for regions.
    rna_anndata, atac_anndata
        Cells with genes alone, and with regions alone. Features are matched by name, in any order; those that
        ``multi_anndata`` lacks are left out, and those that a data set lacks are zero in its cells.
    modality_key
        Column of ``obs`` to tell what each cell has: ``"paired"``, ``"expression"`` or ``"accessibility"``; these words
        are appended to the cells' names too. Give it as ``batch_key``, so that the modalities mix in latent space.

    Returns
    -------
    anndata.AnnData
        All cells, paired ones first, by genes and then regions; ``var["modality"]`` as it was.

    Raises
    ------
    ValueError
        If nothing tells genes from regions, or a data set shares no feature.

    Examples
    --------
    >>> import scvi_lite
    >>> both = scvi_lite.data.synthetic_iid(batch_size=20, n_genes=6)
    >>> both.var["modality"] = ["Gene Expression"] * 4 + ["Peaks"] * 2
    >>> joined = organize_multiome_anndatas(both[:30], both[30:36, :4], both[36:, 4:])
    >>> joined.obs["modality"].value_counts().tolist()
    [30, 6, 4]
    """
    from anndata import AnnData

    is_gene = genes_of(multi_anndata)
    if is_gene is None:
        raise ValueError(
            f"multi_anndata.var does not tell genes from regions. Write it: multi_anndata.var['modality'] = ..., with "
            f"{GENES!r} for genes and 'Peaks' for regions."
        )
    order = np.argsort(~is_gene, kind="stable")
    var, is_gene = multi_anndata.var.iloc[order], is_gene[order]
    if "modality" not in var:
        var = var.assign(modality=np.where(is_gene, GENES, "Peaks"))
    nothing = np.zeros_like(is_gene)
    sources = [
        ("paired", "multi_anndata", multi_anndata, ~nothing),
        ("expression", "rna_anndata", rna_anndata, is_gene),
        ("accessibility", "atac_anndata", atac_anndata, ~is_gene),
    ]
    parts, frames = [], []
    for kind, argument, adata, wanted in sources:
        if adata is not None:
            parts.append(_aligned(adata, var.index, wanted, argument))
            obs = adata.obs.assign(**{modality_key: kind})
            frames.append(obs.set_axis([f"{name}_{kind}" for name in obs.index]))
    return AnnData(sparse.vstack(parts, format="csr"), obs=pd.concat(frames), var=var)


def _aligned(adata: AnnData, names: pd.Index, wanted: np.ndarray, argument: str) -> sparse.csr_matrix:
    """The counts of the wanted features in the columns of ``names``; zeros elsewhere."""
    if not adata.var_names.is_unique:
        raise ValueError(f"{argument}.var_names repeat. Call {argument}.var_names_make_unique() first.")
    column = names.get_indexer(adata.var_names)
    column[column >= 0] = np.where(wanted[column[column >= 0]], column[column >= 0], -1)
    n_found = (column >= 0).sum()
    if n_found == 0:
        raise ValueError(
            f"{argument}: none of its {adata.n_vars} features is among those of multi_anndata, as {names[0]!r}. "
            "Names must be the same in all."
        )
    if n_found < wanted.sum():
        warn(f"{argument} lacks {wanted.sum() - n_found} of {wanted.sum()} features, which are zero in its cells.")
    csr = canonical((adata.to_memory() if adata.isbacked else adata).X)
    kept = np.flatnonzero(column >= 0)
    to_names = sparse.csr_matrix(
        (np.ones(len(kept), csr.dtype), (kept, column[kept])), shape=(adata.n_vars, len(names))
    )
    return csr @ to_names
