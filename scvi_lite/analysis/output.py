"""Where a large answer goes: into memory, into an array that the user has, or into a file, a minibatch at a time."""

from __future__ import annotations

import errno
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from scvi_lite.errors import NameTakenError, as_options, check_options, unknown
from scvi_lite.io.atomic import beside

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

#: A path that ends in ``.npy`` or ``.zarr``, or an array: of NumPy, h5py, zarr, or whatever is indexed as these are.
Out = Any
SUFFIXES = (".npy", ".zarr")


class Answer:
    """An array of values of cells, filled a minibatch at a time, in order."""

    def __init__(self, array: Any, axis: int = 0) -> None:
        self.array = array
        self._axis = axis  # that of the cells, the first or the second
        self._n_done = 0

    def _next(self, n: int) -> tuple[slice, ...]:
        """Where the values of the next cells are."""
        self._n_done += n
        return (*[slice(None)] * self._axis, slice(self._n_done - n, self._n_done))

    def put(self, value: Tensor) -> None:
        """Write the values of the next cells."""
        self.array[self._next(value.shape[self._axis])] = value.cpu().numpy()

    def compute(self, n: int, value_of: Callable[[Tensor | None], Tensor]) -> None:
        """Write what ``value_of`` says of the next cells; told a place in memory, it puts the values there itself."""
        self.put(value_of(None))


class InMemory(Answer):
    """An array that is made for the answer."""

    def __init__(self, shape: Sequence[int], axis: int = 0) -> None:
        super().__init__(np.empty(shape, np.float32), axis)
        self._tensor = torch.from_numpy(self.array)

    def put(self, value: Tensor) -> None:
        self._tensor[self._next(value.shape[self._axis])] = value

    def compute(self, n: int, value_of: Callable[[Tensor | None], Tensor]) -> None:
        value_of(self._tensor[self._next(n)])


class NpyFile(Answer):
    """A file of NumPy. It is written and not memory-mapped: a full disk is an error then, and pages do not pile up."""

    def __init__(self, path: Path, shape: Sequence[int], axis: int = 0) -> None:
        super().__init__(None, axis)
        self._n_cells, self._file = shape[axis], path.open("wb")
        np.lib.format.write_array_header_1_0(
            self._file, {"descr": "<f4", "fortran_order": False, "shape": tuple(shape)}
        )
        self._start = self._file.tell()
        self._file.truncate(self._start + 4 * math.prod(shape))

    def put(self, value: Tensor) -> None:
        first = self._next(value.shape[self._axis])[-1].start
        array = value.cpu().numpy().astype("<f4", copy=False)
        for i, part in enumerate(array if self._axis else array[None]):
            n_bytes_each = 4 * math.prod(part.shape[1:])
            self._file.seek(self._start + (i * self._n_cells + first) * n_bytes_each)
            self._file.write(np.ascontiguousarray(part).data)

    def close(self) -> None:
        """Leave nothing unwritten."""
        self._file.close()


@contextmanager
def writing(out: Out, shape: Sequence[int], n_at_once: int, axis: int = 0) -> Iterator[Answer]:
    """An answer of this shape to be filled, whose ``array`` is whole when the block ends.

    Parameters
    ----------
    out
        Where it goes; None for memory. A file has its name only when the block has ended without an error.
    n_at_once
        Cells in a minibatch, which are a chunk of a zarr array.
    axis
        Which dimension is that of the cells, the first or the second.

    Raises
    ------
    ValueError
        If the array does not fit, the path has another ending, or a file is there already (FileExistsError).
    OSError
        If the disk has no room.
    """
    if out is None:
        yield InMemory(shape, axis)
    elif not isinstance(out, str | os.PathLike):
        yield Answer(_fitting(out, shape), axis)
    elif (path := _free(out)).suffix == ".npy":
        _check_room(path, 4 * math.prod(shape))
        with beside(path) as temporary:
            answer = NpyFile(temporary, shape, axis)
            try:
                yield answer
            finally:
                answer.close()
        answer.array = np.load(path, mmap_mode="r")
    else:
        zarr = _zarr()
        chunks = [max(1, n_at_once if i == axis else 1 if i < axis else size) for i, size in enumerate(shape)]
        options = {"shape": tuple(shape), "chunks": tuple(chunks), "dtype": "float32"}
        with beside(path) as temporary:
            into = Answer(zarr.open_array(str(temporary), mode="w", **options), axis)
            yield into
        into.array = zarr.open_array(str(path), mode="r")


