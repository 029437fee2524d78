"""How cells that have a label enter a semi-supervised training."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scvi_lite.data.sampler import TrainingSampler, is_number
from scvi_lite.errors import listing, warn


@dataclass(frozen=True)
class Supervision:
    """How cells that have a label are mixed into the minibatches of a semi-supervised training.

    Each minibatch holds its share of the training cells, all of which are used once in an epoch, and extra cells, from
    which the labels alone are learned: on average, ``share`` · batch size of its cells have a label. Where so many
    have one anyway, there are no extra cells.

    Attributes
    ----------
    names
        The labels, in the order of their codes; the code of a cell without is their number.
    share
        Cells with a label, for each cell of a minibatch.
    n_per_label
        If given, labels are learned from this many cells of each, drawn anew in each epoch, and all of them come extra.
    """

    names: Sequence[Any]
    share: float = 0.5
    n_per_label: float | None = None

    def __post_init__(self) -> None:
        least = "more than 0" if self.n_per_label is not None else "0 or more"
        if not is_number(self.share) or self.share < 0 or (self.share == 0 and self.n_per_label is not None):
            raise ValueError(f"labeled_share={self.share!r}: a number of {least} is needed.")
        if self.n_per_label is not None and (not is_number(self.n_per_label) or self.n_per_label < 1):
            raise ValueError(f"n_samples_per_label={self.n_per_label!r}: a number of at least 1 is needed.")

    def n_extra(self, batch_size: int, label_n: Tensor) -> int:
        """Extra cells of a minibatch, where the training cells have these codes.

        >>> Supervision(["a", "b"]).n_extra(128, torch.tensor([0, 1, 2, 2, 2, 2, 2, 2]))
        32
        """
        there = 0.0 if self.n_per_label else float((label_n < len(self.names)).double().mean())
        return max(0, math.ceil((self.share - there) * batch_size - 1e-9))

    def check(self, label_n: Tensor, told: bool = True) -> None:
        """Refuse training cells without a label; warn, if they are to be told, of a label that none of them has.

        Raises
        ------
        ValueError
            If no training cell has a label.
        """
        n_l = torch.bincount(label_n, minlength=len(self.names) + 1)[: len(self.names)]
        if not n_l.any():
            raise ValueError(
                f"None of the {len(label_n)} training cells has a label. Give a larger train_size, or another split."
            )
        missing = [self.names[code] for code in (n_l == 0).nonzero().flatten().tolist()]
        if missing and told:
            warn(f"No training cell has the label {listing(missing)}: it cannot be learned.")

    def deal(self, label_n: Tensor, rank: int, world_size: int) -> tuple[Tensor, Tensor]:
        """Positions of one rank's cells, and of cells of other ranks whose labels it would not have.

        Each rank gets the same number of cells of each label, give or take one. A label with fewer cells than there
        are ranks is lent to those without: no rank forgets it.

        >>> label_n = torch.tensor([0, 1, 0, 2, 2])  # of two labels
        >>> Supervision(["a", "b"]).deal(label_n, rank=0, world_size=2)
        (tensor([0, 1, 4]), tensor([], dtype=torch.int64))
        >>> Supervision(["a", "b"]).deal(label_n, rank=1, world_size=2)
        (tensor([2, 3]), tensor([1]))
        """
        own = label_n.argsort(stable=True)[rank::world_size]
        absent_n = (label_n < len(self.names)) & ~torch.isin(label_n, label_n[own])
        return own, absent_n.nonzero().flatten()

    def draw(self, label_n: Tensor, n: int, world_size: int, generator: torch.Generator) -> Tensor:
        """Positions of ``n`` extra cells of an epoch: each labelled one as often as any other, in random order."""
        pool = (label_n < len(self.names)).nonzero().flatten()
        pool = pool[torch.randperm(len(pool), generator=generator)]
        if self.n_per_label:
            pool = pool[label_n[pool].argsort(stable=True)]
            first_l = torch.searchsorted(label_n[pool], torch.arange(len(self.names)))
            place_n = torch.arange(len(pool)) - first_l[label_n[pool]]
            pool = pool[place_n < math.ceil(self.n_per_label / world_size)]
        turns = -(-n // len(pool))
        return pool[torch.rand(turns, len(pool), generator=generator).argsort(1).flatten()[:n]]


class SupervisedSampler(TrainingSampler):
    """Minibatches of one rank's rows, each followed by the same number of extra rows that have a label.

    Parameters
    ----------
    supervision
        How labelled cells are mixed in.
    label_n
        Codes of the labels of all rows that this rank holds; the first ``n_rows`` of them are its own.
    n_extra, world_size
        Extra rows of a minibatch, and number of ranks.
    *arguments, **options
        Of :class:`~scvi_lite.data.sampler.TrainingSampler`.

    Examples
    --------
    >>> label_n = torch.tensor([0, 2, 1, 2, 2, 2, 2, 2])  # the code of cells without a label is 2
    >>> sampler = SupervisedSampler(Supervision(["a", "b"]), label_n, 2, 1, 8, batch_size=4, seed=0)
    >>> [sorted(row_n[-2:].tolist()) for row_n in sampler]
    [[0, 2], [0, 2]]
    """

    def __init__(
        self, supervision: Supervision, label_n: Tensor, n_extra: int, world_size: int, *arguments: Any, **options: Any
    ):
        super().__init__(*arguments, **options)
        self.supervision, self.label_n = supervision, label_n
        self.n_extra, self.world_size = n_extra, world_size

    def __iter__(self) -> Iterator[Tensor]:
        generator = self._generator(self.rank, 1)  # ranks that deal out the same rows draw extra ones of their own
        extra_n = self.supervision.draw(self.label_n, len(self) * self.n_extra, self.world_size, generator)
        extra_n = extra_n.to(self.device)
        for row_n, some_n in zip(super().__iter__(), extra_n.split(self.n_extra)[self.skip :], strict=True):
            yield torch.cat([row_n, some_n])
