"""How far two modalities disagree about where a cell is in latent space."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from scvi_lite.nn.normal import kl_normal
from scvi_lite.nn.vae import Posterior

WIDTHS = (0.25, 0.5, 1.0, 2.0, 4.0)  # of the kernels of the MMD, in the units of the prior of z


def jeffreys(one: Posterior, other: Posterior) -> Tensor:
    """Jeffreys divergence of two normals, KL in both directions, (n,)."""
    there = kl_normal(one.z_loc_nk, one.z_scale_nk, other.z_loc_nk, other.z_scale_nk**2)
    back = kl_normal(other.z_loc_nk, other.z_scale_nk, one.z_loc_nk, one.z_scale_nk**2)
    return (there + back).sum(-1)


def softened(q: Posterior) -> Posterior:
    """The normals with the roots of their standard deviations, which are wider where the data say much."""
    return Posterior(q.z_loc_nk, q.z_scale_nk.sqrt())


def mmd(x_nk: Tensor, y_nk: Tensor, weight_n: Tensor) -> Tensor:
    """Squared maximum mean discrepancy of weighted samples, a scalar (Gretton et al. 2012, JMLR 13).

    The mean over Gaussian kernels of several widths.

    >>> x = torch.zeros(4, 2)
    >>> mmd(x, x, torch.ones(4))
    tensor(0.)
    """
    weight_n = weight_n / weight_n.sum().clamp(min=1)

    def mean_kernel(a_nk: Tensor, b_nk: Tensor) -> Tensor:
        squared_nn = (a_nk**2).sum(1)[:, None] + (b_nk**2).sum(1) - 2 * a_nk @ b_nk.t()
        kernel_nn = sum(torch.exp(-squared_nn.clamp(min=0) / (2 * width**2)) for width in WIDTHS) / len(WIDTHS)
        return weight_n @ kernel_nn @ weight_n

    return mean_kernel(x_nk, x_nk) + mean_kernel(y_nk, y_nk) - 2 * mean_kernel(x_nk, y_nk)


#: By the name of the penalty, of two posteriors and of which cells have both modalities, (n,) or one for all. The MMD,
#: which is 2 at most whatever the number of cells, counts for each of them: else it would weigh nothing beside them.
DISTANCES: dict[str, Callable[[Posterior, Posterior, Tensor], Tensor]] = {
    "Jeffreys": lambda one, other, both_n: jeffreys(softened(one), softened(other)),
    "exact-Jeffreys": lambda one, other, both_n: jeffreys(one, other),
    "MMD": lambda one, other, both_n: (
        both_n.sum() * mmd(one.sample_z(), other.sample_z(), both_n.to(one.z_loc_nk.dtype))
    ),
}
