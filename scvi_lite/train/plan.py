"""How to descend: optimiser, learning-rate schedule and KL warm-up, checked when made."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from numbers import Real
from typing import Any, ClassVar

from scvi_lite.errors import as_options, check_choice, check_flag, check_number, without_absent, without_needless

LR_RISE = 0.1  # share of a training over which the cosine schedule rises
NEEDLESS = {
    "on_step": "metrics are those of an epoch; a logger gets the loss of steps from log_every_n_steps",
    "on_epoch": "metrics are those of an epoch",
}
ABSENT = {"update_only_decoder": "freeze what shall stay, e.g. model.module.encoder.requires_grad_(False)"}
METRICS = ("elbo", "reconstruction_loss", "kl_local", "kl_global")


def metric_names(part: str) -> list[str]:
    """Names of the metrics of the ``"train"`` or ``"validation"`` cells."""
    return [f"{part}_loss", *(f"{metric}_{part}" for metric in METRICS)]


def is_of_validation(metric: str) -> bool:
    """Whether a metric comes from the validation cells."""
    return metric.startswith("validation_") or metric.endswith("_validation")


@dataclass(frozen=True)
class Plan:
    """Options of the training, given as ``plan_kwargs``.

    Attributes
    ----------
    lr, weight_decay, eps, optimizer
        Of Adam or AdamW.
    scale_lr
        Multiply ``lr`` by the number of devices.
    optimizer_creator
        With ``optimizer="Custom"``: a function from the parameters to a ``torch.optim.Optimizer``.
    n_epochs_kl_warmup, n_steps_kl_warmup
        The weight of the KL terms grows linearly from ``min_kl_weight`` to ``max_kl_weight`` over this many epochs
        or, if given, over this many minibatches (counted over all devices); below 1, over this share of the training.
    lr_schedule
        ``"cosine"``: the learning rate rises linearly to ``lr`` over the first tenth of the steps and falls along half
        a cosine to zero at the last (Loshchilov & Hutter 2017, arXiv:1608.03983).
    reduce_lr_on_plateau, lr_factor, lr_patience, lr_threshold, lr_scheduler_metric, lr_min
        Multiply the learning rate by ``lr_factor`` when the metric has not improved for ``lr_patience`` epochs.
    compile, compile_kwargs
        Compile the loss with ``torch.compile``, which needs a C++ compiler. On a CPU it takes one to two minutes
        before the first step, and steps are no faster: the likelihood is compiled anyway.
    cuda_graph
        Record a step as a CUDA graph and replay it for all minibatches of the same size: on one GPU, where nothing
        looks into steps. Written without a GPU at hand and not yet run on one.
    """

    lr: float = 1e-3
    weight_decay: float = 1e-6
    eps: float = 0.01
    scale_lr: bool = False
    optimizer: str = "Adam"
    optimizer_creator: Any = None
    n_epochs_kl_warmup: int | None = 400
    n_steps_kl_warmup: float | None = None
    min_kl_weight: float = 0.0
    max_kl_weight: float = 1.0
    lr_schedule: str | None = None
    reduce_lr_on_plateau: bool = False
    lr_factor: float = 0.6
    lr_patience: int = 30
    lr_threshold: float = 0.0
    lr_scheduler_metric: str = "elbo_validation"
    lr_min: float = 0.0
    compile: bool = False
    compile_kwargs: Mapping[str, Any] | None = None
    cuda_graph: bool = False

    #: Options that the loss is told, which a model's own plan adds; numbers among them are zero or more.
    of_loss: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        flags = ("scale_lr", "reduce_lr_on_plateau", "compile", "cuda_graph")
        check_flag(**{name: getattr(self, name) for name in flags})
        check_number(True, n_epochs_kl_warmup=self.n_epochs_kl_warmup, n_steps_kl_warmup=self.n_steps_kl_warmup)
        check_choice(("Adam", "AdamW", "Custom"), optimizer=self.optimizer)
        if (self.optimizer == "Custom") != (self.optimizer_creator is not None):
            raise ValueError("optimizer='Custom' and optimizer_creator belong together: give both, or neither.")
        if self.scale_lr and self.optimizer == "Custom":
            raise ValueError("scale_lr=True: with optimizer='Custom', scale it in your optimizer_creator.")
        if self.lr_schedule is not None:
            check_choice(("cosine",), lr_schedule=self.lr_schedule)
            if self.optimizer == "Custom" or self.reduce_lr_on_plateau:
                raise ValueError(
                    f"lr_schedule={self.lr_schedule!r} sets the learning rate of each step: give lr_schedule=None, "
                    "or leave out optimizer='Custom' and give reduce_lr_on_plateau=False."
                )
        if not (isinstance(self.eps, Real) and self.eps > 0):
            raise ValueError(f"eps={self.eps!r}: a positive number is needed.")
        not_negative = ("lr", "weight_decay", "min_kl_weight", "max_kl_weight", "lr_patience", "lr_threshold", "lr_min")
        of_loss = [f.name for f in fields(self) if f.name in self.of_loss and type(f.default) in (int, float)]
        check_number(**{name: getattr(self, name) for name in (*not_negative, *of_loss)})
        if self.min_kl_weight > self.max_kl_weight:
            raise ValueError(f"min_kl_weight={self.min_kl_weight} is above max_kl_weight={self.max_kl_weight}.")
        if not (isinstance(self.lr_factor, Real) and 0 < self.lr_factor < 1):
            raise ValueError(f"lr_factor={self.lr_factor!r}: a number in (0, 1) is needed.")

    @property
    def loss_options(self) -> dict[str, Any]:
        """Further keywords for the loss of the module."""
        return {name: getattr(self, name) for name in self.of_loss}

    def lr_at(self, share: float) -> float:
        """The learning rate when a share of the steps is done.

        >>> plan = Plan(lr=1.0, lr_schedule="cosine")
        >>> [round(plan.lr_at(share), 3) for share in (0.05, 0.1, 0.55, 1.0)]
        [0.5, 1.0, 0.5, 0.0]
        """
        if self.lr_schedule is None:
            return self.lr
        if share < LR_RISE:
            return self.lr * share / LR_RISE
        return self.lr * (1 + math.cos(math.pi * (share - LR_RISE) / (1 - LR_RISE))) / 2

    @property
    def warms_up_by_share(self) -> bool:
        """Whether the KL warm-up is a share of the training."""
        return self.n_steps_kl_warmup is not None and 0 < self.n_steps_kl_warmup < 1

    def kl_weight(self, epoch: int, step: int, share: float) -> float:
        """The weight of the KL terms.

        Parameters
        ----------
        epoch, step, share
            Where the training is: the epoch and the minibatch (of any device), both from 0, and the share that is done.

        >>> Plan(n_epochs_kl_warmup=4).kl_weight(1, 10, 0.1), Plan(n_steps_kl_warmup=0.2).kl_weight(1, 10, 0.1)
        (0.25, 0.5)
        """
        length = self.n_steps_kl_warmup or self.n_epochs_kl_warmup
        done = share if self.warms_up_by_share else step if self.n_steps_kl_warmup else epoch
        grown = min(1.0, done / length) if length else 1.0
        return self.min_kl_weight + (self.max_kl_weight - self.min_kl_weight) * grown


@dataclass(frozen=True)
class AdversarialPlan(Plan):
    """Options of a training with an adversary that tells batches apart in latent space.

    Attributes
    ----------
    scale_adversarial_loss
        Weight of the adversary's loss; ``"auto"`` for one minus the weight of the KL terms.
    """

    scale_adversarial_loss: float | str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        scale = self.scale_adversarial_loss
        if scale != "auto" and not (isinstance(scale, Real) and scale >= 0):
            raise ValueError(f"scale_adversarial_loss={scale!r}: 'auto', or a number of zero or more, is needed.")

    def adversarial_weight(self, kl_weight: Any) -> Any:
        """The weight of the adversary's loss now."""
        return 1 - kl_weight if self.scale_adversarial_loss == "auto" else self.scale_adversarial_loss


@dataclass(frozen=True)
class SemiSupervisedPlan(AdversarialPlan):
    """Options of a training that learns the labels of some cells.

    Attributes
    ----------
    classification_ratio
        Weight of the classification loss.
    """

    classification_ratio: float = 50

    of_loss: ClassVar[tuple[str, ...]] = ("classification_ratio",)


def make_plan(defaults: Plan, options: Mapping[str, Any] | None) -> Plan:
    """The defaults with ``plan_kwargs``; an unknown option is an error that names the nearest.

    Raises
    ------
    TypeError
        If an option does not exist.
    """
    given, known = without_needless(as_options("plan_kwargs", options), NEEDLESS), [f.name for f in fields(defaults)]
    return replace(defaults, **without_absent("plan_kwargs", given, ABSENT, known))


def heuristic_epochs(n_cells: int) -> int:
    """Passes over the data when the user does not say: 400, and fewer above 20,000 cells.

    >>> heuristic_epochs(1000), heuristic_epochs(80_000), heuristic_epochs(100_000_000)
    (400, 100, 1)
    """
    return max(1, min(round(20_000 / n_cells * 400), 400))
