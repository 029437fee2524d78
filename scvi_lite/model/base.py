"""What all models share: setup, training, saving and loading."""

from __future__ import annotations

import logging
import sys
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from inspect import isfunction, signature
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from scvi_lite._elsewhere import SaysInstead, no_attribute, without_loaders
from scvi_lite._settings import settings
from scvi_lite.analysis import minify
from scvi_lite.analysis.inputs import batch_codes, cell_rows
from scvi_lite.data import registry as registries
from scvi_lite.data.batch import Batch
from scvi_lite.data.disk import LazyStore
from scvi_lite.data.fields import Columns, Field
from scvi_lite.data.genes import match_genes
from scvi_lite.data.modalities import check_anndata, is_mudata
from scvi_lite.data.registry import Registry
from scvi_lite.data.view import Named, SetupView
from scvi_lite.errors import StateError, as_options, check_whole, warn, without_absent
from scvi_lite.model import files, setup
from scvi_lite.nn.module import Module
from scvi_lite.train.plan import Plan

if TYPE_CHECKING:
    from anndata import AnnData

logger = logging.getLogger("scvi_lite")

ABSENT = {
    "registry": "a model is made with an AnnData",
    "datamodule": "a model is made with an AnnData, which may be backed by a file larger than memory",
    "extra_encoder_kwargs": "layers are chosen by n_hidden, n_layers, dropout_rate, use_batch_norm and use_layer_norm",
    "extra_decoder_kwargs": "layers are chosen by n_hidden, n_layers, dropout_rate, use_batch_norm and use_layer_norm",
    "extra_payload_autotune": "metrics are in model.history",
    "library_log_means": "they are computed from the counts",
    "library_log_vars": "they are computed from the counts",
}
APART = ("self", "cls", "__class__", "adata", "mdata", "network_options", "absent", "trainer_kwargs", "options")
WITH_UNDERSCORE = tuple(  # how scvi-tools spells some attributes, and scripts with it
    f"{name}_" for name in ("history", "is_trained", "train_indices", "validation_indices", "test_indices")
)
INFERENCE_BATCH = 1024  # no gradients are kept, so minibatches can be larger than in training


