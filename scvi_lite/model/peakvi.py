"""PeakVI: accessibility of chromatin (Ashuach et al. 2022, doi:10.1016/j.crmeth.2022.100182)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import leaky_relu

from scvi_lite.analysis import accessibility, latent
from scvi_lite.data.batch import Batch
from scvi_lite.data.fields import Matrix, columns_of_obs
from scvi_lite.errors import as_options, check_choice, check_whole
from scvi_lite.model import query
from scvi_lite.model.base import arguments_of
from scvi_lite.model.questions import CellModel
from scvi_lite.nn.accessibility import Accessibility, Head, count_encoder, default_sizes
from scvi_lite.nn.configure import configure
from scvi_lite.nn.layers import Encoder
from scvi_lite.nn.module import Loss
from scvi_lite.nn.normal import kl_normal
from scvi_lite.nn.vae import VAE, Posterior, VAEConfig
from scvi_lite.train.plan import Plan

if TYPE_CHECKING:
    from anndata import AnnData


@dataclass(frozen=True)
class PeakPlan(Plan):
    """Options of the training of PeakVI.

    Attributes
    ----------
    kl_scale
        ``"minibatch"``: the KL term is divided by the number of cells of the minibatch, as in scvi-tools, so that the
        latent space may say more about each cell than the evidence lower bound would let it. ``"cell"``: that bound.
        See ``docs/design.md`` for what it changes on real data.
    """

    kl_scale: str = "minibatch"

    of_loss: ClassVar[tuple[str, ...]] = ("kl_scale",)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(("cell", "minibatch"), kl_scale=self.kl_scale)


@dataclass(frozen=True)
class PeakConfig(VAEConfig):
    """Sizes and options of a :class:`PEAKVIModule`; ``n_layers`` is of the encoders."""

    n_layers_decoder: int = 2
    model_depth: bool = True
    region_factors: bool = True

    switches = (*VAEConfig.switches, "model_depth", "region_factors")
    sizes = (*VAEConfig.sizes, "n_layers_decoder")


class PEAKVIModule(VAE):
    """Generative model: z ~ N(0, I), region r found open in cell n ~ Bernoulli(y_r(z, covariates) · d_n · f_r)."""

    config: PeakConfig

    def __init__(self, config: PeakConfig):
        super().__init__(config)
        c = config
        hidden = self.make_hidden(c.n_genes, "encoder", c.n_layers, c.dropout_rate, True, activation=leaky_relu)
        self.encoder = Encoder(hidden, c.n_hidden, c.n_latent, floor=0.0)
        hidden = self.make_hidden(c.n_latent, "decoder", c.n_layers_decoder, activation=leaky_relu)
        self.decoder = Head(hidden, c.n_hidden, c.n_genes)
        if c.model_depth:
            self.depth_encoder = count_encoder(self, c.n_genes)
        self.factor_r = nn.Parameter(torch.zeros(c.n_genes)) if c.region_factors else None

    def encode(self, batch: Batch) -> Posterior:
        """The posterior of a minibatch."""
        return Posterior(*self.encoder(batch.x, *self.encoded_covariates(batch)))

    def depth(self, batch: Batch) -> Tensor | None:
        """Logit of the depth of each cell (n,); None where it is not modelled."""
        return self.depth_encoder(batch.x, *self.encoded_covariates(batch))[:, 0] if self.config.model_depth else None

    def library(self, batch: Batch, posterior: Posterior) -> Tensor | None:
        """What takes the place of the library size: the depth."""
        return self.depth(batch)

    def kl_library(self, batch: Batch, posterior: Posterior) -> Tensor:
        """Zero: the depth is no latent variable."""
        return batch.total_n.new_zeros(batch.n_cells)

    def decode(self, z: Tensor, depth_n: Tensor | None, batch: Batch) -> Accessibility:
        """The probabilities of regions at latent ``z`` (..., n, k) and the logit of the depth (..., n)."""
        return Accessibility(self.decoder(self.to_latent(z), *self.covariates(batch)), depth_n, self.factor_r)

    decode_regions = decode

    def loss(self, batch: Batch, kl_weight: float | Tensor = 1.0, kl_scale: str = "minibatch") -> Loss:
        """Mean over cells of reconstruction + kl_weight · KL(z), the negative evidence lower bound.

        With ``kl_scale="minibatch"``, the KL term is divided by the number of cells of the minibatch.
        """
        q = self.encode(batch)
        reconstruction_n = -self.decode(q.sample_z(), self.depth(batch), batch).log_likelihood(batch.x)
        kl_n = kl_normal(q.z_loc_nk, q.z_scale_nk).sum(-1)
        weight = kl_weight / batch.n_cells if kl_scale == "minibatch" else kl_weight
        return Loss((reconstruction_n + weight * kl_n).mean(), reconstruction_n.sum(), kl_n.sum(), batch.n_cells)


class PEAKVI(CellModel):
    """Probabilistic accessibility: which regions are open in which cells, whatever the depth they were sequenced to.

    Parameters
    ----------
    adata
        AnnData set up with :meth:`setup_anndata`.
    n_hidden
        Width of the hidden layers; by default the square root of the number of regions.
    n_latent
        Dimensions of the latent space; by default the square root of ``n_hidden``.
    n_layers_encoder, n_layers_decoder
        Number of hidden layers.
    dropout_rate
        Of the encoder.
    model_depth
        Learn the depth of each cell, d_n; else it is 1.
    region_factors
        Learn a factor of each region, f_r; else it is 1.
    use_batch_norm, use_layer_norm
        Where: ``"none"``, ``"encoder"``, ``"decoder"`` or ``"both"``.
    latent_distribution
        ``"normal"``, or ``"ln"`` for the logistic normal: points on a simplex.
    deeply_inject_covariates
        Covariates enter each hidden layer of the decoder, not only the first.
    encode_covariates
        Covariates enter the encoder too, each layer of it.
    **absent
        Options of scvi-tools without a use here, which may be None.

    Notes
    -----
    A region with any count is open. The encoder reads the counts as they are given: binarise them
    (``adata.X.data[:] = 1``) where it should not see more.

    Raises
    ------
    RuntimeError
        If ``adata`` is not set up.
    TypeError, ValueError
        If an option does not exist, or a value is out of range.

    References
    ----------
    Ashuach, Reidenbach, Gayoso, Yosef (2022). PeakVI: a deep generative model for single-cell chromatin accessibility
    analysis. Cell Reports Methods.

    Examples
    --------
    >>> import scvi_lite
    >>> adata = scvi_lite.data.synthetic_iid(batch_size=50, n_genes=100)
    >>> PEAKVI.setup_anndata(adata, batch_key="batch")
    >>> model = PEAKVI(adata)
    >>> model.train(max_epochs=1, enable_progress_bar=False)
    >>> model.get_latent_representation().shape
    (100, 3)
    """

    plan = PeakPlan(lr=1e-4, weight_decay=1e-3, eps=1e-8, optimizer="AdamW", n_epochs_kl_warmup=50)

    load_query_data = classmethod(query.load_query_data)
    prepare_query_anndata = staticmethod(query.prepare_query_anndata)
    get_latent_representation = latent.get_latent_representation
    get_normalized_accessibility = accessibility.get_normalized_accessibility
    get_library_size_factors = accessibility.get_library_size_factors
    get_region_factors = accessibility.get_region_factors
    differential_accessibility = accessibility.differential_accessibility

    def __init__(
        self,
        adata: AnnData,
        n_hidden: int | None = None,
        n_latent: int | None = None,
        n_layers_encoder: int = 2,
        n_layers_decoder: int = 2,
        dropout_rate: float = 0.1,
        model_depth: bool = True,
        region_factors: bool = True,
        use_batch_norm: str = "none",
        use_layer_norm: str = "both",
        latent_distribution: str = "normal",
        deeply_inject_covariates: bool = False,
        encode_covariates: bool = False,
        **absent: Any,
    ):
        given = arguments_of(locals())
        super().__init__(adata, given | absent, given)

    def _make_module(self, arguments: dict[str, Any]) -> PEAKVIModule:
        check_whole(n_layers_encoder=arguments["n_layers_encoder"])
        options = dict(arguments)
        options["n_layers"] = options.pop("n_layers_encoder")
        sizes = default_sizes(options["n_hidden"], options["n_latent"], self.registry.n_features)
        options["n_hidden"], options["n_latent"] = sizes
        return PEAKVIModule(configure(self.registry, options, PeakConfig))

    _region_field = "x"

    @property
    def _region_names(self) -> list[str]:
        return self._gene_names

    def train(  # the order of arguments is that of scvi-tools
        self,
        max_epochs: int = 500,
        lr: float = 1e-4,
        accelerator: str = "auto",
        devices: int | list[int] | str = "auto",
        train_size: float | None = None,
        validation_size: float | None = None,
        shuffle_set_split: bool = True,
        batch_size: int = 128,
        weight_decay: float = 1e-3,
        eps: float = 1e-8,
        early_stopping: bool = True,
        early_stopping_patience: int = 50,
        n_steps_kl_warmup: int | None = None,
        n_epochs_kl_warmup: int | None = 50,
        datasplitter_kwargs: Mapping[str, Any] | None = None,
        plan_kwargs: Mapping[str, Any] | None = None,
        strategy: Any = "auto",
        **trainer_kwargs: Any,
    ) -> None:
        """Train the model: as :meth:`scvi_lite.model.SCVI.train`, with AdamW and other defaults.

        Parameters
        ----------
        max_epochs
            Passes over the training cells.
        lr, weight_decay, eps, n_steps_kl_warmup, n_epochs_kl_warmup
            Options of ``plan_kwargs``, which counts where both are given.
        early_stopping, early_stopping_patience
            Stop when ``early_stopping_monitor`` has not improved for so many epochs: by default
        ``"reconstruction_loss_validation"``, or ``"elbo_validation"`` with ``kl_scale="cell"``.
        plan_kwargs
            See :class:`~scvi_lite.model.peakvi.PeakPlan`: also ``kl_scale``.
        accelerator, devices, train_size, validation_size, shuffle_set_split, batch_size, datasplitter_kwargs, strategy
            As for every model.
        **trainer_kwargs
            Every other option of ``lightning.Trainer``, and those of every model.
        """
        given, options = arguments_of(locals()), as_options("plan_kwargs", plan_kwargs)
        of_bound = options.get("kl_scale", self.plan.kl_scale) == "cell"
        trainer_kwargs.setdefault(
            "early_stopping_monitor", "elbo_validation" if of_bound else "reconstruction_loss_validation"
        )
        self._fit(given, trainer_kwargs)

    @classmethod
    def setup_anndata(
        cls,
        adata: AnnData,
        batch_key: str | None = None,
        labels_key: str | None = None,
        categorical_covariate_keys: Sequence[str] | None = None,
        continuous_covariate_keys: Sequence[str] | None = None,
        layer: str | None = None,
    ) -> None:
        """Check the data and note what the model reads from them, in ``adata.uns["scvi_lite"]``.

        Parameters
        ----------
        adata
            Cells × regions: ones where a region is open, or counts of reads or fragments; sparse, dense or backed.
        batch_key, labels_key
            Columns of ``adata.obs``: the batch to correct for, and the cell type, which the model does not use.
        categorical_covariate_keys, continuous_covariate_keys
            Columns of further covariates to correct for.
        layer
            Layer that holds the counts; ``adata.X`` by default.

        Raises
        ------
        KeyError
            If a column or layer does not exist.
        ValueError
            If counts are negative, NaN or infinite, values are missing, or names repeat.
        """
        given, matrix = arguments_of(locals()), Matrix("x", layer)
        cls._register(adata, [matrix, *columns_of_obs(given)], given)
        accessibility.note_counts(matrix.read(adata, {"layer": layer}))
