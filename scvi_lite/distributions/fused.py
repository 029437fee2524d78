r"""Log-likelihood of a minibatch of sparse counts, with closed-form gradients: the form used in training.

Each function takes the coordinates of the non-zero counts and what a decoder says, and gives one number per cell. The
gradient with respect to every input is computed beside the value. As the value is one number per cell, going backward
is nothing but scaling the rows of that gradient.

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

The same formulas without closed-form gradients are in :mod:`scvi_lite.distributions.counts`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from scvi_lite._triton import gpu_kernels
from scvi_lite.data.batch import Counts, rows_of
from scvi_lite.distributions.counts import digamma_rise, nb_log_prob, poisson_log_prob, safe_theta

KERNELS = "scvi_lite.distributions.triton_kernels"


def zinb(counts: Counts, logit_ng: Tensor, library_n: Tensor | None, log_theta: Tensor, dropout_ng: Tensor) -> Tensor:
    """Log-likelihood of each cell under a zero-inflated negative binomial: (n,).

    Parameters
    ----------
    counts
        The counts of n cells by g genes; they need not be integers.
    logit_ng
        (n, g): the log of the expected proportions, up to a constant for each cell.
    library_n
        (n,): log of the expected total count. ``None`` says that ``logit_ng`` is the log mean itself.
    log_theta
        (g,) or (n, g): log inverse dispersion.
    dropout_ng
        (n, g): logit of the probability that a count is replaced by zero.

    Gradients reach the four tensors. Half precision is computed, and answered, in float32.

    >>> counts = Counts.from_dense(torch.tensor([[0.0, 3.0]]))
    >>> zinb(counts, torch.zeros(1, 2), torch.ones(1), torch.zeros(2), torch.zeros(1, 2))
    tensor([-3.5455])
    """
    return _score(_zinb_parts, counts, logit_ng, library_n, log_theta, dropout_ng)


def nb(counts: Counts, logit_ng: Tensor, library_n: Tensor | None, log_theta: Tensor) -> Tensor:
    """Log-likelihood of each cell under a negative binomial: (n,). See :func:`zinb` for the arguments.

    >>> counts = Counts.from_dense(torch.tensor([[0.0, 3.0]]))
    >>> nb(counts, torch.zeros(1, 2), torch.ones(1), torch.zeros(2))
    tensor([-3.3709])
    """
    return _score(_nb_parts, counts, logit_ng, library_n, log_theta, None)


def poisson(counts: Counts, logit_ng: Tensor, library_n: Tensor | None) -> Tensor:
    """Log-likelihood of each cell under a Poisson: (n,). See :func:`zinb` for the arguments.

    >>> counts = Counts.from_dense(torch.tensor([[0.0, 3.0]]))
    >>> poisson(counts, torch.zeros(1, 2), torch.ones(1))
    tensor([-3.5895])
    """
    return _score(_poisson_parts, counts, logit_ng, library_n, None, None)


def _score(
    parts: Callable[..., Parts],
    counts: Counts,
    logit_ng: Tensor,
    library_n: Tensor | None,
    log_theta: Tensor | None,
    dropout_ng: Tensor | None,
) -> Tensor:
    if tuple(logit_ng.shape[-2:]) != (counts.n_cells, counts.n_features):
        raise ValueError(
            f"logit_ng has shape {tuple(logit_ng.shape)}, but the counts are {counts.n_cells} cells by "
            f"{counts.n_features} features: decode the same cells and features that are scored."
        )
    if logit_ng.dim() > 2:
        return _score_draws(parts, counts, logit_ng, library_n, log_theta, dropout_ng)
    if log_theta is not None and is_triton_for(logit_ng) and (kernels := gpu_kernels(KERNELS)) is not None:
        return _ScoreDense.apply(kernels, counts.x_ng, logit_ng, library_n, log_theta, dropout_ng)
    dtype = torch.promote_types(logit_ng.dtype, torch.float32)
    inputs = as_inputs(dtype, logit_ng, library_n, log_theta, dropout_ng)
    coordinates = counts.start, counts.col_m, counts.value_m.to(dtype)
    return _Score.apply(parts, *coordinates, *inputs)


def _score_draws(
    parts: Callable[..., Parts],
    counts: Counts,
    logit_sng: Tensor,
    library_sn: Tensor | None,
    log_theta: Tensor | None,
    dropout_sng: Tensor | None,
) -> Tensor:
    """Log-likelihood (s, n) of the same counts under several draws of the rates."""
    s, n, g = logit_sng.shape
    inputs = [logit_sng, None if library_sn is None else library_sn.expand(s, n), log_theta, dropout_sng]
    given = [t for t in inputs if t is not None]
    plain = all(t.device.type == "cpu" and t.dtype == torch.float32 for t in given)
    if plain and not (torch.is_grad_enabled() and any(t.requires_grad for t in given)):
        from scvi_lite.distributions import kernels

        logit, library, theta, dropout = (t if _shared(t, log_theta) else t.flatten(0, 1) for t in inputs)
        return kernels.score(
            counts.start, counts.col_m, counts.value_m.float(), logit, library, theta, dropout, weight_n=None
        )[0].view(s, n)
    draws = [[t if _shared(t, log_theta) else t[i] for t in inputs] for i in range(s)]
    return torch.stack([_score(parts, counts, *one) for one in draws])


def _shared(tensor: Tensor | None, log_theta: Tensor | None) -> bool:
    """Whether a parameter is the same in all draws: one that is absent, or a dispersion without their dimension."""
    return tensor is None or (tensor is log_theta and tensor.dim() < 3)


class _Score(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        parts: Callable[..., Parts],
        start: Tensor,
        col_m: Tensor,
        x_m: Tensor,
        logit_ng: Tensor,
        library_n: Tensor | None,
        log_theta: Tensor | None,
        dropout_ng: Tensor | None,
    ) -> Tensor:
        inputs = logit_ng, library_n, log_theta, dropout_ng
        ctx.compiled = is_compiled_for(logit_ng)
        if ctx.compiled:
            from scvi_lite.distributions import kernels

            weight_n = foreseen(logit_ng[:, 0]) if any(ctx.needs_input_grad) else None
            value_n, derivatives = kernels.score(start, col_m, x_m, *inputs, weight_n)
            ctx.save_for_backward(start, col_m, x_m, *inputs, *derivatives)
        else:
            value_n, derivatives = _value_and_derivatives(parts, rows_of(start, col_m), col_m, x_m, *inputs)
            ctx.save_for_backward(*derivatives)
        ctx.theta_per_gene = log_theta is not None and log_theta.ndim == 1
        return value_n

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, up_n: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.compiled:
            inputs, derivatives = ctx.saved_tensors[:7], list(ctx.saved_tensors[7:])
            share = share_of_foreseen(up_n)
            if share is None:
                from scvi_lite.distributions import kernels

                derivatives = list(kernels.score(*(*inputs, up_n))[1])
            elif share != 1:
                derivatives = [None if d is None else d * share for d in derivatives]
        else:
            dlogit_ng, dlibrary_n, dtheta_ng, ddropout_ng = ctx.saved_tensors
            dtheta = None
            if dtheta_ng is not None:
                dtheta = up_n @ dtheta_ng if ctx.theta_per_gene else dtheta_ng * up_n[:, None]
            derivatives = [
                dlogit_ng * up_n[:, None],
                None if dlibrary_n is None else dlibrary_n * up_n,
                dtheta,
                None if ddropout_ng is None else ddropout_ng * up_n[:, None],
            ]
        needed = ctx.needs_input_grad[4:]
        return *(None,) * 4, *(d if need else None for d, need in zip(derivatives, needed, strict=True))


class _ScoreDense(torch.autograd.Function):
    """The same by the kernels of a GPU, which read half precision themselves and keep no gradient between."""

    @staticmethod
    def forward(ctx: Any, kernels: Any, x_ng: Tensor, *inputs: Tensor | None) -> Tensor:
        inputs = tuple(None if t is None else t.contiguous() for t in inputs)
        value_n, *sums = kernels.forward(x_ng, *inputs)
        ctx.kernels = kernels
        ctx.save_for_backward(x_ng, *inputs, *sums)
        return value_n

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, up_n: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *ctx.kernels.backward(*ctx.saved_tensors, up_n.contiguous())


def as_inputs(dtype: torch.dtype, *tensors: Tensor | None) -> list[Tensor | None]:
    """Tensors in the precision of the likelihood, without gradients where none are asked for: a Function cannot see."""
    asked = torch.is_grad_enabled()
    return [None if t is None else (t if asked else t.detach()).to(dtype) for t in tensors]


def is_compiled_for(logit_ng: Tensor) -> bool:
    """Whether Numba computes what PyTorch computes elsewhere."""
    return not torch.compiler.is_compiling() and logit_ng.device.type == "cpu" and logit_ng.dtype == torch.float32


def is_triton_for(logit_ng: Tensor) -> bool:
    """Whether Triton computes it, where it can."""
    return not torch.compiler.is_compiling() and logit_ng.is_cuda and logit_ng.dtype != torch.float64


def foreseen(value_n: Tensor) -> Tensor:
    """What comes back to each cell's log-likelihood where minus their mean is descended, as by nearly every loss."""
    return torch.full_like(value_n, -1 / max(1, value_n.shape[0]))


