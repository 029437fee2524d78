"""What a model of cells within their types says: mixtures for each type, finer types, and which it can tell apart."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from scvi_lite.analysis import latent
from scvi_lite.analysis.cells import find_cells
from scvi_lite.analysis.inputs import to_numpy
from scvi_lite.errors import StateError, check_whole

if TYPE_CHECKING:
    from scvi_lite._typing import AnnData, Batch, CondSCVI, Posterior


@torch.inference_mode()
def get_vamp_prior(model: CondSCVI, adata: AnnData | None = None, p: int = 10) -> dict[str, np.ndarray]:
    """For each cell type a mixture of normals over latent space, which DestVI takes as prior.

    It is the prior of the model where that is a mixture. Else the cells of a type are put into ``p`` clusters by
    their posterior means (k-means), and each makes a component: its centre; the mean of the posterior variances
    plus the variance of the means; and its share of the cells. A type with fewer cells than ``p`` has components
    of weight zero, at the standard normal.

    Parameters
    ----------
    adata
        Cells to make the mixture of; the model's own by default.
    p
        Components, where the prior of the model is no mixture.

    Returns
    -------
    dict
        ``"mean_vprior"`` and ``"var_vprior"`` (l, p, k), ``"weights_vprior"`` (l, p), float32.

    Raises
    ------
    ValueError
        If ``p`` is below 1.

    Examples
    --------
    >>> import scvi_lite
    >>> adata = scvi_lite.data.synthetic_iid(batch_size=50, n_genes=20)
    >>> from scvi_lite.model import CondSCVI
    >>> CondSCVI.setup_anndata(adata, labels_key="labels")
    >>> model = CondSCVI(adata)
    >>> model.train(max_epochs=1, enable_progress_bar=False)
    >>> model.get_vamp_prior(p=4)["mean_vprior"].shape
    (3, 4, 5)
    """
    check_whole(p=p)
    model._warn_if_untrained()
    model.module.eval()
    if (prior := model.module.prior()) is not None:
        parts = (prior.loc_lpk, prior.scale_lpk**2, prior.log_weight_lp.exp())
        mean_lpk, var_lpk, weight_lp = (part.cpu().numpy() for part in parts)
    else:
        adata = model._check(adata)
        loc_nk, scale_nk = latent.posterior_parameters(model, adata)
        label_n = model.registry.read(adata, "label_n")
        clusters = [
            cluster(loc_nk[label_n == label], scale_nk[label_n == label] ** 2, p)
            for label in range(model.registry.n_labels)
        ]
        mean_lpk, var_lpk, weight_lp = (np.stack(part) for part in zip(*clusters))
    return {"mean_vprior": mean_lpk, "var_vprior": var_lpk, "weights_vprior": weight_lp}


def predict(
    model: CondSCVI,
    adata: AnnData | None = None,
    indices: Any = None,
    soft: bool = False,
    batch_size: int | None = None,
    use_posterior_mean: bool = True,
) -> np.ndarray | pd.DataFrame:
    """The fine label of each cell, by its place in the latent space of its coarse label.

    Parameters
    ----------
    adata
        Cells to look at; the model's own by default.
    indices
        Row numbers, in any order, or a mask; all cells by default.
    soft
        Give the probability of each fine label instead.
    batch_size
        Cells in a minibatch.
    use_posterior_mean
        Look at the mean of each cell's posterior; else at a draw.

    Returns
    -------
    numpy.ndarray or pandas.DataFrame
        Names (n,), or cells × fine labels.

    Raises
    ------
    RuntimeError
        If the model was made without fine labels.
    """
    if not model.fine_labels:
        raise StateError(
            "This model knows no fine labels. Give them at setup: CondSCVI.setup_anndata(adata, labels_key=..., "
            "fine_labels_key=...), and train a new model."
        )
    adata, rows = find_cells(model, adata, indices)
    probability: list[Tensor] = []
    for batch in model._minibatches(adata, rows, batch_size):
        q = model.module.encode(batch)
        z_nk = q.z_loc_nk if use_posterior_mean else q.sample_z()
        probability.append(model.module.classifier(z_nk, batch.label_n).softmax(-1))
    prob_nf = to_numpy(probability)
    names = np.asarray(model.fine_labels)
    return pd.DataFrame(prob_nf, adata.obs_names[rows], names) if soft else names[prob_nf.argmax(1)]


def confusion_coarse_celltypes(
    model: CondSCVI, adata: AnnData | None = None, indices: Any = None, batch_size: int | None = None
) -> pd.DataFrame:
    """Which cell types the model can tell apart: how well it explains cells of one type as cells of another.

    Each cell is explained as each type; the evidence lower bounds, at the posterior mean and with equal prior
    weights, make probabilities of the types. The result is their mean over the cells of a type. Types that share a
    row are hard to tell apart in spots, too: give them one label, and fine labels within it.

    Parameters
    ----------
    adata, indices, batch_size
        As in :meth:`predict`.

    Returns
    -------
    pandas.DataFrame
        Types of the cells × types they are explained as; rows sum to 1. A row is NaN where there are no cells.
    """
    model._warn_if_untrained()
    n_labels = model.registry.n_labels
    sum_ll, count_l = torch.zeros(n_labels, n_labels, dtype=torch.float64), torch.zeros(n_labels)
    for batch in model._minibatches(adata, indices, batch_size):
        elbo_nl = torch.stack([elbo_as(model, batch, label) for label in range(n_labels)], dim=1)
        label_n = batch.label_n.cpu()
        sum_ll.index_add_(0, label_n, elbo_nl.double().softmax(1).cpu())
        count_l += torch.bincount(label_n, minlength=n_labels)
    names = pd.Index(model.registry.categories("label_n"))
    return pd.DataFrame((sum_ll / count_l[:, None]).numpy(), names.rename("cells of"), names.rename("explained as"))


def elbo_as(model: CondSCVI, batch: Batch, label: int) -> Tensor:
    """Evidence lower bound of cells as if all were of one label, at the posterior mean: (n,)."""
    batch = replace(batch, label_n=torch.full_like(batch.label_n, label))
    q: Posterior = model.module.encode(batch)
    rates = model.module.decode(q.z_loc_nk, model.module.library(batch, q), batch)
    return rates.log_likelihood(batch.x) - model.module.kl_z(q, batch, q.z_loc_nk)


def cluster(loc_nk: np.ndarray, var_nk: np.ndarray, p: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean (p, k), variance (p, k) and weight (p,) of k-means clusters of normals; surplus ones have weight zero."""
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    n, k = loc_nk.shape
    mean_pk, var_pk, weight_p = (np.zeros(s, np.float32) for s in ((p, k), (p, k), p))
    var_pk[:] = 1
    if n == 0:
        return mean_pk, var_pk, weight_p + 1 / p
    n_clusters = min(p, len(np.unique(loc_nk, axis=0)))
    with threadpool_limits(1):  # many small problems
        seed = int(torch.randint(1 << 31, ()))
        member_n = KMeans(n_clusters, n_init=10, random_state=seed).fit_predict(loc_nk.astype(np.float64))
    for i in range(n_clusters):
        own = member_n == i
        mean_pk[i], weight_p[i] = loc_nk[own].mean(0), own.mean()
        var_pk[i] = var_nk[own].mean(0) + loc_nk[own].var(0)
    return mean_pk, var_pk, weight_p
