"""The mean of many softmax rows, as in a spot of many cell types in many states, and how likely their places are.

Written out, it takes ten passes over an array of spots × states × cell types × genes, which fits no cache. On the CPU
its rows are made, weighed and, going backward, turned into their own gradient where they stand. The softmax of a linear
map, which expected expression is, is made where it is put in the same way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scvi_lite.distributions.fused import is_compiled_for

if TYPE_CHECKING:
    from scvi_lite.nn.conditional import LabelMixture


def mean_softmax(h: Tensor, weight_gh: Tensor, bias_lg: Tensor, share_nsl: Tensor) -> Tensor:
    """Σ_sl share_nsl · softmax_g(weight · h_nsl + bias_l), (n, g).

    Parameters
    ----------
    h
        (n, s, l, h) inputs of a linear map to the g logits of each row.
    weight_gh, bias_lg
        The map, with a constant for each l.
    share_nsl
        Weight of each row.

    Gradients reach all four tensors, once.

    >>> h, weight = torch.zeros(2, 1, 3, 4), torch.ones(5, 4)
    >>> mean_softmax(h, weight, torch.zeros(3, 5), torch.full((2, 1, 3), 1 / 3))[0]
    tensor([0.2000, 0.2000, 0.2000, 0.2000, 0.2000])
    """
    inputs = (h, weight_gh, bias_lg, share_nsl)
    plain = torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu")
    if not plain and all(t.device.type == "cpu" and t.dtype == torch.float32 for t in inputs):
        return _MeanSoftmax.apply(*inputs)
    scale_nslg = (F.linear(h, weight_gh) + bias_lg).softmax(-1)
    return torch.einsum("nsl,nslg->ng", share_nsl, scale_nslg)


def softmax_linear(h: Tensor, layer: nn.Linear, out: Tensor | None = None) -> Tensor:
    """softmax_g(weight · h + bias), (..., g), of ``h`` (..., h), without gradients.

    Written to ``out`` where that is given: float32, contiguous and in the memory of the CPU.

    >>> softmax_linear(torch.zeros(1, 3), nn.Linear(3, 1))
    tensor([[1.]])
    """
    h, weight_gh, bias_g = (t.detach() for t in (h, layer.weight, layer.bias))
    if torch.is_autocast_enabled("cpu") or not (is_compiled_for(h) and is_compiled_for(weight_gh)):
        softmax = F.linear(h, weight_gh, bias_g).softmax(-1)
        return softmax if out is None else out.copy_(softmax)
    from scvi_lite.nn.mixing_kernels import to_softmax

    row_rg = torch.mm(h.flatten(0, -2), weight_gh.t(), out=out if out is None else out.view(-1, len(bias_g)))
    to_softmax(row_rg, bias_g)
    return row_rg.view(*h.shape[:-1], len(bias_g))


def log_mixture(z: Tensor, mixture: LabelMixture) -> Tensor:
    """Log-density (..., l) at ``z`` (..., l, k) under the mixture of each label. Gradients reach ``z`` alone.

    >>> from scvi_lite.nn.conditional import LabelMixture
    >>> one = LabelMixture(torch.zeros(2, 1, 3), torch.ones(2, 1, 3), torch.zeros(2, 1))
    >>> log_mixture(torch.zeros(4, 2, 3), one).shape
    torch.Size([4, 2])
    """
    if is_compiled_for(z):
        return _LogMixture.apply(z, mixture.loc_lpk, mixture.scale_lpk, mixture.height_lp)
    return mixture.log_prob(z, torch.arange(z.shape[-2], device=z.device))


class _LogMixture(torch.autograd.Function):
    """The formulas as one pass over rows: see :mod:`scvi_lite.nn.mixing_kernels`."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, loc_lpk: Tensor, scale_lpk: Tensor, height_lp: Tensor) -> Tensor:
        from scvi_lite.nn.mixing_kernels import log_mixtures

        z_lkx = z.flatten(0, -3).permute(1, 2, 0).contiguous()
        value_lx, dz_lkx = log_mixtures(z_lkx, loc_lpk, scale_lpk, height_lp)
        ctx.save_for_backward(dz_lkx.permute(2, 0, 1).reshape(z.shape))
        return value_lx.t().reshape(z.shape[:-1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, up: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.saved_tensors[0] * up.unsqueeze(-1), None, None, None


class _MeanSoftmax(torch.autograd.Function):
    """The formulas as passes over rows: see :mod:`scvi_lite.nn.mixing_kernels`."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, weight_gh: Tensor, bias_lg: Tensor, share_nsl: Tensor) -> Tensor:
        from scvi_lite.nn.mixing_kernels import add_rows

        h_rh, share_nr = h.reshape(-1, h.shape[-1]), share_nsl.flatten(1).contiguous()
        row_rg = h_rh @ weight_gh.t()
        mean_ng = h.new_empty(len(h), len(weight_gh))
        add_rows(row_rg, bias_lg.contiguous(), share_nr, mean_ng)
        ctx.save_for_backward(h_rh, weight_gh, share_nr)
        ctx.softmax_rg, ctx.shapes = row_rg, (h.shape, bias_lg.shape, share_nsl.shape)
        return mean_ng

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_ng: Tensor) -> tuple[Tensor | None, ...]:
        from scvi_lite.nn.mixing_kernels import rows_to_gradients

        h_rh, weight_gh, share_nr = ctx.saved_tensors
        if ctx.softmax_rg is None:
            raise RuntimeError("The rows of mean_softmax became gradients: it goes backward once.")
        row_rg, ctx.softmax_rg = ctx.softmax_rg, None
        h_shape, bias_shape, share_shape = ctx.shapes
        dshare_nr = torch.empty_like(share_nr)
        dbias_lg = rows_to_gradients(row_rg, share_nr, grad_ng.contiguous(), dshare_nr, bias_shape)
        dweight_gh = row_rg.t() @ h_rh if ctx.needs_input_grad[1] else None
        return (row_rg @ weight_gh).view(h_shape), dweight_gh, dbias_lg, dshare_nr.view(share_shape)
