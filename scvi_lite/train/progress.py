"""How far the training is: a bar in a terminal and in a notebook, a few lines in a log file."""

from __future__ import annotations

import os
import sys
import time
from typing import Any, Protocol

import lightning.pytorch as pl
from lightning.fabric.utilities.imports import _IS_INTERACTIVE
from lightning.pytorch.callbacks import ProgressBar

FALLBACK_SIZE = {"ncols": 80, "nrows": 24}


class Display(Protocol):
    """Something that shows the state of a training."""

    def show(self, position: float, total: int | None, metrics: dict[str, float]) -> None:
        """Show the position in epochs, their number, and the latest metrics."""

    def close(self) -> None:
        """Called at the end, also of a training that failed."""


class TrainingBar:
    """One bar over all epochs; it moves within long epochs too."""

    def __init__(self) -> None:
        self.bar: Any = None

    def show(self, position: float, total: int | None, metrics: dict[str, float]) -> None:
        """Draw the bar at a position."""
        if self.bar is None:
            from tqdm.auto import tqdm

            # A terminal that says it has no columns, as those of some containers do, would be shown nothing.
            size = {} if _IS_INTERACTIVE or _columns() else FALLBACK_SIZE
            self.bar = tqdm(total=total, initial=position, desc="Training", mininterval=0, **size)
        done = f"{int(position)}/{total or '?'} epochs"  # those that are complete
        self.bar.bar_format = f"{{l_bar}}{{bar}}| {done} [{{elapsed}}<{{remaining}}{{postfix}}]"
        self.bar.set_postfix(_rounded(metrics), refresh=False)
        self.bar.n = position
        self.bar.refresh()

    def close(self) -> None:
        """Leave the bar as it is."""
        if self.bar is not None:
            self.bar.close()


def _columns() -> int:
    """Width of the terminal that the bar is drawn in, or 0."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns
    except (OSError, ValueError):  # not a terminal, or not a file at all
        return 0


class TrainingLines:
    """At most some twenty lines over a whole training, for a file that keeps what was written to it."""

    N_LINES = 20

    def __init__(self) -> None:
        self.started: float | None = None
        self.next = 0.0
        self.last: tuple[float, int | None, dict[str, float]] | None = None

    def show(self, position: float, total: int | None, metrics: dict[str, float]) -> None:
        """Write a line if it is time: after equal shares of the epochs, ever rarer if their number is open."""
        self.started = self.started or time.monotonic()
        self.last = position, total, metrics
        if position < self.next or not metrics:
            return
        step = max(1.0, total / (self.N_LINES - 1) if total else position)
        self.next = position + step
        self._write(*self.last)
        self.last = None

    def close(self) -> None:
        """Write the last state, if it is not there yet."""
        if self.last is not None:
            self._write(*self.last)
            self.last = None

    def _write(self, position: float, total: int | None, metrics: dict[str, float]) -> None:
        values = "".join(f", {name}={value}" for name, value in _rounded(metrics).items())
        seconds = time.monotonic() - (self.started or 0.0)
        print(f"Training: {int(position)}/{total or '?'} epochs{values} [{seconds:.0f} s]", file=sys.stderr, flush=True)


def _rounded(metrics: dict[str, float]) -> dict[str, str]:
    return {name: f"{value:.1f}" for name, value in metrics.items()}


def choose_display() -> Display:
    """A bar where one can be drawn over, else lines."""
    return TrainingBar() if _IS_INTERACTIVE or sys.stderr.isatty() else TrainingLines()


class Progress(ProgressBar):
    """Tells a display how far the training is, a few times a second."""

    INTERVAL = 0.2  # seconds

    def __init__(self, display: Display):
        super().__init__()
        self.display = display
        self.last = 0.0
        self._enabled = True

    def disable(self) -> None:
        """Called by Lightning on every rank but the first."""
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def _tell(self, trainer: pl.Trainer, position: float) -> None:
        if self._enabled:
            self.last = time.monotonic()
            total = trainer.max_epochs if trainer.max_epochs and trainer.max_epochs > 0 else None
            self.display.show(position, total, trainer.lightning_module.latest)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._tell(trainer, trainer.current_epoch)

    def on_train_batch_end(self, trainer: pl.Trainer, task: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if time.monotonic() - self.last > self.INTERVAL:
            # An epoch is complete when its metrics are there, which is after its last minibatch.
            self._tell(trainer, trainer.current_epoch + batch_idx / trainer.num_training_batches)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        progress = trainer.fit_loop.epoch_loop.batch_progress
        unfinished = 0 if progress.is_last_batch else progress.current.ready / trainer.num_training_batches
        self._tell(trainer, trainer.current_epoch - 1 + unfinished if unfinished else trainer.current_epoch)
        self._close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        if self._enabled:
            self.display.close()
