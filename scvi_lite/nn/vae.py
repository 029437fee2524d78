"""Variational autoencoder of counts that several models share (Lopez et al. 2018, doi:10.1038/s41592-018-0229-2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from scvi_lite.data.batch import Batch, Counts
from scvi_lite.nn.config import Choices, Config
from scvi_lite.nn.layers import VARIANCE, Encoder, Hidden, rows
from scvi_lite.nn.mixing import softmax_linear
from scvi_lite.nn.module import Module
from scvi_lite.nn.normal import draw_normal, kl_normal, log_normal
from scvi_lite.nn.rates import LIKELIHOODS, Rates

WHERE = ("none", "encoder", "decoder", "both")


@dataclass(frozen=True)
class VAEConfig(Config):
    """Sizes and options of a :class:`CountVAE`. Checked when made."""

    n_genes: int
    n_batches: int = 1
    n_labels: int = 1
    n_cats: tuple[int, ...] = ()  #: categories of each categorical covariate
    n_conts: int = 0
    n_hidden: int = 128
    n_latent: int = 10
    n_layers: int = 1
    dropout_rate: float = 0.1
    dispersion: str = "gene"
    gene_likelihood: str = "zinb"
    latent_distribution: str = "normal"
    log_variational: bool = True
    encode_covariates: bool = False
    deeply_inject_covariates: bool = True
    batch_representation: str = "one-hot"
    batch_embedding_dim: int = 5
    use_batch_norm: str = "both"
    use_layer_norm: str = "none"
    use_size_factor: bool = False
    use_observed_lib_size: bool = True
    var_activation: str = "exp"

    choices: ClassVar[Choices] = {
        "dispersion": ("gene", "gene-batch", "gene-label", "gene-cell"),
        "gene_likelihood": LIKELIHOODS,
        "latent_distribution": ("normal", "ln"),
        "batch_representation": ("one-hot", "embedding"),
        "use_batch_norm": WHERE,
        "use_layer_norm": WHERE,
        "var_activation": tuple(VARIANCE),
    }
    sizes: ClassVar[tuple[str, ...]] = ("n_hidden", "n_latent", "n_layers", "batch_embedding_dim")
    switches: ClassVar[tuple[str, ...]] = (
        "log_variational", "encode_covariates", "deeply_inject_covariates", "use_observed_lib_size",
    )  # fmt: skip
    rates: ClassVar[tuple[str, ...]] = ("dropout_rate",)

    @property
    def n_inputs(self) -> int:
        """What of the data the encoder reads, beside covariates."""
        return self.n_genes

    @property
    def latent_library(self) -> bool:
        """Whether the library size is a latent variable."""
        return not (self.use_size_factor or self.use_observed_lib_size)


@dataclass
class Posterior:
    """q(z, library | x): independent normals."""

    z_loc_nk: Tensor
    z_scale_nk: Tensor
    library_loc_n: Tensor | None = None
    library_scale_n: Tensor | None = None

    def first(self, n: int) -> Posterior:
        """That of the first cells."""
        parts = (self.z_loc_nk, self.z_scale_nk, self.library_loc_n, self.library_scale_n)
        return Posterior(*(None if part is None else part[:n] for part in parts))

    def sample_z(self, n_samples: int | None = None) -> Tensor:
        """Draw z by reparametrisation: (n, k), or (s, n, k) if ``n_samples`` is given."""
        return draw_normal(self.z_loc_nk, self.z_scale_nk, n_samples)

    def sample_library(self, n_samples: int | None = None) -> Tensor:
        """Draw the log library: (n,), or (s, n) if ``n_samples`` is given."""
        return draw_normal(self.library_loc_n, self.library_scale_n, n_samples)


class VAE(Module):
    """What encoders and decoders of any kind of data share: hidden layers, covariates and a latent space."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = c = config
        embedded = c.batch_representation == "embedding"
        self.n_cats = [n for n in ((() if embedded else (c.n_batches,)) + c.n_cats) if n > 1]
        self.n_dense = c.n_conts + (c.batch_embedding_dim if embedded else 0)
        if embedded:
            self.batch_embedding = nn.Embedding(c.n_batches, c.batch_embedding_dim)

    def make_hidden(
        self, n_in: int, side: str, n_layers: int, dropout_rate: float = 0.0, deeply: bool = False, **options: Any
    ) -> Hidden:
        """Hidden layers of an ``"encoder"`` or a ``"decoder"``, with the covariates that enter on this side.

        ``deeply``: they enter each layer, whatever the configuration says; ``options`` are of
        :class:`~scvi_lite.nn.layers.Hidden`.
        """
        c = self.config
        with_covariates = side == "decoder" or c.encode_covariates
        return Hidden(
            n_in + (self.n_dense if with_covariates else 0),
            c.n_hidden,
            n_layers,
            self.n_cats if with_covariates else (),
            deeply_inject=deeply or c.deeply_inject_covariates,
            batch_norm=c.use_batch_norm in (side, "both"),
            layer_norm=c.use_layer_norm in (side, "both"),
            dropout_rate=dropout_rate,
            **options,
        )

    def to_latent(self, z: Tensor) -> Tensor:
        """What a user calls the latent space: z, or a point on the simplex for the logistic normal."""
        return z.softmax(-1) if self.config.latent_distribution == "ln" else z

    def kl_z(self, q: Posterior, batch: Batch) -> Tensor:
        """KL of each cell's posterior against the prior of z, (n,); a draw estimates it where it has no closed form."""
        return kl_normal(q.z_loc_nk, q.z_scale_nk).sum(-1)

    def log_prior_z(self, z: Tensor, batch: Batch | None) -> Tensor:
        """Log-density of the prior at ``z`` (..., n, k): (..., n)."""
        return log_normal(z, 0.0, 1.0).sum(-1)

    def reconstruction(self, z: Tensor, library: Tensor | None, batch: Batch) -> dict[str, Tensor]:
        """What a decoder that stands at ``z`` (..., n, k) loses of the data: negative log-likelihoods (..., n)."""
        return {"reconstruction_loss": -self.decode(z, library, batch).log_likelihood(batch.x)}

    def kl_given_z(self, z: Tensor, batch: Batch) -> Tensor | float:
        """KL of what is latent beside z and the library, and inferred from z (..., n); zero where there is nothing."""
        return 0.0

    def log_joint(self, z: Tensor, library: Tensor | None, batch: Batch) -> Tensor:
        """log p(data, u | z, library) - log q(u | z) at a draw of u, what is latent beside z and the library."""
        return -torch.stack(list(self.reconstruction(z, library, batch).values())).sum(0)

    def covariates(self, batch: Batch) -> tuple[list[Tensor], Tensor | None]:
        """Codes of the categorical covariates with more than one category, and the dense covariates (n, d)."""
        c = self.config
        dense = [batch.conts_nd] if c.n_conts else []
        codes = []
        if c.batch_representation == "embedding":
            dense.append(self.batch_embedding(batch.batch_n))
        elif c.n_batches > 1:
            codes.append(batch.batch_n)
        codes += [batch.cats_nc[:, i] for i, n in enumerate(c.n_cats) if n > 1]
        return codes, torch.cat(dense, dim=-1) if dense else None

    def encoded_covariates(self, batch: Batch) -> tuple[Sequence[Tensor], Tensor | None]:
        """The covariates that enter an encoder: all, or none."""
        return self.covariates(batch) if self.config.encode_covariates else ((), None)


