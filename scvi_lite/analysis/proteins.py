"""What a model of RNA and proteins says about both (Gayoso et al. 2021, doi:10.1038/s41592-020-01050-x).

Proteins are given without the background of the antibodies, unless it is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from scvi_lite.analysis import differential
from scvi_lite.analysis.cells import Cells, How, Parts, ask_cells, check_samples, chosen, find_cells, frame, n_draws
from scvi_lite.analysis.comparing import Features
from scvi_lite.analysis.expression import check_library_size, expected, log_library
from scvi_lite.analysis.inputs import gene_positions, positions_of
from scvi_lite.analysis.output import Out, pair
from scvi_lite.errors import check_choice, check_number

if TYPE_CHECKING:
    from scvi_lite._typing import Batch, Data, Model, Posterior, ProteinRates

FIELD_OF = {"rna": "x", "protein": "proteins_np"}  #: where the counts of a kind of feature are
Frames = tuple["pd.DataFrame", "pd.DataFrame"] | tuple[np.ndarray, np.ndarray]


def get_normalized_expression(
    model: Model,
    adata: Data | None = None,
    indices: Any = None,
    n_samples_overall: int | None = None,
    transform_batch: Any = None,
    gene_list: Sequence[str] | None = None,
    protein_list: Sequence[str] | None = None,
    library_size: float | str = 1,
    n_samples: int = 1,
    sample_protein_mixing: bool = False,
    scale_protein: bool = False,
    include_protein_background: bool = False,
    batch_size: int | None = None,
    return_mean: bool = True,
    return_numpy: bool | None = None,
    silent: bool = True,
    *,
    out: tuple[Out, Out] | None = None,
) -> Frames:
    """Denoised expression of genes, and of proteins without their background, for cells drawn from their posterior.

    Where proteins were not measured, they are imputed: give a batch in which they were as ``transform_batch``. Those
    that were measured in no cell are NaN.

    Parameters
    ----------
    adata
        Cells to look at; the model's own by default.
    indices
        Row numbers, in any order, or a mask; all cells by default.
    n_samples_overall
        Instead of each cell, so many that are drawn at random with replacement.
    transform_batch
        Decode as if from this batch: a name, a code, or a list to average over. By default each cell's own.
    gene_list, protein_list
        Names, which are given in this order; all by default.
    library_size
        Scale genes to this total; 1 gives proportions. ``"latent"`` is the library size of each cell.
    n_samples
        Draws from the posterior of each cell.
    sample_protein_mixing
        Draw whether a cell has a protein, instead of weighting by the probability that it has.
    scale_protein
        Scale the proteins of a cell to a total of 1.
    include_protein_background
        Add the background.
    batch_size
        Cells in a minibatch.
    return_mean
        Average over ``n_samples``.
    return_numpy
        Arrays instead of data frames. Results with a dimension of samples are arrays anyway.
    silent
        Show no progress.
    out
        Two places for answers that memory cannot hold, as in ``out=("rna.npy", None)``: see
        ``get_normalized_expression`` of SCVI. What has one is returned as that array, without names.

    Returns
    -------
    tuple
        Genes (n, g) and proteins (n, p), float32; (n, g, s) and (n, p, s) with ``return_mean=False`` and more than
        one sample.

    Raises
    ------
    ValueError
        If a gene, a protein or a batch is unknown (the nearest is named), or a number is out of range.
    IndexError
        If ``indices`` has rows that do not exist.

    Examples
    --------
    >>> import scvi_lite
    >>> adata = scvi_lite.data.synthetic_iid(batch_size=50, n_genes=20)
    >>> scvi_lite.model.TOTALVI.setup_anndata(adata, "protein_expression", batch_key="batch")
    >>> model = scvi_lite.model.TOTALVI(adata, n_hidden=16)
    >>> model.train(max_epochs=1, enable_progress_bar=False)
    >>> rna, protein = model.get_normalized_expression(gene_list=["gene_1"], protein_list=["protein_2", "protein_0"])
    >>> rna.shape, protein.columns.tolist()
    ((100, 1), ['protein_2', 'protein_0'])
    """
    genes, proteins = gene_positions(model, gene_list), protein_positions(model, protein_list)
    codes = model._batch_codes(transform_batch)
    check_library_size(library_size)
    places = dict(zip(FIELD_OF, pair(out)))

    def ask(batch: Batch, q: Posterior, z: Tensor) -> Parts:
        library_n = log_library(model, batch, q, library_size, n_draws(z))
        rates = model.module.decode_proteins(z, batch)
        y_np = protein_value(rates, sample_protein_mixing, include_protein_background, scale_protein)
        return {"rna": expected(model, z, library_n, batch, genes), "protein": answer(model, y_np, proteins)}

    check_samples(n_samples, n_samples_overall)
    cells = find_cells(model, adata, indices, n_samples_overall)
    how = How(codes, n_samples, return_mean, draws_last=True, batch_size=batch_size, silent=silent)
    values = ask_cells(model, cells, ask, how, places)
    names = {"rna": (model._gene_names, genes), "protein": (model.protein_names, proteins)}
    rna, protein = (
        frame(value, cells.names, *names[kind], plain=return_numpy or places[kind] is not None)
        for kind, value in values.items()
    )
    return rna, protein


def get_protein_foreground_probability(
    model: Model,
    adata: Data | None = None,
    indices: Any = None,
    transform_batch: Any = None,
    protein_list: Sequence[str] | None = None,
    n_samples: int = 1,
    batch_size: int | None = None,
    return_mean: bool = True,
    return_numpy: bool | None = None,
    silent: bool = True,
) -> pd.DataFrame | np.ndarray:
    """Probability that each cell has each protein: that its count is foreground, and not background.

    Arguments and errors are those of ``get_normalized_expression``.

    Returns
    -------
    pandas.DataFrame or numpy.ndarray
        (n, p) float32; (n, p, s) with ``return_mean=False`` and more than one sample. NaN for proteins that were
        measured in no cell.
    """
    codes = model._batch_codes(transform_batch)
    how = How(codes, n_samples, return_mean, draws_last=True, batch_size=batch_size, silent=silent)
    return foreground_probability(model, find_cells(model, adata, indices), how, protein_list, return_numpy)


def foreground_probability(
    model: Model, cells: Cells, how: How, protein_list: Sequence[str] | None, return_numpy: bool | None
) -> pd.DataFrame | np.ndarray:
    """Probability that each cell has each protein, asked in some way."""
    proteins = protein_positions(model, protein_list)

    def ask(batch: Batch, q: Posterior, z: Tensor) -> Parts:
        return {"p": answer(model, model.module.decode_proteins(z, batch).foreground_probability_np, proteins)}

    return frame(ask_cells(model, cells, ask, how)["p"], cells.names, model.protein_names, proteins, return_numpy)


def get_protein_background_mean(
    model: Model, adata: Data | None = None, indices: Any = None, batch_size: int | None = None
) -> np.ndarray:
    """Expected background of each protein in each cell, exp(loc + scale²/2) of its log-normal posterior: (n, p).

    Arguments and errors are those of ``get_normalized_expression``.
    """

    def ask(batch: Batch, q: Posterior, z: Tensor) -> Parts:
        rates = model.module.decode_proteins(z, batch)
        return {"mean": answer(model, (rates.back_loc_np + 0.5 * rates.back_scale_np**2).exp(), None)}

    return ask_cells(model, find_cells(model, adata, indices), ask, How(batch_size=batch_size))["mean"]


def differential_expression(
    model: Model,
    adata: Data | None = None,
    groupby: str | None = None,
    group1: str | Sequence[str] | None = None,
    group2: str | None = None,
    idx1: Any = None,
    idx2: Any = None,
    mode: str = "change",
    delta: float | None = 0.25,
    batch_size: int | None = None,
    all_stats: bool = True,
    batch_correction: bool = False,
    batchid1: Sequence[str] | None = None,
    batchid2: Sequence[str] | None = None,
    fdr_target: float | Sequence[float] = 0.05,
    silent: bool = False,
    protein_prior_count: float = 0.1,
    scale_protein: bool = False,
    sample_protein_mixing: bool = False,
    include_protein_background: bool = False,
    use_field: str | Sequence[str] | None = None,
    pseudocounts: float | None = 1e-5,
    **options: Any,
) -> pd.DataFrame:
    """Which genes and proteins differ between populations of cells, by how much, and how sure that is.

    Parameters
    ----------
    protein_prior_count
        Added to the proteins, as they are compared, so that fold changes of next to nothing stay small. Where
        ``scale_protein`` makes them add up to 1, a smaller one is needed.
    scale_protein, sample_protein_mixing, include_protein_background
        As in ``get_normalized_expression``.
    use_field
        ``"rna"`` or ``"protein"`` to compare the genes, or the proteins, alone; both by default.
    pseudocounts
        In change mode: added to both sides of the ratio. None estimates it from genes that are not expressed.
    adata, groupby, group1, group2, idx1, idx2, mode, delta, batch_size, all_stats, batch_correction, batchid1, batchid2
        As for every model: see :func:`scvi_lite.analysis.differential.differential_expression`.
    fdr_target, silent, **options
        As there.

    Returns
    -------
    pandas.DataFrame
        One row a gene or protein and comparison, with the columns of every model. A protein is called by its name and
        ``_protein``, since genes may have the same names.
    """
    check_number(protein_prior_count=protein_prior_count)
    names_of = {"rna": model._gene_names, "protein": [f"{name}_protein" for name in model.protein_names]}
    asked = names_of if use_field is None else [use_field] if isinstance(use_field, str) else list(use_field)
    for kind in asked:
        check_choice(names_of, use_field=kind)
    kinds = [kind for kind in names_of if kind in asked]
    names = [name for kind in kinds for name in names_of[kind]]

    def value_of(z: Tensor, batch: Batch) -> Tensor:
        values = [expected(model, z, None, batch)] if "rna" in kinds else []
        if "protein" in kinds:
            rates = model.module.decode_proteins(z, batch)
            y_np = protein_value(rates, sample_protein_mixing, include_protein_background, scale_protein)
            values.append(y_np + protein_prior_count)
        return torch.cat(values, -1)

    return differential.differential_expression(
        model, adata, groupby, group1, group2, idx1, idx2, mode, delta, batch_size, all_stats,
        batch_correction, batchid1, batchid2, fdr_target, silent, pseudocounts=pseudocounts,
        features=Features(names, value_of, [FIELD_OF[kind] for kind in kinds]),
        **options,
    )  # fmt: skip


def protein_value(
    rates: ProteinRates, sample_mixing: bool = False, with_background: bool = False, scale: bool = False
) -> Tensor:
    """The expected foreground, perhaps with the background, perhaps as proportions: (..., n, p)."""
    fore_np = rates.foreground_probability_np
    if sample_mixing:
        fore_np = torch.bernoulli(fore_np)
    value_np = fore_np * rates.fore_np
    if with_background:
        value_np = value_np + (1 - fore_np) * rates.back_np
    return value_np / value_np.sum(-1, keepdim=True).clamp(min=1e-12) if scale else value_np


def protein_positions(model: Model, protein_list: Sequence[str] | None) -> np.ndarray | None:
    """Positions of proteins among the model's, in the order asked for; None for all."""
    return positions_of("protein_list", protein_list, model.protein_names, "proteins")


def answer(model: Model, value_np: Tensor, positions: np.ndarray | None) -> Tensor:
    """Some of the proteins, or all; NaN for those that no cell was measured for, of which nothing was learned."""
    return chosen(torch.where(model.module.measured_p, value_np, torch.nan), positions)
