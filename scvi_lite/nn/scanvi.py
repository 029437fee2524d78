"""Networks of scANVI: labels of some cells, and a latent space that knows them (Xu et al. 2021).

Doi:10.15252/msb.20209620.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scvi_lite.data.batch import Batch
from scvi_lite.errors import as_options, check_options
from scvi_lite.nn import layers
from scvi_lite.nn.classifier import Classifier
from scvi_lite.nn.layers import Encoder, Hidden
from scvi_lite.nn.module import Loss
from scvi_lite.nn.normal import draw_normal, kl_normal, log_normal
from scvi_lite.nn.vae import CountVAE, Posterior, VAEConfig

CLASSIFIER_OPTIONS = ("logits", "n_hidden", "n_layers", "dropout_rate", "use_batch_norm", "use_layer_norm")
N_BINS = 15  # of the calibration error
# scvi-tools runs encoder and classifier twice a step, so their batch norm comes to know the data after half the steps.
MOMENTUM_OF_TWO = 1 - (1 - 0.01) ** 2


@dataclass(frozen=True)
class SCANVIConfig(VAEConfig):
    """Sizes and options of a :class:`SCANVIModule`. ``n_labels`` counts the category of cells without a label."""

    linear_classifier: bool = False
    classifier_parameters: Mapping[str, Any] | None = None
    y_prior: Sequence[float] | None = None

    switches = (*VAEConfig.switches, "linear_classifier")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_options(
            "classifier_parameters", as_options("classifier_parameters", self.classifier_parameters), CLASSIFIER_OPTIONS
        )
        if self.n_labels < 3:
            raise ValueError(f"{self.n_labels - 1} label(s): at least two are needed to tell apart.")
        prior_l = np.asarray(self.y_prior if self.y_prior is not None else [1 / self.n_known] * self.n_known)
        if prior_l.shape != (self.n_known,) or not (prior_l > 0).all() or not np.isclose(prior_l.sum(), 1, atol=1e-3):
            raise ValueError(
                f"y_prior={self.y_prior!r}: {self.n_known} positive numbers that sum to 1 are needed, the probability "
                "of each label."
            )

    @property
    def n_known(self) -> int:
        """Number of labels; also the code of a cell without one."""
        return self.n_labels - 1


class SCANVIModule(CountVAE):
    """y ~ Cat(π), u ~ N(0, I), z | u, y ~ N(f(u, y)), x | z as in scVI; q(y | z) is the classifier."""

    config: SCANVIConfig

    def __init__(self, config: SCANVIConfig, library_prior: tuple[Tensor, Tensor] | None = None):
        super().__init__(config, library_prior)
        c = config
        in_encoder: dict[str, Any] = {"batch_norm": c.use_batch_norm in ("encoder", "both")}
        in_encoder["layer_norm"] = c.use_layer_norm in ("encoder", "both")
        in_decoder = {"batch_norm": c.use_batch_norm in ("decoder", "both")}
        in_decoder["layer_norm"] = c.use_layer_norm in ("decoder", "both")
        given = {name.removeprefix("use_"): value for name, value in (c.classifier_parameters or {}).items()}
        given.pop("logits", None)  # which scripts for scvi-tools give: labels are as probable either way
        shape = {"n_hidden": c.n_hidden, "n_layers": 0 if c.linear_classifier else c.n_layers}
        self.classifier = Classifier(
            c.n_latent, c.n_known, **{**shape, "dropout_rate": c.dropout_rate, **in_encoder, **given}
        )

        def conditional(dropout_rate: float, floor: float, norms: dict[str, Any]) -> Encoder:
            """A normal in latent space, given another point of it and a label."""
            hidden = Hidden(c.n_latent, c.n_hidden, c.n_layers, [c.n_known], dropout_rate=dropout_rate, **norms)
            return Encoder(hidden, c.n_hidden, c.n_latent, floor=floor)

        self.u_encoder = conditional(c.dropout_rate, 1e-4, in_encoder)
        self.z_decoder = conditional(0.0, 0.0, in_decoder)
        prior_l = torch.full((c.n_known,), 1 / c.n_known) if c.y_prior is None else torch.tensor(c.y_prior)
        self.register_buffer("label_prior", prior_l.float())
        for norm in (part for whole in (self.encoder, self.classifier) for part in whole.modules()):
            if isinstance(norm, nn.BatchNorm1d):
                norm.momentum = MOMENTUM_OF_TWO

    def loss(self, batch: Batch, kl_weight: float | Tensor = 1.0, classification_ratio: float = 50.0) -> Loss:
        """Negative evidence lower bound with the label summed out, and the cross-entropy of the labels known.

        mean[-log p(x | z) + log q(z | x) - Σ_y q(y | z) log p(z | u_y, y)
        + kl_weight · (Σ_y q(y | z) KL(u_y) + KL(y) + KL(library))] + classification_ratio · cross-entropy,
        with one draw of z and of each u_y. Labels are learned at the mean of the posterior of z.
        """
        n = batch.n_cells
        everyone = batch if batch.extra is None else batch.join(batch.extra)
        q_everyone = self.encode(everyone)
        q = q_everyone.first(n)
        z_nk = q.sample_z()
        library_n = self.library(batch, q) if q.library_loc_n is None else q.sample_library()
        reconstruction_n = -self.decode(z_nk, library_n, batch).log_likelihood(batch.x)
        logits = self.classifier(torch.cat([z_nk, q_everyone.z_loc_nk]))
        misfit_n, kl_label_n = self.label_terms(z_nk, q, logits[:n].log_softmax(-1))
        kl_n = kl_label_n + self.kl_library(batch, q)
        reconstruction_n = reconstruction_n + misfit_n

        known_n = everyone.label_n < self.config.n_known
        if not batch.teaches:
            known_n = torch.cat([torch.zeros_like(known_n[:n]), known_n[n:]])
        cross_entropy, sums = self.taught(logits[n:], everyone.label_n, known_n)
        total = (reconstruction_n + kl_weight * kl_n).mean() + classification_ratio * cross_entropy
        return Loss(total, reconstruction_n.sum(), kl_n.sum(), n, sums, z_nk)

    def kl_z(self, q: Posterior, batch: Batch) -> Tensor:
        """All terms of the bound but reconstruction and library, at one draw of z."""
        z_nk = q.sample_z()
        misfit_n, kl_label_n = self.label_terms(z_nk, q, self.classifier(z_nk).log_softmax(-1))
        return misfit_n + kl_label_n

    def log_prior_z(self, z: Tensor, batch: Batch | None) -> Tensor:
        """log Σ_y π(y) ∫ p(z | u, y) p(u) du, with one draw of each u_y to estimate the integral."""
        z_mk = z.flatten(0, -2)
        code_l1 = torch.arange(self.config.n_known, device=z.device)[:, None]
        u_loc_lmk, u_scale_lmk = self.u_encoder(z_mk, [code_l1])
        u_lmk = draw_normal(u_loc_lmk, u_scale_lmk)
        log_p_lm = log_normal(z_mk, *self.z_decoder(u_lmk, [code_l1])).sum(-1)
        log_w_lm = (log_normal(u_lmk, 0.0, 1.0) - log_normal(u_lmk, u_loc_lmk, u_scale_lmk)).sum(-1)
        return (log_p_lm + log_w_lm + self.label_prior.log()[:, None]).logsumexp(0).view(z.shape[:-1])

    def label_terms(self, z_nk: Tensor, q: Posterior, log_prob_nl: Tensor) -> tuple[Tensor, Tensor]:
        """log q(z | x) - Σ_y q(y | z) log p(z | u_y, y), and Σ_y q(y | z) KL(u_y) + KL(y): (n,) each."""
        if not self.is_plain(z_nk):
            return self.readable_label_terms(z_nk, q, log_prob_nl)
        from scvi_lite.nn.each_label import label_terms

        c, keep_nh = self.config, None
        if self.u_encoder.hidden.training and c.dropout_rate:
            keep_nh = layers.dropout(z_nk.new_ones(len(z_nk), c.n_hidden), c.dropout_rate)
        noise_lnk = draw_normal(z_nk.new_zeros(c.n_known, *z_nk.shape), z_nk.new_ones(()))
        draws = z_nk, q.z_loc_nk, q.z_scale_nk, log_prob_nl, self.label_prior.log()
        return label_terms(*draws, self.u_encoder, self.z_decoder, keep_nh, noise_lnk)

    def is_plain(self, z_nk: Tensor) -> bool:
        """Whether the compiled form of the label terms is for these networks, and for what computes them."""
        c = self.config
        plain = c.n_layers == 1 and c.use_batch_norm == "both" and c.use_layer_norm == "none"
        here = z_nk.device.type == "cpu" and not (torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling())
        return plain and here and z_nk.dtype == self.label_prior.dtype

    def readable_label_terms(self, z_nk: Tensor, q: Posterior, log_prob_nl: Tensor) -> tuple[Tensor, Tensor]:
        """The same, for networks of every shape and every device."""
        # Every label is tried for every cell: a leading dimension, which only the small networks over k see.
        code_l1 = torch.arange(self.config.n_known, device=z_nk.device)[:, None]
        u_loc_lnk, u_scale_lnk = self.u_encoder(z_nk, [code_l1])
        z_loc_lnk, z_scale_lnk = self.z_decoder(draw_normal(u_loc_lnk, u_scale_lnk), [code_l1])
        prob_ln = log_prob_nl.exp().t()
        log_q_n = log_normal(z_nk, q.z_loc_nk, q.z_scale_nk).sum(-1)
        log_p_n = (prob_ln * log_normal(z_nk, z_loc_lnk, z_scale_lnk).sum(-1)).sum(0)
        kl_u_n = (prob_ln * kl_normal(u_loc_lnk, u_scale_lnk).sum(-1)).sum(0)
        kl_y_n = (prob_ln.t() * (log_prob_nl - self.label_prior.log())).sum(-1)
        return log_q_n - log_p_n, kl_u_n + kl_y_n

    def taught(self, logits_nl: Tensor, label_n: Tensor, known_n: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean cross-entropy of the known labels, and sums from which the metrics of an epoch are made."""
        n_l = self.config.n_known
        target_n = torch.where(known_n, label_n, 0)
        known_n = known_n.to(logits_nl.dtype)
        cross_entropy = (F.cross_entropy(logits_nl, target_n, reduction="none") * known_n).sum()
        with torch.no_grad():
            confidence_n, predicted_n = logits_nl.softmax(-1).max(-1)
            confusion = known_n.new_zeros(n_l * n_l).index_add(0, target_n * n_l + predicted_n, known_n)
            bin_n = (confidence_n * N_BINS).long().clamp(max=N_BINS - 1)
            hits_2n = torch.stack([known_n * confidence_n, known_n * (predicted_n == target_n)])
            bins = known_n.new_zeros(2, N_BINS).index_add(1, bin_n, hits_2n)
        sums = {"confusion": confusion.view(n_l, n_l), "calibration": bins, "classification_loss": cross_entropy}
        return cross_entropy / known_n.sum().clamp(min=1), sums

    @property
    def extra_shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the sums over cells with a known label."""
        n_l = self.config.n_known
        return {"confusion": (n_l, n_l), "calibration": (2, N_BINS), "classification_loss": ()}

    @property
    def extra_metrics(self) -> tuple[str, ...]:
        """How well the labels known are told apart."""
        return ("classification_loss", "accuracy", "f1_score", "calibration_error")

    def metric_name(self, name: str, part: str) -> str:
        """As in scvi-tools: ``train_accuracy``."""
        return f"{part}_{name}"

    def summarise(self, extra: Mapping[str, Tensor], n_cells: float) -> dict[str, float]:
        """Metrics of an epoch; NaN if no cell of it had a known label.

        The F1 score is the mean over the labels that are known or predicted. The calibration error is the expected
        one over 15 equal bins of confidence (Guo et al. 2017, arXiv:1706.04599).
        """
        confusion, (expected, found) = extra["confusion"].double(), extra["calibration"].double()
        n, hits = confusion.sum(), confusion.diagonal()
        there = confusion.sum(0) + confusion.sum(1)
        return {
            "classification_loss": float(extra["classification_loss"] / n),
            "accuracy": float(hits.sum() / n),
            "f1_score": float((2 * hits / there)[there > 0].mean()),
            "calibration_error": float((expected - found).abs().sum() / n),
        }