def collect(
    blocks: Iterable[Mapping[str, Tensor]],
    n_cells: int,
    out: Mapping[str, Out] | None = None,
    draws_last: bool = False,
) -> dict[str, Any]:
    """Arrays by name, of what is said of the cells of each minibatch: (n, f), (s, n, f), or (n, f, s)."""
    answers: dict[str, Answer] = {}
    places = as_options("out", out)
    _check_apart(places)
    with ExitStack() as opened:
        for values in blocks:
            check_options("out", places, values)
            for name, value in values.items():
                axis = int(value.ndim == 3 and not draws_last)
                if name not in answers:
                    shape = (*value.shape[:axis], n_cells, *value.shape[axis + 1 :])
                    answers[name] = opened.enter_context(writing(places.get(name), shape, value.shape[axis], axis))
                answers[name].put(value)
    return {name: answer.array for name, answer in answers.items()}


def pair(out: Any) -> tuple[Out, Out]:
    """The places of an answer of two arrays.

    >>> pair(None), pair(["rna.zarr", None])
    ((None, None), ('rna.zarr', None))
    """
    if out is None:
        return None, None
    if not isinstance(out, tuple | list) or len(out) != 2:
        raise ValueError(
            f"out={out!r}: the answer is two arrays, and two places are needed, as in out=('rna.zarr', 'protein.npy'); "
            "None keeps one in memory."
        )
    return out[0], out[1]


def sparse_rows(blocks: Iterable[Tensor], n_features: int) -> csr_matrix:
    """The rows (n, f) of the minibatches as a sparse matrix: dense ones are in memory a minibatch at a time.

    >>> sparse_rows([torch.tensor([[0.0, 0.9]]), torch.tensor([[0.5, 0.0]])], 2).toarray()
    array([[0. , 0.9],
           [0.5, 0. ]], dtype=float32)
    """
    from scipy import sparse

    values, columns, sizes = [np.zeros(0, np.float32)], [np.zeros(0, np.int32)], [np.zeros(1, np.int64)]
    for block_nf in blocks:
        value_nf = block_nf.float().cpu().numpy()
        # By NumPy: PyTorch's small arrays, which are kept, lie between large ones, which then stay, too.
        row_m, column_m = value_nf.nonzero()
        values.append(value_nf[row_m, column_m])
        columns.append(column_m.astype(np.int32))
        sizes.append(np.bincount(row_m, minlength=len(value_nf)))
    start = np.concatenate(sizes).cumsum()
    value_m = np.concatenate(values)
    values.clear()  # before the columns are joined
    return sparse.csr_matrix((value_m, np.concatenate(columns), start), shape=(len(start) - 1, n_features))


def _zarr() -> Any:
    try:
        import zarr
    except ImportError as error:  # of an anndata before 0.12, which does without
        raise ImportError("out ends in '.zarr': pip install zarr, or give a path that ends in '.npy'.") from error
    return zarr


def _fitting(out: Any, shape: Sequence[int]) -> Any:
    """An array of the user's; refused where the answer does not fit into it."""
    dtype, is_sparse = getattr(out, "dtype", None), isinstance(getattr(out, "format", None), str)  # in memory or backed
    if getattr(out, "shape", None) is None or getattr(dtype, "kind", None) != "f" or is_sparse:
        found = f"a {type(out).__name__}" + ("" if dtype is None else f" of {dtype}")
        raise ValueError(
            f"out is {found}: an array of floating-point numbers of NumPy, h5py or zarr is needed, or a path that ends "
            f"in {' or '.join(SUFFIXES)}. Write out=np.empty({tuple(shape)}, 'float32')."
        )
    if tuple(out.shape) != tuple(shape):
        raise ValueError(f"out has the shape {tuple(out.shape)}; the answer has {tuple(shape)}.")
    if isinstance(out, np.ndarray) and not out.flags.writeable:
        raise ValueError("out cannot be written to. Open a file with mode 'r+', as in np.load(path, mmap_mode='r+').")
    return out


def _free(out: str | os.PathLike) -> Path:
    """A path that nothing has, with an ending that is known."""
    path = Path(out).expanduser()
    if path.suffix not in SUFFIXES:
        raise ValueError(unknown(f"out='{out}': the ending", path.suffix, SUFFIXES))
    if path.exists():
        raise NameTakenError(f"out='{out}' exists: remove it, or give another name.")
    return path


def _check_apart(places: Mapping[str, Out]) -> None:
    """Refuse one place for two answers, of which the later would take the earlier's."""
    taken: dict[Any, str] = {}
    for name, out in places.items():
        place = os.path.abspath(out) if isinstance(out, str | os.PathLike) else id(out)
        if out is not None and (first := taken.setdefault(place, name)) != name:
            raise ValueError(f"out: {first!r} and {name!r} have the same place; each needs its own.")


def _check_room(path: Path, n_bytes: int) -> None:
    """Refuse what the disk has no room for, before it is computed."""
    place = next(folder for folder in path.absolute().parents if folder.exists())
    if (free := shutil.disk_usage(place).free) < n_bytes:
        message = f"out='{path}' needs {n_bytes / 2**30:.1f} GiB, and {free / 2**30:.1f} are free"
        raise OSError(errno.ENOSPC, message)
