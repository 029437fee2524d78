"""Counts and expression drawn from the model's posterior predictive distribution."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from scvi_lite.analysis.cells import How, Parts, ask_cells, find_cells, minibatches, n_draws
from scvi_lite.analysis.expression import draw_library, select_genes
from scvi_lite.analysis.inputs import gene_positions, minibatch_size
from scvi_lite.analysis.output import Out, collect, sparse_rows
from scvi_lite.errors import check_choice, check_whole

if TYPE_CHECKING:
    from scipy import sparse

    from scvi_lite._typing import AnnData, Batch, Data, Model, Posterior, Rates


def posterior_predictive_sample(
    model: Model,
    adata: AnnData | None = None,
    indices: Any = None,
    transform_batch: Any = None,
    n_samples: int = 1,
    gene_list: Sequence[str] | None = None,
    batch_size: int | None = None,
    silent: bool = True,
    *,
    out: Out = None,
) -> sparse.csr_array | sparse.coo_array | Any:
    """Draw new counts for cells: a latent position from the posterior of each, then counts from the likelihood.

    Parameters
    ----------
    adata
        Cells to look at; the model's own by default.
    indices
        Row numbers, in any order, or a mask; all cells by default.
    transform_batch
        Decode as if from this batch: a name, a code, or a list, of which each draw takes one at random. By default each
        cell's own.
    n_samples
        Draws for each cell.
    gene_list
        Names of genes, which are given in this order; all by default.
    batch_size
        Cells in a minibatch.
    silent
        Show no progress.
    out
        Where to put draws that memory cannot hold, even sparse, as in ``get_normalized_expression``. A dense array, of
        which ``.zarr`` keeps the zeros small.

    Returns
    -------
    scipy.sparse.csr_array or scipy.sparse.coo_array
        float32 counts, (n, g), or (n, g, s) with several draws; ``.todense()`` gives an array. Or ``out``.

    Raises
    ------
    ValueError
        If a gene or a batch is unknown (the nearest is named), ``n_samples`` is below 1, or ``out`` does not fit.

    Examples
    --------
    >>> import scvi_lite
    >>> adata = scvi_lite.data.synthetic_iid(batch_size=50, n_genes=20)
    >>> scvi_lite.model.SCVI.setup_anndata(adata, batch_key="batch")
    >>> model = scvi_lite.model.SCVI(adata)
    >>> model.train(max_epochs=1, enable_progress_bar=False)
    >>> model.posterior_predictive_sample(n_samples=3, gene_list=["gene_7"]).shape
    (100, 1, 3)
    """
    from scipy import sparse

    genes = gene_positions(model, gene_list)
    codes = model._batch_codes(transform_batch)
    check_whole(n_samples=n_samples)
    adata, rows = find_cells(model, adata, indices)
    size = minibatch_size(batch_size, n_samples * model.module.config.n_genes)
    n_genes = model.module.config.n_genes if genes is None else len(genes)

    def draws() -> Iterator[Parts]:
        for _, batch in minibatches(model, adata, rows, size, silent):
            drawn = [batch.with_batch(codes[int(torch.randint(len(codes), ()))]) for _ in range(n_samples)]
            x = [select_genes(draw_rates(model, one), genes).distribution().sample() for one in drawn]
            yield {"x": x[0] if n_samples == 1 else torch.stack(x, -1)}

    if out is not None:
        return collect(draws(), len(rows), {"x": out}, draws_last=True)["x"]
    flat = sparse_rows((parts["x"].flatten(1) for parts in draws()), n_genes * n_samples)
    if n_samples == 1:
        return sparse.csr_array(flat)
    row_m = np.repeat(np.arange(len(rows), dtype=np.int32), np.diff(flat.indptr))
    gene_m, sample_m = np.divmod(flat.indices, n_samples)
    return sparse.coo_array((flat.data, (row_m, gene_m, sample_m)), shape=(len(rows), n_genes, n_samples))


def get_likelihood_parameters(
    model: Model,
    adata: AnnData | None = None,
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
        ``get_normalized_expression``.

    Returns
    -------
    dict
        ``"mean"`` of the counts (before dropout); ``"dispersions"``, the inverse dispersion of NB and ZINB or the
        standard deviation of the normal; ``"dropout"`` of ZINB, a probability. Each (n, g) float32, or (s, n, g)
        with several draws that are not averaged.

    Raises
    ------
    ValueError
        If ``n_samples`` is below 1.
    """

    def ask(batch: Batch, q: Posterior, z: Tensor) -> Parts:
        return parameters_of(model.module.decode(z, draw_library(model, batch, q, n_draws(z)), batch))

    how = How(n_samples=n_samples, average=give_mean, batch_size=batch_size)
    return ask_cells(model, find_cells(model, adata, indices), ask, how, out)


