"""Real counts that need no download, and counts without structure; `simulator` has those with a known truth.

The real data are peripheral blood cells of Zheng et al., Nat. Commun. 8, 14049 (2017), as shipped with scanpy.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from scvi_lite.data.simulator import numbered, simulate
from scvi_lite.errors import check_choice, check_options

if TYPE_CHECKING:
    from scvi_lite._typing import AnnData, MuData

__all__ = ["pbmc68k_reduced", "simulate", "synthetic_iid"]

#: What :func:`synthetic_iid` calls things, unless told otherwise.
NAMES = {
    "batch_key": "batch",
    "labels_key": "labels",
    "rna_key": "rna",
    "gene_names_prefix": "gene",
    "protein_expression_key": "protein_expression",
    "protein_names_key": "protein_names",
    "protein_names_prefix": "protein",
    "accessibility_key": "accessibility",
    "region_names_prefix": "region",
    "coordinates_key": "coordinates",
}
SPARSE_FORMATS = {kind.__name__: kind for kind in (sp.csr_matrix, sp.csc_matrix, sp.csr_array, sp.csc_array)}


def pbmc68k_reduced() -> AnnData:
    """Counts of 700 blood cells by 765 genes, with the cell types in ``obs["bulk_labels"]``.

    scanpy ships them as log1p(count / total * 10,000), rounded to three decimals; ``n_counts`` keeps the totals (over
    all genes, of which these 765 are a part), so that the counts can be recovered: they come out within 0.11 of an
    integer, and are rounded.

    Returns
    -------
    AnnData
        ``X``: (700, 765) integer counts, float32 CSR; ``obs``: the annotation that came with the data.

    Examples
    --------
    >>> adata = pbmc68k_reduced()
    >>> adata.shape, adata.X.max().item(), adata.obs["bulk_labels"].nunique()
    ((700, 765), 259.0, 10)
    """
    from anndata import AnnData

    counts, obs, genes = _unrounded_pbmc68k()
    counts.data = np.rint(counts.data).astype(np.float32)
    return AnnData(counts, obs=obs, var=pd.DataFrame(index=genes))


def _unrounded_pbmc68k() -> tuple[sp.csr_matrix, pd.DataFrame, pd.Index]:
    """The counts before they are rounded (float64 CSR), ``obs``, and the names of the genes."""
    import scanpy

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the file is older than the format that anndata reads without a word
        shipped = scanpy.datasets.pbmc68k_reduced()
    counts = sp.csr_matrix(shipped.raw.X, dtype=np.float64)
    total_m = np.repeat(shipped.obs["n_counts"].to_numpy(np.float64), np.diff(counts.indptr))
    counts.data = np.expm1(counts.data) * total_m / 1e4
    obs = shipped.obs.copy()
    obs.index.name = None
    return counts, obs, pd.Index(shipped.raw.var_names, name=None)


def synthetic_iid(
    batch_size: int = 200,
    n_genes: int = 100,
    n_proteins: int = 100,
    n_regions: int = 100,
    n_batches: int = 2,
    n_labels: int = 3,
    dropout_ratio: float = 0.7,
    sparse_format: str | None = None,
    generate_coordinates: bool = False,
    return_mudata: bool = False,
    seed: int | None = None,
    rna_dist: str = "nb",
    **names: str,
) -> AnnData | MuData:
    """Independent counts without any structure, to try interfaces with.

    Genes and regions are negative binomial (mean 35/3, inverse dispersion 5), each entry kept with probability
    ``dropout_ratio``; proteins are negative binomial. Batches and labels say nothing about the counts.
    Names and keys are those of ``scvi.data.synthetic_iid``.

    Parameters
    ----------
    batch_size
        Cells per batch.
    n_genes, n_proteins, n_regions
        Features; 0 leaves proteins or regions away.
    n_batches, n_labels
        Categories in ``obs["batch"]`` and ``obs["labels"]``; without labels there is no such column.
    dropout_ratio
        Probability that a gene's or a region's count is kept.
    sparse_format
        ``"csr_matrix"``, ``"csc_matrix"``, ``"csr_array"`` or ``"csc_array"``; None makes dense arrays.
    generate_coordinates
        Add standard normal positions, ``obsm["coordinates"]`` (n, 2).
    return_mudata
        Return a MuData with modalities ``rna``, ``accessibility`` and ``protein_expression``, instead of an AnnData
        with ``obsm["accessibility"]``, ``obsm["protein_expression"]`` and ``uns["protein_names"]``.
    seed
        None draws from NumPy's global random state.
    rna_dist
        ``"normal"``: expression that is no counts, normal (mean 5, standard deviation 2), and zero where not kept.
    **names
        Other keys and names: ``batch_key``, ``labels_key``, ``rna_key``, ``accessibility_key``,
        ``protein_expression_key``, ``protein_names_key``, ``coordinates_key``, ``gene_names_prefix``,
        ``region_names_prefix``, ``protein_names_prefix``.

    Raises
    ------
    TypeError
        For an option that there is not.
    ValueError
        For a ``sparse_format`` or ``rna_dist`` that there is not, or fewer than one batch, cell or gene.

    Examples
    --------
    >>> adata = synthetic_iid(batch_size=50, n_genes=20, seed=0)
    >>> adata.shape, list(adata.obs), list(adata.obsm)
    ((100, 20), ['batch', 'labels'], ['accessibility', 'protein_expression'])
    """
    from anndata import AnnData

    if sparse_format is not None:
        check_choice(SPARSE_FORMATS, "a sparse format", "Formats", sparse_format=sparse_format)
    check_choice(("nb", "normal"), rna_dist=rna_dist)
    if min(batch_size, n_batches, n_genes) < 1:
        raise ValueError("synthetic_iid needs batch_size, n_batches and n_genes of at least 1.")
    check_options("synthetic_iid()", names, NAMES)
    name = NAMES | names
    rna, atac, protein = name["rna_key"], name["accessibility_key"], name["protein_expression_key"]
    rng = np.random.default_rng(np.random.randint(2**31) if seed is None else seed)
    n_cells = batch_size * n_batches

    def negative_binomial(n_features: int) -> np.ndarray:
        return rng.negative_binomial(5, 0.3, size=(n_cells, n_features))

    def keep(value_nf: np.ndarray) -> np.ndarray:
        return value_nf * rng.binomial(1, dropout_ratio, size=value_nf.shape)

    def stored(value_nf: np.ndarray) -> Any:
        return value_nf if sparse_format is None else SPARSE_FORMATS[sparse_format](value_nf)

    features = {rna: numbered(name["gene_names_prefix"], n_genes)}
    x_ng = negative_binomial(n_genes) if rna_dist == "nb" else rng.normal(5, 2, size=(n_cells, n_genes))
    values = {rna: stored(keep(x_ng))}
    if n_regions > 0:
        features[atac] = numbered(name["region_names_prefix"], n_regions)
        values[atac] = stored(keep(negative_binomial(n_regions)))
    if n_proteins > 0:
        features[protein] = numbered(name["protein_names_prefix"], n_proteins)
        values[protein] = stored(negative_binomial(n_proteins))

    obs = pd.DataFrame(index=[str(i) for i in range(n_cells)])
    obs[name["batch_key"]] = pd.Categorical(np.repeat(numbered("batch", n_batches), batch_size))
    if n_labels > 0:
        obs[name["labels_key"]] = pd.Categorical(rng.choice(numbered("label", n_labels), size=n_cells))
    coordinates = {name["coordinates_key"]: rng.normal(size=(n_cells, 2))} if generate_coordinates else {}

    if return_mudata:
        return _as_mudata(values, features, obs, coordinates)
    uns = {name["protein_names_key"]: features[protein]} if n_proteins > 0 else {}
    var = pd.DataFrame(index=features[rna])
    return AnnData(values.pop(rna), obs=obs, var=var, obsm={**values, **coordinates}, uns=uns)


def _as_mudata(counts: dict, names: dict, obs: pd.DataFrame, obsm: dict) -> MuData:
    from anndata import AnnData
    from mudata import MuData, set_options

    cells = pd.DataFrame(index=obs.index)
    with set_options(pull_on_update=False):
        mdata = MuData(
            {key: AnnData(counts[key], obs=cells.copy(), var=pd.DataFrame(index=names[key])) for key in counts}
        )
    mdata.obs = obs
    for key, value in obsm.items():
        mdata.obsm[key] = value
    return mdata
