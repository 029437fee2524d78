"""Expression as the model sees it: denoised, as if from another batch, or drawn anew (Lopez et al. 2018).

doi:10.1038/s41592-018-0229-2
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from scvi_lite.analysis.cells import check_samples, chosen, find_cells, frame, mean_over, minibatches, n_draws
from scvi_lite.analysis.importance import draw_latent
from scvi_lite.analysis.inputs import gene_positions, minibatch_size
from scvi_lite.analysis.output import Out, writing
from scvi_lite.errors import check_choice, unknown

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

    from scvi_lite.data.batch import Batch
    from scvi_lite.model.base import Model
    from scvi_lite.nn.rates import Rates
    from scvi_lite.nn.vae import Posterior


def get_normalized_expression(
    model: Model,
    adata: AnnData | None = None,
    indices: Any = None,
    transform_batch: Any = None,
    gene_list: Sequence[str] | None = None,
    library_size: float | str = 1,
    n_samples: int = 1,
    n_samples_overall: int | None = None,
    weights: str | None = None,
    batch_size: int | None = None,
    return_mean: bool = True,
    return_numpy: bool | None = None,
    silent: bool = True,
    importance_weighting_kwargs: Mapping[str, Any] | None = None,
    *,
    out: Out = None,
) -> pd.DataFrame | np.ndarray | Any:
    """Denoised expression: what the decoder expects of each gene, for cells drawn from their posterior.

    Parameters
    ----------
    adata
        Cells to look at; the model's own by default.
    indices
        Row numbers, in any order, or a mask; all cells by default.
    transform_batch
        Decode as if from this batch: a name, a code, or a list to average over. By default each cell's own.
    gene_list
        Names of genes, which are given in this order; all by default.
    library_size
        Scale to this total; 1 gives proportions. ``"latent"`` is the library size of each cell.
    n_samples
        Draws from the posterior of each cell.
    n_samples_overall
        Draws from the cells as a whole, which are drawn at random with replacement. Instead of ``n_samples``.
    weights
        ``"uniform"``, or ``"importance"`` to weight the draws by how well they explain all the cells; this needs
        ``n_samples_overall``.
    batch_size
        Cells in a minibatch.
    return_mean
        Average over ``n_samples``.
    return_numpy
        An array instead of a data frame. Results with a dimension of samples are arrays anyway.
    silent
        Show no progress.
    importance_weighting_kwargs
        Options of ``get_importance_weights``: ``max_cells``, ``truncation``, ``n_mc_samples``,
        ``n_mc_samples_per_pass``.
    out
        Where to put an answer that memory cannot hold, a minibatch at a time: a path that ends in ``.npy`` or
        ``.zarr``, which is new and takes its name when it is whole, or an array of the right shape (of NumPy, h5py,
        zarr). That array is returned, and names neither cells nor genes; a file is opened for reading.

    Returns
    -------
    pandas.DataFrame or numpy.ndarray
        float32: (n, g); (s, n, g) with ``return_mean=False`` and more than one sample; (s, g) with
        ``n_samples_overall``.

    Raises
    ------
    ValueError
        If a gene or a batch is unknown (the nearest is named), a number is out of range, or ``out`` does not fit.
    IndexError
        If ``indices`` has rows that do not exist.

    Examples
    --------
    >>> import scvi_lite
    >>> adata = scvi_lite.data.synthetic_iid(batch_size=50, n_genes=20)
    >>> scvi_lite.model.SCVI.setup_anndata(adata, batch_key="batch")
    >>> model = scvi_lite.model.SCVI(adata)
    >>> model.train(max_epochs=1, enable_progress_bar=False)
    >>> model.get_normalized_expression(gene_list=["gene_7", "gene_1"], library_size=1e4).columns.tolist()
    ['gene_7', 'gene_1']
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     on_disk = model.get_normalized_expression(out=f"{folder}/expression.npy")
    >>> type(on_disk), on_disk.shape
    (<class 'numpy.memmap'>, (100, 20))
    """
    genes = gene_positions(model, gene_list)
    codes = model._batch_codes(transform_batch)
    check_library_size(library_size)
    if weights is not None:
        check_choice(("uniform", "importance"), weights=weights)
    check_samples(n_samples, n_samples_overall)
    if weights == "importance" and n_samples_overall is None:
        raise ValueError("weights='importance' weights draws from many cells: give n_samples_overall, e.g. 5000.")
    adata, rows = find_cells(model, adata, indices)
    n_genes = model.module.config.n_genes
    in_place = model.module.decodes_in_place and out is None and len(codes) == n_samples == 1
    size = minibatch_size(batch_size, n_samples * n_genes, light=in_place)
    z_sk = None
    if n_samples_overall is not None:
        rows, z_sk = draw_latent(
            model, adata, rows, n_samples_overall, weights or "uniform", importance_weighting_kwargs, batch_size
        )
    with_counts = z_sk is None or library_size == "latent"
    batches = minibatches(model, adata, rows, size, silent or z_sk is not None, with_counts)
    average = return_mean and n_samples > 1
    axis = int(n_samples > 1 and not average)
    shape = (*[n_samples] * axis, len(rows), n_genes if genes is None else len(genes))
    with writing(out, shape, size, axis) as answer:
        for batch, z, library_n in _places(model, batches, z_sk, n_samples, library_size):
            if len(codes) == 1 and z.ndim == 2:
                one = batch.with_batch(codes[0])
                answer.compute(batch.n_cells, partial(expected, model, z, library_n, one, genes))
            else:
                mean = mean_over(expected(model, z, library_n, batch.with_batch(code), genes) for code in codes)
                answer.put(mean.mean(0) if average else mean)
    plain = z_sk is not None or return_numpy or out is not None
    return frame(answer.array, adata.obs_names[rows], model._gene_names, genes, plain)


def _places(
    model: Model,
    batches: Iterator[tuple[slice, Batch]],
    z_sk: Tensor | None,
    n_samples: int,
    library_size: float | str,
) -> Iterator[tuple[Batch, Tensor, Tensor | None]]:
    """Cells, where in latent space they are decoded (at draws from posteriors, or as given), and log libraries."""
    for at, batch in batches:
        q = model.module.encode(batch) if z_sk is None else None
        z = z_sk[at].to(model.device) if q is None else q.sample_z(n_samples if n_samples > 1 else None)
        yield batch, z, log_library(model, batch, q, library_size, n_draws(z))


def expected(
    model: Model,
    z: Tensor,
    log_library: Tensor | None,
    batch: Batch,
    genes: np.ndarray | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Expected expression (..., n, g) of a minibatch at latent ``z``; proportions if there is no library.

    Written to ``out`` if that is given.
    """
    into = out if genes is None and z.device.type == "cpu" else None
    value = chosen(model.module.expression(z, batch, into), genes)
    if log_library is not None:
        value = value.mul_(log_library.exp().unsqueeze(-1))
    return value if out is None or into is not None else out.copy_(value)


