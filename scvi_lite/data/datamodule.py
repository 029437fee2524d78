"""The LightningDataModule: loaders of row numbers, and the gather of their cells on the device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from scvi_lite.data.batch import Batch
from scvi_lite.data.disk import LazyStore
from scvi_lite.data.registry import Registry
from scvi_lite.data.sampler import SequentialSampler, TrainingSampler, shard
from scvi_lite.data.store import CellStore

VALIDATION_BATCH = 1024  # no gradients are kept, so minibatches can be larger than in training


@dataclass(frozen=True)
class Split:
    """Rows for training, validation and test."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


class Rows(Dataset[Tensor]):
    """A data set whose items are the row numbers that the sampler asks for."""

    def __getitem__(self, row_n: Tensor) -> Tensor:
        return row_n


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
    source
        File and setup of a backed AnnData, for worker processes to open it again.
    """

    def __init__(
        self,
        store: CellStore | LazyStore,
        split: Split,
        batch_size: int,
        seed: int,
        drop_last: bool = False,
        source: tuple[str, Registry] | None = None,
    ):
        super().__init__()
        self.source = source
        self.store, self.split, self.batch_size = store, split, batch_size
        self.seed, self.drop_last = seed, drop_last
        self.skip_steps = 0

    def setup(self, stage: str) -> None:
        """Take this rank's rows. Rank 0 decides the split and the seed for all."""
        trainer = self.trainer
        self.split, self.seed = trainer.strategy.broadcast((self.split, self.seed))
        rank, world = trainer.global_rank, trainer.world_size
        if len(self.split.train) < 2 * world:
            raise ValueError(
                f"{len(self.split.train)} training cells are too few for {world} device(s): each needs two or more. "
                + ("Use fewer devices." if world > 1 else "Give more cells, or a larger train_size.")
            )
        self.shards = {
            part: self.store.take(shard(torch.from_numpy(rows), rank, world))
            for part, rows in (("train", self.split.train), ("validation", self.split.validation))
        }
        self.shards = {part: store.to(trainer.strategy.root_device) for part, store in self.shards.items()}

    def teardown(self, stage: str) -> None:
        """Free the device's memory."""
        self.shards = {}

    def train_dataloader(self) -> DataLoader[Tensor]:
        trainer = self.trainer
        sampler = TrainingSampler(
            len(self.shards["train"]),
            self.batch_size,
            self.seed,
            n_fewest=len(self.split.train) // trainer.world_size,
            rank=trainer.global_rank,
            drop_last=self.drop_last,
        )
        sampler.skip = self.skip_steps
        return _loader(sampler)

    def val_dataloader(self) -> DataLoader[Tensor] | list[Any]:
        if len(self.split.validation) == 0:
            return []
        return _loader(SequentialSampler(len(self.shards["validation"]), max(self.batch_size, VALIDATION_BATCH)))

    def transfer_batch_to_device(self, batch: Tensor, device: torch.device, dataloader_idx: int) -> Batch:
        """Rows in, cells on the device out."""
        part = "train" if self.trainer.training else "validation"
        return self.shards[part][batch].to(device)


def _loader(sampler: TrainingSampler | SequentialSampler) -> DataLoader[Tensor]:
    # The generator keeps the loader from drawing on the global one, which a resumed training must find as it was.
    return DataLoader(Rows(), sampler=sampler, batch_size=None, generator=torch.Generator())
