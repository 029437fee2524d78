"""The formulas of :mod:`scvi_lite.distributions.closed_form` as one pass over a minibatch, compiled for the CPU.

A cell's row stays in the cache from the softmax to the gradients, and nothing of the size of the minibatch is made but
the gradients. Numba compiles a function when it is first called, and keeps the result on disk beside the package (or
in the user's cache, where that cannot be written).
"""

from __future__ import annotations

import math

import numba
import numpy as np
import torch
from torch import Tensor

from scvi_lite._compiled import AT_ONCE, compiled, on_threads
from scvi_lite.distributions.counts import LOG_THETA_RANGE
from scvi_lite.distributions.elementary_kernels import INT, F, U, exp, log, log1p, wide

# Up to here lgamma(x + theta) - lgamma(theta) is the logarithm of a product that a double holds.
MAX_PRODUCT = 16
# Counts that the table of a minibatch may reach, where there are enough of them to be worth it.
LONGEST_TABLE = 64
LOG_FACTORIAL = np.array([math.lgamma(x + 1.0) for x in range(MAX_PRODUCT + 1)])
# What all cells are added to is first added up for so many of them, so that the sum is the same on any threads.
BLOCK = 8
# A theta below is nothing beside nearly any mean.
TINY = F(1e-17)


@numba.njit(**AT_ONCE)
def exp_row(i, logit_ng, top, e_g):
    """exp(logit - top) of a row, and its sum."""
    wide()
    total = F(0)
    for j in range(e_g.shape[0]):
        e_g[j] = exp(logit_ng[i, j] - top)
        total += e_g[j]
    return total


@numba.njit(**AT_ONCE)
def zeros_row(i, t, o, c, weight, e_g, zero_g, theta_tg, dropout_ng, s_g, p_g, dmu_ng, dtheta_og, ddropout_ng):
    """Log-probability of the zeros of row i, where mu = c e, and the sum of its derivative with respect to log mu.

    Where there is room for them, also its derivatives: that by log mu as it is, the others times ``weight``; those by
    log theta are added to row o.
    The non-zeros will need s = log(1 + mu / theta) and p = mu / (theta + mu).
    """
    wide()
    value, total = F(0), F(0)
    for j in range(e_g.shape[0]):
        mu, zero = e_g[j] * c, zero_g[j]
        if theta_tg is None:
            cost, h = mu, mu
        else:
            theta = max(theta_tg[t, j], TINY)  # mu / theta stays a float
            r = mu / theta
            s, p = log1p(r), r / (F(1) + r)
            s_g[j], p_g[j] = s, p
            cost, h = theta * s, theta * p
        if dropout_ng is None:
            dcost = -zero
            value -= zero * cost
        else:
            prior = exp(-max(dropout_ng[i, j], F(-40)))
            posterior = prior * exp(-cost)
            both = F(1) / ((F(1) + prior) * (F(1) + posterior))
            dcost = zero * (both * (F(1) + prior) - F(1))
            value += zero * log(both * (F(1) + posterior) * (F(1) + posterior))
            if ddropout_ng is not None:
                ddropout_ng[i, j] = weight * zero * both * (prior - posterior)
        if dmu_ng is not None:
            dmu_ng[i, j] = dcost * h
            total += dcost * h
            if theta_tg is not None:
                dtheta_og[o, j] += weight * dcost * (cost - h)
    return value, total


@numba.njit(**AT_ONCE)
def next_count(k, first, last, theta_g, before_2g, row_2g):
    """The row of the table for the count k + 1, from that of k: see :func:`fill_table`."""
    wide()
    log_x = F(math.log(k + 1.0))
    for j in range(U(first), U(last)):
        row_2g[0, j] = before_2g[0, j] + log(theta_g[j] + F(k)) - log_x
        row_2g[1, j] = before_2g[1, j] + theta_g[j] / (theta_g[j] + F(k))


def fill_table(first, last, log_theta_g, theta_g, table_x2g):
    """For the counts 1, 2, ... and the genes first:last what depends on nothing else.

    log (theta (theta + 1) ... (theta + x - 1) / x!), and its derivative with respect to log theta.
    """
    for j in range(first, last):
        table_x2g[0, 0, j], table_x2g[0, 1, j] = log_theta_g[j], F(1)
    for k in range(1, table_x2g.shape[0]):
        next_count(k, first, last, theta_g, table_x2g[k - 1], table_x2g[k])


