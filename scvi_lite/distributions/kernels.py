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

from scvi_lite._compiled import AT_ONCE, CHEAP, compiled, on_threads
from scvi_lite.distributions.counts import LOG_THETA_RANGE
from scvi_lite.distributions.elementary_kernels import INT, F, U, exp, log, log1p, wide

# Up to here (theta + 1) (theta + 2) ... (theta + x - 1) is a product that a double holds.
MAX_PRODUCT = 16
# Counts that the table of a minibatch may reach, where there are enough of them to be worth it.
LONGEST_TABLE = 64
LOG_FACTORIAL = np.array([math.lgamma(x + 1.0) for x in range(1024)])
# What all cells are added to is first added up for so many of them, so that the sum is the same on any threads.
BLOCK = 8
# As much as mu / theta can be: log(1 + mu / theta) is log mu - log theta by then.
HUGE = F(1e37)
# Rounded the same whether derivatives are asked for or not: products and sums stay as they are written.
ROUNDED = AT_ONCE | {"fastmath": {"nnan", "ninf", "nsz", "arcp"}}
# In the row of a cell, a count that is left to :func:`rare_row`.
RARE = F(-1)


@numba.njit(**AT_ONCE)
def exp_row(i, logit_ng, top, e_g):
    """exp(logit - top) of a row, and its sum."""
    wide()
    total = F(0)
    for j in range(e_g.shape[0]):
        e_g[j] = exp(logit_ng[i, j] - top)
        total += e_g[j]
    return total


@numba.njit(error_model="numpy")
def spread(col_k, x_k, largest, x_g, more_k, rare_k):
    """Fill a row of counts in; note which of them are 2, 3, ..., ``largest``, and which others are not 1.

    In loops without branches that are hard to foresee: most counts are 1.
    """
    n_noted, n_more, n_rare = 0, 0, 0
    for k in range(col_k.shape[0]):
        x_g[U(col_k[k])] = x_k[k]
        more_k[n_noted] = k
        n_noted += x_k[k] != 1
    for k in more_k[:n_noted]:
        x = x_k[U(k)]
        if 1 <= x <= largest and x == math.floor(x):
            more_k[n_more] = k
            n_more += 1
        else:
            x_g[U(col_k[U(k)])] = RARE
            rare_k[n_rare] = k
            n_rare += 1
    return n_more, n_rare


@numba.njit(**ROUNDED)
def dense_row(
    i, t, o, shift, c, weight, x_g, e_g, logit_ng, log_theta_tg, theta_tg, inverse_tg, dropout_ng, value_g, dmu_ng,
    dtheta_og, ddropout_ng,
):  # fmt: skip
    """Fill in the log-probabilities of row i, where mu = c e and log mu = logit + shift.

    Where there is room for them, also derivatives: that for log mu as it is, the others times ``weight``; those for
    log theta are added to row o. Counts above 1 lack what :func:`more_row` adds, rare ones all but their dropout.
    """
    wide()
    for j in range(e_g.shape[0]):
        mu, known = e_g[j] * c, x_g[j]
        x, usual = max(known, F(0)), F(1) if known > 0 else F(0)
        if theta_tg is None:
            cost, h, u = mu, mu, F(1)
            value = x * (logit_ng[i, j] + shift)
        else:
            d, r = logit_ng[i, j] + shift - log_theta_tg[t, j], min(mu * inverse_tg[t, j], HUGE)
            u, s = F(1) / (F(1) + r), max(log1p(r), d)
            cost, h = theta_tg[t, j] * s, mu * u
            value = x * (d - s) + usual * log_theta_tg[t, j]
        if dropout_ng is None:
            dcost = F(-1) if known >= 0 else F(0)
            value += dcost * cost
        else:
            is_zero, dropout = known == 0, max(dropout_ng[i, j], F(-40))
            prior = exp(-dropout)
            posterior = prior * exp(-cost)
            # The minimum, of which it is never above, keeps the compiler from dividing once more where that is shorter.
            before, after = min(F(1) / (F(1) + prior), F(1)), F(1) / (F(1) + posterior)
            value += log(before * ((F(1) + posterior) if is_zero else F(1))) - usual * cost
            value -= F(0) if is_zero else dropout
            dcost = -posterior * after if is_zero else -usual
            if ddropout_ng is not None:
                ddropout_ng[i, j] = weight * before * ((prior - posterior) * after if is_zero else F(-1))
        value_g[j] = value
        if dmu_ng is not None:
            dmu = x * u + dcost * h
            dmu_ng[i, j] = dmu
            if theta_tg is not None:
                dtheta_og[o, j] += weight * (dcost * (cost - h) - x * u + usual)


