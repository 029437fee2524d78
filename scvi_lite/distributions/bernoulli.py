r"""Log-likelihood of open and closed chromatin (Ashuach et al. 2022, doi:10.1016/j.crmeth.2022.100182).

A region is open in a cell with probability :math:`p_{nr} = S(y_{nr})\, S(\delta_n)\, S(\varphi_r)`: accessibility,
depth of the cell, factor of the region; S is the sigmoid. Any count is open, none is closed.

**Ones** have log-probability :math:`\log S(y) + \log S(\delta) + \log S(\varphi)`; its derivatives are S(-y), S(-δ),
S(-φ).

**Zeros.** With c = S(δ) S(φ) and 1 - c = S(-δ) + S(δ) S(-φ), sums of positive numbers, the odds of an open region are
r = c / (exp(-y) + 1 - c), and :math:`\log(1 - p) = -\log(1 + r)` loses no digit, however small or near 1 p is. Its
derivatives are -r S(-y), -r S(-δ), -r S(-φ).

So with w = 1 at ones and -r at zeros, the gradients are w S(-y), S(-δ) Σ_r w and S(-φ) Σ_n w.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from scvi_lite.data.batch import Counts, rows_of
from scvi_lite.distributions.fused import as_inputs, foreseen, is_compiled_for, share_of_foreseen

#: From here on a region that is found closed is no less likely, so that its log-probability stays finite.
LARGEST_LOGIT = 80.0


def bernoulli_log_prob(
    x: Tensor, logit: Tensor, depth_logit: Tensor | None = None, factor_logit: Tensor | None = None
) -> Tensor:
    """Log-probability that a region is open (``x`` above 0) or closed: the reference, element-wise, all broadcast.

    >>> bernoulli_log_prob(torch.tensor([0.0, 3.0]), torch.zeros(2), torch.zeros(1)).exp()
    tensor([0.7500, 0.2500])
    """
    log_c = sum(logsigmoid(t) for t in (depth_logit, factor_logit) if t is not None) + torch.zeros_like(logit)
    r = log_c.exp() / (torch.exp(-logit.clamp(max=LARGEST_LOGIT)) - torch.expm1(log_c))
    return torch.where(x > 0, logsigmoid(logit) + log_c, -torch.log1p(r))


def bernoulli(
    counts: Counts, logit_nr: Tensor, depth_n: Tensor | None = None, factor_r: Tensor | None = None
) -> Tensor:
    """Log-likelihood of each cell: (n,), with gradients in closed form.

    Parameters
    ----------
    counts
        Of n cells by r regions; all that are not zero are open.
    logit_nr, depth_n, factor_r
        Logits of the accessibility, of the depth of each cell, and of the factor of each region; None for a factor
        of one.

    Gradients reach the three tensors. Half precision is computed, and answered, in float32.

    Raises
    ------
    ValueError
        If ``logit_nr`` has another shape than the counts.

    Examples
    --------
    >>> counts = Counts.from_dense(torch.tensor([[0.0, 3.0]]))
    >>> bernoulli(counts, torch.zeros(1, 2), torch.zeros(1)).exp()
    tensor([0.1875])
    """
    if tuple(logit_nr.shape) != (counts.n_cells, counts.n_features):
        raise ValueError(
            f"logit_nr has shape {tuple(logit_nr.shape)}, but the counts are {counts.n_cells} cells by "
            f"{counts.n_features} regions: decode the same cells and regions that are scored."
        )
    dtype = torch.promote_types(logit_nr.dtype, torch.float32)
    return _Bernoulli.apply(counts.start, counts.col_m, *as_inputs(dtype, logit_nr, depth_n, factor_r))


class _Bernoulli(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        start: Tensor,
        col_m: Tensor,
        logit_nr: Tensor,
        depth_n: Tensor | None,
        factor_r: Tensor | None,
    ) -> Tensor:
        n, n_regions = logit_nr.shape
        # A factor of one is the sigmoid of an infinite logit.
        depth = logit_nr.new_full((n,), torch.inf) if depth_n is None else depth_n
        factor = logit_nr.new_full((n_regions,), torch.inf) if factor_r is None else factor_r
        ctx.compiled, parts = is_compiled_for(logit_nr), (start, col_m, logit_nr, depth, factor)
        if ctx.compiled:
            from scvi_lite.distributions.binary_kernels import score

            weight_n = foreseen(depth) if any(ctx.needs_input_grad) else None
            value_n, dlogit_nr, w_r, w_n = score(*parts, weight_n)
            ctx.save_for_backward(*parts, dlogit_nr, w_r, w_n)
        else:
            value_n, dlogit_nr, w_nr, w_n = _value_and_derivatives(rows_of(start, col_m), *parts[1:])
            ctx.save_for_backward(*parts, dlogit_nr, w_nr, w_n)
        return value_n

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, up_n: Tensor) -> tuple[Tensor | None, ...]:
        parts, (dlogit_nr, w, w_n) = ctx.saved_tensors[:5], ctx.saved_tensors[5:]
        if ctx.compiled:
            share = share_of_foreseen(up_n)
            if share is None:
                from scvi_lite.distributions.binary_kernels import score

                _, dlogit_nr, w, w_n = score(*(*parts, up_n))
            elif share != 1:
                dlogit_nr, w = dlogit_nr * share, w * share
        else:
            dlogit_nr, w = dlogit_nr * up_n[:, None], up_n @ w
        depth, factor = parts[-2:]
        gradients = dlogit_nr, w_n * torch.sigmoid(-depth) * up_n, w * torch.sigmoid(-factor)
        needed = ctx.needs_input_grad[2:]
        return *(None,) * 2, *(d if need else None for d, need in zip(gradients, needed, strict=True))


def _value_and_derivatives(
    row_m: Tensor, col_m: Tensor, logit_nr: Tensor, depth_n: Tensor, factor_r: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Value (n,), its derivative with respect to the logit (n, r), w of the module's docstring, and its sums (n,)."""
    open_n1, factor = depth_n.sigmoid()[:, None], factor_r.sigmoid()
    rest_nr = torch.sigmoid(-depth_n)[:, None] + open_n1 * torch.sigmoid(-factor_r)
    w_nr = (open_n1 * factor).div(rest_nr.add_(torch.exp(-logit_nr.clamp(max=LARGEST_LOGIT)))).neg_()
    at_m = row_m * logit_nr.shape[1] + col_m
    w_nr.view(-1).index_fill_(0, at_m, 0.0)
    value_n = torch.log1p(-w_nr).sum(1).neg_()
    one_m = logsigmoid(logit_nr.reshape(-1)[at_m]) + logsigmoid(depth_n)[row_m] + logsigmoid(factor_r)[col_m]
    w_nr.view(-1).index_fill_(0, at_m, 1.0)
    return value_n.index_add(0, row_m, one_m), torch.sigmoid(-logit_nr).mul_(w_nr), w_nr, w_nr.sum(1)
