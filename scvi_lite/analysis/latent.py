"""Where cells are in latent space, and how they spread there (Lopez et al. 2018, doi:10.1038/s41592-018-0229-2)."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from scvi_lite.analysis.inputs import NUMBERS_AT_ONCE, minibatch_size, to_numpy
from scvi_lite.errors import UnknownKeyError, check_whole

if TYPE_CHECKING:
    from anndata import AnnData
    from torch.distributions import MixtureSameFamily

    from scvi_lite.data.batch import Batch
    from scvi_lite.model.base import Model
    from scvi_lite.nn.vae import Posterior


def get_latent_representation(
    model: Model,
    adata: AnnData | None = None,
    indices: Any = None,
    give_mean: bool = True,
    mc_samples: int = 5000,
    batch_size: int | None = None,
    return_dist: bool = False,
) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
    """Position of each cell in latent space.

    Parameters
    ----------
    adata
        Cells to look at; the model's own by default.
    indices
        Row numbers, in any order, or a mask; all cells by default.
    give_mean
        The posterior mean; else one draw from the posterior.
    mc_samples
        Draws to average for the mean of a logistic normal (``latent_distribution="ln"``), which has no closed form.
    batch_size
        Cells in a minibatch.
    return_dist
        Give the parameters of the posterior instead.

    Returns
    -------
    numpy.ndarray or tuple
        (n, k) float32; with ``return_dist`` the mean and the **variance** of the normal posterior, (n, k) each, before
        the softmax of a logistic normal.

    Raises
    ------
    IndexError
        If ``indices`` has rows that do not exist.
    ValueError
        If ``adata`` does not fit the model, or ``mc_samples`` is below 1.

    Examples
    --------
    >>> import scvi_lite
    >>> adata = scvi_lite.data.synthetic_iid(batch_size=50, n_genes=20)
    >>> scvi_lite.model.SCVI.setup_anndata(adata, batch_key="batch")
    >>> model = scvi_lite.model.SCVI(adata, n_latent=5)
    >>> model.train(max_epochs=1, enable_progress_bar=False)
    >>> model.get_latent_representation(indices=[3, 1]).shape
    (2, 5)
    """
    return positions(model, model.module.encode, adata, indices, give_mean, mc_samples, batch_size, return_dist)


def positions(
    model: Model,
    encode: Callable[[Batch], Posterior],
    adata: AnnData | None,
    indices: Any,
    give_mean: bool,
    mc_samples: int,
    batch_size: int | None,
    return_dist: bool,
) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
    """What ``get_latent_representation`` gives, of any posterior of a minibatch."""
    model._warn_if_untrained()
    check_whole(mc_samples=mc_samples)
    c = model.module.config
    on_simplex = c.latent_distribution == "ln"
    draws = mc_samples * c.n_latent if on_simplex and give_mean and not return_dist else 0
    batch_size = minibatch_size(batch_size, draws or c.n_inputs, light=not draws)
    if return_dist:
        posteriors = [encode(batch) for batch in model._minibatches(adata, indices, batch_size)]
        return to_numpy([q.z_loc_nk for q in posteriors]), to_numpy([q.z_scale_nk for q in posteriors]) ** 2
    z: list[Tensor] = []
    for batch in model._minibatches(adata, indices, batch_size):
        q = encode(batch)
        if not give_mean:
            z.append(model.module.to_latent(q.sample_z()))
        elif on_simplex:
            z.append(model.module.to_latent(q.sample_z(mc_samples)).mean(0))
        else:
            z.append(q.z_loc_nk)
    return to_numpy(z)


def posterior_parameters(
    model: Model, adata: AnnData | None = None, indices: Any = None, batch_size: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each cell's normal posterior, (n, k) each."""
    posteriors = [model.module.encode(batch) for batch in model._minibatches(adata, indices, batch_size)]
    return to_numpy([q.z_loc_nk for q in posteriors]), to_numpy([q.z_scale_nk for q in posteriors])


