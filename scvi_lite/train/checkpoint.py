"""Checkpoints: what resuming needs beside Lightning's own, written so that a kill leaves a whole file."""

from __future__ import annotations

import json
import os
import pickle
import random
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import nn

from scvi_lite.data.datamodule import Split
from scvi_lite.errors import listing
from scvi_lite.io.folder import SavedModel
from scvi_lite.io.values import history_frame

KEY = "scvi_lite"  # the part of a checkpoint that this package writes


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoints are written beside their place and renamed: a kill leaves the one before."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        part = f"{path}.part"
        super().save_checkpoint(checkpoint, part, storage_options)
        os.replace(part, path)


# Writing --------------------------------------------------------------------------------------------------------------


def describe(trainer: pl.Trainer) -> dict[str, Any]:
    """Where in the data a training is, and the state of every rank's random generators."""
    data = trainer.datamodule
    progress = trainer.fit_loop.epoch_loop.batch_progress
    states: list[Any] = [get_random_state()]
    if trainer.world_size > 1:
        mine, states = states[0], [None] * trainer.world_size
        torch.distributed.all_gather_object(states, mine)
    return {
        "indices": {part: torch.from_numpy(rows) for part, rows in vars(data.split).items()},
        "seed": data.seed,
        "n_cells": len(data.store),
        "batch_size": data.batch_size,
        "skip_steps": 0 if epoch_is_over(trainer) else progress.current.processed,
        "random_states": states,
    }


def epoch_is_over(trainer: pl.Trainer) -> bool:
    """Whether all that belongs to the running epoch is done: its hooks are called when it counts as processed."""
    progress = trainer.fit_loop.epoch_progress.current
    return progress.processed == progress.ready


def finish_batch(checkpoint: dict[str, Any], trainer: pl.Trainer) -> None:
    """Make a checkpoint that was asked for at the end of a minibatch go on with what follows that minibatch.

    From such a checkpoint Lightning goes on with the next minibatch and leaves out the validation that was due or,
    after the last minibatch, the end of the epoch. It leaves out nothing if the minibatch counts as completed, and the
    validation as begun.
    """
    loop = trainer.fit_loop.epoch_loop
    progress = loop.batch_progress
    if epoch_is_over(trainer) or progress.current.completed == progress.current.processed:
        return
    validates = trainer.enable_validation and loop._should_check_val_fx(trainer.fit_loop._data_fetcher)
    if not (validates or progress.is_last_batch):
        return
    state = checkpoint["loops"]["fit_loop"]
    for counts in (state["epoch_loop.batch_progress"]["total"], state["epoch_loop.batch_progress"]["current"]):
        counts["completed"] = counts["processed"]
    if validates:
        for counts in (state["epoch_loop.val_loop.batch_progress"][k] for k in ("total", "current")):
            counts |= {"ready": 1, "started": 1, "processed": 0, "completed": 0}


# Reading --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Start:
    """Where a training begins."""

    split: Split
    seed: int
    skip_steps: int = 0  #: minibatches of the first epoch that are done


def read_checkpoint(path: str | Path, module: nn.Module, n_cells: int, batch_size: int) -> Start:
    """Look into a checkpoint before any work.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is not a checkpoint of ours, is damaged, or is of another network or of other data.
    """
    name = f"ckpt_path={str(path)!r}"
    checkpoint = _read(name, Path(path).expanduser())
    state = checkpoint[KEY]
    _check_shapes(name, _weights(checkpoint), module)
    if state["n_cells"] != n_cells:
        raise ValueError(
            f"{name} was written when training on {state['n_cells']} cells; here are {n_cells}. Resume with the same "
            "AnnData, or start anew without ckpt_path."
        )
    if state["skip_steps"] and state["batch_size"] != batch_size:
        raise ValueError(
            f"{name} was written within an epoch of minibatches of {state['batch_size']} cells; they cannot change to "
            f"{batch_size} before its end. Give batch_size={state['batch_size']}."
        )
    return Start(Split(**_indices(state)), state["seed"], state["skip_steps"])


def read_model(path: str | Path) -> SavedModel:
    """The model that a checkpoint was written of, as it was then.

    Raises
    ------
    ValueError
        If it is not a checkpoint of ours, does not tell which model it is of, or is damaged.
    """
    name = f"dir_path={str(path)!r}"
    checkpoint = _read(name, Path(path).expanduser())
    state = checkpoint[KEY]
    if "model" not in state:
        raise ValueError(
            f"{name} does not tell what model it is of, as an older scvi_lite wrote it. It goes into a model made with "
            "the same data and arguments: model.train(max_epochs=..., ckpt_path=...)."
        )
    try:
        columns = {metric: {"epoch": [*v], "value": [*v.values()]} for metric, v in state["history"].items()}
        return SavedModel(
            **json.loads(state["model"]),
            state=_weights(checkpoint),
            history={metric: history_frame(metric, column) for metric, column in columns.items()},
            indices=_indices(state),
            is_trained=True,
        )
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{name} is damaged: {error}. Restore it from a copy.") from error