def parameters_of(rates: Rates) -> Parts:
    """Parameters of the likelihood by name, (..., n, g) each."""
    parameters = {"mean": rates.mu_ng}
    if rates.dropout_ng is not None:
        parameters["dropout"] = rates.dropout_ng.sigmoid()
    if rates.log_theta is not None:
        parameters["dispersions"] = rates.log_theta.exp().expand_as(rates.mu_ng)
    return parameters


def get_feature_correlation_matrix(
    model: Model,
    adata: AnnData | None = None,
    indices: Any = None,
    n_samples: int = 10,
    batch_size: int | None = None,
    rna_size_factor: float = 1000,
    transform_batch: Any = None,
    correlation_type: str = "spearman",
    silent: bool = True,
) -> pd.DataFrame:
    """Correlation of genes over cells, in expression drawn from the posterior: without the noise of counting.

    Each draw takes a latent position, decodes it with one library size for all cells, and draws the rate that NB and
    ZINB give to each count, Gamma(shape theta, mean mu). The correlations of the draws are averaged.

    Parameters
    ----------
    adata, indices, batch_size, silent
        As in ``posterior_predictive_sample``.
    n_samples
        Draws. Each needs a matrix of cells × genes.
    rna_size_factor
        The library size of all cells.
    transform_batch
        Decode as if from this batch; correlations are averaged over several.
    correlation_type
        ``"spearman"`` or ``"pearson"``.

    Returns
    -------
    pandas.DataFrame
        (g, g) float64. NaN for a gene that does not vary.

    Raises
    ------
    ValueError
        If a batch or the type is unknown, a number out of range, or there are fewer than two cells.
    """

    def rates_of(z: Tensor, library_n: Tensor, batch: Batch) -> Tensor:
        return denoised(model.module.decode(z, library_n, batch))

    how = How(model._batch_codes(transform_batch), n_samples, batch_size=batch_size, silent=silent)
    return correlate(model, adata, indices, rates_of, model._gene_names, how, rna_size_factor, correlation_type)


def correlate(
    model: Model,
    adata: Data | None,
    indices: Any,
    rates_of: Callable[[Tensor, Tensor, Batch], Tensor],
    names: Sequence[str],
    how: How,
    size_factor: float,
    kind: str,
    transform: Callable[[np.ndarray], np.ndarray] | None = None,
) -> pd.DataFrame:
    """Correlation of the rates of cells that all have one library size, averaged over batches and draws: (f, f)."""
    check_choice(("spearman", "pearson"), correlation_type=kind)
    if not size_factor > 0:
        raise ValueError(f"rna_size_factor={size_factor!r}: a positive number is needed.")
    cells = find_cells(model, adata, indices)
    if len(cells.rows) < 2:
        raise ValueError(f"indices: {len(cells.rows)} cells were given; a correlation needs at least two.")

    def ask(batch: Batch, q: Posterior, z: Tensor) -> Parts:
        return {"rate": rates_of(z, torch.full_like(batch.total_n, float(size_factor)).log(), batch)}

    total_ff = np.zeros((len(names), len(names)))
    for code in how.codes:
        for _ in range(how.n_samples):
            rate_nf = ask_cells(model, cells, ask, replace(how, codes=[code], n_samples=1))["rate"]
            total_ff += correlation(rate_nf if transform is None else transform(rate_nf), kind)
            del rate_nf  # before the next, which is as large
    return pd.DataFrame(total_ff / (len(how.codes) * how.n_samples), index=names, columns=names)


def draw_rates(model: Model, batch: Batch) -> Rates:
    """Decode one draw from the posterior of each cell."""
    q = model.module.encode(batch)
    library_n = draw_library(model, batch, q)
    return model.module.decode(q.sample_z(), library_n, batch)


def denoised(rates: Rates) -> Tensor:
    """Draw the rates behind the counts, (n, g): Gamma for NB and ZINB; the mean of other likelihoods."""
    if rates.log_theta is None or rates.likelihood == "normal":
        return rates.mu_ng
    theta = rates.log_theta.exp().expand_as(rates.logit_ng)
    return torch._standard_gamma(theta) * (rates.mu_ng / theta)


def correlation(x_ng: np.ndarray, kind: str) -> np.ndarray:
    """Spearman's or Pearson's correlation of the columns, (g, g) float64.

    >>> correlation(np.array([[1.0, 3.0], [2.0, 2.0], [9.0, 1.0]]), "spearman")
    array([[ 1., -1.],
           [-1.,  1.]])
    """
    from scipy.stats import rankdata

    if kind == "spearman":
        x_ng = rankdata(x_ng, axis=0)
    centred_ng = x_ng - x_ng.mean(0, dtype=np.float64)
    with np.errstate(invalid="ignore"):  # a column without variance: 0 / 0
        centred_ng /= np.sqrt((centred_ng**2).sum(0))
    return centred_ng.T @ centred_ng
