"""From the arguments of ``train()`` to one fit: what the training of every model shares."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from scvi_lite._settings import settings
from scvi_lite.data.datamodule import CellDataModule, Split
from scvi_lite.data.disk import load_for_training
from scvi_lite.data.sampler import check_external, split_rows
from scvi_lite.data.view import Named
from scvi_lite.errors import as_options, check_options, check_whole, warn, without_needless
from scvi_lite.model.files import describe
from scvi_lite.train import options as asked
from scvi_lite.train.checkpoint import Start, read_checkpoint
from scvi_lite.train.divergence import TrainingDivergedError
from scvi_lite.train.fit import fit, release
from scvi_lite.train.plan import heuristic_epochs, make_plan
from scvi_lite.train.presets import preset_plan
from scvi_lite.train.strategies import workers_needed
from scvi_lite.train.task import Task

if TYPE_CHECKING:
    from scvi_lite._typing import Model, Supervision
    from scvi_lite.nn.classifier import Adversary
    from scvi_lite.train.plan import Plan

SPLITTING = ("external_indexing", "drop_last", "shuffle_over")


def fit_model(
    model: Model,
    *,
    max_epochs: int | None = None,
    accelerator: str = "auto",
    devices: int | list[int] | str = "auto",
    train_size: float | None = None,
    validation_size: float | None = None,
    shuffle_set_split: bool = True,
    batch_size: int | None = None,
    early_stopping: bool = False,
    datasplitter_kwargs: Mapping[str, Any] | None = None,
    plan_kwargs: Mapping[str, Any] | None = None,
    strategy: Any = "auto",
    preset: str | None = None,
    adversary: Adversary | None = None,
    supervision: Supervision | None = None,
    **trainer_kwargs: Any,
) -> None:
    """Train a model; arguments, and errors, of :meth:`~scvi_lite.model.base.Model.train`.

    Parameters
    ----------
    preset
        Of models whose ``train`` takes one.
    adversary
        Trained along with the module, against it.
    supervision
        How cells that have a label are mixed into the minibatches.
    """
    model._check_can_train()
    defaults = {name: p.default for name, p in inspect.signature(model.train).parameters.items()}
    defaults.pop("trainer_kwargs", None)
    stopping, options = asked.sort_options({"early_stopping": early_stopping, **trainer_kwargs}, defaults)
    batch_size = (settings.batch_size or 128) if batch_size is None else batch_size
    check_whole(least=2, batch_size=batch_size)
    max_epochs, plan = _length_and_plan(model, preset, max_epochs, as_options("plan_kwargs", plan_kwargs), options)
    if shuffle_set_split not in (True, False):
        raise ValueError(f"shuffle_set_split={shuffle_set_split!r}: True or False is needed.")
    splitting = without_needless(as_options("datasplitter_kwargs", datasplitter_kwargs), asked.NEEDLESS)
    check_options("datasplitter_kwargs", splitting, SPLITTING if supervision is None else (*SPLITTING, "labeled_share"))
    if supervision is not None and "labeled_share" in splitting:
        supervision = replace(supervision, share=splitting["labeled_share"])
    options |= {"max_epochs": max_epochs, "accelerator": accelerator, "devices": devices, "strategy": strategy}
    shares = (train_size, validation_size, shuffle_set_split)
    start = _start(model, batch_size, options.get("ckpt_path"), shares, splitting.get("external_indexing"))
    n_validation = 0 if options.get("limit_val_batches") == 0 else len(start.split.validation)
    module = model.module
    further = [module.metric_name(name, part) for part in ("train", "validation") for name in module.extra_metrics]
    if n_validation == 0:
        stopping, plan = asked.without_validation(stopping, plan, defaults)
    asked.check_monitors(stopping, plan, options.get("callbacks"), n_validation, further)
    n_workers = workers_needed(options)

    earlier = {name: frame.iloc[:, 0].to_dict() for name, frame in model._history.items()}
    task = Task(model.module, plan, earlier, adversary)
    task.about = describe(model)
    task.monitor_lr |= stopping.learning_rate_monitor
    data = _minibatches(model, start, batch_size, splitting, supervision)
    if model.trainer is not None:
        release(model.trainer)
        model.trainer = None
    try:
        model.module.train()  # from here on, so that an interrupt cannot leave it so
        model.trainer, interrupted = fit(task, data, stopping, options, n_workers)
    except TrainingDivergedError:
        task.go_back()
        raise
    finally:
        _adopt(model, task, data)
    if interrupted:
        warn(f"Training was interrupted in epoch {task.epoch_reached}. The model is kept as trained so far.")


def _length_and_plan(
    model: Model, preset: str | None, max_epochs: int | None, given: dict[str, Any], options: Mapping[str, Any]
) -> tuple[int | None, Plan]:
    """Epochs, and how to descend: as given for the plan, else as the preset says, else as the model does.

    Raises
    ------
    TypeError
        If an option does not exist, or the model has no presets.
    ValueError
        If a value is out of range.
    """
    if max_epochs is not None:
        check_whole(max_epochs=max_epochs)
        max_epochs = int(max_epochs)  # Lightning takes no integer of NumPy
    if preset is not None:
        if "preset" not in inspect.signature(model.train).parameters:
            raise TypeError(f"train() of {type(model).__name__} has no presets; those of SCVI and SCANVI have.")
        epochs, ready = preset_plan(preset, model.adata.n_obs)
        if max_epochs is None and options.get("max_steps") is None:
            max_epochs = epochs
        if given.get("n_epochs_kl_warmup") is not None:
            del ready["n_steps_kl_warmup"]  # which would count instead
        given = ready | given
    elif max_epochs is None and "max_steps" not in options and "max_time" not in options:
        max_epochs = heuristic_epochs(model.adata.n_obs)
    return max_epochs, make_plan(model.plan, given)


def _start(
    model: Model, batch_size: int, ckpt_path: str | Path | None, shares: tuple[Any, Any, bool], external: Any
) -> Start:
    """Where a training begins: where a checkpoint left off, or with a split that the user gave, or a new one.

    ``shares`` are those of the cells to train on and to validate with, and whether these are drawn at random.

    Raises
    ------
    ValueError
        If a share is out of range, or there are fewer than two cells to train on.
    """
    n_cells = model.adata.n_obs
    if ckpt_path is not None:
        return read_checkpoint(ckpt_path, model.module, n_cells, batch_size)
    seed = settings.seed if settings.seed is not None else int(torch.randint(1 << 31, ()))
    if external is not None:
        split = Split(*check_external(external, n_cells))
    else:
        split = Split(*split_rows(n_cells, *shares, torch.Generator().manual_seed(seed)))
    if len(split.train) < 2:
        raise ValueError(
            f"{len(split.train)} training cell(s) of {n_cells}: at least two are needed. Give more cells, or a "
            "larger train_size."
        )
    return Start(split, seed)


def _minibatches(
    model: Model, start: Start, batch_size: int, splitting: Mapping[str, Any], supervision: Supervision | None
) -> CellDataModule:
    """The cells that a training reads, from where it begins."""
    data = CellDataModule(
        load_for_training(model.adata, model.registry),
        start.split,
        batch_size,
        start.seed,
        splitting.get("drop_last", False),
        splitting.get("shuffle_over", "shard"),
        source=(str(model.adata.filename), model.registry) if model.adata.isbacked else None,
        supervision=supervision,
    )
    data.skip_steps = start.skip_steps
    return data


def _adopt(model: Model, task: Task, data: CellDataModule) -> None:
    """Take over the history and the split of a training, however it ended."""
    model.module.eval()
    model.module.zero_grad()
    task.last_good = None
    if not task.has_trained:
        return
    model._history = Named(
        (name, pd.Series(values, dtype=np.float64).rename_axis("epoch").to_frame(name))
        for name, values in task.epoch_history.items()
    )
    model.train_indices, model.validation_indices = data.split.train, data.split.validation
    model.test_indices = data.split.test
    model.is_trained = True
