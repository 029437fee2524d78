"""The product of a sparse minibatch and a weight: the first layer of an encoder of counts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from scvi_lite.data.batch import Counts

# On a CPU, the share of non-zeros below which looking up rows of the weight beats filling zeros in and multiplying.
SPARSE_FORWARD = 0.35
SPARSE_BACKWARD = 0.15
# Numbers of the weight that stay near the processor while all cells look rows of it up, and cells that make it worth
# sorting the non-zeros for that.
NEAR = 1 << 17
MANY_CELLS = 256


def sparse_linear(counts: Counts, weight_hg: Tensor) -> Tensor:
    """The counts of n cells times the transposed weight: (n, h), as ``torch.nn.functional.linear`` of ``counts.x_ng``.

    The weight has the shape of an ``nn.Linear``, and is fastest when stored the other way round:
    ``nn.Parameter(torch.empty(g, h).t())``. Its gradient comes in the same storage. Nothing flows back to the counts.

    Raises
    ------
    ValueError
        If the weight is not for as many features as the counts have.

    Examples
    --------
    >>> counts = Counts.from_dense(torch.tensor([[0.0, 2.0], [0.0, 0.0]]))
    >>> sparse_linear(counts, torch.tensor([[1.0, 5.0]]))
    tensor([[10.],
            [ 0.]])
    """
    if weight_hg.ndim != 2 or weight_hg.shape[1] != counts.n_features:
        raise ValueError(
            f"weight_hg has shape {tuple(weight_hg.shape)}, but the counts have {counts.n_features} features: "
            "the layer was made for another number of features."
        )
    # TorchDynamo cannot trace a Function that is applied twice to tensors of unknown size, as two encoders do.
    if weight_hg.is_cuda or torch.compiler.is_compiling():
        return torch.nn.functional.linear(counts.x_ng, weight_hg)
    dtype = torch.promote_types(weight_hg.dtype, torch.float32)
    parts = counts.start, counts.col_m, counts.value_m.to(dtype)
    weight = weight_hg if torch.is_grad_enabled() else weight_hg.detach()  # a Function cannot see
    return _SparseLinear.apply(*parts, weight.to(dtype).t()).to(weight_hg.dtype)


class _SparseLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, start: Tensor, col_m: Tensor, value_m: Tensor, weight_gh: Tensor) -> Tensor:
        ctx.product, both_ways = Product(Counts(start, col_m, value_m, weight_gh.shape[0])), ctx.needs_input_grad[3]
        return ctx.product.forward(weight_gh, both_ways)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, up_nh: Tensor) -> tuple[Tensor | None, ...]:
        return *(None,) * 3, ctx.product.backward(up_nh)


class Product:
    """Counts times a weight (g, h), and the gradient of that weight."""

    x_ng: Tensor | None = None

    def __init__(self, counts: Counts):
        self.counts = counts
        self.share = counts.value_m.shape[0] / max(1, counts.n_cells * counts.n_features)

    def forward(self, weight_gh: Tensor, both_ways: bool = True) -> Tensor:
        """The product (n, h); ``both_ways``: backward follows."""
        if self.share > (SPARSE_BACKWARD if both_ways else SPARSE_FORWARD):
            self.x_ng = self.counts.x_ng  # filled in once for both ways
            return self.x_ng @ weight_gh
        # Detached, or more is computed, for a gradient that comes another way.
        return _look_up(self.counts, weight_gh.detach().contiguous())

    def backward(self, up_nh: Tensor) -> Tensor:
        """The transposed counts times what comes back, (g, h)."""
        counts = self.counts
        up_nh = up_nh.to(counts.value_m.dtype)  # under autocast, the product forward came in 16 bits
        if self.x_ng is not None:
            return self.x_ng.t() @ up_nh
        from scvi_lite.distributions.sparse_kernels import by_feature

        # Sorted by feature, so that a row of the gradient is written once.
        start_g, row_m, value_m = by_feature(counts.start, counts.col_m, counts.value_m, counts.n_features)
        return embedding_bag(row_m, up_nh.contiguous(), start_g[:-1], mode="sum", per_sample_weights=value_m)


def _look_up(counts: Counts, weight_gh: Tensor) -> Tensor:
    """The sum of the rows of the weight that each cell's counts look up, a block of features after the other."""
    n_near = max(1, NEAR // weight_gh.shape[1])
    if counts.n_cells < MANY_CELLS or counts.n_features < 2 * n_near or counts.value_m.dtype != torch.float32:
        start_n, col_m, value_m = counts.start[:-1], counts.col_m, counts.value_m
        return embedding_bag(col_m, weight_gh, start_n, mode="sum", per_sample_weights=value_m)
    from scvi_lite.data.kernels import block_rows

    start_bn, col_m, value_m = block_rows(counts.start, counts.col_m, counts.value_m, counts.n_features, n_near)
    y_bnh = embedding_bag(col_m, weight_gh, start_bn.flatten(), mode="sum", per_sample_weights=value_m)
    return y_bnh.view(*start_bn.shape, -1).sum(0)
