"""What TOTALVI reads from an AnnData, or from a MuData."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from scvi_lite.data.fields import Matrix, columns_of_obs
from scvi_lite.data.modalities import read_modalities
from scvi_lite.data.proteins import Proteins, panels_of
from scvi_lite.model.base import arguments_of

if TYPE_CHECKING:
    from scvi_lite._typing import AnnData, Model, MuData


def setup_anndata(
    cls: type[Model],
    adata: AnnData,
    protein_expression_obsm_key: str,
    protein_names_uns_key: str | None = None,
    batch_key: str | None = None,
    panel_key: str | None = None,
    layer: str | None = None,
    size_factor_key: str | None = None,
    categorical_covariate_keys: Sequence[str] | None = None,
    continuous_covariate_keys: Sequence[str] | None = None,
    labels_key: str | None = None,
) -> None:
    """Check the data and note what the model reads from them, in ``adata.uns["scvi_lite"]``.

    Parameters
    ----------
    adata
        Raw counts of cells × genes: sparse, dense or backed.
    protein_expression_obsm_key
        Key of ``adata.obsm`` with raw counts of proteins: a data frame, or an array. A protein that is zero in all
        cells of a batch (or panel) was not measured there.
    protein_names_uns_key
        Key of ``adata.uns`` with their names; by default those of the data frame's columns.
    batch_key, labels_key
        Columns of ``adata.obs``: the batch to correct for, and the cell type (for dispersions by label).
    panel_key
        Column of ``adata.obs`` with the panel of antibodies, each with a background of its own; the batch by
        default.
    layer
        Layer that holds the counts of genes; ``adata.X`` by default.
    size_factor_key
        Column of positive factors to use instead of the library size of the genes.
    categorical_covariate_keys, continuous_covariate_keys
        Columns of further covariates to correct for.

    Raises
    ------
    KeyError
        If a column, a layer or a key does not exist.
    ValueError
        If counts are negative, NaN or infinite, all proteins are zero, values are missing, or names repeat.
    """
    given = arguments_of(locals())
    of_obs = columns_of_obs(given)
    counted = Proteins("proteins_np", protein_expression_obsm_key, protein_names_uns_key, panels=panels_of(of_obs))
    cls._register(adata, [Matrix("x", layer), counted, *of_obs], given)


def setup_mudata(
    cls: type[Model],
    mdata: MuData,
    rna_layer: str | None = None,
    protein_layer: str | None = None,
    batch_key: str | None = None,
    panel_key: str | None = None,
    size_factor_key: str | None = None,
    categorical_covariate_keys: Sequence[str] | None = None,
    continuous_covariate_keys: Sequence[str] | None = None,
    modalities: Mapping[str, str | None] | None = None,
    labels_key: str | None = None,
) -> None:
    """Check the data and note what the model reads from them, in ``mdata.uns["scvi_lite"]``.

    Cells are matched by name, whatever their order in each modality. One without proteins counts as not measured.

    Parameters
    ----------
    mdata
        RNA and proteins as two modalities.
    rna_layer, protein_layer
        Layers that hold the counts; ``X`` by default.
    modalities
        In which modality to find what each argument names:
        ``{"rna_layer": "rna", "protein_layer": "protein", "batch_key": "rna"}``. The first two are needed; columns
        are looked for in ``mdata.obs`` by default.
    batch_key, labels_key, panel_key, size_factor_key, categorical_covariate_keys, continuous_covariate_keys
        Columns, as in :meth:`setup_anndata`.

    Raises
    ------
    TypeError
        If it is no MuData.
    KeyError
        If a modality, a column or a layer does not exist.
    ValueError
        If counts are negative, NaN or infinite, values are missing or disagree, or names repeat.

    Examples
    --------
    >>> import scvi_lite
    >>> TOTALVI = scvi_lite.model.TOTALVI
    >>> mdata = scvi_lite.data.synthetic_iid(n_genes=20, return_mudata=True)
    >>> where = {"rna_layer": "rna", "protein_layer": "protein_expression"}
    >>> TOTALVI.setup_mudata(mdata, batch_key="batch", modalities=where)
    >>> TOTALVI(mdata, n_hidden=8)
    TOTALVI(...), not trained, on 400 cells × 220 features
    """
    given = arguments_of(locals())
    del given["modalities"]
    where = read_modalities(mdata, modalities, given, needed=("rna_layer", "protein_layer"))
    of_obs = columns_of_obs(given, where)
    genes = Matrix("x", rna_layer, modality=where["rna_layer"])
    counted = Proteins("proteins_np", layer=protein_layer, modality=where["protein_layer"], panels=panels_of(of_obs))
    cls._register(mdata, [genes, counted, *of_obs], given | {"modalities": where})