def share_of_foreseen(up_n: Tensor) -> float | None:
    """What came back as a multiple of what was foreseen; None if that is not the same for all cells."""
    if up_n.shape[0] == 0 or not bool((up_n == up_n[0]).all()):
        return None
    return float(up_n[0] / foreseen(up_n)[0])


def _value_and_derivatives(
    parts: Callable[..., Parts],
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


Parts = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]
"""Zeros summed over genes (n,), non-zeros (m,), derivatives with respect to log mu, log theta, dropout: (n, g)."""


def _poisson_parts(nonzero: _NonZero, mu_ng: Tensor, log_theta: None, dropout_ng: None) -> Parts:
    x_m, log_mu_m = nonzero.x_m, nonzero.log_mu_m
    dmu_ng = mu_ng.neg()
    nonzero.write(0.0, dmu_ng)
    zero_n = dmu_ng.sum(1)
    nonzero.write(x_m - log_mu_m.exp(), dmu_ng)
    return zero_n, poisson_log_prob(x_m, log_mu_m), dmu_ng, None, None


def _nb_parts(nonzero: _NonZero, mu_ng: Tensor, log_theta: Tensor, dropout_ng: None) -> Parts:
    t_ng, h_ng = _nb_zero(mu_ng, log_theta)
    nonzero_m, dmu_m, dtheta_m = _nb_nonzero(nonzero)
    dtheta_ng = h_ng - t_ng
    nonzero.write(dtheta_m, dtheta_ng)
    nonzero.write(0.0, t_ng)
    dmu_ng = h_ng.neg_()
    nonzero.write(dmu_m, dmu_ng)
    return t_ng.sum(1).neg_(), nonzero_m, dmu_ng, dtheta_ng, None


def _zinb_parts(nonzero: _NonZero, mu_ng: Tensor, log_theta: Tensor, dropout_ng: Tensor) -> Parts:
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
