"""The beta-binomial: successes among trials whose probability varies (Skellam 1948, J. R. Stat. Soc. B 10, 257)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Size, Tensor, distributions
from torch.distributions import constraints
from torch.distributions.utils import broadcast_all

from scvi_lite.distributions.classes import describe, extend


class BetaBinomial(distributions.Distribution):
    """Successes among ``total_count`` trials whose probability is drawn from a beta distribution.

    Parameters
    ----------
    total_count
        Number of trials.
    alpha, beta
        Shapes of the beta distribution.
    mu, gamma
        Instead of them, its mean alpha / (alpha + beta), and the correlation 1 / (alpha + beta + 1) of two trials.
    validate_args
        Whether to check the parameters and the values that are scored.
    eps
        Least shape.

    Raises
    ------
    ValueError
        If the parameters mix the two ways, or name neither in full.

    Examples
    --------
    >>> one = torch.tensor(1.0)
    >>> even = BetaBinomial(total_count=torch.tensor(3.0), alpha=one, beta=one)  # 0, 1, 2 or 3, all alike
    >>> even.mean, even.log_prob(torch.tensor(2.0)).exp()
    (tensor(1.5000), tensor(0.2500))
    """

    arg_constraints: ClassVar[dict[str, Any]] = {
        "total_count": constraints.nonnegative_integer,
        "alpha": constraints.positive,
        "beta": constraints.positive,
    }

    def __init__(
        self,
        total_count: Tensor,
        alpha: Tensor | None = None,
        beta: Tensor | None = None,
        mu: Tensor | None = None,
        gamma: Tensor | None = None,
        validate_args: bool = False,
        eps: float = 1e-8,
    ):
        given = {"alpha": alpha, "beta": beta, "mu": mu, "gamma": gamma}
        names = [name for name, value in given.items() if value is not None]
        if names == ["mu", "gamma"]:
            both = 1 / torch.as_tensor(gamma) - 1
            alpha, beta = mu * both, (1 - mu) * both
        elif names != ["alpha", "beta"]:
            raise ValueError(
                f"A beta-binomial takes alpha and beta, or mu and gamma; found {', '.join(names) or 'none of them'}."
            )
        self.total_count, alpha, beta = broadcast_all(total_count, alpha, beta)
        self.alpha, self.beta = alpha.clamp(min=eps), beta.clamp(min=eps)
        super().__init__(self.alpha.shape, validate_args=validate_args)

    @constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self) -> constraints.Constraint:
        """Whole numbers up to ``total_count``."""
        return constraints.integer_interval(0, self.total_count)

    @property
    def mean(self) -> Tensor:
        """Expected successes."""
        return self.total_count * self.alpha / (self.alpha + self.beta)

    @property
    def variance(self) -> Tensor:
        """Variance of the successes."""
        both = self.alpha + self.beta
        return self.mean * self.beta / both * (both + self.total_count) / (both + 1)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-probability of each number of successes: log choose(n, x) + log B(x + alpha, n - x + beta) - log B."""
        if self._validate_args:
            self._validate_sample(value)
        n, a, b = self.total_count, self.alpha, self.beta
        value = torch.as_tensor(value, dtype=a.dtype, device=a.device)
        choose = torch.lgamma(n + 1) - torch.lgamma(value + 1) - torch.lgamma(n - value + 1)
        return choose + _log_beta(value + a, n - value + b) - _log_beta(a, b)

    @torch.no_grad()
    def sample(self, sample_shape: Size | list[int] | tuple[int, ...] | None = None) -> Tensor:
        """Draw successes: ``sample_shape`` followed by the shape of the parameters."""
        probability = distributions.Beta(self.alpha, self.beta).sample(extend(sample_shape))
        return torch.binomial(self.total_count.expand(probability.shape), probability)

    def __repr__(self) -> str:
        return describe(self, "total_count", "alpha", "beta")


def _log_beta(a: Tensor, b: Tensor) -> Tensor:
    return torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b)
