"""What a model of RNA and chromatin says about cells that have either, or both (Ashuach et al. 2023).

doi:10.1038/s41592-023-01909-9
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from scvi_lite.analysis.cells import How, Parts, ask_cells, find_cells, frame
from scvi_lite.analysis.expression import expected
from scvi_lite.analysis.inputs import gene_positions, needs_counts, to_numpy
from scvi_lite.analysis.latent import positions
from scvi_lite.analysis.output import Out
from scvi_lite.analysis.proteins import foreground_probability
from scvi_lite.errors import StateError, check_choice
from scvi_lite.nn.vae import Posterior

if TYPE_CHECKING:
    from scvi_lite._typing import Batch, Data, Model


def get_latent_representation(
    model: Model,
    adata: Data | None = None,
    modality: str = "joint",
    indices: Any = None,
    give_mean: bool = True,
    batch_size: int | None = None,
    return_dist: bool = False,
    mc_samples: int = 5000,
) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
    """Position of each cell in latent space.

    Parameters
    ----------
    adata
        Cells to look at; the model's own by default.
    modality
        ``"joint"``: from all that a cell has; ``"expression"``, ``"accessibility"`` or ``"protein"``: from one alone.
    indices, give_mean, batch_size, return_dist, mc_samples
        As in ``get_latent_representation`` of SCVI.

    Returns
    -------
    numpy.ndarray or tuple
        (n, k) float32; with ``return_dist`` the mean and the **variance** of the normal posterior. NaN for cells that
        lack the modality asked for.

    Raises
    ------
    RuntimeError
        If one modality is asked for and the data were minified without counts.
    ValueError
        If the modality does not exist, or ``adata`` does not fit the model.
    IndexError
        If ``indices`` has rows that do not exist.
    """
    module = model.module
    known = ("joint", *module.config.modalities)
    check_choice(known, modality=modality)
    if modality != "joint":
        needs_counts(model, f"modality={modality!r}")

    def one_alone(batch: Batch) -> Posterior:
        q, has_n1 = module.encode_each(batch)[modality], module.present(batch)[modality][:, None]
        return replace(q, z_loc_nk=torch.where(has_n1, q.z_loc_nk, torch.nan))

    encode = module.encode if modality == "joint" else one_alone
    return positions(model, encode, adata, indices, give_mean, mc_samples, batch_size, return_dist)


def get_normalized_expression(
    model: Model,
    adata: Data | None = None,
    indices: Any = None,
    n_samples_overall: int | None = None,
    transform_batch: Any = None,
    gene_list: Sequence[str] | None = None,
    use_z_mean: bool = True,
    n_samples: int = 1,
    batch_size: int | None = None,
    return_mean: bool = False,
    return_numpy: bool = False,
    silent: bool = True,
    *,
    out: Out = None,
) -> pd.DataFrame | np.ndarray | Any:
    """Denoised expression, as proportions; imputed from chromatin for cells without RNA.

    Parameters
    ----------
    adata
        Cells to look at; the model's own by default.
    indices
        Row numbers, in any order, or a mask; all cells by default.
    n_samples_overall
        Draw so many of the cells at random, with replacement.
    transform_batch
        Decode as if from this batch: a name, a code, or a list to average over. By default each cell's own.
    gene_list
        Names of genes, which are given in this order; all by default.
    use_z_mean
        Decode the posterior mean of each cell; else draw from its posterior.
    n_samples
        Draws for each cell, where ``use_z_mean`` is False.
    batch_size
        Cells in a minibatch.
    return_mean
        Average over ``n_samples``.
    return_numpy
        An array instead of a data frame. Results with a dimension of samples are arrays anyway.
    silent
        Show no progress.
    out
        Where to put an answer that memory cannot hold, as in ``get_normalized_expression`` of SCVI.

    Returns
    -------
    pandas.DataFrame or numpy.ndarray
        float32: (n, g); (s, n, g) with several samples that are not averaged. Each cell's genes add up to 1.
        Of a model without RNA (n, 0), and a warning.

    Raises
    ------
    ValueError
        If a gene or a batch is unknown (the nearest is named), or a number is out of range.
    IndexError
        If ``indices`` has rows that do not exist.
    """
    genes, names = gene_positions(model, gene_list), model._gene_names

    def ask(batch: Batch, q: Posterior, z: Tensor) -> Parts:
        return {"value": expected(model, z, None, batch, genes) if names else z[..., :0]}

    codes = model._batch_codes(transform_batch)
    how = How(codes, n_samples, return_mean, at_mean=use_z_mean, batch_size=batch_size, silent=silent)
    cells = find_cells(model, adata, indices, n_samples_overall)
    value = ask_cells(model, cells, ask, how, {"value": out})["value"]
    return frame(value, cells.names, names, genes, plain=return_numpy or out is not None)


def get_library_size_factors(
    model: Model, adata: Data | None = None, indices: Any = None, batch_size: int | None = None
) -> dict[str, np.ndarray]:
    """Size factors of each cell, (n,) float32 each.

    Returns
    -------
    dict
        ``"expression"``: what the proportions of genes are multiplied by (the exponential of the log library that
        scvi-tools gives); ``"accessibility"``: the share of a cell's accessible regions that is found open. NaN for
        cells that lack the modality, as all do of one that is not modelled.

    Raises
    ------
    RuntimeError
        If the data were minified without counts.
    """
    needs_counts(model, "The size factors of cells")
    model._warn_if_untrained()
    module = model.module
    factor_of = {
        "expression": lambda batch: module.library(batch, module.encode(batch)).exp(),
        "accessibility": lambda batch: module.depth(batch).sigmoid(),
    }
    factors: dict[str, list[Tensor]] = {name: [] for name in factor_of}
    for batch in model._minibatches(adata, indices, batch_size):
        has_n, nothing_n = module.present(batch), torch.full_like(batch.total_n, torch.nan)
        for name, factor in factor_of.items():
            factors[name].append(torch.where(has_n[name], factor(batch), torch.nan) if name in has_n else nothing_n)
    return {name: to_numpy(parts) for name, parts in factors.items()}


def get_protein_foreground_probability(
    model: Model,
    adata: Data | None = None,
    indices: Any = None,
    transform_batch: Any = None,
    protein_list: Sequence[str] | None = None,
    n_samples: int = 1,
    batch_size: int | None = None,
    use_z_mean: bool = True,
    return_mean: bool = True,
    return_numpy: bool | None = None,
    silent: bool = True,
) -> pd.DataFrame | np.ndarray:
    """Probability that each cell has each protein: that its count is foreground, and not background.

    Parameters
    ----------
    protein_list
        Names of proteins, which are given in this order; all by default.
    adata, indices, transform_batch, n_samples, batch_size, use_z_mean, return_mean, return_numpy, silent
        As in ``get_normalized_expression``.

    Returns
    -------
    pandas.DataFrame or numpy.ndarray
        float32: (n, p); (n, p, s) with several samples that are not averaged, as of TOTALVI. NaN for proteins that were
        measured in no cell.

    Raises
    ------
    RuntimeError
        If the model has no proteins.
    ValueError
        If a protein or a batch is unknown (the nearest is named), or a number is out of range.
    """
    if not model.protein_names:
        raise StateError(
            "This model has no proteins. Name them in the setup: protein_expression_obsm_key=... of setup_anndata, or "
            "modalities={'protein_layer': ...} of setup_mudata."
        )
    codes = model._batch_codes(transform_batch)
    how = How(codes, n_samples, return_mean, use_z_mean, draws_last=True, batch_size=batch_size, silent=silent)
    return foreground_probability(model, find_cells(model, adata, indices), how, protein_list, return_numpy)
