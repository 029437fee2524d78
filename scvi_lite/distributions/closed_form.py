r"""The closed-form gradients of :mod:`scvi_lite.distributions.fused`, for every device and precision.

**Rates.** With the log library :math:`\ell_n` and logits :math:`y_{ng}`,
:math:`\log\mu_{ng} = \ell_n + \log\mathrm{softmax}(y)_{ng}`. A gradient :math:`G_{ng}` with respect to :math:`\log\mu`
becomes :math:`\sum_g G_{ng}` for :math:`\ell_n` and :math:`G_{ng} - \mathrm{softmax}(y)_{ng} \sum_h G_{nh}` for y.

**Zeros**, the dense part. Write r = mu / theta. Then -t, with t = theta log(1 + r), is the log-probability of a zero
count under the negative binomial. Its derivatives: dt/dlog mu = h = mu / (1 + r) and dt/dlog theta = t - h.
With zero inflation pi (a logit) and the sigmoid S, a zero has log-probability log S(pi) - log S(t + pi), whose
derivatives are S(t + pi) - 1 for t and S(t + pi) - S(pi) for pi.

**Non-zeros**, the sparse part, overwrite the dense one. With d = log mu - log theta and the digamma function psi,
``nb_log_prob`` has derivatives x - (x + theta) S(d) =: m for log mu, and
theta (psi(x + theta) - psi(theta) - log(1 + r)) - m for log theta; zero inflation adds log(1 - S(pi)).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

from scvi_lite.distributions.counts import digamma_rise, nb_log_prob, poisson_log_prob, safe_theta

Parts = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]
"""Zeros summed over genes (n,), non-zeros (m,), derivatives with respect to log mu, log theta, dropout: (n, g)."""
PartsOf = Callable[..., Parts]


def value_and_derivatives(
    parts: PartsOf,
    row_m: Tensor,
    col_m: Tensor,
    x_m: Tensor,
    logit_ng: Tensor,
    library_n: Tensor | None,
    log_theta: Tensor | None,
    dropout_ng: Tensor | None,
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """Value (n,), and its derivatives with respect to logit, library, log theta (n, g) and dropout."""
    at_m = row_m * logit_ng.shape[1] + col_m
    # At the non-zeros large numbers cancel one another: doubles, where the device has them.
    wide = torch.float32 if logit_ng.is_mps else torch.float64
    mu_ng, log_mu_m = _rates(logit_ng, library_n, row_m, at_m, wide)
    log_theta_m = None
    if log_theta is not None:
        log_theta_m = (log_theta[col_m] if log_theta.ndim == 1 else log_theta.reshape(-1)[at_m]).to(wide)
    nonzero = _NonZero(at_m, x_m.to(wide), log_mu_m, log_theta_m)
    zero_n, nonzero_m, dmu_ng, dtheta_ng, ddropout_ng = parts(nonzero, mu_ng, log_theta, dropout_ng)
    dlibrary_n = None
    if library_n is not None:
        dlibrary_n = dmu_ng.sum(1)
        # mu / exp(library) is the softmax; the clamp keeps a library that underflows from making 0 * inf.
        dmu_ng.addcmul_(mu_ng, (dlibrary_n * library_n.clamp(-80, 80).neg().exp())[:, None], value=-1)
    value_n = zero_n.index_add(0, row_m, nonzero_m.to(zero_n.dtype))
    return value_n, (dmu_ng, dlibrary_n, dtheta_ng, ddropout_ng)


@dataclass
class _NonZero:
    at_m: Tensor  #: position in the flat (n, g) matrix
    x_m: Tensor
    log_mu_m: Tensor
    log_theta_m: Tensor | None

    def write(self, value_m: Tensor | float, out_ng: Tensor) -> None:
        flat = out_ng.view(-1)
        if isinstance(value_m, Tensor):
            flat.index_copy_(0, self.at_m, value_m.to(flat.dtype))
        else:
            flat.index_fill_(0, self.at_m, value_m)


def _rates(
    logit_ng: Tensor, library_n: Tensor | None, row_m: Tensor, at_m: Tensor, wide: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The mean everywhere, and its logarithm (which does not underflow) at the non-zeros."""
    log_mu_m = logit_ng.reshape(-1)[at_m].to(wide)
    if library_n is None:
        return logit_ng.exp(), log_mu_m
    top_n = logit_ng.amax(1)
    mu_ng = torch.sub(logit_ng, top_n[:, None]).exp_()
    shift_n = library_n.to(wide) - mu_ng.sum(1).to(wide).log()
    return mu_ng.mul_(shift_n.exp().to(mu_ng.dtype)[:, None]), log_mu_m + (shift_n - top_n)[row_m]