@numba.njit(error_model="numpy")
def more_row(t, o, col_k, x_k, more_k, weight, theta_tg, table_x2g, dtheta_og):
    """What counts x above 1 add to the log-probability, which depends on nothing else but theta."""
    value = F(0)
    for k in more_k:
        j, x = U(col_k[U(k)]), x_k[U(k)]
        if theta_tg is None:
            value -= F(LOG_FACTORIAL[U(x)])
        else:
            if table_x2g is None:
                rise, slope = rise_and_slope(int(x), theta_tg[t, j])
            else:
                rise, slope = table_x2g[U(x) - U(1), 0, j], table_x2g[U(x) - U(1), 1, j]
            value += rise
            if dtheta_og is not None:
                dtheta_og[o, j] += weight * slope
    return value


@numba.njit(**AT_ONCE)
def next_count(k, first, last, theta_g, before_2g, row_2g):
    """The row of the table for the count k + 1, from that of k: see :func:`fill_table`."""
    wide()
    log_x = F(math.log(k + 1.0))
    for j in range(U(first), U(last)):
        row_2g[0, j] = before_2g[0, j] + log(theta_g[j] + F(k)) - log_x
        row_2g[1, j] = before_2g[1, j] + theta_g[j] / (theta_g[j] + F(k))


def fill_table(first, last, theta_g, table_x2g):
    """For the counts 1, 2, ... and the genes first:last what :func:`rise_and_slope` gives."""
    for j in range(first, last):
        table_x2g[0, 0, j], table_x2g[0, 1, j] = F(0), F(0)
    for k in range(1, table_x2g.shape[0]):
        next_count(k, first, last, theta_g, table_x2g[k - 1], table_x2g[k])


@numba.njit(error_model="numpy")
def rise_and_slope(x, theta):
    """log ((theta + 1) ... (theta + x - 1) / x!), and its derivative with respect to log theta."""
    rise, slope = 1.0, 0.0  # the product, and its derivative
    for k in range(1, x):
        slope = slope * (theta + k) + theta * rise
        rise *= theta + k
    return F(math.log(rise) - LOG_FACTORIAL[x]), F(slope / rise)


@numba.njit(error_model="numpy")
def rare_row(i, t, o, col_k, x_k, rare_k, shift, weight, logit_ng, log_theta_tg, dmu_ng, dtheta_og):
    """Log-probability of counts that are large or no integers, and derivatives as by :func:`dense_row`."""
    value = 0.0
    for k in rare_k:
        j, x = U(col_k[U(k)]), x_k[U(k)]
        log_mu = logit_ng[i, j] + shift
        if log_theta_tg is None:
            mu = math.exp(log_mu)
            one, dmu, dtheta = x * log_mu - mu - log_factorial(x), x - mu, 0.0
        else:
            one, dmu, dtheta = nb_any(x, log_mu, log_theta_tg[t, j])
        value += one
        if dmu_ng is not None:
            dmu_ng[i, j] = dmu
            if log_theta_tg is not None:
                dtheta_og[o, j] += weight * dtheta
    return value


@numba.njit(error_model="numpy")
def log_factorial(x):
    """lgamma(x + 1)."""
    return LOG_FACTORIAL[U(x)] if x < len(LOG_FACTORIAL) and x == math.floor(x) else math.lgamma(x + 1.0)


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
    return x * (d - s) - theta * s + gammas - log_factorial(x), dmu, theta * (digammas - s) - dmu


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
def summed(x_g):
    """The sum."""
    wide()
    total = F(0)
    for j in range(x_g.shape[0]):
        total += x_g[j]
    return total


