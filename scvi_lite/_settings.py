"""Package-wide settings: ``scvi_lite.settings.seed = 0``."""

from __future__ import annotations

import logging
import random
from typing import Any

from scvi_lite.errors import unknown


logger = logging.getLogger("scvi_lite")
if not logger.handlers:
    logger.addHandler(logging.StreamHandler())
    logger.setLevel(logging.INFO)
    logger.propagate = False


class Settings:
    """Settings that hold for all models of a session.

    Attributes
    ----------
    seed
        Setting it seeds Python, NumPy and PyTorch, and makes every split and order of cells that follows reproducible.
    batch_size
        Cells in a minibatch where a call does not say; None for the default of each call.
    verbosity
        Level of the package's log messages.
    num_threads
        Threads that PyTorch computes with.

    Examples
    --------
    >>> from scvi_lite import settings
    >>> settings.batch_size is None
    True
    """

    def __init__(self) -> None:
        self._values: dict[str, Any] = {"seed": None, "batch_size": None, "verbosity": logging.INFO}

    @property
    def seed(self) -> int | None:
        return self._values["seed"]

    @seed.setter
    def seed(self, seed: int | None) -> None:
        self._values["seed"] = seed
        if seed is None:
            return
        import numpy as np
        import torch

        random.seed(seed)
        np.random.seed(seed % (1 << 32))
        torch.manual_seed(seed)

    @property
    def batch_size(self) -> int | None:
        return self._values["batch_size"]

    @batch_size.setter
    def batch_size(self, batch_size: int | None) -> None:
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size={batch_size!r}: a whole number of at least 1, or None, is needed.")
        self._values["batch_size"] = batch_size

    @property
    def verbosity(self) -> int:
        return self._values["verbosity"]

    @verbosity.setter
    def verbosity(self, level: int) -> None:
        self._values["verbosity"] = level
        logger.setLevel(level)

    @property
    def num_threads(self) -> int:
        import torch

        return torch.get_num_threads()

    @num_threads.setter
    def num_threads(self, n: int) -> None:
        import torch

        torch.set_num_threads(n)

    def __setattr__(self, name: str, value: Any) -> None:
        known = [k for k, v in vars(Settings).items() if isinstance(v, property)]
        if not name.startswith("_") and name not in known:
            raise AttributeError(unknown("settings", name, known, "a setting", "Settings"))
        object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        return "Settings(" + ", ".join(f"{k}={v!r}" for k, v in self._values.items()) + ")"


settings = Settings()