@numba.njit(error_model="numpy")
def look_up(i, t, col_k, x_k, shift, logit_ng, log_theta_tg, theta_tg, table_x2g, s_g, p_g, work, large_k):
    """What the non-zeros of row i need, side by side in ``work``; gives how many need another way (``large_k``).

    Rows of ``work``: d = log mu - log theta, theta, s, p, an entry of the table. In loops so short that loads overlap.
    """
    n_large, largest = 0, MAX_PRODUCT if table_x2g is None else table_x2g.shape[0]
    for k in range(col_k.shape[0]):
        j = U(col_k[k])
        work[0, k] = logit_ng[i, j] + shift - log_theta_tg[t, j]
        work[1, k] = theta_tg[t, j]
    for k in range(col_k.shape[0]):
        j = U(col_k[k])
        work[2, k], work[3, k] = s_g[j], p_g[j]
    for k in range(col_k.shape[0]):
        j, x = U(col_k[k]), x_k[k]
        if not (1 <= x <= largest and x == math.floor(x) and work[1, k] > TINY):
            large_k[n_large] = k
            n_large += 1
        elif table_x2g is None:
            work[4, k], work[5, k] = rise_and_slope(int(x), theta_tg[t, j], log_theta_tg[t, j])
        else:
            work[4, k], work[5, k] = table_x2g[U(x) - U(1), 0, j], table_x2g[U(x) - U(1), 1, j]
    return n_large


@numba.njit(**AT_ONCE)
def nb_small(x_k, work):
    """From what :func:`look_up` found to the log-probability (row 4) and its derivatives (rows 0 and 1)."""
    wide()
    for k in range(x_k.shape[0]):
        x, d, theta, s = x_k[k], work[0, k], work[1, k], work[2, k]
        dmu = x - (x + theta) * work[3, k]
        work[4, k] += x * (d - s) - theta * s
        work[0, k] = dmu
        work[1, k] = work[5, k] - theta * s - dmu


@numba.njit(**AT_ONCE)
def log_sigmoid(weight, y_k, z_k):
    """Replace y by log(1 + exp(y)), and z by -weight times its derivative."""
    wide()
    for k in range(y_k.shape[0]):
        y = y_k[k]
        q = exp(-abs(y))
        y_k[k] = max(y, F(0)) + log1p(q)
        z_k[k] = -weight * (F(1) if y > 0 else q) / (F(1) + q)


@numba.njit(**AT_ONCE)
def summed(x_k):
    """The sum, in double precision."""
    wide()
    total = 0.0
    for k in range(x_k.shape[0]):
        total += x_k[k]
    return total


@numba.njit(fastmath={"contract"}, error_model="numpy")
def nonzeros_row(
    i, t, o, col_k, x_k, shift, weight, s_g, p_g, logit_ng, log_theta_tg, theta_tg, table_x2g,
    dropout_ng, dmu_ng, dtheta_og, ddropout_ng, work, large_k,
):  # fmt: skip
    """Same as :func:`zeros_row` for the non-zeros of row i, where log mu = logit + shift."""
    n = col_k.shape[0]
    dmu_k, dtheta_k, value_k = work[0, :n], work[1, :n], work[4, :n]
    value = 0.0  # of what a single float cannot hold
    if theta_tg is None:
        for k in range(n):
            log_mu = logit_ng[i, U(col_k[k])] + shift
            mu = math.exp(log_mu)
            value += x_k[k] * log_mu - mu - math.lgamma(x_k[k] + 1.0)
            value_k[k], dmu_k[k] = F(0), x_k[k] - mu
    else:
        n_large = look_up(i, t, col_k, x_k, shift, logit_ng, log_theta_tg, theta_tg, table_x2g, s_g, p_g, work, large_k)
        nb_small(x_k, work)
        for k in large_k[:n_large]:
            log_mu = logit_ng[i, U(col_k[k])] + shift
            nb, dmu_k[k], dtheta_k[k] = nb_any(x_k[k], log_mu, log_theta_tg[t, U(col_k[k])])
            value, value_k[k] = value + nb, F(0)
    value += summed(value_k)
    if dmu_ng is not None:
        for k in range(n):
            dmu_ng[i, U(col_k[k])] = dmu_k[k]
        if theta_tg is not None:
            for k in range(n):
                dtheta_og[o, U(col_k[k])] += weight * dtheta_k[k]
    total = summed(dmu_k)
    if dropout_ng is not None:
        for k in range(n):
            work[2, k] = dropout_ng[i, U(col_k[k])]
        log_sigmoid(weight, work[2, :n], work[3, :n])
        value -= summed(work[2, :n])
        if ddropout_ng is not None:
            for k in range(n):
                ddropout_ng[i, U(col_k[k])] = work[3, k]
    return value, total


