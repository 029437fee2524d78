"""Memory of one minibatch that the next one uses again."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

# Options of mallopt in the C library of GNU, and their values: blocks up to the second are not asked of the system one
# by one (more cannot be had), and the first is how much of what was freed is kept.
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
KEPT, LARGEST = 1 << 29, 1 << 25


@contextmanager
def kept_memory() -> Iterator[None]:
    """Keep what is freed, and give it back to the system at the end.

    Else the C library gives large blocks back after each minibatch, and the system clears them for the next: for
    networks over ten thousands of features this takes a tenth of the time. Other C libraries are left alone.
    """
    try:
        library = ctypes.CDLL(None)
        set_option, give_back = library.mallopt, library.malloc_trim
    except (OSError, TypeError, AttributeError):
        yield
        return
    set_option(MMAP_THRESHOLD, LARGEST)
    set_option(TRIM_THRESHOLD, KEPT)
    try:
        yield
    finally:
        set_option(TRIM_THRESHOLD, 2 * LARGEST)  # what the library itself comes to with blocks of this size
        give_back(0)
