"""Passes over labels and cells for :mod:`scvi_lite.nn.each_label`, compiled for the CPU in single or double precision.

A hidden unit of a label and a cell is norm(w x + t), with t of the label, (l, h), and x of the cell, (1, n, k), or of
both, (l, n, k): "own" counts the x of a cell, 1 or l. Over labels and cells, w x + t has the mean of the labels' own
means, and their variance plus w C w, where C is the covariance of x within labels. So the norm is folded into w and t.
"""

from __future__ import annotations

import math
from functools import partial

import numba
import numpy as np

from scvi_lite._compiled import AT_ONCE, compiled

LOG_2PI = math.log(2 * math.pi)
at_once = partial(compiled, at_once=True)


@numba.njit(**AT_ONCE)
def covariance(x_xnk, centre_xk):
    """Covariance of x around the means of its cells (k, k), which are filled in."""
    n_own, n_cells, n_latent = x_xnk.shape
    zero = x_xnk.dtype.type(0)
    cov_kk, dev_kn = np.zeros((n_latent, n_latent), x_xnk.dtype), np.empty((n_latent, n_cells), x_xnk.dtype)
    for own in range(n_own):
        for k in range(n_latent):
            total = zero
            for n in range(n_cells):
                dev_kn[k, n] = x_xnk[own, n, k]
                total += dev_kn[k, n]
            centre_xk[own, k] = total / x_xnk.dtype.type(n_cells)
            for n in range(n_cells):
                dev_kn[k, n] -= centre_xk[own, k]
            for i in range(k + 1):
                total = zero
                for n in range(n_cells):
                    total += dev_kn[i, n] * dev_kn[k, n]
                cov_kk[i, k] += total / x_xnk.dtype.type(n_own * n_cells)
                cov_kk[k, i] = cov_kk[i, k]
    return cov_kk


@at_once
def fold(x_xnk, weight_kh, bias_h, table_lh, gain_h, offset_h, loc_h, var_h, momentum, eps, training):
    """Weight and shift of each label that give normed units before the activation: (k, h) and (l, h).

    The moments are those of the units, by which the running ones are moved in place, or the running ones. Gives what
    :func:`fold_back` needs, too: the means of x (x, k); the product of the weight with the covariance of x around them
    (k, h); by how much the mean of each label is above that of all, and its shift before the norm (l, h); and the
    inverse of the standard deviation (h,).
    """
    (n_own, n_cells, n_latent), (n_labels, n_hidden) = x_xnk.shape, table_lh.shape
    of_type = x_xnk.dtype.type
    centre_xk, cov_kh, from_loc_lh = np.zeros_like(x_xnk[:, 0]), np.zeros_like(weight_kh), table_lh.copy()
    dev_lh, mean_h, spread_h = table_lh.copy(), loc_h - bias_h, var_h.copy()
    if training:
        cov_kk = covariance(x_xnk, centre_xk)
        mean_h[:], spread_h[:] = of_type(0), of_type(0)
        for label in range(n_labels):
            for k in range(n_latent):
                for h in range(n_hidden):
                    dev_lh[label, h] += centre_xk[label % n_own, k] * weight_kh[k, h]
            for h in range(n_hidden):
                mean_h[h] += dev_lh[label, h] / of_type(n_labels)
        for label in range(n_labels):
            for h in range(n_hidden):
                dev_lh[label, h] -= mean_h[h]
                spread_h[h] += dev_lh[label, h] * dev_lh[label, h] / of_type(n_labels)
        for i in range(n_latent):
            for k in range(n_latent):
                for h in range(n_hidden):
                    cov_kh[i, h] += cov_kk[i, k] * weight_kh[k, h]
            for h in range(n_hidden):
                spread_h[h] += cov_kh[i, h] * weight_kh[i, h]
        n_rows = n_labels * n_cells
        for h in range(n_hidden):
            loc_h[h] += of_type(momentum) * (mean_h[h] + bias_h[h] - loc_h[h])
            var_h[h] += of_type(momentum) * (spread_h[h] * of_type(n_rows / (n_rows - 1)) - var_h[h])
    rstd_h = of_type(1) / np.sqrt(spread_h + of_type(eps))
    folded_kh, shift_lh, slope_h = np.empty_like(weight_kh), np.empty_like(table_lh), gain_h * rstd_h
    for k in range(n_latent):
        for h in range(n_hidden):
            folded_kh[k, h] = weight_kh[k, h] * slope_h[h]
    for label in range(n_labels):
        for h in range(n_hidden):
            from_loc_lh[label, h] -= mean_h[h]
            shift_lh[label, h] = from_loc_lh[label, h] * slope_h[h] + offset_h[h]
    return folded_kh, shift_lh, (rstd_h, from_loc_lh, centre_xk, dev_lh, cov_kh)


