"""Read models that scvi-tools saved (``model.pt``), without running anything that the file names."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from scvi_lite.errors import listing, warn
from scvi_lite.io.atomic import locate
from scvi_lite.io.folder import INFO, SPLITS, SavedModel
from scvi_lite.io.plain_pickle import Recorded, plain, read_plain
from scvi_lite.io.translators import ARGUMENTS, TRANSLATORS
from scvi_lite.io.translators.common import Setup

if TYPE_CHECKING:
    import pandas as pd

FILE = "model.pt"
NOT_ARGUMENTS = ("adata", "registry", "datamodule", "ct_weight")  # the last is among the weights


def is_scvi_tools_folder(path: str | Path, prefix: str = "") -> bool:
    """Whether the folder holds a model of scvi-tools, and none of scvi_lite, with this prefix."""
    folder = Path(path).expanduser()
    ours = locate(folder, f"{prefix}model", f"{prefix}{INFO}")
    return (folder / f"{prefix}{FILE}").is_file() and not ours.is_file()


def read_scvi_tools(path: str | Path, prefix: str = "") -> SavedModel:
    """Read a model that scvi-tools saved, in our names and layout; the tensors come on the CPU.

    A metric of the history that cannot be read is left out, with a warning.

    Raises
    ------
    FileNotFoundError
        There is no ``model.pt``.
    ValueError
        The file is damaged, not a model of scvi-tools, asks for more than plain data, or holds a model that has no
        counterpart here.
    """
    file = Path(path).expanduser() / f"{prefix}{FILE}"
    if not file.is_file():
        raise FileNotFoundError(f"'{path}' has no {prefix}{FILE}: it is not a model folder of scvi-tools.")
    content = read_plain(file)
    try:
        return _translate(content)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{file} cannot be loaded as a model of scvi-tools 1.0 or newer: {reason}.") from error


def _translate(content: dict[str, Any]) -> SavedModel:
    """The contents of a model.pt in our names and layout."""
    attributes = content["attr_dict"]
    registry = attributes["registry_"]
    class_name = registry["model_name"]
    if class_name not in TRANSLATORS:
        raise ValueError(f"it is a {class_name}; there is a counterpart of {listing(TRANSLATORS)}")
    arguments = _arguments(class_name, attributes.get("init_params_", {}))
    ours = _registry(class_name, registry.get("setup_args", {}), registry["field_registries"])
    in_parts, n_genes = "modality" in ours["fields"]["x"], arguments.get("n_genes") or 0
    if class_name == "MULTIVI" and in_parts and 0 < n_genes < ours["n_features"]:
        raise ValueError(
            f"it was made with n_genes={n_genes} of {ours['n_features']}, and learned the next genes as regions. Train "
            "MULTIVI anew, of the genes wanted"
        )
    return SavedModel(
        class_name=class_name,
        arguments=arguments,
        registry=ours,
        var_names=_names(content["var_names"]),
        state=TRANSLATORS[class_name](content["model_state_dict"], _setup(ours["fields"], arguments)),
        history=_history(attributes.get("history_") or {}),
        indices={
            split: np.asarray(attributes[f"{split}_indices_"], dtype=np.int64)
            for split in SPLITS
            if attributes.get(f"{split}_indices_") is not None
        },
        is_trained=bool(attributes.get("is_trained_", False)),
        version=f"scvi-tools {registry.get('scvi_version', 'of unknown version')}",
    )


def _arguments(class_name: str, init_params: dict[str, Any]) -> dict[str, Any]:
    """The constructor's arguments: the named ones, and those that came through ``**kwargs``, whatever it was called."""
    merged = dict(init_params.get("non_kwargs", {}))
    for keywords in init_params.get("kwargs", {}).values():
        merged |= keywords
    merged = ARGUMENTS.get(class_name, dict)(merged)
    return {name: _listed(value) for name, value in merged.items() if name not in NOT_ARGUMENTS}


