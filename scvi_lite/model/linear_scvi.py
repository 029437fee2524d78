"""LDVAE: scVI with a linear decoder, whose weights say which genes a factor moves.

Svensson, Gayoso, Yosef & Pachter 2020, doi:10.1093/bioinformatics/btaa169
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from scvi_lite.data.fields import Matrix, columns_of_obs
from scvi_lite.model.base import arguments_of
from scvi_lite.model.questions import ReferenceModel
from scvi_lite.model.scvi import SCVIModule
from scvi_lite.nn.configure import configure, library_prior
from scvi_lite.nn.layers import CovariateLinear
from scvi_lite.nn.vae import VAEConfig

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

NETWORK_OPTIONS = ("log_variational", "use_batch_norm", "bias")


@dataclass(frozen=True)
class LinearConfig(VAEConfig):
    """Sizes and options of a :class:`LinearSCVIModule`."""

    bias: bool = False  #: of the decoder, where no batch norm shifts its outputs

    switches = (*VAEConfig.switches, "bias")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dispersion == "gene-cell":
            raise ValueError(
                "dispersion='gene-cell': a linear decoder has no hidden layer to compute it from. "
                "Use 'gene', 'gene-batch' or 'gene-label'."
            )


class LinearMap(nn.Module):
    """A linear map of factors and covariates to genes, and batch norm where switched on."""

    def __init__(self, config: LinearConfig, n_cats: Sequence[int]):
        super().__init__()
        normed = config.use_batch_norm in ("decoder", "both")
        # A constant before batch norm is subtracted again: it would be a weight without gradient.
        self.linear = CovariateLinear(config.n_latent, config.n_genes, n_cats, bias=config.bias and not normed)
        self.batch_norm = nn.BatchNorm1d(config.n_genes, momentum=0.01, eps=0.001) if normed else None

    def forward(self, z: Tensor, codes: Sequence[Tensor]) -> Tensor:
        y = self.linear(z, codes)
        return y if self.batch_norm is None else self.batch_norm(y.flatten(0, -2)).view(y.shape)

    def loadings(self) -> Tensor:
        """Change of the output for a unit of each factor, (g, k)."""
        weight_gk, norm = self.linear.weight, self.batch_norm
        return weight_gk if norm is None else weight_gk * (norm.weight / (norm.running_var + norm.eps).sqrt())[:, None]


class LinearDecoder(nn.Module):
    """From latent space and covariates to the parameters of the likelihood, without a hidden layer."""

    def __init__(self, config: LinearConfig, n_cats: Sequence[int]):
        super().__init__()
        self.scale = LinearMap(config, n_cats)
        self.dropout = LinearMap(config, n_cats) if config.gene_likelihood == "zinb" else None

    def logits(self, z: Tensor, codes: list[Tensor], dense_nd: None) -> Tensor:
        """What the mean of the counts needs."""
        return self.scale(z, codes)

    def forward(self, z: Tensor, codes: list[Tensor], dense_nd: None) -> tuple[Tensor, Tensor | None, None]:
        return self.scale(z, codes), None if self.dropout is None else self.dropout(z, codes), None


class LinearSCVIModule(SCVIModule):
    """Generative model: z ~ N(0, I), x ~ likelihood(l · softmax(W z + W' batch))."""

    config: LinearConfig

    def make_decoder(self) -> LinearDecoder:
        """The linear decoder."""
        return LinearDecoder(self.config, self.n_cats)


class LinearSCVI(ReferenceModel):
    """Linearly decoded variational autoencoder (LDVAE): factors of expression that can be read gene by gene.

    Parameters
    ----------
    adata
        AnnData set up with :meth:`setup_anndata`.
    n_hidden, n_layers, dropout_rate
        Of the encoder.
    n_latent
        Number of factors.
    dispersion
        Inverse dispersion of NB and ZINB: one for each ``"gene"``, or for each ``"gene-batch"`` or ``"gene-label"``.
    gene_likelihood
        ``"nb"``, ``"zinb"``, ``"poisson"`` or ``"normal"``.
    use_observed_lib_size
        Take each cell's total count as its library size; else infer it.
    latent_distribution
        ``"normal"``, or ``"ln"`` for the logistic normal, with which cells are mixtures of factors.
    **network_options
        ``log_variational`` (logarithm before the encoder), ``use_batch_norm`` and ``bias`` of the linear decoder; with
        batch norm, which has its own, ``bias`` changes nothing.

    Raises
    ------
    RuntimeError
        If ``adata`` is not set up.
    TypeError, ValueError
        If an option does not exist, or a value is out of range.

    References
    ----------
    Svensson, Gayoso, Yosef, Pachter (2020). Interpretable factor models of single-cell RNA-seq via variational
    autoencoders. Bioinformatics.

    Examples
    --------
    >>> import scvi_lite
    >>> adata = scvi_lite.data.synthetic_iid(batch_size=50, n_genes=20)
    >>> LinearSCVI.setup_anndata(adata, batch_key="batch")
    >>> model = LinearSCVI(adata, n_latent=5)
    >>> model.train(max_epochs=1, enable_progress_bar=False)
    >>> model.get_loadings().shape
    (20, 5)
    """

    def __init__(
        self,
        adata: AnnData,
        n_hidden: int = 128,
        n_latent: int = 10,
        n_layers: int = 1,
        dropout_rate: float = 0.1,
        dispersion: str = "gene",
        gene_likelihood: str = "nb",
        use_observed_lib_size: bool = False,
        latent_distribution: str = "normal",
        **network_options: Any,
    ):
        given = arguments_of(locals())
        super().__init__(adata, given | network_options, (*given, *NETWORK_OPTIONS))

    def _make_module(self, arguments: dict[str, Any]) -> LinearSCVIModule:
        use_batch_norm = arguments.get("use_batch_norm", True)
        if not isinstance(use_batch_norm, bool):
            raise ValueError(f"use_batch_norm={use_batch_norm!r}: True or False, for the linear decoder, is needed.")
        where = "both" if use_batch_norm else "encoder"
        config = configure(self.registry, arguments | {"use_batch_norm": where}, LinearConfig)
        return LinearSCVIModule(config, library_prior(self.adata, self.registry, config))

    @torch.inference_mode()
    def get_loadings(self) -> pd.DataFrame:
        """How much each factor moves each gene: the derivative of the decoder's logit by the factor.

        Adding 1 to factor k multiplies the expression of gene g, relative to the other genes, by exp(loading).
        Batch norm of the decoder is included: weight · gamma / sqrt(variance + eps), with its running variance, as
        :meth:`get_normalized_expression` uses it. With ``latent_distribution="ln"`` a factor is a share, from 0 to 1.

        Returns
        -------
        pandas.DataFrame
            Genes × factors ``Z_0``, ``Z_1``, ...

        Examples
        --------
        >>> import scvi_lite
        >>> adata = scvi_lite.data.synthetic_iid(batch_size=50, n_genes=20)
        >>> LinearSCVI.setup_anndata(adata)
        >>> model = LinearSCVI(adata, n_latent=2)
        >>> model.train(max_epochs=1, enable_progress_bar=False)
        >>> model.get_loadings().columns.tolist()
        ['Z_0', 'Z_1']
        """
        import pandas as pd

        self._warn_if_untrained()
        loadings_gk = self.module.decoder.scale.loadings().cpu().numpy()
        return pd.DataFrame(
            loadings_gk, index=self.get_var_names(), columns=[f"Z_{k}" for k in range(loadings_gk.shape[1])]
        )

    @classmethod
    def setup_anndata(
        cls, adata: AnnData, batch_key: str | None = None, labels_key: str | None = None, layer: str | None = None
    ) -> None:
        """Check the data and note what the model reads from them, in ``adata.uns["scvi_lite"]``.

        Parameters
        ----------
        adata
            Raw counts of cells × genes: sparse, dense or backed.
        batch_key, labels_key
            Columns of ``adata.obs``: the batch to correct for, and the cell type (for gene-label dispersion).
        layer
            Layer that holds the counts; ``adata.X`` by default.

        Raises
        ------
        KeyError
            If a column or layer does not exist.
        ValueError
            If counts are negative, NaN or infinite, values are missing, or names repeat.
        """
        given = arguments_of(locals())
        cls._register(adata, [Matrix("x", layer), *columns_of_obs(given)], given)
