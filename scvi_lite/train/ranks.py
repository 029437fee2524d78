"""Work that one of several ranks does for all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

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
    told: list[Any] = [None, None]  # result and error
    if torch.distributed.get_rank() == 0:
        try:
            told[0] = work()
        except Exception as raised:  # whatever it is, the others must not wait for ever
            told[1] = raised
    torch.distributed.broadcast_object_list(told, src=0)
    result, error = told
    if error is not None:
        raise error
    return result
