"""Mapping new data onto a reference: scArches (Lotfollahi et al. 2022, doi:10.1038/s41587-021-01001-7)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from torch import Tensor

from scvi_lite.analysis.minify import setup_for_counts
from scvi_lite.data.genes import replace_modalities
from scvi_lite.data.modalities import check_data, is_mudata
from scvi_lite.data.query import extend, fill_genes, without_cells
from scvi_lite.data.registry import Registry, note
from scvi_lite.errors import warn, without_absent
from scvi_lite.io.restore import load_weights
from scvi_lite.model.base import ABSENT, Model
from scvi_lite.model.files import from_saved, read_saved, to_saved
from scvi_lite.nn.module import Module
from scvi_lite.nn.surgery import Freeze, choose_frozen, grow
from scvi_lite.train.devices import choose_device

if TYPE_CHECKING:
    from scvi_lite._typing import AnnData, MuData, SavedModel


def prepare_query_anndata(
    adata: AnnData, reference_model: Model | str | Path, return_reference_var_names: bool = False, inplace: bool = True
) -> AnnData | pd.Index | None:
    """Give new data the genes of a reference, in its order: others are left out, missing ones filled with zeros.

    Parameters
    ----------
    adata
        The query. Sparse counts stay sparse; layers are treated as ``X`` is, ``raw`` is kept.
    reference_model
        A model, or the folder it was saved to.
    return_reference_var_names
        Only give the names of the reference's genes.
    inplace
        Change ``adata``; else give a new AnnData.

    Returns
    -------
    Nothing; or the new AnnData, or the names.

    Raises
    ------
    ValueError
        If less than a quarter of the reference's genes are there. If they seem to be there under other names (with the
        versions of Ensembl ids, in another case, in a column of ``adata.var``), the message has the call that renames
        them; so has the warning when some are missing.

    Examples
    --------
    >>> import scvi_lite
    >>> SCVI = scvi_lite.model.SCVI
    >>> reference = scvi_lite.data.synthetic_iid(batch_size=50, n_genes=20)
    >>> SCVI.setup_anndata(reference, batch_key="batch")
    >>> query = scvi_lite.data.synthetic_iid(batch_size=50, n_genes=30)[:, ::-1].copy()
    >>> SCVI.prepare_query_anndata(query, SCVI(reference))
    >>> query.var_names.equals(reference.var_names)
    True
    """
    var_names = _reference(reference_model).var_names
    if isinstance(var_names, dict):
        raise ValueError("reference_model was set up with a MuData: call prepare_query_mudata(mdata, reference_model).")
    if return_reference_var_names:
        return pd.Index(var_names)
    check_data(adata, ())
    if inplace and adata.isbacked:
        raise ValueError("inplace=True: a backed file is not changed. Give inplace=False, or adata.to_memory().")
    filled = fill_genes(adata, var_names)
    if not inplace:
        return filled
    adata._init_as_actual(filled)
    return None


def prepare_query_mudata(
    mdata: MuData, reference_model: Model | str | Path, return_reference_var_names: bool = False, inplace: bool = True
) -> MuData | dict[str, pd.Index] | None:
    """Give each modality of new data the features of a reference: see :meth:`prepare_query_anndata`.

    A modality that the query does not have is added without cells: it counts as not measured for any of them.

    Parameters
    ----------
    mdata
        The query.
    reference_model
        A model, or the folder it was saved to.
    return_reference_var_names
        Only give the names of the reference's features, by modality.
    inplace
        Change ``mdata``; else give a new MuData.

    Returns
    -------
    Nothing; or the new MuData, or the names.

    Raises
    ------
    KeyError
        If no modality of the reference is there.
    ValueError
        If less than a quarter of the features of one are there, or the reference was set up with an AnnData.
    """
    reference = _reference(reference_model)
    var_names = reference.var_names
    if not isinstance(var_names, dict):
        raise ValueError("reference_model was set up with an AnnData: call prepare_query_anndata(adata, ...).")
    if return_reference_var_names:
        return {modality: pd.Index(names) for modality, names in var_names.items()}
    there = set(var_names) & set(mdata.mod) if is_mudata(mdata) else ()
    check_data(mdata, there or var_names)
    registry = setup_for_counts(Registry.from_dict(reference.registry))
    layers = {modality: registry.fields[field]["layer"] for field, modality in registry.modalities.items()}
    parts = {}
    for modality, names in var_names.items():
        if modality in there:
            parts[modality] = fill_genes(mdata.mod[modality], names)
        else:
            warn(f"mdata has no modality {modality!r}: none of its cells counts as measured for it.")
            parts[modality] = without_cells(names, layers[modality])
    filled = replace_modalities(mdata, parts)
    if not inplace:
        return filled
    mdata._init_as_actual(filled)
    return None


def load_query_data(
    cls: type[Model],
    adata: AnnData | None = None,
    reference_model: Model | str | Path | None = None,
    inplace_subset_query_vars: bool = False,
    accelerator: str = "auto",
    device: int | str = "auto",
    unfrozen: bool = False,
    freeze_dropout: bool = False,
    freeze_expression: bool = True,
    freeze_decoder_first_layer: bool = True,
    freeze_batchnorm_encoder: bool = True,
    freeze_batchnorm_decoder: bool = False,
    freeze_classifier: bool = True,
    transfer_batch: bool = True,
    **absent: Any,
) -> Any:
    """A model of new data on top of a trained reference, whose cells are not needed.

    The query's batches, and its new categories of other categorical covariates, get weights of their own beside those
    of the reference, which stay as they are. Train the model with ``train(max_epochs=...,
    plan_kwargs={"weight_decay": 0.0})``; for cells of the reference it goes on answering as before, in latent space
    always, and in expression if ``freeze_batchnorm_decoder`` is True. Whether the encoder sees the query's batches is
    a matter of the reference: make it with ``encode_covariates=True`` to have it adapt.

    Parameters
    ----------
    adata
        The query: the genes of the reference (see :meth:`prepare_query_anndata`) and the columns of ``obs`` that it was
        set up with. ``setup_anndata`` is not needed. Labels may be absent.
    reference_model
        A model, or the folder it was saved to, by scvi-tools too; minified, or without data, or itself made by this
        function.
    inplace_subset_query_vars
        Leave out genes that the reference does not know, and restore its order, in ``adata`` itself, not in a copy.
    accelerator, device
        Where to put the model; a GPU if there is one.
    unfrozen
        Train all weights. The options that follow then have no effect.
    freeze_dropout
        No dropout in training.
    freeze_expression
        The weights from genes (and continuous covariates) to the first layer of the encoder stay. If not, the latent
        space moves.
    freeze_decoder_first_layer
        The weights from latent space to the first layer of the decoder stay.
    freeze_batchnorm_encoder, freeze_batchnorm_decoder
        Batch norm keeps its weights and works, in training too, with the mean and the variance of the reference.
    freeze_classifier
        The classifier of labels stays, where there is one.
    transfer_batch
        Whether the query may have batches that the reference does not know.
    **absent
        Options of scvi-tools without a use here, which may be None.

    Returns
    -------
    The model, not trained yet. Until it is, a new batch counts as the mean of the reference's batches.

    Raises
    ------
    KeyError
        If a column that the reference reads is not there.
    TypeError
        If ``adata`` or ``reference_model`` is something else, or an option does not exist.
    ValueError
        If the reference is of another class, genes are missing, or the query does not fit.

    Examples
    --------
    >>> import scvi_lite
    >>> SCVI = scvi_lite.model.SCVI
    >>> reference, query = (scvi_lite.data.synthetic_iid(batch_size=50, n_genes=20) for _ in range(2))
    >>> SCVI.setup_anndata(reference, batch_key="batch")
    >>> model = SCVI(reference, encode_covariates=True)
    >>> model.train(max_epochs=1, enable_progress_bar=False)
    >>> query.obs["batch"] = "query"
    >>> mapped = SCVI.load_query_data(query, model)
    >>> mapped.train(max_epochs=1, plan_kwargs={"weight_decay": 0.0}, enable_progress_bar=False)
    >>> mapped.summary_stats["n_batch"], mapped.get_latent_representation().shape
    (3, (100, 10))
    """
    asked = {name.removeprefix("freeze_"): on for name, on in locals().items() if name.startswith("freeze_")}
    without_absent("load_query_data()", absent, ABSENT, list(signature(load_query_data).parameters)[1:-1])
    saved = _reference(reference_model)
    if saved.class_name != cls.__name__:
        raise ValueError(
            f"reference_model is a {saved.class_name}: map onto it with {saved.class_name}.load_query_data(...)."
        )
    old = setup_for_counts(Registry.from_dict(saved.registry))
    check_data(adata, old.modalities.values())
    if inplace_subset_query_vars and not old.modalities and set(saved.var_names) <= set(adata.var_names):
        adata._inplace_subset_var(saved.var_names)
    new = extend(old, adata, transfer_batch, needs_labels=saved.arguments.get("dispersion") == "gene-label")

    def load(module: Module, state: Mapping[str, Tensor]) -> None:
        weights, n_old = grow(module, state, old.n_categories, new.n_categories)
        load_weights(module, weights)
        if not unfrozen:
            module.freeze(choose_frozen(module, n_old, Freeze(**asked)))

    untrained = replace(saved, registry=new.to_dict(), history={}, indices={}, is_trained=False, frozen={})
    model = from_saved(cls, untrained, adata, load)
    note(new, model.adata)
    if not saved.is_trained:
        warn("reference_model is not trained: its latent space is random. Call its train() first.")
    model._is_query = True
    model.is_trained = saved.is_trained and not any(p.requires_grad for p in model.module.parameters())
    model.to_device(choose_device(accelerator, device))
    return model


def _reference(reference_model: Model | str | Path | None) -> SavedModel:
    """The reference as plain data."""
    if isinstance(reference_model, Model):
        return to_saved(reference_model)
    if isinstance(reference_model, str | Path):
        return read_saved(reference_model)
    kind = type(reference_model).__name__
    raise TypeError(f"reference_model is a {kind}: a model is needed, or the folder that it was saved to.")
