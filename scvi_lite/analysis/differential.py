"""Differential expression between populations of cells.

Vanilla mode: Lopez et al. 2018, doi:10.1038/s41592-018-0229-2. Change mode, importance weights and the filter for
outliers: Boyeau et al., bioRxiv 794289 (2019) and PNAS 120 (2023), doi:10.1073/pnas.2209124120.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from scvi_lite.analysis.comparing import Codes, Features, compare, decode_in_turn
from scvi_lite.analysis.effects import levels, make_test
from scvi_lite.analysis.groups import find_comparisons
from scvi_lite.analysis.importance import OPTIONS, draw_latent
from scvi_lite.analysis.inputs import needs_counts
from scvi_lite.analysis.latent import posterior_parameters
from scvi_lite.errors import as_options, check_choice, check_options, check_whole, unknown

if TYPE_CHECKING:
    from scvi_lite._typing import AnnData, Model

OUTLIERS = 0.1  # share of the cells that the filter removes
CELLS_PER_DIMENSION = 5  # fewer cells than this do not tell where a population ends


def differential_expression(
    model: Model,
    adata: AnnData | None = None,
    groupby: str | None = None,
    group1: str | Sequence[str] | None = None,
    group2: str | None = None,
    idx1: Any = None,
    idx2: Any = None,
    mode: str = "vanilla",
    delta: float | None = 0.25,
    batch_size: int | None = None,
    all_stats: bool = True,
    batch_correction: bool = False,
    batchid1: Sequence[str] | None = None,
    batchid2: Sequence[str] | None = None,
    fdr_target: float | Sequence[float] = 0.05,
    silent: bool = False,
    weights: str | None = "uniform",
    filter_outlier_cells: bool = False,
    importance_weighting_kwargs: Mapping[str, Any] | None = None,
    *,
    n_samples_overall: int = 5000,
    use_permutation: bool = False,
    m_permutation: int = 10_000,
    change_fn: Callable[..., np.ndarray] | str | None = None,
    m1_domain_fn: Callable[[np.ndarray], np.ndarray] | None = None,
    pseudocounts: float | None = None,
    threshold_counts: float = 0.01,
    test_mode: str = "three",
    cred_interval_lvls: float | Sequence[float] | None = None,
    features: Features | None = None,
) -> pd.DataFrame:
    """Which genes differ between populations of cells, by how much, and how sure that is.

    Draws cells of each population and a latent position from the posterior of each, decodes these draws alone, and
    compares them.

    Parameters
    ----------
    adata
        The cells; the model's own by default.
    groupby
        Column of ``adata.obs`` that holds the groups.
    group1, group2
        Groups to compare: each of ``group1`` (one, several, or by default all) with ``group2`` (one group, or by
        default all other cells that are in a group).
    idx1, idx2
        Cells to compare, instead of groups: row numbers, a mask, or a query of ``adata.obs`` such as
        ``"n_counts > 500"``. ``idx2`` is all other cells by default.
    mode
        ``"vanilla"``: how likely is it that the first population expresses more. ``"change"``: how likely is it that
        the log2 fold change is larger than ``delta``.
    delta
        In change mode: fold changes up to this do not count. None estimates it from the genes' fold changes.
    batch_size
        Cells in a minibatch.
    all_stats
        Add statistics of the counts.
    batch_correction
        Decode both populations as if from the same batches, and compare within a batch. Else each cell is decoded as
        from its own batch.
    batchid1, batchid2
        With ``batch_correction``: batches to decode each population as. The same set for both (by default all), or two
        sets that share none.
    fdr_target
        In change mode: expected share of false discoveries in the column ``is_de_fdr_<target>``. Several make several
        columns.
    silent
        Show no progress.
    weights
        ``"uniform"``, or ``"importance"`` to weight the draws by how well they explain the population.
    filter_outlier_cells
        Leave out the tenth of each population that is farthest from its centre in latent space.
    importance_weighting_kwargs
        Options of ``get_importance_weights``: ``max_cells``, ``truncation``, ``n_mc_samples``,
        ``n_mc_samples_per_pass``.
    n_samples_overall
        Draws for each population, spread evenly over the batches.
    use_permutation, m_permutation
        Compare ``m_permutation`` random pairs of draws, instead of using each draw once.
    change_fn
        In change mode: the effect, a function of the draws of both populations and, where it takes three arguments,
        the pseudocounts; ``"log-fold"`` by default.
    m1_domain_fn
        In change mode: which effects count, instead of those beyond ``delta``.
    pseudocounts
        In change mode: added to both sides of the ratio. None estimates it from genes that are not expressed.
    threshold_counts
        A gene whose mean count in a population is below this is not expressed there.
    test_mode
        In change mode: ``"three"`` tells up from down, ``"two"`` takes them together.
    cred_interval_lvls
        In change mode: one or several levels of credible intervals to add, e.g. ``0.95``.
    features
        What a model compares besides genes.

    Returns
    -------
    pandas.DataFrame
        One row a gene and comparison, the surest first. Vanilla: ``proba_m1`` (the first is higher), ``proba_m2``,
        ``bayes_factor`` (log odds, natural logarithm), ``scale1``, ``scale2`` (mean expression). Change: ``proba_de``,
        ``proba_not_de``, ``bayes_factor``, ``scale1``, ``scale2``, ``pseudocounts``, ``delta``, ``lfc_mean`` and other
        statistics of the log2 fold change. Then ``raw_mean1`` and further statistics of the counts (NaN where the
        data were minified without them), ``is_de_fdr_<target>``, ``comparison``, ``group1``, ``group2``.

    Raises
    ------
    KeyError
        If ``groupby`` is not a column.
    ValueError
        If a group or batch does not exist, a selection is empty, or a value is out of range.
    IndexError
        If a row does not exist.
    RuntimeError
        If importance weights are asked for and the data were minified without counts.

    Examples
    --------
    >>> import scvi_lite
    >>> adata = scvi_lite.data.simulate(n_cells=200, n_genes=30)
    >>> scvi_lite.model.SCVI.setup_anndata(adata, batch_key="batch")
    >>> model = scvi_lite.model.SCVI(adata)
    >>> model.train(max_epochs=1, enable_progress_bar=False)
    >>> de = model.differential_expression(groupby="cell_type", group1="type_0", mode="change", silent=True)
    >>> de.shape, de["comparison"].iloc[0]
    ((30, 22), 'type_0 vs Rest')
    """
    if change_fn is not None and not callable(change_fn) and change_fn != "log-fold":
        raise ValueError(unknown("change_fn", change_fn, ["log-fold"], "a function or an option"))
    check_weights(model, weights, importance_weighting_kwargs)
    check_whole(n_samples_overall=n_samples_overall, m_permutation=m_permutation)
    test = make_test(
        mode,
        delta=delta,
        pseudocounts=pseudocounts,
        effect=change_fn if callable(change_fn) else None,
        region=m1_domain_fn,
        test_mode=test_mode,
        intervals=levels("cred_interval_lvls", cred_interval_lvls),
        fdr_targets=levels("fdr_target", fdr_target),
    )
    codes = batch_pairing(model, batch_correction, batchid1, batchid2)
    adata = model._check(adata)
    comparisons = find_comparisons(model, adata, groupby, group1, group2, idx1, idx2)
    model._warn_if_untrained()
    features = features or Features(model._gene_names)
    n_turns = math.lcm(*map(len, codes))
    n = -(-n_samples_overall // n_turns) * n_turns  # as many from each of the batches

    def sampler(rows: np.ndarray, codes: Codes) -> np.ndarray:
        rows = inliers(model, adata, rows, batch_size) if filter_outlier_cells else rows
        rows, z_sk = draw_latent(model, adata, rows, n, weights or "uniform", importance_weighting_kwargs, batch_size)
        return decode_in_turn(model, adata, rows, z_sk, codes, features, batch_size)

    return compare(
        model, adata, comparisons, sampler, test, codes, features,
        all_stats, silent, threshold_counts, m_permutation if use_permutation else None,
    )  # fmt: skip


def check_weights(model: Model, weights: str | None, options: Mapping[str, Any] | None) -> None:
    """Refuse weights that there are not, that the data do not allow, or options that they do not take."""
    if weights is not None:
        check_choice(("uniform", "importance"), weights=weights)
    if weights == "importance":
        needs_counts(model, "weights='importance'")
    check_options("importance_weighting_kwargs", as_options("importance_weighting_kwargs", options), OPTIONS)


def batch_pairing(model: Model, batch_correction: bool, batchid1: Any, batchid2: Any) -> tuple[Codes, Codes]:
    """Codes of the batches that each population is decoded as.

    Raises
    ------
    ValueError
        If batches are named without ``batch_correction``, do not exist, or overlap in part.
    """
    if not batch_correction:
        if batchid1 is not None or batchid2 is not None:
            raise ValueError("batchid1 and batchid2 only count with batch_correction=True: add it, or leave them out.")
        return [None], [None]
    everything = list(range(model.registry.n_batches))
    codes1, codes2 = (
        everything if ids is None else sorted(set(model._batch_codes(ids, argument)))
        for argument, ids in (("batchid1", batchid1), ("batchid2", batchid2))
    )
    shared = set(codes1) & set(codes2)
    if codes1 != codes2 and shared:
        known = model.registry.categories("batch_n")
        raise ValueError(
            f"batchid1 and batchid2 overlap in part, in {[known[code] for code in sorted(shared)]}. "
            "Give both the same batches, to compare within each, or batches of which none is shared."
        )
    return codes1, codes2


def inliers(model: Model, adata: AnnData, rows: np.ndarray, batch_size: int | None = None) -> np.ndarray:
    """The nine tenths of the cells that are nearest to their centre, by a robust covariance in latent space.

    Minimum covariance determinant: Rousseeuw & Van Driessen 1999, doi:10.1080/00401706.1999.10485670.
    """
    from sklearn.covariance import MinCovDet

    if len(rows) < CELLS_PER_DIMENSION * model.module.config.n_latent:
        return rows
    loc_nk, _ = posterior_parameters(model, adata, rows, batch_size)
    distance_n = MinCovDet(random_state=0).fit(loc_nk).dist_
    return rows[distance_n <= np.quantile(distance_n, 1 - OUTLIERS)]
