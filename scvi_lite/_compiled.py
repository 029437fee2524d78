"""Functions over the rows of a minibatch: compiled for the CPU by Numba, and run on the threads of PyTorch.

PyTorch's threads stay awake for a moment after each of its operations. Another pool of threads would have to share the
processor with them while they wait, so theirs are used: the OpenMP library that PyTorch has loaded is asked to call us
back. Where it cannot be asked (no OpenMP, a forked process) there is a pool of our own.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path
from threading import get_ident
from typing import Any

import numba
import numpy as np
import torch
from numba.core.compiler import Compiler

# A thread is worth its call from this many elements on, and so many threads are: each needs the interpreter to begin.
MIN_WORK = 1 << 14
MAX_SHARES = 32
CHEAP = 16  # elements that are only filled in or looked up, as many as count for one
HOME = os.getpid()  # OpenMP does not survive a fork


class _Apart(Compiler):
    """Takes the arguments of a function for arrays of their own, which share no memory.

    Else a loop asks when it runs, takes arrays that lie near one another for one, and goes number by number, which
    rounds otherwise: the last digit would depend on where in memory small arrays happen to be.
    """

    def define_pipelines(self) -> Any:
        self.state.flags.noalias = True
        return super().define_pipelines()


# For a loop over many numbers at once: sums may be taken in any order, and what is written is not read elsewhere.
AT_ONCE: dict[str, Any] = {
    "fastmath": {"nnan", "ninf", "nsz", "arcp", "contract", "reassoc"},
    "error_model": "numpy",
    "pipeline_class": _Apart,
}


@cache
def compiled(function: Callable[..., Any], at_once: bool = False) -> Callable[..., Any]:
    """The function compiled when it is first called; the result is kept on disk where that can be written."""
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": {"contract"}}
    options |= AT_ONCE if at_once else {}
    try:
        result = numba.njit(cache=True, **options)(function)
    except RuntimeError:  # nowhere to keep it
        return numba.njit(**options)(function)
    # Numba goes by the file of a function alone, and would keep what calls functions of a file that has changed.
    for index in Path(result.stats.cache_path).glob(f"*.{function.__name__}-*.nbi"):
        with suppress(FileNotFoundError):  # another process was here
            if index.stat().st_mtime < _last_change():
                index.unlink()
    return result


@cache
def _last_change() -> float:
    """When a file of compiled functions was last written."""
    return max((path.stat().st_mtime for path in Path(__file__).parent.glob("*/*kernels.py")), default=0.0)


def on_threads(function: Callable[[int, int], Any], n: int, work: int) -> list[Any]:
    """Call ``function(first, last)`` on shares of ``range(n)``, as many as PyTorch has threads, all at once.

    Parameters
    ----------
    function
        Releases the lock of the interpreter, as compiled functions do.
    n
        Rows.
    work
        Elements in all of them: few are left to one thread.

    >>> on_threads(lambda first, last: last - first, 10, 100)
    [10]
    """
    n_shares = max(1, min(torch.get_num_threads(), n, work // MIN_WORK, MAX_SHARES))
    if n_shares == 1:
        return [function(0, n)]
    shares = _Shares(function, [k * n // n_shares for k in range(n_shares + 1)])
    if os.getpid() == HOME and (parallel := _openmp()) is not None:
        # All of them, as PyTorch's operations do: OpenMP ends threads that a call leaves out, and the next one needs.
        parallel(_Call(n_shares, shares), torch.get_num_threads())
    else:
        others = [_pool(os.getpid()).submit(shares.take) for _ in range(n_shares - 1)]
        shares.take()
        for other in others:
            other.result()
    return shares.results()


class _Shares:
    """Shares of the rows that threads take one after the other, however many threads come."""

    def __init__(self, function: Callable[[int, int], Any], edges: list[int]):
        self.function, self.edges = function, edges
        self.waiting = iter(range(len(edges) - 1))
        self.done: dict[int, Any] = {}
        self.came: set[int] = set()  # threads
        self.error: BaseException | None = None

    def take(self) -> None:
        try:
            self.came.add(get_ident())
            for k in self.waiting:
                self.done[k] = self.function(self.edges[k], self.edges[k + 1])
        except BaseException as error:  # for the caller, who may be another thread
            self.error = error

    def results(self) -> list[Any]:
        if self.error is not None:
            raise self.error
        if get_ident() not in self.came:  # Python drops what interrupts a callback before its first line
            raise KeyboardInterrupt
        return [self.done[k] for k in range(len(self.done))]


class _Call(ctypes.Structure):
    """What each thread is given."""

    _fields_ = [("n_shares", ctypes.c_int64), ("shares", ctypes.py_object)]


_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_take_shares = _CALLBACK(lambda call: _Call.from_address(call).shares.take())


@cache
def _openmp() -> Callable[[_Call, int], None] | None:
    """What compilers turn ``#pragma omp parallel`` into, of the library that PyTorch has loaded.

    The threads that find no share are turned away before they ask for the interpreter, which one has at a time.
    """
    try:
        library = ctypes.CDLL(torch._C.__file__)
        parallel, thread = library.GOMP_parallel, library.omp_get_thread_num
    except (OSError, AttributeError):
        return None
    parallel.argtypes, parallel.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None
    thread.argtypes, thread.restype = [], ctypes.c_int

    @numba.cfunc("void(voidptr)")
    def enter(call):
        if thread() < numba.carray(call, 1, np.int64)[0]:
            _take_shares(call)

    return lambda call, n_threads: parallel(enter.address, ctypes.byref(call), n_threads, 0)


@cache
def _pool(pid: int) -> ThreadPoolExecutor:
    """Threads of this process; those of a parent do not survive a fork."""
    return ThreadPoolExecutor(thread_name_prefix="scvi_lite")