def _read(name: str, path: Path) -> dict[str, Any]:
    """A checkpoint of ours, with all of its parts; errors of :func:`read_checkpoint`."""
    if not path.is_file():
        raise FileNotFoundError(f"{name}: there is no such file.")
    checkpoint = _load(name, path)
    if not (isinstance(checkpoint, dict) and KEY in checkpoint and "state_dict" in checkpoint):
        raise ValueError(f"{name} is not a checkpoint that train(enable_checkpointing=True) wrote.")
    if not _is_whole(checkpoint):
        raise ValueError(f"{name} is damaged: parts are missing or of the wrong type. Start anew without it.")
    return checkpoint


def _weights(checkpoint: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The weights of the module."""
    weights = checkpoint["state_dict"].items()
    return {key.removeprefix("module."): value for key, value in weights if key.startswith("module.")}


def _indices(state: dict[str, Any]) -> dict[str, np.ndarray]:
    """Rows of the training, validation and test cells."""
    return {part: rows.numpy() for part, rows in state["indices"].items()}


def _load(name: str, path: Path) -> Any:
    """The contents of a checkpoint: plain data and tensors, nothing that runs."""
    try:
        with zipfile.ZipFile(path) as archive:  # older formats of PyTorch, which we never wrote, end here
            if (changed := archive.testzip()) is not None:
                raise ValueError(f"{changed} has changed since it was written")
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # whose text tells how to load it all the same
        raise ValueError(f"{name} is damaged, or not a checkpoint: it holds more than plain data.") from error
    except (RuntimeError, EOFError, OSError, zipfile.BadZipFile, ValueError) as error:
        first_line = str(error).partition("\n")[0] or "it ends too early"
        raise ValueError(f"{name} is damaged, or not a checkpoint: {first_line}") from error


def _is_whole(checkpoint: dict[str, Any]) -> bool:
    """Whether a checkpoint has the parts that are read from it, and they are of their types."""
    state, weights = checkpoint[KEY], checkpoint["state_dict"]
    numbers = ("seed", "n_cells", "batch_size", "skip_steps")
    return (
        isinstance(weights, dict)
        and all(isinstance(weight, torch.Tensor) for weight in weights.values())
        and all(checkpoint.get(part) for part in ("optimizer_states", "loops", "pytorch-lightning_version"))
        and isinstance(state, dict)
        and all(isinstance(state.get(part), int) and state[part] >= 0 for part in numbers)
        and all(isinstance(state.get(part), kind) for part, kind in (("random_states", list), ("indices", dict)))
        and state["indices"].keys() == Split.__dataclass_fields__.keys()
        and all(_are_rows(rows, state["n_cells"]) for rows in state["indices"].values())
    )


def _are_rows(rows: Any, n_cells: int) -> bool:
    is_list = isinstance(rows, torch.Tensor) and rows.dtype == torch.int64 and rows.ndim == 1
    return is_list and bool(((rows >= 0) & (rows < n_cells)).all())


def _check_shapes(name: str, weights: dict[str, torch.Tensor], module: nn.Module) -> None:
    there = {key: tuple(value.shape) for key, value in weights.items()}
    here = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    differ = [key for key in {**here, **there} if here.get(key) != there.get(key)]
    if differ:
        raise ValueError(
            f"{name} is of another network: these weights differ in shape or are not there: {listing(differ)}. "
            "Make the model with the arguments and genes it had."
        )


def check_ranks(state: dict[str, Any], world_size: int) -> None:
    """Refuse to go on within an epoch on another number of devices.

    Raises
    ------
    ValueError
        If the devices differ in number.
    """
    before = len(state["random_states"])
    if state["skip_steps"] and before != world_size:
        raise ValueError(
            f"The checkpoint was written within an epoch on {before} device(s), which cannot go on with {world_size}. "
            f"Give devices={before}, or a checkpoint from the end of an epoch."
        )


# Random generators ----------------------------------------------------------------------------------------------------


def mix(*numbers: int) -> int:
    """One seed from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def get_random_state() -> dict[str, Any]:
    """State of all random generators, as tensors and plain numbers."""
    version, internal, gauss = random.getstate()
    numpy: Any = np.random.get_state(legacy=False)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [
            torch.from_numpy(numpy["state"]["key"].astype(np.int64)),
            *(numpy["state"]["pos"], numpy["has_gauss"], numpy["gauss"]),
        ],
        "python": [version, list(internal), gauss],
    }


def set_random_state(state: dict[str, Any], trainer: pl.Trainer) -> None:
    """Put the random generators where they were; on more ranks than there were, where they never were."""
    states, rank = state["random_states"], trainer.global_rank
    if rank >= len(states):
        torch.manual_seed(mix(state["seed"], rank, trainer.current_epoch))
        return
    mine = states[rank]
    torch.set_rng_state(mine["torch"].cpu())
    if mine["cuda"] and torch.cuda.device_count() == len(mine["cuda"]):
        torch.cuda.set_rng_state_all([s.cpu() for s in mine["cuda"]])
    key, position, has_gauss, cached = mine["numpy"]
    np.random.set_state(("MT19937", key.cpu().numpy().astype(np.uint32), position, has_gauss, cached))
    version, internal, gauss = mine["python"]
    random.setstate((version, tuple(internal), gauss))
