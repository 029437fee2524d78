"""Differential abundance: in which samples are the cells of a region of latent space found.

A sample's cells have a density in latent space, the mixture of their posteriors; a cell that one sample explains better
than another lies where the first has more cells (Boyeau et al., Nature Methods 2025, doi:10.1038/s41592-025-02808-x).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch

from scvi_lite.analysis.importance import subset
from scvi_lite.analysis.latent import check_dof, log_density, posterior_parameters
from scvi_lite.data.columns import obs_column
from scvi_lite.errors import UnknownKeyError, check_whole

if TYPE_CHECKING:
    from scvi_lite._typing import AnnData, Model

KEY = "da_log_probs"


def differential_abundance(
    model: Model,
    adata: AnnData | None = None,
    adata_sub: AnnData | None = None,
    sample_key: str | None = None,
    batch_size: int | None = None,
    num_cells_posterior: int | None = None,
    dof: float | None = None,
) -> pd.DataFrame:
    """Log-density of each sample's cells at the posterior mean of each cell.

    The difference of two columns tells how much more abundant cells like this one are in one sample than in the other.

    Parameters
    ----------
    adata
        The cells of which the samples consist; the model's own by default.
    adata_sub
        The cells to look at; ``adata`` by default.
    sample_key
        Column of ``adata.obs`` that names the sample of each cell.
    batch_size
        Cells in a minibatch.
    num_cells_posterior
        Cells of each sample to use at most, drawn at random; all by default.
    dof
        Degrees of freedom of Student-t components; None for the normal posteriors themselves.

    Returns
    -------
    pandas.DataFrame
        Cells × samples, in nats. It is also written to ``obsm["da_log_probs"]`` of the cells that are looked at.

    Raises
    ------
    ValueError
        If a number is out of range.
    KeyError
        If ``sample_key`` is not given, or not a column.

    Examples
    --------
    >>> import scvi_lite
    >>> adata = scvi_lite.data.simulate(n_cells=200, n_genes=30)
    >>> scvi_lite.model.SCVI.setup_anndata(adata)
    >>> model = scvi_lite.model.SCVI(adata)
    >>> model.train(max_epochs=1, enable_progress_bar=False)
    >>> model.differential_abundance(sample_key="batch").columns.tolist()
    ['batch_0', 'batch_1']
    """
    if sample_key is None:
        raise UnknownKeyError("sample_key is needed: the column of adata.obs that names the sample of each cell.")
    if num_cells_posterior is not None:
        check_whole(num_cells_posterior=num_cells_posterior)
    check_dof(dof)
    adata = model._check(adata)
    written_to = adata if adata_sub is None else adata_sub
    samples = obs_column(adata, "sample_key", sample_key).astype("category").cat.remove_unused_categories().cat
    model._warn_if_untrained()
    loc_nk, scale_nk = posterior_parameters(model, adata, batch_size=batch_size)
    at_nk = loc_nk if written_to is adata else posterior_parameters(model, written_to, batch_size=batch_size)[0]
    z_nk = torch.from_numpy(at_nk)
    log_p: dict[str, np.ndarray] = {}
    for code, name in enumerate(samples.categories):
        rows = np.flatnonzero(samples.codes == code)
        rows = rows if num_cells_posterior is None else subset(rows, num_cells_posterior)
        log_p[name] = log_density(z_nk, loc_nk[rows], scale_nk[rows], dof).numpy()
    result = pd.DataFrame(log_p, index=written_to.obs_names, dtype=np.float32)
    written_to.obsm[KEY] = result
    return result
