"""Draws from a population of cells, plain or weighted by how well they explain it.

The weights are those of Boyeau et al., An empirical Bayes method for differential expression analysis of single cells
with deep generative models, PNAS 120 (2023), doi:10.1073/pnas.2209124120.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from scvi_lite.analysis.inputs import NUMBERS_AT_ONCE, draw, minibatch_size, needs_counts
from scvi_lite.analysis.latent import log_density, posterior_parameters
from scvi_lite.analysis.likelihood import log_evidence
from scvi_lite.errors import as_options, check_options, check_whole
from scvi_lite.nn.normal import draw_normal

if TYPE_CHECKING:
    from scvi_lite._typing import AnnData, Model

OPTIONS = ("max_cells", "truncation", "n_mc_samples", "n_mc_samples_per_pass")
MAX_CELLS = 1024


def draw_latent(
    model: Model,
    adata: AnnData,
    rows: np.ndarray,
    n_samples: int,
    weights: str = "uniform",
    importance_weighting_kwargs: Mapping[str, Any] | None = None,
    batch_size: int | None = None,
) -> tuple[np.ndarray, Tensor]:
    """Draw cells with replacement, and for each a position from its posterior.

    With ``weights="importance"`` the draws are from at most ``max_cells`` cells, and are drawn again by their weights.

    Returns
    -------
    tuple
        Rows of the cells (s,), and positions before the softmax of a logistic normal (s, k), on the CPU.
    """
    options = as_options("importance_weighting_kwargs", importance_weighting_kwargs)
    check_options("importance_weighting_kwargs", options, OPTIONS)
    if weights == "importance":
        rows = subset(rows, options.get("max_cells", MAX_CELLS))
    drawn = draw(rows, n_samples)
    unique, of_s = np.unique(drawn, return_inverse=True)
    loc_nk, scale_nk = map(torch.from_numpy, posterior_parameters(model, adata, unique, batch_size))
    z_sk = draw_normal(loc_nk[of_s], scale_nk[of_s])
    if weights == "importance":
        weight_s = get_importance_weights(model, adata, rows, z_sk, batch_size=batch_size, **options)
        chosen = torch.multinomial(torch.from_numpy(weight_s), n_samples, replacement=True)
        drawn, z_sk = drawn[chosen.numpy()], z_sk[chosen]
    return drawn, z_sk


def get_importance_weights(
    model: Model,
    adata: AnnData | None,
    indices: Any,
    zs: Tensor | np.ndarray,
    max_cells: int = MAX_CELLS,
    truncation: bool = False,
    n_mc_samples: int = 500,
    n_mc_samples_per_pass: int = 250,
    batch_size: int | None = None,
) -> np.ndarray:
    """Weights that turn draws from the mixture of the encoder's posteriors into draws from that of the exact ones.

    w(z) ∝ Σ_n p(x_n | z) p(z) / p(x_n)  /  Σ_n q(z | x_n), over the cells n. All are equal if the encoder is exact.

    Parameters
    ----------
    adata
        The cells; the model's own by default.
    indices
        Cells of the population: row numbers or a mask.
    zs
        Draws (s, k) from the posteriors of these cells, before the softmax of a logistic normal.
    max_cells
        Cells that the weights are computed with; more are thinned at random.
    truncation
        Cut weights at √s times their mean (Ionides 2008, doi:10.1198/106186008X320456).
    n_mc_samples, n_mc_samples_per_pass
        Draws for each p(x_n), and how many of them at once.
    batch_size
        Cells in a minibatch where p(x_n) is computed.

    Returns
    -------
    numpy.ndarray
        (s,) float64; they sum to 1.

    Raises
    ------
    ValueError
        If a number is below 1, or ``zs`` has another shape.
    RuntimeError
        If the data were minified without counts.
    """
    needs_counts(model, "weights='importance'")
    check_whole(max_cells=max_cells, n_mc_samples=n_mc_samples, n_mc_samples_per_pass=n_mc_samples_per_pass)
    z_sk = torch.as_tensor(zs)
    n_latent = model.module.config.n_latent
    if z_sk.dim() != 2 or z_sk.shape[1] != n_latent:
        raise ValueError(f"zs has shape {tuple(z_sk.shape)}; (draws, {n_latent}) is needed.")
    adata = model._check(adata)
    rows = subset(model._rows(adata, indices), max_cells)
    size = minibatch_size(batch_size, n_mc_samples_per_pass * model.module.config.n_genes)
    evidence_n = torch.cat(
        [log_evidence(model, b, n_mc_samples, n_mc_samples_per_pass) for b in model._minibatches(adata, rows, size)]
    )
    log_prior_s = model.module.log_prior_z(z_sk.to(model.device), None).detach().cpu().double()
    log_target_s = log_prior_s + _log_explained(model, adata, rows, z_sk, evidence_n)
    log_w_s = log_target_s - log_density(z_sk, *posterior_parameters(model, adata, rows))
    weight_s = (log_w_s - log_w_s.max()).exp()
    if truncation:
        weight_s = weight_s.clamp(max=math.sqrt(len(weight_s)) * float(weight_s.mean()))
    return (weight_s / weight_s.sum()).numpy()


def subset(rows: np.ndarray, n: int) -> np.ndarray:
    """At most ``n`` of the rows, drawn without replacement."""
    check_whole(max_cells=n)
    return rows if len(rows) <= n else rows[torch.randperm(len(rows))[:n].numpy()]


def _log_explained(model: Model, adata: AnnData, rows: np.ndarray, z_sk: Tensor, evidence_n: Tensor) -> Tensor:
    """log mean_n p(x_n | z_s) / p(x_n), (s,): each cell with its own library and covariates."""
    total_s = torch.full((len(z_sk),), -math.inf, dtype=torch.float64)
    done = 0
    for batch in model._minibatches(adata, rows, minibatch_size(None, model.module.config.n_genes)):
        library_n = model.module.library(batch, model.module.encode(batch))
        per_pass = max(1, NUMBERS_AT_ONCE // (batch.n_cells * batch.x.n_features))
        log_ratio_s = []
        for some_sk in z_sk.to(model.device).split(per_pass):
            z_snk = some_sk[:, None, :].expand(-1, batch.n_cells, -1)
            log_p_sn = model.module.log_joint(z_snk, library_n, batch)
            log_ratio_s.append((log_p_sn - evidence_n[done : done + batch.n_cells]).double().logsumexp(1).cpu())
        total_s = torch.logaddexp(total_s, torch.cat(log_ratio_s))
        done += batch.n_cells
    return total_s - math.log(done)
