"""Write several files into a folder at once: whatever interrupts it leaves the old files or the new ones.

The files are written to a temporary folder, flushed to the disk, and published by a single rename:

- a folder that does not exist yet: the temporary one, made beside it, takes its name;
- a folder that exists: the temporary one, made inside it, becomes ``.<key>.complete``. From then on the new files
  count: a reader looks in there first. They are moved out one by one, and the next writer finishes what was
  interrupted. Files with other names stay untouched.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def staging(folder: Path, key: str) -> Iterator[Path]:
    """A temporary folder, whose files are in ``folder`` when the block ends without an error.

    Parameters
    ----------
    folder
        Where the files shall be. Made, with its parents, where it does not exist.
    key
        Tells the sets of files in one folder apart.

    Raises
    ------
    OSError
        The disk is full, the place read-only, ... The old files can still be read.
    """
    is_new = not folder.exists()
    with beside(folder if is_new else _complete(folder, key)) as temporary:
        temporary.mkdir()
        yield temporary
        for file in temporary.iterdir():
            _flush(file)
        _flush(temporary)
        _move_out(folder, key)  # what an earlier writer could not finish
    _flush(folder.parent if is_new else folder)
    _move_out(folder, key)


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """A temporary name in the same folder, for a file or a folder to be made under it.

    It becomes ``path`` when the block ends without an error; else it is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex[:12]}.partial"
    try:
        yield temporary
        os.rename(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        if temporary.is_file():
            temporary.unlink()
        raise


def locate(folder: Path, key: str, name: str) -> Path:
    """Where the current file of this name is, or would be."""
    waiting = _complete(folder, key) / name
    return waiting if waiting.exists() else folder / name


def _complete(folder: Path, key: str) -> Path:
    return folder / f".{key}.complete"


def _move_out(folder: Path, key: str) -> None:
    complete = _complete(folder, key)
    if complete.is_dir():
        for name in os.listdir(complete):
            os.replace(complete / name, folder / name)
        os.rmdir(complete)
        _flush(folder)


def _flush(path: Path) -> None:
    """Wait until a file, or the list of files in a folder, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
