"""Settings for every test: no display, few threads, the same random numbers each time."""

import functools
import importlib.metadata
import os
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "Agg")

import numpy as np
import pytest
import torch
from hypothesis import settings

# A machine that is busy, or compiles a kernel first, fails no test.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

# Lightning asks all installed packages for plug-ins, twice a training: that is a quarter of a short one.
importlib.metadata.entry_points = functools.cache(importlib.metadata.entry_points)

SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(autouse=True)
def seeded():
    """A test starts from the same random state, in whichever order they run."""
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def as_many_threads_as_before():
    """Numba's OpenMP, which notebooks and UMAP start, takes all processors for PyTorch, too; tests share them."""
    n_threads = torch.get_num_threads()
    yield
    torch.set_num_threads(n_threads)


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    """What a test writes by accident does not land in the checkout."""
    monkeypatch.chdir(tmp_path)
