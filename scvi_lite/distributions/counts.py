"""Log-likelihoods of counts, written like their formulas: the reference for everything faster.

All rates are on the log scale, so that a rate far below the smallest float is still a rate. The negative binomial is
the Gamma-Poisson mixture with mean mu and inverse dispersion theta (variance mu + mu²/theta); its zero-inflated form
follows Lopez et al., Nature Methods 15, 1053 (2018), https://doi.org/10.1038/s41592-018-0229-2.

Every function is element-wise, broadcasts its arguments and keeps their dtype. Counts need not be integers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import softplus

#: Outside, a negative binomial is a Poisson, or a zero, to the last digit; inside, nothing overflows a float32.
LOG_THETA_RANGE = (-80.0, 40.0)


def poisson_log_prob(x: Tensor, log_mu: Tensor) -> Tensor:
    """Log-probability of counts ``x`` under a Poisson with mean ``exp(log_mu)``.

    >>> poisson_log_prob(torch.tensor(0.0), torch.tensor(0.0))
    tensor(-1.)
    """
    return x * log_mu - log_mu.exp() - torch.lgamma(x + 1)


def nb_log_prob(x: Tensor, log_mu: Tensor, log_theta: Tensor) -> Tensor:
    """Log-probability of counts ``x`` under a negative binomial with mean ``exp(log_mu)``.

    With d = log mu - log theta::

        x d - (x + theta) softplus(d) + lgamma(x + theta) - lgamma(theta) - lgamma(x + 1)

    It tends to :func:`poisson_log_prob` as theta grows, without loss of digits.

    >>> nb_log_prob(torch.tensor(0.0), torch.tensor(0.0), torch.tensor(0.0)).exp()  # a geometric with mean 1
    tensor(0.5000)
    """
    theta = safe_theta(log_theta)
    s = softplus(log_mu - log_theta.clamp(*LOG_THETA_RANGE))
    return x * (log_mu - s) - theta * s + log_rising(x, theta) - torch.lgamma(x + 1)


def zinb_log_prob(x: Tensor, log_mu: Tensor, log_theta: Tensor, dropout_logit: Tensor) -> Tensor:
    """Log-probability of counts ``x`` under a zero-inflated negative binomial.

    A count is replaced by zero with probability sigmoid(pi), pi the ``dropout_logit``; ``log_mu`` is the log mean
    before that::

        x = 0:  softplus(-theta softplus(d) - pi) - softplus(-pi)
        x > 0:  nb_log_prob(x) - softplus(pi)

    >>> zinb_log_prob(torch.tensor(0.0), torch.tensor(0.0), torch.tensor(0.0), torch.tensor(0.0)).exp()
    tensor(0.7500)
    """
    nb = nb_log_prob(x, log_mu, log_theta)
    log_zero = -safe_theta(log_theta) * softplus(log_mu - log_theta.clamp(*LOG_THETA_RANGE))
    zero = softplus(log_zero - dropout_logit) - softplus(-dropout_logit)
    return torch.where(x == 0, zero, nb - softplus(dropout_logit))


def nb_mixture_log_prob(x: Tensor, log_mu1: Tensor, log_mu2: Tensor, log_theta: Tensor, logit: Tensor) -> Tensor:
    """Log-probability of counts ``x`` under a mixture of two negative binomials of the same inverse dispersion.

    The first, with mean ``exp(log_mu1)``, has probability S(pi), S the sigmoid and pi the ``logit``. What
    :func:`nb_log_prob` says of both alike stands outside of the sum::

        log(S(pi) exp(x (log mu1 - s1) - theta s1) + S(-pi) exp(x (log mu2 - s2) - theta s2)) + ...

    TOTALVI's model of proteins: Gayoso et al., Nature Methods 18, 272 (2021).

    >>> zero = torch.tensor(0.0)
    >>> nb_mixture_log_prob(zero, zero, zero, zero, zero).exp()
    tensor(0.5000)
    """
    theta, log_theta = safe_theta(log_theta), log_theta.clamp(*LOG_THETA_RANGE)
    s1, s2 = softplus(log_mu1 - log_theta), softplus(log_mu2 - log_theta)
    first = x * (log_mu1 - s1) - theta * s1 - softplus(-logit)
    second = x * (log_mu2 - s2) - theta * s2 - softplus(logit)
    return torch.logaddexp(first, second) + log_rising(x, theta) - torch.lgamma(x + 1)


def normal_log_prob(x: Tensor, mu: Tensor, scale: Tensor) -> Tensor:
    """Log-density of ``x`` under a normal with mean ``mu`` and standard deviation ``scale``.

    >>> normal_log_prob(torch.tensor(1.0), torch.tensor(1.0), torch.tensor(1.0))
    tensor(-0.9189)
    """
    return -0.5 * ((x - mu) / scale) ** 2 - scale.log() - 0.5 * math.log(2 * math.pi)


def safe_theta(log_theta: Tensor) -> Tensor:
    """exp(log_theta), kept where no later step overflows or underflows a float32."""
    return log_theta.clamp(*LOG_THETA_RANGE).exp()


def log_rising(x: Tensor, theta: Tensor) -> Tensor:
    """lgamma(x + theta) - lgamma(theta) - x log(theta).

    From theta = 100 the difference of two large numbers gives way to the difference of their Stirling series, whose
    first term left out is below 1e-13 (https://dlmf.nist.gov/5.11.E1).
    """
    low, high = theta.clamp(max=100.0), theta.clamp(min=100.0)
    end = x + high
    series = (end - 0.5) * torch.log1p(x / high) - x + (1 / end - 1 / high) / 12 - (end**-3 - high**-3) / 360
    return torch.where(theta < 100.0, torch.lgamma(x + low) - torch.lgamma(low) - x * low.log(), series)


def digamma_rise(x: Tensor, theta: Tensor) -> Tensor:
    """digamma(x + theta) - digamma(theta): the derivative of lgamma(x + theta) - lgamma(theta)."""
    low, high = theta.clamp(max=100.0), theta.clamp(min=100.0)
    end = x + high
    series = torch.log1p(x / high) - (1 / end - 1 / high) / 2 - (end**-2 - high**-2) / 12 + (end**-4 - high**-4) / 120
    return torch.where(theta < 100.0, torch.digamma(x + low) - torch.digamma(low), series)
