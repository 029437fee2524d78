"""Work that one of several ranks does for all."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


def on_first_rank(work: Callable[[], T]) -> T:
    """Do the work on the first rank while the others wait; its result, or its error, comes out on every rank.

    Without several ranks, it is just done.

    >>> on_first_rank(lambda: 1)
    1
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return work()
    outcome: list[T | None] = [None]
    error: list[Exception | None] = [None]
    if torch.distributed.get_rank() == 0:
        try:
            outcome = [work()]
        except Exception as raised:  # whatever it is, the others must not wait for ever
            error = [raised]
    both = [outcome, error]
    torch.distributed.broadcast_object_list(both, src=0)
    (result,), (failed,) = both
    if failed is not None:
        raise failed
    return result  # type: ignore[return-value]
