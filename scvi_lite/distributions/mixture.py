"""The mixture of two negative binomials as a ``torch.distributions.Distribution``."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Size, Tensor, distributions
from torch.distributions import constraints
from torch.distributions.utils import broadcast_all
from torch.nn.functional import softplus

from scvi_lite.distributions.classes import describe, draw_counts, extend, log_rate, warn_outside
from scvi_lite.distributions.counts import nb_log_prob


class NegativeBinomialMixture(distributions.Distribution):
    """Two negative binomials; ``mixture_logits`` is the logit of the first.

    TOTALVI's model of proteins, background and foreground: Gayoso et al., Nature Methods 18, 272 (2021),
    https://doi.org/10.1038/s41592-020-01050-x. ``theta2`` is ``theta1`` unless given.

    >>> one, two = torch.tensor(1.0), torch.tensor(2.0)
    >>> NegativeBinomialMixture(one, two, one, mixture_logits=torch.tensor(0.0)).mean
    tensor(1.5000)
    """

    arg_constraints: ClassVar[dict[str, Any]] = {
        "mu1": constraints.greater_than_eq(0),
        "mu2": constraints.greater_than_eq(0),
        "theta1": constraints.greater_than_eq(0),
        "mixture_logits": constraints.real,
    }
    support = constraints.nonnegative_integer

    def __init__(
        self,
        mu1: Tensor,
        mu2: Tensor,
        theta1: Tensor,
        mixture_logits: Tensor,
        theta2: Tensor | None = None,
        validate_args: bool = False,
    ):
        self.mu1, self.mu2, self.theta1, self.mixture_logits = broadcast_all(mu1, mu2, theta1, mixture_logits)
        self.theta2 = theta2 if theta2 is None else torch.as_tensor(theta2).expand_as(self.mu1)
        super().__init__(self.mu1.shape, validate_args=validate_args)

    @property
    def _second_theta(self) -> Tensor:
        return self.theta1 if self.theta2 is None else self.theta2

    @property
    def mixture_probs(self) -> Tensor:
        """Probability of the first part."""
        return self.mixture_logits.sigmoid()

    @property
    def mean(self) -> Tensor:
        """Expected counts."""
        return self.mixture_probs * self.mu1 + (1 - self.mixture_probs) * self.mu2

    @property
    def variance(self) -> Tensor:
        """Variance of the counts: within the parts, and between their means."""
        p = self.mixture_probs
        within1, within2 = self.mu1 + self.mu1**2 / self.theta1, self.mu2 + self.mu2**2 / self._second_theta
        return p * within1 + (1 - p) * within2 + p * (1 - p) * (self.mu1 - self.mu2) ** 2

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-probability of each count; minus infinity below zero."""
        warn_outside(self, value)
        value = torch.as_tensor(value, dtype=self.mu1.dtype, device=self.mu1.device)
        x, pi = value.clamp(min=0), self.mixture_logits
        first = nb_log_prob(x, log_rate(self.mu1), log_rate(self.theta1)) - softplus(-pi)
        second = nb_log_prob(x, log_rate(self.mu2), log_rate(self._second_theta)) - softplus(pi)
        return torch.where(value < 0, -torch.inf, torch.logaddexp(first, second))

    @torch.no_grad()
    def sample(self, sample_shape: Size | list[int] | tuple[int, ...] | None = None) -> Tensor:
        """Draw counts: ``sample_shape`` followed by the shape of ``mu1``."""
        first = torch.bernoulli(self.mixture_probs.expand(self._extended_shape(extend(sample_shape)))).bool()
        return draw_counts(torch.where(first, self.mu1, self.mu2), torch.where(first, self.theta1, self._second_theta))

    def __repr__(self) -> str:
        return describe(self, "mu1", "mu2", "theta1", "mixture_logits", "theta2")
