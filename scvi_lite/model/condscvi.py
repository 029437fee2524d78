"""CondSCVI: variation within each cell type, which DestVI looks for in spots of tissue.

Lopez et al. 2022, doi:10.1038/s41587-022-01272-8
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from scvi_lite.analysis import abundance, differential, expression, latent, likelihood, predictive
from scvi_lite.analysis.inputs import draw, to_numpy, whole_number
from scvi_lite.data.disk import LazyStore
from scvi_lite.data.fields import Categorical, Categoricals, Continuous, Continuouses, Field, Matrix
from scvi_lite.data.labels import Labels
from scvi_lite.errors import StateError, as_options, check_options, listing
from scvi_lite.model.base import Model
from scvi_lite.nn.conditional import CondConfig, CondSCVIModule
from scvi_lite.nn.configure import configure
from scvi_lite.nn.vae import Posterior
from scvi_lite.train.plan import Plan

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

    from scvi_lite.data.registry import Registry

NETWORK_OPTIONS = ("log_variational", "encode_covariates", "prior", "num_classes_mog")


@dataclass(frozen=True)
class CondPlan(Plan):
    """Options of the training.

    Attributes
    ----------
    classification_ratio
        Weight of the cross-entropy of fine labels.
    """

    classification_ratio: float = 5.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (isinstance(self.classification_ratio, Real) and self.classification_ratio >= 0):
            raise ValueError(f"classification_ratio={self.classification_ratio!r}: a number of zero or more is needed.")

    @property
    def loss_options(self) -> dict[str, Any]:
        """The weight of the cross-entropy."""
        return {"classification_ratio": self.classification_ratio}


class CondSCVI(Model):
    """Conditional scVI: the latent space describes what varies among cells of one type, as the type is given.

    Parameters
    ----------
    adata
        AnnData set up with :meth:`setup_anndata`, cell types in ``labels_key``.
    n_hidden, n_layers
        Width and number of hidden layers of encoder and decoder.
    n_latent
        Dimensions of the latent space.
    weight_obs
        Weight cells by the inverse of their type's share, so that rare types count as much as common ones.
    dropout_rate
        Of encoder and decoder.
    **network_options
        ``prior`` of the latent space of each type: ``"normal"``, the standard normal; ``"mog"``, a mixture of
        normals that is learned; or ``"vamp"``, the mixture of the posteriors of pseudo-cells that are learned.
        ``num_classes_mog``: components of a mixture (10). ``log_variational``; ``encode_covariates``: give the batch to
        the encoder too.

    Raises
    ------
    RuntimeError
        If ``adata`` is not set up.
    TypeError, ValueError
        If an option does not exist, or a value is out of range.

    References
    ----------
    Lopez, Li, Keren-Shaul, Boyeau, Kedmi, Pilzer, Jelinski, Yofe, David, Wagner, Ergen, Addadi, Golani, Ronchese,
    Jordan, Amit, Yosef (2022). DestVI identifies continuums of cell types in spatial transcriptomics data. Nature
    Biotechnology.

    Examples
    --------
    >>> import scvi_lite
    >>> adata = scvi_lite.data.synthetic_iid(batch_size=50, n_genes=20)
    >>> CondSCVI.setup_anndata(adata, labels_key="labels")
    >>> model = CondSCVI(adata, prior="mog")
    >>> model.train(max_epochs=1, enable_progress_bar=False)
    >>> model.get_latent_representation().shape
    (100, 5)
    """

    plan = CondPlan()

    get_latent_representation = latent.get_latent_representation
    get_latent_library_size = latent.get_latent_library_size
    get_aggregated_posterior = latent.get_aggregated_posterior
    get_elbo = likelihood.get_elbo
    get_reconstruction_error = likelihood.get_reconstruction_error
    get_marginal_ll = likelihood.get_marginal_ll
    get_normalized_expression = expression.get_normalized_expression
    get_likelihood_parameters = predictive.get_likelihood_parameters
    posterior_predictive_sample = predictive.posterior_predictive_sample
    get_feature_correlation_matrix = predictive.get_feature_correlation_matrix
    differential_expression = differential.differential_expression
    differential_abundance = abundance.differential_abundance

    def __init__(
        self,
        adata: AnnData,
        n_hidden: int = 128,
        n_latent: int = 5,
        n_layers: int = 2,
        weight_obs: bool = False,
        dropout_rate: float = 0.05,
        **network_options: Any,
    ):
        check_options("CondSCVI", network_options, NETWORK_OPTIONS)
        given = dict(
            n_hidden=n_hidden, n_latent=n_latent, n_layers=n_layers, weight_obs=weight_obs, dropout_rate=dropout_rate
        )
        super().__init__(adata, given | network_options)

    def _make_module(self, arguments: dict[str, Any]) -> CondSCVIModule:
        options = dict(arguments)
        if not isinstance(weight_obs := options.pop("weight_obs", False), bool):
            raise ValueError(f"weight_obs={weight_obs!r}: True or False is needed.")
        fixed = dict(gene_likelihood="nb", batch_representation="embedding", n_fine_labels=len(self.fine_labels))
        defaults = dict(n_latent=5, n_layers=2, dropout_rate=0.05)
        config = configure(self.registry, defaults | options | fixed, CondConfig)
        label_n = self.registry.read(self.adata, "label_n")
        weight_l = label_weights(label_n, config.n_labels) if weight_obs else None
        pseudo_lpg = pseudo_inputs(self.adata, self.registry, label_n, config) if config.prior == "vamp" else None
        return CondSCVIModule(config, weight_l, pseudo_lpg)

    @property
    def fine_labels(self) -> list[Any]:
        """Names of the fine labels."""
        return self.registry.categories("fine_n")[:-1] if "fine_n" in self.registry.fields else []

    def train(  # the order of arguments is that of scvi-tools
        self,
        max_epochs: int = 300,
        lr: float = 0.001,
        accelerator: str = "auto",
        devices: int | list[int] | str = "auto",
        train_size: float = 1,
        validation_size: float | None = None,
        shuffle_set_split: bool = True,
        batch_size: int | None = None,
        datasplitter_kwargs: Mapping[str, Any] | None = None,
        plan_kwargs: Mapping[str, Any] | None = None,
        **trainer_kwargs: Any,
    ) -> None:
        """Train the model, by default on all cells.

        Parameters
        ----------
        max_epochs
            Passes over the training cells.
        lr
            Learning rate.
        plan_kwargs
            Options of :class:`CondPlan`: ``classification_ratio``, and those of all plans.
        accelerator, devices, train_size, validation_size, shuffle_set_split, batch_size, datasplitter_kwargs
            As in :meth:`scvi_lite.model.SCVI.train`.
        **trainer_kwargs
            ``early_stopping``, ``strategy`` and all others, as in :meth:`scvi_lite.model.SCVI.train`.

        Raises
        ------
        TypeError, ValueError
            If an option does not exist, or a value is out of range.
        """
        self._fit(
            max_epochs=max_epochs,
            accelerator=accelerator,
            devices=devices,
            train_size=train_size,
            validation_size=validation_size,
            shuffle_set_split=shuffle_set_split,
            batch_size=batch_size,
            datasplitter_kwargs=datasplitter_kwargs,
            plan_kwargs={"lr": lr} | as_options("plan_kwargs", plan_kwargs),
            **trainer_kwargs,
        )

    # Answers ----------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def get_vamp_prior(self, adata: AnnData | None = None, p: int = 10) -> dict[str, np.ndarray]:
        """For each cell type a mixture of normals over latent space, which DestVI takes as prior.

        It is the prior of the model where that is a mixture. Else the cells of a type are put into ``p`` clusters by
        their posterior means (k-means), and each makes a component: its centre; the mean of the posterior variances
        plus the variance of the means; and its share of the cells. A type with fewer cells than ``p`` has components
        of weight zero, at the standard normal.

        Parameters
        ----------
        adata
            Cells to make the mixture of; the model's own by default.
        p
            Components, where the prior of the model is no mixture.

        Returns
        -------
        dict
            ``"mean_vprior"`` and ``"var_vprior"`` (l, p, k), ``"weights_vprior"`` (l, p), float32.

        Raises
        ------
        ValueError
            If ``p`` is below 1.

        Examples
        --------
        >>> import scvi_lite
        >>> adata = scvi_lite.data.synthetic_iid(batch_size=50, n_genes=20)
        >>> CondSCVI.setup_anndata(adata, labels_key="labels")
        >>> model = CondSCVI(adata)
        >>> model.train(max_epochs=1, enable_progress_bar=False)
        >>> model.get_vamp_prior(p=4)["mean_vprior"].shape
        (3, 4, 5)
        """
        whole_number(p=p)
        self._warn_if_untrained()
        self.module.eval()
        if (prior := self.module.prior()) is not None:
            parts = (prior.loc_lpk, prior.scale_lpk**2, prior.log_weight_lp.exp())
            mean_lpk, var_lpk, weight_lp = (part.cpu().numpy() for part in parts)
        else:
            adata = self._check(adata)
            loc_nk, scale_nk = latent.posterior_parameters(self, adata)
            label_n = self.registry.read(adata, "label_n")
            clusters = [
                cluster(loc_nk[label_n == label], scale_nk[label_n == label] ** 2, p)
                for label in range(self.registry.n_labels)
            ]
            mean_lpk, var_lpk, weight_lp = (np.stack(part) for part in zip(*clusters))
        return {"mean_vprior": mean_lpk, "var_vprior": var_lpk, "weights_vprior": weight_lp}

    def predict(
        self,
        adata: AnnData | None = None,
        indices: Any = None,
        soft: bool = False,
        batch_size: int | None = None,
        use_posterior_mean: bool = True,
    ) -> np.ndarray | pd.DataFrame:
        """The fine label of each cell, by its place in the latent space of its coarse label.

        Parameters
        ----------
        adata
            Cells to look at; the model's own by default.
        indices
            Row numbers, in any order, or a mask; all cells by default.
        soft
            Give the probability of each fine label instead.
        batch_size
            Cells in a minibatch.
        use_posterior_mean
            Look at the mean of each cell's posterior; else at a draw.

        Returns
        -------
        numpy.ndarray or pandas.DataFrame
            Names (n,), or cells × fine labels.

        Raises
        ------
        RuntimeError
            If the model was made without fine labels.
        """
        import pandas as pd

        if not self.fine_labels:
            raise StateError(
                "This model knows no fine labels. Give them at setup: CondSCVI.setup_anndata(adata, labels_key=..., "
                "fine_labels_key=...), and train a new model."
            )
        self._warn_if_untrained()
        adata = self._check(adata)
        rows = self._rows(adata, indices)
        probability: list[Tensor] = []
        for batch in self._minibatches(adata, rows, batch_size):
            q = self.module.encode(batch)
            z_nk = q.z_loc_nk if use_posterior_mean else q.sample_z()
            probability.append(self.module.classifier(z_nk, batch.label_n).softmax(-1))
        prob_nf = to_numpy(probability)
        names = np.asarray(self.fine_labels)
        return pd.DataFrame(prob_nf, adata.obs_names[rows], names) if soft else names[prob_nf.argmax(1)]

    def confusion_coarse_celltypes(
        self, adata: AnnData | None = None, indices: Any = None, batch_size: int | None = None
    ) -> pd.DataFrame:
        """Which cell types the model can tell apart: how well it explains cells of one type as cells of another.

        Each cell is explained as each type; the evidence lower bounds, at the posterior mean and with equal prior
        weights, make probabilities of the types. The result is their mean over the cells of a type. Types that share a
        row are hard to tell apart in spots, too: give them one label, and fine labels within it.

        Parameters
        ----------
        adata, indices, batch_size
            As in :meth:`predict`.

        Returns
        -------
        pandas.DataFrame
            Types of the cells × types they are explained as; rows sum to 1. A row is NaN where there are no cells.
        """
        import pandas as pd

        self._warn_if_untrained()
        n_labels = self.registry.n_labels
        sum_ll, count_l = torch.zeros(n_labels, n_labels, dtype=torch.float64), torch.zeros(n_labels)
        for batch in self._minibatches(adata, indices, batch_size):
            elbo_nl = torch.stack([self._elbo_as(batch, label) for label in range(n_labels)], dim=1)
            label_n = batch.label_n.cpu()
            sum_ll.index_add_(0, label_n, elbo_nl.double().softmax(1).cpu())
            count_l += torch.bincount(label_n, minlength=n_labels)
        names = pd.Index(self.registry.categories("label_n"))
        return pd.DataFrame((sum_ll / count_l[:, None]).numpy(), names.rename("cells of"), names.rename("explained as"))

    def _elbo_as(self, batch: Any, label: int) -> Tensor:
        """Evidence lower bound of cells as if all were of one label, at the posterior mean: (n,)."""
        batch = replace(batch, label_n=torch.full_like(batch.label_n, label))
        q: Posterior = self.module.encode(batch)
        rates = self.module.decode(q.z_loc_nk, self.module.library(batch, q), batch)
        return rates.log_likelihood(batch.x) - self.module.kl_z(q, batch, q.z_loc_nk)

    # Setup ------------------------------------------------------------------------------------------------------------

    @classmethod
    def setup_anndata(
        cls,
        adata: AnnData,
        batch_key: str | None = None,
        labels_key: str | None = None,
        fine_labels_key: str | None = None,
        layer: str | None = None,
        unlabeled_category: str = "unlabeled",
        size_factor_key: str | None = None,
    ) -> None:
        """Check the data and note what the model reads from them, in ``adata.uns["scvi_lite"]``.

        Parameters
        ----------
        adata
            Raw counts of cells × genes: sparse, dense or backed.
        batch_key, labels_key
            Columns of ``adata.obs``: the batch, and the cell type, which every cell must have.
        fine_labels_key
            Column of finer types within the cell types, which some cells may lack.
        layer
            Layer that holds the counts; ``adata.X`` by default.
        unlabeled_category
            What ``fine_labels_key`` holds for cells without a fine label.
        size_factor_key
            Column of positive factors to use instead of the total count.

        Raises
        ------
        KeyError
            If a column or layer does not exist.
        ValueError
            If ``labels_key`` is not given, counts are negative, NaN or infinite, values are missing, or names repeat.
        """
        if labels_key is None:
            raise ValueError(
                "labels_key is needed: the column of adata.obs with the cell types, which CondSCVI is conditioned on. "
                f"Columns: {listing(adata.obs.columns)}."
            )
        fields: list[Field] = [
            Matrix("x", layer),
            Categorical("batch_n", "batch_key", batch_key),
            Categorical("label_n", "labels_key", labels_key),
            Categoricals("cats_nc", "categorical_covariate_keys", None),
            Continuouses("conts_nd", "continuous_covariate_keys", None),
        ]
        if fine_labels_key is not None:
            fields.append(Labels("fine_n", "fine_labels_key", fine_labels_key, unlabeled_category))
        if size_factor_key is not None:
            fields.append(Continuous("size_factor_n", "size_factor_key", size_factor_key, positive=True))
        cls._register(
            adata,
            fields,
            dict(
                batch_key=batch_key,
                labels_key=labels_key,
                fine_labels_key=fine_labels_key,
                layer=layer,
                unlabeled_category=unlabeled_category,
                size_factor_key=size_factor_key,
            ),
        )


def label_weights(label_n: np.ndarray, n_labels: int) -> Tensor:
    """One over the share of each label, (l,); 1 for a label without cells.

    >>> label_weights(np.array([0, 0, 0, 1]), 2)
    tensor([1.3333, 4.0000])
    """
    n_l = np.bincount(label_n, minlength=n_labels)
    return torch.from_numpy(np.where(n_l > 0, len(label_n) / np.maximum(n_l, 1), 1.0)).float()


def pseudo_inputs(adata: AnnData, registry: Registry, label_n: np.ndarray, config: CondConfig) -> Tensor:
    """Log counts of cells drawn from each label (from all, where it has none): (l, p, g)."""
    rows = []
    for label in range(config.n_labels):
        own = np.flatnonzero(label_n == label)
        rows.append(draw(own if len(own) else np.arange(len(label_n)), config.num_classes_mog))
    x_mg = LazyStore(adata, registry)[torch.from_numpy(np.concatenate(rows))].x.x_ng.log1p()
    return x_mg.view(config.n_labels, config.num_classes_mog, -1)


def cluster(loc_nk: np.ndarray, var_nk: np.ndarray, p: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean (p, k), variance (p, k) and weight (p,) of k-means clusters of normals; surplus ones have weight zero."""
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    n, k = loc_nk.shape
    mean_pk, var_pk, weight_p = (np.zeros(s, np.float32) for s in ((p, k), (p, k), p))
    var_pk[:] = 1
    if n == 0:
        return mean_pk, var_pk, weight_p + 1 / p
    n_clusters = min(p, len(np.unique(loc_nk, axis=0)))
    with threadpool_limits(1):  # many small problems
        seed = int(torch.randint(1 << 31, ()))
        member_n = KMeans(n_clusters, n_init=10, random_state=seed).fit_predict(loc_nk.astype(np.float64))
    for i in range(n_clusters):
        own = member_n == i
        mean_pk[i], weight_p[i] = loc_nk[own].mean(0), own.mean()
        var_pk[i] = var_nk[own].mean(0) + loc_nk[own].var(0)
    return mean_pk, var_pk, weight_p
