"""The terms of scANVI's bound that try every cell with every label, for the CPU, with gradients in closed form.

A network that reads x and y has one hidden layer of l · n rows, max(norm(W x + T_y + b), 0). Where x is the same for
all labels, W x is computed once. Products are those of PyTorch; all else is a few passes over the rows, which Numba
compiles. The readable form is ``readable_label_terms`` of :class:`scvi_lite.nn.scanvi.SCANVIModule`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from scvi_lite.nn import label_kernels as kernels
from scvi_lite.nn.layers import Encoder


def label_terms(
    z_nk: Tensor,
    loc_nk: Tensor,
    scale_nk: Tensor,
    log_prob_nl: Tensor,
    log_prior_l: Tensor,
    u_encoder: Encoder,
    z_decoder: Encoder,
    keep_nh: Tensor | None,
    noise_lnk: Tensor,
) -> tuple[Tensor, Tensor]:
    """log q(z | x) - Σ_y q(y | z) log p(z | u_y, y), and Σ_y q(y | z) KL(u_y) + KL(y): (n,) each.

    Parameters
    ----------
    z_nk, loc_nk, scale_nk
        A draw of z, and the posterior that it is drawn from.
    log_prob_nl, log_prior_l
        log q(y | z) and log p(y).
    u_encoder, z_decoder
        q(u | z, y) and p(z | u, y).
    keep_nh
        What the hidden units of ``u_encoder`` are multiplied with: 0, or 1 / (1 - dropout rate). None: no dropout.
    noise_lnk
        Standard normal noise, of which u is made.
    """
    inputs = (t.contiguous() for t in (z_nk, loc_nk, scale_nk, log_prob_nl))
    weights = (*u_encoder.parameters(), *z_decoder.parameters())
    return _LabelTerms.apply(u_encoder, z_decoder, keep_nh, noise_lnk, log_prior_l, *inputs, *weights)


class _LabelTerms(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, u_encoder: Encoder, z_decoder: Encoder, keep_nh: Tensor | None, noise_lnk: Tensor,
        log_prior_l: Tensor, z_nk: Tensor, loc_nk: Tensor, scale_nk: Tensor, log_prob_nl: Tensor, *weights: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        u, z = ctx.u, ctx.z = _Network(u_encoder, keep_nh), _Network(z_decoder, None)
        u.forward(z_nk[None])
        u_lnk, kl_ln = torch.empty_like(noise_lnk), noise_lnk.new_empty(noise_lnk.shape[:2])
        kernels.draw(*arrays(u.loc, u.var, u.var.log(), noise_lnk, u_lnk, kl_ln))
        z.forward(u_lnk)
        misfit_n, kl_n = torch.empty_like(z_nk[:, 0]), torch.empty_like(z_nk[:, 0])
        near = z_nk, loc_nk, scale_nk, z.loc, z.var
        ctx.dlog_prob_2ln = kernels.weigh(*arrays(*near, z.var.log(), kl_ln, log_prob_nl, log_prior_l, misfit_n, kl_n))
        ctx.save_for_backward(noise_lnk, log_prob_nl, *near)
        return misfit_n, kl_n

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, up_n: Tensor, up_kl_n: Tensor) -> tuple[Tensor | None, ...]:
        noise_lnk, log_prob_nl, *near = ctx.saved_tensors
        u, z = ctx.u, ctx.z
        grads = [torch.empty_like(t) for t in (*near, z.loc[..., 0], log_prob_nl)]
        dz_nk, dloc_nk, dscale_nk, dz_loc_lnk, dz_var_lnk, dkl_ln, dlog_prob_nl = grads
        ups = up_n.contiguous(), up_kl_n.contiguous()
        kernels.weigh_back(*arrays(*ups, *near, log_prob_nl), ctx.dlog_prob_2ln, *arrays(*grads))
        du_lnk, *z_weights = z.backward(dz_loc_lnk, dz_var_lnk)
        du_loc_lnk, du_var_lnk = torch.empty_like(du_lnk), torch.empty_like(du_lnk)
        kernels.draw_back(*arrays(du_lnk, dkl_ln, u.loc, u.var, noise_lnk, du_loc_lnk, du_var_lnk))
        du_z_1nk, *u_weights = u.backward(du_loc_lnk, du_var_lnk)
        return *(None,) * 5, dz_nk.add_(du_z_1nk[0]), dloc_nk, dscale_nk, dlog_prob_nl, *u_weights, *z_weights


class _Network:
    """Mean and variance (l, n, k) of a normal, given x, (1, n, k) or (l, n, k), and each label."""

    def __init__(self, encoder: Encoder, keep_nh: Tensor | None):
        (block,) = encoder.hidden.blocks
        self.linear, self.norm, self.table_lh = block.linear, block.batch_norm, block.linear.tables[0]
        self.heads, self.floor, self.keep_nh = (encoder.loc, encoder.log_var), encoder.floor, keep_nh

    def forward(self, x_xnk: Tensor) -> None:
        norm, linear, table_lh = self.norm, self.linear, self.table_lh
        self.x_xnk, self.a_xnh = x_xnk, x_xnk @ linear.weight.t()
        self.h_lnh = x_xnk.new_empty(len(table_lh), *self.a_xnh.shape[1:])
        if norm.training:
            self.loc_h, var_h = map(torch.from_numpy, kernels.moments(*arrays(self.a_xnh, table_lh)))
            n_rows = self.h_lnh.shape[:-1].numel()
            norm.num_batches_tracked.add_(1)
            norm.running_mean.lerp_(self.loc_h + linear.bias, norm.momentum)
            norm.running_var.lerp_(var_h * (n_rows / (n_rows - 1)), norm.momentum)
        else:
            self.loc_h, var_h = norm.running_mean - linear.bias, norm.running_var
        self.rstd_h = (var_h + norm.eps).rsqrt()
        units = self.a_xnh, table_lh, self.loc_h, self.rstd_h * norm.weight, norm.bias, self.keep_nh, self.h_lnh
        kernels.hidden_units(*arrays(*units))
        self.loc, log_var = (F.linear(self.h_lnh, head.weight, head.bias) for head in self.heads)
        self.exp = log_var.exp_()
        self.var = self.exp + self.floor

    def backward(self, dloc_lnk: Tensor, dvar_lnk: Tensor) -> tuple[Tensor, ...]:
        """Derivatives for x and the weights, in the order of ``encoder.parameters()``."""
        d_mk = dloc_lnk.flatten(0, 1), dvar_lnk.mul_(self.exp).flatten(0, 1)
        h_mh, (loc, log_var) = self.h_lnh.flatten(0, 1), self.heads
        heads = (part for d in d_mk for part in (d.t() @ h_mh, d.sum(0)))
        up_mh = torch.addmm(d_mk[0] @ loc.weight, d_mk[1], log_var.weight)
        units = self.h_lnh, self.a_xnh, self.table_lh, self.loc_h, self.rstd_h, self.norm.weight
        da_nh, dtable_lh = torch.zeros_like(self.a_xnh[0]), torch.empty_like(self.table_lh)
        of_type = self.loc_h.numpy().dtype.type
        kept = of_type(1 if self.keep_nh is None else self.keep_nh.max())
        share = of_type(len(h_mh) ** -1 if self.norm.training else 0)
        norm = kernels.hidden_units_back(
            *arrays(up_mh.view_as(self.h_lnh), *units), kept, share, *arrays(da_nh, dtable_lh)
        )
        da_mh = da_nh if len(self.x_xnk) == 1 else up_mh
        dx, dweight_kh = (da_mh @ self.linear.weight).view_as(self.x_xnk), self.x_xnk.flatten(0, 1).t() @ da_mh
        dbias_h = torch.zeros_like(self.loc_h) if self.norm.training else dtable_lh.sum(0)  # the norm subtracts it
        return dx, dweight_kh.t(), dbias_h, dtable_lh, *map(torch.from_numpy, norm), *heads


def arrays(*tensors: Tensor | None) -> list[np.ndarray | None]:
    """As NumPy sees them."""
    return [None if t is None else t.detach().numpy() for t in tensors]
