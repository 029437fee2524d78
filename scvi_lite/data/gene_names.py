"""Genes of new data beside those of a model: which are there, and by what name the others may be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import pandas as pd

if TYPE_CHECKING:
    from anndata import AnnData

LEAST_SHARE = 0.25  #: of a model's genes that new data must have: with fewer, zeros would outweigh what was measured
ENSEMBL = r"^ENS[A-Z]*G\d{6,}"
WORTH_NAMING = 0.1  # share of the missing genes that another way of naming must find


def without_version(names: pd.Index) -> pd.Index:
    """Ensembl names without the number of their version.

    >>> without_version(pd.Index(["ENSG00000141510.18", "RP11-34P13.7"])).tolist()
    ['ENSG00000141510', 'RP11-34P13.7']
    """
    return names.str.replace(rf"({ENSEMBL})\.\d+(_PAR_Y)?$", r"\1\2", regex=True)


# How names may differ, what makes them the same, and the same as code: for one name, and for all.
WAYS: tuple[tuple[str, Callable[[pd.Index], pd.Index], str, str], ...] = (
    (
        "without the version after the dot",
        without_version,
        "n.partition('.')[0]",
        r"adata.var_names.str.replace(r'\.\d+$', '', regex=True)",
    ),
    ("in capitals, whatever the case", lambda names: names.str.upper(), "n.upper()", "adata.var_names.str.upper()"),
)


def naming_hint(adata: AnnData, var_names: Sequence[str]) -> str:
    """A sentence on how the genes that are missing are named in the data, with the call that renames them, or none.

    >>> import numpy as np
    >>> from anndata import AnnData
    >>> adata = AnnData(np.ones((1, 2)), var=pd.DataFrame({"symbol": ["TP53", "CD4"]}, index=["a", "b"]))
    >>> print(naming_hint(adata, ["TP53", "CD4", "CD8A"]))
    2 of the missing genes are in adata.var['symbol']: adata.var_names = adata.var['symbol'].astype(str)
    """
    here, wanted = adata.var_names.astype(str), pd.Index(var_names)
    missing = wanted[~wanted.isin(here)]
    if missing.empty:
        return ""
    found: list[tuple[int, str]] = []
    for how, rename, one, everything in WAYS:
        if not rename(wanted).equals(wanted):  # the model's names are not in the form that both can be brought to
            everything = f"[names.get({one}, n) for n in adata.var_names], with names = {{{one}: n for n in var_names}}"
            everything += " of the model's var_names"
        n_found = int(rename(missing).isin(rename(here)).sum())
        found.append((n_found, f"found by their names {how}: adata.var_names = {everything}"))
    for column in adata.var.columns:
        if not pd.api.types.is_numeric_dtype(adata.var[column]):
            values = pd.Index(adata.var[column].astype(str))
            cure = f"adata.var_names = adata.var[{column!r}].astype(str)"
            if not values[values.isin(missing)].is_unique:
                cure += "; adata.var_names_make_unique()"
            found.append((int(missing.isin(values).sum()), f"in adata.var[{column!r}]: {cure}"))
    n_found, where = max(found, key=lambda one: one[0])
    if n_found >= max(1, WORTH_NAMING * len(missing)):
        return f"{n_found} of the missing genes are {where}"
    by_id = [float(names.str.match(ENSEMBL).mean()) for names in (here, missing)]
    if abs(by_id[0] - by_id[1]) > 0.5:
        ours, theirs = ("Ensembl ids", "symbols") if by_id[0] < by_id[1] else ("symbols", "Ensembl ids")
        return (
            f"The model's genes are named by {ours} ({missing[0]!r}) and those of adata by {theirs} ({here[0]!r}): "
            "translate them first, adata.var_names = [name_of[n] for n in adata.var_names]"
        )
    return ""
