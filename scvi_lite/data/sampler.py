"""Which rows a rank sees, and in which order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler


def split_rows(
    n_cells: int, train_size: float | None, validation_size: float | None, shuffle: bool, generator: torch.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows for training, validation and test.

    Raises
    ------
    ValueError
        If a share is out of range or leaves no cell to train on.

    Examples
    --------
    >>> [len(part) for part in split_rows(10, 0.8, 0.1, True, torch.Generator())]
    [8, 1, 1]
    """
    if validation_size is not None and not (is_number(validation_size) and 0 <= validation_size < 1):
        raise ValueError(f"validation_size={validation_size!r}: a share of the cells in [0, 1) is needed.")
    if train_size is None:
        train_size = 0.9 if validation_size is None else 1 - validation_size
    if not (is_number(train_size) and 0 < train_size <= 1):
        raise ValueError(f"train_size={train_size!r}: a share of the cells in (0, 1] is needed.")
    if validation_size is not None and train_size + validation_size > 1 + 1e-9:
        raise ValueError(f"train_size={train_size!r} and validation_size={validation_size!r} add up to more than 1.")
    n_train = int(np.ceil(train_size * n_cells - 1e-9))
    rest = n_cells - n_train
    n_validation = rest if validation_size is None else min(rest, int(np.floor(validation_size * n_cells + 1e-9)))
    order = torch.randperm(n_cells, generator=generator).numpy() if shuffle else np.arange(n_cells)
    # Validation first: without shuffling, users of scvi-tools find the cells of each part where they were there.
    validation, train, test = np.split(order, [n_validation, n_validation + n_train])
    return train, validation, test


def is_number(value: Any) -> bool:
    """Whether it is a number, and not text or True."""
    return isinstance(value, Real) and not isinstance(value, bool)


def shard(row_n: Tensor, rank: int, world_size: int) -> Tensor:
    """The rows of one rank; those of all ranks together are the rows, each once."""
    return row_n[rank::world_size]


class TrainingSampler(Sampler[Tensor]):
    """Minibatches of one rank's rows, shuffled anew each epoch.

    Every rank takes the same number of steps, and no minibatch has a single cell: a rest of one cell joins the last
    full minibatch.

    Parameters
    ----------
    n_rows
        Rows of this rank.
    batch_size
        Cells in a minibatch, per rank.
    seed
        Decides the order, together with the epoch and the rank.
    n_fewest
        Rows of the rank that has the fewest, from which every rank counts its steps.
    deal_to
        Ranks that the rows are dealt out to, anew in each epoch; 1 where they are this rank's own.
    drop_last
        Leave out the rows that do not fill a minibatch; if there is less than one minibatch, it is kept.
    device
        Where the minibatches of row numbers lie: moved there once an epoch.

    Raises
    ------
    ValueError
        If minibatches would have a single cell.

    Examples
    --------
    >>> [len(row_n) for row_n in TrainingSampler(9, batch_size=4, seed=0)]
    [4, 5]
    """

    def __init__(
        self,
        n_rows: int,
        batch_size: int,
        seed: int,
        *,
        n_fewest: int | None = None,
        rank: int = 0,
        deal_to: int = 1,
        drop_last: bool = False,
        device: torch.device | str = "cpu",
    ):
        if batch_size < 2:
            raise ValueError(f"batch_size={batch_size!r}: training needs minibatches of at least 2 cells.")
        self.n_rows, self.batch_size, self.seed = n_rows, batch_size, seed
        self.rank, self.deal_to, self.device = rank, deal_to, device
        n_fewest = n_rows if n_fewest is None else n_fewest
        full, rest = divmod(n_fewest, batch_size)
        self.drop_last = drop_last and full > 0
        self.n_steps = full if self.drop_last else max(1, full + (rest >= 2))
        self.epoch = 0
        self.skip = 0  # steps of the first epoch that a resumed training has behind it

    @property
    def sampler(self) -> TrainingSampler:
        """Itself: the trainer loads minibatches from it, and tells the epoch to its loader's sampler."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Called before each epoch by the trainer."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.n_steps

    def __iter__(self) -> Iterator[Tensor]:
        # Ranks that deal out the same rows must shuffle them alike, ranks with rows of their own need not.
        order = torch.randperm(self.n_rows, generator=self._generator(0 if self.deal_to > 1 else self.rank))
        if self.deal_to > 1:
            order = shard(order, self.rank, self.deal_to)
        order = order.to(self.device)
        first, self.skip = self.skip, 0
        for step in range(first, self.n_steps):
            last = step == self.n_steps - 1 and not self.drop_last
            yield order[step * self.batch_size : None if last else (step + 1) * self.batch_size]

    def _generator(self, *more: int) -> torch.Generator:
        """Random numbers of this epoch."""
        state = np.random.SeedSequence([self.seed % (1 << 64), self.epoch, *more]).generate_state(1, np.uint64)
        return torch.Generator().manual_seed(int(state[0] >> 1))


class SequentialSampler(Sampler[Tensor]):
    """Minibatches of one rank's rows in order, each row once. A rank without rows gets one empty minibatch."""

    def __init__(self, n_rows: int, batch_size: int):
        self.n_rows, self.batch_size = n_rows, batch_size

    def __len__(self) -> int:
        return max(1, -(-self.n_rows // self.batch_size))

    def __iter__(self) -> Iterator[Tensor]:
        yield from torch.arange(self.n_rows).split(self.batch_size)


def check_external(parts: Sequence[Any], n_cells: int) -> list[np.ndarray]:
    """Row numbers for training, validation and test that a user gave.

    Raises
    ------
    ValueError
        If a row is out of range or in two parts, or there are none to train on.
    """
    rows = [np.zeros(0, np.int64) if part is None else np.asarray(part) for part in parts]
    rows += [np.zeros(0, np.int64)] * (3 - len(rows))
    rows = [np.flatnonzero(part) if part.dtype == bool else part.astype(np.int64) for part in rows]
    joined = np.concatenate(rows)
    if len(rows) > 3 or len(rows[0]) == 0:
        raise ValueError(
            "external_indexing: a list of up to three arrays of row numbers is needed: training (not empty), "
            "validation, test."
        )
    if joined.min() < 0 or joined.max() >= n_cells:
        raise ValueError(
            f"external_indexing: rows {joined.min()} to {joined.max()} were given; there are {n_cells} cells."
        )
    if len(np.unique(joined)) < len(joined):
        raise ValueError("external_indexing: a row is given twice; each cell is for training, validation or test.")
    return rows
