"""Lightning's loop over minibatches, without the hooks that nobody listens to."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, Timer
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.plugins.precision import DoublePrecision, MixedPrecision, Precision
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden

from scvi_lite.train.adam import Adam, AdamW
from scvi_lite.train.callbacks import StopTogether
from scvi_lite.train.graph import GraphedStep, graphed_step
from scvi_lite.train.progress import Progress

START, END = "on_train_batch_start", "on_train_batch_end"
WITHIN = ("on_before_zero_grad", "on_before_backward", "on_after_backward", "on_before_optimizer_step")
# Callbacks that look at minibatches and log nothing; others may, and find what logging needs in Lightning's own loop.
SILENT = (StopTogether, Progress, ModelCheckpoint, Timer)


class MinibatchLoop(_TrainingEpochLoop):
    """Trains on one minibatch after the other, and counts them, as Lightning's own loop does.

    Lightning calls some forty hooks a step, which takes longer than the step of a small network. Where only hooks at
    the start and the end of a minibatch are listened to, this loop calls these alone; else it is Lightning's.
    """

    first = True
    graphed: GraphedStep | None = None

    def on_run_start(self, data_fetcher: Any) -> None:
        """Before each epoch: see who listens."""
        super().on_run_start(data_fetcher)
        self.is_plain = is_plain(self.trainer)
        if self.first:
            self.first, self.graphed = False, graphed_step(self.trainer, self.is_plain)
        self.at_start, self.at_end = (
            [callback for callback in self.trainer.callbacks if is_overridden(hook, callback)] for hook in (START, END)
        )
        self.validates_within = self.trainer.enable_validation and validates_within_epochs(self.trainer)

    def advance(self, data_fetcher: Any) -> None:
        """One minibatch."""
        if self.restarting or not self.is_plain:
            super().advance(data_fetcher)
            return
        trainer, task, progress = self.trainer, self.trainer.lightning_module, self.batch_progress
        steps = self.automatic_optimization.optim_progress.optimizer.step
        row_n, *_ = next(data_fetcher)
        number = self.batch_idx + 1
        progress.is_last_batch = data_fetcher.done
        graphed = self.graphed if self.graphed is not None and self.graphed.fits(row_n) else None
        batch = row_n  # of which those who may listen take no notice
        if not graphed:
            batch = trainer.datamodule.transfer_batch_to_device(row_n, trainer.strategy.root_device, 0)
        progress.increment_ready()
        for callback in self.at_start:
            callback.on_train_batch_start(trainer, task, batch, number)
        progress.increment_started()
        steps.increment_ready()
        if graphed:
            graphed.take(row_n)
        elif task.by_hand and batch.n_cells > 1:
            task.step_by_hand(batch, trainer.optimizers[0])
        else:
            task.descend(trainer.strategy.training_step(batch, number), trainer.optimizers[0])
        steps.increment_completed()
        progress.increment_processed()
        for callback in self.at_end:
            callback.on_train_batch_end(trainer, task, {}, batch, number)
        task.on_train_batch_end({}, batch, number)
        progress.increment_completed()

    def teardown(self) -> None:
        """After the training, free what a graph holds."""
        self.graphed = None
        super().teardown()

    def on_advance_end(self, data_fetcher: Any) -> None:
        """After a minibatch: what is due between two, if anything is."""
        trainer = self.trainer
        due = self.validates_within or self.batch_progress.is_last_batch or trainer.should_stop
        if due or self.restarting or not self.is_plain or trainer.received_sigterm:
            super().on_advance_end(data_fetcher)
        else:
            self._batches_that_stepped += 1


def validates_within_epochs(trainer: pl.Trainer) -> bool:
    """Whether validation may be due before the end of an epoch."""
    by_epochs = trainer.check_val_every_n_epoch is not None and trainer._val_check_time_interval is None
    return not (by_epochs and trainer.val_check_batch == trainer.num_training_batches)


def is_plain(trainer: pl.Trainer) -> bool:
    """Whether a step is nothing but a gradient and a step of Adam, that nobody looks into."""
    return (
        isinstance(trainer.strategy, SingleDeviceStrategy)
        and type(trainer.precision_plugin) in (Precision, DoublePrecision, MixedPrecision)
        and trainer.precision != "16-mixed"  # which scales the loss
        and trainer.accumulate_grad_batches == 1
        and not trainer.gradient_clip_val
        and not trainer.lr_scheduler_configs
        and isinstance(trainer.optimizers[0], Adam | AdamW)  # others may want to compute the loss again
        and isinstance(trainer.profiler, PassThroughProfiler)
        and not any(map(looks_into_steps, trainer.callbacks))
    )


def looks_into_steps(callback: Callback) -> bool:
    """Whether a callback asks for more of a step than this loop gives."""
    hooks = WITHIN if type(callback) in SILENT else (START, END, *WITHIN)
    return any(is_overridden(hook, callback) for hook in hooks)