class CountVAE(VAE):
    """Encoder and decoder of counts; a model adds its :meth:`loss`.

    Parameters
    ----------
    config
        Sizes and options.
    library_prior
        Mean and variance of the log library in each batch, each (b,); needed where the library is latent.
    """

    def __init__(self, config: VAEConfig, library_prior: tuple[Tensor, Tensor] | None = None):
        super().__init__(config)
        c = config

        def encoder(n_out: int, n_layers: int) -> Encoder:
            stack = self.make_hidden(c.n_inputs, "encoder", n_layers, c.dropout_rate)
            return Encoder(stack, c.n_hidden, n_out, c.var_activation)

        self.encoder = encoder(c.n_latent, c.n_layers)
        if c.latent_library:
            self.library_encoder = encoder(1, n_layers=1)
            loc_b, var_b = library_prior or (torch.zeros(c.n_batches), torch.ones(c.n_batches))
            self.register_buffer("library_prior_loc", loc_b)
            self.register_buffer("library_prior_var", var_b)
        self.decoder = self.make_decoder()
        if c.gene_likelihood != "poisson" and c.dispersion != "gene-cell":
            rows = {"gene": (), "gene-batch": (c.n_batches,), "gene-label": (c.n_labels,)}[c.dispersion]
            self.log_theta = nn.Parameter(torch.randn(*rows, c.n_genes))

    def make_decoder(self) -> nn.Module:
        """The decoder of counts."""
        return Decoder(self.config, self.make_hidden(self.config.n_latent, "decoder", self.config.n_layers))

    def encode(self, batch: Batch) -> Posterior:
        """The posterior of a minibatch: computed from its counts, or the stored one of minified data."""
        if batch.qz_loc_nk is not None and batch.qz_scale_nk is not None:
            return Posterior(batch.qz_loc_nk, batch.qz_scale_nk)
        inputs = self.inputs(batch)
        posterior = Posterior(*self.encoder(*inputs))
        if self.config.latent_library:
            library_loc_n1, library_scale_n1 = self.library_encoder(*inputs)
            posterior.library_loc_n, posterior.library_scale_n = library_loc_n1[:, 0], library_scale_n1[:, 0]
        return posterior

    def inputs(self, batch: Batch) -> tuple[Counts, Sequence[Tensor], Tensor | None]:
        """What the encoder reads: the counts or their logarithm, codes and dense covariates."""
        x = batch.x.log1p() if self.config.log_variational else batch.x
        return x, *self.encoded_covariates(batch)

    def library(self, batch: Batch, posterior: Posterior) -> Tensor:
        """The log library (n,): given as size factor, the posterior mean, or observed."""
        if self.config.use_size_factor:
            return batch.size_factor_n.log()
        return batch.library_n if posterior.library_loc_n is None else posterior.library_loc_n

    def kl_library(self, batch: Batch, posterior: Posterior) -> Tensor:
        """KL of the log library against its batch's prior, (n,); zero where the library is not latent."""
        if posterior.library_loc_n is None:
            return batch.total_n.new_zeros(batch.n_cells)
        prior_loc_n, prior_var_n = self.library_prior_loc[batch.batch_n], self.library_prior_var[batch.batch_n]
        return kl_normal(posterior.library_loc_n, posterior.library_scale_n, prior_loc_n, prior_var_n)

    def decode(self, z: Tensor, library_n: Tensor, batch: Batch, mean_only: bool = False) -> Rates:
        """The rates of counts at latent ``z`` (..., n, k) and log library (..., n); ``mean_only``: of their means."""
        c = self.config
        codes, dense_nd = self.covariates(batch)
        if mean_only:
            logit_ng = self.decoder.logits(self.to_latent(z), codes, dense_nd)
            return Rates(c.gene_likelihood, logit_ng, library_n, proportions=not c.use_size_factor)
        logit_ng, dropout_ng, log_theta = self.decoder(self.to_latent(z), codes, dense_nd)
        if c.gene_likelihood != "poisson" and log_theta is None:
            log_theta = by_code(self.log_theta, c.dispersion, batch)
        return Rates(c.gene_likelihood, logit_ng, library_n, log_theta, dropout_ng, not c.use_size_factor)

    @property
    def decodes_in_place(self) -> bool:
        """Whether :meth:`expression` needs no memory beside that of its answer."""
        plain = isinstance(self.decoder, Decoder) and type(self.decoder.scale) is nn.Linear
        return plain and not self.config.use_size_factor

    def expression(self, z: Tensor, batch: Batch, out: Tensor | None = None) -> Tensor:
        """Expected expression for a library of one at latent ``z`` (..., n, k), without gradients: (..., n, g).

        Written to ``out`` where that is given: float32, contiguous and in the memory of the CPU.
        """
        if self.decodes_in_place:
            h = self.decoder.hidden(self.to_latent(z), *self.covariates(batch))
            return softmax_linear(h, self.decoder.scale, out)
        scale = self.decode(z, torch.zeros_like(z[..., 0]), batch, mean_only=True).scale_ng
        return scale if out is None else out.copy_(scale)