@numba.njit(error_model="numpy")
def rise_and_slope(x, theta, log_theta):
    """An entry of :func:`fill_tables`."""
    # theta (theta + 1) ... (theta + x - 1), without its first factor; and the derivative of the whole
    rest, slope = 1.0, 1.0
    for k in range(1, x):
        slope = slope * (theta + k) + theta * rest
        rest *= theta + k
    return F(log_theta + (math.log(rest) - LOG_FACTORIAL[x] if x > 1 else 0.0)), F(slope / rest)


@numba.njit(error_model="numpy")
def nb_any(x, log_mu, log_theta):
    """Log-probability of any positive count and its derivatives with respect to log mu and log theta.

    In doubles: large numbers cancel one another.
    """
    x, log_mu, log_theta = np.float64(x), np.float64(log_mu), np.float64(log_theta)  # float() leaves a single float
    theta, d = math.exp(log_theta), log_mu - log_theta
    q = math.exp(-abs(d))
    s = max(d, 0.0) + math.log1p(q)
    dmu = x - (x + theta) * (1.0 if d > 0 else q) / (1.0 + q)
    gammas, digammas = gamma_rise(x, theta)
    return x * (d - s) - theta * s + gammas - math.lgamma(x + 1.0), dmu, theta * (digammas - s) - dmu


@numba.njit(error_model="numpy")
def gamma_rise(x, theta):
    """lgamma(x + theta) - lgamma(theta), and the same of digamma: Stirling's series, taken 8 steps above theta."""
    high, end = theta + 8.0, theta + 8.0 + x
    rise = math.log1p(x / high)
    gammas = x * math.log(high) + (end - 0.5) * rise - x
    # Products, as a negative power of a NaN raises.
    a, b = 1 / end, 1 / high
    aa, bb = a * a, b * b
    gammas += (a - b) / 12 - (aa * a - bb * b) / 360
    digammas = rise - (a - b) / 2 - (aa - bb) / 12 + (aa * aa - bb * bb) / 120
    # The eight steps as a product from theta and one from theta + x, and the derivatives of their logarithms.
    low, top, dlow, dtop = theta, theta + x, 1.0, 1.0
    for j in range(1, 8):
        dlow, dtop = dlow * (theta + j) + low, dtop * (theta + j + x) + top
        low, top = low * (theta + j), top * (theta + j + x)
    return gammas + math.log(low / top), digammas + dlow / low - dtop / top


@numba.njit(**AT_ONCE)
def to_logit(i, weight, share, e_g, dmu_ng):
    """From the derivative with respect to log mu to that with respect to the logit, times ``weight``."""
    wide()
    for j in range(e_g.shape[0]):
        dmu_ng[i, j] = weight * (dmu_ng[i, j] - share * e_g[j])