@numba.njit(**AT_ONCE)
def to_logit(i, weight, share, e_g, dmu_ng):
    """From the derivative with respect to log mu to that with respect to the logit, times ``weight``."""
    wide()
    for j in range(e_g.shape[0]):
        dmu_ng[i, j] = weight * (dmu_ng[i, j] - share * e_g[j])


def score_rows(
    first, last, block, start, col_m, x_m, logit_ng, top_n, library_n, log_theta_tg, theta_tg, inverse_tg, table_x2g,
    dropout_ng, weight_n, value_n, dlibrary_n, dlogit_ng, ddropout_ng, dtheta_og,
):  # fmt: skip
    """Fill values, and derivatives times the weight of each row, of the rows first:last.

    What a likelihood has no use for is None. Derivatives with respect to log theta are added up, those of ``block``
    rows in one. There may be several rows of rates for each cell, one draw after the other.
    """
    n_genes, n_cells = logit_ng.shape[1], start.shape[0] - 1
    e_g, x_g, value_g = np.empty(n_genes, F), np.zeros(n_genes, F), np.empty(n_genes, F)
    more_k, rare_k = np.empty(n_genes, INT), np.empty(n_genes, INT)
    largest = MAX_PRODUCT if table_x2g is None else table_x2g.shape[0]
    for i in range(first, last):
        lo, hi = start[i % n_cells], start[i % n_cells + 1]
        col_k, x_k = col_m[lo:hi], x_m[lo:hi]
        t = 0 if theta_tg is None else i % theta_tg.shape[0]
        o = i // block
        weight = F(0) if weight_n is None else weight_n[i]
        total = exp_row(i, logit_ng, top_n[i], e_g)
        shift = 0.0 if library_n is None else library_n[i] - math.log(total)
        n_more, n_rare = spread(col_k, x_k, largest, x_g, more_k, rare_k)
        dense_row(
            i, t, o, F(shift - top_n[i]), F(math.exp(shift)), weight, x_g, e_g, logit_ng, log_theta_tg, theta_tg,
            inverse_tg, dropout_ng, value_g, dlogit_ng, dtheta_og, ddropout_ng,
        )  # fmt: skip
        more = more_row(t, o, col_k, x_k, more_k[:n_more], weight, theta_tg, table_x2g, dtheta_og)
        rare = rare_row(
            i, t, o, col_k, x_k, rare_k[:n_rare], shift - top_n[i], weight, logit_ng, log_theta_tg, dlogit_ng, dtheta_og
        )
        value_n[i] = summed(value_g) + more + rare
        for j in col_k:
            x_g[U(j)] = F(0)
        if dlogit_ng is not None:
            dlibrary = 0.0 if library_n is None else summed(dlogit_ng[i])
            dlibrary_n[i] = weight * dlibrary
            to_logit(i, weight, F(dlibrary / total), e_g, dlogit_ng)


def _table(theta: Tensor | None, n_nonzeros: int) -> Tensor | None:
    """The table of :func:`fill_table`, where theta is one for each gene and there are counts enough to use it."""
    if theta is None or theta.shape[0] > 1 or n_nonzeros < theta.shape[1]:
        return None
    n_counts = min(max(MAX_PRODUCT, n_nonzeros // theta.shape[1]), LONGEST_TABLE)
    table_x2g = theta.new_empty(n_counts, 2, theta.shape[1])
    arrays = [t.detach().numpy() for t in (theta[0], table_x2g)]
    kernel = compiled(fill_table, at_once=True)
    on_threads(lambda first, last: kernel(first, last, *arrays), theta.shape[1], table_x2g.numel() // CHEAP)
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
    theta_tg, inverse_tg = (None, None) if log_theta_tg is None else (log_theta_tg.exp(), log_theta_tg.neg().exp())
    thetas = log_theta_tg, theta_tg, inverse_tg, _table(theta_tg, x_m.shape[0])
    inputs = [start, col_m, x_m, logit_ng, top_n, library_n, *thetas, dropout_ng, weight_n]
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
