"""One call of ``lightning.Trainer``: the training of every model."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint, LearningRateMonitor, ModelCheckpoint

from scvi_lite.data.datamodule import CellDataModule, Split
from scvi_lite.errors import check_options, unknown
from scvi_lite.train import strategies
from scvi_lite.train.callbacks import (
    AtomicCheckpointIO,
    LocalProgress,
    Progress,
    StopFlag,
    StopTogether,
    WarmEarlyStopping,
    handle_interrupts,
)
from scvi_lite.train.quiet import quiet
from scvi_lite.train.strategies import as_list
from scvi_lite.train.task import METRICS, Task


@dataclass(frozen=True)
class Stopping:
    """When to stop early and what to keep on the way."""

    early_stopping: bool = False
    early_stopping_monitor: str = "elbo_validation"
    early_stopping_min_delta: float = 0.0
    early_stopping_patience: int = 45
    early_stopping_warmup_epochs: int = 0
    early_stopping_mode: str = "min"
    enable_checkpointing: bool = False
    checkpointing_monitor: str = "validation_loss"
    learning_rate_monitor: bool = False


def trainer_options(options: Mapping[str, Any]) -> tuple[Stopping, dict[str, Any]]:
    """Sort the options of ``train`` into ours and those of ``lightning.Trainer``; an unknown one is an error.

    Raises
    ------
    TypeError
        If an option is neither.
    """
    ours = [f.name for f in fields(Stopping)]
    theirs = list(inspect.signature(pl.Trainer).parameters)
    check_options("train()", options, ours + theirs + ["ckpt_path"])
    stopping = Stopping(**{k: v for k, v in options.items() if k in ours})
    return stopping, {k: v for k, v in options.items() if k not in ours}


def check_monitors(stopping: Stopping, task: Task, n_validation: int) -> None:
    """Refuse, before training, to wait for a metric that will not come.

    Raises
    ------
    ValueError
        If a monitored metric does not exist, or is a validation metric and no cells are set aside for validation.
    """
    known = [f"{m}_{part}" for part in ("train", "validation") for m in METRICS[1:]] + ["train_loss", "validation_loss"]
    monitors = {
        "early_stopping_monitor": stopping.early_stopping_monitor if stopping.early_stopping else None,
        "checkpointing_monitor": stopping.checkpointing_monitor if stopping.enable_checkpointing else None,
        "lr_scheduler_metric": task.plan.lr_scheduler_metric if task.plan.reduce_lr_on_plateau else None,
    }
    for argument, metric in monitors.items():
        if metric is None:
            continue
        if metric not in known:
            raise ValueError(unknown(argument, metric, known, "a metric", "Metrics"))
        if "validation" in metric and n_validation == 0:
            raise ValueError(
                f"{argument}={metric!r} needs validation cells, and none are set aside. Give train_size=0.9, or watch "
                f"{metric.replace('validation', 'train')!r}."
            )
    if stopping.early_stopping_mode not in ("min", "max"):
        raise ValueError(unknown("early_stopping_mode", stopping.early_stopping_mode, ("min", "max")))


def fit(
    task: Task, data: CellDataModule, stopping: Stopping, options: dict[str, Any]
) -> tuple[pl.Trainer | None, bool]:
    """Train, here or in worker processes; gives the trainer, if it was here, and whether the user interrupted."""
    n_workers = strategies.workers_needed(options)
    if n_workers:
        from scvi_lite.train.launch import launch

        return None, launch(task, data, stopping, options, n_workers)
    progress = LocalProgress() if options.get("enable_progress_bar", True) else None
    return run(task, data, stopping, options, progress, StopFlag())


def run(
    task: Task,
    data: CellDataModule,
    stopping: Stopping,
    options: dict[str, Any],
    progress: Progress | None,
    stop: StopFlag,
) -> tuple[pl.Trainer, bool]:
    """Train in this process, one of several under a distributed strategy."""
    options = dict(options)
    callbacks = [*as_list(options.pop("callbacks", None)), StopTogether(stop)]
    ckpt_path = options.pop("ckpt_path", None)
    root = options.setdefault("default_root_dir", "scvi_lite_runs")
    callbacks += stopping_callbacks(stopping, Path(root), any(isinstance(c, Checkpoint) for c in callbacks))
    if progress is not None:
        callbacks.append(progress)
    trainer_defaults = {
        "logger": False,
        "num_sanity_val_steps": 0,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "log_every_n_steps": 10,
    }
    forced = {
        "callbacks": callbacks,
        "plugins": [*as_list(options.pop("plugins", None)), AtomicCheckpointIO()],
        "enable_checkpointing": any(isinstance(c, Checkpoint) for c in callbacks),
    }
    with quiet():
        trainer = pl.Trainer(**(trainer_defaults | options | forced))
        with handle_interrupts(stop):
            trainer.fit(task, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    return trainer, stop.requested


def stopping_callbacks(stopping: Stopping, root: Path, has_checkpoint: bool) -> list[pl.Callback]:
    """Early stopping, checkpoints and the learning-rate monitor, as asked for."""
    callbacks: list[pl.Callback] = []
    if stopping.early_stopping:
        callbacks.append(
            WarmEarlyStopping(
                monitor=stopping.early_stopping_monitor,
                min_delta=stopping.early_stopping_min_delta,
                patience=stopping.early_stopping_patience,
                mode=stopping.early_stopping_mode,
                warmup_epochs=stopping.early_stopping_warmup_epochs,
            )
        )
    if stopping.enable_checkpointing and not has_checkpoint:
        monitor = stopping.checkpointing_monitor
        callbacks.append(ModelCheckpoint(root / "checkpoints", monitor=monitor, save_last=True, filename="best"))
    if stopping.learning_rate_monitor:
        callbacks.append(LearningRateMonitor())
    return callbacks


def read_checkpoint(path: str | Path, n_cells: int) -> tuple[Split, int, int]:
    """The split, seed and finished steps of the running epoch that a checkpoint holds.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is not a checkpoint of ours, or is of another number of cells.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"ckpt_path={str(path)!r}: there is no such file.")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)["scvi_lite"]
    except Exception as error:
        raise ValueError(
            f"ckpt_path={str(path)!r} is not a checkpoint that train() wrote, or is damaged: {error}"
        ) from error
    if state["n_cells"] != n_cells:
        raise ValueError(
            f"ckpt_path={str(path)!r} was written when training on {state['n_cells']} cells; here are {n_cells}. Resume "
            "with the same AnnData, or start anew without ckpt_path."
        )
    indices = {part: rows.numpy() for part, rows in state["indices"].items()}
    return Split(**indices), state["seed"], state["skip_steps"]
