"""Stopping: by a metric, by Ctrl-C, on one device or together on several."""

from __future__ import annotations

import secrets
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint

from scvi_lite.train.plan import is_of_validation


class WarmEarlyStopping(EarlyStopping):
    """Early stopping that looks only after some epochs, whenever its metric is new."""

    def __init__(self, monitor: str, warmup_epochs: int = 0, **options: Any):
        # A metric of the training is new after each epoch, one of the validation after each validation.
        super().__init__(monitor, check_on_train_epoch_end=not is_of_validation(monitor), **options)
        self.warmup_epochs = warmup_epochs

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A resumed training that had stopped stays so, unless more patience is asked for now."""
        if self.wait_count >= self.patience:
            trainer.should_stop = True

    def _should_skip_check(self, trainer: pl.Trainer) -> bool:
        return trainer.current_epoch < self.warmup_epochs or super()._should_skip_check(trainer)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict | {"patience": self.patience})


class SaveCheckpoint(ModelCheckpoint):
    """Checkpoints as ``enable_checkpointing=True`` keeps them, with a choice of the weights to end with.

    Parameters
    ----------
    dirpath, filename
        Where the checkpoints go; by default ``checkpoints`` in ``settings.logging_dir``.
    monitor
        The metric that says which is the best.
    load_best_on_end
        End the training with the weights of the best checkpoint.
    check_nan_gradients
        Makes no difference: a training that diverges ends with its last good weights.
    **options
        Of ``lightning.pytorch.callbacks.ModelCheckpoint``.
    """

    def __init__(
        self,
        dirpath: str | Path | None = None,
        filename: str | None = None,
        monitor: str = "validation_loss",
        load_best_on_end: bool = False,
        check_nan_gradients: bool = False,
        **options: Any,
    ):
        super().__init__(dirpath, filename=filename, monitor=monitor, **options)
        self.load_best_on_end = load_best_on_end

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        if self.load_best_on_end and self.best_model_path:
            best = torch.load(self.best_model_path, map_location=pl_module.device, weights_only=True)
            pl_module.load_state_dict(best["state_dict"])


class StopFlag:
    """A request to end the training, from a signal handler or another thread."""

    def __init__(self) -> None:
        self.requested = False

    def request(self) -> None:
        self.requested = True


class StopTogether(Callback):
    """Ends the training soon after a request, on every rank after the same step.

    On several ranks the first decides: it writes the number of the next step to a file that all look for after each
    step. No rank can be past that step, since none finishes it without the gradients of the first. Machines that share
    no file ask the first rank after each step.
    """

    def __init__(self, stop: StopFlag):
        self.stop = stop
        self.file: Path | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.world_size > 1 and trainer.num_nodes == 1:
            name = f"scvi_lite_stop_{secrets.token_hex(8)}"
            self.file = Path(trainer.strategy.broadcast(str(Path(tempfile.gettempdir()) / name)))
        self.on_validation_end(trainer, pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.world_size == 1 and self.stop.requested:
            self._end(trainer)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.world_size == 1:
            stop = self.stop.requested
        elif self.file is None:
            stop = trainer.strategy.broadcast(self.stop.requested)
        else:
            if self.stop.requested and trainer.is_global_zero and not self.file.exists():
                self.file.write_text(str(trainer.global_step + 1))
            stop = self.file.exists() and trainer.global_step >= int(self.file.read_text() or sys.maxsize)
        if stop:
            self._end(trainer)

    def _end(self, trainer: pl.Trainer) -> None:
        self.stop.request()
        trainer.should_stop = True
        # A user who interrupts means it: no validation first, and no least number of epochs.
        trainer.fit_loop.min_epochs = 0
        trainer.fit_loop.epoch_loop.min_steps = None
        trainer.fit_loop.epoch_loop._skip_next_val = True

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.file is not None:
            trainer.strategy.barrier()
            if trainer.is_global_zero:
                self.file.unlink(missing_ok=True)


@contextmanager
def handle_interrupts(stop: StopFlag) -> Iterator[None]:
    """Ctrl-C or the stop button asks for the end of the training; a second one ends it at once."""

    def on_signal(signum: int, frame: FrameType | None) -> None:
        if stop.requested:
            raise KeyboardInterrupt
        stop.request()

    main = threading.current_thread() is threading.main_thread()  # only the main thread gets signals
    before = signal.signal(signal.SIGINT, on_signal) if main else None
    try:
        yield
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # which Lightning turns into the end of the process
            raise KeyboardInterrupt from None
        raise
    finally:
        if main:
            signal.signal(signal.SIGINT, before or signal.default_int_handler)
