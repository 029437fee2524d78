"""The LightningDataModule: samplers of row numbers, and the gather of their cells on the device."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor

from scvi_lite.data.batch import Batch
from scvi_lite.data.disk import LazyStore
from scvi_lite.data.registry import Registry
from scvi_lite.data.sampler import SequentialSampler, TrainingSampler, shard
from scvi_lite.data.store import CellStore
from scvi_lite.data.supervision import SupervisedSampler, Supervision
from scvi_lite.errors import check_choice

SHUFFLES = ("shard", "all")
# No gradients are kept, so minibatches can be larger than in training: up to so many cells, or numbers in all.
VALIDATION_BATCH, VALIDATION_NUMBERS = 1024, 1 << 20


@dataclass(frozen=True)
class Split:
    """Rows for training, validation and test."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


class CellDataModule(pl.LightningDataModule):
    """Cells for a fit: each rank keeps its own rows, on its own device.

    Parameters
    ----------
    store
        All cells.
    split
        Rows for training and validation.
    batch_size
        Cells in a minibatch, per device.
    seed
        Decides the order of the cells.
    drop_last
        Leave out the cells of an epoch that do not fill a minibatch.
    shuffle_over
        ``"shard"``: each rank keeps one share of the training cells and shuffles it anew in each epoch; ``"all"``: the
        training cells are dealt out anew in each epoch, so that each rank keeps all of them.
    source
        File and setup of a backed AnnData, for worker processes to open it again.
    supervision
        How cells that have a label are mixed into the minibatches, for models that learn labels.
    """

    def __init__(
        self,
        store: CellStore | LazyStore,
        split: Split,
        batch_size: int,
        seed: int,
        drop_last: bool = False,
        shuffle_over: str = "shard",
        source: tuple[str, Registry] | None = None,
        supervision: Supervision | None = None,
    ):
        super().__init__()
        check_choice(SHUFFLES, shuffle_over=shuffle_over)
        self.source, self.shuffle_over = source, shuffle_over
        self.store, self.split, self.batch_size = store, split, batch_size
        self.seed, self.drop_last = seed, drop_last
        self.skip_steps = 0
        self.supervision, self.n_extra = supervision, 0

    def check_size(self, n_devices: int) -> None:
        """Refuse more devices than there are cells for.

        Raises
        ------
        ValueError
            If a device would get fewer than two training cells.
        """
        if len(self.split.train) < 2 * n_devices:
            raise ValueError(
                f"{len(self.split.train)} training cells are too few for {n_devices} device(s): each needs two or "
                "more. " + ("Use fewer devices." if n_devices > 1 else "Give more cells, or a larger train_size.")
            )

    def setup(self, stage: str) -> None:
        """Take this rank's rows. Rank 0 decides the split and the seed for all."""
        trainer = self.trainer
        self.split, self.seed = trainer.strategy.broadcast((self.split, self.seed))
        rank, world = trainer.global_rank, trainer.world_size
        self.check_size(world)
        train, validation = torch.from_numpy(self.split.train), torch.from_numpy(self.split.validation)
        own, lent = self._training_rows(train, rank, world)
        self.n_own = len(own)
        rows = {"train": torch.cat([own, lent]), "validation": shard(validation, rank, world)}
        device = trainer.strategy.root_device
        self.shards = {part: self.store.take(row_n).to(device) for part, row_n in rows.items()}

    def _training_rows(self, train: Tensor, rank: int, world: int) -> tuple[Tensor, Tensor]:
        """The rows that this rank trains on, and further ones to learn labels from."""
        own, lent = train if self.shuffle_over == "all" else shard(train, rank, world), train[:0]
        if self.supervision is not None:
            label_n = self.store.cells["label_n"][train]
            self.supervision.check(label_n, told=rank == 0)
            self.n_extra = self.supervision.n_extra(self.batch_size, label_n)
            if self.shuffle_over == "shard":
                own, lent = (train[position_n] for position_n in self.supervision.deal(label_n, rank, world))
            self.label_n = self.store.cells["label_n"][torch.cat([own, lent])]
        return own, lent

    def teardown(self, stage: str) -> None:
        """Free the device's memory."""
        self.shards = {}

    def train_dataloader(self) -> TrainingSampler:
        trainer = self.trainer
        options: dict[str, Any] = dict(
            n_rows=self.n_own,
            batch_size=self.batch_size,
            seed=self.seed,
            n_fewest=len(self.split.train) // trainer.world_size,
            rank=trainer.global_rank,
            deal_to=trainer.world_size if self.shuffle_over == "all" else 1,
            drop_last=self.drop_last,
            device=self.shards["train"].row_device,
        )
        sampler: TrainingSampler
        if self.n_extra:
            sampler = SupervisedSampler(self.supervision, self.label_n, self.n_extra, trainer.world_size, **options)
        else:
            sampler = TrainingSampler(**options)
        sampler.skip = self.skip_steps
        return sampler

    def val_dataloader(self) -> SequentialSampler | list[Any]:
        if len(self.split.validation) == 0:
            return []
        validation = self.shards["validation"]
        n_cells = min(VALIDATION_BATCH, VALIDATION_NUMBERS // validation.n_features)
        return SequentialSampler(len(validation), max(self.batch_size, n_cells))

    def transfer_batch_to_device(self, batch: Tensor, device: torch.device, dataloader_idx: int) -> Batch:
        """Rows in, cells on the device out."""
        if not self.trainer.training:
            return self.shards["validation"][batch].to(device)
        store = self.shards["train"]
        if not self.n_extra:
            return store[batch].to(device)
        cells, extra = (store[row_n].to(device) for row_n in batch.split([len(batch) - self.n_extra, self.n_extra]))
        return replace(cells, extra=extra, teaches=self.supervision.n_per_label is None)
