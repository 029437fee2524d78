"""Saving a model to a folder, and loading it again."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from scvi_lite.analysis.minify import setup_for
from scvi_lite.data.genes import match_genes
from scvi_lite.data.modalities import is_mudata
from scvi_lite.data.registry import Registry
from scvi_lite.data.view import Named
from scvi_lite.errors import without_absent, without_needless
from scvi_lite.nn.module import Frozen
from scvi_lite.train.devices import choose_device

if TYPE_CHECKING:
    from torch import Tensor

    from scvi_lite._typing import AnnData, Model, Module, SavedModel

M = TypeVar("M", bound="Model")

SAVE_NEEDLESS = {
    "save_kwargs": "weights are no pickle, and torch.save is not called",
    "legacy_mudata_format": "there is one format",
}
SAVE_ABSENT = {"datamodule": "cells that do not fit in memory are read from a backed AnnData"}
LOAD_NEEDLESS = {"backup_url": "models are not downloaded"}
LOAD_ABSENT = {
    "datamodule": "cells that do not fit in memory are read from a backed AnnData",
    "allowed_classes_names_list": "a folder is loaded with the class that it holds",
}


def save(
    model: Model,
    dir_path: str | Path,
    prefix: str | None = None,
    overwrite: bool = False,
    save_anndata: bool = False,
    **anndata_write_kwargs: Any,
) -> None:
    """Save the model to a folder: ``model.safetensors`` and ``model.json``.

    With several ranks, all may call it: the first writes, and all go on when it is done.

    Parameters
    ----------
    dir_path
        The folder.
    prefix
        Put before the names of the files.
    overwrite
        Replace a model that is there.
    save_anndata
        Save the data with it, as ``adata.h5ad`` or ``mdata.h5mu``.
    **anndata_write_kwargs
        Options of ``AnnData.write_h5ad``, or of ``MuData.write_h5mu``.

    Raises
    ------
    FileExistsError
        If the folder holds files and ``overwrite`` is False.
    TypeError
        If ``dir_path`` is no path, or an option does not exist.
    """
    from scvi_lite.io.folder import write_folder
    from scvi_lite.train.ranks import on_first_rank

    check_path(dir_path)
    options = without_absent("save()", without_needless(anndata_write_kwargs, SAVE_NEEDLESS), SAVE_ABSENT)
    if options and not save_anndata:
        raise TypeError(
            f"save() has no option {next(iter(options))!r}; options of AnnData.write_h5ad go with save_anndata=True."
        )

    def write_data(folder: Path) -> None:
        if is_mudata(model.adata):
            import mudata

            with mudata.set_options(pull_on_update=False):
                model.adata.write_h5mu(folder / f"{prefix or ''}mdata.h5mu", **options)
        else:
            model.adata.write_h5ad(folder / f"{prefix or ''}adata.h5ad", **options)

    def write() -> None:
        data = write_data if save_anndata else None
        write_folder(dir_path, to_saved(model), prefix=prefix or "", overwrite=overwrite, write_data=data)

    sum_of_weights = sum(float(p.detach().double().sum()) for p in model.module.parameters())
    on_first_rank(write, f"save {dir_path} {prefix} {sum_of_weights}")


def load(
    cls: type[M],
    dir_path: str | Path,
    adata: AnnData | None = None,
    accelerator: str = "auto",
    device: int | str = "auto",
    prefix: str | None = None,
    **absent: Any,
) -> M:
    """Load a model from a folder that :meth:`save`, or scvi-tools, wrote. No code is run from it.

    Parameters
    ----------
    dir_path
        The folder; or a checkpoint (``.ckpt``) that ``train(enable_checkpointing=True)`` wrote, which needs ``adata``.
    adata
        Data for the model, with the genes it was trained on in any order. Not needed if they were saved with it.
    accelerator, device
        Where to put the model; a GPU if there is one.
    prefix
        What the names of the files begin with.
    **absent
        Options of scvi-tools without a use here, which may be None.

    Raises
    ------
    FileNotFoundError
        If there is no model, or no data.
    TypeError
        If ``dir_path`` is no path, or an option does not exist.
    ValueError
        If the files are damaged or foreign, hold another class, or do not fit ``adata``.
    """
    from scvi_lite.io.restore import read_data
    from scvi_lite.io.scvi_tools import is_scvi_tools_folder

    check_path(dir_path)
    absent = without_needless(absent, LOAD_NEEDLESS)
    without_absent("load()", absent, LOAD_ABSENT, ("dir_path", "adata", "accelerator", "device", "prefix"))
    prefix = prefix or ""
    saved = read_saved(dir_path, prefix)
    if saved.class_name != cls.__name__:
        raise ValueError(
            f"{dir_path} holds a {saved.class_name}, not a {cls.__name__}. Load it with {saved.class_name}.load(...)."
        )
    if adata is None:
        adata = read_data(dir_path, prefix, is_scvi_tools_folder(dir_path, prefix))
    model = from_saved(cls, saved, adata)
    model.to_device(choose_device(accelerator, device))
    return model


def read_saved(dir_path: str | Path, prefix: str = "") -> SavedModel:
    """A model as plain data, from a folder or a checkpoint, or a folder of scvi-tools; errors of :func:`load`."""
    from scvi_lite.io import scvi_tools
    from scvi_lite.io.folder import read_folder

    if Path(dir_path).suffix == ".ckpt" and Path(dir_path).expanduser().is_file():
        from scvi_lite.train.checkpoint import read_model

        return read_model(dir_path)
    foreign = scvi_tools.is_scvi_tools_folder(dir_path, prefix)
    return scvi_tools.read_scvi_tools(dir_path, prefix) if foreign else read_folder(dir_path, prefix)


def check_path(dir_path: Any) -> None:
    """Refuse what is no path.

    >>> check_path("models/first")
    """
    if not isinstance(dir_path, str | os.PathLike):
        raise TypeError(f"dir_path={dir_path!r}: the name of a folder is needed, a string or a pathlib.Path.")


def describe(model: Model) -> dict[str, Any]:
    """What of a :class:`~scvi_lite.io.folder.SavedModel` no training changes."""
    from scvi_lite import __version__

    return {
        "class_name": type(model).__name__,
        "arguments": model._arguments,
        "registry": model.registry.to_dict(),
        "var_names": model._var_names,
        "version": __version__,
        "frozen": model.module.frozen.to_dict(),
    }


def to_saved(model: Model) -> SavedModel:
    """The model as plain data."""
    from scvi_lite.io.folder import SavedModel

    split = {"train": model.train_indices, "validation": model.validation_indices, "test": model.test_indices}
    return SavedModel(
        **describe(model),
        state=model.module.state_dict(),
        history=model._history,
        indices={part: rows for part, rows in split.items() if rows is not None},
        is_trained=model.is_trained,
    )


def from_saved(
    cls: type[M], saved: SavedModel, adata: AnnData, load: Callable[[Module, Mapping[str, Tensor]], None] | None = None
) -> M:
    """A model from plain data, on the CPU; ``load`` puts the weights into its module, by default as they are.

    Raises
    ------
    ValueError
        If the parts do not fit each other, or ``adata``.
    """
    from scvi_lite.io.restore import check_names, check_sizes, load_weights

    model = cls.__new__(cls)
    registry = setup_for(Registry.from_dict(saved.registry), adata)
    adata = match_genes(adata, check_names(saved.var_names, registry))
    registry.check(adata)
    check_sizes(saved.arguments, saved.state)
    model._build(adata, registry, saved.arguments)
    (load or load_weights)(model.module, saved.state)
    if saved.frozen:
        model.module.freeze(Frozen.from_dict(saved.frozen, model.module))
        model._is_query = True
    model.is_trained, model._history = saved.is_trained, Named(saved.history)
    for part, rows in saved.indices.items():
        setattr(model, f"{part}_indices", rows)
    return model
