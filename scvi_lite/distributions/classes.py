"""Distributions of counts as ``torch.distributions``: what a trained model hands to its users.

The log-probabilities are those of :mod:`scvi_lite.distributions.counts`.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Size, Tensor, distributions
from torch.distributions import constraints
from torch.distributions.utils import broadcast_all

from scvi_lite.distributions.counts import nb_log_prob, normal_log_prob, poisson_log_prob, zinb_log_prob
from scvi_lite.errors import warn

# A mean of zero has a log; what it says of positive counts is as good as impossible.
TINY = 1e-30
# torch.poisson draws beyond the integers that it can hold when a rate is larger.
MAX_RATE = 1e8


class NegativeBinomial(distributions.Distribution):
    """Negative binomial with mean ``mu`` and inverse dispersion ``theta``: variance mu + mu² / theta.

    Parameters
    ----------
    total_count, probs, logits
        One way to say it: ``total_count`` (theta), and the probability of success (or its logit) such that
        mu = total_count · probs / (1 - probs).
    mu, theta
        The other way.
    scale
        Expected proportions, carried along for :meth:`get_normalized`.
    validate_args
        Whether to check the parameters and the values that are scored.

    Raises
    ------
    ValueError
        If the parameters mix the two ways, or name neither in full.

    Examples
    --------
    >>> nb = NegativeBinomial(mu=torch.tensor([1.0, 2.0]), theta=torch.tensor(2.0))
    >>> nb.mean, nb.variance
    (tensor([1., 2.]), tensor([1.5000, 4.0000]))
    >>> nb.log_prob(torch.tensor(0.0))
    tensor([-0.8109, -1.3863])
    """

    arg_constraints: ClassVar[dict[str, Any]] = {
        "mu": constraints.greater_than_eq(0),
        "theta": constraints.greater_than_eq(0),
    }
    support = constraints.nonnegative_integer

    def __init__(
        self,
        total_count: Tensor | None = None,
        probs: Tensor | None = None,
        logits: Tensor | None = None,
        mu: Tensor | None = None,
        theta: Tensor | None = None,
        scale: Tensor | None = None,
        validate_args: bool = False,
    ):
        mu, theta = _mu_theta(total_count, probs, logits, mu, theta)
        self.mu, self.theta = broadcast_all(mu, theta)
        self.scale = scale
        super().__init__(self.mu.shape, validate_args=validate_args)

    @property
    def mean(self) -> Tensor:
        """Expected counts."""
        return self.mu

    @property
    def variance(self) -> Tensor:
        """Variance of the counts."""
        return self.mu + self.mu**2 / self.theta

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-probability of each count; minus infinity below zero."""
        warn_outside(self, value)
        value = torch.as_tensor(value, dtype=self.mu.dtype, device=self.mu.device)
        return torch.where(value < 0, -torch.inf, self._log_prob(value.clamp(min=0)))

    def _log_prob(self, value: Tensor) -> Tensor:
        return nb_log_prob(value, log_rate(self.mu), log_rate(self.theta))

    @torch.no_grad()
    def sample(self, sample_shape: Size | list[int] | tuple[int, ...] | None = None) -> Tensor:
        """Draw counts: ``sample_shape`` followed by the shape of ``mu``."""
        shape = self._extended_shape(extend(sample_shape))
        return draw_counts(self.mu.expand(shape), self.theta.expand(shape))

    def get_normalized(self, key: str) -> Tensor:
        """Expected proportions (``"scale"``) or expected counts (``"mu"``)."""
        return normalized(key, scale=self.scale, mu=self.mu)

    def __repr__(self) -> str:
        return describe(self, "mu", "theta", "scale")


class ZeroInflatedNegativeBinomial(NegativeBinomial):
    """Negative binomial of which a share, with logit ``zi_logits``, is replaced by zeros.

    ``mu`` is the mean before that, ``mean`` the mean after. For the other parameters see :class:`NegativeBinomial`.

    >>> zinb = ZeroInflatedNegativeBinomial(mu=torch.tensor(1.0), theta=torch.tensor(2.0), zi_logits=torch.tensor(0.0))
    >>> zinb.zi_probs, zinb.mean, zinb.variance
    (tensor(0.5000), tensor(0.5000), tensor(1.))
    """

    arg_constraints: ClassVar[dict[str, Any]] = {**NegativeBinomial.arg_constraints, "zi_logits": constraints.real}

    def __init__(
        self,
        total_count: Tensor | None = None,
        probs: Tensor | None = None,
        logits: Tensor | None = None,
        mu: Tensor | None = None,
        theta: Tensor | None = None,
        zi_logits: Tensor | None = None,
        scale: Tensor | None = None,
        validate_args: bool = False,
    ):
        if zi_logits is None:
            raise ValueError("zi_logits is missing: give the logit of a count being replaced by zero.")
        mu, theta = _mu_theta(total_count, probs, logits, mu, theta)
        mu, theta, self.zi_logits = broadcast_all(mu, theta, zi_logits)
        super().__init__(mu=mu, theta=theta, scale=scale, validate_args=validate_args)

    @property
    def zi_probs(self) -> Tensor:
        """Probability that a count is replaced by zero."""
        return self.zi_logits.sigmoid()

    @property
    def mean(self) -> Tensor:
        """Expected counts, with the extra zeros."""
        return (-self.zi_logits).sigmoid() * self.mu

    @property
    def variance(self) -> Tensor:
        """Variance of the counts, with the extra zeros."""
        return self.mean * (1 + self.mu * (self.zi_probs + 1 / self.theta))

    def _log_prob(self, value: Tensor) -> Tensor:
        return zinb_log_prob(value, log_rate(self.mu), log_rate(self.theta), self.zi_logits)

    @torch.no_grad()
    def sample(self, sample_shape: Size | list[int] | tuple[int, ...] | None = None) -> Tensor:
        """Draw counts: ``sample_shape`` followed by the shape of ``mu``."""
        counts = super().sample(sample_shape)
        return counts.masked_fill(torch.rand_like(counts) < self.zi_probs, 0.0)

    def __repr__(self) -> str:
        return describe(self, "mu", "theta", "zi_logits", "scale")


