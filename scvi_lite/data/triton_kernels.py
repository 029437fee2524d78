"""Rows of a sparse matrix on a GPU as a dense minibatch, in a kernel that asks nobody how many non-zeros there are."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 256


@triton.jit
def fill_rows(row_n, start, col, value, x_ng, n_features, BLOCK: tl.constexpr):
    """Write the non-zeros of one row."""
    i = tl.program_id(0).to(tl.int64)
    row = tl.load(row_n + i)
    first, last = tl.load(start + row), tl.load(start + row + 1)
    for k in range(first, last, BLOCK):
        at = k + tl.arange(0, BLOCK)
        here = at < last
        j = tl.load(col + at, mask=here, other=0).to(tl.int64)
        x = tl.load(value + at, mask=here, other=0).to(tl.float32)
        tl.store(x_ng + i * n_features + j, x, mask=here)


def dense_rows(row_n: Tensor, start: Tensor, col: Tensor, value: Tensor, n_features: int) -> Tensor:
    """Some rows of a matrix as float32 (n, g); all of it lies on one GPU, columns and numbers in any type."""
    x_ng = torch.zeros(row_n.shape[0], n_features, device=col.device)
    if row_n.shape[0]:
        with torch.cuda.device_of(x_ng):  # Triton launches on the current device
            fill_rows[(row_n.shape[0],)](row_n, start, col, value, x_ng, n_features, BLOCK=BLOCK)
    return x_ng


def check(device: str) -> None:
    """Raise if the kernel does not do on a device what it should."""
    col, value = torch.tensor([0, 3, 1], dtype=torch.int16), torch.tensor([7, 1, 255], dtype=torch.uint8)
    given = torch.tensor([2, 0, 1]), torch.tensor([0, 2, 2, 3]), col, value
    row_n, start, col, value = (t.to(device) for t in given)
    expected_ng = torch.tensor([[0.0, 255, 0, 0], [7, 0, 0, 1], [0, 0, 0, 0]])
    if not torch.equal(dense_rows(row_n, start, col, value, 4).cpu(), expected_ng):
        raise RuntimeError("rows come out wrong.")
