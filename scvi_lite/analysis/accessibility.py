"""Accessibility of chromatin as a model sees it, and where it differs (Ashuach et al. 2022).

doi:10.1016/j.crmeth.2022.100182
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from scvi_lite.analysis.cells import chosen, find_cells, frame, mean_over, minibatches
from scvi_lite.analysis.comparing import Features
from scvi_lite.analysis.differential import differential_expression
from scvi_lite.analysis.effects import levels
from scvi_lite.analysis.inputs import minibatch_size, needs_counts, positions_of, to_numpy
from scvi_lite.analysis.output import Out, collect, sparse_rows
from scvi_lite.data.checks import value_blocks
from scvi_lite.errors import StateError, unknown

if TYPE_CHECKING:
    from scvi_lite._typing import AnnData, Batch, Model, csr_matrix

logger = logging.getLogger("scvi_lite")


#: Of the draws of two populations: the effect that is reported, and None for that of differential expression.
EFFECTS: dict[str, Callable[..., np.ndarray] | None] = {"difference": lambda x1, x2: x2 - x1, "log-fold": None}
RENAMED = {"scale1": "est_prob1", "scale2": "est_prob2"}
MEASURED = {"non_zeros_proportion1": "emp_prob1", "non_zeros_proportion2": "emp_prob2"}


def note_counts(matrix: Any) -> None:
    """Tell users whose regions have counts that these are read as open and closed."""
    if any(block.size and block.max() > 1 for block in value_blocks(matrix)):
        logger.info("Some regions have counts above 1: whatever its count, a region is open or closed.")


def get_normalized_accessibility(
    model: Model,
    adata: AnnData | None = None,
    indices: Any = None,
    n_samples_overall: int | None = None,
    region_list: Sequence[str] | None = None,
    transform_batch: Any = None,
    use_z_mean: bool = True,
    threshold: float | None = None,
    normalize_cells: bool = False,
    normalize_regions: bool = False,
    batch_size: int | None = None,
    return_numpy: bool = False,
    *,
    out: Out = None,
) -> pd.DataFrame | np.ndarray | csr_matrix | Any:
    """Probability that a region is accessible in a cell, freed of depth, of the region's factor and of noise.

    Parameters
    ----------
    adata
        Cells to look at; the model's own by default.
    indices
        Row numbers, in any order, or a mask; all cells by default.
    n_samples_overall
        Draw so many of the cells at random, with replacement.
    region_list
        Names of regions, which are given in this order; all by default.
    transform_batch
        Decode as if from this batch: a name, a code, or a list to average over. By default each cell's own.
    use_z_mean
        Decode the posterior mean of each cell; else one draw.
    threshold
        Keep only the probabilities above this, from 0 to 1, in a sparse matrix. At no time are all cells × regions in
        memory.
    normalize_cells, normalize_regions
        Multiply by the depth factor of the cell, or by the factor of the region: the probability that it is found open.
    batch_size
        Cells in a minibatch; by default as many as keep the memory small.
    return_numpy
        An array, or with ``threshold`` a SciPy matrix, instead of a data frame.
    out
        Where to put an answer that memory cannot hold, as in ``get_normalized_expression`` of SCVI.

    Returns
    -------
    pandas.DataFrame, numpy.ndarray or scipy.sparse.csr_matrix
        (n, r) float32, probabilities; of a model without regions (n, 0), and a warning.

    Raises
    ------
    ValueError
        If a region or a batch is unknown (the nearest is named), a number is out of range, ``out`` does not fit, or is
        given with ``threshold``.
    IndexError
        If ``indices`` has rows that do not exist.

    Examples
    --------
    >>> import scvi_lite
    >>> adata = scvi_lite.data.synthetic_iid(batch_size=50, n_genes=100)
    >>> scvi_lite.model.PEAKVI.setup_anndata(adata)
    >>> model = scvi_lite.model.PEAKVI(adata)
    >>> model.train(max_epochs=1, enable_progress_bar=False)
    >>> model.get_normalized_accessibility(region_list=["gene_7", "gene_1"]).shape
    (100, 2)
    """
    names = model._region_names
    regions = positions_of("region_list", region_list, names, "regions")
    codes = model._batch_codes(transform_batch)
    if threshold is not None and not (isinstance(threshold, Real) and 0 <= threshold <= 1):
        raise ValueError(f"threshold={threshold!r}: a number from 0 to 1 is needed.")
    if threshold is not None and out is not None:
        raise ValueError(
            "threshold and out are given; use one: what is above a threshold is a sparse matrix in memory."
        )
    cells = find_cells(model, adata, indices, n_samples_overall)
    factor_r = _region_factors(model) if normalize_regions and names else None
    if normalize_cells and names:
        _check_depth(model)

    def parts() -> Iterator[Tensor]:
        for _, batch in minibatches(model, *cells, minibatch_size(batch_size, len(names))):
            q = model.module.encode(batch)
            z_nk = q.z_loc_nk if use_z_mean else q.sample_z()
            p_nr = mean_over(chosen(accessible(model, z_nk, batch.with_batch(code)), regions) for code in codes)
            if normalize_cells:
                p_nr = p_nr * model.module.depth(batch).sigmoid()[:, None]
            yield p_nr if factor_r is None else p_nr * chosen(factor_r, regions)

    blocks = parts() if names else [torch.empty(len(cells.rows), 0)]
    if threshold is None:
        value = collect(({"p": p_nr} for p_nr in blocks), len(cells.rows), {"p": out})["p"]
    else:
        above = (torch.where(p_nr >= threshold, p_nr, 0) for p_nr in blocks)
        value = sparse_rows(above, len(names) if regions is None else len(regions))
    return frame(value, cells.names, names, regions, plain=return_numpy or out is not None)


def accessible(model: Model, z: Tensor, batch: Batch) -> Tensor:
    """Accessibility (..., n, r) of a minibatch at latent places, whatever the depth."""
    return model.module.decode_regions(z, None, batch).p_nr


def get_library_size_factors(
    model: Model, adata: AnnData | None = None, indices: Any = None, batch_size: int | None = None
) -> np.ndarray:
    """Depth factor of each cell, d_n: the share of its accessible regions that is found open, (n,) float32.

    Parameters
    ----------
    adata, indices, batch_size
        As in ``get_normalized_accessibility``.

    Raises
    ------
    RuntimeError
        If the model was made with ``model_depth=False``, or the data were minified without counts.
    """
    _check_depth(model)
    model._warn_if_untrained()
    return to_numpy([model.module.depth(batch).sigmoid() for batch in model._minibatches(adata, indices, batch_size)])


def get_region_factors(model: Model) -> np.ndarray:
    """Factor of each region, f_r: how readily it is found when it is accessible, (r,) float32.

    Raises
    ------
    RuntimeError
        If the model was made with ``region_factors=False``.
    """
    model._warn_if_untrained()
    return _region_factors(model).cpu().numpy() if model._region_names else np.empty(0, dtype=np.float32)


def _region_factors(model: Model) -> Tensor:
    factor_r = model.module.factor_r
    if factor_r is None:
        raise StateError("The model was made with region_factors=False, and has none.")
    return factor_r.detach().sigmoid()


def _check_depth(model: Model) -> None:
    needs_counts(model, "The depth of cells")
    if not model.module.config.model_depth:
        raise StateError("The model was made with model_depth=False, and knows no depth of its cells.")


def differential_accessibility(
    model: Model,
    adata: AnnData | None = None,
    groupby: str | None = None,
    group1: str | Sequence[str] | None = None,
    group2: str | None = None,
    idx1: Any = None,
    idx2: Any = None,
    mode: str = "change",
    delta: float | None = 0.05,
    batch_size: int | None = None,
    all_stats: bool = True,
    batch_correction: bool = False,
    batchid1: Sequence[str] | None = None,
    batchid2: Sequence[str] | None = None,
    fdr_target: float = 0.05,
    silent: bool = False,
    *,
    n_samples_overall: int = 5000,
    test_mode: str = "three",
    change_fn: Callable[..., np.ndarray] | str = "difference",
    pseudocounts: float | None = None,
) -> pd.DataFrame:
    """Which regions differ in accessibility between populations of cells, by how much, and how sure that is.

    The effect is the difference of the probabilities that a region is accessible, the second population minus the
    first. (scvi-tools reports this difference, and computes ``prob_da`` from the log2 fold change.)

    Parameters
    ----------
    adata, groupby, group1, group2, idx1, idx2, batch_size, batch_correction, batchid1, batchid2, silent
        As in ``differential_expression`` of SCVI.
    mode
        ``"change"``: how likely is it that the effect is larger than ``delta``. ``"vanilla"``: how likely is it that
        the region is more accessible in the first population.
    delta
        Effects up to this do not count. None estimates it from the regions' effects.
    all_stats
        Add what the counts say.
    fdr_target
        In change mode: expected share of false discoveries in the column ``is_da_fdr``.
    n_samples_overall
        Draws for each population.
    test_mode
        In change mode: ``"three"`` tells up from down, ``"two"`` takes them together.
    change_fn
        In change mode, what ``delta`` is compared with: ``"difference"``, ``"log-fold"`` for the log2 fold change, or a
        function of the probabilities of both populations.
    pseudocounts
        Added to both sides of the ratio of ``"log-fold"``. None estimates it from regions that are never found open.

    Returns
    -------
    pandas.DataFrame
        One row a region and comparison, the surest first: ``prob_da``; ``is_da_fdr`` (in change mode);
        ``bayes_factor`` (log odds, natural logarithm); ``effect_size``; ``emp_effect``; ``est_prob1``, ``est_prob2``
        (mean probability in each population); ``emp_prob1``, ``emp_prob2`` (share of its cells where the region was
        found open); ``comparison``, ``group1``, ``group2``.

    Raises
    ------
    KeyError
        If ``groupby`` is not a column.
    ValueError
        If a group or batch does not exist, a selection is empty, or a value is out of range.
    IndexError
        If a row does not exist.

    Examples
    --------
    >>> import scvi_lite
    >>> adata = scvi_lite.data.synthetic_iid(batch_size=50, n_genes=100)
    >>> scvi_lite.model.PEAKVI.setup_anndata(adata)
    >>> model = scvi_lite.model.PEAKVI(adata)
    >>> model.train(max_epochs=1, enable_progress_bar=False)
    >>> da = model.differential_accessibility(groupby="labels", group1="label_0", silent=True)
    >>> da.columns[:4].tolist()
    ['prob_da', 'is_da_fdr', 'bayes_factor', 'effect_size']
    """
    if not callable(change_fn) and change_fn not in EFFECTS:
        raise ValueError(unknown("change_fn", change_fn, EFFECTS, "a function or an option"))
    target = next(iter(levels("fdr_target", fdr_target)), 0.05)  # one alone has a column
    table = differential_expression(
        model, adata, groupby, group1, group2, idx1, idx2, mode, delta, batch_size, all_stats,
        batch_correction, batchid1, batchid2, target, silent,
        n_samples_overall=n_samples_overall, test_mode=test_mode, pseudocounts=pseudocounts,
        change_fn=EFFECTS[change_fn] if isinstance(change_fn, str) else change_fn,
        features=Features(model._region_names, partial(accessible, model), [model._region_field]),
    )  # fmt: skip
    return _renamed(table, f"is_de_fdr_{target}")


def _renamed(table: pd.DataFrame, called: str) -> pd.DataFrame:
    """The columns of a comparison under the names that say accessibility."""
    names = {"proba_de": "prob_da", "proba_m1": "prob_da", called: "is_da_fdr", **RENAMED, **MEASURED}
    table = table.rename(columns=names)
    table["effect_size"] = table["est_prob2"] - table["est_prob1"]
    if "emp_prob1" in table:
        table["emp_effect"] = table["emp_prob2"] - table["emp_prob1"]
    order = ["prob_da", "is_da_fdr", "bayes_factor", "effect_size", "emp_effect", *RENAMED.values(), *MEASURED.values()]
    return table[[name for name in [*order, "comparison", "group1", "group2"] if name in table]]