def _names(names: Any) -> list[str] | dict[str, list[str]]:
    names = _listed(names)
    if isinstance(names, dict):
        return {modality: [str(name) for name in of_modality] for modality, of_modality in names.items()}
    return [str(name) for name in names]


def _listed(value: Any) -> Any:
    """Plain data, with lists for arrays; anything else is refused."""
    if isinstance(value, dict):
        return {str(key): _listed(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [_listed(entry) for entry in (value.tolist() if isinstance(value, np.ndarray) else value)]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(f"a {type(value).__name__} is not plain data")


def _state(fields: dict[str, Any], name: str) -> dict[str, Any]:
    return fields.get(name, {}).get("state_registry", {})


def _column(fields: dict[str, Any], theirs: str, argument: str, key: Any, **more: Any) -> dict[str, Any]:
    """A column of ``obs``."""
    return {"argument": argument, "key": key, **more, **_modality(fields, theirs)}


def _named(key: str) -> str | None:
    """The column that was named: scvi-tools makes up one, ``_scvi_...``, where none was."""
    return None if key.startswith("_scvi_") else key


def _registry(class_name: str, setup_args: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    """The setup as :class:`scvi_lite.data.registry.Registry` has it."""
    ours: dict[str, Any] = {"x": {"kind": "matrix", **_matrix(fields, "X")}}
    for name, theirs in (("peaks", "atac"), ("smoothed", "x_smoothed")):
        if theirs in fields:
            ours[name] = {"kind": "matrix", **_matrix(fields, theirs)}
    if class_name == "MULTIVI":  # where it has one kind of counts alone, the other is no columns of it
        if "X" not in fields:
            ours["x"] = ours["peaks"] | {"columns": [0, 0]}
        elif "peaks" not in ours and "modality" in ours["x"]:
            ours["peaks"] = ours["x"] | {"columns": [0, 0]}
    columns = (
        ("batch_n", "batch", "batch_key"),
        ("label_n", "labels", "labels_key"),
        ("fine_n", "fine_labels", "fine_labels_key"),
        ("panel_n", "panel", "panel_key"),
    )
    for name, theirs, argument in columns:
        if state := _state(fields, theirs):
            categories = _listed(state["categorical_mapping"])
            column = _column(fields, theirs, argument, _named(state["original_key"]), categories=categories)
            ours[name] = {"kind": "labels" if "unlabeled_category" in state else "categorical", **column}
    ours.setdefault("label_n", {"kind": "categorical", "argument": "labels_key", "key": None, "categories": [0]})
    cats = _state(fields, "extra_categorical_covs").get("mappings", {})
    conts = _state(fields, "extra_continuous_covs").get("columns", ())
    of_cats = (fields, "extra_categorical_covs", "categorical_covariate_keys")
    of_conts = (fields, "extra_continuous_covs", "continuous_covariate_keys")
    ours["cats_nc"] = {
        "kind": "categoricals",
        "columns": [_column(*of_cats, _named(key), categories=_listed(values)) for key, values in cats.items()],
    }
    ours["conts_nd"] = {
        "kind": "continuouses",
        "columns": [_column(*of_conts, str(key), positive=False) for key in conts],
    }
    # CondSCVI of scvi-tools takes a size factor, and models total counts.
    if (keys := setup_args.get("size_factor_key")) and class_name != "CondSCVI":
        for name, key in zip(("size_factor_n", "depth_n"), [keys] if isinstance(keys, str) else keys):
            column = _column(fields, "size_factor", "size_factor_key", key, positive=True)
            ours[name] = {"kind": "continuous", **column}
    if _state(fields, "proteins"):
        n_panels = len(ours.get("panel_n", ours["batch_n"])["categories"])
        ours["proteins_np"] = {"kind": "proteins", **_proteins(fields, setup_args, n_panels)}
    if "minify_type" in fields:
        ours |= _stored_posterior(fields)
        ours["x"] = ours["x"] | {"minified": True}
    counts = _state(fields, "X") or _state(fields, "atac")
    return {
        "model_name": class_name,
        "setup_args": _listed(setup_args),
        "fields": ours,
        "n_cells": int(counts.get("n_obs", 0)),
        "n_features": int(counts.get("n_vars", 0)),
    }


def _stored_posterior(fields: dict[str, Any]) -> dict[str, Any]:
    """Where minified data hold the posterior of each cell, and its library size."""

    def state(kind: str, argument: str, theirs: str, **options: bool) -> dict[str, Any]:
        return {"kind": kind, "argument": argument, "key": str(fields[theirs]["data_registry"]["attr_key"]), **options}

    return {
        "qz_loc_nk": state("embedding", "use_latent_qzm_key", "latent_qzm", variance=False),
        "qz_scale_nk": state("embedding", "use_latent_qzv_key", "latent_qzv", variance=True),
        "total_n": state("continuous", "the library size", "observed_lib_size", positive=False),
    }


def _modality(fields: dict[str, Any], name: str) -> dict[str, Any]:
    """The modality that a field is in, where it is in one."""
    modality = fields[name]["data_registry"].get("mod_key")
    return {} if modality is None else {"modality": str(modality)}


def _matrix(fields: dict[str, Any], name: str) -> dict[str, Any]:
    """Where a matrix of counts is."""
    if name not in fields:
        return {"layer": None}
    source = fields[name]["data_registry"]
    layer = source.get("attr_key") if source.get("attr_name") == "layers" else None
    return {"layer": layer, **_modality(fields, name)}


def _proteins(fields: dict[str, Any], setup_args: dict[str, Any], n_panels: int) -> dict[str, Any]:
    """The proteins, and on which of the panels they were measured."""
    state, source = _state(fields, "proteins"), fields["proteins"]["data_registry"]
    names = [str(name) for name in _listed(state["column_names"])]
    mask = {batch: np.ravel(there) for batch, there in (state.get("protein_batch_mask") or {}).items()}
    if not any(there.any() for there in mask.values()):  # of minified data, it was read from zeros
        mask = {}
    in_obsm = source.get("attr_name") == "obsm"
    return {
        "argument": "protein_expression_obsm_key" if in_obsm else "protein_layer",
        "key": source["attr_key"] if in_obsm else None,
        "names_key": setup_args.get("protein_names_uns_key"),
        "names": names,
        "measured": [[bool(there) for there in mask.get(str(q), [True] * len(names))] for q in range(n_panels)],
        **_matrix(fields, "proteins"),
    }


def _setup(fields: dict[str, Any], arguments: dict[str, Any]) -> Setup:
    """What the layout of the weights depends on."""
    return Setup(
        arguments=arguments,
        n_batches=len(fields["batch_n"]["categories"]),
        n_cats=tuple(len(column["categories"]) for column in fields["cats_nc"]["columns"]),
        has_size_factor="size_factor_n" in fields,
        n_labels=len(fields["label_n"]["categories"]) if "label_n" in fields else 1,
        has_depth="depth_n" in fields,
    )


def _history(frames: dict[str, Any]) -> dict[str, pd.DataFrame]:
    """The metrics that can be read, as data frames."""
    history = {}
    for name, frame in frames.items():
        try:
            history[str(name)] = _frame(str(name), frame)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError):
            warn(f"The metric {name!r} of the history cannot be read and is left out.")
    return history


def _frame(name: str, frame: Recorded) -> pd.DataFrame:
    """A data frame of one column, from what pandas wrote: blocks of columns, and the axes."""
    import pandas as pd

    blocks, (_, index) = frame.state["_mgr"].args
    (block,) = blocks
    values = np.array([float(value) for value in np.ravel(plain(block.args[0]))])
    epochs = _epochs(plain(index.args[1]))
    return pd.DataFrame({name: values}, index=pd.Index(epochs, dtype="int64", name="epoch"))


def _epochs(index: dict[str, Any]) -> np.ndarray:
    """Of an Index, which holds its values, or of a RangeIndex, which does not."""
    if "data" in index:
        return np.asarray(index["data"], dtype=np.int64)
    return np.arange(index["start"], index["stop"], index["step"])
