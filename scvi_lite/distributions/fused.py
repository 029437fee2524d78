"""Log-likelihood of a minibatch of sparse counts, with closed-form gradients: the form used in training.

Each function takes the coordinates of the non-zero counts and what a decoder says, and gives one number per cell. The
gradient with respect to every input is computed beside the value. As the value is one number per cell, going backward
is nothing but scaling the rows of that gradient.

The formulas are in :mod:`scvi_lite.distributions.closed_form`, and without closed-form gradients in
:mod:`scvi_lite.distributions.counts`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from scvi_lite._triton import gpu_kernels
from scvi_lite.data.batch import Counts, rows_of
from scvi_lite.distributions import closed_form

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
    return _score(closed_form.zinb_parts, counts, logit_ng, library_n, log_theta, dropout_ng)


def nb(counts: Counts, logit_ng: Tensor, library_n: Tensor | None, log_theta: Tensor) -> Tensor:
    """Log-likelihood of each cell under a negative binomial: (n,). See :func:`zinb` for the arguments.

    >>> counts = Counts.from_dense(torch.tensor([[0.0, 3.0]]))
    >>> nb(counts, torch.zeros(1, 2), torch.ones(1), torch.zeros(2))
    tensor([-3.3709])
    """
    return _score(closed_form.nb_parts, counts, logit_ng, library_n, log_theta, None)


def poisson(counts: Counts, logit_ng: Tensor, library_n: Tensor | None) -> Tensor:
    """Log-likelihood of each cell under a Poisson: (n,). See :func:`zinb` for the arguments.

    >>> counts = Counts.from_dense(torch.tensor([[0.0, 3.0]]))
    >>> poisson(counts, torch.zeros(1, 2), torch.ones(1))
    tensor([-3.5895])
    """
    return _score(closed_form.poisson_parts, counts, logit_ng, library_n, None, None)


def _score(
    parts: closed_form.PartsOf,
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
    parts: closed_form.PartsOf,
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
        parts: closed_form.PartsOf,
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
            value_n, derivatives = closed_form.value_and_derivatives(parts, rows_of(start, col_m), col_m, x_m, *inputs)
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
