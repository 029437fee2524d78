"""Counts of a minibatch whose data set lies on a GPU: shapes do not depend on the number of non-zeros there."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

from torch import Tensor

from scvi_lite.data.batch import Counts


class ResidentCounts(Counts):
    """The same counts, made when somebody asks: a dense matrix by one kernel, coordinates by several.

    Parameters
    ----------
    n_cells, n_features
        Their shape.
    dense
        Makes the (n, g) matrix.
    coordinates
        Makes the counts by their coordinates, for which their number must be known: the host waits for the device.
    """

    def __init__(
        self, n_cells: int, n_features: int, dense: Callable[[], Tensor], coordinates: Callable[[], Counts]
    ) -> None:
        self._n_cells, self.n_features, self.known_row_m = n_cells, n_features, None
        self._dense, self._coordinates = dense, coordinates

    @property
    def n_cells(self) -> int:
        return self._n_cells

    @property
    def x_ng(self) -> Tensor:
        """The counts as a dense (n, g) matrix, which is kept."""
        return super().x_ng if "value_m" in vars(self) else self._known_x_ng

    @cached_property
    def _known_x_ng(self) -> Tensor:
        return self._dense()

    @cached_property
    def _made(self) -> Counts:
        return self._coordinates()

    @cached_property
    def start(self) -> Tensor:  # type: ignore[override]
        return self._made.start

    @cached_property
    def col_m(self) -> Tensor:  # type: ignore[override]
        return self._made.col_m

    @cached_property
    def value_m(self) -> Tensor:  # type: ignore[override]
        return self._made.value_m

    def map(self, function: Any) -> Counts:
        shape = self.n_cells, self.n_features
        return ResidentCounts(*shape, lambda: function(self.x_ng), lambda: self._made.map(function))
