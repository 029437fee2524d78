"""Passes over labels and cells for :mod:`scvi_lite.nn.each_label`, compiled for the CPU in single or double precision.

A hidden unit of a label and a cell is made from a + t, where t is that of the label, (l, h), and a that of the cell,
(1, n, h), or of both, (l, n, h).
"""

from __future__ import annotations

import math

import numpy as np

from scvi_lite._compiled import compiled

LOG_2PI = math.log(2 * math.pi)


@compiled
def moments(a_xnh, table_lh):
    """Mean and variance of each hidden unit before the norm, (h,) each."""
    n_labels, n_own = len(table_lh), len(a_xnh)
    n_cells, n_hidden = a_xnh.shape[1:]
    loc_h, var_h = np.zeros_like(table_lh[0]), np.zeros_like(table_lh[0])
    for label in range(n_labels):
        a_nh, sum_h = a_xnh[label % n_own], np.zeros_like(loc_h)
        for n in range(n_cells):
            sum_h += a_nh[n]
        loc_h += (sum_h / n_cells + table_lh[label]) / n_labels
    for label in range(n_labels):
        a_nh, shift_h, sum_h = a_xnh[label % n_own], table_lh[label] - loc_h, np.zeros_like(loc_h)
        for n in range(n_cells):
            for h in range(n_hidden):
                dev = a_nh[n, h] + shift_h[h]
                sum_h[h] += dev * dev
        var_h += sum_h / (n_labels * n_cells)
    return loc_h, var_h


@compiled
def hidden_units(a_xnh, table_lh, loc_h, slope_h, offset_h, keep_nh, h_lnh):
    """Fill h with max(slope (a + t - loc) + offset, 0) times what dropout keeps."""
    n_labels, n_cells, n_hidden = h_lnh.shape
    zero = slope_h.dtype.type(0)
    for label in range(n_labels):
        a_nh, shift_h = a_xnh[label % len(a_xnh)], (table_lh[label] - loc_h) * slope_h + offset_h
        for n in range(n_cells):
            for h in range(n_hidden):
                h_lnh[label, n, h] = max(a_nh[n, h] * slope_h[h] + shift_h[h], zero)
            if keep_nh is not None:
                h_lnh[label, n] *= keep_nh[n]


@compiled
def hidden_units_back(up_lnh, h_lnh, a_xnh, table_lh, loc_h, rstd_h, gain_h, kept, share, da_nh, dtable_lh):
    """Turn derivatives for h into those for a + t, in place, and give those for the gain and the offset of the norm.

    Where dropout left a unit out, h is zero; where not, it was multiplied with ``kept``. ``share`` is what a row is of
    the moments: 1 / (l n) or, where those are not of these rows, 0. Sums over labels and over cells are filled in.
    """
    n_labels, n_cells, n_hidden = h_lnh.shape
    zero, slope_h = gain_h.dtype.type(0), gain_h * rstd_h
    dslope_h, doffset_h = np.zeros_like(gain_h), np.zeros_like(gain_h)
    for label in range(n_labels):
        a_nh, sum_h, with_a_h = a_xnh[label % len(a_xnh)], np.zeros_like(gain_h), np.zeros_like(gain_h)
        for n in range(n_cells):  # few arrays to a loop, or the compiler does not work on many units at once
            for h in range(n_hidden):
                up_lnh[label, n, h] = up_lnh[label, n, h] if h_lnh[label, n, h] > zero else zero
            for h in range(n_hidden):
                sum_h[h] += up_lnh[label, n, h]
            for h in range(n_hidden):
                with_a_h[h] += up_lnh[label, n, h] * a_nh[n, h]
        dslope_h += (with_a_h + sum_h * (table_lh[label] - loc_h)) * kept
        doffset_h += sum_h * kept
    by_up_h, by_a_h = slope_h * kept, dslope_h * slope_h * rstd_h * rstd_h * share
    for label in range(n_labels):
        a_nh, sum_h = a_xnh[label % len(a_xnh)], np.zeros_like(gain_h)
        to_all_h = slope_h * doffset_h * share + by_a_h * (table_lh[label] - loc_h)
        for n in range(n_cells):
            for h in range(n_hidden):
                up_lnh[label, n, h] = up_lnh[label, n, h] * by_up_h[h] - a_nh[n, h] * by_a_h[h] - to_all_h[h]
            for h in range(n_hidden):
                sum_h[h] += up_lnh[label, n, h]
            for h in range(n_hidden):
                da_nh[n, h] += up_lnh[label, n, h]
        dtable_lh[label] = sum_h
    return dslope_h * rstd_h, doffset_h


