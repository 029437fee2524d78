"""What training asks of a neural module, whatever it models."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from torch import Tensor, nn

from scvi_lite._elsewhere import instead_of
from scvi_lite.data.batch import Batch
from scvi_lite.errors import ElsewhereError


@dataclass
class Loss:
    """The number to descend, and what it is made of: each term summed over the minibatch's cells."""

    total: Tensor
    reconstruction: Tensor
    kl_local: Tensor
    n_cells: int
    extra: dict[str, Tensor] = field(default_factory=dict)  #: further sums, see :attr:`Module.extra_shapes`
    z_nk: Tensor | None = None  #: latent positions that an adversary looks at


@dataclass(frozen=True)
class Frozen:
    """What a training leaves as it is.

    Attributes
    ----------
    weights
        Parameters.
    rows
        Of other parameters, the number of their first rows.
    still
        Parts that never switch to training: no dropout there, and batch norm goes by its running statistics.
    """

    weights: tuple[str, ...] = ()
    rows: Mapping[str, int] = field(default_factory=dict)
    still: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As plain data; nothing where nothing is frozen."""
        parts = {"weights": list(self.weights), "rows": dict(self.rows), "still": list(self.still)}
        return parts if any(parts.values()) else {}

    @classmethod
    def from_dict(cls, parts: Mapping[str, Any], module: nn.Module) -> Self:
        """From :meth:`to_dict`, for a module.

        Raises
        ------
        ValueError
            If it names what the module does not have.
        """
        sizes = {name: max(1, p.ndim and len(p)) for name, p in module.named_parameters()}
        weights, rows, still = (parts.get(name, ()) for name in ("weights", "rows", "still"))
        there = set(weights) <= sizes.keys() and set(still) <= dict(module.named_modules()).keys()
        if not (there and all(0 < n <= sizes.get(name, 0) for name, n in dict(rows).items())):
            raise ValueError("The model is damaged: what it names as frozen is not in its network.")
        return cls(tuple(weights), dict(rows), tuple(still))


class Module(nn.Module, ABC):
    """A neural module that :class:`~scvi_lite.train.task.Task` trains: tensors in, tensors out."""

    frozen = Frozen()

    def __getattr__(self, name: str) -> Any:
        """Parameters and parts; for a name of scvi-tools, an error that says what to use instead."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if (message := instead_of("module", name)) is not None:
                raise ElsewhereError(message, name=name) from None
            raise

    @property
    def per_cell(self) -> tuple[str, ...]:
        """Parameters with a row for each cell of the data that the model was made with."""
        return ()

    def freeze(self, frozen: Frozen) -> None:
        """Hold a part of the weights from now on; travels with the module to other processes."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name not in frozen.weights)
        self.frozen = frozen
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """Switch between training and evaluation, but for what is frozen."""
        super().train(mode)
        for name in self.frozen.still:
            self.get_submodule(name).training = False
        return self

    @property
    def extra_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes of the sums in ``Loss.extra``, by name; they are added up over minibatches and ranks."""
        return {}

    @property
    def extra_metrics(self) -> tuple[str, ...]:
        """Names of the metrics that :meth:`summarise` gives."""
        return tuple(self.extra_shapes)

    def metric_name(self, name: str, part: str) -> str:
        """What the history calls one of these metrics for the ``"train"`` or ``"validation"`` cells."""
        return f"{name}_{part}"

    @abstractmethod
    def loss(self, batch: Batch, kl_weight: float | Tensor = 1.0) -> Loss:
        """The loss of a minibatch. Options of a model's training plan come as further keywords."""

    @property
    def is_by_hand(self) -> bool:
        """Whether :meth:`loss_and_gradients` exists for this network: a shorter way than that of autograd."""
        return False

    def loss_and_gradients(self, batch: Batch, kl_weight: float) -> tuple[Loss, dict[Tensor, Tensor]]:
        """The loss of a minibatch in training, of two cells or more, and its gradient for each weight."""
        raise NotImplementedError

    def summarise(self, extra: Mapping[str, Tensor], n_cells: float) -> dict[str, float]:
        """Metrics of an epoch, from the sums of ``Loss.extra`` over all of its cells; by default their means."""
        return {name: float(value) / n_cells for name, value in extra.items()}
