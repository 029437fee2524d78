"""New data with the genes of a model: the same names, in any order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from scvi_lite.data.registry import check_anndata
from scvi_lite.errors import listing, nearest, warn

if TYPE_CHECKING:
    from anndata import AnnData


def match_genes(adata: AnnData, var_names: Sequence[str]) -> AnnData:
    """The data with the model's genes in the model's order; reordered, and said so, where they are not.

    Raises
    ------
    ValueError
        If genes are missing.
    """
    check_anndata(adata)
    here = adata.var_names.astype(str)
    if len(here) == len(var_names) and np.array_equal(here, var_names):
        return adata
    position = here.get_indexer(var_names)
    missing = [name for name, i in zip(var_names, position, strict=True) if i < 0]
    if missing:
        near = nearest(missing[0], here[:20_000])
        hint = f" The nearest name to {missing[0]!r} is {near!r}." if near else ""
        raise ValueError(
            f"adata: {len(missing)} of the model's {len(var_names)} genes are not among adata.var_names: "
            f"{listing(missing)}.{hint} Names must be those that the model was trained with."
        )
    what = ["are in another order than the model's"] if (np.diff(position) < 0).any() else []
    if (surplus := len(here) - len(var_names)) > 0:
        what.append(f"include {surplus} that the model does not know")
    warn(f"The genes of adata {' and '.join(what)}: a copy with the model's genes in its order is used.")
    return (adata.to_memory() if adata.isbacked else adata)[:, position].copy()
