"""The formulas of :mod:`scvi_lite.distributions.fused` as one pass over the rows of a minibatch, compiled for the CPU.

A cell's row stays in the cache from the softmax to the gradients, and nothing of the size of the minibatch is made but
the gradients. Numba compiles a function when it is first called, and keeps the result on disk beside the package (or
in the user's cache, where that cannot be written).

``exp`` and ``log1p`` are polynomials, so that the compiler can work on many genes at once: coefficients interpolate
(exp(r) - 1 - r) / r² and (log(1 + f) - f) / f² at Chebyshev nodes; relative errors stay below 3e-7.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from scvi_lite.distributions.counts import LOG_THETA_RANGE

F, INT = np.float32, np.int32
# Sums may be taken in any order: the compiler then adds many genes at once.
ANY_ORDER = {"nnan", "ninf", "nsz", "arcp", "contract", "reassoc"}
# Up to here lgamma(x + theta) - lgamma(theta) is the logarithm of a product that a double holds.
MAX_PRODUCT = 16
LOG_FACTORIAL = np.array([math.lgamma(x + 1.0) for x in range(MAX_PRODUCT + 1)])
# A theta below is nothing beside any mean.
TINY = F(1e-17)
# A thread is worth its start from this many elements on.
MIN_WORK = 1 << 15


@numba.njit(fastmath={"contract"})
def exp(x):
    """exp(x) of a float32: 2^k times a polynomial on [-log(2)/2, log(2)/2]."""
    x = min(max(x, F(-87)), F(88))
    k = np.rint(x * F(1.4426950408889634))
    r = x - k * F(0.693359375) + k * F(2.12194440e-4)
    p = F(0.00139262) * r + F(0.00836317)
    p = p * r + F(0.04166655)
    p = p * r + F(0.16666577)
    p = p * r + F(0.5)
    return (p * r * r + r + F(1)) * INT((INT(k) + INT(127)) << INT(23)).view(F)


@numba.njit(fastmath={"contract"})
def log1p(r):
    """log(1 + r) of a float32 r >= 0: 1 + r is 2^k (1 + f) with |f| <= 1/3; k = 0 keeps every digit of a small r."""
    k = exponent(r + F(1))
    power = INT((INT(127) - k) << INT(23)).view(F)
    return log_polynomial((power - F(1)) + r * power) + F(k) * F(0.6931471805599453)


@numba.njit(fastmath={"contract"})
def log(u):
    """log(u) of a float32."""
    k = exponent(u)
    return log_polynomial(u * INT((INT(127) - k) << INT(23)).view(F) - F(1)) + F(k) * F(0.6931471805599453)


@numba.njit
def exponent(u):
    """The k for which u / 2^k lies between 2/3 and 4/3, from the bits of a float32."""
    return INT((F(u * F(1.5)).view(INT) >> INT(23)) - INT(127))


@numba.njit(fastmath={"contract"})
def log_polynomial(f):
    """log(1 + f) for -1/3 <= f <= 1/3."""
    p = F(0.13425749) * f - F(0.15040764)
    p = p * f + F(0.14118310)
    p = p * f - F(0.16483018)
    p = p * f + F(0.20003780)
    p = p * f - F(0.25004146)
    p = p * f + F(0.33333320)
    p = p * f - F(0.49999986)
    return p * f * f + f


@numba.njit(fastmath=ANY_ORDER, error_model="numpy")
def exp_row(i, logit_ng, top, e_g, zero_g):
    """exp(logit - top) of a row, and its sum; marks every gene as a zero."""
    total = F(0)
    for j in range(e_g.shape[0]):
        e_g[j] = exp(logit_ng[i, j] - top)
        total += e_g[j]
        zero_g[j] = F(1)
    return total


@numba.njit(fastmath=ANY_ORDER, error_model="numpy")
def zeros_row(i, o, c, e_g, zero_g, theta_g, dropout_ng, dmu_ng, dtheta_ng, ddropout_ng):
    """Log-probability of the zeros of row i, where mu = c e, and its derivatives into row o.

    Also gives the sum of the derivative with respect to log mu.
    """
    value, total = F(0), F(0)
    for j in range(e_g.shape[0]):
        mu, zero = e_g[j] * c, zero_g[j]
        if theta_g is None:
            t, h = mu, mu
        else:
            theta = max(theta_g[j], TINY)  # mu / theta stays a float
            t = theta * log1p(mu / theta)
            h = mu / (F(1) + mu / theta)
        if dropout_ng is None:
            dt = -zero
            value -= zero * t
        else:
            prior = exp(-max(dropout_ng[i, j], F(-40)))
            posterior = prior * exp(-t)
            both = F(1) / ((F(1) + prior) * (F(1) + posterior))
            dt = zero * (both * (F(1) + prior) - F(1))
            value += zero * log(both * (F(1) + posterior) * (F(1) + posterior))
            ddropout_ng[o, j] = zero * both * (prior - posterior)
        if theta_g is not None:
            dtheta_ng[o, j] = dt * (t - h)
        dmu_ng[o, j] = dt * h
        total += dt * h
    return value, total


@numba.njit(fastmath=ANY_ORDER, error_model="numpy", nogil=True, cache=True)
def fill_tables(log_theta_g, theta_g, rise_xg, slope_xg):
    """For the counts 1, 2, ... and every gene what depends on nothing else.

    log (theta (theta + 1) ... (theta + x - 1) / x!), and its derivative with respect to log theta.
    """
    n_genes = theta_g.shape[0]
    for j in range(n_genes):
        rise_xg[0, j], slope_xg[0, j] = log_theta_g[j], F(1)
    for k in range(1, rise_xg.shape[0]):
        log_x = F(math.log(k + 1.0))
        for j in range(n_genes):
            rise_xg[k, j] = rise_xg[k - 1, j] + log(theta_g[j] + F(k)) - log_x
            slope_xg[k, j] = slope_xg[k - 1, j] + theta_g[j] / (theta_g[j] + F(k))


@numba.njit(fastmath=ANY_ORDER, error_model="numpy")
def softplus_and_sigmoid(n, x_k, softplus_k, sigmoid_k):
    """Both of the first n numbers."""
    for k in range(n):
        q = exp(-abs(x_k[k]))
        softplus_k[k] = max(x_k[k], F(0)) + log1p(q)
        sigmoid_k[k] = (F(1) if x_k[k] > 0 else q) / (F(1) + q)


@numba.njit(error_model="numpy")
def nonzeros_row(
    i, o, lo, hi, col_m, x_m, shift, logit_ng, log_theta_g, theta_g, rise_xg, slope_xg, dropout_ng,
    dmu_ng, dtheta_ng, ddropout_ng, work,
):  # fmt: skip
    """Same as :func:`zeros_row` for the non-zeros lo:hi of row i, where log mu = logit + shift.

    First what many genes at once are good for, d = log mu - log theta and the dropout logit, then each count.
    """
    value, total, n = 0.0, 0.0, hi - lo
    if log_theta_g is not None:
        for k in range(n):
            j = col_m[lo + k]
            work[0, k] = F(logit_ng[i, j] + shift - log_theta_g[j])
        softplus_and_sigmoid(n, work[0], work[1], work[2])
    if dropout_ng is not None:
        for k in range(n):
            work[3, k] = dropout_ng[i, col_m[lo + k]]
        softplus_and_sigmoid(n, work[3], work[4], work[5])
    for k in range(n):
        j, x = col_m[lo + k], x_m[lo + k]
        if log_theta_g is None:
            log_mu = logit_ng[i, j] + shift
            mu = math.exp(log_mu)
            value += x * log_mu - mu - math.lgamma(x + 1.0)
            dmu = x - mu
        else:
            d, s, theta = work[0, k], work[1, k], theta_g[j]
            if not (x <= MAX_PRODUCT and x == math.floor(x)):
                nb, dmu, dtheta = nb_any(float(x), logit_ng[i, j] + shift, float(log_theta_g[j]))
            else:
                if rise_xg is None:
                    rise, slope = rise_and_slope(int(x), theta, log_theta_g[j])
                else:
                    rise, slope = rise_xg[int(x) - 1, j], slope_xg[int(x) - 1, j]
                nb = x * (d - s) - theta * s + rise
                dmu = x - (x + theta) * work[2, k]
                dtheta = slope - theta * s - dmu
            value += nb
            dtheta_ng[o, j] = dtheta
        dmu_ng[o, j] = dmu
        total += dmu
        if dropout_ng is not None:
            value -= work[4, k]
            ddropout_ng[o, j] = -work[5, k]
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
    gammas = x * math.log(high) + (end - 0.5) * math.log1p(x / high) - x
    # Products, as a negative power of a NaN raises.
    a, b = 1 / end, 1 / high
    aa, bb = a * a, b * b
    gammas += (a - b) / 12 - (aa * a - bb * b) / 360
    digammas = math.log1p(x / high) - (a - b) / 2 - (aa - bb) / 12 + (aa * aa - bb * bb) / 120
    steps = 1.0
    for j in range(8):
        steps *= (theta + j) / (theta + j + x)
        digammas += 1 / (theta + j) - 1 / (theta + j + x)
    return gammas + math.log(steps), digammas


def score_rows(
    first, last, start, col_m, x_m, logit_ng, top_n, library_n, log_theta_tg, theta_tg, rise_xg, slope_xg, dropout_ng,
    value_n, dlibrary_n, dmu_ng, dtheta_ng, ddropout_ng,
):  # fmt: skip
    """Fill value and derivatives of the rows first:last. What a likelihood has no use for is None.

    There may be several rows of rates for each cell, one draw after the other.
    """
    n_cells = start.shape[0] - 1
    e_g, zero_g = np.empty(logit_ng.shape[1], F), np.empty(logit_ng.shape[1], F)
    work = np.empty((6, logit_ng.shape[1]), F)
    log_theta_g, theta_g = None, None
    for i in range(first, last):
        o = i % dmu_ng.shape[0]
        if log_theta_tg is not None:
            log_theta_g, theta_g = log_theta_tg[i % log_theta_tg.shape[0]], theta_tg[i % log_theta_tg.shape[0]]
        total = exp_row(i, logit_ng, top_n[i], e_g, zero_g)
        shift = 0.0 if library_n is None else library_n[i] - math.log(total)
        lo, hi = start[i % n_cells], start[i % n_cells + 1]
        for m in range(lo, hi):
            zero_g[col_m[m]] = F(0)
        c = F(math.exp(shift))
        zeros, dzeros = zeros_row(i, o, c, e_g, zero_g, theta_g, dropout_ng, dmu_ng, dtheta_ng, ddropout_ng)
        others, dothers = nonzeros_row(
            i, o, lo, hi, col_m, x_m, shift - top_n[i], logit_ng, log_theta_g, theta_g,
            rise_xg, slope_xg, dropout_ng, dmu_ng, dtheta_ng, ddropout_ng, work,
        )  # fmt: skip
        value_n[i] = zeros + others
        if library_n is not None:
            dlibrary_n[i] = dzeros + dothers
            share = F((dzeros + dothers) / total)
            for j in range(e_g.shape[0]):
                dmu_ng[o, j] -= share * e_g[j]


@cache
def compiled(function: Callable[..., None]) -> Callable[..., None]:
    """A function over the rows of a minibatch, compiled; the result is kept on disk where that can be written."""
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": {"contract"}}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # nowhere to keep the result
        return numba.njit(**options)(function)


@cache
def _threads(pid: int) -> ThreadPoolExecutor:
    """Threads of this process; those of a parent do not survive a fork."""
    return ThreadPoolExecutor(thread_name_prefix="scvi_lite")


def on_threads(function: Callable[..., None], n: int, g: int, arguments: Callable[[], Sequence[Any]]) -> None:
    """Call a function over the rows of an (n, g) minibatch, each thread on a share of them.

    It is given the first row and the one after the last of its share, and ``arguments()``, asked for anew each time.
    """
    n_threads = max(1, min(torch.get_num_threads(), n, n * g // MIN_WORK))
    calls = [(k * n // n_threads, (k + 1) * n // n_threads, *arguments()) for k in range(n_threads)]
    others = [_threads(os.getpid()).submit(function, *call) for call in calls[1:]]
    function(*calls[0])
    for other in others:
        other.result()


def _tables(log_theta: Tensor | None, theta: Tensor | None, n_nonzeros: int) -> tuple[Tensor | None, Tensor | None]:
    """The tables of :func:`fill_tables`, where theta is one for each gene and there are counts enough to use them."""
    if log_theta is None or theta is None or log_theta.shape[0] > 1 or n_nonzeros < log_theta.shape[1]:
        return None, None
    rise_xg, slope_xg = (log_theta.new_empty(MAX_PRODUCT, log_theta.shape[1]) for _ in range(2))
    fill_tables(*(t.detach().numpy() for t in (log_theta[0], theta[0], rise_xg, slope_xg)))
    return rise_xg, slope_xg


def score(
    start: Tensor,
    col_m: Tensor,
    x_m: Tensor,
    logit_ng: Tensor,
    library_n: Tensor | None,
    log_theta: Tensor | None,
    dropout_ng: Tensor | None,
    gradients: bool,
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """Value (n,), and its derivatives with respect to logit, library, log theta (n, g) and dropout.

    There may be several rows of rates for each cell, one draw after the other.
    """
    n, g = logit_ng.shape
    top_n = logit_ng.new_zeros(n) if library_n is None else logit_ng.amax(1)
    log_theta = None if log_theta is None else log_theta.reshape(-1, g).clamp(*LOG_THETA_RANGE)
    theta = None if log_theta is None else log_theta.exp()
    tables = _tables(log_theta, theta, x_m.shape[0])
    tensors = [start, col_m, x_m, logit_ng, top_n, library_n, log_theta, theta, *tables, dropout_ng]
    inputs = [None if t is None else t.detach().contiguous().numpy() for t in tensors]

    def outputs(n_rows: int) -> list[Tensor | None]:
        return [None if t is None else logit_ng.new_empty(n_rows, g) for t in (logit_ng, log_theta, dropout_ng)]

    value_n, dlibrary_n, full = logit_ng.new_empty(n), logit_ng.new_empty(n), outputs(n if gradients else 0)

    def arguments() -> list[Any]:  # without gradients, each thread has one row to write to
        grads = [None if t is None else t.numpy() for t in (full if gradients else outputs(1))]
        return [*inputs, value_n.numpy(), dlibrary_n.numpy(), *grads]

    on_threads(compiled(score_rows), n, g, arguments)
    dlogit_ng, dtheta_ng, ddropout_ng = full
    return value_n, (dlogit_ng, None if library_n is None else dlibrary_n, dtheta_ng, ddropout_ng)