def poisson_parts(nonzero: _NonZero, mu_ng: Tensor, log_theta: None, dropout_ng: None) -> Parts:
    """Of a Poisson."""
    x_m, log_mu_m = nonzero.x_m, nonzero.log_mu_m
    dmu_ng = mu_ng.neg()
    nonzero.write(0.0, dmu_ng)
    zero_n = dmu_ng.sum(1)
    nonzero.write(x_m - log_mu_m.exp(), dmu_ng)
    return zero_n, poisson_log_prob(x_m, log_mu_m), dmu_ng, None, None


def nb_parts(nonzero: _NonZero, mu_ng: Tensor, log_theta: Tensor, dropout_ng: None) -> Parts:
    """Of a negative binomial."""
    t_ng, h_ng = _nb_zero(mu_ng, log_theta)
    nonzero_m, dmu_m, dtheta_m = _nb_nonzero(nonzero)
    dtheta_ng = h_ng - t_ng
    nonzero.write(dtheta_m, dtheta_ng)
    nonzero.write(0.0, t_ng)
    dmu_ng = h_ng.neg_()
    nonzero.write(dmu_m, dmu_ng)
    return t_ng.sum(1).neg_(), nonzero_m, dmu_ng, dtheta_ng, None


def zinb_parts(nonzero: _NonZero, mu_ng: Tensor, log_theta: Tensor, dropout_ng: Tensor) -> Parts:
    """Of a zero-inflated negative binomial."""
    t_ng, h_ng = _nb_zero(mu_ng, log_theta)
    nonzero_m, dmu_m, dtheta_m = _nb_nonzero(nonzero)
    # The clamp keeps both sigmoids away from 0.
    prior_ng = dropout_ng.clamp(min=-40.0)
    posterior_ng = torch.add(prior_ng, t_ng).sigmoid_()
    pi_m = dropout_ng.reshape(-1)[nonzero.at_m]
    prior_ng.sigmoid_()
    zero_ng = torch.div(prior_ng, posterior_ng).log_()
    nonzero.write(0.0, zero_ng)
    ddropout_ng = torch.sub(posterior_ng, prior_ng, out=prior_ng)
    nonzero.write(-pi_m.sigmoid(), ddropout_ng)
    dt_ng = posterior_ng.sub_(1)
    dtheta_ng = t_ng.sub_(h_ng).mul_(dt_ng)
    nonzero.write(dtheta_m, dtheta_ng)
    dmu_ng = h_ng.mul_(dt_ng)
    nonzero.write(dmu_m, dmu_ng)
    return zero_ng.sum(1), nonzero_m - softplus(pi_m), dmu_ng, dtheta_ng, ddropout_ng


def _nb_zero(mu_ng: Tensor, log_theta: Tensor) -> tuple[Tensor, Tensor]:
    """t and h of the module's docstring."""
    # Below exp(-40) theta is nothing beside any mean, and mu / theta might overflow.
    theta = log_theta.clamp(-40.0, 40.0).exp()
    r_ng = mu_ng / theta
    t_ng = r_ng.log1p().mul_(theta)
    return t_ng, torch.div(mu_ng, r_ng.add_(1), out=r_ng)


def _nb_nonzero(nonzero: _NonZero) -> tuple[Tensor, Tensor, Tensor]:
    """Value and derivatives with respect to log mu and log theta."""
    x_m, log_mu_m, log_theta_m = nonzero.x_m, nonzero.log_mu_m, nonzero.log_theta_m
    theta_m, d_m = safe_theta(log_theta_m), log_mu_m - log_theta_m
    dmu_m = x_m - (x_m + theta_m) * d_m.sigmoid()
    dtheta_m = theta_m * (digamma_rise(x_m, theta_m) - softplus(d_m)) - dmu_m
    return nb_log_prob(x_m, log_mu_m, log_theta_m), dmu_m, dtheta_m