def get_latent_library_size(
    model: Model,
    adata: AnnData | None = None,
    indices: Any = None,
    give_mean: bool = True,
    batch_size: int | None = None,
) -> np.ndarray:
    """Library size of each cell: the latent one where the model infers it, else the one it was given.

    Parameters
    ----------
    adata, indices, batch_size
        As in ``get_latent_representation``.
    give_mean
        The mean of the log-normal posterior, exp(loc + scale²/2); else one draw. An observed library or a size factor
        is given as it is.

    Returns
    -------
    numpy.ndarray
        (n, 1) float32, in counts.
    """
    model._warn_if_untrained()
    sizes: list[Tensor] = []
    for batch in model._minibatches(adata, indices, batch_size):
        q = model.module.encode(batch)
        if q.library_loc_n is None or q.library_scale_n is None:
            log_size_n = model.module.library(batch, q)
        else:
            log_size_n = q.library_loc_n + q.library_scale_n**2 / 2 if give_mean else q.sample_library()
        sizes.append(log_size_n.exp()[:, None])
    return to_numpy(sizes)


def get_batch_representation(
    model: Model, adata: AnnData | None = None, indices: Any = None, batch_size: int | None = None
) -> np.ndarray:
    """The learned embedding of each cell's batch, (n, dimensions of the embedding).

    Raises
    ------
    KeyError
        If the model does not embed batches.
    """
    if model.module.config.batch_representation != "embedding":
        raise UnknownKeyError(
            "This model codes batches as one-hot vectors and has no representation of them. "
            f"Make one that has: {type(model).__name__}(adata, batch_representation='embedding')."
        )
    model._warn_if_untrained()
    return to_numpy([model.module.batch_embedding(b.batch_n) for b in model._minibatches(adata, indices, batch_size)])


def get_aggregated_posterior(
    model: Model,
    adata: AnnData | None = None,
    indices: Any = None,
    batch_size: int | None = None,
    dof: float | None = 3.0,
) -> MixtureSameFamily:
    """The mixture of the posteriors of cells: the density of a population in latent space.

    Parameters
    ----------
    adata, indices, batch_size
        As in ``get_latent_representation``.
    dof
        Degrees of freedom of Student-t components, whose heavy tails make log-densities of far cells less extreme;
        None for the normal posteriors themselves.

    Returns
    -------
    torch.distributions.MixtureSameFamily
        Over latent space, with one component a cell, all of equal weight. On the CPU.

    Raises
    ------
    ValueError
        If ``dof`` is not positive, or there are no cells.
    """
    model._warn_if_untrained()
    check_dof(dof)
    return mixture(*posterior_parameters(model, adata, indices, batch_size), dof)


def check_dof(dof: float | None) -> None:
    """Refuse degrees of freedom that are neither positive nor None."""
    if dof is not None and not (isinstance(dof, Real) and dof > 0):
        raise ValueError(f"dof={dof!r}: a positive number, or None for normal components, is needed.")


def mixture(loc_nk: np.ndarray, scale_nk: np.ndarray, dof: float | None) -> MixtureSameFamily:
    """The equal mixture of normal or Student-t components."""
    from torch import distributions as d

    loc, scale = torch.from_numpy(loc_nk), torch.from_numpy(scale_nk)
    components = d.Normal(loc, scale) if dof is None else d.StudentT(dof, loc, scale)
    return d.MixtureSameFamily(d.Categorical(logits=torch.zeros(len(loc))), d.Independent(components, 1))


def log_density(z_mk: Tensor, loc_nk: np.ndarray, scale_nk: np.ndarray, dof: float | None = None) -> Tensor:
    """Log-density of :func:`mixture` at ``z_mk``, a few positions at a time: (m,) float64.

    >>> loc, scale = np.zeros((3, 2)), np.ones((3, 2))
    >>> z = torch.ones(1, 2)
    >>> torch.allclose(log_density(z, loc, scale), mixture(loc, scale, None).log_prob(z))
    True
    """
    loc, scale = torch.from_numpy(loc_nk).double(), torch.from_numpy(scale_nk).double()
    if dof is not None:
        components = mixture(loc.numpy(), scale.numpy(), dof)
        parts = z_mk.double().split(max(1, NUMBERS_AT_ONCE // loc.numel()))
        return torch.cat([components.log_prob(part) for part in parts])
    # (z - loc)² / scale², multiplied out, is two matrix products: no array of (m, n, k) is made.
    precision = scale**-2
    constant_n = -0.5 * (loc**2 * precision + 2 * scale.log() + math.log(2 * math.pi)).sum(1) - math.log(len(loc))
    log_p = [
        (part @ (loc * precision).T - 0.5 * part**2 @ precision.T + constant_n).logsumexp(1)
        for part in z_mk.double().split(max(1, NUMBERS_AT_ONCE // len(loc)))
    ]
    return torch.cat(log_p)
