"""scANVI: labels of some cells, and a latent space that knows them (Xu et al. 2021, doi:10.15252/msb.20209620)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from scvi_lite.analysis import labels
from scvi_lite.data.fields import Matrix, columns_of_obs
from scvi_lite.data.labels import Labels
from scvi_lite.data.supervision import Supervision
from scvi_lite.errors import warn, without_needless
from scvi_lite.model import pretrained
from scvi_lite.model.base import arguments_of
from scvi_lite.model.questions import ReferenceModel
from scvi_lite.nn.classifier import Adversary
from scvi_lite.nn.configure import activation_name, configure, library_prior
from scvi_lite.nn.scanvi import SCANVIConfig, SCANVIModule
from scvi_lite.train.plan import SemiSupervisedPlan, heuristic_epochs

if TYPE_CHECKING:
    from anndata import AnnData

NEEDLESS = {"labels_groups": "no term of the loss depends on it, here and in scvi-tools"}


class SCANVI(ReferenceModel):
    """Single-cell annotation using variational inference: label the cells that have no label yet.

    Parameters
    ----------
    adata
        AnnData set up with :meth:`setup_anndata`.
    n_hidden, n_latent, n_layers, dropout_rate, dispersion, gene_likelihood, use_observed_lib_size
        As in :class:`~scvi_lite.model.SCVI`. With ``dispersion="gene-label"``, cells without a label share one.
    linear_classifier
        Tell labels apart by a linear map of latent space, without a hidden layer.
    **network_options
        ``classifier_parameters``: a dictionary of ``n_hidden``, ``n_layers``, ``dropout_rate``, ``use_batch_norm`` and
        ``use_layer_norm`` of the classifier, by default those of the encoder; ``y_prior``: the probability of each
        label, equal by default; ``latent_distribution`` and the further options of :class:`~scvi_lite.model.SCVI`.

    Raises
    ------
    RuntimeError
        If ``adata`` is not set up.
    TypeError, ValueError
        If an option does not exist, or a value is out of range.

    References
    ----------
    Xu, Lopez, Mehlman, Regier, Jordan, Yosef (2021). Probabilistic harmonization and annotation of single-cell
    transcriptomics data with deep generative models. Molecular Systems Biology.

    Examples
    --------
    >>> import scvi_lite
    >>> adata = scvi_lite.data.synthetic_iid(batch_size=50, n_genes=20)
    >>> adata.obs["cell_type"] = adata.obs["labels"].astype(str).where(adata.obs["batch"] == "batch_0", "Unknown")
    >>> SCANVI.setup_anndata(adata, labels_key="cell_type", unlabeled_category="Unknown", batch_key="batch")
    >>> model = SCANVI(adata, n_latent=5)
    >>> model.train(max_epochs=1, enable_progress_bar=False)
    >>> model.predict(soft=True).shape
    (100, 3)
    """

    predict = labels.predict
    from_scvi_model = classmethod(pretrained.from_scvi_model)

    plan = SemiSupervisedPlan()

    def __init__(
        self,
        adata: AnnData,
        n_hidden: int = 128,
        n_latent: int = 10,
        n_layers: int = 1,
        dropout_rate: float = 0.1,
        dispersion: str = "gene",
        gene_likelihood: str = "zinb",
        use_observed_lib_size: bool = True,
        linear_classifier: bool = False,
        **network_options: Any,
    ):
        given = arguments_of(locals())
        network_options = without_needless(network_options, NEEDLESS)
        if "var_activation" in network_options:  # as a name, which can be saved
            network_options["var_activation"] = activation_name(network_options["var_activation"])
        if network_options.get("y_prior") is not None:  # as plain numbers, which can be saved
            network_options["y_prior"] = np.asarray(network_options["y_prior"], dtype=float).ravel().tolist()
        super().__init__(adata, given | network_options)

    def _make_module(self, arguments: dict[str, Any]) -> SCANVIModule:
        config = configure(self.registry, arguments, SCANVIConfig)
        return SCANVIModule(config, library_prior(self.adata, self.registry, config))

    @classmethod
    def setup_anndata(
        cls,
        adata: AnnData,
        labels_key: str,
        unlabeled_category: str,
        layer: str | None = None,
        batch_key: str | None = None,
        size_factor_key: str | None = None,
        categorical_covariate_keys: Sequence[str] | None = None,
        continuous_covariate_keys: Sequence[str] | None = None,
        use_minified: bool = True,
    ) -> None:
        """Check the data and note what the model reads from them, in ``adata.uns["scvi_lite"]``.

        Parameters
        ----------
        adata
            Raw counts of cells × genes: sparse, dense or backed.
        labels_key
            Column of ``adata.obs`` with the labels.
        unlabeled_category
            What the column holds for cells without a label. If all have one, any other name.
        layer, batch_key, size_factor_key, categorical_covariate_keys, continuous_covariate_keys
            As in :meth:`SCVI.setup_anndata <scvi_lite.model.SCVI.setup_anndata>`.
        use_minified
            Makes no difference: the counts are read either way.

        Raises
        ------
        KeyError
            If a column or layer does not exist.
        ValueError
            If there are fewer than two labels, counts are negative, NaN or infinite, values are missing, or names
            repeat.
        """
        given = arguments_of(locals())
        del given["use_minified"]
        labels_ = Labels("label_n", "labels_key", labels_key, unlabeled_category)
        cls._register(adata, [Matrix("x", layer), *columns_of_obs(given, labels=labels_)], given)

    def train(  # the order of arguments is that of scvi-tools
        self,
        max_epochs: int | None = None,
        n_samples_per_label: int | None = None,
        check_val_every_n_epoch: int | None = None,
        train_size: float | None = None,
        validation_size: float | None = None,
        shuffle_set_split: bool = True,
        batch_size: int | None = None,
        accelerator: str = "auto",
        devices: int | list[int] | str = "auto",
        adversarial_classifier: bool | None = None,
        datasplitter_kwargs: Mapping[str, Any] | None = None,
        plan_kwargs: Mapping[str, Any] | None = None,
        *,
        preset: str | None = None,
        **trainer_kwargs: Any,
    ) -> None:
        """Train the model.

        Every training cell is used once in an epoch, with several devices too. Where few cells have a label, further
        labelled ones join each minibatch, and only their labels are learned from: see ``labeled_share``.

        The history has, over cells with a label, ``train_accuracy``, ``train_f1_score`` (mean over labels),
        ``train_calibration_error`` and ``train_classification_loss``, and the same for ``validation``.

        Parameters
        ----------
        max_epochs
            Passes over the training cells. By default as many as of SCVI, 400 and fewer above 20,000 cells; after
            :meth:`from_scvi_model` a third of that, at least 2 and at most 10.
        n_samples_per_label
            Learn from this many cells of each label, drawn anew in each epoch, so that all labels weigh the same.
        adversarial_classifier
            Train a classifier of batches along, which the encoder learns to fool; weighted by ``plan_kwargs``:
            ``scale_adversarial_loss``.
        datasplitter_kwargs
            Further than for SCVI: ``labeled_share``, cells with a label for each cell of a minibatch, on average;
            0.5 by default. Where training cells with a label are fewer, some join each minibatch; where more, none do.
        plan_kwargs
            Further than for SCVI: ``classification_ratio``, the weight of the classification loss; 50 by default. See
            :class:`~scvi_lite.train.plan.SemiSupervisedPlan`.
        check_val_every_n_epoch, train_size, validation_size, shuffle_set_split, batch_size, accelerator, devices, \
        preset, **trainer_kwargs
            As for :meth:`SCVI.train <scvi_lite.model.base.Model.train>`, with ``strategy`` and ``early_stopping``.

        Raises
        ------
        TypeError
            If an option does not exist.
        ValueError
            If a value is out of range, a metric is monitored that will not come, or no training cell has a label.
        TrainingDivergedError
            If the loss becomes NaN or infinite.
        """
        given = arguments_of(locals())
        if max_epochs is None and self._is_pretrained:
            given["max_epochs"] = min(10, max(2, round(heuristic_epochs(self.adata.n_obs) / 3)))
        if adversarial_classifier not in (True, False, None):
            raise ValueError(f"adversarial_classifier={adversarial_classifier!r}: True or False is needed.")
        if given.pop("adversarial_classifier"):
            if self.registry.n_batches < 2:
                raise ValueError("adversarial_classifier=True: there is one batch, and nothing to tell apart.")
            given["adversary"] = Adversary(self.module.config.n_latent, self.registry.n_batches)
        given["supervision"] = self._supervision(given.pop("n_samples_per_label"))
        self._fit(given, trainer_kwargs)

    def _supervision(self, n_per_label: int | None) -> Supervision | None:
        """How labelled cells enter a training; on a query that need not teach the classifier, they come as they are."""
        names = self.registry.categories("label_n")[:-1]
        if self._is_query:
            learns = any(parameter.requires_grad for parameter in self.module.classifier.parameters())
            if not (learns and len(self._labeled_indices)):
                return None
        return Supervision(names, n_per_label=n_per_label)

    @property
    def _labeled_indices(self) -> np.ndarray:
        """Rows of the cells with a label, which scripts for scvi-tools count."""
        return np.flatnonzero(self._has_label())

    @_labeled_indices.setter
    def _labeled_indices(self, rows: Sequence[int]) -> None:
        self._check_labeled(rows, self._labeled_indices)

    @property
    def _unlabeled_indices(self) -> np.ndarray:
        """Rows of the cells without a label."""
        return np.flatnonzero(~self._has_label())

    @_unlabeled_indices.setter
    def _unlabeled_indices(self, rows: Sequence[int]) -> None:
        self._check_labeled(rows, self._unlabeled_indices)

    def _check_labeled(self, given: Sequence[int], found: np.ndarray) -> None:
        """Scripts that map queries say which cells have a label; where the data say otherwise, they are told so."""
        if not np.array_equal(np.sort(np.asarray(given, dtype=np.int64)), found):
            key, unlabeled = self.registry.fields["label_n"]["key"], self.registry.categories("label_n")[-1]
            warn(
                f"Labels are those of adata.obs[{key!r}]: cells of the category {unlabeled!r} have none. Write it "
                "there to train without the labels of some cells; what is given here has no effect."
            )

    def _has_label(self) -> np.ndarray:
        return self.registry.read(self.adata, "label_n") < len(self.registry.categories("label_n")) - 1

    _is_pretrained = False  #: by SCVI, after which a few epochs will do
