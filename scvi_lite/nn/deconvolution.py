"""DestVI's network: a spot as a mixture of cell types, each in a state of its own.

Lopez et al. 2022, doi:10.1038/s41587-022-01272-8
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scvi_lite.data.batch import Batch, Counts
from scvi_lite.errors import check_whole
from scvi_lite.nn.conditional import ConditionalDecoder, LabelMixture, normed
from scvi_lite.nn.config import Config
from scvi_lite.nn.layers import Encoder
from scvi_lite.nn.mixing import log_mixture, mean_softmax
from scvi_lite.nn.module import Loss, Module
from scvi_lite.nn.normal import draw_normal, kl_normal, log_normal
from scvi_lite.nn.rates import Rates

LEAST_WEIGHT = 1e-3  # of the prior of a cell type that a spot lacks
USUAL_BATCH = 128  # spots over which scvi-tools sums what the extra cell types take
SPARSE_SHARES = 0.1  # concentration of the shares of cell types in a simulated spot: most have one type or two


@dataclass(frozen=True)
class SpotConfig(Config):
    """Sizes and options of a :class:`SpotModule`. Checked when made."""

    n_genes: int
    n_spots: int
    n_batches: int
    n_labels: int
    n_hidden: int
    n_latent: int
    n_layers: int
    n_components: int  #: of the prior of each cell type
    batch_embedding_dim: int = 5
    amortization: str = "both"
    prior_mode: str = "mog"
    n_states_per_label: int = 3
    add_celltypes: int = 1
    augmentation: bool = False
    n_samples_augmentation: int = 2
    dropout_amortization: float = 0.03
    eps_v: float = 0.002
    n_latent_amortization: int | None = None

    choices = {"amortization": ("none", "latent", "proportion", "both"), "prior_mode": ("mog", "normal")}
    sizes = ("n_states_per_label", "n_samples_augmentation")
    switches = ("augmentation",)
    rates = ("dropout_amortization", "eps_v")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole(least=0, add_celltypes=self.add_celltypes)
        if self.n_latent_amortization is not None:
            check_whole(n_latent_amortization=self.n_latent_amortization)

    @property
    def n_states(self) -> int:
        """States in which a cell type may be in one spot."""
        return self.n_states_per_label if self.prior_mode == "mog" else 1

    @property
    def amortizes_proportions(self) -> bool:
        """Whether a network finds the proportions; else each spot has its own parameters."""
        return self.amortization in ("proportion", "both")

    @property
    def amortizes_states(self) -> bool:
        """Whether a network finds the states of the cell types; else each spot has its own parameters."""
        return self.amortization in ("latent", "both")


class PerSpot(nn.Module):
    """Numbers of each spot (n, m): from a network that reads its counts, or kept for each spot.

    Under several devices each rank holds the whole table. Rows of spots that a rank does not hold get no gradient
    from it, and the mean over ranks is the gradient of the mean over the minibatches of all.
    """

    def __init__(self, config: SpotConfig, n_out: int, amortized: bool, n_layers: int, dropout_rate: float):
        super().__init__()
        c, self.amortized = config, amortized
        if amortized:
            n_in = c.n_latent_amortization or c.n_genes
            self.hidden = normed(n_in, c.n_hidden, n_layers, dropout_rate=dropout_rate)
            self.head = nn.Linear(c.n_hidden, n_out)
        else:
            self.table = nn.Parameter(torch.randn(c.n_spots, n_out))

    def forward(self, x: Tensor, row_n: Tensor) -> Tensor:
        return self.head(self.hidden(x)) if self.amortized else F.embedding(row_n, self.table)


@dataclass
class Spots:
    """What a minibatch of spots is made of."""

    proportion_nt: Tensor  #: shares of the l cell types, and of the extra ones behind them
    z_nslk: Tensor  #: place in latent space of each state of each cell type
    state_nsl: Tensor  #: shares of the states of a cell type
    kl_input_n: Tensor | float = 0.0  #: KL of the latent input of the networks, where there is one

    @property
    def z_nlk(self) -> Tensor:
        """Mean place of each cell type."""
        return (self.state_nsl.unsqueeze(-1) * self.z_nslk).sum(1)


class SpotModule(Module):
    """Generative model: x_n ~ NB(l_n Σ_t v_nt μ_nt, θ).

    The expression μ_nt of cell type t in spot n is the mean over states s, with shares π, of softmax(f(γ_nts, t) + β),
    f the decoder of a :class:`~scvi_lite.nn.conditional.CondSCVIModule`, which is held; that of the extra types is
    softmax(η). Proportions v, states γ and π, β, η and θ are fitted by maximum a posteriori.
    """

    def __init__(self, config: SpotConfig):
        super().__init__()
        self.config = c = config
        sizes = (c.n_latent, c.batch_embedding_dim, c.n_hidden, c.n_layers, c.n_labels, c.n_genes)
        self.decoder = ConditionalDecoder(*sizes, dropout_rate=0.0).requires_grad_(False)
        self.batch_embedding = nn.Embedding(c.n_batches, c.batch_embedding_dim)
        self.log_theta = nn.Parameter(torch.zeros(c.n_genes))
        self.beta_g = nn.Parameter(torch.zeros(c.n_genes))
        self.eta_ag = nn.Parameter(torch.zeros(c.add_celltypes, c.n_genes)) if c.add_celltypes else None
        components = (c.n_labels, c.n_components)
        self.register_buffer("prior_loc_lpk", torch.zeros(*components, c.n_latent))
        self.register_buffer("prior_var_lpk", torch.ones(*components, c.n_latent))
        self.register_buffer("prior_weight_lp", torch.full(components, 1 / c.n_components))
        if c.n_latent_amortization and (c.amortizes_proportions or c.amortizes_states):
            n_cats = [c.n_batches] if c.n_batches > 1 else []
            hidden = normed(c.n_genes, c.n_hidden, c.n_layers, n_cats, c.dropout_amortization)
            self.encoder = Encoder(hidden, c.n_hidden, c.n_latent_amortization, "softplus")
        self.proportions = PerSpot(c, c.n_labels + c.add_celltypes, c.amortizes_proportions, c.n_layers, 0.0)
        n_shares = c.n_states * c.n_labels if c.n_states > 1 else 0
        n_places = c.n_states * c.n_latent * c.n_labels
        self.states = PerSpot(c, n_places + n_shares, c.amortizes_states, 2, c.dropout_amortization)

    # What a spot is made of -------------------------------------------------------------------------------------------

    @property
    def has_encoder(self) -> bool:
        """Whether the networks read a latent space of the spots instead of their counts."""
        return bool(self.config.n_latent_amortization) and self.config.amortization != "none"

    def posterior(self, x: Tensor | Counts, batch: Batch) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latent space of the spots, (n, k) each, from the logarithm of counts."""
        return self.encoder(x, [batch.batch_n] if self.config.n_batches > 1 else ())

    def read(self, x_ng: Tensor, batch: Batch) -> tuple[Tensor, Tensor | float]:
        """What the networks read of counts, and its KL (n,)."""
        if not self.has_encoder:
            return x_ng.log1p(), 0.0
        loc_nk, scale_nk = self.posterior(x_ng.log1p(), batch)
        kl_n = kl_normal(loc_nk, scale_nk).sum(-1)
        return (draw_normal(loc_nk, scale_nk) if self.training else loc_nk), kl_n

    def infer(self, batch: Batch) -> Spots:
        """Proportions and states of each spot."""
        c = self.config
        x, kl_input_n = self.read(batch.x.x_ng, batch)  # dense: most genes have counts in a spot
        proportion_nt = self.proportions(x, batch.row_n).softmax(-1)
        flat = self.states(x, batch.row_n)
        n_places = c.n_states * c.n_latent * c.n_labels
        z_nslk = flat[:, :n_places].view(-1, c.n_states, c.n_latent, c.n_labels).transpose(-1, -2)
        if c.n_states > 1:
            state_nsl = flat[:, n_places:].view(-1, c.n_states, c.n_labels).softmax(1)
        else:
            state_nsl = z_nslk.new_ones(z_nslk.shape[:-1])
        return Spots(proportion_nt, z_nslk, state_nsl, kl_input_n)

    @property
    def label_l(self) -> Tensor:
        """Codes of the cell types."""
        return torch.arange(self.config.n_labels, device=self.beta_g.device)

    def expression(self, spots: Spots, batch: Batch, code: int) -> Tensor:
        """Expected proportions of genes in a cell type of each spot, the extra ones behind the others: (n, g)."""
        if (extra := code - self.config.n_labels) >= 0:
            return self.eta_ag[extra].softmax(-1).expand(batch.n_cells, -1)
        label_l = torch.tensor([code], device=self.beta_g.device)
        dense_nd = self.batch_embedding(batch.batch_n)[:, None, None]
        scale_nslg = (self.decoder(spots.z_nslk[:, :, label_l], label_l, dense_nd) + self.beta_g).softmax(-1)
        return (spots.state_nsl[:, :, label_l, None] * scale_nslg).sum(1)[:, 0]

    def mixed(self, z_nslk: Tensor, share_nsl: Tensor, batch: Batch) -> Tensor:
        """Expected proportions of genes in these shares of the states of the cell types: (n, g)."""
        decoder, dense_nd = self.decoder, self.batch_embedding(batch.batch_n)[:, None, None]
        bias_lg = decoder.scale.bias + decoder.label_bias_lg + self.beta_g
        return mean_softmax(decoder.units(z_nslk, self.label_l, dense_nd), decoder.scale.weight, bias_lg, share_nsl)

    def mean(self, spots: Spots, batch: Batch) -> Tensor:
        """Expected proportions of genes in each spot, from those in its cell types: (n, g).

        In training each type counts by ``eps_v`` more, so that none is out of reach.
        """
        share_nt = spots.proportion_nt + self.config.eps_v if self.training else spots.proportion_nt
        share_nl, share_na = share_nt.tensor_split([self.config.n_labels], dim=1)
        scale_ng = self.mixed(spots.z_nslk, share_nl[:, None] * spots.state_nsl, batch)
        return scale_ng if self.eta_ag is None else scale_ng + share_na @ self.eta_ag.softmax(-1)

    def prior(self) -> LabelMixture:
        """The prior of the state of each cell type, from the reference.

        Where a type may have several states, its variances stand for standard deviations, as in scvi-tools: states
        of spots, of which there is less to see, stay closer to those of single cells.
        """
        scale_lpk = self.prior_var_lpk if self.config.prior_mode == "mog" else self.prior_var_lpk.sqrt()
        return LabelMixture(self.prior_loc_lpk, scale_lpk, self.prior_weight_lp.log())

    # Training ---------------------------------------------------------------------------------------------------------

    def loss(
        self,
        batch: Batch,
        kl_weight: float | Tensor = 1.0,
        ct_sparsity_weight: float = 2.0,
        weighting_augmentation: float = 1.0,
        weighting_smoothing: float = 100.0,
        eta_reg: float = 1.0,
        beta_reg: float = 1.0,
        weighting_kl_latent: float = 0.001,
        reconst_weight: float = 3.0,
    ) -> Loss:
        """Negative log posterior, mean over spots, and penalties whose weights are options of the plan."""
        spots = self.infer(batch)
        scale_ng = self.mean(spots, batch)
        logit_ng = scale_ng.clamp(min=torch.finfo(scale_ng.dtype).tiny).log()
        library_n = batch.library_n + scale_ng.sum(-1).log()  # in training, shares sum to a little more than 1
        reconstruction_n = -Rates("nb", logit_ng, library_n, self.log_theta).log_likelihood(batch.x)
        kl_n = self.kl_states(spots)
        log_v_nt = spots.proportion_nt.clamp(min=1e-20).log()
        entropy_n = -(spots.proportion_nt * log_v_nt).sum(-1)
        extra_n = spots.proportion_nt[:, self.config.n_labels :].sum(-1)
        penalty_n = ct_sparsity_weight * entropy_n + eta_reg * USUAL_BATCH * extra_n
        annealed_n = kl_n + penalty_n + weighting_kl_latent * spots.kl_input_n
        kl_global = -beta_reg * log_normal(self.beta_g, 0.0, 1.0).sum()
        total = (reconst_weight * reconstruction_n + kl_weight * annealed_n).mean() + kl_global
        augmented_n = torch.zeros_like(kl_n)
        if self.training and self.config.augmentation and self.config.amortizes_proportions:
            augmented_n = self.augmented(batch, spots)
            total = total + weighting_augmentation * augmented_n.mean()
        if batch.smoothed is not None:
            around_nt = self.proportions(self.read(batch.smoothed.x_ng, batch)[0], batch.row_n).log_softmax(-1)
            total = total + weighting_smoothing * F.kl_div(log_v_nt, around_nt, reduction="batchmean", log_target=True)
        extra = {"v_sparsity": penalty_n.sum(), "augmentation": augmented_n.sum()}
        return Loss(total, reconstruction_n.sum(), kl_n.sum(), batch.n_cells, extra)

    def kl_states(self, spots: Spots) -> Tensor:
        """Minus the log prior of the states, (n,).

        With mixtures of states, each cell type counts by its share of the spot: a type that is hardly there has
        no state to speak of.
        """
        c = self.config
        cost_nl = -(spots.state_nsl * log_mixture(spots.z_nslk, self.prior())).sum(1)
        if c.prior_mode == "normal":
            return cost_nl.sum(-1)
        return ((spots.proportion_nt[:, : c.n_labels] + LEAST_WEIGHT) * cost_nl).sum(-1)

    def augmented(self, batch: Batch, spots: Spots) -> Tensor:
        """How far the network's proportions are from the truth in spots that were mixed with simulated ones, (n,).

        A simulated spot has few cell types, each in a state drawn from its prior. It replaces a part, from none to
        all, of the counts of a real one. The cost is the KL of the proportions found from the mixed ones.
        """
        c, n = self.config, batch.n_cells
        with torch.no_grad():
            x_ng, total_n1 = batch.x.x_ng, batch.x.sum_rows(batch.x.value_m)[:, None]
        cost_n = torch.zeros_like(total_n1[:, 0])
        for _ in range(c.n_samples_augmentation):
            with torch.no_grad():
                share_nl, scale_ng = self.simulate(n, batch)
                mix_n1 = torch.rand_like(total_n1)
                target_nt = (1 - mix_n1) * spots.proportion_nt
                target_nt[:, : c.n_labels] += mix_n1 * share_nl
                counts_ng = torch.poisson(mix_n1 * total_n1 * scale_ng)
                mixed_ng = (1 - mix_n1) * x_ng + counts_ng
            found_nt = self.proportions(self.read(mixed_ng, batch)[0], batch.row_n).log_softmax(-1)
            cost_n = cost_n + F.kl_div(found_nt, target_nt, reduction="none").sum(-1)
        return cost_n / c.n_samples_augmentation

    def simulate(self, n: int, batch: Batch) -> tuple[Tensor, Tensor]:
        """Shares of cell types (n, l) of simulated spots, and their expected proportions of genes (n, g)."""
        c, label_l = self.config, self.label_l
        # Shares of a symmetric Dirichlet distribution are scaled gammas, here U^(1/a) of small shape a.
        log_gamma_nl = torch.rand(n, c.n_labels, device=self.beta_g.device).clamp(min=1e-7).log() / SPARSE_SHARES
        share_nl = log_gamma_nl.softmax(-1)
        component_nl = torch.multinomial(self.prior_weight_lp, n, replacement=True).t()
        loc_nlk = self.prior_loc_lpk[label_l, component_nl]
        z_nlk = draw_normal(loc_nlk, self.prior_var_lpk[label_l, component_nl].sqrt())
        return share_nl, self.mixed(z_nlk[:, None], share_nl[:, None], batch)

    @property
    def extra_shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the penalty on proportions, and of the cost of augmented spots."""
        return {"v_sparsity": (), "augmentation": ()}
