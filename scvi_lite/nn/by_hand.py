r"""The loss of scVI and its gradient in one piece, for the CPU: the usual network, without a record for autograd.

With a thousand genes, keeping the record and walking back along it takes an eighth of a step. The readable form
is :meth:`scvi_lite.model.scvi.SCVIModule.loss`. The way back, where d is short for the derivative of the mean over n
cells of :math:`-\log p(x \mid z) + w\,KL`:

* The score of the counts gives d of logits and dropout, :mod:`scvi_lite.distributions.kernels`; each linear map W gets
  :math:`d^\top h` and hands :math:`d W` down; hidden units, :mod:`scvi_lite.nn.unit_kernels`.
* :math:`z = \mu + \sigma\varepsilon` and :math:`KL = \frac12\sum(\sigma^2 + \mu^2 - 1 - \log\sigma^2)` give
  :math:`d\mu = dz + \frac{w}{n}\mu` and
  :math:`d\sigma^2 = \frac{\varepsilon}{2\sigma}dz + \frac{w}{2n}(1 - \sigma^{-2})`, times the exponential of the
  head for the head itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scvi_lite.data.batch import Batch
from scvi_lite.distributions.fused import foreseen
from scvi_lite.distributions.sparse import Product
from scvi_lite.nn import layers, vae
from scvi_lite.nn.module import Frozen, Loss

if TYPE_CHECKING:
    from scvi_lite.nn.unit_kernels import Units
    from scvi_lite.nn.vae import CountVAE


# What the usual network is made of, and functions that others may put into an instance.
PARTS = {nn.Linear, nn.BatchNorm1d, nn.ModuleList, nn.ParameterList, vae.Decoder}
PARTS |= {layers.CovariateLinear, layers.Block, layers.Hidden, layers.Encoder}
FUNCTIONS = {"loss", "encode", "decode", "library", "covariates", "forward"}


def is_usual(module: CountVAE) -> bool:
    """Whether it is the usual network, on a CPU: one hidden layer with batch norm each way, and nothing frozen."""
    c = module.config
    return (
        c.n_layers == 1
        and c.gene_likelihood in ("zinb", "nb")
        and (c.dispersion, c.latent_distribution, c.var_activation) == ("gene", "normal", "exp")
        and (c.use_batch_norm, c.use_layer_norm, c.batch_representation) == ("both", "none", "one-hot")
        and not (c.encode_covariates or c.n_conts or c.use_size_factor or c.latent_library)
        and module.frozen == Frozen()
        and is_as_made(module)
        and all(w.device.type == "cpu" and w.dtype == torch.float32 and w.requires_grad for w in module.parameters())
        and not any(w._backward_hooks or w._post_accumulate_grad_hooks for w in module.parameters())
        and not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())
        and not any(part._backward_hooks or part._backward_pre_hooks for part in module.modules())
        and not torch.is_autocast_enabled("cpu")
    )


def is_as_made(module: CountVAE) -> bool:
    """Whether nobody put other functions, parts or weights into the usual network."""
    _, *parts = module.modules()
    if any(FUNCTIONS & vars(part).keys() for part in (module, *parts)) or any(
        type(part) not in PARTS for part in parts
    ):
        return False
    encoder, decoder = module.encoder, module.decoder
    blocks = [*encoder.hidden.blocks, *decoder.hidden.blocks]
    maps = [block.linear for block in blocks] + [encoder.loc, encoder.log_var, decoder.scale]
    maps += [] if decoder.dropout is None else [decoder.dropout]
    norms = [block.batch_norm for block in blocks]
    weights = [w for part in maps + norms for w in (part.weight, part.bias)]
    weights += [module.log_theta, *decoder.hidden.blocks[0].linear.tables]
    turned = {block.linear.weight for block in blocks}
    return (
        len(weights) == len(set(weights))  # none stands in two places
        and set(weights) == set(module.parameters())
        and all((w.t() if w in turned else w).is_contiguous() for w in weights)  # as their gradients, for Adam
        and all(block.activation is F.relu for block in blocks)
        and not blocks[1].dropout_rate
        and all(norm.training == module.training and norm.track_running_stats for norm in norms)
        and all(norm.momentum is not None for norm in norms)  # else they average over all minibatches
    )


def loss_and_gradients(module: CountVAE, batch: Batch, kl_weight: float) -> tuple[Loss, dict[Tensor, Tensor]]:
    """The loss of a minibatch of two cells or more, and its gradient for each weight."""
    from scvi_lite.nn.unit_kernels import Units

    c, n, encoder, decoder = module.config, batch.n_cells, module.encoder, module.decoder
    block_e, block_d = encoder.hidden.blocks[0], decoder.hidden.blocks[0]
    linear_e, linear_d, rate = block_e.linear, block_d.linear, block_e.dropout_rate
    units_e, units_d = Units(block_e.batch_norm, linear_e.bias), Units(block_d.batch_norm, linear_d.bias)
    weight_gh, weight_kh = linear_e.weight.t(), linear_d.weight.t()
    code_cn, _ = module.covariates(batch)

    # Encode, and draw z.
    first = Product(batch.x.log1p() if c.log_variational else batch.x)
    h_nh = units_e.forward(first.forward(weight_gh))
    h_nh = layers.dropout(h_nh, rate) if rate else h_nh
    loc_nk, exp_nk = linear(encoder.loc, h_nh), linear(encoder.log_var, h_nh).exp_()
    var_nk = exp_nk + encoder.floor
    scale_nk, noise_nk = var_nk.sqrt(), torch.randn(loc_nk.shape, dtype=loc_nk.dtype)
    z_nk = torch.addcmul(loc_nk, scale_nk, noise_nk)
    kl_n = 0.5 * (var_nk + loc_nk * loc_nk - 1 - var_nk.log()).sum(-1)

    # Decode, and score.
    x_nh = z_nk @ weight_kh
    for code_n, table_bh in zip(code_cn, linear_d.tables, strict=True):
        x_nh += F.embedding(code_n, table_bh)
    g_nh = units_d.forward(x_nh)
    log_likelihood_n, (dlogit_ng, _, dlog_theta_g, ddropout_ng) = score(module, g_nh, batch)
    total = (kl_weight * kl_n - log_likelihood_n).mean()

    # And back.
    gradients: dict[Tensor, Tensor] = {module.log_theta: dlog_theta_g}
    dg_nh = back(decoder.scale, g_nh, dlogit_ng, gradients)
    if ddropout_ng is not None:
        dg_nh += back(decoder.dropout, g_nh, ddropout_ng, gradients)
    dx_nh = units_back(units_d, dg_nh, g_nh, 0.0, gradients)
    for code_n, table_bh in zip(code_cn, linear_d.tables, strict=True):
        gradients[table_bh] = torch.ops.aten.embedding_dense_backward(dx_nh, code_n, len(table_bh), -1, False)
    gradients[linear_d.weight] = (z_nk.t() @ dx_nh).t()
    dz_nk, share = dx_nh @ weight_kh.t(), kl_weight / n
    dloc_nk = torch.add(dz_nk, loc_nk, alpha=share)
    dlog_var_nk = (dz_nk * noise_nk / scale_nk + share * (1 - 1 / var_nk)) * (0.5 * exp_nk)
    dh_nh = back(encoder.loc, h_nh, dloc_nk, gradients) + back(encoder.log_var, h_nh, dlog_var_nk, gradients)
    gradients[linear_e.weight] = first.backward(units_back(units_e, dh_nh, h_nh, rate, gradients)).t()
    return Loss(total, -log_likelihood_n.sum(), kl_n.sum(), n), gradients


def score(module: CountVAE, h_nh: Tensor, batch: Batch) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """Log-likelihood of each cell (n,), and the derivatives of minus its mean for logits, library, theta, dropout."""
    from scvi_lite.distributions import kernels

    x, dropout = batch.x, module.decoder.dropout
    dropout_ng = None if dropout is None else linear(dropout, h_nh)
    rates = linear(module.decoder.scale, h_nh), batch.library_n, module.log_theta, dropout_ng
    return kernels.score(x.start, x.col_m, x.value_m, *rates, foreseen(batch.total_n))


def linear(layer: nn.Linear, h_nh: Tensor) -> Tensor:
    """A linear map."""
    return torch.addmm(layer.bias, h_nh, layer.weight.t())


def back(layer: nn.Linear, h_nh: Tensor, d_nj: Tensor, gradients: dict[Tensor, Tensor]) -> Tensor:
    """Back along a linear map: note the gradients of its weights, and give the derivative for its input."""
    gradients[layer.weight], gradients[layer.bias] = d_nj.t() @ h_nh, d_nj.sum(0)
    return d_nj @ layer.weight


def units_back(units: Units, dy_nh: Tensor, y_nh: Tensor, rate: float, gradients: dict[Tensor, Tensor]) -> Tensor:
    """Back along hidden units: note the gradients of their norm, and give the derivative for what it normed."""
    norm, constant_h = units.norm, units.constant_h
    dx_nh, gradients[norm.weight], gradients[norm.bias] = units.backward(dy_nh, y_nh, 1 / (1 - rate))
    gradients[constant_h] = torch.zeros_like(constant_h)  # the norm takes it away again
    return dx_nh
