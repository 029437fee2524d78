"""What a decoder says about the counts of a minibatch, and how likely the counts are under it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from scvi_lite.data.batch import Counts
from scvi_lite.distributions import counts as reference
from scvi_lite.distributions import fused

if TYPE_CHECKING:
    from torch.distributions import Distribution

LIKELIHOODS = ("zinb", "nb", "poisson", "normal")


@dataclass
class Rates:
    """Parameters of the likelihood of counts, with optional leading sample dimensions.

    ``mu = exp(library) · scale``, where ``scale`` is the softmax of the decoder's output over genes or, with size
    factors, its softplus. NB and ZINB have mean ``mu`` and inverse dispersion ``theta``; the normal likelihood has
    standard deviation ``theta``.
    """

    likelihood: str
    logit_ng: Tensor  #: (..., n, g) decoder output
    library_n: Tensor  #: (..., n) log of the library size
    log_theta: Tensor | None = None  #: (g,) or (..., n, g)
    dropout_ng: Tensor | None = None  #: (..., n, g) logits of extra zeros
    proportions: bool = True  #: softmax over genes; else softplus

    @property
    def scale_ng(self) -> Tensor:
        """Expected expression for a library of one."""
        return self.logit_ng.softmax(-1) if self.proportions else F.softplus(self.logit_ng)

    @property
    def mu_ng(self) -> Tensor:
        """Expected counts, before dropout."""
        return self.library_n.exp().unsqueeze(-1) * self.scale_ng

    @property
    def log_mu_ng(self) -> Tensor:
        log_scale_ng = self.logit_ng.log_softmax(-1) if self.proportions else log_softplus(self.logit_ng)
        return self.library_n.unsqueeze(-1) + log_scale_ng

    def log_likelihood(self, counts: Counts) -> Tensor:
        """Log-probability of each cell's counts: (..., n)."""
        if self.likelihood == "normal":
            if self.logit_ng.dim() > 2:  # one draw at a time: each is dense
                return torch.stack([self.sample(i).log_likelihood(counts) for i in range(self.logit_ng.shape[0])])
            return reference.normal_log_prob(counts.x_ng, self.mu_ng, self.log_theta.exp()).sum(-1)
        logit_ng, library_n = (self.logit_ng, self.library_n) if self.proportions else (self.log_mu_ng, None)
        if self.likelihood == "poisson":
            return fused.poisson(counts, logit_ng, library_n)
        if self.likelihood == "nb":
            return fused.nb(counts, logit_ng, library_n, self.log_theta)
        return fused.zinb(counts, logit_ng, library_n, self.log_theta, self.dropout_ng)

    def sample(self, i: int) -> Rates:
        """The rates of one sample of several."""

        def pick(x: Tensor | None, n_dims: int) -> Tensor | None:
            return x if x is None or x.dim() <= n_dims else x[i]

        return replace(
            self,
            logit_ng=self.logit_ng[i],
            library_n=pick(self.library_n, 1),
            log_theta=pick(self.log_theta, 2),
            dropout_ng=pick(self.dropout_ng, 2),
        )

    def distribution(self) -> Distribution:
        """The likelihood as a ``torch.distributions`` object, to sample from and to look at."""
        from scvi_lite import distributions as d

        if self.likelihood == "poisson":
            return d.Poisson(self.mu_ng, scale=self.scale_ng)
        theta = self.log_theta.exp()
        if self.likelihood == "normal":
            return d.Normal(self.mu_ng, theta, normal_mu=self.scale_ng)
        if self.likelihood == "nb":
            return d.NegativeBinomial(mu=self.mu_ng, theta=theta, scale=self.scale_ng)
        return d.ZeroInflatedNegativeBinomial(
            mu=self.mu_ng, theta=theta, zi_logits=self.dropout_ng, scale=self.scale_ng
        )


def log_softplus(x: Tensor) -> Tensor:
    """``log(softplus(x))``, which tends to ``x`` where the softplus underflows."""
    return torch.where(x < -15, x, F.softplus(x.clamp(min=-15)).log())
