"""What SCANVI takes over from a trained SCVI."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from scvi_lite.analysis import minify
from scvi_lite.data import registry as registries
from scvi_lite.data.genes import match_genes
from scvi_lite.data.labels import Labels
from scvi_lite.errors import StateError, listing, warn

if TYPE_CHECKING:
    from torch import Tensor

    from scvi_lite._typing import SCANVI, SCVI, AnnData, Registry

S = TypeVar("S", bound="SCANVI")


def from_scvi_model(
    cls: type[S],
    scvi_model: SCVI,
    unlabeled_category: str,
    labels_key: str | None = None,
    adata: AnnData | None = None,
    **scanvi_kwargs: Any,
) -> S:
    """Go on from a trained SCVI, whose options, setup and weights are taken over.

    Parameters
    ----------
    scvi_model
        The model: trained here, loaded, or minified (then with counts kept, or with ``adata``).
    unlabeled_category
        What the column of labels holds for cells without one.
    labels_key
        Column of ``obs`` with the labels; by default the one that ``scvi_model`` was set up with.
    adata
        Cells to go on with; those of ``scvi_model`` by default. Set up for SCANVI by this call.
    **scanvi_kwargs
        Options that SCVI does not have: ``linear_classifier``, ``classifier_parameters``, ``y_prior``. Others are
        those of ``scvi_model``; where they are given and differ, a warning says so.

    Raises
    ------
    TypeError
        If ``scvi_model`` is not an SCVI, or an option does not exist.
    ValueError
        If there is no ``labels_key``, the cells do not fit ``scvi_model``, or that has dispersions of other labels.
    RuntimeError
        If ``scvi_model`` has no counts.

    Examples
    --------
    >>> import scvi_lite
    >>> adata = scvi_lite.data.synthetic_iid(batch_size=50, n_genes=20)
    >>> SCANVI = scvi_lite.model.SCANVI
    >>> scvi_lite.model.SCVI.setup_anndata(adata, batch_key="batch", labels_key="labels")
    >>> reference = scvi_lite.model.SCVI(adata, n_latent=5)
    >>> reference.train(max_epochs=1, enable_progress_bar=False)
    >>> model = SCANVI.from_scvi_model(reference, unlabeled_category="label_2")
    >>> model.train(max_epochs=1, enable_progress_bar=False)
    >>> sorted(set(model.predict()) - {"label_0", "label_1"})
    []
    """
    from scvi_lite.model.scvi import SCVI

    if not isinstance(scvi_model, SCVI):
        raise TypeError(f"scvi_model is a {type(scvi_model).__name__}; a trained SCVI is needed.")
    scvi_model._warn_if_untrained()
    taken_over = dict(scvi_model._arguments)
    for name in taken_over.keys() & scanvi_kwargs.keys():
        if scanvi_kwargs.pop(name) != taken_over[name]:
            warn(f"{name} is that of scvi_model, {taken_over[name]!r}: its weights are taken over.")
    adata = _register_like(cls.__name__, scvi_model, unlabeled_category, labels_key, adata)
    model = cls(adata, **taken_over, **scanvi_kwargs)
    state = scvi_model.module.state_dict()
    if taken_over["dispersion"] == "gene-label":
        state["log_theta"] = _by_label(state["log_theta"], scvi_model.registry, model.registry)
    model.module.load_state_dict(state, strict=False)
    model.to_device(scvi_model.device)
    model._is_pretrained = scvi_model.is_trained
    return model


def _register_like(
    name: str, scvi_model: SCVI, unlabeled_category: str, labels_key: str | None, adata: AnnData | None
) -> AnnData:
    """Set data up as those of an SCVI are, in its coding, and with labels; gives them with its genes in order."""
    if adata is None and scvi_model.minified_data_type == minify.WITHOUT_COUNTS:
        raise StateError(
            "The data of scvi_model were minified and hold no counts. Give the full data: adata=..., or minify "
            f"with minified_data_type={minify.WITH_COUNTS!r}."
        )
    given = scvi_model.registry
    labels_key = given.setup_args.get("labels_key") if labels_key is None else labels_key
    if labels_key is None:
        raise ValueError(
            "labels_key: scvi_model was set up without labels. Name the column of adata.obs that has them."
        )
    counts = minify.setup_for_counts(given)
    adata = scvi_model.adata if adata is None else match_genes(adata, scvi_model._gene_names)
    field = Labels("label_n", "labels_key", labels_key, unlabeled_category)
    fields = counts.fields | {"label_n": {"kind": field.kind, **field.register(adata)}}
    setup_args = given.setup_args | {"labels_key": labels_key, "unlabeled_category": unlabeled_category}
    registry = replace(counts, model_name=name, fields=fields, setup_args=setup_args, n_cells=adata.n_obs)
    registry.check(adata)
    registries.note(registry, adata)
    return adata


def _by_label(log_theta_lg: Tensor, old: Registry, new: Registry) -> Tensor:
    """Dispersions in the order of other labels; cells without a label that had no dispersion get the mean of all."""
    row_of = {str(name): row for name, row in zip(old.categories("label_n"), log_theta_lg, strict=True)}
    *known, unlabeled = map(str, new.categories("label_n"))
    if missing := [name for name in known if name not in row_of]:
        raise ValueError(
            f"scvi_model has dispersion='gene-label', and learned none for the label {listing(missing)}: give it the "
            "labels_key of scvi_model, or train SCANVI(adata, dispersion='gene-label', ...) from scratch."
        )
    return torch.stack([row_of[name] for name in known] + [row_of.get(unlabeled, log_theta_lg.mean(0))])
