"""Batch norm and ReLU of hidden units in one pass each way, compiled for the CPU.

Let m and s be mean and standard deviation of a unit x over all rows, r = (x - m) / s and y = max(0, w r + b). With
g = dy where y > 0, else 0: db = Σ g, dw = Σ g r, and dx = w / s (g - mean g - r mean(g r)) (Ioffe and Szegedy 2015,
arXiv:1502.03167).
"""

from __future__ import annotations

from collections.abc import Callable

import numba
import numpy as np
import torch
from torch import Tensor, nn

from scvi_lite._compiled import compiled, on_threads
from scvi_lite.distributions.elementary_kernels import F, U, wide


class Units:
    """max(norm(x + constant), 0) of one minibatch, forward and then backward.

    Parameters
    ----------
    norm
        Batch norm in training; its running moments move, as if it had been called.
    constant_h
        What is the same for all rows: the norm takes it away again, but for its running mean.
    """

    def __init__(self, norm: nn.BatchNorm1d, constant_h: Tensor):
        self.norm, self.constant_h = norm, constant_h

    def forward(self, x_nh: Tensor) -> Tensor:
        """The units (n, h)."""
        norm, y_nh = self.norm, torch.empty_like(x_nh)
        norm.num_batches_tracked.add_(1)
        self.weight_h, running = norm.weight.detach(), (norm.running_mean, norm.running_var)
        self.x_nh, self.moments = x_nh, (torch.zeros_like(self.weight_h), torch.empty_like(self.weight_h))
        _run(_forward, x_nh, self.constant_h, self.weight_h, norm.bias, *running, *self.moments, y_nh,
             numbers=(norm.momentum, norm.eps))  # fmt: skip
        return y_nh

    def backward(self, dy_nh: Tensor, y_nh: Tensor, factor: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
        """From derivatives for the units to those for x (n, h), and for weight and bias of the norm (h,).

        Dropout may have multiplied the units y with ``factor``, or with 0, in the meantime.
        """
        dx_nh, dweight_h, dbias_h = torch.empty_like(dy_nh), *(torch.zeros_like(self.weight_h) for _ in "12")
        _run(_backward, dy_nh, self.x_nh, y_nh, self.weight_h, *self.moments, dx_nh, dweight_h, dbias_h,
             numbers=(factor,))  # fmt: skip
        return dx_nh, dweight_h, dbias_h


def _run(kernel: Callable[..., None], *tensors: Tensor, numbers: tuple[float, ...]) -> None:
    """Run on shares of the columns of the first tensor."""
    function, arrays = compiled(kernel, at_once=True), [t.detach().numpy() for t in tensors]
    given = *arrays, *map(F, numbers)
    on_threads(lambda lo, hi: function(lo, hi, *given), tensors[0].shape[1], tensors[0].numel())


def _forward(
    first, last, x_nh, constant_h, weight_h, bias_h, running_mean_h, running_var_h, mean_h, rstd_h, y_nh, momentum, eps
):  # fmt: skip
    """Fill in y, and mean and 1 / standard deviation, of the units first:last; move their running moments."""
    wide()
    n, n_hidden = x_nh.shape
    var_h, slope_h, shift_h = np.zeros(n_hidden, F), np.empty(n_hidden, F), np.empty(n_hidden, F)
    for i in range(n):
        for h in range(U(first), U(last)):
            mean_h[h] += x_nh[i, h] / F(n)
    for i in range(n):
        for h in range(U(first), U(last)):
            var_h[h] += (x_nh[i, h] - mean_h[h]) * (x_nh[i, h] - mean_h[h]) / F(n)
    for h in range(U(first), U(last)):
        rstd_h[h] = F(1) / np.sqrt(var_h[h] + eps)
        slope_h[h] = weight_h[h] * rstd_h[h]
        shift_h[h] = bias_h[h] - mean_h[h] * slope_h[h]
        running_mean_h[h] += momentum * (mean_h[h] + constant_h[h] - running_mean_h[h])
        running_var_h[h] += momentum * (var_h[h] * F(n / (n - 1)) - running_var_h[h])
    for i in range(n):
        for h in range(U(first), U(last)):
            y_nh[i, h] = positive(x_nh[i, h] * slope_h[h] + shift_h[h])


@numba.njit
def positive(x):
    """max(x, 0), and NaN of NaN: a training that diverges must not hide it."""
    return F(0) if x <= F(0) else x


def _backward(first, last, dy_nh, x_nh, y_nh, weight_h, mean_h, rstd_h, dx_nh, dweight_h, dbias_h, factor):
    """Fill in dx, and the derivatives for weight and bias of the norm, of the units first:last."""
    wide()
    n, n_hidden = x_nh.shape
    by_x_h, slope_h = np.empty(n_hidden, F), np.empty(n_hidden, F)
    for i in range(n):
        for h in range(U(first), U(last)):
            g = factor * dy_nh[i, h] if y_nh[i, h] > F(0) else F(0)
            dx_nh[i, h] = g
            dbias_h[h] += g
            dweight_h[h] += g * (x_nh[i, h] - mean_h[h])
    for h in range(U(first), U(last)):
        dweight_h[h] *= rstd_h[h]
        slope_h[h] = weight_h[h] * rstd_h[h]
        by_x_h[h] = rstd_h[h] * dweight_h[h] / F(n)
    for i in range(n):
        for h in range(U(first), U(last)):
            dx_nh[i, h] = slope_h[h] * (dx_nh[i, h] - dbias_h[h] / F(n) - (x_nh[i, h] - mean_h[h]) * by_x_h[h])
