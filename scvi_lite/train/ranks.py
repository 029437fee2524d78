"""Work that the first of several ranks does for all."""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Callable
from datetime import timedelta

import torch

PATIENCE = timedelta(minutes=30)
_calls: Counter[str] = Counter()


def on_first_rank(work: Callable[[], None], name: str) -> None:
    """Do the work on the first rank while the others wait; an error of it is raised on every rank that calls.

    The first rank waits for nobody, so it may also call alone, as scripts do that save on their first rank only.
    Without several ranks, the work is just done.

    Parameters
    ----------
    work
        What to do.
    name
        Tells this work from other work; the same on all ranks.

    >>> on_first_rank(lambda: print("done"), "example")
    done
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        work()
        return
    board = torch.distributed.PrefixStore("scvi_lite", torch.distributed.distributed_c10d._get_default_store())
    _calls[name] += 1
    key = f"{name}/{_calls[name]}"
    if torch.distributed.get_rank() > 0:
        board.wait([key], PATIENCE)
        error = pickle.loads(bytes.fromhex(board.get(key).decode()))  # written by the first rank of this very training
        if error is not None:
            raise error
        return
    try:
        work()
        board.set(key, pickle.dumps(None).hex())
    except Exception as error:
        board.set(key, pickle.dumps(type(error)(*error.args)).hex())
        raise
