"""Counts of genes and proteins as a model would draw them anew, and how they go together (Gayoso et al. 2021).

doi:10.1038/s41592-020-01050-x
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from scvi_lite.analysis.cells import How, Parts, ask_cells, chosen, find_cells, n_draws
from scvi_lite.analysis.expression import draw_library, select_genes
from scvi_lite.analysis.inputs import gene_positions
from scvi_lite.analysis.output import Out
from scvi_lite.analysis.predictive import correlate, denoised, parameters_of
from scvi_lite.analysis.proteins import protein_positions

if TYPE_CHECKING:
    from scvi_lite._typing import Batch, Data, Model, Posterior


def get_likelihood_parameters(
    model: Model,
    adata: Data | None = None,
    indices: Any = None,
    n_samples: int = 1,
    give_mean: bool = False,
    batch_size: int | None = None,
    *,
    out: Mapping[str, Out] | None = None,
) -> dict[str, np.ndarray]:
    """Parameters of the likelihood of each cell's counts, for cells drawn from their posterior.

    Parameters
    ----------
    adata, indices, batch_size
        As in ``get_normalized_expression``.
    n_samples
        Draws from the posterior of each cell.
    give_mean
        Average over the draws.
    out
        Where to put parameters that memory cannot hold, by name, as in ``out={"mean": "mean.npy"}``: see
        ``get_normalized_expression`` of SCVI.

    Returns
    -------
    dict
        Of genes ``"mean"``, ``"dispersions"`` if they are not Poisson, and of ZINB ``"dropout"``; of proteins
        ``"protein_background"`` and ``"protein_foreground"`` (means), ``"protein_mixing"`` (probability of the
        background) and ``"protein_dispersions"``. float32, (n, features), or (n, features, s) with several draws that
        are not averaged.
    """

    def ask(batch: Batch, q: Posterior, z: Tensor) -> Parts:
        rates, proteins = model.module.decode_both(z, draw_library(model, batch, q, n_draws(z)), batch)
        efficiency_np = proteins.log_efficiency.exp()
        return parameters_of(rates) | {
            "protein_background": proteins.back_np * efficiency_np,
            "protein_foreground": proteins.fore_np * efficiency_np,
            "protein_mixing": proteins.mixing_np.sigmoid(),
            "protein_dispersions": proteins.log_theta.exp().expand_as(proteins.mixing_np),
        }

    how = How(n_samples=n_samples, average=give_mean, draws_last=True, batch_size=batch_size)
    return ask_cells(model, find_cells(model, adata, indices), ask, how, out)


def posterior_predictive_sample(
    model: Model,
    adata: Data | None = None,
    indices: Any = None,
    n_samples: int = 1,
    batch_size: int | None = None,
    gene_list: Sequence[str] | None = None,
    protein_list: Sequence[str] | None = None,
    transform_batch: Any = None,
    *,
    out: Mapping[str, Out] | None = None,
) -> dict[str, np.ndarray]:
    """Draw new counts for cells: a latent position from the posterior of each, then counts from the likelihood.

    Arguments and errors are those of ``get_normalized_expression``; of several batches the draws are averaged, so name
    one. ``out`` says by name where to put draws that memory cannot hold, as in ``out={"rna": "rna.zarr"}``.

    Returns
    -------
    dict
        ``"rna"`` and ``"protein"``, of a MuData the names of its modalities: float32 counts, (n, features), or
        (n, features, s) with several draws.
    """
    names = model.registry.modalities or {"x": "rna", "proteins_np": "protein"}
    genes, proteins = gene_positions(model, gene_list), protein_positions(model, protein_list)
    codes = model._batch_codes(transform_batch)
    if len(codes) > 1:
        raise ValueError(f"transform_batch={transform_batch!r}: counts are drawn as from one batch; name one.")

    def ask(batch: Batch, q: Posterior, z: Tensor) -> Parts:
        rates, of_proteins = model.module.decode_both(z, draw_library(model, batch, q, n_draws(z)), batch)
        return {
            names["x"]: select_genes(rates, genes).distribution().sample(),
            names["proteins_np"]: chosen(of_proteins.sample(), proteins),
        }

    how = How(codes, n_samples, average=False, draws_last=True, batch_size=batch_size)
    return ask_cells(model, find_cells(model, adata, indices), ask, how, out)


def get_feature_correlation_matrix(
    model: Model,
    adata: Data | None = None,
    indices: Any = None,
    n_samples: int = 10,
    batch_size: int | None = None,
    rna_size_factor: float = 1000,
    transform_batch: Any = None,
    correlation_type: str = "spearman",
    log_transform: bool = False,
    silent: bool = True,
) -> pd.DataFrame:
    """Correlation of genes and proteins over cells, in rates drawn from the posterior: without the noise of counting.

    Parameters
    ----------
    adata, indices, transform_batch, batch_size, silent
        As in ``get_normalized_expression``; correlations are averaged over several batches.
    n_samples
        Draws. Each needs a matrix of cells × features.
    rna_size_factor
        The library size of all cells.
    correlation_type
        ``"spearman"`` or ``"pearson"``.
    log_transform
        Take log1p of the rates first, which matters for Pearson's.

    Returns
    -------
    pandas.DataFrame
        (g + p, g + p) float64, genes first. NaN for a feature that does not vary.

    Raises
    ------
    ValueError
        If a batch or the type is unknown, a number out of range, or there are fewer than two cells.
    """

    def rates_of(z: Tensor, library_n: Tensor, batch: Batch) -> Tensor:
        rates, proteins = model.module.decode_both(z, library_n, batch)
        return torch.cat([denoised(rates), proteins.sample(denoised=True)], -1)

    names = [*model._gene_names, *model.protein_names]
    how = How(model._batch_codes(transform_batch), n_samples, batch_size=batch_size, silent=silent)
    transform = np.log1p if log_transform else None
    return correlate(model, adata, indices, rates_of, names, how, rna_size_factor, correlation_type, transform)
