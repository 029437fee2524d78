"""From the plain data of a saved model back to names, weights and cells; what does not fit is refused."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from scvi_lite.errors import listing, warn
from scvi_lite.io.folder import find_data

if TYPE_CHECKING:
    from scvi_lite._typing import AnnData, MuData, Registry


def check_names(var_names: Any, registry: Registry) -> list[str] | dict[str, list[str]]:
    """The names of a saved model's genes; of a MuData, of the features by modality.

    Raises
    ------
    ValueError
        If they are no names, or repeat, or are not as many as the model has genes.
    """
    if registry.modalities:
        by_modality = var_names if isinstance(var_names, dict) else {}
        if missing := [name for name in registry.modalities.values() if name not in by_modality]:
            raise ValueError(f"The model is damaged: its var_names lack the modality {missing[0]!r}.")
        return {
            modality: _check_names(by_modality[modality], registry.n_features if field == "x" else None)
            for field, modality in registry.modalities.items()
        }
    return _check_names(var_names, registry.n_features)


def _check_names(var_names: Any, n_features: int | None) -> list[str]:
    names = list(var_names)
    n_features = len(names) if n_features is None else n_features
    if not (all(isinstance(name, str) for name in names) and len(set(names)) == len(names) == n_features):
        raise ValueError(f"The model is damaged: its var_names are not {n_features} different names.")
    return names


def check_sizes(arguments: Mapping[str, Any], state: Mapping[str, torch.Tensor]) -> None:
    """Refuse sizes beyond those of the weights before memory is asked for.

    >>> check_sizes({"n_hidden": 3}, {"weight": torch.zeros(3, 2)})

    Raises
    ------
    ValueError
        If an argument is larger than each dimension of the weights, and than their number.
    """
    largest = max([len(state), *(size for tensor in state.values() for size in tensor.shape)])
    for name, value in arguments.items():
        if isinstance(value, int) and value > largest:
            raise ValueError(f"The model is damaged: its weights do not fit its argument {name}={value!r}.")


def load_weights(module: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Put saved weights into a module.

    Raises
    ------
    ValueError
        If names, shapes or kinds of number differ.
    """
    ours = module.state_dict()
    missing, surplus = listing(sorted(ours.keys() - state.keys())), listing(sorted(state.keys() - ours.keys()))
    if ours.keys() != state.keys():
        raise ValueError(f"The weights do not fit the model's arguments: missing {missing}, not known {surplus}.")
    differ = [
        f"{name} {tuple(state[name].shape)} {state[name].dtype}, not {tuple(tensor.shape)} {tensor.dtype}"
        for name, tensor in ours.items()
        if state[name].shape != tensor.shape or state[name].is_floating_point() != tensor.is_floating_point()
    ]
    if differ:
        raise ValueError(f"The weights do not fit the model's arguments and data: {differ[0]}, {len(differ)} in all.")
    broken = [name for name, tensor in state.items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        warn(f"The saved weights are NaN or infinite in {listing(broken)}: this model answers nothing of use.")
    module.load_state_dict(state)


def read_data(dir_path: str | Path, prefix: str, foreign: bool) -> AnnData | MuData:
    """The data that were saved with a model."""
    beside = [Path(dir_path).expanduser() / f"{prefix}{name}" for name in ("adata.h5ad", "mdata.h5mu")]
    path = next((file for file in beside if file.is_file()), None) if foreign else find_data(dir_path, prefix)
    if path is None:
        raise FileNotFoundError(
            f"{dir_path} holds no {beside[0].name} nor {beside[1].name}: the model was saved without its data. "
            "Give them: load(..., adata=adata)."
        )
    if path.suffix == ".h5mu":
        return _read_mudata(path)
    import anndata

    return anndata.read_h5ad(path)


def _read_mudata(path: Path) -> MuData:
    """A MuData without columns of its modalities in its own ``obs``, as it was saved, where mudata can read it so."""
    import mudata

    try:
        with mudata.set_options(pull_on_update=False):
            return mudata.read_h5mu(path)
    except ValueError:  # mudata marks what is missing by NaN, for which whole numbers in obsm or varm have no place
        with mudata.set_options(pull_on_update=None), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return mudata.read_h5mu(path)
