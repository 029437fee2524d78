"""Which columns are genes and which are regions: of one matrix that holds both, or of two modalities."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from numbers import Integral
from typing import TYPE_CHECKING

from scvi_lite.data.fields import Continuous, Matrix
from scvi_lite.data.modalities import part_of
from scvi_lite.data.multiome import GENES, genes_of
from scvi_lite.data.registry import Registry
from scvi_lite.errors import listing, warn

if TYPE_CHECKING:
    from scvi_lite._typing import AnnData, Data, MuData


def count_genes(adata: AnnData, n_genes: int | None, n_regions: int | None) -> int:
    """How many of the first variables are genes.

    Raises
    ------
    ValueError
        If the numbers do not fit the data, or nothing tells.
    """
    if n_genes is None and n_regions is None:
        is_gene = genes_of(adata)
        if is_gene is None:
            raise ValueError(
                "Which variables are genes? Give MULTIVI(adata, n_genes=..., n_regions=...), of which genes come "
                f'first, or write {GENES!r} or "Peaks" in adata.var["modality"].'
            )
        n_genes = int(is_gene.sum())
        if not is_gene[:n_genes].all():
            raise ValueError(
                "Genes and regions are mixed, and genes must come first. Call "
                "adata = scvi_lite.data.organize_multiome_anndatas(adata), and setup_anndata again."
            )
    n_genes = adata.n_vars - n_regions if n_genes is None else n_genes
    n_regions = adata.n_vars - n_genes if n_regions is None else n_regions
    if n_genes < 0 or n_regions < 0 or n_genes + n_regions != adata.n_vars:
        raise ValueError(f"n_genes={n_genes} and n_regions={n_regions} do not add up to the {adata.n_vars} variables.")
    return int(n_genes)


def with_regions(registry: Registry, n_genes: int) -> Registry:
    """The setup of one matrix of genes and regions as a setup of two."""
    x = registry.fields["x"]
    peaks = {"peaks": x | {"columns": [n_genes, registry.n_features]}}
    return replace(registry, fields=registry.fields | {"x": x | {"columns": [0, n_genes]}} | peaks)


def two_matrices(
    mdata: MuData, rna_layer: str | None, atac_layer: str | None, where: Mapping[str, str | None]
) -> tuple[Matrix, Matrix]:
    """The counts of genes and of regions; what is absent is no columns of the other.

    Raises
    ------
    ValueError
        If neither is named, or both are in one modality.
    """
    rna, atac = where["rna_layer"], where["atac_layer"]
    if rna is None and atac is None:
        raise ValueError(
            "modalities names neither RNA nor chromatin, and MULTIVI needs one of them. Write "
            f"modalities={{'rna_layer': ..., 'atac_layer': ...}}, with {listing(mdata.mod)} for the dots."
        )
    if rna == atac:
        raise ValueError(
            f"modalities: rna_layer and atac_layer are both for {rna!r}, and two modalities are needed, of "
            f"{listing(mdata.mod)}. Leave out the one that there is not."
        )
    x, peaks = Matrix("x", rna_layer, modality=rna), Matrix("peaks", atac_layer, modality=atac)
    if rna is None:
        x = Matrix("x", atac_layer, modality=atac, columns=[0, 0])
    if atac is None:
        peaks = Matrix("peaks", rna_layer, modality=rna, columns=[0, 0])
    return x, peaks


def depth_field(mdata: MuData, key: str, modality: str | None) -> Continuous:
    """The column of given depths.

    Raises
    ------
    ValueError
        If some are no shares.
    """
    depth = Continuous("depth_n", "size_factor_key", key, True, modality)
    if (largest := depth.read(mdata, depth.register(mdata)).max()) > 1:
        raise ValueError(
            f"size_factor_key: {key!r} is for chromatin, the share of a cell's accessible regions that is found, and "
            f"has values up to {largest:g}. Divide them by their maximum."
        )
    return depth


def first_columns(adata: Data, registry: Registry, name: str, field: str, n: int | None) -> Registry:
    """The setup with only the first columns of a matrix, where the user gave a smaller number.

    Raises
    ------
    ValueError
        If there are fewer, or it is no number of columns.
    """
    state = registry.fields[field]
    first, end = state.get("columns") or (0, part_of(adata, state.get("modality")).n_vars)
    if n is None or n == end - first:
        return registry
    if isinstance(n, bool) or not isinstance(n, Integral) or not 0 < n < end - first:
        raise ValueError(f"{name}={n!r}: the data have {end - first}. Leave it out of the call.")
    warn(f"{name}={n} of {end - first} in the data: the others are not read. Leave {name} out to model all.")
    return replace(registry, fields=registry.fields | {field: state | {"columns": [first, first + int(n)]}})
