"""The terms of scANVI's bound that try every cell with every label, for the CPU, with gradients in closed form.

A network that reads x and y has one hidden layer of l · n rows, max(norm(W x + T_y + b), 0). What the norm needs of
these rows follows from means and covariances of x, which has few dimensions: so the norm is folded into the weights.
Where x is the same for all labels, W x is computed once. Products are those of PyTorch; all else is a few passes over
the rows, which Numba compiles. The readable form is ``readable_label_terms`` of
:class:`scvi_lite.nn.scanvi.SCANVIModule`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
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
    u, z = _Network(u_encoder, keep_nh), _Network(z_decoder, None)
    return _LabelTerms.apply(u, z, noise_lnk, log_prior_l, *inputs, *u.weights, *z.weights)


class _LabelTerms(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, u: _Network, z: _Network, noise_lnk: Tensor, log_prior_l: Tensor,
        z_nk: Tensor, loc_nk: Tensor, scale_nk: Tensor, log_prob_nl: Tensor, *weights: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        ctx.u, ctx.z = u, z
        ctx.noise_lnk, ctx.near = noise_lnk.numpy(), arrays(z_nk, loc_nk, scale_nk, log_prob_nl)
        u_lnk, kl_ln = torch.empty_like(noise_lnk), np.empty_like(ctx.noise_lnk[..., 0])
        kernels.draw(*u.forward(z_nk[None]), ctx.noise_lnk, u_lnk.numpy(), kl_ln)
        misfit_n, kl_n = torch.empty_like(z_nk[:, 0]), torch.empty_like(z_nk[:, 0])
        ctx.dlog_prob_2ln = kernels.weigh(*ctx.near, *z.forward(u_lnk), kl_ln, *arrays(log_prior_l, misfit_n, kl_n))
        return misfit_n, kl_n

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, up_n: Tensor, up_kl_n: Tensor) -> tuple[Tensor | None, ...]:
        u, z = ctx.u, ctx.z
        grads, dkl_ln = [up_n.new_empty(a.shape) for a in ctx.near], np.empty_like(ctx.noise_lnk[..., 0])
        dz_heads, du_heads = torch.empty_like(z.heads_lnj), torch.empty_like(u.heads_lnj)
        ups = arrays(up_n.contiguous(), up_kl_n.contiguous())
        kernels.weigh_back(*ups, *ctx.near, *z.normals, ctx.dlog_prob_2ln, *arrays(*grads, dz_heads), dkl_ln)
        du_lnk, *z_weights = z.backward(dz_heads)
        kernels.draw_back(du_lnk.numpy(), dkl_ln, *u.normals, ctx.noise_lnk, du_heads.numpy())
        du_z_1nk, *u_weights = u.backward(du_heads)
        grads[0] += du_z_1nk[0]
        return *(None,) * 4, *grads, *u_weights, *z_weights


class _Network:
    """Normals (l, n, k), given x, (1, n, k) or (l, n, k), and each label; heads give mean and log variance."""

    def __init__(self, encoder: Encoder, keep_nh: Tensor | None):
        (block,) = encoder.hidden.blocks
        linear, norm, loc, log_var = block.linear, block.batch_norm, encoder.loc, encoder.log_var
        heads = loc.weight, loc.bias, log_var.weight, log_var.bias
        self.weights = linear.weight, linear.bias, linear.tables[0], norm.weight, norm.bias, *heads
        self.norm, self.floor, self.keep_nh = norm, encoder.floor, keep_nh

    def forward(self, x_xnk: Tensor) -> tuple[np.ndarray, ...]:
        """Means, variances, and logarithms of variances."""
        weight, *others, loc, loc_bias, log_var, log_var_bias = (t.detach() for t in self.weights)
        self.x_xnk, self.head_jh, norm = x_xnk, torch.cat([loc, log_var]), self.norm
        self.training, (self.weight_kh, *linear) = norm.training, arrays(weight.t(), *others)
        running = *arrays(norm.running_mean, norm.running_var), norm.momentum, norm.eps, self.training
        *folded, self.folded = kernels.fold(x_xnk.numpy(), self.weight_kh, *linear, *running)
        self.gain_h = linear[2]
        if self.training:
            norm.num_batches_tracked.add_(1)
        self.folded_kh = torch.from_numpy(folded[0])
        a_xnh = x_xnk @ self.folded_kh
        self.h_lnh = a_xnh.new_empty(len(folded[1]), *a_xnh.shape[1:])
        keep_nh = None if self.keep_nh is None else self.keep_nh.numpy()
        kernels.hidden_units(a_xnh.numpy(), folded[1], keep_nh, self.h_lnh.numpy())
        heads_mj = torch.addmm(torch.cat([loc_bias, log_var_bias]), self.h_lnh.flatten(0, 1), self.head_jh.t())
        self.heads_lnj = heads_mj.view(*self.h_lnh.shape[:2], -1)
        exp_lnj = self.heads_lnj.exp()  # of the means, too: to leave them out takes longer
        k, heads, exp = len(loc), self.heads_lnj.numpy(), exp_lnj.numpy()
        var = (exp_lnj + self.floor).numpy() if self.floor else exp
        log_var = torch.from_numpy(var).log().numpy() if self.floor else heads
        self.normals = heads[..., :k], var[..., k:], exp[..., k:]
        return *self.normals[:2], log_var[..., k:]

    def backward(self, dheads_lnj: Tensor) -> tuple[Tensor, ...]:
        """Derivatives for x and the weights, from those for the heads."""
        x_xnk, d_mj, h_mh = self.x_xnk, dheads_lnj.flatten(0, 1), self.h_lnh.flatten(0, 1)
        (dloc, dlog_var), (dloc_bias, dlog_var_bias) = (d_mj.t() @ h_mh).chunk(2), d_mj.sum(0).chunk(2)
        up_mh = d_mj @ self.head_jh
        kept = self.gain_h.dtype.type(1 if self.keep_nh is None else self.keep_nh.max())
        da_mh = up_mh if len(x_xnk) > 1 else torch.zeros_like(self.h_lnh[0])
        dtable_lh = up_mh.new_zeros(len(self.h_lnh), up_mh.shape[1])
        kernels.hidden_units_back(*arrays(up_mh, self.h_lnh), kept, *arrays(da_mh, dtable_lh))
        dweight_kh = x_xnk.flatten(0, 1).t() @ da_mh
        size, small = x_xnk.shape[1], arrays(dweight_kh, dtable_lh)
        back = kernels.fold_back(self.weight_kh, self.gain_h, self.folded, self.training, size, *small)
        dbias_h, dgain_h, doffset_h, pull_kk, push_xk = map(torch.from_numpy, back)
        dx_xnk = torch.baddbmm(push_xk[:, None], x_xnk, pull_kk.expand(len(x_xnk), -1, -1))
        dx_xnk.view(-1, x_xnk.shape[2]).addmm_(da_mh, self.folded_kh.t())
        heads = dloc, dloc_bias, dlog_var, dlog_var_bias
        return dx_xnk, dweight_kh.t(), dbias_h, dtable_lh, dgain_h, doffset_h, *heads


def arrays(*tensors: Tensor) -> list[np.ndarray]:
    """As NumPy sees them."""
    return [t.numpy() for t in tensors]
