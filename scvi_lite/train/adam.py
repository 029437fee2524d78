"""Adam (Kingma & Ba 2015, arXiv:1412.6980), whose fused steps cost what their arithmetic costs.

The fused steps of PyTorch collect their tensors anew each time, which takes as long as the arithmetic for networks of
this size, and copy weights that are stored by input, as those of first layers are, there and back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from scvi_lite.train.plan import Plan


def _is_turned(tensor: Tensor) -> bool:
    """Whether a matrix is stored by column."""
    return tensor.dim() == 2 and tensor.t().is_contiguous() and not tensor.is_contiguous()


class _FusedStep:
    """The fused steps of an optimiser after its first, which makes the moments.

    A step works number by number, so matrices that are stored by column may stand as their transposes, which are
    stored by row, if weight, gradient and moments all do.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, update: Callable[..., None]):
        self.group, self.state, self.update = optimizer.param_groups[0], optimizer.state, update
        self.lr: Tensor | None = None  #: instead of the number, where a graph records the step
        states = [optimizer.state[weight] for weight in self.group["params"]]
        self.turned = [i for i, weight in enumerate(self.group["params"]) if _is_turned(weight)]
        self.means, self.squares = (self._turn([state[name] for state in states]) for name in ("exp_avg", "exp_avg_sq"))
        self.count = torch.stack([state["step"] for state in states])  # in one tensor, which one addition raises
        self.counts = list(self.count)
        for state, count in zip(states, self.counts, strict=True):
            state["step"] = count

    def _turn(self, tensors: list[Tensor]) -> list[Tensor]:
        for i in self.turned:
            tensors[i] = tensors[i].t()
        return tensors

    def take(self) -> None:
        """One step, along the gradients that are there."""
        group, weights = self.group, list(self.group["params"])
        gradients = self._turn([weight.grad for weight in weights])
        beta1, beta2 = group["betas"]
        self.count.add_(1)
        self.update(
            self._turn(weights),
            gradients,
            self.means,
            self.squares,
            [],
            self.counts,
            lr=group["lr"] if self.lr is None else self.lr,
            beta1=beta1,
            beta2=beta2,
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )


def _step(optimizer: Adam | AdamW, closure: Any, theirs: Callable[[], Any], update: Callable[..., None]) -> Any:
    """A step by ``update`` where there is nothing to make or to leave out, else by that of PyTorch."""
    loss = None
    if closure is not None:
        with torch.enable_grad():
            loss = closure()
    group, *others = optimizer.param_groups
    if others or not group["fused"] or any(weight.grad is None for weight in group["params"]):
        theirs()
    elif optimizer.fused_step is not None and optimizer.fused_step.state is optimizer.state:  # not one loaded since
        optimizer.fused_step.take()
    else:
        theirs()
        optimizer.fused_step = _FusedStep(optimizer, update)
    return loss


class Adam(torch.optim.Adam):
    """``torch.optim.Adam``, with fast fused steps."""

    fused_step: _FusedStep | None = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Descend along the gradients."""
        return _step(self, closure, super().step, torch._fused_adam_)


class AdamW(torch.optim.AdamW):
    """``torch.optim.AdamW``, with fast fused steps."""

    fused_step: _FusedStep | None = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Descend along the gradients."""
        return _step(self, closure, super().step, torch._fused_adamw_)


def make_optimizer(plan: Plan, parameters: list[Tensor], scale: float, fused: bool) -> torch.optim.Optimizer:
    """What a plan asks for, with its learning rate times ``scale``."""
    if plan.optimizer == "Custom":
        return plan.optimizer_creator(parameters)
    kind = {"Adam": Adam, "AdamW": AdamW}[plan.optimizer]
    return kind(parameters, lr=plan.lr * scale, eps=plan.eps, weight_decay=plan.weight_decay, fused=fused)


def plateau_schedule(plan: Plan, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.ReduceLROnPlateau:
    """Lowers the learning rate when the metric of the plan stands still."""
    return torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer,
        factor=plan.lr_factor,
        patience=plan.lr_patience,
        threshold=plan.lr_threshold,
        threshold_mode="abs",
        min_lr=plan.lr_min,
    )