class Poisson(distributions.Poisson):
    """Poisson that carries the expected proportions ``scale`` along for :meth:`get_normalized`.

    >>> Poisson(torch.tensor(1.0)).log_prob(torch.tensor(0.0))
    tensor(-1.)
    """

    def __init__(self, rate: Tensor, validate_args: bool | None = None, scale: Tensor | None = None):
        super().__init__(rate, validate_args=validate_args)
        self.scale = scale

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-probability of each count; minus infinity below zero."""
        if self._validate_args:
            self._validate_sample(value)
        value = torch.as_tensor(value, dtype=self.rate.dtype, device=self.rate.device)
        return torch.where(value < 0, -torch.inf, poisson_log_prob(value.clamp(min=0), log_rate(self.rate)))

    def get_normalized(self, key: str) -> Tensor:
        """Expected proportions (``"scale"``) or expected counts (``"mu"``, ``"rate"``)."""
        return normalized(key, scale=self.scale, mu=self.rate, rate=self.rate)


class Normal(distributions.Normal):
    """Normal with mean ``mu`` and standard deviation ``scale``.

    ``normal_mu``, the expected expression, is carried along for :meth:`get_normalized`.

    >>> Normal(torch.tensor(0.0), torch.tensor(1.0)).log_prob(torch.tensor(0.0))
    tensor(-0.9189)
    """

    def __init__(self, mu: Tensor, scale: Tensor, validate_args: bool | None = None, normal_mu: Tensor | None = None):
        super().__init__(mu, scale, validate_args=validate_args)
        self.normal_mu = normal_mu

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density of each value."""
        if self._validate_args:
            self._validate_sample(value)
        return normal_log_prob(
            torch.as_tensor(value, dtype=self.loc.dtype, device=self.loc.device), self.loc, self.scale
        )

    def get_normalized(self, key: str) -> Tensor:
        """Expected expression (``"scale"`` or ``"mu"``)."""
        return normalized(key, scale=self.normal_mu, mu=self.normal_mu)


def _mu_theta(
    total_count: Tensor | None, probs: Tensor | None, logits: Tensor | None, mu: Tensor | None, theta: Tensor | None
) -> tuple[Tensor, Tensor]:
    given = dict(total_count=total_count, probs=probs, logits=logits, mu=mu, theta=theta)
    names = [name for name, value in given.items() if value is not None]
    if names == ["mu", "theta"]:
        return mu, theta
    if names == ["total_count", "logits"]:
        return total_count * torch.as_tensor(logits).exp(), total_count
    if names == ["total_count", "probs"]:
        return total_count * probs / (1 - probs), total_count
    raise ValueError(
        f"A negative binomial takes mu and theta, or total_count and one of probs and logits; found "
        f"{', '.join(names) or 'none of them'}."
    )


def log_rate(rate: Tensor) -> Tensor:
    """Logarithm, of zero too: finite."""
    return rate.clamp(min=TINY).log()


def draw_counts(mu: Tensor, theta: Tensor) -> Tensor:
    """Draw the rate of a Poisson from a gamma with mean mu and shape theta, then the count."""
    # A gamma with tiny shape underflows to zero, which is the count that it would give anyway.
    rate = torch._standard_gamma(theta) * (mu / theta)
    return torch.poisson(rate.clamp(max=MAX_RATE))


def warn_outside(distribution: distributions.Distribution, value: Tensor) -> None:
    """Warn of values that the distribution cannot give, where it was made to check them; they are scored all the same.

    So scripts that score values which are not quite counts go on.
    """
    if distribution._validate_args and not distribution.support.check(torch.as_tensor(value)).all():
        warn(f"The value argument must be within the support of {type(distribution).__name__}, and some is not.")


def extend(sample_shape: Size | list[int] | tuple[int, ...] | None) -> Size:
    """The shape of several draws; None for one."""
    return Size(() if sample_shape is None else sample_shape)


def normalized(key: str, **known: Tensor | None) -> Tensor:
    """What ``get_normalized`` gives: one of the parts that the distribution was made with.

    Raises
    ------
    ValueError
        If there is no such part, or it was not given.
    """
    if key not in known:
        raise ValueError(f"get_normalized knows {', '.join(map(repr, known))}; found {key!r}.")
    value = known[key]
    if value is None:
        raise ValueError(
            f"This distribution was made without what get_normalized({key!r}) gives: pass it when making it."
        )
    return value


def describe(distribution: distributions.Distribution, *names: str) -> str:
    """The shapes of the parameters in one line."""
    shapes = [f"{n}: {tuple(v.shape)}" for n in names if (v := getattr(distribution, n)) is not None]
    return f"{type(distribution).__name__}({', '.join(shapes)})"
