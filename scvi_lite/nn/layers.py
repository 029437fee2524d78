"""Layers that know covariates: a linear map, and the hidden block of scVI's networks (Lopez et al. 2018)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scvi_lite.data.batch import Counts
from scvi_lite.distributions.sparse import sparse_linear

Activation = Callable[[Tensor], Tensor]


class CovariateLinear(nn.Module):
    """A linear map of dense inputs and of categorical covariates.

    The same function as a linear layer over the inputs joined with one-hot columns of each covariate, but
    the columns of a covariate are a table of their own, and a row of it is looked up instead of multiplied.

    Parameters
    ----------
    n_in, n_out
        Dense inputs and outputs.
    n_cats
        Number of categories of each covariate.
    bias
        Whether to add a constant.

    Examples
    --------
    >>> layer = CovariateLinear(4, 3, n_cats=[2])
    >>> layer(torch.ones(5, 4), [torch.zeros(5, dtype=torch.int64)]).shape
    torch.Size([5, 3])
    """

    def __init__(self, n_in: int, n_out: int, n_cats: Sequence[int] = (), bias: bool = True):
        super().__init__()
        bound = 1 / math.sqrt(n_in + sum(n_cats))
        # Stored by input, so that the weights of the genes a cell expresses lie together: see sparse_linear.
        self.weight = nn.Parameter(torch.empty(n_in, n_out).uniform_(-bound, bound).t())
        self.tables = nn.ParameterList([torch.empty(n, n_out).uniform_(-bound, bound) for n in n_cats])
        self.bias = nn.Parameter(torch.empty(n_out).uniform_(-bound, bound)) if bias else None

    def forward(self, x: Tensor | Counts, codes: Sequence[Tensor] = (), dense_nd: Tensor | None = None) -> Tensor:
        """Map ``x`` (dense, or the counts of a minibatch), further dense inputs and the covariates' codes."""
        if isinstance(x, Counts):
            if dense_nd is None:
                y = sparse_linear(x, self.weight)
            else:  # split as stored, so that the gradients are joined in one copy
                weight_gh, weight_dh = self.weight.t().split([x.n_features, dense_nd.shape[-1]])
                y = sparse_linear(x, weight_gh.t()) + dense_nd @ weight_dh
            y = y if self.bias is None else y + self.bias
        else:
            if dense_nd is not None:
                x = torch.cat([x, dense_nd.expand(*x.shape[:-1], -1)], dim=-1)
            y = F.linear(x, self.weight, self.bias)
        for code_n, table in zip(codes, self.tables, strict=True):
            y = y + F.embedding(code_n, table)
        return y


class Block(nn.Module):
    """Linear → batch norm → layer norm → activation → dropout, the norms where switched on."""

    def __init__(
        self,
        n_in: int,
        n_out: int,
        n_cats: Sequence[int],
        batch_norm: bool,
        layer_norm: bool,
        dropout_rate: float,
        activation: Activation = F.relu,
    ):
        super().__init__()
        self.linear = CovariateLinear(n_in, n_out, n_cats)
        self.batch_norm = nn.BatchNorm1d(n_out, momentum=0.01, eps=0.001) if batch_norm else None
        self.layer_norm = nn.LayerNorm(n_out, elementwise_affine=False) if layer_norm else None
        self.dropout_rate = dropout_rate
        self.activation = activation

    def forward(self, x: Tensor | Counts, codes: Sequence[Tensor] = (), dense_nd: Tensor | None = None) -> Tensor:
        h = self.linear(x, codes, dense_nd)
        if self.batch_norm is not None:
            h = self.batch_norm(h.flatten(0, -2)).view(h.shape)
        if self.layer_norm is not None:
            h = self.layer_norm(h)
        return (
            dropout(self.activation(h), self.dropout_rate)
            if self.training and self.dropout_rate
            else self.activation(h)
        )


def dropout(h: Tensor, rate: float) -> Tensor:
    """Leave out a share of the hidden units of each cell (..., n, h): the same ones for all leading dimensions."""
    shape = h.shape[-2:]
    if h.device.type != "cpu" or torch.compiler.is_compiling():
        return h * F.dropout(h.new_ones(shape), rate)
    from scvi_lite.nn.dropout_kernels import kept_units  # PyTorch takes longer to draw its numbers than for the layer

    return h * kept_units(shape[0], shape[1], rate).to(h.dtype)


def rows(table: Tensor, code: Tensor) -> Tensor:
    """The rows (..., *) of a table (l, *) that codes (...) name, as ``table[code]``, whose way back is slower.

    >>> rows(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([1, 1]))
    tensor([[3., 4.],
            [3., 4.]])
    """
    return F.embedding(code, table.flatten(1)).view(*code.shape, *table.shape[1:])


class Hidden(nn.Module):
    """A stack of blocks; covariates enter the first, or, deeply injected, every one.

    Parameters
    ----------
    n_in
        Dense inputs of the first block, continuous covariates and embeddings included.
    n_hidden, n_layers
        Width and number of blocks.
    n_cats
        Number of categories of each categorical covariate.
    activation
        Of each block.
    """

    def __init__(
        self,
        n_in: int,
        n_hidden: int,
        n_layers: int,
        n_cats: Sequence[int] = (),
        *,
        deeply_inject: bool = True,
        batch_norm: bool = True,
        layer_norm: bool = False,
        dropout_rate: float = 0.1,
        activation: Activation = F.relu,
    ):
        super().__init__()
        self.deeply_inject = deeply_inject
        self.blocks = nn.ModuleList(
            Block(
                n_in if i == 0 else n_hidden,
                n_hidden,
                n_cats if i == 0 or deeply_inject else (),
                batch_norm,
                layer_norm,
                dropout_rate,
                activation,
            )
            for i in range(n_layers)
        )

    def forward(self, x: Tensor | Counts, codes: Sequence[Tensor] = (), dense_nd: Tensor | None = None) -> Tensor:
        first, *others = self.blocks
        h = first(x, codes, dense_nd)
        for block in others:
            h = block(h, codes if self.deeply_inject else ())
        return h


VARIANCE: dict[str, Activation] = {"exp": torch.exp, "softplus": F.softplus}


class Encoder(nn.Module):
    """Mean and standard deviation of a normal posterior.

    ``variance = f(head) + floor``, with ``f`` the exponential unless asked otherwise.
    """

    def __init__(self, hidden: Hidden, n_hidden: int, n_out: int, var_activation: str = "exp", floor: float = 1e-4):
        super().__init__()
        self.hidden = hidden
        self.loc = nn.Linear(n_hidden, n_out)
        self.log_var = nn.Linear(n_hidden, n_out)
        self.variance, self.floor = VARIANCE[var_activation], floor

    def forward(
        self, x: Tensor | Counts, codes: Sequence[Tensor] = (), dense_nd: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        h = self.hidden(x, codes, dense_nd)
        return self.loc(h), (self.variance(self.log_var(h)) + self.floor).sqrt()
