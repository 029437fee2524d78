"""Model folders: ``model.safetensors`` (weights, split) and ``model.json`` (everything else).

Nothing in a folder is code, and reading one runs none.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scvi_lite.errors import NameTakenError, NotThereError, listing
from scvi_lite.io.atomic import locate, staging
from scvi_lite.io.values import history_column, history_frame, positions, to_json

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    import torch

FORMAT = "scvi_lite.model"
FORMAT_VERSION = 1
INFO = "model.json"
WEIGHTS = "model.safetensors"
SPLITS = ("train", "validation", "test")
REQUIRED: dict[str, type | tuple[type, ...]] = {
    "class": str,
    "arguments": dict,
    "registry": dict,
    "var_names": (list, dict),
    "history": dict,
    "is_trained": bool,
    "version": str,
    "tensors": dict,
    "weights": dict,
    "data": list,
}


@dataclass
class SavedModel:
    """A model as plain data: what a folder holds."""

    class_name: str  #: name of the model class, as in ``scvi_lite.model``
    arguments: dict[str, Any]  #: arguments of its constructor, JSON-able
    registry: dict[str, Any]  #: the setup of the data, JSON-able
    var_names: list[str] | dict[str, list[str]]  #: names of the features; by modality for a MuData
    state: dict[str, torch.Tensor]  #: ``module.state_dict()``
    history: dict[str, pd.DataFrame]  #: one column each, of the same name, indexed by epoch
    indices: dict[str, np.ndarray]  #: positions of the cells in "train", "validation" and "test"
    is_trained: bool
    version: str  #: of the scvi_lite that wrote it
    frozen: dict[str, Any] = field(default_factory=dict)  #: what training leaves as it is, in a model of a query


def write_folder(
    path: str | Path,
    saved: SavedModel,
    *,
    prefix: str = "",
    overwrite: bool = False,
    write_data: Callable[[Path], None] | None = None,
) -> None:
    """Write a model to a folder: all of it, or nothing.

    Parameters
    ----------
    path
        The folder. Made, with its parents, where it does not exist.
    saved
        The model.
    prefix
        Put before the name of each file, so that several models share a folder.
    overwrite
        Replace the model with this prefix. Other files in the folder stay.
    write_data
        Called with a temporary folder; the files that it writes there are saved with the model.

    Raises
    ------
    FileExistsError
        The path is a file, or a folder that is not empty and ``overwrite`` is False.
    ValueError
        The model holds something that JSON cannot, or the prefix a path separator.
    OSError
        The disk is full, or the place read-only. What was there before still is.
    """
    folder = _resolve(path, prefix)
    if folder.exists() and not folder.is_dir():
        raise NameTakenError(f"path='{path}' is a file: a model is saved as a folder, give another name.")
    if folder.is_dir() and not overwrite and any(folder.iterdir()):
        raise NameTakenError(
            f"path='{path}' exists and holds {listing(sorted(os.listdir(folder)))}. Save with overwrite=True to "
            "replace the model in it (other files stay), or give another path."
        )
    weights, tensors = _pack(saved)
    old_data = _data_names(locate(folder, f"{prefix}model", f"{prefix}{INFO}"))
    with staging(folder, f"{prefix}model") as temporary:
        if write_data is not None:
            write_data(temporary)
        data = sorted(_with_prefix(file, prefix) for file in temporary.iterdir())
        (temporary / f"{prefix}{WEIGHTS}").write_bytes(weights)
        (temporary / f"{prefix}{INFO}").write_bytes(_describe(saved, weights, tensors, data))
    for name in old_data - set(data):
        (folder / name).unlink(missing_ok=True)


def read_folder(path: str | Path, prefix: str = "") -> SavedModel:
    """Read a model that :func:`write_folder` wrote; the tensors come on the CPU.

    Raises
    ------
    FileNotFoundError
        There is no model with this prefix, or a part of it is missing.
    ValueError
        A file is damaged, or was written by another program.
    RuntimeError
        The folder was written by a newer scvi_lite.
    """
    import safetensors
    import safetensors.torch

    info = read_info(path, prefix)
    file = locate(_resolve(path, prefix), f"{prefix}model", f"{prefix}{WEIGHTS}")
    if not file.is_file():
        raise NotThereError(
            f"'{path}' holds {prefix}{INFO} but not its weights, {prefix}{WEIGHTS}: copy the whole folder."
        )
    weights = file.read_bytes()
    _check_weights(file, weights, info["weights"])
    try:
        tensors = safetensors.torch.load(weights)
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise ValueError(f"{file} is damaged: {error}. Restore it from a copy.") from error
    if missing := sorted(info["tensors"].keys() - tensors.keys()):
        raise ValueError(
            f"{file} misses the tensors {listing(missing)} that {prefix}{INFO} names: the two files do not match."
        )
    index_names = {split: f"indices/{split}" for split in SPLITS}
    return SavedModel(
        class_name=info["class"],
        arguments=info["arguments"],
        registry=info["registry"],
        var_names=info["var_names"],
        state={name: tensors[name] for name in info["tensors"] if name not in index_names.values()},
        history={name: history_frame(name, column) for name, column in info["history"].items()},
        indices={split: positions(name, tensors[name]) for split, name in index_names.items() if name in tensors},
        is_trained=info["is_trained"],
        version=info["version"],
        frozen=info.get("frozen", {}),
    )


def read_info(path: str | Path, prefix: str = "") -> dict[str, Any]:
    """The contents of ``model.json``, checked: what a model is, without its weights and without importing PyTorch.

    ``tensors`` maps the name of each tensor to its shape, ``history`` each metric to its ``epoch`` and ``value``,
    ``data`` lists the data files that belong to the model. Raises like :func:`read_folder`.
    """
    folder = _resolve(path, prefix)
    file = locate(folder, f"{prefix}model", f"{prefix}{INFO}")
    if not file.is_file():
        raise NotThereError(_not_a_model(path, folder, prefix))
    try:
        info = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:  # not JSON, or not even text
        raise ValueError(f"{file} is damaged, it is not valid JSON: {error}. Restore it from a copy.") from None
    if not isinstance(info, dict) or info.get("format") != FORMAT:
        raise ValueError(f"{file} was not written by scvi_lite: its 'format' is not '{FORMAT}'.")
    number = info.get("format_version")
    if not isinstance(number, int) or number < 1:
        raise ValueError(f"{file} is damaged: its format_version is {number!r}.")
    if number > FORMAT_VERSION:
        raise RuntimeError(
            f"{file} was written by a newer scvi_lite, {info.get('version')} (format {number}; this one reads up to "
            f"{FORMAT_VERSION}): upgrade with `pip install --upgrade scvi-lite`."
        )
    if wrong := [key for key, kind in REQUIRED.items() if not isinstance(info.get(key), kind)]:
        raise ValueError(f"{file} is damaged: {listing(wrong)} missing or of the wrong type. Restore it from a copy.")
    return info


def find_data(path: str | Path, prefix: str = "") -> Path | None:
    """The data file saved with the model (``adata.h5ad``, ``mdata.h5mu``), or None where it was saved without.

    Raises like :func:`read_folder`; a data file that should be there and is not raises FileNotFoundError.
    """
    names = read_info(path, prefix)["data"]
    if not names:
        return None
    file = locate(_resolve(path, prefix), f"{prefix}model", Path(str(names[0])).name)
    if not file.is_file():
        raise NotThereError(f"{file}, saved with the model, is gone: restore it, or load with adata=.")
    return file


def _resolve(path: str | Path, prefix: str) -> Path:
    if Path(prefix).name != prefix:
        raise ValueError(f"prefix={prefix!r} holds a path separator: name the folder in the path.")
    return Path(path).expanduser().resolve()


def _data_names(file: Path) -> set[str]:
    """The data files that a model.json names; none where it is missing or unreadable."""
    try:
        return {Path(name).name for name in json.loads(file.read_bytes())["data"]}
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def _with_prefix(file: Path, prefix: str) -> str:
    """Put the prefix before the name of a data file, unless it is there."""
    name = file.name if file.name.startswith(prefix) else f"{prefix}{file.name}"
    return file.rename(file.with_name(name)).name


def _pack(saved: SavedModel) -> tuple[bytes, dict[str, list[int]]]:
    """All tensors as the bytes of a safetensors file, and their shapes by name."""
    import numpy as np
    import safetensors.torch
    import torch

    # a copy of each: safetensors takes neither views nor tensors that share memory
    as_stored = {"memory_format": torch.contiguous_format}
    tensors = {name: tensor.detach().cpu().clone(**as_stored) for name, tensor in saved.state.items()}
    for split, rows in saved.indices.items():
        tensors[f"indices/{split}"] = torch.from_numpy(np.array(rows, dtype=np.int64))
    return safetensors.torch.save(tensors), {name: list(tensor.shape) for name, tensor in tensors.items()}


def _describe(saved: SavedModel, weights: bytes, tensors: dict[str, list[int]], data: list[str]) -> bytes:
    """The contents of model.json."""
    import torch

    info = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "class": saved.class_name,
        "version": saved.version,
        "torch_version": str(torch.__version__),
        "is_trained": bool(saved.is_trained),
        "arguments": saved.arguments,
        "registry": saved.registry,
        "frozen": saved.frozen,
        "history": {name: history_column(frame) for name, frame in saved.history.items()},
        "weights": {"bytes": len(weights), "sha256": hashlib.sha256(weights).hexdigest()},
        "data": data,
        "tensors": tensors,
        "var_names": saved.var_names,
    }
    lines = [f"{json.dumps(key)}: {to_json(key, value)}" for key, value in info.items()]
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode("utf-8", "surrogatepass")


def _check_weights(file: Path, weights: bytes, expected: dict[str, Any]) -> None:
    if len(weights) != expected.get("bytes"):
        raise ValueError(
            f"{file} is damaged: it holds {len(weights)} bytes where {expected.get('bytes')} were written, as after an "
            "interrupted copy. Copy it again."
        )
    if hashlib.sha256(weights).hexdigest() != expected.get("sha256"):
        raise ValueError(
            f"{file} is damaged: its checksum is not the one in model.json. Restore both files from one copy."
        )


def _not_a_model(path: str | Path, folder: Path, prefix: str) -> str:
    """What to say where there is no model."""
    if folder.suffix == ".ckpt" and folder.is_file():
        return (
            f"'{path}' is a checkpoint, which holds a model without its data: give them, load(..., adata=adata). To "
            "train on, model.train(max_epochs=..., ckpt_path=...)."
        )
    if folder.is_file():
        return f"'{path}' is a file: give the folder that holds the model, '{Path(path).parent}'."
    if not folder.exists():
        return f"'{path}' does not exist."
    names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    prefixes = [name.removesuffix(INFO) for name in names if name.endswith(INFO) and name != f"{prefix}{INFO}"]
    hint = f" There are models with prefix={' or '.join(map(repr, prefixes))}." if prefixes else ""
    if f"{prefix}attr.pkl" in names:
        hint += " scvi-tools before 0.15 wrote it: let scvi-tools convert it, by Model.convert_legacy_save()."
    return f"'{path}' is not a model folder: it has no {prefix}{INFO}, it holds {listing(names)}.{hint}"
