"""New data with the features of a model: the same names, in any order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from scvi_lite.data.gene_names import naming_hint
from scvi_lite.data.modalities import check_anndata, check_mudata, name_of, part_of
from scvi_lite.errors import listing, nearest, warn

if TYPE_CHECKING:
    from scvi_lite._typing import AnnData, MuData


def match_genes(data: AnnData | MuData, var_names: Sequence[str] | Mapping[str, Sequence[str]]) -> AnnData | MuData:
    """The data with the model's genes in the model's order; reordered, and said so, where they are not.

    Parameters
    ----------
    data
        An AnnData, or, where ``var_names`` come by modality, a MuData.
    var_names
        The model's names.

    Raises
    ------
    ValueError
        If genes are missing.
    """
    if not isinstance(var_names, Mapping):
        check_anndata(data)
        return _match_part(data, var_names)
    check_mudata(data, var_names)
    matched = {modality: _match_part(data, names, modality) for modality, names in var_names.items()}
    if all(matched[modality] is data.mod[modality] for modality in var_names):
        return data
    return replace_modalities(data, matched)


def replace_modalities(mdata: MuData, parts: Mapping[str, AnnData]) -> MuData:
    """The same cells with other modalities under these names; what is known of features stays where they do."""
    from mudata import MuData, set_options

    with set_options(pull_on_update=False):
        whole = MuData({**mdata.mod, **parts})[mdata.obs_names].copy()
        whole.obs, whole.uns = mdata.obs.copy(), dict(mdata.uns)
        kept = ["obsm", "obsp"]
        if whole.var_names.equals(mdata.var_names):
            whole.var = mdata.var.copy()
            kept += ["varm", "varp"]
    for place in kept:
        values = getattr(mdata, place)
        getattr(whole, place).update({key: values[key] for key in values if key not in mdata.mod})
    return whole


def _match_part(data: AnnData | MuData, var_names: Sequence[str], modality: str | None = None) -> AnnData:
    """The data, or one of its modalities."""
    adata, name = part_of(data, modality), name_of(data, modality)
    here = adata.var_names.astype(str)
    if len(here) == len(var_names) and np.array_equal(here, var_names):
        return adata
    what = "genes" if modality is None else "features"
    position = here.get_indexer(var_names)
    missing = [gene for gene, i in zip(var_names, position, strict=True) if i < 0]
    if missing:
        near = nearest(missing[0], here.difference(var_names)[:20_000])  # a gene of the model is no other's name
        hint = naming_hint(adata, var_names) or (f"The nearest name to {missing[0]!r} is {near!r}." if near else "")
        raise ValueError(
            f"{name}: {len(missing)} of the model's {len(var_names)} {what} are not among {name}.var_names: "
            f"{listing(missing)}. Names must be those that the model was trained with; prepare_query_anndata fills in "
            f"those that were not measured. {hint}".rstrip()
        )
    how = ["are in another order than the model's"] if (np.diff(position) < 0).any() else []
    if (surplus := len(here) - len(var_names)) > 0:
        how.append(f"include {surplus} that the model does not know")
    warn(f"The {what} of {name} {' and '.join(how)}: a copy with the model's {what} in its order is used.")
    return (adata.to_memory() if adata.isbacked else adata)[:, position].copy()
