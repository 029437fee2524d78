"""What MULTIVI reads from an AnnData of genes and regions, or from a MuData."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from scvi_lite.analysis.accessibility import note_counts
from scvi_lite.data.fields import Matrix, columns_of_obs
from scvi_lite.data.modalities import read_modalities
from scvi_lite.data.proteins import Proteins, panels_of
from scvi_lite.data.regions import depth_field, two_matrices
from scvi_lite.errors import without_needless
from scvi_lite.model.base import arguments_of

if TYPE_CHECKING:
    from scvi_lite._typing import AnnData, Model, MuData


def setup_anndata(
    cls: type[Model],
    adata: AnnData,
    layer: str | None = None,
    batch_key: str | None = None,
    size_factor_key: str | None = None,
    categorical_covariate_keys: Sequence[str] | None = None,
    continuous_covariate_keys: Sequence[str] | None = None,
    protein_expression_obsm_key: str | None = None,
    protein_names_uns_key: str | None = None,
    labels_key: str | None = None,
) -> None:
    """Check the data and note what the model reads from them, in ``adata.uns["scvi_lite"]``.

    Parameters
    ----------
    adata
        Cells × genes and regions, the genes first: :func:`scvi_lite.data.organize_multiome_anndatas` makes it from
        up to three AnnDatas. A cell without any count of genes, or of regions, was not measured for them.
    layer
        Layer that holds the counts; ``adata.X`` by default.
    batch_key, labels_key
        Columns of ``adata.obs``: the batch to correct for, and the cell type (for gene-label dispersion).
    size_factor_key
        Column of positive factors to use instead of the library size of genes.
    categorical_covariate_keys, continuous_covariate_keys
        Columns of further covariates to correct for.
    protein_expression_obsm_key
        Key of ``adata.obsm`` with counts of proteins, if there are some. A protein that is zero in all cells of a
        batch was not measured there.
    protein_names_uns_key
        Key of ``adata.uns`` with their names; by default those of the data frame's columns.

    Raises
    ------
    KeyError
        If a column, a layer or a key does not exist.
    ValueError
        If counts are negative, NaN or infinite, values are missing, or names repeat.
    """
    given = arguments_of(locals())
    fields, keys = columns_of_obs(given), (protein_expression_obsm_key, protein_names_uns_key)
    if protein_expression_obsm_key is not None:
        fields.append(Proteins("proteins_np", *keys, panels=panels_of(fields)))
    cls._register(adata, [Matrix("x", layer), *fields], given)


def setup_mudata(
    cls: type[Model],
    mdata: MuData,
    rna_layer: str | None = None,
    atac_layer: str | None = None,
    protein_layer: str | None = None,
    batch_key: str | None = None,
    size_factor_key: str | Sequence[str] | None = None,
    categorical_covariate_keys: Sequence[str] | None = None,
    continuous_covariate_keys: Sequence[str] | None = None,
    idx_layer: str | None = None,
    modalities: Mapping[str, str | None] | None = None,
    labels_key: str | None = None,
) -> None:
    """Check the data and note what the model reads from them, in ``mdata.uns["scvi_lite"]``.

    Cells are matched by name, whatever their order in each modality. A cell that a modality does not have, or
    that has no count there, was not measured for it.

    Parameters
    ----------
    mdata
        RNA, chromatin and proteins as modalities, or some of them. Their cells may overlap in part, or not at all.
    rna_layer, atac_layer, protein_layer
        Layers that hold the counts; ``X`` by default.
    modalities
        In which modality to find what each argument names:
        ``{"rna_layer": "rna", "atac_layer": "atac", "batch_key": "rna"}``. One of the first two is needed, and
        what is not named is not modelled: proteins are with ``"protein_layer"``. Columns are looked for in
        ``mdata.obs`` by default.
    size_factor_key
        As in :meth:`setup_anndata`; or a list of two, of which the second is the depth of chromatin: the share of
        a cell's accessible regions that is found open, above 0 and up to 1.
    batch_key, labels_key, categorical_covariate_keys, continuous_covariate_keys
        Columns, as in :meth:`setup_anndata`.
    idx_layer
        Has no effect: a cell is known by its row.

    Raises
    ------
    TypeError
        If it is no MuData.
    KeyError
        If a modality, a column or a layer does not exist.
    ValueError
        If counts are negative, NaN or infinite, values are missing or disagree, or names repeat.
    """
    given = arguments_of(locals())
    del given["modalities"], given["idx_layer"]
    without_needless({"idx_layer": idx_layer}, {"idx_layer": "a cell is known by its row"})
    where = read_modalities(mdata, modalities, given)
    x, peaks = two_matrices(mdata, rna_layer, atac_layer, where)
    keys = [size_factor_key] if size_factor_key is None or isinstance(size_factor_key, str) else size_factor_key
    if not 1 <= len(keys) <= 2:
        raise ValueError(f"size_factor_key={keys!r}: give a column for RNA, or [one for RNA, one for chromatin].")
    fields = columns_of_obs(given | {"size_factor_key": keys[0]}, where)
    if len(keys) == 2:
        fields.append(depth_field(mdata, keys[1], where["size_factor_key"]))
    if (modality := where["protein_layer"]) is not None:
        panels = panels_of(fields)
        fields.append(Proteins("proteins_np", layer=protein_layer, modality=modality, panels=panels))
    cls._register(mdata, [x, peaks, *fields], given | {"modalities": where})
    if where["atac_layer"] is not None:
        note_counts(peaks.read(mdata, peaks.state(layer=atac_layer)))
