"""Counts of proteins as background and foreground (Gayoso et al. 2021, doi:10.1038/s41592-020-01050-x).

Antibodies bind without their protein too. What a cell shows of protein p is background, of mean b_p, or, where it has
the protein, foreground, of mean a_p b_p with a_p > 1. The background differs by cell: log b_p is normal, around a prior
for each protein in each batch, or with each panel of antibodies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scvi_lite.distributions.counts import nb_mixture_log_prob
from scvi_lite.distributions.fused import as_inputs, is_compiled_for
from scvi_lite.nn.layers import Activation, CovariateLinear, Hidden
from scvi_lite.nn.normal import draw_normal, kl_normal, log_normal

DISPERSIONS = ("protein", "protein-batch", "protein-label")
LOWEST_RATIO = 1 + 1e-8  # of foreground to background
CELLS_OF_A_PANEL = 100  # to which a mixture is fitted for the prior
NOT_MEASURED = (0.0, 0.05)  # location and scale of the prior where there are no counts, which nothing is scored with
LEARNT = (3.0, 1.0)  # where to begin a prior that is not taken from the data


@dataclass
class ProteinRates:
    """What a decoder says about proteins, with optional leading sample dimensions.

    A count is background with probability S(mixing), S the sigmoid: negative binomial with mean exp(log_back), or else
    exp(log_back) · ratio, times the efficiency of the batch.
    """

    back_loc_np: Tensor  #: (..., n, p) mean of the log background
    back_scale_np: Tensor  #: (..., n, p) its standard deviation
    log_back_np: Tensor  #: (..., n, p) a draw of it
    ratio_np: Tensor  #: (..., n, p) foreground over background, above 1
    mixing_np: Tensor  #: (..., n, p) logit of a count being background
    log_theta: Tensor  #: (p,) or (n, p) log inverse dispersion
    log_efficiency: Tensor  #: (n, p) or (p,) of the batch

    @property
    def foreground_probability_np(self) -> Tensor:
        """Probability that a cell has the protein."""
        return (-self.mixing_np).sigmoid()

    @property
    def back_np(self) -> Tensor:
        """Mean of the background, at an efficiency of 1."""
        return self.log_back_np.exp()

    @property
    def fore_np(self) -> Tensor:
        """Mean of the foreground, at an efficiency of 1."""
        return self.back_np * self.ratio_np

    def log_likelihood(self, y_np: Tensor) -> Tensor:
        """Log-probability of each count: (..., n, p)."""
        log_back_np = self.log_back_np + self.log_efficiency
        return nb_mixture_log_prob(y_np, log_back_np, log_back_np + self.ratio_np.log(), self.log_theta, self.mixing_np)

    def score(
        self, y_np: Tensor, measured_np: Tensor, prior_loc_np: Tensor, prior_scale_np: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Of the proteins that were measured, log-likelihood of the counts and KL of the background: (..., n) each."""
        counts = self.log_efficiency, self.log_back_np, self.ratio_np, self.mixing_np
        background = self.back_loc_np, self.back_scale_np, prior_loc_np, prior_scale_np
        tensors = as_inputs(self.mixing_np.dtype, y_np, self.log_theta, *counts, *background)
        if is_compiled_for(self.mixing_np) and self.mixing_np.dim() == 2:
            from scvi_lite.nn.protein_kernels import Score

            return Score.apply(tensors[0], measured_np, *tensors[1:])
        log_p_np, kl_np = self.log_likelihood(y_np), self.kl_background(prior_loc_np, prior_scale_np)
        return torch.where(measured_np, log_p_np, 0.0).sum(-1), torch.where(measured_np, kl_np, 0.0).sum(-1)

    def kl_background(self, prior_loc: Tensor, prior_scale: Tensor) -> Tensor:
        """KL of the log background against its prior: (..., n, p)."""
        return kl_normal(self.back_loc_np, self.back_scale_np, prior_loc, prior_scale**2)

    def log_ratio_background(self, prior_loc: Tensor, prior_scale: Tensor) -> Tensor:
        """log prior - log posterior of the background that was drawn: (..., n, p)."""
        log_prior = log_normal(self.log_back_np, prior_loc, prior_scale)
        return log_prior - log_normal(self.log_back_np, self.back_loc_np, self.back_scale_np)

    def sample(self, denoised: bool = False) -> Tensor:
        """Draw counts, or the rates behind them: (..., n, p)."""
        is_back = torch.rand_like(self.mixing_np) < self.mixing_np.sigmoid()
        mu_np = torch.where(is_back, self.back_np, self.fore_np) * self.log_efficiency.exp()
        theta = self.log_theta.exp().expand_as(mu_np)
        rate_np = torch._standard_gamma(theta) * (mu_np / theta)
        return rate_np if denoised else torch.poisson(rate_np)


class SkipHead(nn.Module):
    """A linear map of hidden units, of the latent position that they come from, and of the covariates."""

    def __init__(self, n_hidden: int, n_latent: int, n_out: int, n_cats: Sequence[int]):
        super().__init__()
        self.linear = CovariateLinear(n_hidden + n_latent, n_out, n_cats)

    def forward(self, h: Tensor, z: Tensor, codes: Sequence[Tensor]) -> Tensor:
        return self.linear(torch.cat([h, z], -1), codes)