def select_genes(rates: Rates, genes: np.ndarray | None) -> Rates:
    """The rates of some of the genes. What the others take of the library is taken off it."""
    if genes is None:
        return rates
    at = torch.from_numpy(genes).to(rates.logit_ng.device)
    logit_ng, library_n = rates.logit_ng[..., at], rates.library_n
    if rates.proportions:
        library_n = library_n + logit_ng.logsumexp(-1) - rates.logit_ng.logsumexp(-1)
    theta = None if rates.log_theta is None else rates.log_theta[..., at]
    dropout = None if rates.dropout_ng is None else rates.dropout_ng[..., at]
    return replace(rates, logit_ng=logit_ng, library_n=library_n, log_theta=theta, dropout_ng=dropout)


def log_library(
    model: Model, batch: Batch, q: Posterior | None, library_size: float | str, n_samples: int | None = None
) -> Tensor | None:
    """Log of the library to decode with, (n,) or (s, n); None stands for a library of one."""
    if library_size == "latent":
        return draw_library(model, batch, q or model.module.encode(batch), n_samples)
    return None if library_size == 1 else torch.full_like(batch.total_n, math.log(float(library_size)))


def draw_library(model: Model, batch: Batch, q: Posterior, n_samples: int | None = None) -> Tensor:
    """Log of each cell's library: a draw, (n,) or (s, n), where it is latent; else the one that it was given, (n,)."""
    return model.module.library(batch, q) if q.library_scale_n is None else q.sample_library(n_samples)


def check_library_size(library_size: float | str) -> None:
    """Refuse what is neither a positive number nor ``"latent"``."""
    if isinstance(library_size, str) and library_size != "latent":
        raise ValueError(unknown("library_size", library_size, ["latent"], "a positive number or 'latent'"))
    if not isinstance(library_size, str) and not (isinstance(library_size, Real) and 0 < library_size < math.inf):
        raise ValueError(f"library_size={library_size!r}: a positive number, or 'latent', is needed.")
