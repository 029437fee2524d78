"""Networks of chromatin accessibility (Ashuach et al. 2022, doi:10.1016/j.crmeth.2022.100182)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import leaky_relu

from scvi_lite.data.batch import Counts
from scvi_lite.distributions.bernoulli import bernoulli
from scvi_lite.nn.layers import Hidden

if TYPE_CHECKING:
    from torch.distributions import Bernoulli

    from scvi_lite.nn.vae import VAE


@dataclass
class Accessibility:
    """What a decoder says about regions, with optional leading sample dimensions.

    A region is found open with probability S(logit) · S(depth) · S(factor), S the sigmoid.
    """

    logit_nr: Tensor  #: (..., n, r) logit of the accessibility
    depth_n: Tensor | None = None  #: (..., n) logit of the depth of each cell; None for a depth of one
    factor_r: Tensor | None = None  #: (r,) logit of the factor of each region; None for a factor of one

    @property
    def p_nr(self) -> Tensor:
        """Probability that a region is accessible, whether it is found or not."""
        return self.logit_nr.sigmoid()

    @property
    def found_nr(self) -> Tensor:
        """Probability that a region is found open, at the depth of the cell."""
        p_nr = self.p_nr if self.depth_n is None else self.p_nr * self.depth_n.sigmoid().unsqueeze(-1)
        return p_nr if self.factor_r is None else p_nr * self.factor_r.sigmoid()

    def log_likelihood(self, counts: Counts) -> Tensor:
        """Log-probability of each cell's open and closed regions: (..., n)."""
        if self.logit_nr.dim() == 2:
            return bernoulli(counts, self.logit_nr, self.depth_n, self.factor_r)
        depth = [None] * len(self.logit_nr) if self.depth_n is None else self.depth_n.expand(self.logit_nr.shape[:-1])
        return torch.stack(
            [bernoulli(counts, logit_nr, depth[i], self.factor_r) for i, logit_nr in enumerate(self.logit_nr)]
        )

    def distribution(self) -> Bernoulli:
        """The likelihood as a ``torch.distributions`` object."""
        from torch.distributions import Bernoulli

        return Bernoulli(probs=self.found_nr)


class Head(nn.Module):
    """Hidden layers and a linear map: logits of accessibility, or one number for each cell."""

    def __init__(self, hidden: Hidden, n_hidden: int, n_out: int):
        super().__init__()
        self.hidden, self.output = hidden, nn.Linear(n_hidden, n_out)

    def forward(self, x: Tensor | Counts, codes: Sequence[Tensor] = (), dense_nd: Tensor | None = None) -> Tensor:
        return self.output(self.hidden(x, codes, dense_nd))


def count_encoder(module: VAE, n_features: int) -> Head:
    """From counts to one number for a cell; layer norm, and covariates at the first layer, whatever others have."""
    c, reads = module.config, module.config.encode_covariates
    n_in, n_cats = n_features + (module.n_dense if reads else 0), module.n_cats if reads else ()
    hidden = Hidden(
        n_in, c.n_hidden, c.n_layers, n_cats,
        deeply_inject=False, batch_norm=False, layer_norm=True, dropout_rate=0.0, activation=leaky_relu,
    )  # fmt: skip
    return Head(hidden, c.n_hidden, 1)


def default_sizes(n_hidden: int | None, n_latent: int | None, n_features: int) -> tuple[int, int]:
    """Hidden units and latent dimensions, where not given the square roots of what they are computed from.

    >>> default_sizes(None, None, 10_000), default_sizes(64, None, 10_000)
    ((100, 10), (64, 8))
    """
    n_hidden = max(1, isqrt(n_features)) if n_hidden is None else n_hidden
    return n_hidden, max(1, isqrt(max(0, n_hidden))) if n_latent is None and isinstance(n_hidden, int) else n_latent
