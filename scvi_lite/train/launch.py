"""Several devices from a notebook: fresh worker processes for each training.

A notebook cannot be run again by every process, as a script can, and a fork of its kernel inherits a CUDA context and
thread pools that do not survive it. So each ``train()`` starts new Python processes that import this package, read the
cells from memory-mapped files, train by the same :func:`~scvi_lite.train.fit.run` as everywhere, and hand weights and
history back. Nothing is left behind, so any number of models can be trained in one session.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cloudpickle
import torch

from scvi_lite.data.datamodule import CellDataModule
from scvi_lite.data.shared import write_store
from scvi_lite.train.divergence import TrainingDivergedError
from scvi_lite.train.processes import Workers
from scvi_lite.train.strategies import as_list, find_devices
from scvi_lite.train.task import Task


@dataclass
class Job:
    """What a worker needs, written once for all of them; the cells are in files beside it."""

    task: Task
    data: CellDataModule
    stopping: Any
    options: dict[str, Any]
    random_state: tuple[int, torch.Tensor]  #: seed and state of PyTorch's generator, for the first worker to go on from


@dataclass
class Outcome:
    """What the first worker hands back."""

    task: dict[str, Any]  #: attributes of the task
    split: Any
    seed: int  #: of PyTorch's generator, with which the session goes on
    interrupted: bool
    luggage: list[dict[str, Any]]  #: what callbacks and loggers hold
    diverged: str | None = None


TRAVELS = ("epoch_history", "first_epoch", "latest", "steps", "good_steps")  # attributes of the task


def launch(task: Task, data: CellDataModule, stopping: Any, options: dict[str, Any], n_workers: int) -> bool:
    """Train in ``n_workers`` fresh processes; the task, its module and the data module end as after a training here.

    Returns
    -------
    Whether the user interrupted.

    Raises
    ------
    WorkerError
        If a worker dies; the others are ended and the model is as it was. What a worker raises is raised here.
    TrainingDivergedError
        As everywhere; the task holds the last good weights.
    """
    data.check_size(n_workers)
    device = next(task.module.parameters()).device
    with tempfile.TemporaryDirectory(prefix="scvi_lite_") as name:
        folder = Path(name)
        try:
            write_job(folder, task, data, stopping, options)
            with Workers(folder, n_workers, options.get("enable_progress_bar", True)) as workers:
                interrupted = workers.attend()
            device = find_devices(options)[0]
        finally:
            task.module.to(device)
        outcome: Outcome = cloudpickle.loads((folder / "outcome.pkl").read_bytes())
        state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
    task.module.load_state_dict(state)
    task.last_good = state
    for name, value in outcome.task.items():
        setattr(task, name, value)
    data.split = outcome.split
    torch.manual_seed(outcome.seed)
    for one, luggage in zip(travellers(options), outcome.luggage, strict=True):
        one.__dict__.update(luggage)
    if outcome.diverged is not None:
        raise TrainingDivergedError(outcome.diverged)
    return interrupted or outcome.interrupted


def write_job(folder: Path, task: Task, data: CellDataModule, stopping: Any, options: dict[str, Any]) -> None:
    """Write what the workers need: the cells as files to map into memory, and the rest, which is small."""
    write_store(data.store, data.source, folder)
    task.module.cpu()  # a worker has a device of its own
    random_state = torch.initial_seed(), torch.get_rng_state()
    store, data.store = data.store, None
    try:
        (folder / "job.pkl").write_bytes(cloudpickle.dumps(Job(task, data, stopping, options, random_state)))
    finally:
        data.store = store


# Callbacks and loggers ------------------------------------------------------------------------------------------------


def travellers(options: Mapping[str, Any]) -> list[Any]:
    """The user's callbacks and loggers, which go to the workers and whose contents come back."""
    return [one for name in ("callbacks", "logger") for one in as_list(options.get(name)) if not isinstance(one, bool)]


def pack(one: Any) -> dict[str, Any]:
    """The attributes that hold plain data, for the object itself: numbers, text, arrays, and collections of these."""
    return {name: value for name, value in vars(one).items() if _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(_is_plain(part) for pair in value.items() for part in pair)
    if isinstance(value, list | tuple | set):
        return all(_is_plain(part) for part in value)
    known = str | int | float | bytes | Path | torch.Tensor
    return value is None or isinstance(value, known) or type(value).__module__ == "numpy"