@at_once
def hidden_units(a_xnh, shift_lh, keep_nh, h_lnh):
    """Fill h with max(a + shift, 0) times what dropout keeps."""
    n_labels, n_cells, n_hidden = h_lnh.shape
    zero = shift_lh.dtype.type(0)
    for label in range(n_labels):
        a_nh = a_xnh[label % len(a_xnh)]
        for n in range(n_cells):
            if keep_nh is None:
                for h in range(n_hidden):
                    h_lnh[label, n, h] = max(a_nh[n, h] + shift_lh[label, h], zero)
            else:
                for h in range(n_hidden):
                    h_lnh[label, n, h] = max(a_nh[n, h] + shift_lh[label, h], zero) * keep_nh[n, h]


@at_once
def hidden_units_back(up_mh, h_lnh, kept, da_mh, dshift_lh):
    """Turn derivatives for h, of l · n rows, into those for a + shift, in place.

    Where dropout left a unit out, h is zero; where not, it was multiplied with ``kept``. To ``dshift_lh`` their sums
    over cells are added, and those over labels to ``da_mh``, if a is the same for all labels; else both are one.
    """
    n_labels, n_cells, n_hidden = h_lnh.shape
    zero, is_shared = h_lnh.dtype.type(0), len(da_mh) < len(up_mh)
    for label in range(n_labels):
        for n in range(n_cells):
            row = label * n_cells + n
            for h in range(n_hidden):
                up_mh[row, h] = up_mh[row, h] * kept if h_lnh[label, n, h] > zero else zero
            for h in range(n_hidden):
                dshift_lh[label, h] += up_mh[row, h]
            if is_shared:
                for h in range(n_hidden):
                    da_mh[n, h] += up_mh[row, h]


@at_once
def fold_back(weight_kh, gain_h, folded, training, n_cells, dweight_kh, dtable_lh):
    """Turn derivatives for the folded weight and shifts into those for weight and table, in place.

    Gives those for bias, gain and offset, and what comes to x by way of the moments: x times (k, k), plus (x, k).
    """
    rstd_h, from_loc_lh, centre_xk, dev_lh, cov_kh = folded
    (n_own, n_latent), (n_labels, n_hidden) = centre_xk.shape, dtable_lh.shape
    of_type, slope_h = gain_h.dtype.type, gain_h * rstd_h
    dgain_h, doffset_h, dbias_h = np.zeros_like(gain_h), np.zeros_like(gain_h), np.zeros_like(gain_h)
    for k in range(n_latent):
        for h in range(n_hidden):
            dgain_h[h] += dweight_kh[k, h] * weight_kh[k, h] * rstd_h[h]
            dweight_kh[k, h] *= slope_h[h]
    for label in range(n_labels):
        for h in range(n_hidden):
            dgain_h[h] += dtable_lh[label, h] * from_loc_lh[label, h] * rstd_h[h]
            doffset_h[h] += dtable_lh[label, h]
            dtable_lh[label, h] *= slope_h[h]
    pull_kk, push_xk = np.zeros((n_latent, n_latent), gain_h.dtype), np.zeros_like(centre_xk)
    if not training:
        return dbias_h + slope_h * doffset_h, dgain_h, doffset_h, pull_kk, push_xk
    # Of the variance, twice the derivative.
    dvar_h, dmean_xh = -slope_h * rstd_h * dgain_h, np.zeros((n_own, n_hidden), gain_h.dtype)
    for label in range(n_labels):
        for h in range(n_hidden):
            dmean = (dvar_h[h] * dev_lh[label, h] - slope_h[h] * doffset_h[h]) / of_type(n_labels)
            dtable_lh[label, h] += dmean
            dmean_xh[label % n_own, h] += dmean
    for i in range(n_latent):
        for h in range(n_hidden):
            dweight_kh[i, h] += dvar_h[h] * cov_kh[i, h]
        for k in range(n_latent):
            pull = of_type(0)
            for h in range(n_hidden):
                pull += weight_kh[i, h] * dvar_h[h] * weight_kh[k, h]
            pull_kk[i, k] = pull / of_type(n_own * n_cells)
    for own in range(n_own):
        for k in range(n_latent):
            push = of_type(0)
            for h in range(n_hidden):
                dweight_kh[k, h] += centre_xk[own, k] * dmean_xh[own, h]
                push += dmean_xh[own, h] * weight_kh[k, h]
            push /= of_type(n_cells)
            for i in range(n_latent):
                push -= centre_xk[own, i] * pull_kk[i, k]
            push_xk[own, k] = push
    return dbias_h, dgain_h, doffset_h, pull_kk, push_xk


