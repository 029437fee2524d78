"""Zero-inflated densities of expression values, and the log-normal of values that may be zero.

A value is replaced by zero with probability sigmoid(``zi_logits``): the inflation of Lopez et al. 2018,
https://doi.org/10.1038/s41592-018-0229-2, of a density instead of counts.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Size, Tensor, distributions
from torch.distributions import constraints
from torch.distributions.utils import broadcast_all
from torch.nn.functional import logsigmoid

from scvi_lite.distributions.classes import describe, extend, normalized, warn_outside


class ZeroInflated(distributions.Distribution):
    """A density of positive values of which a share, with logit ``zi_logits``, is replaced by zeros."""

    arg_constraints: ClassVar[dict[str, Any]] = {"zi_logits": constraints.real}
    support = constraints.nonnegative

    def __init__(self, base: distributions.Distribution, zi_logits: Tensor, validate_args: bool):
        self.base, self.zi_logits = base, zi_logits
        super().__init__(zi_logits.shape, validate_args=validate_args)

    @property
    def zi_probs(self) -> Tensor:
        """Probability that a value is replaced by zero."""
        return self.zi_logits.sigmoid()

    @property
    def mean(self) -> Tensor:
        """Expected values, with the zeros."""
        return (1 - self.zi_probs) * self.base.mean

    @property
    def variance(self) -> Tensor:
        """Variance of the values, with the zeros."""
        return (1 - self.zi_probs) * (self.base.variance + self.zi_probs * self.base.mean**2)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-probability of a zero, log-density of a positive value; minus infinity below zero."""
        warn_outside(self, value)
        value = torch.as_tensor(value, dtype=self.zi_logits.dtype, device=self.zi_logits.device)
        # Where the density is not asked for, it is taken at 1: there it and its gradient are finite.
        positive = logsigmoid(-self.zi_logits) + self.base.log_prob(torch.where(value > 0, value, 1.0))
        log_prob = torch.where(value == 0, logsigmoid(self.zi_logits), positive)
        return torch.where(value < 0, -torch.inf, log_prob)

    @torch.no_grad()
    def sample(self, sample_shape: Size | list[int] | tuple[int, ...] | None = None) -> Tensor:
        """Draw values: ``sample_shape`` followed by the shape of the parameters."""
        values = self.base.sample(extend(sample_shape))
        return values.masked_fill(torch.rand_like(values) < self.zi_probs, 0.0)


class ZeroInflatedGamma(ZeroInflated):
    """Gamma with mean concentration / rate, of which a share is replaced by zeros.

    ``scale``, the expected proportions, is carried along for :meth:`get_normalized`.

    >>> half, one, two = torch.tensor(0.0), torch.tensor(1.0), torch.tensor(2.0)
    >>> gamma = ZeroInflatedGamma(concentration=two, rate=one, zi_logits=half)
    >>> gamma.mean, gamma.log_prob(torch.tensor(0.0)).exp()
    (tensor(1.), tensor(0.5000))
    """

    def __init__(
        self,
        concentration: Tensor,
        rate: Tensor,
        zi_logits: Tensor,
        scale: Tensor | None = None,
        validate_args: bool = False,
    ):
        self.concentration, self.rate, zi_logits = broadcast_all(concentration, rate, zi_logits)
        self.scale = scale
        super().__init__(distributions.Gamma(self.concentration, self.rate, validate_args), zi_logits, validate_args)

    def get_normalized(self, key: str) -> Tensor:
        """Expected proportions (``"scale"``), or a parameter (``"concentration"``, ``"rate"``)."""
        return normalized(key, scale=self.scale, concentration=self.concentration, rate=self.rate)

    def __repr__(self) -> str:
        return describe(self, "concentration", "rate", "zi_logits", "scale")


class ZeroInflatedLogNormal(ZeroInflated):
    """Log-normal, log x ~ N(``mu``, ``scale``²), of which a share is replaced by zeros.

    ``normal_mu``, the expected expression, is carried along for :meth:`get_normalized`.

    >>> zero, one = torch.tensor(0.0), torch.tensor(1.0)
    >>> ZeroInflatedLogNormal(mu=zero, scale=one, zi_logits=zero).mean  # half of exp(1/2)
    tensor(0.8244)
    """

    def __init__(
        self,
        mu: Tensor,
        scale: Tensor,
        zi_logits: Tensor,
        normal_mu: Tensor | None = None,
        validate_args: bool = False,
    ):
        self.mu, self.scale, zi_logits = broadcast_all(mu, scale, zi_logits)
        self.normal_mu = normal_mu
        super().__init__(distributions.LogNormal(self.mu, self.scale, validate_args), zi_logits, validate_args)

    def get_normalized(self, key: str) -> Tensor:
        """Expected expression (``"scale"``), or the mean of the logarithm (``"mu"``)."""
        return normalized(key, scale=self.normal_mu, mu=self.mu)

    def __repr__(self) -> str:
        return describe(self, "mu", "scale", "zi_logits", "normal_mu")


class Log1pNormal(distributions.Distribution):
    """log(1 + x) ~ N(``mu``, ``sigma``²), for values x that may be zero.

    The moments are those before draws below zero are set to zero. ``scale`` is carried along for
    :meth:`get_normalized`.

    >>> Log1pNormal(mu=torch.tensor(0.0), sigma=torch.tensor(1.0)).log_prob(torch.tensor(0.0))
    tensor(-0.9189)
    """

    arg_constraints: ClassVar[dict[str, Any]] = {"mu": constraints.real, "sigma": constraints.positive}
    support = constraints.nonnegative

    def __init__(self, mu: Tensor, sigma: Tensor, scale: Tensor | None = None, validate_args: bool = False):
        self.mu, self.sigma = broadcast_all(mu, sigma)
        self.scale = scale
        self._above = distributions.LogNormal(self.mu, self.sigma, validate_args)  # of 1 + x
        super().__init__(self.mu.shape, validate_args=validate_args)

    @property
    def mean(self) -> Tensor:
        """exp(mu + sigma² / 2) - 1."""
        return self._above.mean - 1

    @property
    def variance(self) -> Tensor:
        """(exp(sigma²) - 1) exp(2 mu + sigma²)."""
        return self._above.variance

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density of each value; minus infinity below zero."""
        warn_outside(self, value)
        value = torch.as_tensor(value, dtype=self.mu.dtype, device=self.mu.device)
        return torch.where(value < 0, -torch.inf, self._above.log_prob(1 + value.clamp(min=0)))

    @torch.no_grad()
    def sample(self, sample_shape: Size | list[int] | tuple[int, ...] | None = None) -> Tensor:
        """Draw values: ``sample_shape`` followed by the shape of ``mu``."""
        return (self._above.sample(extend(sample_shape)) - 1).clamp(min=0)

    def get_normalized(self, key: str) -> Tensor:
        """Expected proportions (``"scale"``), or the mean of the logarithm (``"mu"``)."""
        return normalized(key, scale=self.scale, mu=self.mu)

    def __repr__(self) -> str:
        return describe(self, "mu", "sigma", "scale")
