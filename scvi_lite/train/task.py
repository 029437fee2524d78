"""The one LightningModule: any :class:`~scvi_lite.nn.module.Module` is trained by it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from scvi_lite.io.values import to_json
from scvi_lite.nn.classifier import Adversary
from scvi_lite.nn.module import Loss, Module
from scvi_lite.train import checkpoint as saved
from scvi_lite.train.adam import make_optimizer, plateau_schedule
from scvi_lite.train.plan import AdversarialPlan, Plan, metric_names
from scvi_lite.train.recorder import Recorder


class Task(Recorder):
    """Train a module on minibatches of cells.

    Parameters
    ----------
    module
        What is trained.
    plan
        Optimiser, schedules, KL warm-up.
    history
        Metrics of earlier trainings of the module, by name and epoch; this one goes on from there.
    adversary
        Trained along with the module, against it; with an :class:`~scvi_lite.train.plan.AdversarialPlan`.
    """

    def __init__(
        self,
        module: Module,
        plan: Plan,
        history: Mapping[str, Mapping[int, float]] | None = None,
        adversary: Adversary | None = None,
    ):
        super().__init__(module, plan, history)
        self.adversary = adversary
        self.about: dict[str, Any] = {}  #: what model the module is of, for those who load a checkpoint
        self.monitor_lr = plan.reduce_lr_on_plateau or plan.lr_schedule is not None
        self.resumed: dict[str, Any] | None = None  #: what a checkpoint holds, until it is used
        self.schedule: torch.optim.lr_scheduler.ReduceLROnPlateau | None = None
        self.by_hand = False  #: whether the module gives its gradient, and nothing needs that of autograd
        self.held: list[tuple[Tensor, Tensor]] = []  #: frozen rows of parameters, and what they hold

    # Steps ------------------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Compile the loss, if asked to."""
        self.loss = self.module.loss
        if self.plan.compile:
            options = {"fullgraph": True, "dynamic": True, **(self.plan.compile_kwargs or {})}
            self.loss = torch.compile(self.module.loss, **options)

    def on_fit_start(self) -> None:
        self.kl_weight = torch.tensor(math.nan, device=self.device)
        self._start_sums("train")

    def on_train_start(self) -> None:
        if self.resumed is not None:
            self._resume(self.resumed)
        elif self.trainer.global_rank > 0:  # ranks that share a seed would share their dropout
            torch.manual_seed(saved.mix(self.trainer.datamodule.seed, self.trainer.global_rank))
        if self.last_good is None:
            self._remember()
        self._choose_way_back()
        needs_end = (
            "lr_schedule" if self.plan.lr_schedule else "n_steps_kl_warmup" if self.plan.warms_up_by_share else ""
        )
        if needs_end and self.trainer.max_epochs < 0 and self.trainer.max_steps < 0:
            raise ValueError(
                f"{needs_end}={getattr(self.plan, needs_end)!r} goes by the end of the training, and when that is "
                "nobody knows: give max_epochs or max_steps."
            )
        frozen = [self.module.get_parameter(name).detach()[:n] for name, n in self.module.frozen.rows.items()]
        self.held = [(rows, rows.clone()) for rows in frozen]

    def on_train_epoch_start(self) -> None:
        self._choose_way_back()  # anew, as callbacks freeze parts or change norms
        self._start_sums("train")
        self.trainer.train_dataloader.sampler.skip = 0  # steps that the epoch before had behind it when resumed

    def _choose_way_back(self) -> None:
        plain = self.trainer.precision == "32-true" and not (self.plan.compile or torch.is_anomaly_enabled())
        plain = plain and self.adversary is None and not self.plan.loss_options
        self.by_hand = plain and self.module.is_by_hand

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.set_schedules()
        total, n_cells = self.score(batch)
        self.count_step(n_cells)
        return total

    def set_schedules(self) -> None:
        """The weight of the KL terms and the learning rate of the next step."""
        self._set_kl_weight()
        if self.plan.lr_schedule is not None:  # it follows from where the training is alone: resuming needs no more
            for group in self.trainer.optimizers[0].param_groups:
                group["lr"] = self.plan.lr_at(self._share_done(ahead=0.5)) * self._lr_scale

    def score(self, batch: Any) -> tuple[Tensor, int]:
        """What to descend, and its number of cells; its terms are added up. All that a step asks of the device."""
        batch = self._as_computed(batch)
        if self.by_hand and batch.n_cells > 1:
            total, gradients = self._score_by_hand(batch)
            return _Known.apply(total, list(gradients.values()), *gradients), batch.n_cells
        loss = self.loss(batch, self.kl_weight, **self.plan.loss_options)
        self.sums["train"].add(loss)
        if self.adversary is None or loss.z_nk is None:
            return loss.total, loss.n_cells
        return loss.total + self._adversarial_loss(self.adversary, loss, batch), loss.n_cells

    def _score_by_hand(self, batch: Any) -> tuple[Tensor, dict[Tensor, Tensor]]:
        """What to descend, and its gradient for each weight; its terms are added up."""
        with torch.no_grad():
            loss, gradients = self.module.loss_and_gradients(batch, float(self.kl_weight))
        self.sums["train"].add(loss)
        return loss.total, gradients

    def step_by_hand(self, batch: Any, optimizer: torch.optim.Optimizer) -> None:
        """A step whose gradient comes with the loss, for which autograd need not be asked."""
        self.set_schedules()
        forget_gradients(optimizer)
        _, gradients = self._score_by_hand(batch)
        self.count_step(batch.n_cells)
        for weight, gradient in gradients.items():
            weight.grad = gradient
        optimizer.step()

    def count_step(self, n_cells: int) -> None:
        """A step was taken."""
        self.sums["train"].n_cells += n_cells
        self.steps += 1

    def _adversarial_loss(self, adversary: Adversary, loss: Loss, batch: Any) -> Tensor:
        plan = self.plan
        weight = plan.adversarial_weight(self.kl_weight) if isinstance(plan, AdversarialPlan) else 1 - self.kl_weight
        return adversary.loss(loss.z_nk, batch.batch_n[: len(loss.z_nk)], weight)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if batch.n_cells:
            options = self.plan.loss_options
            loss = self.module.loss(self._as_computed(batch), self.kl_weight, **options)
            self.sums["validation"].add(loss)
            self.sums["validation"].n_cells += loss.n_cells

    def _as_computed(self, batch: Any) -> Any:
        """In doubles where the network computes in doubles."""
        return self.trainer.precision_plugin.convert_input(batch) if self.trainer.precision == "64-true" else batch

    def _set_kl_weight(self) -> None:
        """The weight of the KL terms now: always the same tensor, so that a compiled loss is compiled once."""
        weight = self._current_kl_weight()
        if weight != self._kl_weight_set:
            self.kl_weight.fill_(weight)
            self._kl_weight_set = weight

    _kl_weight_set = math.nan

    def _current_kl_weight(self) -> float:
        trainer, step, share = self.trainer, 0, 0.0
        if self.plan.warms_up_by_share:
            share = self._share_done()
        elif self.plan.n_steps_kl_warmup:
            step = max(0, trainer.fit_loop.total_batch_idx) * trainer.world_size
        return self.plan.kl_weight(trainer.current_epoch, step, share)

    def _share_done(self, ahead: float = 0.0) -> float:
        """The share of the training that is done in so many steps, by epochs or by steps, whichever ends it.

        Of epochs it is the same on any number of devices, also where they change when a training is resumed.
        """
        trainer, each = self.trainer, self.trainer.accumulate_grad_batches
        by_steps = (trainer.global_step + ahead) / trainer.max_steps if trainer.max_steps > 0 else 0.0
        in_epoch = max(0, trainer.fit_loop.epoch_loop.batch_idx) // each + ahead
        epochs = trainer.current_epoch + in_epoch / math.ceil(trainer.num_training_batches / each)
        by_epochs = epochs / trainer.max_epochs if trainer.max_epochs > 0 else 0.0
        return min(1.0, max(by_steps, by_epochs))

    # Between epochs ---------------------------------------------------------------------------------------------------

    def on_validation_start(self) -> None:
        self._share_buffers()
        self._set_kl_weight()

    def on_train_epoch_end(self) -> None:
        self._share_buffers()
        metrics = self.sums["train"].means(self.trainer.strategy)
        more = {"kl_weight": self._current_kl_weight()}
        if self.monitor_lr:
            optimizer = self.trainer.optimizers[0]
            more[f"lr-{type(optimizer).__name__}"] = float(optimizer.param_groups[0]["lr"])
        self._record(metrics | more)
        self._raise_if_diverged(metrics | self._of_this_epoch(metric_names("validation")))
        self._remember()
        self._reduce_lr()
        self.resumed = None

    def on_train_end(self) -> None:
        self._share_buffers()
        if self.trainer.world_size > 1:  # whatever the ranks draw from here on is the same
            torch.manual_seed(self.trainer.strategy.broadcast(int(torch.randint(1 << 62, ()))))

    # Optimiser --------------------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimiser of the plan, fused where that exists, and the plateau schedule if asked for."""
        # Fused Adam unscales half-precision gradients itself, which rules out clipping them before.
        unscales = self.trainer.precision == "16-mixed" or (
            self.trainer.precision == "bf16-mixed" and self.trainer.gradient_clip_val
        )
        fused = not unscales and self.device.type in ("cpu", "cuda", "mps")
        optimizer = make_optimizer(self.plan, [p for p in self.parameters() if p.requires_grad], self._lr_scale, fused)
        self.schedule = plateau_schedule(self.plan, optimizer) if self.plan.reduce_lr_on_plateau else None
        return optimizer

    @property
    def _lr_scale(self) -> int:
        return self.trainer.world_size if self.plan.scale_lr else 1

    def optimizer_step(self, *arguments: Any, **options: Any) -> None:
        """Step, and put frozen rows back."""
        super().optimizer_step(*arguments, **options)
        self._put_back()

    def descend(self, total: Tensor, optimizer: torch.optim.Optimizer) -> None:
        """All of a step but the loss, where it needs nothing else of the trainer."""
        forget_gradients(optimizer)
        total.backward()
        optimizer.step()
        self._put_back()

    def _put_back(self) -> None:
        """Put frozen rows back, which weight decay moves even where they get no gradient."""
        for rows, value in self.held:
            rows.copy_(value)

    def _reduce_lr(self) -> None:
        """Step the plateau schedule here: the trainer would do it after a checkpoint of this epoch was written."""
        new = self._of_this_epoch([self.plan.lr_scheduler_metric])
        if self.schedule is not None and new:
            self.schedule.step(new[self.plan.lr_scheduler_metric])

    # Checkpoints ------------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what a training needs to go on as if nothing had happened."""
        checkpoint[saved.KEY] = saved.describe(self.trainer) | {
            "history": self.epoch_history,
            "model": to_json("setup", self.about),
            "first_epoch": self.first_epoch,
            "train_sums": self.sums["train"].reduced(self.trainer.strategy),
            "schedule": None if self.schedule is None else self.schedule.state_dict(),
        }
        saved.finish_batch(checkpoint, self.trainer)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.trainer.precision == "64-true":  # the trainer would convert the module after loading
            self.double()
        state = self.resumed = checkpoint[saved.KEY]
        saved.check_ranks(state, self.trainer.world_size)
        self.epoch_history = {name: dict(values) for name, values in state["history"].items()}
        self.first_epoch = state["first_epoch"]

    def _resume(self, state: dict[str, Any]) -> None:
        saved.set_random_state(state, self.trainer)
        if self.schedule is not None and state["schedule"] is not None:
            self.schedule.load_state_dict(state["schedule"])
        if self.trainer.is_global_zero:  # the sums of all ranks go on in the first
            self.sums["train"].go_on(state["train_sums"])


def forget_gradients(optimizer: torch.optim.Optimizer) -> None:
    """As zero_grad() does, in a quarter of its time."""
    for group in optimizer.param_groups:
        for weight in group["params"]:
            weight.grad = None


class _Known(torch.autograd.Function):
    """A number whose gradients for some tensors are known."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *_: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, up: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(gradient * up for gradient in ctx.gradients)