@at_once
def draw(loc_lnk, var_lnk, log_var_lnk, noise_lnk, u_lnk, kl_ln):
    """Fill u with draws of the normals, and their KL from a standard normal."""
    one = noise_lnk.dtype.type(1)
    for label in range(len(loc_lnk)):
        for n in range(loc_lnk.shape[1]):
            kl = one - one
            for k in range(loc_lnk.shape[2]):
                loc, var = loc_lnk[label, n, k], var_lnk[label, n, k]
                u_lnk[label, n, k] = loc + np.sqrt(var) * noise_lnk[label, n, k]
                kl += var + loc * loc - one - log_var_lnk[label, n, k]
            kl_ln[label, n] = kl / (one + one)


@at_once
def draw_back(du_lnk, dkl_ln, loc_lnk, var_lnk, exp_lnk, noise_lnk, dheads_lnj):
    """Fill in derivatives for means of the normals and for the logarithm of ``exp``, by which variances grow."""
    n_latent, half = loc_lnk.shape[2], noise_lnk.dtype.type(0.5)
    for label in range(len(loc_lnk)):
        for n in range(loc_lnk.shape[1]):
            dkl = dkl_ln[label, n]
            for k in range(n_latent):
                du, var = du_lnk[label, n, k], var_lnk[label, n, k]
                dheads_lnj[label, n, k] = du + dkl * loc_lnk[label, n, k]
                dvar = du * noise_lnk[label, n, k] / np.sqrt(var) + dkl - dkl / var
                dheads_lnj[label, n, n_latent + k] = half * dvar * exp_lnk[label, n, k]


@at_once
def weigh(z_nk, loc_nk, scale_nk, log_prob_nl, z_loc_lnk, z_var_lnk, z_log_var_lnk, kl_ln, log_prior_l, misfit_n, kl_n):
    """Fill in log q(z | x) - Σ_y q(y | z) log p(z | u, y), and Σ_y q(y | z) KL(u) + KL(y).

    Gives the derivatives of both for log q(y | z), of which the second is one of several, (2, l, n).
    """
    n_labels, n_cells, n_latent = z_loc_lnk.shape
    half, log_2pi = z_nk.dtype.type(0.5), z_nk.dtype.type(LOG_2PI)
    dlog_prob_2ln = np.empty((2, n_labels, n_cells), z_nk.dtype)
    for n in range(n_cells):
        misfit, kl = -half * log_2pi * z_nk.dtype.type(n_latent), half - half
        for k in range(n_latent):
            gap = (z_nk[n, k] - loc_nk[n, k]) / scale_nk[n, k]
            misfit -= half * gap * gap + np.log(scale_nk[n, k])
        for label in range(n_labels):
            prob, minus_log_p = np.exp(log_prob_nl[n, label]), half - half
            for k in range(n_latent):
                gap = z_nk[n, k] - z_loc_lnk[label, n, k]
                minus_log_p += half * (gap * gap / z_var_lnk[label, n, k] + z_log_var_lnk[label, n, k] + log_2pi)
            kl_y = kl_ln[label, n] + log_prob_nl[n, label] - log_prior_l[label]
            misfit += prob * minus_log_p
            kl += prob * kl_y
            dlog_prob_2ln[0, label, n] = prob * minus_log_p
            dlog_prob_2ln[1, label, n] = prob * kl_y + prob
        misfit_n[n], kl_n[n] = misfit, kl
    return dlog_prob_2ln


@at_once
def weigh_back(
    up_n, up_kl_n, z_nk, loc_nk, scale_nk, log_prob_nl, z_loc_lnk, z_var_lnk, z_exp_lnk, dlog_prob_2ln,
    dz_nk, dloc_nk, dscale_nk, dlog_prob_nl, dheads_lnj, dkl_ln,
):  # fmt: skip
    """Fill in the derivatives of :func:`weigh`, those for normals as :func:`draw_back` does."""
    n_labels, n_cells, n_latent = z_loc_lnk.shape
    half = z_nk.dtype.type(0.5)
    for n in range(n_cells):
        for k in range(n_latent):
            gap, scale = z_nk[n, k] - loc_nk[n, k], scale_nk[n, k]
            dloc = up_n[n] * gap / (scale * scale)
            dloc_nk[n, k], dz_nk[n, k] = dloc, -dloc
            dscale_nk[n, k] = (dloc * gap - up_n[n]) / scale
        for label in range(n_labels):
            prob = np.exp(log_prob_nl[n, label])
            weight = prob * up_n[n]
            dkl_ln[label, n] = prob * up_kl_n[n]
            dlog_prob_nl[n, label] = up_n[n] * dlog_prob_2ln[0, label, n] + up_kl_n[n] * dlog_prob_2ln[1, label, n]
            for k in range(n_latent):
                gap, var = z_nk[n, k] - z_loc_lnk[label, n, k], z_var_lnk[label, n, k]
                dz_loc = -weight * gap / var
                dheads_lnj[label, n, k] = dz_loc
                dheads_lnj[label, n, n_latent + k] = half * (dz_loc * gap + weight) / var * z_exp_lnk[label, n, k]
                dz_nk[n, k] -= dz_loc
