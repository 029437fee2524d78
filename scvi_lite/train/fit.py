"""One call of ``lightning.Trainer``: the training of every model."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import lightning
import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint, ProgressBar

from scvi_lite.data.datamodule import CellDataModule
from scvi_lite.train.callbacks import SaveCheckpoint, StopFlag, StopTogether, WarmEarlyStopping, handle_interrupts
from scvi_lite.train.checkpoint import AtomicCheckpointIO
from scvi_lite.train.memory import kept_memory
from scvi_lite.train.options import Stopping
from scvi_lite.train.plan import is_of_validation
from scvi_lite.train.progress import Progress, choose_display
from scvi_lite.train.quiet import quiet
from scvi_lite.train.strategies import as_list
from scvi_lite.train.task import Task

logger = logging.getLogger("scvi_lite")

SHORTENED = "2.6"  # Lightning, of whose loop over minibatches ours is a short form


def fit(
    task: Task, data: CellDataModule, stopping: Stopping, options: dict[str, Any], n_workers: int = 0
) -> tuple[pl.Trainer | None, bool]:
    """Train, here or in worker processes; gives the trainer, if it was here, and whether the user interrupted."""
    if n_workers:
        from scvi_lite.train.launch import launch

        return None, launch(task, data, stopping, options, n_workers)
    progress = Progress(choose_display()) if options.get("enable_progress_bar", True) else None
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
    ckpt_path = options.pop("ckpt_path", None)
    root = options["default_root_dir"]
    theirs = as_list(options.pop("callbacks", None))
    callbacks = [*theirs, StopTogether(stop), *stopping_callbacks(stopping, Path(root), len(data.split.validation))]
    if any(isinstance(callback, Checkpoint) for callback in theirs):
        callbacks = [c for c in callbacks if c in theirs or not isinstance(c, Checkpoint)]
    if progress is not None and not any(isinstance(callback, ProgressBar) for callback in theirs):
        callbacks.append(progress)
    defaults = {
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
    deterministic, dtype = torch.are_deterministic_algorithms_enabled(), next(task.module.parameters()).dtype
    with quiet():
        trainer = pl.Trainer(**(defaults | options | forced))
        shorten_loop(trainer)
        try:
            with handle_interrupts(stop), kept_memory():
                trainer.fit(task, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
        finally:  # what Lightning leaves behind: the weights on the CPU in the training's precision, a global switch
            task.module.to(trainer.strategy.root_device, dtype)
            torch.use_deterministic_algorithms(deterministic)
    return trainer, stop.requested


def release(trainer: pl.Trainer) -> None:
    """Free what is large of an earlier training: its cells, and what its optimisers know of each weight.

    Parts of a trainer hold one another, so that Python frees it late; to have it search takes a quarter of a second.
    """
    for optimizer in trainer.optimizers:
        vars(optimizer).update(state={}, fused_step=None)
    trainer.datamodule.store = None


def shorten_loop(trainer: pl.Trainer) -> None:
    """Take the short loop over minibatches where it is known to do what Lightning's does; else leave Lightning's."""
    if lightning.__version__.split(".")[:2] == SHORTENED.split("."):
        from scvi_lite.train.loop import MinibatchLoop  # which needs private names of Lightning's

        trainer.fit_loop.epoch_loop = MinibatchLoop(trainer, trainer.min_steps, trainer.max_steps)
    elif trainer.is_global_zero:
        logger.info(
            "Training goes by the loop of Lightning %s: the short one, faster for small networks, is for Lightning %s.",
            lightning.__version__,
            SHORTENED,
        )


def stopping_callbacks(stopping: Stopping, root: Path, n_validation: int) -> list[pl.Callback]:
    """Early stopping and checkpoints, as asked for."""
    callbacks: list[pl.Callback] = []
    if stopping.early_stopping:
        options = ("monitor", "min_delta", "patience", "mode", "warmup_epochs")
        callbacks.append(WarmEarlyStopping(**{name: getattr(stopping, f"early_stopping_{name}") for name in options}))
    if stopping.enable_checkpointing:
        monitor = stopping.checkpointing_monitor or ("validation_loss" if n_validation else "train_loss")
        place, at_end = root / "checkpoints", not is_of_validation(monitor)
        callbacks.append(SaveCheckpoint(place, "best", monitor, save_on_train_epoch_end=at_end))
        # With save_last, the other would write it only when it is the best.
        callbacks.append(ModelCheckpoint(place, "last", save_on_train_epoch_end=at_end))
    return callbacks
