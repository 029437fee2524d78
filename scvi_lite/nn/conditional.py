"""Networks given a cell type: the decoder that CondSCVI and DestVI share, and priors of z for each type.

Lopez et al. 2022, doi:10.1038/s41587-022-01272-8; the mixture of posteriors is of Tomczak & Welling, arXiv:1705.07120.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scvi_lite.data.batch import Batch
from scvi_lite.nn.layers import Hidden, rows
from scvi_lite.nn.module import Loss
from scvi_lite.nn.normal import kl_normal, log_normal
from scvi_lite.nn.rates import Rates
from scvi_lite.nn.vae import CountVAE, Posterior, VAEConfig


@dataclass(frozen=True)
class CondConfig(VAEConfig):
    """Sizes and options of a :class:`CondSCVIModule`."""

    prior: str = "normal"
    num_classes_mog: int = 10  #: components of the prior of each label
    n_fine_labels: int = 0

    choices = VAEConfig.choices | {"prior": ("normal", "mog", "vamp")}
    sizes = (*VAEConfig.sizes, "num_classes_mog")


@dataclass
class LabelMixture:
    """For each of ``l`` labels a mixture of ``p`` normals with independent dimensions."""

    loc_lpk: Tensor
    scale_lpk: Tensor
    log_weight_lp: Tensor

    @property
    def height_lp(self) -> Tensor:
        """Logarithm of what each normal adds to the density at its mean."""
        return self.log_weight_lp + log_normal(self.loc_lpk, self.loc_lpk.detach(), self.scale_lpk).sum(-1)

    def log_prob(self, z: Tensor, label_n: Tensor) -> Tensor:
        """Log-density at ``z`` (..., n, k), each under the mixture of its label: (..., n).

        >>> one = LabelMixture(torch.zeros(2, 1, 3), torch.ones(2, 1, 3), torch.zeros(2, 1))
        >>> one.log_prob(torch.zeros(4, 3), torch.tensor([0, 1, 1, 0])).shape
        torch.Size([4])
        """
        distance = ((z.unsqueeze(-2) - rows(self.loc_lpk, label_n)) / rows(self.scale_lpk, label_n)).square().sum(-1)
        log_prob = rows(self.height_lp, label_n) - 0.5 * distance
        top = log_prob.amax(-1, keepdim=True).detach()
        # What is too far away to count is kept from underflowing, which takes a CPU a hundred times as long.
        return (log_prob - top).clamp(min=-60).exp().sum(-1).log() + top.squeeze(-1)


def normed(
    n_in: int, n_hidden: int, n_layers: int, n_cats: Sequence[int] = (), dropout_rate: float = 0.0, **options: Any
) -> Hidden:
    """Hidden layers as all networks given a cell type have them: with layer norm, without batch norm."""
    options |= {"batch_norm": False, "layer_norm": True, "dropout_rate": dropout_rate}
    return Hidden(n_in, n_hidden, n_layers, n_cats, **options)


class ConditionalDecoder(nn.Module):
    """Logits of expression from latent space, label and batch; the label also shifts each gene."""

    def __init__(
        self,
        n_latent: int,
        n_dense: int,
        n_hidden: int,
        n_layers: int,
        n_labels: int,
        n_genes: int,
        dropout_rate: float,
    ):
        super().__init__()
        self.n_cats = [n_labels] if n_labels > 1 else []
        self.hidden = normed(n_latent + n_dense, n_hidden, n_layers, self.n_cats, dropout_rate)
        self.scale = nn.Linear(n_hidden, n_genes)
        self.label_bias_lg = nn.Parameter(torch.zeros(n_labels, n_genes))

    def forward(self, z: Tensor, label_n: Tensor, dense_nd: Tensor) -> Tensor:
        """Logits (..., n, g) at ``z`` (..., n, k) for cells of these labels."""
        return self.scale(self.units(z, label_n, dense_nd)) + rows(self.label_bias_lg, label_n)

    def units(self, z: Tensor, label_n: Tensor, dense_nd: Tensor) -> Tensor:
        """The hidden units (..., n, h) that the logits are made of."""
        return self.hidden(z, [label_n] if self.n_cats else [], dense_nd)


class FineClassifier(nn.Module):
    """Logits of fine labels from latent space and the coarse label."""

    def __init__(self, n_latent: int, n_labels: int, n_fine: int, n_hidden: int, dropout_rate: float):
        super().__init__()
        self.n_cats = [n_labels] if n_labels > 1 else []
        self.hidden = Hidden(
            n_latent, n_hidden, 1, self.n_cats, batch_norm=True, layer_norm=True, dropout_rate=dropout_rate
        )
        self.logits = nn.Linear(n_hidden, n_fine)

    def forward(self, z: Tensor, label_n: Tensor) -> Tensor:
        return self.logits(self.hidden(z, [label_n] if self.n_cats else []))


class CondSCVIModule(CountVAE):
    """Generative model of cells of a known type y: z ~ p(z | y), x ~ NB(l · softmax(f(z, y, batch) + bias_y), θ).

    Parameters
    ----------
    config
        Sizes and options.
    label_weight_l
        Weight of the cells of each label in the loss; None for equal ones.
    pseudo_lpg
        Log counts that the pseudo-inputs of the vamp prior start from.
    """

    config: CondConfig

    def __init__(self, config: CondConfig, label_weight_l: Tensor | None = None, pseudo_lpg: Tensor | None = None):
        super().__init__(config)
        c = config
        if c.n_fine_labels:
            self.classifier = FineClassifier(c.n_latent, c.n_labels, c.n_fine_labels, c.n_hidden, c.dropout_rate)
        self.register_buffer("label_weight_l", label_weight_l)
        components = (c.n_labels, c.num_classes_mog)
        if c.prior != "normal":
            self.prior_logit_lp = nn.Parameter(torch.zeros(components))
        if c.prior == "mog":
            self.prior_loc_lpk = nn.Parameter(torch.randn(*components, c.n_latent))
            self.prior_log_scale_lpk = nn.Parameter(torch.full((*components, c.n_latent), -2.0))
        if c.prior == "vamp":
            self.pseudo_lpg = nn.Parameter(torch.zeros(*components, c.n_genes) if pseudo_lpg is None else pseudo_lpg)

    # Network ----------------------------------------------------------------------------------------------------------

    def make_hidden(
        self, n_in: int, side: str, n_layers: int, dropout_rate: float = 0.0, deeply: bool = True, **options: Any
    ) -> Hidden:
        """Hidden layers of the encoder: labels enter each, the batch enters the first where it is asked for."""
        c = self.config
        n_dense = self.n_dense if c.encode_covariates else 0
        labels = [c.n_labels] if c.n_labels > 1 else []
        return normed(n_in + n_dense, c.n_hidden, n_layers, labels, dropout_rate, **options)

    def make_decoder(self) -> ConditionalDecoder:
        """The decoder of counts given a label."""
        c = self.config
        return ConditionalDecoder(
            c.n_latent, self.n_dense, c.n_hidden, c.n_layers, c.n_labels, c.n_genes, c.dropout_rate
        )

    def encoded_covariates(self, batch: Batch) -> tuple[list[Tensor], Tensor | None]:
        """What enters the encoder beside the counts: the label, and the batch where it is asked for."""
        c = self.config
        dense_nd = self.batch_embedding(batch.batch_n) if c.encode_covariates else None
        return [batch.label_n] if c.n_labels > 1 else [], dense_nd

    def decode(self, z: Tensor, library_n: Tensor, batch: Batch, mean_only: bool = False) -> Rates:
        """The rates of counts at latent ``z`` (..., n, k) and log library (..., n); ``mean_only``: of their means."""
        logit_ng = self.decoder(z, batch.label_n, self.batch_embedding(batch.batch_n))
        return Rates("nb", logit_ng, library_n, None if mean_only else self.log_theta)

    # Prior ------------------------------------------------------------------------------------------------------------

    def prior(self) -> LabelMixture | None:
        """The prior of each label; None for the standard normal."""
        c = self.config
        if c.prior == "normal":
            return None
        loc_lpk, scale_lpk = (
            self.encode_pseudo_inputs() if c.prior == "vamp" else (self.prior_loc_lpk, self.prior_log_scale_lpk.exp())
        )
        return LabelMixture(loc_lpk, scale_lpk, self.prior_logit_lp.log_softmax(-1))

    def encode_pseudo_inputs(self) -> tuple[Tensor, Tensor]:
        """Posteriors of the pseudo-inputs, (l, p, k) each, as if they came from all batches alike."""
        n_labels, n_components, _ = shape = self.pseudo_lpg.shape
        label_m = torch.arange(n_labels, device=self.pseudo_lpg.device).repeat_interleave(n_components)
        mean_d = self.batch_embedding.weight.mean(0)
        dense_md = mean_d.expand(len(label_m), -1) if self.config.encode_covariates else None
        codes = [label_m] if n_labels > 1 else []
        loc_mk, scale_mk = self.encoder(self.pseudo_lpg.flatten(0, 1), codes, dense_md)
        return loc_mk.view(*shape[:2], -1), scale_mk.view(*shape[:2], -1)

    def kl_z(self, q: Posterior, batch: Batch, z_nk: Tensor | None = None) -> Tensor:
        """KL of the posterior of z against the prior of the label (n,); a draw estimates that of a mixture."""
        if self.config.prior == "normal":
            return kl_normal(q.z_loc_nk, q.z_scale_nk).sum(-1)
        z_nk = q.sample_z() if z_nk is None else z_nk
        return log_normal(z_nk, q.z_loc_nk, q.z_scale_nk).sum(-1) - self.log_prior_z(z_nk, batch)

    def log_prior_z(self, z: Tensor, batch: Batch | None) -> Tensor:
        """Log-density of the prior at ``z`` (..., n, k): (..., n); of each cell's label, or without a batch, of all."""
        prior = self.prior()
        if prior is None:
            return super().log_prior_z(z, batch)
        if batch is not None:
            return prior.log_prob(z, batch.label_n)
        label_l = torch.arange(self.config.n_labels, device=z.device)
        return prior.log_prob(z.unsqueeze(-2), label_l).logsumexp(-1) - math.log(self.config.n_labels)

    # Training ---------------------------------------------------------------------------------------------------------

    def loss(self, batch: Batch, kl_weight: float | Tensor = 1.0, classification_ratio: float = 5.0) -> Loss:
        """Negative evidence lower bound, and the cross-entropy of the fine labels that are known.

        mean[w_y · (-log p(x | z, y) + kl_weight · KL(z | y))] + classification_ratio · cross-entropy, with one draw of
        z. Fine labels are learned at the mean of the posterior.
        """
        q = self.encode(batch)
        z_nk = q.sample_z()
        reconstruction_n = -self.decode(z_nk, self.library(batch, q), batch).log_likelihood(batch.x)
        kl_n = self.kl_z(q, batch, z_nk)
        loss_n = reconstruction_n + kl_weight * kl_n
        if self.label_weight_l is not None:
            loss_n = loss_n * self.label_weight_l[batch.label_n]
        total, extra = loss_n.mean(), {}
        if self.config.n_fine_labels:
            cross_entropy, extra["fine_labels"] = self.taught(q.z_loc_nk, batch)
            total = total + classification_ratio * cross_entropy
        return Loss(total, reconstruction_n.sum(), kl_n.sum(), batch.n_cells, extra)

    def taught(self, z_nk: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy of the fine labels known, and three sums over these cells: it, hits, and their number."""
        logits = self.classifier(z_nk, batch.label_n)
        known_n = batch.fine_n < self.config.n_fine_labels
        target_n = torch.where(known_n, batch.fine_n, 0)
        total = (F.cross_entropy(logits, target_n, reduction="none") * known_n).sum()
        hits = ((logits.argmax(-1) == target_n) & known_n).sum()
        n_known = known_n.sum()
        return total / n_known.clamp(min=1), torch.stack([total.detach(), hits.to(total), n_known.to(total)])

    @property
    def extra_shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the sums over cells whose fine label is known."""
        return {"fine_labels": (3,)} if self.config.n_fine_labels else {}

    @property
    def extra_metrics(self) -> tuple[str, ...]:
        """How well fine labels are told apart."""
        return ("classification_loss", "accuracy") if self.config.n_fine_labels else ()

    def summarise(self, extra: Mapping[str, Tensor], n_cells: float) -> dict[str, float]:
        """Metrics of an epoch; NaN if no cell of it had a known fine label."""
        if not self.config.n_fine_labels:
            return {}
        total, hits, n = extra["fine_labels"].double()
        return {"classification_loss": float(total / n), "accuracy": float(hits / n)}
