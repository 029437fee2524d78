"""The passes over rows of :mod:`scvi_lite.nn.mixing`, compiled for the CPU by Numba when they are first called."""

from __future__ import annotations

import numba
import numpy as np
import torch
from torch import Tensor

from scvi_lite._compiled import AT_ONCE, compiled, on_threads
from scvi_lite.distributions.elementary_kernels import INT, F, exp, log, wide

MAGNITUDE, INFINITE, NAN = INT(0x7FFFFFFF), INT(0x7F800000), INT(0x7FC00000)  # bits of a float32: all but its sign


@numba.njit
def as_ordered(bits):
    """The bits of a float32 as an integer of the same order, and back: compilers vectorise the maximum of integers."""
    return INT(bits ^ ((bits >> INT(31)) & MAGNITUDE))


@numba.njit(**AT_ONCE)
def add_and_top(x_g, bias_g):
    """Add the bias in place, and give the greatest; NaN if one is NaN or there is no greatest."""
    wide()
    top, largest = INT(-(2**31)), INT(0)
    for j in range(x_g.shape[0]):
        x = F(x_g[j] + bias_g[j])
        x_g[j] = x
        top = max(top, as_ordered(x.view(INT)))
        largest = max(largest, x.view(INT) & MAGNITUDE)
    return INT(NAN if largest > INFINITE or top == INFINITE else as_ordered(top)).view(F)


@numba.njit(**AT_ONCE)
def exp_below(x_g, top):
    """exp(x - top) in place, and its sum."""
    wide()
    total = F(0)
    for j in range(x_g.shape[0]):
        x_g[j] = exp(x_g[j] - top)
        total += x_g[j]
    return total


@numba.njit
def exp_and_factor(x_g, bias_g):
    """Turn a row into the exponentials of the row and the bias, and give what makes a softmax of them."""
    top = add_and_top(x_g, bias_g)
    total = exp_below(x_g, top)
    return F(1) / total if top == top else top  # a training that diverges must not hide it


@numba.njit(**AT_ONCE)
def scale(x_g, factor):
    """Scale in place."""
    wide()
    for j in range(x_g.shape[0]):
        x_g[j] *= factor


@numba.njit(**AT_ONCE)
def scale_and_add(x_g, scale, share, mean_g):
    """Scale in place, and add the share of the result to the mean."""
    wide()
    for j in range(x_g.shape[0]):
        x_g[j] *= scale
        mean_g[j] += share * x_g[j]


@numba.njit(**AT_ONCE)
def dot(x_g, y_g):
    """Sum of the products."""
    wide()
    total = F(0)
    for j in range(x_g.shape[0]):
        total += x_g[j] * y_g[j]
    return total


@numba.njit(**AT_ONCE)
def to_gradient(x_g, grad_g, mean, share, dbias_g):
    """From a softmax to the gradient with respect to its logits, in place; added to that of the bias."""
    wide()
    for j in range(x_g.shape[0]):
        x_g[j] *= share * (grad_g[j] - mean)
        dbias_g[j] += x_g[j]


def softmax_rows(first, last, x_rg, bias_g):
    """Turn the rows first:last into the softmax of the row and the bias."""
    for r in range(first, last):
        scale(x_rg[r], exp_and_factor(x_rg[r], bias_g))


def forward_rows(first, last, row_rg, bias_lg, share_nr, mean_ng):
    """Of the spots first:last, turn logits into softmax and fill the mean."""
    n_rows, n_labels = share_nr.shape[1], bias_lg.shape[0]
    for i in range(first, last):
        mean_ng[i] = F(0)
        for r in range(n_rows):
            x_g = row_rg[i * n_rows + r]
            factor = exp_and_factor(x_g, bias_lg[r % n_labels])
            scale_and_add(x_g, factor, share_nr[i, r], mean_ng[i])


