"""Kernels for a GPU, compiled by Triton where it is installed."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch

from scvi_lite.errors import warn


@cache
def gpu_kernels(name: str) -> ModuleType | None:
    """A module of kernels; None where there is no Triton, or where they do not do on this GPU what they should.

    They are tried on a few numbers first, once a process: what cannot be compiled here, or computes something else,
    must not train a model.
    """
    if find_spec("triton") is None:
        return None
    try:
        kernels = import_module(name)
        with torch.inference_mode(False), torch.enable_grad():
            kernels.check("cuda")
    except Exception as error:  # of the compiler, the driver or the comparison
        warn(f"The GPU kernels of {name} are left out, and PyTorch's own used: {type(error).__name__}: {error}")
        return None
    return kernels
