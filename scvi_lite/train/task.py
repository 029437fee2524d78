"""The one LightningModule: any module with a ``loss`` is trained by it."""

from __future__ import annotations

import random
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn

from scvi_lite.train.plan import Plan

METRICS = ("loss", "elbo", "reconstruction_loss", "kl_local", "kl_global")


class TrainingDivergedError(RuntimeError):
    """The loss or a weight became NaN or infinite."""


class Task(pl.LightningModule):
    """Train a module on minibatches of cells.

    Metrics are sums over cells and their number, kept on the device and reduced over ranks once an epoch: no device
    waits for the host within an epoch, and every rank holds the same numbers.

    Parameters
    ----------
    module
        Has ``loss(batch, kl_weight)``.
    plan
        Optimiser, schedules, KL warm-up.
    """

    def __init__(self, module: nn.Module, plan: Plan):
        super().__init__()
        self.module, self.plan = module, plan
        self.epoch_history: dict[str, dict[int, float]] = {}
        self.last_good: dict[str, Tensor] | None = None
        self.resumed: dict[str, Any] | None = None
        self.was_resumed = False
        self.loss = module.loss
        if plan.compile:
            self.loss = torch.compile(
                module.loss, **{"fullgraph": True, "dynamic": True, **(plan.compile_kwargs or {})}
            )
        self.sums: dict[str, Tensor | None] = {"train": None, "validation": None}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch, self.kl_weight)
        self._add("train", loss)
        return loss.total

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if batch.n_cells:
            self._add("validation", self.module.loss(batch, self.kl_weight))

    def _add(self, part: str, loss: Any) -> None:
        n = float(loss.n_cells)
        terms = torch.stack([loss.total * n, loss.reconstruction, loss.kl_local, loss.total.new_tensor(n)]).detach()
        sums = self.sums[part]
        self.sums[part] = terms.double() if sums is None else sums + terms

    @property
    def kl_weight(self) -> Tensor:
        """Weight of the KL terms now, as a tensor, so that a compiled loss need not be compiled again."""
        weight = self.plan.kl_weight(self.current_epoch, self.global_step * self.trainer.world_size)
        return torch.tensor(weight, device=self.device)

    def on_train_epoch_start(self) -> None:
        if self.resumed is None:
            self.sums["train"] = None

    def on_train_start(self) -> None:
        if self.resumed is not None:
            set_random_state(self.resumed["random_state"])
            sums = self.resumed["train_sums"]
            self.sums["train"] = None if sums is None else sums.to(self.device)
        if self.last_good is None:
            self._remember()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.resumed = None

    def on_validation_epoch_start(self) -> None:
        self.sums["validation"] = None

    def on_validation_epoch_end(self) -> None:
        if not self.trainer.sanity_checking:
            self._finish("validation")

    def on_train_epoch_end(self) -> None:
        weight = self.plan.kl_weight(self.current_epoch, self.global_step * self.trainer.world_size)
        self._record({"kl_weight": weight})
        lr = self.trainer.optimizers[0].param_groups[0]["lr"]
        metrics = self._finish("train", {"learning_rate": lr} if self.plan.reduce_lr_on_plateau else {})
        if not (np.isfinite(metrics["train_loss"]) and self._weights_are_finite()):
            raise TrainingDivergedError(self._why_diverged(metrics))
        self._remember()

    def _finish(self, part: str, more: dict[str, float] | None = None) -> dict[str, float]:
        """Reduce an epoch's sums over cells and ranks; log the means."""
        sums = self.sums[part]
        sums = torch.zeros(4, dtype=torch.float64, device=self.device) if sums is None else sums
        loss, reconstruction, kl, n = self.trainer.strategy.reduce(sums, reduce_op="sum").tolist()
        n = max(n, 1.0)
        metrics = {
            f"{part}_loss": loss / n,
            f"elbo_{part}": (reconstruction + kl) / n,
            f"reconstruction_loss_{part}": reconstruction / n,
            f"kl_local_{part}": kl / n,
            f"kl_global_{part}": 0.0,
            **(more or {}),
        }
        # Every rank logs the same number, so the mean that sync_dist takes is that number.
        self.log_dict({k: torch.tensor(v) for k, v in metrics.items()}, sync_dist=self.trainer.world_size > 1)
        self._record(metrics)
        return metrics

    def _record(self, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self.epoch_history.setdefault(name, {})[self.current_epoch] = value

    def _remember(self) -> None:
        """Keep a copy of the weights, to go back to if the next epoch diverges."""
        state = self.module.state_dict()
        if self.last_good is None:
            self.last_good = {name: value.detach().clone() for name, value in state.items()}
        for name, value in state.items():
            self.last_good[name].copy_(value)

    def _weights_are_finite(self) -> bool:
        norms = torch.stack(torch._foreach_norm([p.detach() for p in self.module.parameters()]))
        return bool(norms.isfinite().all())

    def _why_diverged(self, metrics: dict[str, float]) -> str:
        bad = ", ".join(f"{name}={value:g}" for name, value in metrics.items() if not np.isfinite(value))
        likely = (
            "the reconstruction term did: look for extreme counts, or a covariate on a scale far from 1"
            if not np.isfinite(metrics["reconstruction_loss_train"])
            else "the KL term did: the posterior ran away"
            if not np.isfinite(metrics["kl_local_train"])
            else "a weight did in the last step"
        )
        return (
            f"Training diverged in epoch {self.current_epoch}: {bad or 'a weight is not finite'}. Most likely {likely}. "
            f"The weights of the last good epoch are kept. Try a lower learning rate (now lr={self.plan.lr:g}): "
            f"plan_kwargs={{'lr': {self.plan.lr / 10:g}}}, or gradient_clip_val=1."
        )

    def configure_optimizers(self) -> Any:
        """Adam, fused where that exists, and the plateau schedule if asked for."""
        plan = self.plan
        parameters = [p for p in self.module.parameters() if p.requires_grad]
        if plan.optimizer == "Custom":
            optimizer = plan.optimizer_creator(parameters)
        else:
            # Fused Adam unscales half-precision gradients itself, which rules out clipping them before.
            fused = self.trainer.precision != "16-mixed" and self.device.type in ("cpu", "cuda", "mps")
            kind = {"Adam": torch.optim.Adam, "AdamW": torch.optim.AdamW}[plan.optimizer]
            optimizer = kind(parameters, lr=plan.lr, eps=plan.eps, weight_decay=plan.weight_decay, fused=fused)
        if not plan.reduce_lr_on_plateau:
            return optimizer
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer,
            factor=plan.lr_factor,
            patience=plan.lr_patience,
            threshold=plan.lr_threshold,
            threshold_mode="abs",
            min_lr=plan.lr_min,
        )
        every = self.trainer.check_val_every_n_epoch if plan.lr_scheduler_metric.endswith("validation") else 1
        schedule = {"scheduler": scheduler, "monitor": plan.lr_scheduler_metric, "frequency": every}
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what a training needs to go on as if nothing had happened."""
        data = self.trainer.datamodule
        progress = self.trainer.fit_loop.epoch_loop.batch_progress
        checkpoint["scvi_lite"] = {
            "history": self.epoch_history,
            "indices": {part: torch.from_numpy(rows) for part, rows in vars(data.split).items()},
            "seed": data.seed,
            "n_cells": len(data.store),
            "skip_steps": 0 if progress.is_last_batch else progress.current.completed,
            "train_sums": self.sums["train"],
            "random_state": get_random_state(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.resumed, self.was_resumed = checkpoint["scvi_lite"], True
        self.epoch_history = {name: dict(values) for name, values in self.resumed["history"].items()}


def get_random_state() -> dict[str, Any]:
    """State of all random generators, as tensors and plain numbers."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
        "python": [version, list(internal), gauss],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Put all random generators where they were."""
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), position, has_gauss, cached))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
