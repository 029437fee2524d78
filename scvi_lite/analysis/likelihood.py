"""How well a model explains cells: evidence lower bound, reconstruction, marginal likelihood.

The bound follows Kingma & Welling (arXiv:1312.6114); the marginal likelihood is the importance-sampling estimate of
Burda, Grosse & Salakhutdinov (arXiv:1509.00519).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from scvi_lite.analysis.inputs import NUMBERS_AT_ONCE, minibatch_size, needs_counts
from scvi_lite.errors import check_whole
from scvi_lite.nn.vae import Posterior

if TYPE_CHECKING:
    from scvi_lite._typing import AnnData, Batch, Model


def get_elbo(
    model: Model,
    adata: AnnData | None = None,
    indices: Any = None,
    batch_size: int | None = None,
    return_mean: bool = True,
) -> Tensor:
    """Evidence lower bound of each cell, in nats: higher is better. One draw from the posterior estimates it.

    E_q[log p(x | z, l)] - KL(q(z) ‖ p(z)) - KL(q(l) ‖ p(l)). ``history["elbo_train"]`` is its negative.

    Parameters
    ----------
    adata
        Cells to look at; the model's own by default.
    indices
        Row numbers, in any order, or a mask; all cells by default.
    batch_size
        Cells in a minibatch.
    return_mean
        The mean over cells; else one number a cell.

    Returns
    -------
    torch.Tensor
        A scalar, or (n,). On the CPU.

    Raises
    ------
    RuntimeError
        If the data were minified without counts.
    IndexError
        If ``indices`` has rows that do not exist.

    Examples
    --------
    >>> import scvi_lite
    >>> adata = scvi_lite.data.synthetic_iid(batch_size=50, n_genes=20)
    >>> scvi_lite.model.SCVI.setup_anndata(adata, batch_key="batch")
    >>> model = scvi_lite.model.SCVI(adata)
    >>> model.train(max_epochs=1, enable_progress_bar=False)
    >>> model.get_elbo(return_mean=False).shape
    torch.Size([100])
    """
    model._warn_if_untrained()
    needs_counts(model, "get_elbo")
    elbo: list[Tensor] = []
    for batch in model._minibatches(adata, indices, batch_size):
        module = model.module
        q, z_nk, library_n = _draw(model, batch)
        kl_n = module.kl_z(q, batch) + module.kl_library(batch, q) + module.kl_given_z(z_nk, batch)
        elbo.append(-sum(module.reconstruction(z_nk, library_n, batch).values()) - kl_n)
    return _join(elbo, return_mean)


def get_reconstruction_error(
    model: Model,
    adata: AnnData | None = None,
    indices: Any = None,
    batch_size: int | None = None,
    return_mean: bool = True,
) -> dict[str, Tensor]:
    """-E_q[log p(x | z, l)] of each cell, in nats: lower is better. One draw from the posterior estimates it.

    Arguments and errors are those of ``get_elbo``.

    Returns
    -------
    dict
        ``"reconstruction_loss"``, or one entry for each kind of data: a scalar tensor, or (n,). On the CPU.
    """
    model._warn_if_untrained()
    needs_counts(model, "get_reconstruction_error")
    errors: dict[str, list[Tensor]] = {}
    for batch in model._minibatches(adata, indices, batch_size):
        _, z_nk, library_n = _draw(model, batch)
        for name, error_n in model.module.reconstruction(z_nk, library_n, batch).items():
            errors.setdefault(name, []).append(error_n)
    return {name: _join(error, return_mean) for name, error in errors.items()}


def get_marginal_ll(
    model: Model,
    adata: AnnData | None = None,
    indices: Any = None,
    n_mc_samples: int = 1000,
    batch_size: int | None = None,
    return_mean: bool = True,
    n_mc_samples_per_pass: int | None = None,
) -> np.float64 | Tensor:
    """Log-likelihood of each cell with the latent variables integrated out, in nats: higher is better.

    log 1/s Σ_s p(x, z_s, l_s) / q(z_s, l_s | x), with s draws from the posterior; a lower bound in expectation, which
    tightens with their number.

    Parameters
    ----------
    adata, indices, batch_size, return_mean
        As in ``get_elbo``.
    n_mc_samples
        Draws for each cell. They are made a few at a time, so their number costs time and not memory.
    n_mc_samples_per_pass
        How many at a time; by default as many as keep the memory small.

    Returns
    -------
    numpy.float64 or torch.Tensor
        A number, or (n,) on the CPU.

    Raises
    ------
    ValueError
        If a number of draws is below 1.
    RuntimeError
        If the data were minified without counts.
    """
    model._warn_if_untrained()
    needs_counts(model, "get_marginal_ll")
    check_whole(n_mc_samples=n_mc_samples, n_mc_samples_per_pass=n_mc_samples_per_pass or 1)
    if batch_size is None:
        batch_size = minibatch_size(None, min(n_mc_samples, 16) * model.module.config.n_genes)
    evidence = [
        log_evidence(model, batch, n_mc_samples, n_mc_samples_per_pass)
        for batch in model._minibatches(adata, indices, batch_size)
    ]
    value = _join(evidence, return_mean)
    return np.float64(value) if return_mean else value


def log_evidence(model: Model, batch: Batch, n_samples: int, n_samples_per_pass: int | None = None) -> Tensor:
    """log p(x) of a minibatch by importance sampling from the posterior, (n,)."""
    q = model.module.encode(batch)
    per_pass = n_samples_per_pass or max(1, NUMBERS_AT_ONCE // (batch.n_cells * max(1, batch.x.n_features)))
    total_n = torch.full((batch.n_cells,), -math.inf, device=batch.total_n.device)
    for done in range(0, n_samples, per_pass):
        log_w_sn = _log_weights(model, batch, q, min(per_pass, n_samples - done))
        total_n = torch.logaddexp(total_n, log_w_sn.logsumexp(0))
    return total_n - math.log(n_samples)


def _log_weights(model: Model, batch: Batch, q: Posterior, n_samples: int) -> Tensor:
    """log p(x, z, l) - log q(z, l | x) for draws from q, (s, n)."""
    z_snk = q.sample_z(n_samples)
    log_w_sn = model.module.log_prior_z(z_snk, batch) - log_normal(z_snk, q.z_loc_nk, q.z_scale_nk).sum(-1)
    library = model.module.library(batch, q)
    if q.library_loc_n is not None and q.library_scale_n is not None:
        library = q.sample_library(n_samples)
        prior_loc_n = model.module.library_prior_loc[batch.batch_n]
        prior_scale_n = model.module.library_prior_var[batch.batch_n].sqrt()
        log_w_sn = log_w_sn + log_normal(library, prior_loc_n, prior_scale_n)
        log_w_sn = log_w_sn - log_normal(library, q.library_loc_n, q.library_scale_n)
    return log_w_sn + model.module.log_joint(z_snk, library, batch)


def log_normal(x: Tensor, loc: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
    """Log-density of a normal, elementwise; of the standard normal without parameters.

    >>> log_normal(torch.zeros(1))
    tensor([-0.9189])
    """
    if loc is None or scale is None:
        return -0.5 * (x**2 + math.log(2 * math.pi))
    return -0.5 * (((x - loc) / scale) ** 2 + math.log(2 * math.pi)) - scale.log()


def _draw(model: Model, batch: Batch) -> tuple[Posterior, Tensor, Tensor | None]:
    """The posterior of each cell, and a draw from it: z (n, k) and log library (n,)."""
    q = model.module.encode(batch)
    return q, q.sample_z(), model.module.library(batch, q) if q.library_loc_n is None else q.sample_library()


def _join(parts: list[Tensor], return_mean: bool) -> Tensor:
    value_n = torch.cat(parts).cpu()
    return value_n.double().mean().float() if return_mean else value_n
