"""Progress, stopping and checkpoints: thin layers on Lightning's own."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, EarlyStopping, ProgressBar
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


class TrainingBar:
    """One bar over all epochs, in a terminal and in a notebook; it moves within long epochs too."""

    def __init__(self) -> None:
        self.bar: Any = None

    def show(self, position: float, total: int | None, metrics: dict[str, float]) -> None:
        """Draw the bar at a position, in epochs."""
        if self.bar is None:
            from tqdm.auto import tqdm

            form = "{l_bar}{bar}| {n:.0f}/{total_fmt} epochs [{elapsed}<{remaining}{postfix}]"
            self.bar = tqdm(total=total, initial=position, desc="Training", bar_format=form, mininterval=0.2)
        self.bar.set_postfix({name: f"{value:.1f}" for name, value in metrics.items()}, refresh=False)
        self.bar.update(position - self.bar.n)

    def close(self) -> None:
        """Leave the bar as it is."""
        if self.bar is not None:
            self.bar.close()


class Progress(ProgressBar):
    """Tells how far the training is, a few times a second."""

    INTERVAL = 0.2  # seconds

    def __init__(self) -> None:
        super().__init__()
        self.metrics: dict[str, float] = {}
        self.last = 0.0
        self._enabled = True

    def show(self, position: float, total: int | None, metrics: dict[str, float]) -> None:
        """Called with the position in epochs, their number, and the latest metrics."""

    def close(self) -> None:
        """Called at the end, also of a training that failed."""

    def disable(self) -> None:
        """Called by Lightning on every rank but the first."""
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def _tell(self, trainer: pl.Trainer, position: float) -> None:
        if self._enabled:
            self.last = time.monotonic()
            total = trainer.max_epochs if trainer.max_epochs and trainer.max_epochs > 0 else None
            self.show(position=position, total=total, metrics=self.metrics)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._tell(trainer, trainer.current_epoch)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if time.monotonic() - self.last > self.INTERVAL:
            self._tell(trainer, trainer.current_epoch + (batch_idx + 1) / trainer.num_training_batches)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        metrics = trainer.callback_metrics
        named = {"train": "elbo_train", "validation": "elbo_validation"}
        self.metrics = {name: float(metrics[key]) for name, key in named.items() if key in metrics}
        last = trainer.current_epoch + 1 == trainer.max_epochs
        if last or time.monotonic() - self.last > self.INTERVAL:
            self._tell(trainer, trainer.current_epoch + 1)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.close()


class LocalProgress(Progress):
    """Draws the bar in this process."""

    def __init__(self) -> None:
        super().__init__()
        self.bar = TrainingBar()

    def show(self, position: float, total: int | None, metrics: dict[str, float]) -> None:
        self.bar.show(position, total, metrics)

    def close(self) -> None:
        self.bar.close()


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoints are written beside their place and renamed: a kill leaves the one before."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        part = f"{path}.part"
        super().save_checkpoint(checkpoint, part, storage_options)
        os.replace(part, path)


class StopFlag:
    """A request to end the training, from a signal handler or another thread."""

    def __init__(self) -> None:
        self.requested = False

    def request(self) -> None:
        self.requested = True


class StopTogether(Callback):
    """Ends the training soon after a request, on every rank after the same step.

    On several ranks the first decides: it writes the number of the next step to a file that all look for after each
    step. No rank can be past that step, since none finishes it without the gradients of the first.
    """

    def __init__(self, stop: StopFlag):
        self.stop = stop
        self.file: Path | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.world_size > 1:
            name = tempfile.mktemp(prefix="scvi_lite_stop_") if trainer.is_global_zero else None
            self.file = Path(trainer.strategy.broadcast(name))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.file is None:
            trainer.should_stop = trainer.should_stop or self.stop.requested
            return
        if self.stop.requested and trainer.is_global_zero and not self.file.exists():
            self.file.write_text(str(trainer.global_step + 1))
        if self.file.exists() and trainer.global_step >= int(self.file.read_text() or sys.maxsize):
            self.stop.request()
            trainer.should_stop = True

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.file is not None and trainer.is_global_zero:
            trainer.strategy.barrier()
            self.file.unlink(missing_ok=True)
        elif self.file is not None:
            trainer.strategy.barrier()


@contextmanager
def handle_interrupts(stop: StopFlag) -> Iterator[None]:
    """Ctrl-C or the stop button asks for the end of the training; a second one ends it at once."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread gets signals
        yield
        return

    def on_signal(signum: int, frame: FrameType | None) -> None:
        if stop.requested:
            raise KeyboardInterrupt
        stop.request()

    before = signal.signal(signal.SIGINT, on_signal)
    try:
        yield
    except SystemExit:  # Lightning turns the second interrupt into the end of the process
        raise KeyboardInterrupt from None
    finally:
        signal.signal(signal.SIGINT, before)
