"""scVI: a variational autoencoder of gene expression counts (Lopez et al. 2018, doi:10.1038/s41592-018-0229-2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from scvi_lite.analysis import latent
from scvi_lite.data.batch import Batch
from scvi_lite.data.fields import Matrix, columns_of_obs
from scvi_lite.model.base import arguments_of
from scvi_lite.model.questions import ReferenceModel
from scvi_lite.nn import by_hand
from scvi_lite.nn.configure import activation_name, configure, library_prior
from scvi_lite.nn.module import Loss
from scvi_lite.nn.normal import kl_normal
from scvi_lite.nn.vae import CountVAE

if TYPE_CHECKING:
    from anndata import AnnData


class SCVIModule(CountVAE):
    """Generative model: z ~ N(0, I), log l ~ N(μ_batch, σ²_batch) or observed, x ~ likelihood(l · f(z, covariates))."""

    def loss(self, batch: Batch, kl_weight: float | Tensor = 1.0) -> Loss:
        """Negative evidence lower bound, mean over cells: reconstruction + kl_weight · KL(z) + KL(library)."""
        q = self.encode(batch)
        z_nk = q.sample_z()
        library_n = self.library(batch, q) if q.library_loc_n is None else q.sample_library()
        reconstruction_n = -self.decode(z_nk, library_n, batch).log_likelihood(batch.x)
        kl_z_n = kl_normal(q.z_loc_nk, q.z_scale_nk).sum(-1)
        kl_library_n = self.kl_library(batch, q)
        total = (reconstruction_n + kl_weight * kl_z_n + kl_library_n).mean()
        return Loss(total, reconstruction_n.sum(), (kl_z_n + kl_library_n).sum(), batch.n_cells)

    @property
    def is_by_hand(self) -> bool:
        """Whether the gradient of the loss is written out for this network; of another loss in its place it is not."""
        return type(self) is SCVIModule and by_hand.is_usual(self)

    loss_and_gradients = by_hand.loss_and_gradients


class SCVI(ReferenceModel):
    """Single-cell variational inference: integrate batches, denoise and compare expression.

    Parameters
    ----------
    adata
        AnnData set up with :meth:`setup_anndata`.
    n_hidden, n_layers
        Width and number of hidden layers of encoder and decoder.
    n_latent
        Dimensions of the latent space.
    dropout_rate
        Of the encoder.
    dispersion
        Inverse dispersion of NB and ZINB: one for each ``"gene"``, or for each ``"gene-batch"``, ``"gene-label"`` or
        ``"gene-cell"``.
    gene_likelihood
        ``"zinb"``, ``"nb"``, ``"poisson"`` or ``"normal"``.
    use_observed_lib_size
        Take each cell's total count as its library size; else infer it.
    latent_distribution
        ``"normal"``, or ``"ln"`` for the logistic normal: points on a simplex.
    **network_options
        Further options of the network: ``log_variational``, ``encode_covariates``, ``deeply_inject_covariates``,
        ``batch_representation`` (``"one-hot"`` or ``"embedding"``), ``batch_embedding_kwargs``
        (``{"embedding_dim": 5}``), ``use_batch_norm`` and ``use_layer_norm`` (``"none"``, ``"encoder"``, ``"decoder"``,
        ``"both"``), ``var_activation`` (``"exp"`` or ``"softplus"``, or the function).

    Raises
    ------
    RuntimeError
        If ``adata`` is not set up.
    TypeError, ValueError
        If an option does not exist, or a value is out of range.

    References
    ----------
    Lopez, Regier, Cole, Jordan, Yosef (2018). Deep generative modeling for single-cell transcriptomics. Nature Methods.

    Examples
    --------
    >>> import scvi_lite
    >>> adata = scvi_lite.data.synthetic_iid(batch_size=50, n_genes=20)
    >>> SCVI.setup_anndata(adata, batch_key="batch")
    >>> model = SCVI(adata, n_latent=5)
    >>> model.train(max_epochs=1, enable_progress_bar=False)
    >>> model.get_latent_representation().shape
    (100, 5)
    """

    get_batch_representation = latent.get_batch_representation

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
        latent_distribution: str = "normal",
        **network_options: Any,
    ):
        given = arguments_of(locals())
        if "var_activation" in network_options:  # as a name, which can be saved
            network_options["var_activation"] = activation_name(network_options["var_activation"])
        super().__init__(adata, given | network_options)

    def _make_module(self, arguments: dict[str, Any]) -> SCVIModule:
        config = configure(self.registry, arguments)
        return SCVIModule(config, library_prior(self.adata, self.registry, config))

    @classmethod
    def setup_anndata(
        cls,
        adata: AnnData,
        layer: str | None = None,
        batch_key: str | None = None,
        labels_key: str | None = None,
        size_factor_key: str | None = None,
        categorical_covariate_keys: Sequence[str] | None = None,
        continuous_covariate_keys: Sequence[str] | None = None,
    ) -> None:
        """Check the data and note what the model reads from them, in ``adata.uns["scvi_lite"]``.

        Parameters
        ----------
        adata
            Raw counts of cells × genes: sparse, dense or backed.
        layer
            Layer that holds the counts; ``adata.X`` by default.
        batch_key, labels_key
            Columns of ``adata.obs``: the batch to correct for, and the cell type (for gene-label dispersion).
        size_factor_key
            Column of positive factors to use instead of the library size.
        categorical_covariate_keys, continuous_covariate_keys
            Columns of further covariates to correct for.

        Raises
        ------
        KeyError
            If a column or layer does not exist.
        ValueError
            If counts are negative, NaN or infinite, values are missing, or names repeat.
        """
        given = arguments_of(locals())
        cls._register(adata, [Matrix("x", layer), *columns_of_obs(given)], given)