def backward_rows(first, last, row_rg, share_nr, grad_ng, dshare_nr, dbias_lg):
    """Of the spots first:last, turn softmax into the gradient of the logits, and fill those of share and bias."""
    n_rows, n_labels = share_nr.shape[1], dbias_lg.shape[0]
    for i in range(first, last):
        for r in range(n_rows):
            x_g = row_rg[i * n_rows + r]
            dshare_nr[i, r] = dot(x_g, grad_ng[i])
            to_gradient(x_g, grad_ng[i], dshare_nr[i, r], share_nr[i, r], dbias_lg[r % n_labels])


@numba.njit(**AT_ONCE)
def log_normals(z_kx, loc_k, rate_k, height, log_prob_x):
    """Log-density of a normal, from its height at the mean."""
    wide()
    log_prob_x[:] = height
    for k in range(z_kx.shape[0]):
        for i in range(z_kx.shape[1]):
            gap = (z_kx[k, i] - loc_k[k]) * rate_k[k]
            log_prob_x[i] -= F(0.5) * gap * gap


@numba.njit(**AT_ONCE)
def log_sum(part_px, total_x, value_x):
    """Fill the logarithm of the sum of the densities, of which ``part`` has the logarithms and is made the shares."""
    wide()
    n_parts, n_rows = part_px.shape
    value_x[:], total_x[:] = part_px[0], F(0)
    for p in range(1, n_parts):
        for i in range(n_rows):
            value_x[i] = max(value_x[i], part_px[p, i])
    for p in range(n_parts):
        for i in range(n_rows):
            part_px[p, i] = exp(part_px[p, i] - value_x[i])
            total_x[i] += part_px[p, i]
    for p in range(n_parts):
        for i in range(n_rows):
            part_px[p, i] /= total_x[i]
    for i in range(n_rows):
        value_x[i] += log(total_x[i])


@numba.njit(**AT_ONCE)
def add_slopes(z_kx, loc_k, rate_k, share_x, dz_kx):
    """Add the derivative of a normal's log-density, times its share."""
    wide()
    for k in range(z_kx.shape[0]):
        for i in range(z_kx.shape[1]):
            dz_kx[k, i] -= share_x[i] * (rate_k[k] * rate_k[k]) * (z_kx[k, i] - loc_k[k])


def mixtures(first, last, z_lkx, loc_lpk, rate_lpk, height_lp, value_lx, dz_lkx):
    """Of the labels first:last, fill the log-density of the mixture, and its derivative."""
    n_parts, n_rows = loc_lpk.shape[1], z_lkx.shape[2]
    part_px, total_x = np.empty((n_parts, n_rows), F), np.empty(n_rows, F)
    for label in range(first, last):
        z_kx, loc_pk, rate_pk = z_lkx[label], loc_lpk[label], rate_lpk[label]
        for p in range(n_parts):
            log_normals(z_kx, loc_pk[p], rate_pk[p], height_lp[label, p], part_px[p])
        log_sum(part_px, total_x, value_lx[label])
        dz_lkx[label] = F(0)
        for p in range(n_parts):
            add_slopes(z_kx, loc_pk[p], rate_pk[p], part_px[p], dz_lkx[label])


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


def to_softmax(x_rg: Tensor, bias_g: Tensor) -> None:
    """Turn rows into the softmax of the row and the bias, in place."""
    arrays = x_rg.numpy(), bias_g.detach().numpy()
    kernel = compiled(softmax_rows)
    on_threads(lambda first, last: kernel(first, last, *arrays), len(x_rg), x_rg.numel())


def log_mixtures(z_lkx: Tensor, loc_lpk: Tensor, scale_lpk: Tensor, height_lp: Tensor) -> tuple[Tensor, Tensor]:
    """Log-density (l, x) of mixtures of normals whose logarithms have these heights, and its derivative (l, k, x)."""
    value_lx, dz_lkx = torch.empty_like(z_lkx[:, 0]), torch.empty_like(z_lkx)
    tensors = z_lkx, loc_lpk, 1 / scale_lpk, height_lp, value_lx, dz_lkx
    arrays = [t.detach().contiguous().numpy() for t in tensors]
    kernel = compiled(mixtures)
    on_threads(lambda first, last: kernel(first, last, *arrays), len(z_lkx), z_lkx.numel() * loc_lpk.shape[1])
    return value_lx, dz_lkx
