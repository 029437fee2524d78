"""Columns of ``obs``, of an AnnData or of a modality: found by name, checked, and coded as categories."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from scvi_lite.data.modalities import is_mudata, name_of, part_of, place_of
from scvi_lite.errors import UnknownKeyError, listing, unknown, warn

if TYPE_CHECKING:
    from scvi_lite._typing import Data, MuData

QUESTIONS = ("groupby", "sample_key")  # arguments of questions, which name no modalities


def obs_column(adata: Data, argument: str, key: str, modality: str | None = None) -> pd.Series:
    """A column of ``obs``, of a modality or of the whole, or an error that names the nearest one.

    A cell that the modality does not have has no value.
    """
    name, obs = name_of(adata, modality), part_of(adata, modality).obs
    if not isinstance(key, str | int) or key not in obs.columns:
        raise UnknownKeyError(
            unknown(argument, key, obs.columns, f"a column of {name}.obs", "Columns") + _elsewhere(adata, argument, key)
        )
    column = obs[key]
    if column.ndim > 1:
        raise ValueError(f"{argument}={key!r}: {name}.obs has {column.shape[1]} columns of this name; rename them.")
    return column if place_of(adata, modality) is None else column.reindex(adata.obs_names)


def _elsewhere(adata: Data, argument: str, key: Any) -> str:
    """Where else in a MuData there is such a column."""
    if not (is_mudata(adata) and isinstance(key, str)):
        return ""
    if key in adata.obs:
        return f" There is mdata.obs[{key!r}]: leave {argument!r} out of modalities."
    found = [modality for modality, part in adata.mod.items() if key in part.obs]
    if not found:
        return ""
    source = f"mdata[{found[0]!r}].obs[{key!r}]"
    of_setup = "" if argument in QUESTIONS else f"say modalities={{{argument!r}: {found[0]!r}}}, or "
    return f" There is {source}: {of_setup}mdata.obs[{key!r}] = {source}."


def categories_of(adata: Data, argument: str, key: str, modality: str | None = None) -> list[Any]:
    """The categories in use: in their own order for a categorical column, else sorted."""
    column = obs_column(adata, argument, key, modality)
    check_missing(column, argument, key, f"{name_of(adata, modality)}.obs")
    if is_mudata(adata):
        check_agreement(adata, column, argument, key, modality)
    if isinstance(column.dtype, pd.CategoricalDtype):
        values = column.cat.remove_unused_categories().cat.categories.tolist()
    else:
        values = sorted(set(column.tolist()), key=lambda value: (str(type(value)), value))
    texts = pd.Index([text_of(value) for value in values])
    if any("\0" in text for text in texts):  # pandas takes it for the end of a text, and what differs behind it for one
        raise ValueError(
            f"{argument}={key!r}: a value of adata.obs[{key!r}] has the character 0 in it. Take it out: "
            f"adata.obs[{key!r}] = [str(value).replace('\\0', '') for value in adata.obs[{key!r}]]"
        )
    if not texts.is_unique:
        raise ValueError(
            f"{argument}={key!r}: values of different types in adata.obs[{key!r}] read "
            f"{texts[texts.duplicated()][0]!r}. Make them one: adata.obs[{key!r}] = adata.obs[{key!r}].astype(str)"
        )
    # What JSON has no type for (dates, intervals) is kept as text, and a whole number as an integer.
    values = [int(value) if isinstance(value, float) and value.is_integer() else value for value in values]
    return [value if isinstance(value, bool | int | float | str) else str(value) for value in values]


def text_of(value: Any) -> str:
    """How a category is compared: files and pandas versions change between bool, int, float, str and categorical.

    >>> text_of(2.0), text_of(2), text_of("2"), text_of(0.5), text_of(True)
    ('2', '2', '2', '0.5', 'True')
    """
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def encode(adata: Data, categories: Sequence[Any], argument: str, key: str, modality: str | None = None) -> np.ndarray:
    """Codes (n,) int64 of a column's values among ``categories``; an error for a value that is not one of them."""
    column, obs = obs_column(adata, argument, key, modality), f"{name_of(adata, modality)}.obs"
    check_missing(column, argument, key, obs)
    column = column.astype("category")
    here = column.cat.categories.tolist()
    code_of = pd.Index([text_of(c) for c in categories]).get_indexer([text_of(c) for c in here])
    code_n = code_of[column.cat.codes.to_numpy()].astype(np.int64)
    if (code_n < 0).any():
        new = list(dict.fromkeys(column[code_n < 0].astype(str)))
        raise ValueError(
            f"{argument}={key!r}: {(code_n < 0).sum()} cells have {listing(new)} in {obs}[{key!r}], which the "
            f"model was not set up with. It knows {listing(categories)}. Leave these cells out, "
            "recode them, or train a model with them."
        )
    return code_n


def check_missing(column: pd.Series, argument: str, key: str, obs: str = "adata.obs", cure: str = "") -> None:
    """Refuse missing values; ``cure`` is what to do about them, where it is not the usual."""
    missing = column.isna().to_numpy()
    if missing.any():
        if obs != "adata.obs":
            cure = f", in a column of mdata.obs, which has all cells: mdata.obs[{key!r}] = ..."
        cure = cure or f", or leave them out: adata = adata[adata.obs[{key!r}].notna()].copy()"
        raise ValueError(
            f"{argument}={key!r}: {missing.sum()} of {len(column)} cells have no value in {obs}[{key!r}]. Give "
            f"them one{cure}"
        )


def check_agreement(mdata: MuData, column: pd.Series, argument: str, key: str, modality: str | None) -> None:
    """Refuse a category of a cell that differs between modalities; say so where the user chose one of them."""
    for other, part in mdata.mod.items():
        if other == modality or key not in part.obs:
            continue
        ours_n = column.reindex(part.obs_names).astype(str).to_numpy()
        differ = int((ours_n != part.obs[key].astype(str).to_numpy()).sum())
        if differ:
            here = f"{name_of(mdata, modality)}.obs[{key!r}]"
            message = f"{argument}={key!r}: {differ} cells have another value in mdata[{other!r}].obs than in {here}"
            if modality is None:
                raise ValueError(
                    f"{message}. Say which holds with modalities={{{argument!r}: {other!r}}}, or delete the wrong "
                    f"column: del mdata[{other!r}].obs[{key!r}]"
                )
            warn(f"{message}, which is used.")
