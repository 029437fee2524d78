"""Progress, stopping and checkpoints: thin layers on Lightning's own."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import EarlyStopping, ProgressBar
from lightning.pytorch.plugins.io import TorchCheckpointIO


class WarmEarlyStopping(EarlyStopping):
    """Early stopping that looks only after some epochs."""

    def __init__(self, warmup_epochs: int = 0, **options: Any):
        super().__init__(**options)
        self.warmup_epochs = warmup_epochs

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch >= self.warmup_epochs:
            super().on_train_epoch_end(trainer, pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch >= self.warmup_epochs:
            super().on_validation_end(trainer, pl_module)


class EpochProgressBar(ProgressBar):
    """One bar over all epochs, in a terminal and in a notebook; it moves within long epochs too."""

    def __init__(self) -> None:
        super().__init__()
        self.bar: Any = None
        self._enabled = True

    def disable(self) -> None:
        """Called by Lightning on every rank but the first."""
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        from tqdm.auto import tqdm

        total = trainer.max_epochs if trainer.max_epochs and trainer.max_epochs > 0 else None
        shown = self._enabled and trainer.is_global_zero
        form = "{l_bar}{bar}| {n:.0f}/{total_fmt} epochs [{elapsed}<{remaining}{postfix}]"
        self.bar = tqdm(
            total=total, initial=trainer.current_epoch, desc="Training", disable=not shown, bar_format=form, mininterval=0.2
        )

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if isinstance(trainer.num_training_batches, int):
            self.bar.update(1 / trainer.num_training_batches)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        metrics = trainer.callback_metrics
        shown = {
            name: f"{float(metrics[key]):.1f}"
            for name, key in (("train", "elbo_train"), ("validation", "elbo_validation"))
            if key in metrics
        }
        self.bar.n = trainer.current_epoch + 1
        self.bar.set_postfix(shown, refresh=False)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.close()


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoints are written beside their place and renamed: a kill leaves the one before."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        part = f"{path}.part"
        super().save_checkpoint(checkpoint, part, storage_options)
        os.replace(part, path)


class Interrupt:
    """Ctrl-C or the stop button ends training after the minibatch at hand; a second one at once."""

    def __init__(self, trainer: pl.Trainer):
        self.trainer = trainer
        self.requested = False

    def _stop(self, signum: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = self.trainer.should_stop = True

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Handle interrupts here; only the main thread can."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGINT, self._stop)
        try:
            yield
        except SystemExit:  # Lightning turns the second interrupt into the end of the process
            raise KeyboardInterrupt from None
        finally:
            signal.signal(signal.SIGINT, before)