def arguments_of(names: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that a method names, but for the data: of its ``locals()``, asked for in its first line.

    >>> def train(self, max_epochs=400, lr=1e-3, **trainer_kwargs):
    ...     return arguments_of(locals())
    >>> train(None, lr=0.1)
    {'max_epochs': 400, 'lr': 0.1}
    """
    return {name: value for name, value in names.items() if name not in APART}


class Model(metaclass=SaysInstead):
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
    reads_mudata: ClassVar[bool] = False  #: whether it has ``setup_mudata``
    _is_query = False  #: whether it is made on top of a reference, which knows something before any training

    def __init_subclass__(cls) -> None:
        """Questions take the options of data loaders that scripts for scvi-tools give."""
        super().__init_subclass__()
        for name, member in list(vars(cls).items()):
            if isfunction(member) and member.__module__.startswith("scvi_lite.analysis."):
                setattr(cls, name, without_loaders(member))

    def __init__(self, adata: AnnData, arguments: dict[str, Any], known: Iterable[str] | None = None):
        if not (self.reads_mudata and is_mudata(adata)):
            check_anndata(adata)
        arguments = without_absent(type(self).__name__, arguments, ABSENT, known)
        self._build(adata, registries.find(adata, type(self).__name__), arguments)

    def _build(self, adata: AnnData, registry: Registry, arguments: dict[str, Any]) -> None:
        self._adata, self.registry = adata, registry
        self._view: SetupView | None = None
        of_numpy = (np.generic, np.ndarray)
        self._arguments = {name: x.tolist() if isinstance(x, of_numpy) else x for name, x in arguments.items()}
        self._var_names = registry.var_names(adata)
        self.is_trained = False
        self._history = Named()
        self.train_indices: np.ndarray | None = None
        self.validation_indices: np.ndarray | None = None
        self.test_indices: np.ndarray | None = None
        self.module = self._make_module(self._arguments).eval()
        self.trainer: Any = None

    @abstractmethod
    def _make_module(self, arguments: dict[str, Any]) -> Module:
        """The untrained module; ``arguments`` are those of the constructor. Refuses unknown ones."""

    @classmethod
    def _register(cls, adata: AnnData, read: Sequence[Field], setup_args: dict[str, Any]) -> None:
        lists = {f.argument: f.keys for f in read if isinstance(f, Columns) and f.argument in setup_args}
        registries.register(adata, cls.__name__, read, setup_args | lists)

    # Data -------------------------------------------------------------------------------------------------------------

    @property
    def adata(self) -> AnnData:
        """The data of the model. Others may be put in their place, if they fit."""
        return self._adata

    @adata.setter
    def adata(self, adata: AnnData) -> None:
        self._adata, self._view = self._check(adata), None

    def _check(self, adata: AnnData | None) -> AnnData:
        """An AnnData that fits the model: the model's own, or a new one with its genes in order."""
        if adata is None:
            return self._adata
        if adata is not self._adata:
            adata = match_genes(adata, self._var_names)
            self.registry.check(adata)
        return adata

    _rows = staticmethod(cell_rows)

    def _minibatches(
        self, adata: AnnData | None = None, indices: Any = None, batch_size: int | None = None, with_counts: bool = True
    ) -> Iterator[Batch]:
        """Cells as minibatches on the model's device, in the order of ``indices``, without gradients.

        Without counts, which decoding has no use for, those of all cells are zero.
        """
        adata = self._check(adata)
        batch_size = (settings.batch_size or INFERENCE_BATCH) if batch_size is None else batch_size
        check_whole(batch_size=batch_size)
        store = LazyStore(adata, self.registry, self._rows(adata, indices), with_counts)
        self.module.eval()
        for batch in store.batches(int(batch_size)):
            with torch.inference_mode(), torch.autocast(self.device.type, enabled=False):
                yield batch.to(self.device)

    _batch_codes = batch_codes

    summary_stats = property(setup.summary_stats)
    summary_string = property(setup.summary_string)
    adata_manager = property(setup.adata_manager)
    get_anndata_manager = setup.get_anndata_manager
    get_from_registry = setup.get_from_registry
    get_state_registry = setup.get_state_registry
    get_setup_arg = setup.get_setup_arg
    data_registry = setup.data_registry
    view_anndata_setup = setup.view_anndata_setup
    view_setup_args = staticmethod(setup.view_setup_args)
    load_registry = staticmethod(setup.load_registry)

    def get_var_names(self, legacy_mudata_format: bool = False) -> list[str] | dict[str, list[str]]:
        """Names of the genes in the order the model reads them; of a MuData, names of the features by modality.

        ``legacy_mudata_format``: of a MuData, too, one list of all names.
        """
        if legacy_mudata_format and isinstance(self._var_names, dict):
            return [name for names in self._var_names.values() for name in names]
        return self._var_names.copy()

    @property
    def _gene_names(self) -> list[str]:
        """Names of the features of the counts ``x``."""
        modality = self.registry.modalities.get("x")
        return self._var_names if isinstance(self._var_names, list) else self._var_names[modality]

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
        *,
        preset: str | None = None,
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
        preset
            ``"fast"``: a ninth of the epochs (60 below 5,000 cells), at twenty times the learning rate, which falls to
            zero along a cosine, with a KL warm-up over a fifth of them. ``max_epochs``, ``max_steps`` and
            ``plan_kwargs`` count where they are given too. Where it was tried it ended no worse than the default:
            docs/performance.md.
        **trainer_kwargs
            Every other option of ``lightning.Trainer`` (``precision``, ``callbacks``, ``logger``, ``num_nodes``,
            ``gradient_clip_val``, ...); ``enable_checkpointing=True`` with ``checkpointing_monitor``, which keeps the
            best and the last state under ``default_root_dir``, which :meth:`load` reads; ``learning_rate_monitor``; and
            ``ckpt_path``, a checkpoint to go on from.

        Raises
        ------
        TypeError
            If an option does not exist.
        ValueError
            If a value is out of range, or a metric is monitored that will not come.
        TrainingDivergedError
            If the loss becomes NaN or infinite.
        """
        self._fit(arguments_of(locals()), trainer_kwargs)

    def _fit(self, given: dict[str, Any], trainer_kwargs: Mapping[str, Any]) -> None:
        """Train; ``given`` are arguments of :func:`~scvi_lite.model.training.fit_model`, and options of the plan.

        These count where ``plan_kwargs`` does not have them.
        """
        if not any(parameter.requires_grad for parameter in self.module.parameters()):
            warn(
                "Nothing was trained: all weights of this model are frozen, and the query has no batch or category "
                "that is new. Use it as it is, or make it with load_query_data(..., unfrozen=True)."
            )
            return
        if "lightning.pytorch" not in sys.modules and trainer_kwargs.get("enable_progress_bar", True):
            logger.info("Loading Lightning, once in a session ...")  # it takes seconds, before there is a bar
        from scvi_lite.model.training import fit_model
        from scvi_lite.train.configs import with_configs

        in_plan = {field.name: given.pop(field.name) for field in fields(self.plan) if field.name in given}
        defaults = {name: parameter.default for name, parameter in signature(self.train).parameters.items()}
        options = with_configs({**given, **trainer_kwargs}, defaults)
        if in_plan:
            options["plan_kwargs"] = in_plan | as_options("plan_kwargs", options["plan_kwargs"])
        fit_model(self, **options)

    def _check_can_train(self) -> None:
        """Refuse what cannot be trained; models add to it."""
        if minify.minified(self) == minify.WITHOUT_COUNTS:
            raise StateError(
                "The data of this model were minified without counts, and a model is trained with counts. Load it with "
                "the full data."
            )
        if minify.minified(self) is not None:  # the stored posteriors will be out of date: counts are read again
            self.registry = minify.setup_for_counts(self.registry)
            registries.note(self.registry, self.adata)

    @property
    def history(self) -> Named:
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
            what = "new batches count as an average one" if self._is_query else "its answers are random"
            warn(f"This {type(self).__name__} is not trained: {what}. Call train() first.")

    # Files ------------------------------------------------------------------------------------------------------------

    save = files.save
    load = classmethod(files.load)

    # For people -------------------------------------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        """Called for what is not there: say what to use instead of a name that scvi-tools has."""
        if name in WITH_UNDERSCORE:
            return getattr(self, name[:-1])
        if name == "registry_":
            return self.adata_manager.registry
        raise no_attribute(self, name)

    def __repr__(self) -> str:
        given = ", ".join(f"{name}={value!r}" for name, value in self._arguments.items())
        state = "trained" if self.is_trained else "not trained"
        return f"{type(self).__name__}({given}), {state}, on {self.adata.n_obs} cells × {self.adata.n_vars} features"
