"""The network of MultiVI (Ashuach et al. 2023, doi:10.1038/s41592-023-01909-9)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor, nn
from torch.nn.functional import leaky_relu

from scvi_lite.data.batch import Batch
from scvi_lite.nn.accessibility import Accessibility, Head
from scvi_lite.nn.disagreement import DISTANCES
from scvi_lite.nn.layers import Encoder, rows
from scvi_lite.nn.module import Loss
from scvi_lite.nn.protein import DISPERSIONS, LEARNT, ProteinDecoder, ProteinRates
from scvi_lite.nn.vae import VAE, CountVAE, Decoder, Posterior, VAEConfig, by_code

NEVER = -1e9  # logit of a modality that a cell lacks
SMALLEST = 1e-12
SMALLEST_SHARE = 1e-6  # and 1 minus it the largest: a given depth of 1 has no logit


@dataclass(frozen=True)
class MultiConfig(VAEConfig):
    """Sizes and options of a :class:`MULTIVIModule`; ``n_layers`` is of the encoders, and 0 features mean no data."""

    n_regions: int = 1
    n_cells: int = 1
    n_layers_decoder: int = 2
    region_factors: bool = True
    modality_weights: str = "equal"
    modality_penalty: str = "Jeffreys"
    model_depth: bool = True
    given_depth: bool = False
    n_proteins: int = 0
    protein_dispersion: str = "protein"

    choices = VAEConfig.choices | {
        "modality_weights": ("equal", "universal", "cell"),
        "modality_penalty": (*DISTANCES, "None"),
        "protein_dispersion": DISPERSIONS,
    }
    sizes = (*VAEConfig.sizes, "n_layers_decoder")
    switches = (*VAEConfig.switches, "region_factors")

    @property
    def modalities(self) -> dict[str, int]:
        """The kinds of data that there are, in the order of their weights, and the number of features of each."""
        sizes = {"expression": self.n_genes, "accessibility": self.n_regions, "protein": self.n_proteins}
        return {name: size for name, size in sizes.items() if size}


class MULTIVIModule(VAE):
    """Generative model: z ~ N(0, I), genes as in scVI, regions as in PeakVI, and perhaps proteins as in totalVI.

    Any of the three may be absent. Each has an encoder. The posterior of a cell with several is a weighted mean of
    theirs, with weights w that sum to one over the kinds it has: location Σ w μ and variance Σ √w σ².

    Parameters
    ----------
    config
        Sizes and options.
    measured_bp
        (batches, p): the proteins that were measured in each batch.
    """

    config: MultiConfig

    def __init__(self, config: MultiConfig, measured_bp: Tensor | None = None):
        super().__init__(config)
        c = config
        for name, size in c.modalities.items():
            self.add_module(f"encoder_{name}", self._encoder(size, deeply=name != "expression"))
        if c.n_genes:
            self._add_genes()
        if c.n_regions:
            self._add_regions()
        if c.n_proteins:
            self.proteins = Proteins(self, measured_bp)
        if c.modality_weights != "equal":
            cells = (c.n_cells,) if c.modality_weights == "cell" else ()
            self.weight_logit = nn.Parameter(torch.zeros(*cells, len(c.modalities)))

    def _add_genes(self) -> None:
        c = self.config
        if not c.use_size_factor:
            self.library_encoder = self._head(c.n_genes, "encoder", c.n_layers, 1)
        self.decoder = Decoder(c, self.make_hidden(c.n_latent, "decoder", c.n_layers_decoder))
        if c.gene_likelihood != "poisson" and c.dispersion != "gene-cell":
            rows = {"gene": (), "gene-batch": (c.n_batches,), "gene-label": (c.n_labels,)}[c.dispersion]
            self.log_theta = nn.Parameter(torch.randn(*rows, c.n_genes))

    def _add_regions(self) -> None:
        c = self.config
        if not c.given_depth:
            self.depth_encoder = self._head(c.n_regions, "encoder", c.n_layers, 1)
        self.decoder_accessibility = self._head(c.n_latent, "decoder", c.n_layers_decoder, c.n_regions)
        self.factor_r = nn.Parameter(torch.zeros(c.n_regions)) if c.region_factors else None

    @property
    def per_cell(self) -> tuple[str, ...]:
        """The weights of modalities, where each cell has its own."""
        return ("weight_logit",) if self.config.modality_weights == "cell" else ()

    def _encoder(self, n_in: int, deeply: bool = False) -> Encoder:
        c = self.config
        hidden = self.make_hidden(n_in, "encoder", c.n_layers, c.dropout_rate, deeply, activation=leaky_relu)
        return Encoder(hidden, c.n_hidden, c.n_latent, floor=0.0)

    def _head(self, n_in: int, side: str, n_layers: int, n_out: int) -> Head:
        return Head(self.make_hidden(n_in, side, n_layers, activation=leaky_relu), self.config.n_hidden, n_out)

    # Posterior --------------------------------------------------------------------------------------------------------

    def encode_each(self, batch: Batch) -> dict[str, Posterior]:
        """What each modality alone says of z."""
        covariates = self.encoded_covariates(batch)
        data = {"expression": batch.x, "accessibility": batch.peaks, "protein": batch.proteins_np}
        encoders = {name: getattr(self, f"encoder_{name}") for name in self.config.modalities}
        return {name: Posterior(*encoder(data[name], *covariates)) for name, encoder in encoders.items()}

    def present(self, batch: Batch) -> dict[str, Tensor]:
        """Which cells have each modality, (n,) bool each."""
        has_n = {
            "expression": lambda: measured(batch.x.start.diff() > 0, batch.has_x_n),
            "accessibility": lambda: measured(batch.peaks.start.diff() > 0, batch.has_peaks_n),
            "protein": lambda: measured((batch.proteins_np > 0).any(1), batch.has_proteins_n),
        }
        return {name: has_n[name]() for name in self.config.modalities}

    def encode(self, batch: Batch) -> Posterior:
        """The joint posterior, or the stored one of minified data; that of a cell without data is the prior."""
        if batch.qz_loc_nk is not None and batch.qz_scale_nk is not None:
            return Posterior(batch.qz_loc_nk, batch.qz_scale_nk)
        return self._mix(self.encode_each(batch), batch)

    def _mix(self, parts: Mapping[str, Posterior], batch: Batch) -> Posterior:
        weight_nm = self.weights(batch)
        loc_mnk = torch.stack([part.z_loc_nk for part in parts.values()])
        variance_mnk = torch.stack([part.z_scale_nk**2 for part in parts.values()])
        root_nm = torch.where(weight_nm > SMALLEST, weight_nm.clamp(min=SMALLEST).sqrt(), 0.0)
        loc_nk = torch.einsum("nm,mnk->nk", weight_nm, loc_mnk)
        variance_nk = torch.einsum("nm,mnk->nk", root_nm, variance_mnk)
        nothing_n1 = (weight_nm.sum(1) < 0.5)[:, None]
        return Posterior(loc_nk, torch.where(nothing_n1, 1.0, variance_nk).sqrt())

    def weights(self, batch: Batch) -> Tensor:
        """Share of each modality in the posterior of each cell, (n, m); zeros for a cell without data."""
        has_nm = torch.stack([*self.present(batch).values()], dim=1)
        kind = self.config.modality_weights
        if kind == "equal":
            logit = torch.zeros(has_nm.shape[1], device=has_nm.device)
        elif kind == "universal":
            logit = self.weight_logit
        else:  # a cell that was not there in training has no weights of its own, and row -1
            own = self.weight_logit[batch.row_n.clamp(min=0)]
            logit = torch.where((batch.row_n >= 0)[:, None], own, self.weight_logit.mean(0))
        return torch.where(has_nm, logit, NEVER).softmax(-1) * has_nm

    # Likelihood -------------------------------------------------------------------------------------------------------

    decode = CountVAE.decode  #: genes, as Rates
    decodes_in_place, expression = CountVAE.decodes_in_place, CountVAE.expression

    def decode_regions(self, z: Tensor, depth_n: Tensor | None, batch: Batch) -> Accessibility:
        """The probabilities of regions at latent ``z`` (..., n, k) and the logit of the depth (..., n)."""
        logit_nr = self.decoder_accessibility(self.to_latent(z), *self.covariates(batch))
        return Accessibility(logit_nr, depth_n, self.factor_r)

    def library(self, batch: Batch, posterior: Posterior) -> Tensor:
        """The log library (n,): learned from expression, or given as size factor; zero without genes."""
        if self.config.use_size_factor:
            return batch.size_factor_n.log()
        if not self.config.n_genes:
            return batch.total_n.new_zeros(batch.n_cells)
        return leaky_relu(self.library_encoder(batch.x, *self.encoded_covariates(batch))[:, 0])

    def depth(self, batch: Batch) -> Tensor:
        """Logit of the depth of each cell (n,): learned from accessibility, or of the given depth."""
        if self.config.given_depth:
            return batch.depth_n.logit(eps=SMALLEST_SHARE)
        return self.depth_encoder(batch.peaks, *self.encoded_covariates(batch))[:, 0]

    def kl_library(self, batch: Batch, posterior: Posterior) -> Tensor:
        """Zero: the library is no latent variable."""
        return batch.total_n.new_zeros(batch.n_cells)

    @property
    def measured_p(self) -> Tensor:
        """Which proteins were measured in some cells, (p,); of the others nothing was learned."""
        return self.proteins.measured_bp.any(0)

    def decode_proteins(self, z: Tensor, batch: Batch) -> ProteinRates:
        """The rates of proteins at latent ``z`` (..., n, k)."""
        return self.proteins(self.to_latent(z), self.covariates(batch), batch)

    def reconstruction(self, z: Tensor, library: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Negative log-likelihood of each modality (..., n), zero where a cell lacks it."""
        proteins = self.decode_proteins(z, batch) if self.config.n_proteins else None
        return self._reconstruction(z, library, batch, proteins)

    def _reconstruction(
        self, z: Tensor, library: Tensor, batch: Batch, proteins: ProteinRates | None
    ) -> dict[str, Tensor]:
        log_p = {}
        if self.config.n_genes:
            log_p["expression"] = self.decode(z, library, batch).log_likelihood(batch.x)
        if self.config.n_regions:
            log_p["accessibility"] = self.decode_regions(z, self.depth(batch), batch).log_likelihood(batch.peaks)
        if proteins is not None:
            log_p["protein"] = self.proteins.over_measured(proteins.log_likelihood(batch.proteins_np), batch)
        has_n = self.present(batch)
        return {f"reconstruction_loss_{name}": -torch.where(has_n[name], value, 0.0) for name, value in log_p.items()}

    def kl_given_z(self, z: Tensor, batch: Batch) -> Tensor | float:
        """KL of the background of the proteins, (..., n); zero without proteins."""
        return self._kl_background(self.decode_proteins(z, batch), batch) if self.config.n_proteins else 0.0

    def _kl_background(self, proteins: ProteinRates, batch: Batch) -> Tensor:
        kl_n = self.proteins.over_measured(proteins.kl_background(*self.proteins.prior(batch)), batch)
        return torch.where(self.present(batch)["protein"], kl_n, 0.0)

    def log_joint(self, z: Tensor, library: Tensor, batch: Batch) -> Tensor:
        """log p(data, b | z, library) - log q(b | z) at a draw of b, the background of the proteins: (..., n)."""
        proteins = self.decode_proteins(z, batch) if self.config.n_proteins else None
        log_p_n = -torch.stack([*self._reconstruction(z, library, batch, proteins).values()]).sum(0)
        if proteins is None:
            return log_p_n
        ratio_n = self.proteins.over_measured(proteins.log_ratio_background(*self.proteins.prior(batch)), batch)
        return log_p_n + torch.where(self.present(batch)["protein"], ratio_n, 0.0)

    # Loss -------------------------------------------------------------------------------------------------------------

    @property
    def extra_shapes(self) -> dict[str, tuple[int, ...]]:
        """The penalty on modalities that disagree, beside the evidence lower bound."""
        return {"modality_penalty": ()}

    def loss(self, batch: Batch, kl_weight: float | Tensor = 1.0) -> Loss:
        """Mean over cells of reconstruction + kl_weight · KL, the negative evidence lower bound, + penalty."""
        parts = self.encode_each(batch)
        q = self._mix(parts, batch)
        z_nk = q.sample_z()
        proteins = self.decode_proteins(z_nk, batch) if self.config.n_proteins else None
        errors = self._reconstruction(z_nk, self.library(batch, q), batch, proteins)
        reconstruction_n = torch.stack([*errors.values()]).sum(0)
        kl_n = self.kl_z(q, batch)
        if proteins is not None:
            kl_n = kl_n + self._kl_background(proteins, batch)
        penalty_n = self.penalty(parts, batch)
        total = (reconstruction_n + kl_weight * kl_n + penalty_n).mean()
        extra = {"modality_penalty": penalty_n.sum()}
        return Loss(total, reconstruction_n.sum(), kl_n.sum(), batch.n_cells, extra, z_nk)

    def penalty(self, parts: Mapping[str, Posterior], batch: Batch) -> Tensor:
        """How far the modalities disagree in cells that have several, summed over pairs of modalities: (n,)."""
        penalty_n, has_n = batch.total_n.new_zeros(batch.n_cells), self.present(batch)
        if (distance := DISTANCES.get(self.config.modality_penalty)) is not None:
            for i, j in combinations(parts, 2):
                both_n = has_n[i] & has_n[j]
                penalty_n = penalty_n + torch.where(both_n, distance(parts[i], parts[j], both_n), 0.0)
        return penalty_n


