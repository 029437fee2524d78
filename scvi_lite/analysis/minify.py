"""Data that carry each cell's posterior instead of its counts: small enough to share, and enough to decode from."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from scipy import sparse

from scvi_lite.analysis.inputs import to_numpy
from scvi_lite.analysis.latent import posterior_parameters
from scvi_lite.data.fields import Continuous, Embedding, Field
from scvi_lite.data.genes import replace_modalities
from scvi_lite.data.modalities import is_mudata
from scvi_lite.data.registry import MINIFY_KEY, WITHOUT_COUNTS, note
from scvi_lite.errors import StateError, UnknownKeyError, check_choice, unknown

if TYPE_CHECKING:
    from scvi_lite._typing import AnnData, Model, MuData, Registry

WITH_COUNTS = "latent_posterior_parameters_with_counts"
LIBRARY_KEY = "observed_lib_size"


def minify_adata(
    model: Model,
    minified_data_type: str = WITHOUT_COUNTS,
    use_latent_qzm_key: str = "X_latent_qzm",
    use_latent_qzv_key: str = "X_latent_qzv",
) -> None:
    """Give the model a copy of its data that carries each cell's posterior, and no counts.

    Latent space, expression and what else is decoded are then answered from the stored posterior. What needs counts
    (likelihoods, importance weights, training) raises a RuntimeError. The AnnData that the model had is left as it is.

    Parameters
    ----------
    minified_data_type
        ``"latent_posterior_parameters"``: the copy has no counts in ``X`` and layers, no ``raw``, and each cell's
        library size in ``obs["observed_lib_size"]``. ``"latent_posterior_parameters_with_counts"``: it keeps
        everything.
    use_latent_qzm_key, use_latent_qzv_key
        Keys of ``obsm`` with the mean and the variance of the posterior. They are computed where both are absent.

    Raises
    ------
    ValueError
        If the type does not exist, what the keys hold does not fit, or the model infers library sizes.
    KeyError
        If one of the keys is there and the other is not.
    RuntimeError
        If counts are to be kept that an earlier call has dropped.

    Examples
    --------
    >>> import scvi_lite
    >>> adata = scvi_lite.data.synthetic_iid(batch_size=50, n_genes=20)
    >>> scvi_lite.model.SCVI.setup_anndata(adata, batch_key="batch")
    >>> model = scvi_lite.model.SCVI(adata)
    >>> model.train(max_epochs=1, enable_progress_bar=False)
    >>> model.minify_adata()
    >>> model.adata.X.nnz, model.get_latent_representation().shape
    (0, (100, 10))
    """
    check_choice((WITHOUT_COUNTS, WITH_COUNTS), minified_data_type=minified_data_type)
    if model.module.config.latent_library:
        raise ValueError(
            "This model infers library sizes from counts, and cannot do without. Only models with "
            "use_observed_lib_size=True or a size factor can be minified."
        )
    keep = minified_data_type == WITH_COUNTS
    if keep and minified(model) == WITHOUT_COUNTS:
        raise StateError("The data of this model were minified without counts: there are none left to keep.")
    model._warn_if_untrained()
    loc_nk, variance_nk = _posterior(model, use_latent_qzm_key, use_latent_qzv_key)
    adata = model.adata.copy() if keep else _without_counts(model.adata)
    adata.obsm[use_latent_qzm_key], adata.obsm[use_latent_qzv_key] = loc_nk, variance_nk
    fields = dict(model.registry.fields)
    stored: list[Field] = [
        Embedding("qz_loc_nk", "use_latent_qzm_key", use_latent_qzm_key),
        Embedding("qz_scale_nk", "use_latent_qzv_key", use_latent_qzv_key, variance=True),
    ]
    if not keep:
        total_n = to_numpy([batch.total_n for batch in model._minibatches()])
        adata.obs[LIBRARY_KEY] = total_n.astype(np.zeros(0, model.registry.read(model.adata, "x").dtype).sum().dtype)
        stored.append(Continuous("total_n", "the library size", LIBRARY_KEY))
        fields["x"] = fields["x"] | {"minified": True}
    fields |= {field.name: {"kind": field.kind, **field.register(adata)} for field in stored}
    registry = replace(model.registry, fields=fields)
    note(registry, adata)
    model.registry, model.adata = registry, adata


def minified(model: Model) -> str | None:
    """How the data of the model were minified; None if they were not."""
    if "qz_loc_nk" not in model.registry.fields:
        return None
    return WITHOUT_COUNTS if model.registry.fields["x"].get("minified") else WITH_COUNTS


STORED = {"qz_loc_nk": "obsm", "qz_scale_nk": "obsm", "total_n": "obs"}  # where the fields of minified data are


def setup_for(registry: Registry, adata: AnnData) -> Registry:
    """The setup to read ``adata`` with: that for counts, where it was made for minified data and these are full.

    What scvi-tools minified with counts counts as full.
    """
    stored = {name: where for name, where in STORED.items() if name in registry.fields}
    if not stored:
        return registry
    there = all(registry.fields[name]["key"] in getattr(adata, where) for name, where in stored.items())
    return registry if there and adata.uns.get(MINIFY_KEY) != WITH_COUNTS else setup_for_counts(registry)


def setup_for_counts(registry: Registry) -> Registry:
    """The setup before the data were minified."""
    if "qz_loc_nk" not in registry.fields:
        return registry
    fields = {name: state for name, state in registry.fields.items() if name not in STORED}
    fields["x"] = {name: value for name, value in fields["x"].items() if name != "minified"}
    return replace(registry, fields=fields)


def _posterior(model: Model, loc_key: str, variance_key: str) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of each cell's posterior: those in ``obsm``, else computed."""
    obsm = model.adata.obsm
    if (loc_key in obsm) != (variance_key in obsm):
        argument, key = ("use_latent_qzv_key", variance_key) if loc_key in obsm else ("use_latent_qzm_key", loc_key)
        raise UnknownKeyError(unknown(argument, key, obsm.keys(), "a key of adata.obsm", "Keys"))
    if loc_key not in obsm:
        loc_nk, scale_nk = posterior_parameters(model)
        return loc_nk, scale_nk**2
    shape = (model.adata.n_obs, model.module.config.n_latent)
    for key in (loc_key, variance_key):
        if obsm[key].shape != shape:
            raise ValueError(f"adata.obsm[{key!r}] has shape {obsm[key].shape}; {shape} is needed. Leave it out.")
    if (np.asarray(obsm[variance_key]) <= 0).any():
        raise ValueError(f"adata.obsm[{variance_key!r}] holds variances of zero or less. Leave it out.")
    return np.asarray(obsm[loc_key], np.float32), np.asarray(obsm[variance_key], np.float32)


def _without_counts(data: AnnData | MuData) -> AnnData | MuData:
    """A copy of the data whose counts are zero, layers as well, and without ``raw``."""
    from anndata import AnnData

    if is_mudata(data):
        return replace_modalities(data, {name: _without_counts(part) for name, part in data.mod.items()})
    kept = {name: dict(getattr(data, name)) for name in ("uns", "obsm", "varm", "obsp", "varp")}
    zeros = {name: sparse.csr_matrix(data.shape, dtype=np.float32) for name in (None, *data.layers)}
    return AnnData(zeros.pop(None), obs=data.obs.copy(), var=data.var.copy(), layers=zeros, **kept)
