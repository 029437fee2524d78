"""Adam (Kingma & Ba 2015, arXiv:1412.6980) for weights that are stored by input, as those of first layers are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def _as_stored(*lists: list[Tensor]) -> None:
    """Replace matrices that are stored by column by their transposes, which are stored by row; the numbers are shared.

    The fused step copies what is not stored by row, there and back, which takes longer than the step itself. It works
    number by number, so the order does not matter, as long as parameter, gradient and moments have the same.
    """
    for i, tensors in enumerate(zip(*lists)):
        if all(x.dim() == 2 and x.t().is_contiguous() and not x.is_contiguous() for x in tensors):
            for each in lists:
                each[i] = each[i].t()


class Adam(torch.optim.Adam):
    """``torch.optim.Adam``, without copies of such weights."""

    def _init_group(self, group: Any, weights: Any, gradients: Any, means: Any, squares: Any, *others: Any) -> Any:
        found = super()._init_group(group, weights, gradients, means, squares, *others)
        _as_stored(weights, gradients, means, squares)
        return found


class AdamW(torch.optim.AdamW):
    """``torch.optim.AdamW``, without copies of such weights."""

    def _init_group(self, group: Any, weights: Any, gradients: Any, means: Any, squares: Any, *others: Any) -> Any:
        found = super()._init_group(group, weights, gradients, means, squares, *others)
        _as_stored(weights, gradients, means, squares)
        return found