@compiled
def draw(loc_lnk, var_lnk, log_var_lnk, noise_lnk, u_lnk, kl_ln):
    """Fill u with draws of the normals, and their KL from a standard normal."""
    for label in range(len(loc_lnk)):
        for n in range(loc_lnk.shape[1]):
            kl = 0.0
            for k in range(loc_lnk.shape[2]):
                loc, var = loc_lnk[label, n, k], var_lnk[label, n, k]
                u_lnk[label, n, k] = loc + np.sqrt(var) * noise_lnk[label, n, k]
                kl += var + loc * loc - 1 - log_var_lnk[label, n, k]
            kl_ln[label, n] = kl / 2


@compiled
def draw_back(du_lnk, dkl_ln, loc_lnk, var_lnk, noise_lnk, dloc_lnk, dvar_lnk):
    """Fill in derivatives for mean and variance of the normals, from those for the draws and the KL."""
    for label in range(len(loc_lnk)):
        for n in range(loc_lnk.shape[1]):
            dkl = dkl_ln[label, n]
            for k in range(loc_lnk.shape[2]):
                du, var = du_lnk[label, n, k], var_lnk[label, n, k]
                dloc_lnk[label, n, k] = du + dkl * loc_lnk[label, n, k]
                dvar_lnk[label, n, k] = (du * noise_lnk[label, n, k] / np.sqrt(var) + dkl - dkl / var) / 2


@compiled
def weigh(z_nk, loc_nk, scale_nk, z_loc_lnk, z_var_lnk, z_log_var_lnk, kl_ln, log_prob_nl, log_prior_l, misfit_n, kl_n):
    """Fill in log q(z | x) - Σ_y q(y | z) log p(z | u, y), and Σ_y q(y | z) KL(u) + KL(y).

    Gives the derivatives of both for log q(y | z), of which the second is one of several, (2, l, n).
    """
    n_labels, n_cells, n_latent = z_loc_lnk.shape
    dlog_prob_2ln = np.empty((2, n_labels, n_cells), z_nk.dtype)
    for n in range(n_cells):
        misfit, kl = 0.0, 0.0
        for k in range(n_latent):
            gap = (z_nk[n, k] - loc_nk[n, k]) / scale_nk[n, k]
            misfit -= gap * gap / 2 + math.log(scale_nk[n, k])
        misfit -= LOG_2PI * n_latent / 2
        for label in range(n_labels):
            prob, minus_log_p = math.exp(log_prob_nl[n, label]), 0.0
            for k in range(n_latent):
                gap, var = z_nk[n, k] - z_loc_lnk[label, n, k], z_var_lnk[label, n, k]
                minus_log_p += gap * gap / var + z_log_var_lnk[label, n, k]
            minus_log_p = (minus_log_p + LOG_2PI * n_latent) / 2
            kl_y = kl_ln[label, n] + log_prob_nl[n, label] - log_prior_l[label]
            misfit += prob * minus_log_p
            kl += prob * kl_y
            dlog_prob_2ln[0, label, n] = prob * minus_log_p
            dlog_prob_2ln[1, label, n] = prob * (kl_y + 1)
        misfit_n[n], kl_n[n] = misfit, kl
    return dlog_prob_2ln


@compiled
def weigh_back(
    up_n, up_kl_n, z_nk, loc_nk, scale_nk, z_loc_lnk, z_var_lnk, log_prob_nl, dlog_prob_2ln,
    dz_nk, dloc_nk, dscale_nk, dz_loc_lnk, dz_var_lnk, dkl_ln, dlog_prob_nl,
):  # fmt: skip
    """Fill in the derivatives of :func:`weigh` for all that it reads."""
    n_labels, n_cells, n_latent = z_loc_lnk.shape
    for n in range(n_cells):
        for k in range(n_latent):
            gap, rate = z_nk[n, k] - loc_nk[n, k], 1 / scale_nk[n, k]
            dloc_nk[n, k] = up_n[n] * gap * rate * rate
            dscale_nk[n, k] = up_n[n] * (gap * gap * rate * rate - 1) * rate
            dz_nk[n, k] = -dloc_nk[n, k]
        for label in range(n_labels):
            prob = math.exp(log_prob_nl[n, label])
            weight = prob * up_n[n]
            dkl_ln[label, n] = prob * up_kl_n[n]
            dlog_prob_nl[n, label] = up_n[n] * dlog_prob_2ln[0, label, n] + up_kl_n[n] * dlog_prob_2ln[1, label, n]
            for k in range(n_latent):
                gap, rate = z_nk[n, k] - z_loc_lnk[label, n, k], 1 / z_var_lnk[label, n, k]
                dz_loc = -weight * gap * rate
                dz_loc_lnk[label, n, k] = dz_loc
                dz_var_lnk[label, n, k] = (dz_loc * gap + weight) * rate / 2
                dz_nk[n, k] -= dz_loc