class Proteins(nn.Module):
    """The decoder of proteins, their dispersion, and the prior of their background, as in totalVI."""

    def __init__(self, module: MULTIVIModule, measured_bp: Tensor | None):
        super().__init__()
        c, n_in = module.config, module.config.n_latent + module.n_dense
        back, fore, mixing = (module.make_hidden(c.n_latent, "decoder", c.n_layers_decoder, deeply=True) for _ in "123")
        self.decoder = ProteinDecoder(back, fore, mixing, c.n_hidden, n_in, c.n_proteins, module.n_cats, torch.exp)
        rows = {"protein": (), "protein-batch": (c.n_batches,), "protein-label": (c.n_labels,)}[c.protein_dispersion]
        self.dispersion = c.protein_dispersion
        self.log_theta = nn.Parameter(2 * torch.rand(*rows, c.n_proteins))
        loc, scale = LEARNT
        self.background_loc = nn.Parameter(torch.full((c.n_batches, c.n_proteins), loc))
        self.background_log_scale = nn.Parameter(torch.full((c.n_batches, c.n_proteins), scale).log())
        everything = torch.ones(c.n_batches, c.n_proteins, dtype=torch.bool)
        self.register_buffer("measured_bp", everything if measured_bp is None else measured_bp, persistent=False)

    def forward(self, z: Tensor, covariates: tuple[Sequence[Tensor], Tensor | None], batch: Batch) -> ProteinRates:
        log_theta = by_code(self.log_theta, self.dispersion, batch)
        return self.decoder(z, *covariates, log_theta, torch.zeros_like(self.background_loc[0]))[0]

    def prior(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Location and scale of the log background in each cell's batch, (n, p) each."""
        return rows(self.background_loc, batch.batch_n), rows(self.background_log_scale, batch.batch_n).exp()

    def over_measured(self, value_np: Tensor, batch: Batch) -> Tensor:
        """Sum over the proteins that were measured in each cell's batch: (..., n, p) to (..., n)."""
        return torch.where(self.measured_bp[batch.batch_n], value_np, 0.0).sum(-1)


def measured(some_n: Tensor, given_n: Tensor | None) -> Tensor:
    """Cells with some count, of those that were measured: others are rows of zeros for want of data."""
    return some_n if given_n is None else some_n & given_n
