"""What a training writes down: metrics of its epochs, and weights to go back to if it diverges."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from scvi_lite.nn.module import Module
from scvi_lite.train.divergence import TrainingDivergedError, weights_are_finite, what_diverged
from scvi_lite.train.metrics import Sums
from scvi_lite.train.plan import Plan

CHECK_EVERY = 50  # steps between looks for NaN: each look waits for the device
REMEMBER_EVERY = 1000  # steps between copies of the weights, within an epoch


class Recorder(pl.LightningModule):
    """A module in training, with a record of it. What a step does is for :class:`~scvi_lite.train.task.Task` to say.

    Metrics are sums over cells, kept on the device and reduced over ranks once an epoch: no device waits for the host
    at each step, and every rank holds the same numbers.
    """

    def __init__(self, module: Module, plan: Plan, history: Mapping[str, Mapping[int, float]] | None):
        super().__init__()
        self.module, self.plan = module, plan
        self.epoch_history = {name: dict(values) for name, values in (history or {}).items()}
        self.first_epoch = self.epoch_reached + 1 if self.epoch_history else 0
        self.latest: dict[str, float] = {}  #: ELBO of the last epoch, for the progress bar
        self.sums: dict[str, Sums] = {}
        self.steps = 0  #: minibatches that the weights have seen in this training
        self.good_steps = 0  #: those of them that last_good has seen
        self.last_good: dict[str, Tensor] | None = None

    @property
    def has_trained(self) -> bool:
        """Whether the module is trained, by this task or before it."""
        return self.steps > 0 or any(self.epoch_history.values())

    @property
    def epoch_reached(self) -> int:
        """The last epoch with metrics."""
        return max((epoch for values in self.epoch_history.values() for epoch in values), default=0)

    # Metrics ----------------------------------------------------------------------------------------------------------

    def _start_sums(self, part: str) -> None:
        if part not in self.sums:
            self.sums[part] = Sums(self.module, part, self.device)
        self.sums[part].start()

    def on_validation_epoch_start(self) -> None:
        self._start_sums("validation")

    def on_validation_epoch_end(self) -> None:
        if not self.trainer.sanity_checking:
            self._record(self.sums["validation"].means(self.trainer.strategy))

    def _record(self, metrics: dict[str, float]) -> None:
        """Write metrics of this epoch to the history, and log them."""
        for name, value in metrics.items():
            self.epoch_history.setdefault(name, {})[self.first_epoch + self.current_epoch] = value
        latest = self._of_this_epoch(["elbo_train", "elbo_validation"])
        self.latest |= {name.removeprefix("elbo_"): value for name, value in latest.items()}
        if self.trainer.loggers:  # every rank logs the same number, so the mean that sync_dist takes is that number
            self.log_dict(metrics, sync_dist=True)  # as numbers, which go to the device where the ranks meet
        else:  # for callbacks alone that takes a millisecond each
            self.trainer.callback_metrics.update({name: torch.tensor(value) for name, value in metrics.items()})

    def _of_this_epoch(self, names: list[str]) -> dict[str, float]:
        """The metrics that were recorded in this epoch."""
        epoch = self.first_epoch + self.current_epoch
        found = {name: self.epoch_history.get(name, {}).get(epoch) for name in names}
        return {name: value for name, value in found.items() if value is not None}

    def _share_buffers(self) -> None:
        """Give every rank the running statistics of the first, which are those that its last step began from."""
        if self.trainer.world_size > 1:
            for buffer in self.module.buffers():
                torch.distributed.broadcast(buffer, 0)

    # Divergence -------------------------------------------------------------------------------------------------------

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (batch_idx + 1) % CHECK_EVERY == 0:
            self._raise_if_diverged(self.sums["train"].means(self.trainer.strategy), f", minibatch {batch_idx + 1}")
            if (batch_idx + 1) % REMEMBER_EVERY == 0 and weights_are_finite(self.module):
                self._remember()

    def _remember(self) -> None:
        """Keep a copy of the weights, to go back to if training diverges."""
        state = self.module.state_dict()
        if self.last_good is None:
            self.last_good = {name: torch.empty_like(value) for name, value in state.items()}
        for name, value in state.items():
            self.last_good[name].copy_(value)
        self.good_steps = self.steps

    def go_back(self) -> None:
        """Put the module where it was before training diverged."""
        self.module.load_state_dict(self.last_good or {})
        self.steps = self.good_steps

    def _raise_if_diverged(self, metrics: dict[str, float], where: str = "") -> None:
        """Stop if a term of the loss or, at the end of an epoch, a weight is not finite; that epoch has no history."""
        what = what_diverged(metrics, None if where else self.module)
        if not what:
            return
        epoch = self.first_epoch + self.current_epoch
        for values in self.epoch_history.values():
            values.pop(epoch, None)
        raise TrainingDivergedError(
            f"Training diverged in epoch {epoch}{where}: {what} The last good weights are kept. "
            f"Try a lower learning rate (now lr={self.plan.lr:g}): "
            f"plan_kwargs={{'lr': {self.plan.lr / 10:g}}}, or gradient_clip_val=1."
        )
