"""Read what ``torch.save`` wrote as plain data, without using any class or function that the file names.

PyTorch's restricted unpickler reads the file (``weights_only=True``). Where the file names a constructor of NumPy or
pandas, it gets a stand-in that records the arguments and does nothing else; arrays are then made from the recorded
bytes. So nothing in the file can run, and it does not matter which version of NumPy or pandas wrote it. A file that
names anything else is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch


class Recorded:
    """Stands in for an object: what its constructor was given, and its state."""

    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any) -> Recorded:
        self = super().__new__(cls)
        self.args, self.state = args, None
        return self

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Dtype(Recorded):
    def numpy(self) -> np.dtype:
        """The dtype: numbers, text, bytes or objects; no records."""
        code = f"{self.state[1] if self.state else '='}{self.args[0]}"
        if not re.fullmatch(r"[<>=|][biufcOSU]\d+", code):
            raise ValueError(f"an array of dtype {code!r}")
        return np.dtype("O") if code[1] == "O" else np.dtype(code)


class _Array(Recorded):
    def numpy(self) -> np.ndarray:
        """The array."""
        _, shape, dtype, is_fortran, data = self.state
        if dtype.numpy().kind == "O":
            flat = np.fromiter(map(plain, data), dtype=object, count=len(data))
        else:
            flat = np.frombuffer(data, dtype.numpy()).copy()
        return flat.reshape(shape, order="F" if is_fortran else "C")


class _Scalar(Recorded):
    def numpy(self) -> Any:
        """The number, as Python's."""
        dtype, data = self.args
        return np.frombuffer(data, dtype.numpy())[0].item()


class _Softplus(Recorded):
    """An option of scvi-tools that is a function: named in the file, never called."""


class _Dict:
    """Dictionaries with manners of their own become plain ones."""

    def __new__(cls, *args: Any) -> dict:  # type: ignore[misc]
        return {}


class _Bytes:
    """Empty bytes; others are written as text and an encoding, which PyTorch reads."""

    def __new__(cls, *args: Any) -> bytes:  # type: ignore[misc]
        return b""


STAND_INS: dict[str, type] = {
    "numpy.dtype": _Dtype,
    "numpy.ndarray": Recorded,
    "numpy.matrix": Recorded,
    **{f"numpy.{core}.multiarray._reconstruct": _Array for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray.scalar": _Scalar for core in ("core", "_core")},
    "builtins.dict": _Dict,
    "builtins.bytes": _Bytes,
    "torch._C._nn.softplus": _Softplus,
    "collections.defaultdict": _Dict,
    "scvi.utils._attrdict.attrdict": _Dict,
    **{f"builtins.{name}": Recorded for name in ("slice", "list", "int", "float", "str", "bool", "range")},
}
RECORDED_ONLY = ("pandas.", "pyarrow.", "torch.distributions.constraints.")


def read_plain(file: str | Path) -> Any:
    """The contents of a file of ``torch.save``: containers, numbers, text, tensors on the CPU, and arrays.

    Objects of pandas come as :class:`Recorded`; what they hold is for :func:`plain`.

    Raises
    ------
    ValueError
        The file is damaged, or names something that plain data does not need.
    """
    with open(file, "rb") as handle, _allowing_nothing():
        try:
            named = torch.serialization.get_unsafe_globals_in_checkpoint(handle)
            refused = sorted(name for name in named if _stand_in(name) is None)
            if not refused:
                torch.serialization.add_safe_globals([(_stand_in(name), name) for name in named])
                handle.seek(0)
                return plain(torch.load(handle, map_location="cpu", weights_only=True))
        except Exception as error:  # whatever a malformed file may lead to
            reason = str(error).strip().split("\n")[0]
            raise ValueError(f"{file} is damaged, or was not written by torch.save: {reason}") from error
    raise ValueError(
        f"{file} asks for {', '.join(refused)}. Data need no such thing; it could run code, so the file is not read. "
        "If you trust its source, load it with the program that wrote it and save it again as plain data."
    )


@contextmanager
def _allowing_nothing() -> Iterator[None]:
    """Set aside what others have told PyTorch to trust, for the time of reading one file."""
    trusted = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(trusted)


def _stand_in(name: str) -> type | None:
    """What to use instead of the class or function of this name; None where it has no place in data."""
    return Recorded if name.startswith(RECORDED_ONLY) else STAND_INS.get(name)


def plain(value: Any) -> Any:
    """Recorded arrays and numbers as what they are, inside containers too; other recorded objects stay.

    Raises
    ------
    ValueError
        An array holds something else than numbers, text or objects.
    """
    if isinstance(value, dict):
        return {plain(key): plain(entry) for key, entry in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(plain, value))
    if value is _Softplus:
        return "softplus"
    return value.numpy() if isinstance(value, _Array | _Scalar) else value
