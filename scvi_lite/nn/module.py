"""What training asks of a neural module, whatever it models."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from scvi_lite.data.batch import Batch


@dataclass
class Loss:
    """The number to descend, and what it is made of: each term summed over the minibatch's cells."""

    total: Tensor
    reconstruction: Tensor
    kl_local: Tensor
    n_cells: int
    extra: dict[str, Tensor] = field(default_factory=dict)  #: further sums, see :attr:`Module.extra_shapes`
    z_nk: Tensor | None = None  #: latent positions that an adversary looks at


class Module(nn.Module, ABC):
    """A neural module that :class:`~scvi_lite.train.task.Task` trains: tensors in, tensors out."""

    @property
    def extra_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes of the sums in ``Loss.extra``, by name; they are added up over minibatches and ranks."""
        return {}

    @property
    def extra_metrics(self) -> tuple[str, ...]:
        """Names of the metrics that :meth:`summarise` gives; the history adds ``_train`` or ``_validation``."""
        return tuple(self.extra_shapes)

    @abstractmethod
    def loss(self, batch: Batch, kl_weight: float | Tensor = 1.0) -> Loss:
        """The loss of a minibatch. Options of a model's training plan come as further keywords."""

    def summarise(self, extra: Mapping[str, Tensor], n_cells: float) -> dict[str, float]:
        """Metrics of an epoch, from the sums of ``Loss.extra`` over all of its cells; by default their means."""
        return {name: float(value) / n_cells for name, value in extra.items()}
