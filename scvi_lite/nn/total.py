"""The network of totalVI, genes and proteins from one latent space (Gayoso et al. 2021).

doi:10.1038/s41592-020-01050-x
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from scvi_lite.data.batch import Batch, Counts
from scvi_lite.errors import check_choice
from scvi_lite.nn.layers import Hidden, rows
from scvi_lite.nn.module import Loss
from scvi_lite.nn.protein import DISPERSIONS, LEARNT, ProteinDecoder, ProteinRates, SkipHead
from scvi_lite.nn.rates import Rates
from scvi_lite.nn.vae import CountVAE, VAEConfig, by_code

TOWARDS_BACKGROUND = 1e-3  # weight of a prior by which proteins that say nothing are background


@dataclass(frozen=True)
class TotalConfig(VAEConfig):
    """Sizes and options of a :class:`TOTALVIModule`; ``n_layers`` and ``dropout_rate`` are of the encoder."""

    n_hidden: int = 256
    n_latent: int = 20
    n_layers: int = 2
    dropout_rate: float = 0.2
    gene_likelihood: str = "nb"
    encode_covariates: bool = True
    n_proteins: int = 1
    n_panels: int = 1
    n_layers_decoder: int = 1
    dropout_rate_decoder: float = 0.2
    protein_dispersion: str = "protein"

    choices = VAEConfig.choices | {"gene_likelihood": ("nb", "zinb", "poisson"), "protein_dispersion": DISPERSIONS}
    sizes = (*VAEConfig.sizes, "n_layers_decoder")
    rates = (*VAEConfig.rates, "dropout_rate_decoder")

    def __post_init__(self) -> None:
        check_choice(("gene", "gene-batch", "gene-label"), gene_dispersion=self.dispersion)
        super().__post_init__()

    @property
    def n_inputs(self) -> int:
        """Genes and proteins."""
        return self.n_genes + self.n_proteins


class GeneDecoder(nn.Module):
    """Logits of the expected proportions, and of dropout where the likelihood has it."""

    def __init__(self, hidden: Hidden, config: TotalConfig, n_in: int, n_cats: Sequence[int]):
        super().__init__()

        def head() -> SkipHead:
            return SkipHead(config.n_hidden, n_in, config.n_genes, n_cats)

        self.hidden, self.scale = hidden, head()
        self.dropout = head() if config.gene_likelihood == "zinb" else None


class TOTALVIModule(CountVAE):
    """Generative model: z ~ N(0, I); genes x ~ NB(l · softmax f(z, s)); proteins y ~ background or foreground.

    Parameters
    ----------
    config
        Sizes and options.
    measured_qp
        (panels, p): the proteins that were measured with each panel of antibodies.
    library_prior
        As for :class:`~scvi_lite.nn.vae.CountVAE`.
    background_prior
        Location and scale of the log background with each panel, (q,) each, where these are taken from the data.
    """

    config: TotalConfig

    def __init__(
        self,
        config: TotalConfig,
        measured_qp: Tensor,
        library_prior: tuple[Tensor, Tensor] | None = None,
        background_prior: tuple[Tensor, Tensor] | None = None,
    ):
        super().__init__(config, library_prior)
        c, n_in = config, config.n_latent + self.n_dense

        def hidden() -> Hidden:
            return self.make_hidden(c.n_latent, "decoder", c.n_layers_decoder, c.dropout_rate_decoder)

        self.protein_decoder = ProteinDecoder(hidden(), hidden(), hidden(), c.n_hidden, n_in, c.n_proteins, self.n_cats)
        rows = {"protein": (), "protein-batch": (c.n_batches,), "protein-label": (c.n_labels,)}[c.protein_dispersion]
        self.protein_log_theta = nn.Parameter(2 * torch.rand(*rows, c.n_proteins))
        loc_q, scale_q = background_prior or (torch.full((c.n_panels,), value) for value in LEARNT)
        self.background_loc = nn.Parameter(loc_q[:, None].repeat(1, c.n_proteins))
        self.background_log_scale = nn.Parameter(scale_q.log()[:, None].repeat(1, c.n_proteins))
        self.log_efficiency = nn.Parameter(torch.zeros(c.n_batches, c.n_proteins))
        self.register_buffer("measured_qp", measured_qp, persistent=False)

    def make_decoder(self) -> nn.Module:
        """The decoder of genes."""
        c = self.config
        hidden = self.make_hidden(c.n_latent, "decoder", c.n_layers_decoder, c.dropout_rate_decoder)
        return GeneDecoder(hidden, c, c.n_latent + self.n_dense, self.n_cats)

    def inputs(self, batch: Batch) -> tuple[Counts, Sequence[Tensor], Tensor | None]:
        """What the encoder reads: genes, and beside them proteins and dense covariates.

        The counts of a cell are divided by one more than their mean, genes and proteins for themselves.
        """
        depth_n, y_np = 1 + batch.total_n / batch.x.n_features, batch.proteins_np
        x = replace(batch.x, value_m=batch.x.value_m / depth_n[batch.x.row_m])
        y_np = y_np / (1 + y_np.mean(1, keepdim=True))
        if self.config.log_variational:
            x, y_np = x.log1p(), y_np.log1p()
        codes, dense_nd = self.encoded_covariates(batch)
        return x, codes, y_np if dense_nd is None else torch.cat([y_np, dense_nd], -1)

    # Decoding ---------------------------------------------------------------------------------------------------------

    def decode(self, z: Tensor, library_n: Tensor, batch: Batch, mean_only: bool = False) -> Rates:
        """The rates of genes at latent ``z`` (..., n, k) and log library (..., n); ``mean_only``: of their means."""
        with_dropout = self.decoder.dropout is not None and not mean_only
        mixing_h = self._decode_proteins(z, batch)[1] if with_dropout else None
        return self._decode_genes(z, library_n, batch, mixing_h)

    def decode_proteins(self, z: Tensor, batch: Batch) -> ProteinRates:
        """The rates of proteins at latent ``z`` (..., n, k)."""
        return self._decode_proteins(z, batch)[0]

    def decode_both(self, z: Tensor, library_n: Tensor, batch: Batch) -> tuple[Rates, ProteinRates]:
        """The rates of genes and of proteins."""
        proteins, mixing_h = self._decode_proteins(z, batch)
        return self._decode_genes(z, library_n, batch, mixing_h), proteins

    def _decode_genes(self, z: Tensor, library_n: Tensor, batch: Batch, mixing_h: Tensor | None) -> Rates:
        c, (codes, dense_nd) = self.config, self.covariates(batch)
        z = self.to_latent(z)
        inputs = z if dense_nd is None else torch.cat([z, dense_nd.expand(*z.shape[:-1], -1)], -1)
        logit_ng = self.decoder.scale(self.decoder.hidden(inputs, codes), inputs, codes)
        log_theta = None if c.gene_likelihood == "poisson" else by_code(self.log_theta, c.dispersion, batch)
        dropout = self.decoder.dropout
        dropout_ng = None if dropout is None or mixing_h is None else dropout(mixing_h, inputs, codes)
        return Rates(c.gene_likelihood, logit_ng, library_n, log_theta, dropout_ng, not c.use_size_factor)

    def _decode_proteins(self, z: Tensor, batch: Batch) -> tuple[ProteinRates, Tensor]:
        log_theta = by_code(self.protein_log_theta, self.config.protein_dispersion, batch)
        log_efficiency_np = rows(self.log_efficiency, batch.batch_n)
        return self.protein_decoder(self.to_latent(z), *self.covariates(batch), log_theta, log_efficiency_np)

    def panel(self, batch: Batch) -> Tensor:
        """Code of each cell's panel (n,): its batch where no panels are named."""
        return batch.batch_n if batch.panel_n is None else batch.panel_n

    # Loss -------------------------------------------------------------------------------------------------------------

    @property
    def measured_p(self) -> Tensor:
        """Which proteins were measured in some cells, (p,); of the others nothing was learned."""
        return self.measured_qp.any(0)

    def measured(self, batch: Batch) -> Tensor:
        """Which proteins were measured in which cells, (n, p)."""
        measured_np = self.measured_qp[self.panel(batch)]
        return measured_np if batch.has_proteins_n is None else measured_np & batch.has_proteins_n[:, None]

    def reconstruction(self, z: Tensor, library: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Negative log-likelihoods (..., n) of the genes and of the proteins that were measured."""
        genes, proteins = self.decode_both(z, library, batch)
        return self._reconstruction(genes, self._score(proteins, batch)[0], batch)

    def _reconstruction(self, genes: Rates, protein_n: Tensor, batch: Batch) -> dict[str, Tensor]:
        gene_n = -genes.log_likelihood(batch.x)
        if batch.has_x_n is not None:
            gene_n = torch.where(batch.has_x_n, gene_n, 0.0)
        return {"reconst_loss_gene": gene_n, "reconst_loss_protein": protein_n}

    def background_prior(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Location and scale of the log background with each cell's panel, (n, p) each."""
        panel_n = self.panel(batch)
        return rows(self.background_loc, panel_n), rows(self.background_log_scale, panel_n).exp()

    def kl_given_z(self, z: Tensor, batch: Batch) -> Tensor:
        """KL of the background, (..., n), and what the priors of the batch's efficiency and of the mixing cost."""
        return self._score(self.decode_proteins(z, batch), batch)[1]

    def _score(self, proteins: ProteinRates, batch: Batch) -> tuple[Tensor, Tensor]:
        """Negative log-likelihood of the proteins, and what :meth:`kl_given_z` gives: (..., n) each."""
        log_p_n, kl_n = proteins.score(batch.proteins_np, self.measured(batch), *self.background_prior(batch))
        return -log_p_n, kl_n + self._cost_of_priors(proteins)

    def _cost_of_priors(self, proteins: ProteinRates) -> Tensor:
        """-log LogNormal(efficiency; 0, 1) - 0.001 log P(background), summed over proteins: (..., n)."""
        e = proteins.log_efficiency
        cost_np = e + 0.5 * e**2 + 0.5 * math.log(2 * math.pi)
        return (cost_np + TOWARDS_BACKGROUND * nn.functional.softplus(-proteins.mixing_np)).sum(-1)

    def log_joint(self, z: Tensor, library: Tensor, batch: Batch) -> Tensor:
        """log p(x, y, b | z, l) - log q(b | z) at a draw of the background b: (..., n)."""
        genes, proteins = self.decode_both(z, library, batch)
        ratio_np = proteins.log_ratio_background(*self.background_prior(batch))
        ratio_n = torch.where(self.measured(batch), ratio_np, 0.0).sum(-1) - self._cost_of_priors(proteins)
        return ratio_n - sum(self._reconstruction(genes, self._score(proteins, batch)[0], batch).values())

    def loss(
        self,
        batch: Batch,
        kl_weight: float | Tensor = 1.0,
        pro_recons_weight: float = 1.0,
        anneal_proteins: bool = True,
    ) -> Loss:
        """Negative evidence lower bound, mean over cells.

        genes + w · proteins + kl_weight · (KL(z) + KL(background)) + KL(library), with w = ``pro_recons_weight``,
        times ``kl_weight`` where proteins are annealed too.
        """
        q = self.encode(batch)
        z_nk = q.sample_z()
        library_n = self.library(batch, q) if q.library_loc_n is None else q.sample_library()
        genes, proteins = self.decode_both(z_nk, library_n, batch)
        protein_n, kl_background_n = self._score(proteins, batch)
        gene_n = self._reconstruction(genes, protein_n, batch)["reconst_loss_gene"]
        kl_n = self.kl_z(q, batch) + kl_background_n
        kl_library_n = self.kl_library(batch, q)
        weight = pro_recons_weight * (kl_weight if anneal_proteins else 1.0)
        total = (gene_n + weight * protein_n + kl_weight * kl_n + kl_library_n).mean()
        reconstruction = (gene_n + protein_n).sum()
        return Loss(total, reconstruction, (kl_n + kl_library_n).sum(), batch.n_cells, z_nk=self.to_latent(z_nk))
