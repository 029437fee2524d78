"""One minibatch of cells: what every model sees."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix


@dataclass
class Counts:
    """The counts of ``n`` cells by ``g`` features, as the coordinates of the ``m`` non-zeros.

    Entries are sorted by cell and, within a cell, by feature. A dense matrix is made only where somebody asks for
    :attr:`x_ng`.
    """

    start: Tensor  #: (n + 1,) int64: the non-zeros of cell i are start[i]:start[i + 1]
    col_m: Tensor  #: (m,) int64: feature of each non-zero
    value_m: Tensor  #: (m,) float32
    n_features: int
    known_row_m: Tensor | None = None  #: see :attr:`row_m`

    @property
    def n_cells(self) -> int:
        return self.start.shape[0] - 1

    @property
    def row_m(self) -> Tensor:
        """Cell of each non-zero within the minibatch, (m,) int64; made when it is first asked for."""
        if self.known_row_m is None:
            self.known_row_m = rows_of(self.start, self.col_m)
        return self.known_row_m

    @property
    def x_ng(self) -> Tensor:
        """The counts as a dense (n, g) matrix."""
        plain = self.value_m.device.type == "cpu" and self.value_m.dtype in (torch.float32, torch.float64)
        if plain and not (self.value_m.requires_grad or torch.compiler.is_compiling()):
            from scvi_lite.data.kernels import fill_rows

            return fill_rows(self.start, self.col_m, self.value_m, self.n_features)
        x_ng = self.value_m.new_zeros(self.n_cells, self.n_features)
        x_ng[self.row_m, self.col_m] = self.value_m
        return x_ng

    def sum_rows(self, value_m: Tensor) -> Tensor:
        """Sum one number per non-zero over each cell: (m,) -> (n,)."""
        return value_m.new_zeros(self.n_cells).index_add(0, self.row_m, value_m)

    def map(self, function: Any) -> Counts:
        """Apply a function that maps zero to zero to the non-zeros."""
        return replace(self, value_m=function(self.value_m))

    def log1p(self) -> Counts:
        """log(1 + count) of each.

        By a plain logarithm, which takes less than half of the time of ``torch.log1p`` and keeps 1e-7: the further
        digits of counts near zero say nothing to a network.
        """
        return self.map(lambda x: (x + 1).log())

    def to(self, device: torch.device) -> Counts:
        """The same counts on a device."""
        if self.start.device == device:
            return self
        return Counts(self.start.to(device), self.col_m.to(device), self.value_m.to(device), self.n_features)

    def join(self, other: Counts) -> Counts:
        """The counts of these cells and of others behind them.

        >>> one = Counts.from_dense(torch.tensor([[0.0, 2.0]]))
        >>> one.join(one).x_ng
        tensor([[0., 2.],
                [0., 2.]])
        """
        return Counts(
            torch.cat([self.start, self.start[-1] + other.start[1:]]),
            torch.cat([self.col_m, other.col_m]),
            torch.cat([self.value_m, other.value_m]),
            self.n_features,
        )

    @classmethod
    def from_csr(cls, csr: csr_matrix) -> Counts:
        """The coordinates of a canonical SciPy matrix."""
        start, col_m = (torch.from_numpy(a.astype(np.int64, copy=False)) for a in (csr.indptr, csr.indices))
        return cls(start, col_m, torch.from_numpy(csr.data.astype(np.float32)), csr.shape[1])

    @classmethod
    def from_dense(cls, x_ng: Tensor) -> Counts:
        """The coordinates of a dense (n, g) matrix.

        >>> Counts.from_dense(torch.tensor([[0.0, 2.0], [0.0, 0.0]])).value_m
        tensor([2.])
        """
        row_m, col_m = x_ng.nonzero(as_tuple=True)
        start = torch.zeros(x_ng.shape[0] + 1, dtype=torch.int64, device=x_ng.device)
        torch.cumsum((x_ng != 0).sum(1), 0, out=start[1:])
        return cls(start, col_m, x_ng[row_m, col_m], x_ng.shape[1], row_m)


def rows_of(start: Tensor, col_m: Tensor) -> Tensor:
    """The row of each non-zero, (m,), from where rows start.

    >>> rows_of(torch.tensor([0, 2, 3]), torch.tensor([4, 5, 4]))
    tensor([0, 0, 1])
    """
    return torch.repeat_interleave(start.diff(), output_size=col_m.shape[0])


@dataclass
class Batch:
    """``n`` cells: counts and the cell-level tensors that the model's fields declare.

    A field that a model did not declare stays ``None``; one without columns has shape (n, 0).
    """

    x: Counts  #: counts
    row_n: Tensor  #: (n,) int64: position of the cell in the data set
    total_n: Tensor  #: (n,) total count of the cell
    batch_n: Tensor  #: (n,) int64: code of the batch
    label_n: Tensor  #: (n,) int64: code of the label
    cats_nc: Tensor  #: (n, c) int64: codes of the c categorical covariates
    conts_nd: Tensor  #: (n, d) float32: d continuous covariates
    size_factor_n: Tensor | None = None  #: (n,) given size factors
    depth_n: Tensor | None = None  #: (n,) given shares of accessible regions that are found
    qz_loc_nk: Tensor | None = None  #: (n, k) stored posterior mean of a minified data set
    qz_scale_nk: Tensor | None = None  #: (n, k) stored posterior standard deviation
    peaks: Counts | None = None  #: counts of chromatin regions
    smoothed: Counts | None = None  #: counts of the neighbourhood of a spot
    proteins_np: Tensor | None = None  #: (n, p) counts of proteins
    panel_n: Tensor | None = None  #: (n,) int64: code of the protein panel
    has_x_n: Tensor | None = None  #: (n,) bool: cells that have these counts, not a row of zeros for want of them;
    has_peaks_n: Tensor | None = None  #: None where all have
    has_proteins_n: Tensor | None = None
    fine_n: Tensor | None = None  #: (n,) int64: code of the fine label
    extra: Batch | None = None  #: further cells, here for their labels only
    teaches: bool = True  #: whether the labels of these cells are learned, or those of the extra ones alone

    @property
    def n_cells(self) -> int:
        return self.row_n.shape[0]

    @property
    def library_n(self) -> Tensor:
        """Log of the total counts; 0 for a cell without counts, whose library is unknown."""
        return torch.where(self.total_n > 0, self.total_n, 1.0).log()

    def to(self, device: torch.device) -> Batch:
        """The same cells on a device."""
        if self.row_n.device == device:
            return self
        moved: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        for name, value in moved.items():
            if isinstance(value, Tensor | Counts | Batch):
                moved[name] = value.to(device)
        return Batch(**moved)

    def join(self, other: Batch) -> Batch:
        """These cells and others behind them."""
        joined: dict[str, Any] = {"extra": None}
        for name in (f.name for f in fields(self)):
            ours, theirs = getattr(self, name), getattr(other, name)
            if isinstance(ours, Counts):
                joined[name] = ours.join(theirs)
            elif isinstance(ours, Tensor):
                joined[name] = torch.cat([ours, theirs])
        return replace(self, **joined)

    def with_batch(self, code: int | None) -> Batch:
        """The same cells, as if all came from batch ``code``; None for each cell's own."""
        return self if code is None else replace(self, batch_n=torch.full_like(self.batch_n, code))
