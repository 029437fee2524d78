"""What all models share: setup, training, saving and loading."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import pandas as pd
import torch

from scvi_lite._settings import settings
from scvi_lite.analysis.inputs import whole_number
from scvi_lite.analysis.minify import setup_for
from scvi_lite.data import registry as registries
from scvi_lite.data.batch import Batch
from scvi_lite.data.disk import LazyStore
from scvi_lite.data.fields import Field
from scvi_lite.data.genes import match_genes
from scvi_lite.data.registry import Registry, describe_field
from scvi_lite.errors import StateError, listing, unknown, warn
from scvi_lite.nn.module import Module
from scvi_lite.train.devices import choose_device
from scvi_lite.train.plan import Plan

if TYPE_CHECKING:
    from anndata import AnnData

    from scvi_lite.io.folder import SavedModel

logger = logging.getLogger("scvi_lite")

INFERENCE_BATCH = 1024  # no gradients are kept, so minibatches can be larger than in training


class Model(ABC):
    """Base of all models: holds an AnnData, the setup it was registered with, and a neural module.

    Attributes
    ----------
    adata
        The data the model was made with.
    registry
        What the model reads from them.
    module
        The neural network.
    is_trained
        Whether it has been trained.
    train_indices, validation_indices, test_indices
        Rows of the cells used for each; None before training.
    """

    plan: ClassVar[Plan] = Plan()  #: default options of the training

    def __init__(self, adata: AnnData, arguments: dict[str, Any]):
        registries.check_anndata(adata)
        self._build(adata, registries.find(adata, type(self).__name__), arguments)

    def _build(self, adata: AnnData, registry: Registry, arguments: dict[str, Any]) -> None:
        self._adata, self.registry, self._arguments = adata, registry, arguments
        self._var_names = adata.var_names.astype(str).tolist()
        self.is_trained = False
        self._history: dict[str, pd.DataFrame] = {}
        self.train_indices: np.ndarray | None = None
        self.validation_indices: np.ndarray | None = None
        self.test_indices: np.ndarray | None = None
        self.module = self._make_module(arguments).eval()
        self.trainer: Any = None

    @abstractmethod
    def _make_module(self, arguments: dict[str, Any]) -> Module:
        """The untrained module; ``arguments`` are those of the constructor. Refuses unknown ones."""

    @classmethod
    def _register(cls, adata: AnnData, fields: Sequence[Field], setup_args: dict[str, Any]) -> None:
        registries.register(adata, cls.__name__, fields, setup_args)

    # Data -------------------------------------------------------------------------------------------------------------

    @property
    def adata(self) -> AnnData:
        """The data of the model. Others may be put in their place, if they fit."""
        return self._adata

    @adata.setter
    def adata(self, adata: AnnData) -> None:
        self._adata = self._check(adata)

    def _check(self, adata: AnnData | None) -> AnnData:
        """An AnnData that fits the model: the model's own, or a new one with its genes in order."""
        if adata is None:
            return self._adata
        if adata is not self._adata:
            adata = match_genes(adata, self._var_names)
            self.registry.check(adata)
        return adata

    @staticmethod
    def _rows(adata: AnnData, indices: Any) -> np.ndarray:
        """Row numbers (n,) int64 from numbers, a mask, or nothing for all cells.

        Raises
        ------
        IndexError
            If a row does not exist.
        """
        if indices is None:
            return np.arange(adata.n_obs)
        rows = np.asarray(indices)
        if rows.dtype == bool:
            if rows.shape != (adata.n_obs,):
                raise IndexError(f"indices: a mask of {rows.size} cells was given for {adata.n_obs} cells.")
            return np.flatnonzero(rows)
        if rows.size == 0:
            return np.zeros(0, dtype=np.int64)
        if rows.dtype.kind not in "ui" or rows.ndim != 1:
            raise IndexError(
                f"indices: whole numbers or a mask are needed; {rows.dtype} of shape {rows.shape} was given."
            )
        if rows.min() < -adata.n_obs or rows.max() >= adata.n_obs:
            raise IndexError(f"indices: {rows.min()} to {rows.max()} were given; adata has {adata.n_obs} cells.")
        return np.where(rows < 0, rows + adata.n_obs, rows).astype(np.int64)

    def _minibatches(
        self, adata: AnnData | None = None, indices: Any = None, batch_size: int | None = None
    ) -> Iterator[Batch]:
        """Cells as minibatches on the model's device, in the order of ``indices``, without gradients."""
        adata = self._check(adata)
        batch_size = (settings.batch_size or INFERENCE_BATCH) if batch_size is None else batch_size
        whole_number(batch_size=batch_size)
        store = LazyStore(adata, self.registry, self._rows(adata, indices))
        self.module.eval()
        for batch in store.batches(int(batch_size)):
            with torch.inference_mode():
                yield batch.to(self.device)

    def _batch_codes(self, transform_batch: Any, argument: str = "transform_batch") -> list[int | None]:
        """Codes of the batches to decode as; ``[None]`` stands for each cell's own.

        Raises
        ------
        ValueError
            If a batch does not exist, or none is named.
        """
        if transform_batch is None:
            return [None]
        if isinstance(transform_batch, str | int | np.integer):
            transform_batch = [transform_batch]
        known = [str(c) for c in self.registry.categories("batch_n")]
        codes: list[int | None] = []
        for name in transform_batch:
            if name is None:
                codes.append(None)
            elif str(name) in known:
                codes.append(known.index(str(name)))
            elif isinstance(name, int | np.integer) and 0 <= name < len(known):
                codes.append(int(name))
            else:
                raise ValueError(unknown(argument, name, known, "a batch of this model", "Batches"))
        if not codes:
            raise ValueError(f"{argument} is empty: name a batch, or leave it out. Batches: {listing(known)}.")
        return codes

    @property
    def summary_stats(self) -> dict[str, int]:
        """Numbers of cells, genes, batches and labels that the model was set up with."""
        r = self.registry
        return {"n_cells": r.n_cells, "n_vars": r.n_features, "n_batch": r.n_batches, "n_labels": r.n_labels}

    def get_var_names(self) -> list[str]:
        """Names of the genes, in the order the model reads them."""
        return list(self._var_names)

    # Training ---------------------------------------------------------------------------------------------------------

    def train(
        self,
        max_epochs: int | None = None,
        accelerator: str = "auto",
        devices: int | list[int] | str = "auto",
        train_size: float | None = None,
        validation_size: float | None = None,
        shuffle_set_split: bool = True,
        batch_size: int | None = None,
        early_stopping: bool = False,
        datasplitter_kwargs: Mapping[str, Any] | None = None,
        plan_kwargs: Mapping[str, Any] | None = None,
        strategy: Any = "auto",
        **trainer_kwargs: Any,
    ) -> None:
        """Train the model.

        Ctrl-C or the stop button ends training after the minibatch at hand; the model is kept as trained so far. If the
        loss diverges, the weights of the last good epoch are kept.

        Parameters
        ----------
        max_epochs
            Passes over the training cells; by default 400, and fewer above 20,000 cells:
            ``min(round(20000 / n_cells * 400), 400)``, at least 1.
        accelerator, devices, strategy
            Where to train, as in ``lightning.Trainer``.
        train_size, validation_size
            Shares of the cells to train on and to validate with; 0.9 and what is left by default. The rest is set aside
            as test cells.
        shuffle_set_split
            Draw the cells of each share at random; else take them in order: validation, training, test.
        batch_size
            Cells in a minibatch, per device; 128 by default.
        early_stopping
            Stop when ``early_stopping_monitor`` (default ``"elbo_validation"``) has not improved for
            ``early_stopping_patience`` (45) epochs; see also ``early_stopping_min_delta``, ``early_stopping_mode`` and
            ``early_stopping_warmup_epochs``.
        datasplitter_kwargs
            ``external_indexing``: a list of row numbers for training, validation and test, instead of a random split;
            ``drop_last``: leave out the cells of an epoch that do not fill a minibatch; ``shuffle_over``: with several
            devices, ``"shard"`` (each keeps its own cells) or ``"all"`` (cells are dealt out anew in each epoch).
        plan_kwargs
            Optimiser, schedules and KL warm-up: see :class:`~scvi_lite.train.plan.Plan`.
        **trainer_kwargs
            Every other option of ``lightning.Trainer`` (``precision``, ``callbacks``, ``logger``, ``num_nodes``,
            ``gradient_clip_val``, ...); ``enable_checkpointing=True`` with ``checkpointing_monitor``, which keeps the
            best and the last state under ``default_root_dir``; ``learning_rate_monitor``; and ``ckpt_path``, a
            checkpoint to go on from.

        Raises
        ------
        TypeError
            If an option does not exist.
        ValueError
            If a value is out of range, or a metric is monitored that will not come.
        TrainingDivergedError
            If the loss becomes NaN or infinite.
        """
        from scvi_lite.model.training import fit_model

        fit_model(
            self,
            max_epochs=max_epochs,
            accelerator=accelerator,
            devices=devices,
            train_size=train_size,
            validation_size=validation_size,
            shuffle_set_split=shuffle_set_split,
            batch_size=batch_size,
            early_stopping=early_stopping,
            datasplitter_kwargs=datasplitter_kwargs,
            plan_kwargs=plan_kwargs,
            strategy=strategy,
            **trainer_kwargs,
        )

    def _check_can_train(self) -> None:
        """Refuse what cannot be trained; models add to it."""
        if "qz_loc_nk" in self.registry.fields:
            raise StateError(
                "The data of this model are minified: a model is trained with counts. Make it with the full data."
            )

    @property
    def history(self) -> dict[str, pd.DataFrame]:
        """Metrics of the training: for each a frame with one column, indexed by epoch.

        ``elbo_*`` is the negative evidence lower bound per cell, in nats: lower is better.
        """
        return self._history

    @property
    def device(self) -> torch.device:
        """Where the module is."""
        return next(self.module.parameters()).device

    def to_device(self, device: str | int | torch.device) -> None:
        """Move the module: ``"cpu"``, ``"cuda:0"``, or the number of a GPU."""
        self.module.to(torch.device(device))

    def _warn_if_untrained(self) -> None:
        if not self.is_trained:
            warn(f"This {type(self).__name__} is not trained: its answers are random. Call train() first.")

    # Files ------------------------------------------------------------------------------------------------------------

    def save(
        self,
        dir_path: str | Path,
        prefix: str | None = None,
        overwrite: bool = False,
        save_anndata: bool = False,
        **anndata_write_kwargs: Any,
    ) -> None:
        """Save the model to a folder: ``model.safetensors`` and ``model.json``.

        With several ranks, all may call it: the first writes, and all go on when it is done.

        Parameters
        ----------
        dir_path
            The folder.
        prefix
            Put before the names of the files.
        overwrite
            Replace a model that is there.
        save_anndata
            Save the data with it, as ``adata.h5ad``.
        **anndata_write_kwargs
            Options of ``AnnData.write_h5ad``.

        Raises
        ------
        FileExistsError
            If the folder holds files and ``overwrite`` is False.
        """
        from scvi_lite.io.folder import write_folder
        from scvi_lite.train.ranks import on_first_rank

        def write_data(folder: Path) -> None:
            self.adata.write_h5ad(folder / f"{prefix or ''}adata.h5ad", **anndata_write_kwargs)

        if anndata_write_kwargs and not save_anndata:
            raise TypeError(
                f"save() has no option {next(iter(anndata_write_kwargs))!r}; options of AnnData.write_h5ad go with "
                "save_anndata=True."
            )
        on_first_rank(
            lambda: write_folder(
                dir_path,
                self._to_saved(),
                prefix=prefix or "",
                overwrite=overwrite,
                write_data=write_data if save_anndata else None,
            ),
            f"save {dir_path} {prefix} {sum(float(p.detach().double().sum()) for p in self.module.parameters())}",
        )

    def _to_saved(self) -> SavedModel:
        from scvi_lite import __version__
        from scvi_lite.io.folder import SavedModel

        split = {"train": self.train_indices, "validation": self.validation_indices, "test": self.test_indices}
        return SavedModel(
            class_name=type(self).__name__,
            arguments=self._arguments,
            registry=self.registry.to_dict(),
            var_names=self._var_names,
            state=self.module.state_dict(),
            history=self._history,
            indices={part: rows for part, rows in split.items() if rows is not None},
            is_trained=self.is_trained,
            version=__version__,
        )

    @classmethod
    def load(
        cls,
        dir_path: str | Path,
        adata: AnnData | None = None,
        accelerator: str = "auto",
        device: int | str = "auto",
        prefix: str | None = None,
    ) -> Self:
        """Load a model from a folder that :meth:`save`, or scvi-tools, wrote. No code is run from it.

        Parameters
        ----------
        dir_path
            The folder.
        adata
            Data for the model, with the genes it was trained on in any order. Not needed if they were saved with it.
        accelerator, device
            Where to put the model; a GPU if there is one.
        prefix
            What the names of the files begin with.

        Raises
        ------
        FileNotFoundError
            If there is no model, or no data.
        ValueError
            If the files are damaged or foreign, hold another class, or do not fit ``adata``.
        """
        from scvi_lite.io import scvi_tools
        from scvi_lite.io.folder import read_folder
        from scvi_lite.io.restore import read_data

        prefix = prefix or ""
        foreign = scvi_tools.is_scvi_tools_folder(dir_path, prefix)
        saved = scvi_tools.read_scvi_tools(dir_path, prefix) if foreign else read_folder(dir_path, prefix)
        if saved.class_name != cls.__name__:
            raise ValueError(
                f"{dir_path} holds a {saved.class_name}, not a {cls.__name__}. Load it with "
                f"{saved.class_name}.load(...)."
            )
        if adata is None:
            adata = read_data(dir_path, prefix, foreign)
        model = cls._from_saved(saved, adata)
        model.to_device(choose_device(accelerator, device))
        return model

    @classmethod
    def _from_saved(cls, saved: SavedModel, adata: AnnData) -> Self:
        from scvi_lite.io.restore import check_names, check_sizes, load_weights

        model = cls.__new__(cls)
        registry = setup_for(Registry.from_dict(saved.registry), adata)
        adata = match_genes(adata, check_names(saved.var_names, registry))
        registry.check(adata)
        check_sizes(saved.arguments, saved.state)
        model._build(adata, registry, saved.arguments)
        load_weights(model.module, saved.state)
        model.is_trained, model._history = saved.is_trained, saved.history
        for part, rows in saved.indices.items():
            setattr(model, f"{part}_indices", rows)
        return model

    # For people -------------------------------------------------------------------------------------------------------

    def view_anndata_setup(self, adata: AnnData | None = None, hide_state_registries: bool = False) -> None:
        """Print what the model reads from the data: each field, where it is and, unless hidden, its categories."""
        from rich.console import Console
        from rich.table import Table

        adata = self._check(adata)
        table = Table(title=f"{type(self).__name__}: {adata.n_obs} cells × {adata.n_vars} features")
        columns = ["field", "kind", "where"] if hide_state_registries else ["field", "kind", "where", "what"]
        for column in columns:
            table.add_column(column)
        for name, state in self.registry.fields.items():
            for where, what in describe_field(state):
                table.add_row(*[name, state["kind"], where, what][: len(columns)])
        Console().print(table)

    def __repr__(self) -> str:
        given = ", ".join(f"{name}={value!r}" for name, value in self._arguments.items())
        state = "trained" if self.is_trained else "not trained"
        return f"{type(self).__name__}({given}), {state}, on {self.adata.n_obs} cells × {self.adata.n_vars} features"