def by_code(log_theta: Tensor, dispersion: str, batch: Batch) -> Tensor:
    """The dispersion of each feature, or of each feature in the batch or label of each cell."""
    if dispersion.endswith("-batch"):
        return rows(log_theta, batch.batch_n)
    return rows(log_theta, batch.label_n) if dispersion.endswith("-label") else log_theta


class Decoder(nn.Module):
    """From latent space and covariates to the parameters of the likelihood."""

    def __init__(self, config: VAEConfig, hidden: Hidden):
        super().__init__()
        self.hidden = hidden
        self.scale = nn.Linear(config.n_hidden, config.n_genes)
        zinb, gene_cell = config.gene_likelihood == "zinb", config.dispersion == "gene-cell"
        self.dropout = nn.Linear(config.n_hidden, config.n_genes) if zinb else None
        gene_cell = gene_cell and config.gene_likelihood != "poisson"
        self.dispersion = nn.Linear(config.n_hidden, config.n_genes) if gene_cell else None

    def logits(self, z: Tensor, codes: list[Tensor], dense_nd: Tensor | None) -> Tensor:
        """What the mean of the counts needs."""
        return self.scale(self.hidden(z, codes, dense_nd))

    def forward(
        self, z: Tensor, codes: list[Tensor], dense_nd: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        h = self.hidden(z, codes, dense_nd)
        return (
            self.scale(h),
            None if self.dropout is None else self.dropout(h),
            None if self.dispersion is None else self.dispersion(h),
        )
