"""Genes with more zeros than a Poisson of their mean would have (Andrews & Hemberg 2019, M3Drop).

doi:10.1093/bioinformatics/bty1044
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from scvi_lite.data.checks import check_counts, has_fractions, value_blocks
from scvi_lite.data.fields import Categorical, Matrix
from scvi_lite.data.modalities import check_anndata
from scvi_lite.data.rows import Rows
from scvi_lite.errors import check_options, check_whole, without_needless

if TYPE_CHECKING:
    from anndata import AnnData

BLOCK = 1 << 22  # numbers of a block of totals × genes: 32 MiB
NEEDLESS = {
    "n_samples": "the probability has a closed form, and nothing is sampled",
    "minibatch_size": "blocks are chosen by their size in memory",
    "accelerator": "this takes about a second on the CPU",
    "device": "this takes about a second on the CPU",
    "silent": "there is no progress to show",
}


def poisson_gene_selection(
    adata: AnnData,
    layer: str | None = None,
    n_top_genes: int = 4000,
    subset: bool = False,
    inplace: bool = True,
    batch_key: str | None = None,
    **needless: Any,
) -> pd.DataFrame | None:
    """Choose the genes that have more zeros than Poisson counts of the same mean.

    A Poisson whose rate is a gene's share of all counts times a cell's total has in cell n a zero with probability
    exp(-share · total_n). With p the observed share of zeros and q the mean of these, genes are ranked by p · (1 - q),
    the probability that a cell drawn from the data has a zero where one drawn from the Poisson has none.

    Parameters
    ----------
    adata
        Counts of cells × genes.
    layer
        Layer that holds them; ``adata.X`` by default.
    n_top_genes
        How many genes to choose.
    subset
        Keep the chosen genes alone in ``adata``.
    inplace
        Write the columns to ``adata.var``; else give them.
    batch_key
        Column of ``adata.obs``: rank the genes within each batch, and choose by the median rank.
    **needless
        Options of scvi-tools without a use here, which may be given.

    Returns
    -------
    pandas.DataFrame or None
        For each gene ``highly_variable``, ``observed_fraction_zeros`` and ``expected_fraction_zeros`` (means over
        batches), ``prob_zero_enriched_nbatches`` (in how many batches it is at the top), ``prob_zero_enrichment`` and
        ``prob_zero_enrichment_rank`` (medians over batches; the highest rank is the most enriched).

    Raises
    ------
    KeyError
        If the column or layer does not exist.
    ValueError
        If the matrix holds no counts, as fractions or negative numbers are none, or ``n_top_genes`` is out of range.
    TypeError
        If an option does not exist.

    Examples
    --------
    >>> import scvi_lite
    >>> adata = scvi_lite.data.synthetic_iid(n_genes=50)
    >>> scvi_lite.data.poisson_gene_selection(adata, n_top_genes=10, batch_key="batch")
    >>> int(adata.var["highly_variable"].sum())
    10
    """
    known = ("layer", "n_top_genes", "subset", "inplace", "batch_key")
    check_options("poisson_gene_selection()", without_needless(needless, NEEDLESS), known)
    check_anndata(adata)
    check_whole(n_top_genes=n_top_genes)
    batch_n = Categorical.read(adata, Categorical("batch_n", "batch_key", batch_key).register(adata))
    counts = Matrix.read(adata, {"layer": layer})
    where = "adata.X" if layer is None else f"adata.layers[{layer!r}]"
    check_counts(counts, where, counts=False)
    if any(has_fractions(block) or (block < 0).any() for block in value_blocks(counts)):
        raise ValueError(
            f"{where} holds fractions or negative numbers, and zeros among raw counts are looked at. If the counts are "
            "elsewhere, name their layer: layer=..."
        )
    observed_bg, expected_bg = zeros(Rows(counts), batch_n)
    enrichment_bg = observed_bg * (1 - expected_bg)
    rank_bg = enrichment_bg.argsort(1, kind="stable").argsort(1, kind="stable")
    rank_g = np.median(rank_bg, 0)
    n_enriched_g = (rank_bg >= rank_bg.shape[1] - n_top_genes).sum(0)
    chosen_g = np.zeros(len(rank_g), dtype=bool)
    chosen_g[np.lexsort((-n_enriched_g, -rank_g))[:n_top_genes]] = True
    columns = pd.DataFrame(
        {
            "highly_variable": chosen_g,
            "observed_fraction_zeros": observed_bg.mean(0).astype(np.float32),
            "expected_fraction_zeros": expected_bg.mean(0).astype(np.float32),
            "prob_zero_enriched_nbatches": n_enriched_g,
            "prob_zero_enrichment": np.median(enrichment_bg, 0).astype(np.float32),
            "prob_zero_enrichment_rank": rank_g,
        },
        index=adata.var_names,
    )
    if not inplace:
        return columns[columns["highly_variable"]] if subset else columns
    adata.uns["hvg"] = {"flavor": "poisson_zeros"}
    for name, column in columns.items():
        adata.var[name] = column
    if subset:
        adata._inplace_subset_var(chosen_g)
    return None


def zeros(rows: Rows, batch_n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Observed shares of zeros, and those of a Poisson of the same mean, in each batch: (b, g) float64 each.

    >>> observed, expected = zeros(Rows(np.array([[0, 2], [2, 0]])), np.array([0, 0]))
    >>> observed.tolist(), expected.round(3).tolist()
    ([[0.5, 0.5]], [[0.368, 0.368]])
    """
    n_batches, (n_cells, n_genes) = batch_n.max() + 1, rows.shape
    sum_bg, filled_bg, total_n = np.zeros((n_batches, n_genes)), np.zeros((n_batches, n_genes)), np.zeros(n_cells)
    for cells in rows.blocks():
        x_ng = rows[cells]
        total_n[cells] = np.ravel(x_ng.sum(1, dtype=np.float64))
        where = np.repeat(batch_n[cells], np.diff(x_ng.indptr)) * n_genes + x_ng.indices
        sum_bg += np.bincount(where, x_ng.data, n_batches * n_genes).reshape(n_batches, n_genes)
        filled_bg += np.bincount(where, minlength=n_batches * n_genes).reshape(n_batches, n_genes)
    size_b = np.bincount(batch_n)
    expected = [expected_zeros(sum_g / max(sum_g.sum(), 1), total_n[batch_n == b]) for b, sum_g in enumerate(sum_bg)]
    return 1 - filled_bg / size_b[:, None], np.stack(expected)


def expected_zeros(share_g: np.ndarray, total_n: np.ndarray) -> np.ndarray:
    """Mean over cells of exp(-share · total), (g,)."""
    total, n_times = np.unique(total_n, return_counts=True)  # many cells have the same total
    zeros_g = np.zeros(len(share_g))
    for start in range(0, len(total), max(1, BLOCK // len(share_g))):
        part = slice(start, start + max(1, BLOCK // len(share_g)))
        zeros_g += n_times[part] @ np.exp(-total[part, None] * share_g)
    return zeros_g / len(total_n)