class ProteinDecoder(nn.Module):
    """From latent space and covariates to :class:`ProteinRates`.

    Parameters
    ----------
    back, fore, mixing
        Hidden layers for each of the three: background, ratio of the foreground, mixing.
    n_hidden, n_latent
        Width of these layers, and of what enters them beside categorical covariates.
    n_proteins
        Outputs.
    n_cats
        Number of categories of each categorical covariate.
    positive
        Makes the standard deviation of the log background of a number.
    """

    def __init__(
        self,
        back: Hidden,
        fore: Hidden,
        mixing: Hidden,
        n_hidden: int,
        n_latent: int,
        n_proteins: int,
        n_cats: Sequence[int] = (),
        positive: Activation = F.softplus,
    ):
        super().__init__()
        self.positive = positive

        def head() -> SkipHead:
            return SkipHead(n_hidden, n_latent, n_proteins, n_cats)

        self.back, self.fore, self.mixing = back, fore, mixing
        self.back_loc, self.back_scale, self.ratio, self.mixing_logit = head(), head(), head(), head()

    def forward(
        self, z: Tensor, codes: Sequence[Tensor], dense_nd: Tensor | None, log_theta: Tensor, log_efficiency: Tensor
    ) -> tuple[ProteinRates, Tensor]:
        """The rates, and the hidden units of the mixing, which other parts may read."""
        inputs = z if dense_nd is None else torch.cat([z, dense_nd.expand(*z.shape[:-1], -1)], -1)
        back_h, fore_h, mixing_h = (part(inputs, codes) for part in (self.back, self.fore, self.mixing))
        loc_np = self.back_loc(back_h, inputs, codes)
        scale_np = self.positive(self.back_scale(back_h, inputs, codes))
        rates = ProteinRates(
            back_loc_np=loc_np,
            back_scale_np=scale_np,
            log_back_np=draw_normal(loc_np, scale_np),
            ratio_np=F.relu(self.ratio(fore_h, inputs, codes)) + LOWEST_RATIO,
            mixing_np=self.mixing_logit(mixing_h, inputs, codes),
            log_theta=log_theta,
            log_efficiency=log_efficiency,
        )
        return rates, mixing_h


def background_prior(y_np: np.ndarray, panel_n: np.ndarray, n_panels: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Location and scale of the prior of the log background with each panel (or batch), (q,) each, from the data.

    In each of some cells the log1p counts of all proteins are two normals, of which the lower is background. The
    location is the mean over these cells, the scale a tenth of their mean scale.
    """
    loc_q, scale_q = (np.full(n_panels, value) for value in NOT_MEASURED)
    rng = np.random.default_rng(seed)
    for q in range(n_panels):
        rows = np.flatnonzero((panel_n == q) & (y_np > 0).any(1))
        rows = rng.permutation(rows)[:CELLS_OF_A_PANEL]
        if len(rows):
            loc_n, scale_n = lower_of_two(np.log1p(y_np[rows].astype(np.float64)))
            loc_q[q], scale_q[q] = loc_n.mean(), 0.1 * scale_n.mean()
    return torch.from_numpy(loc_q).float(), torch.from_numpy(scale_q).float()


def lower_of_two(x_np: np.ndarray, n_steps: int = 50) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of the lower of two normals, fitted to each row by expectation maximisation.

    >>> x = np.concatenate([np.linspace(-1, 1, 50), np.linspace(9, 11, 50)])[None]
    >>> [round(abs(value.item()), 1) for value in lower_of_two(x)]
    [0.0, 0.6]
    """
    mean_n1 = x_np.mean(1, keepdims=True)  # where a normal is that has no part of the numbers
    middle_n1 = (x_np.min(1, keepdims=True) + x_np.max(1, keepdims=True)) / 2
    upper_np = (x_np > middle_n1).astype(np.float64)
    for _ in range(n_steps):
        fitted = []
        for weight_np in (1 - upper_np, upper_np):
            total_n1 = weight_np.sum(1, keepdims=True) + 1e-10
            loc_n1 = ((weight_np * x_np).sum(1, keepdims=True) + 1e-10 * mean_n1) / total_n1
            variance_n1 = (weight_np * (x_np - loc_n1) ** 2).sum(1, keepdims=True) / total_n1 + 1e-6
            log_p_np = np.log(total_n1) - 0.5 * np.log(variance_n1) - 0.5 * (x_np - loc_n1) ** 2 / variance_n1
            fitted.append((loc_n1, variance_n1, log_p_np))
        (loc_n1, variance_n1, lower_np), (other_n1, other_variance_n1, higher_np) = fitted
        upper_np = 1 / (1 + np.exp(np.clip(lower_np - higher_np, -500, 500)))
    swapped = other_n1 < loc_n1
    loc_n1, variance_n1 = np.where(swapped, other_n1, loc_n1), np.where(swapped, other_variance_n1, variance_n1)
    return loc_n1[:, 0], np.sqrt(variance_n1[:, 0])
