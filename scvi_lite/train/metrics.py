"""Metrics of an epoch: sums over cells, on the device that computes them until somebody asks."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from scvi_lite.nn.module import Loss, Module
from scvi_lite.train.plan import metric_names


class Sums:
    """The terms of a module's loss, summed over the ``"train"`` or the ``"validation"`` cells of an epoch.

    No step waits for the device, and after one reduction every rank holds the same numbers.
    """

    def __init__(self, module: Module, part: str, device: torch.device):
        self.module, self.part = module, part
        dtype = torch.float32 if device.type == "mps" else torch.float64  # where doubles exist
        size = 3 + sum(map(math.prod, module.extra_shapes.values()))
        self.terms = torch.zeros(size, dtype=dtype, device=device)
        self.n_cells = 0  #: in the terms; counted by who adds, as a graph of a step counts nothing

    def start(self) -> None:
        """Begin an epoch."""
        self.terms.zero_()  # in place: a graph of a step adds to this tensor
        self.n_cells = 0

    def add(self, loss: Loss) -> None:
        """Add the terms of a minibatch."""
        terms = torch.stack([loss.total.detach() * loss.n_cells, loss.reconstruction.detach(), loss.kl_local.detach()])
        if extra_shapes := self.module.extra_shapes:
            terms = torch.cat([terms, *(loss.extra[name].detach().flatten() for name in extra_shapes)])
        self.terms += terms

    def reduced(self, strategy: Any) -> Tensor:
        """The terms, and the number of cells behind them, over all ranks of a strategy."""
        return strategy.reduce(torch.cat([self.terms, self.terms.new_tensor([self.n_cells])]), reduce_op="sum")

    def go_on(self, reduced: Tensor) -> None:
        """Go on from what :meth:`reduced` gave."""
        *terms, n_cells = reduced.tolist()
        self.terms.copy_(self.terms.new_tensor(terms))
        self.n_cells = int(n_cells)

    def means(self, strategy: Any) -> dict[str, float]:
        """Metrics so far by name, over the cells of all ranks."""
        sums = self.reduced(strategy).cpu()
        loss, reconstruction, kl = sums[:3].tolist()
        n = max(float(sums[-1]), 1.0)
        values = (loss / n, (reconstruction + kl) / n, reconstruction / n, kl / n, 0.0)
        metrics = dict(zip(metric_names(self.part), values, strict=True))
        if shapes := self.module.extra_shapes:
            flat = sums[3:-1].split([math.prod(shape) for shape in shapes.values()])
            extra = {name: values.view(shapes[name]) for name, values in zip(shapes, flat, strict=True)}
            summary = self.module.summarise(extra, n)
            metrics |= {self.module.metric_name(name, self.part): value for name, value in summary.items()}
        return metrics