def score_rows(
    first, last, block, start, col_m, x_m, logit_ng, top_n, library_n, log_theta_tg, theta_tg, table_x2g, dropout_ng,
    weight_n, value_n, dlibrary_n, dlogit_ng, ddropout_ng, dtheta_og,
):  # fmt: skip
    """Fill values, and derivatives times the weight of each row, of the rows first:last.

    What a likelihood has no use for is None. Derivatives with respect to log theta are added up, those of ``block``
    rows in one. There may be several rows of rates for each cell, one draw after the other.
    """
    n_genes, n_cells = logit_ng.shape[1], start.shape[0] - 1
    e_g, zero_g, s_g, p_g = np.empty(n_genes, F), np.ones(n_genes, F), np.empty(n_genes, F), np.empty(n_genes, F)
    work, large_k = np.empty((6, n_genes), F), np.empty(n_genes, INT)
    for i in range(first, last):
        lo, hi = start[i % n_cells], start[i % n_cells + 1]
        col_k, x_k = col_m[lo:hi], x_m[lo:hi]
        t = 0 if theta_tg is None else i % theta_tg.shape[0]
        o = i // block
        weight = F(0) if weight_n is None else weight_n[i]
        total = exp_row(i, logit_ng, top_n[i], e_g)
        shift = 0.0 if library_n is None else library_n[i] - math.log(total)
        c = F(math.exp(shift))
        for k in range(hi - lo):
            zero_g[U(col_k[k])] = F(0)
        zeros, dzeros = zeros_row(
            i, t, o, c, weight, e_g, zero_g, theta_tg, dropout_ng, s_g, p_g, dlogit_ng, dtheta_og, ddropout_ng
        )
        others, dothers = nonzeros_row(
            i, t, o, col_k, x_k, shift - top_n[i], weight, s_g, p_g, logit_ng, log_theta_tg, theta_tg, table_x2g,
            dropout_ng, dlogit_ng, dtheta_og, ddropout_ng, work, large_k,
        )  # fmt: skip
        value_n[i] = zeros + others
        for k in range(hi - lo):
            zero_g[U(col_k[k])] = F(1)
        if dlogit_ng is not None:
            dlibrary = 0.0 if library_n is None else dzeros + dothers
            dlibrary_n[i] = weight * dlibrary
            to_logit(i, weight, F(dlibrary / total), e_g, dlogit_ng)


def _table(log_theta: Tensor | None, theta: Tensor | None, n_nonzeros: int) -> Tensor | None:
    """The table of :func:`fill_table`, where theta is one for each gene and there are counts enough to use it."""
    if log_theta is None or theta is None or log_theta.shape[0] > 1 or n_nonzeros < log_theta.shape[1]:
        return None
    n_counts = min(max(MAX_PRODUCT, n_nonzeros // log_theta.shape[1]), LONGEST_TABLE)
    table_x2g = log_theta.new_empty(n_counts, 2, log_theta.shape[1])
    arrays = [t.detach().numpy() for t in (log_theta[0], theta[0], table_x2g)]
    kernel = compiled(fill_table, at_once=True)
    on_threads(lambda first, last: kernel(first, last, *arrays), log_theta.shape[1], table_x2g.numel())
    return table_x2g


def score(
    start: Tensor,
    col_m: Tensor,
    x_m: Tensor,
    logit_ng: Tensor,
    library_n: Tensor | None,
    log_theta: Tensor | None,
    dropout_ng: Tensor | None,
    weight_n: Tensor | None,
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """Value (n,), and the derivatives of the weighted sum of values with respect to logit, library, log theta, dropout.

    No derivatives without weights. There may be several rows of rates for each cell, one draw after the other.
    """
    n, g = logit_ng.shape
    top_n = logit_ng.new_zeros(n) if library_n is None else logit_ng.amax(1)
    log_theta_tg = None if log_theta is None else log_theta.reshape(-1, g).clamp(*LOG_THETA_RANGE)
    theta_tg = None if log_theta_tg is None else log_theta_tg.exp()
    table_x2g = _table(log_theta_tg, theta_tg, x_m.shape[0])
    inputs = [start, col_m, x_m, logit_ng, top_n, library_n, log_theta_tg, theta_tg, table_x2g, dropout_ng, weight_n]
    value_n = torch.empty_like(top_n)
    dlibrary_n = dlogit_ng = ddropout_ng = dtheta = None
    block = 1
    if weight_n is not None:
        dlibrary_n, dlogit_ng = torch.empty_like(top_n), logit_ng.new_empty(n, g)
        ddropout_ng = None if dropout_ng is None else logit_ng.new_empty(n, g)
        block = BLOCK if log_theta is not None and log_theta.ndim == 1 else 1
        dtheta = None if log_theta is None else log_theta.new_zeros(-(-n // block), g)
    outputs = value_n, dlibrary_n, dlogit_ng, ddropout_ng, dtheta
    arrays = [None if t is None else t.detach().contiguous().numpy() for t in (*inputs, *outputs)]
    kernel = compiled(score_rows)
    on_threads(lambda first, last: kernel(first * block, min(last * block, n), block, *arrays), -(-n // block), n * g)
    if dtheta is not None:
        dtheta = dtheta.sum(0) if block > 1 else dtheta.view_as(log_theta)
    return value_n, (dlogit_ng, None if library_n is None else dlibrary_n, dtheta, ddropout_ng)
