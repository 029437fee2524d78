"""Several modalities of the same cells: a MuData as one table of cells, whatever order and part each modality has."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from scvi_lite.errors import UnknownKeyError, as_options, check_options, listing, unknown

if TYPE_CHECKING:
    from scvi_lite._typing import Data, MuData

CURES_OF_ANNDATA = {
    "bool": "Without data a saved model is a reference: Model.load_query_data(adata, folder).",
    "NoneType": "Give the data that setup_anndata was called with.",
    "str": "Read the file first: anndata.read_h5ad(path).",
    "PosixPath": "Read the file first: anndata.read_h5ad(path).",
    "DataFrame": "Make one: anndata.AnnData(frame), with cells as rows.",
    "MuData": "Give one of its modalities, as in mdata['rna'], or call setup_mudata where the model has it.",
    "ndarray": "Make one: anndata.AnnData(counts), with cells as rows.",
}
CURES_OF_MUDATA = {
    "NoneType": "Give the data that setup_mudata was called with.",
    "str": "Read the file first: mudata.read_h5mu(path).",
    "PosixPath": "Read the file first: mudata.read_h5mu(path).",
    "AnnData": "Make one, mudata.MuData({'rna': rna, ...}), or set an AnnData up with setup_anndata.",
}


def is_mudata(data: Any) -> bool:
    """Whether it is a MuData. Where mudata was never imported, nothing is, and it need not be imported to know."""
    mudata = sys.modules.get("mudata")
    return mudata is not None and isinstance(data, mudata.MuData)


def part_of(data: Data, modality: str | None) -> Data:
    """The AnnData of a modality; the data themselves where none is named."""
    return data if modality is None else data.mod[modality]


def name_of(data: Data, modality: str | None) -> str:
    """What to call it in a message."""
    if modality is not None:
        return f"mdata[{modality!r}]"
    return "mdata" if is_mudata(data) else "adata"


def place_of(data: Data, modality: str | None) -> np.ndarray | None:
    """Row (n,) of each cell in a modality, -1 where it was not measured; None where the rows are the same."""
    if modality is None:
        return None
    here = data.mod[modality].obs_names
    return None if here.equals(data.obs_names) else here.get_indexer(data.obs_names)


def check_data(data: Any, modalities: Collection[str]) -> None:
    """Refuse what is not an AnnData, or, where modalities are read, a MuData that has them."""
    check_mudata(data, modalities) if modalities else check_anndata(data)


def check_anndata(adata: Any) -> None:
    """Refuse what is not an AnnData, or an empty one, or one with repeated gene names.

    Raises
    ------
    TypeError
        If it is something else.
    ValueError
        If there are no cells or no genes, or names repeat.
    """
    from anndata import AnnData

    if not isinstance(adata, AnnData):
        kind = type(adata).__name__
        raise TypeError(f"adata is a {kind}; an AnnData is needed. {CURES_OF_ANNDATA.get(kind, '')}".rstrip())
    if adata.n_obs == 0 or adata.n_vars == 0:
        raise ValueError(f"adata has {adata.n_obs} cells and {adata.n_vars} genes; at least one of each is needed.")
    if not adata.var_names.is_unique:
        repeated = adata.var_names[adata.var_names.duplicated()]
        raise ValueError(
            f"adata.var_names repeats {len(repeated)} names, {repeated[0]!r} for one. "
            "Call adata.var_names_make_unique() first."
        )


def check_mudata(mdata: Any, modalities: Iterable[str]) -> None:
    """Refuse what is not a MuData, lacks a modality, or cannot be read as one table of cells.

    Raises
    ------
    TypeError
        If it is something else.
    KeyError
        If a modality does not exist.
    ValueError
        If there are no cells or features, names repeat, or cells are not shared.
    """
    modalities = list(modalities)
    if not is_mudata(mdata):
        kind, having = type(mdata).__name__, f" with the modalities {listing(modalities)}" if modalities else ""
        raise TypeError(f"mdata is a {kind}; a MuData{having} is needed. {CURES_OF_MUDATA.get(kind, '')}".rstrip())
    if mdata.axis != 0:
        raise ValueError(f"mdata shares its variables (axis={mdata.axis}); a MuData that shares cells is needed.")
    if mdata.n_obs == 0:
        raise ValueError("mdata has no cells; at least one is needed.")
    if not mdata.obs_names.is_unique:
        raise ValueError("mdata.obs_names repeat: cells are matched by name. Make the names of each modality unique.")
    for modality in dict.fromkeys(modalities):
        if modality not in mdata.mod:
            raise UnknownKeyError(
                f"{unknown('modality', modality, mdata.mod, 'a modality of mdata', 'Modalities')} If these cells were "
                "not measured for it, call prepare_query_mudata(mdata, model), which adds it without cells."
            )
        _check_modality(mdata, modality)


def _check_modality(mdata: MuData, modality: str) -> None:
    adata = mdata.mod[modality]
    if adata.n_vars == 0:
        raise ValueError(f"mdata[{modality!r}] has no features.")
    for axis, names in (("obs", adata.obs_names), ("var", adata.var_names)):
        if not names.is_unique:
            raise ValueError(
                f"mdata[{modality!r}].{axis}_names repeat, {names[names.duplicated()][0]!r} for one. "
                f"Call mdata[{modality!r}].{axis}_names_make_unique() and mdata.update() first."
            )
    if not adata.obs_names.isin(mdata.obs_names).all():
        raise ValueError(f"mdata[{modality!r}] has cells that mdata.obs_names lack. Call mdata.update() first.")


def read_modalities(
    mdata: MuData, modalities: Mapping[str, str | None] | None, arguments: Collection[str], needed: Sequence[str] = ()
) -> dict[str, str | None]:
    """For each argument of ``setup_mudata`` the modality in which to look; None for the whole.

    Parameters
    ----------
    mdata
        The data.
    modalities
        What the user gave: modalities by argument.
    arguments
        Those that may be named.
    needed
        Those that must be.

    Raises
    ------
    TypeError
        If an argument does not exist, or it is no dictionary.
    KeyError, ValueError
        If a modality does not exist, or is not named.
    """
    given = as_options("modalities", modalities)
    check_options("modalities", given, arguments)
    check_mudata(mdata, ())
    for argument in needed:
        if given.get(argument) is None:
            example = ", ".join(f"{name!r}: ..." for name in needed)
            raise ValueError(
                f"modalities does not say which modality {argument} is for. Write modalities={{{example}}}, with "
                f"{listing(mdata.mod)} for the dots."
            )
    for argument, modality in given.items():
        if modality is not None and modality not in mdata.mod:
            raise UnknownKeyError(
                unknown(f"modalities[{argument!r}]", modality, mdata.mod, "a modality of mdata", "Modalities")
            )
    return {argument: given.get(argument) for argument in arguments}
