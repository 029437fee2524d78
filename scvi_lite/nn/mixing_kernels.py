"""The passes over rows of :mod:`scvi_lite.nn.mixing`, compiled for the CPU by Numba when they are first called."""

from __future__ import annotations

import numba
import numpy as np
import torch
from torch import Tensor

from scvi_lite._compiled import AT_ONCE, compiled, on_threads
from scvi_lite.distributions.kernels import exp

F, INT = np.float32, np.int32


@numba.njit
def as_ordered(bits):
    """The bits of a float32 as an integer of the same order, and back: compilers vectorise the maximum of integers."""
    return INT(bits ^ ((bits >> INT(31)) & INT(0x7FFFFFFF)))


@numba.njit(**AT_ONCE)
def add_and_top(x_g, bias_g):
    """Add the bias in place, and give the greatest."""
    top = INT(-(2**31))
    for j in range(x_g.shape[0]):
        x = F(x_g[j] + bias_g[j])
        x_g[j] = x
        top = max(top, as_ordered(x.view(INT)))
    return INT(as_ordered(top)).view(F)


@numba.njit(**AT_ONCE)
def exp_below(x_g, top):
    """exp(x - top) in place, and its sum."""
    total = F(0)
    for j in range(x_g.shape[0]):
        x_g[j] = exp(x_g[j] - top)
        total += x_g[j]
    return total


@numba.njit(**AT_ONCE)
def scale_and_add(x_g, scale, share, mean_g):
    """Scale in place, and add the share of the result to the mean."""
    for j in range(x_g.shape[0]):
        x_g[j] *= scale
        mean_g[j] += share * x_g[j]


@numba.njit(**AT_ONCE)
def dot(x_g, y_g):
    """Sum of the products."""
    total = F(0)
    for j in range(x_g.shape[0]):
        total += x_g[j] * y_g[j]
    return total


@numba.njit(**AT_ONCE)
def to_gradient(x_g, grad_g, mean, share, dbias_g):
    """From a softmax to the gradient with respect to its logits, in place; added to that of the bias."""
    for j in range(x_g.shape[0]):
        x_g[j] *= share * (grad_g[j] - mean)
        dbias_g[j] += x_g[j]


def forward_rows(first, last, row_rg, bias_lg, share_nr, mean_ng):
    """Of the spots first:last, turn logits into softmax and fill the mean."""
    n_rows, n_labels = share_nr.shape[1], bias_lg.shape[0]
    for i in range(first, last):
        mean_ng[i] = F(0)
        for r in range(n_rows):
            x_g = row_rg[i * n_rows + r]
            total = exp_below(x_g, add_and_top(x_g, bias_lg[r % n_labels]))
            scale_and_add(x_g, F(1) / total, share_nr[i, r], mean_ng[i])


def backward_rows(first, last, row_rg, share_nr, grad_ng, dshare_nr, dbias_lg):
    """Of the spots first:last, turn softmax into the gradient of the logits, and fill those of share and bias."""
    n_rows, n_labels = share_nr.shape[1], dbias_lg.shape[0]
    for i in range(first, last):
        for r in range(n_rows):
            x_g = row_rg[i * n_rows + r]
            dshare_nr[i, r] = dot(x_g, grad_ng[i])
            to_gradient(x_g, grad_ng[i], dshare_nr[i, r], share_nr[i, r], dbias_lg[r % n_labels])


def add_rows(row_rg: Tensor, bias_lg: Tensor, share_nr: Tensor, mean_ng: Tensor) -> None:
    """Turn logits (n·r, g) into softmax, in place, and fill their mean (n, g), weighed by the shares (n, r)."""
    arrays = [t.detach().numpy() for t in (row_rg, bias_lg, share_nr, mean_ng)]
    kernel = compiled(forward_rows)
    on_threads(lambda first, last: kernel(first, last, *arrays), len(share_nr), row_rg.numel())


def rows_to_gradients(
    row_rg: Tensor, share_nr: Tensor, grad_ng: Tensor, dshare_nr: Tensor, bias_shape: torch.Size
) -> Tensor:
    """Turn softmax into the gradient of the logits, in place; fill that of the shares and give that of the bias."""
    arrays = [t.detach().numpy() for t in (row_rg, share_nr, grad_ng, dshare_nr)]
    kernel = compiled(backward_rows)

    def share(first: int, last: int) -> np.ndarray:
        dbias_lg = np.zeros(bias_shape, F)
        kernel(first, last, *arrays, dbias_lg)
        return dbias_lg

    return torch.from_numpy(sum(on_threads(share, len(share_nr), row_rg.numel())))
