"""Package-wide settings: ``scvi_lite.settings.seed = 0``."""

from __future__ import annotations

import logging
import random
from pathlib import Path
from typing import Any, NoReturn

from scvi_lite._elsewhere import instead_of
from scvi_lite.errors import unknown, warn

NEEDLESS = {
    "dl_num_workers": "cells are gathered on the device, without loader processes",
    "dl_persistent_workers": "cells are gathered on the device, without loader processes",
    "dl_pin_memory_gpu_training": "cells are gathered on the device",
    "progress_bar_style": "the progress bar suits the place where it is shown",
    "warnings_stacklevel": "warnings point to the line that caused them",
    "jax_preallocate_gpu_memory": "there is no JAX here",
}

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
    logging_dir
        Folder for the checkpoints and logs of trainings that name no ``default_root_dir``.

    Settings that scvi-tools has and that have no use here may be set, which warns.

    Examples
    --------
    >>> from scvi_lite import settings
    >>> settings.batch_size is None
    True
    """

    def __init__(self) -> None:
        self._values: dict[str, Any] = {
            "seed": None,
            "batch_size": None,
            "verbosity": logging.INFO,
            "logging_dir": "scvi_lite_runs",
        }

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

    @property
    def logging_dir(self) -> Path:
        return Path(self._values["logging_dir"])

    @logging_dir.setter
    def logging_dir(self, folder: str | Path) -> None:
        self._values["logging_dir"] = str(folder)

    def __getattr__(self, name: str) -> NoReturn:
        known = [k for k, v in vars(Settings).items() if isinstance(v, property)]
        needless = f"settings has no {name!r}: {NEEDLESS[name]}." if name in NEEDLESS else None
        raise AttributeError(instead_of("settings", name) or needless or unknown("settings", name, known, "a setting"))

    def __setattr__(self, name: str, value: Any) -> None:
        if name in NEEDLESS:
            warn(f"settings.{name} has no effect: {NEEDLESS[name]}.")
            return
        known = [k for k, v in vars(Settings).items() if isinstance(v, property)]
        if not name.startswith("_") and name not in known:
            raise AttributeError(unknown("settings", name, known, "a setting", "Settings"))
        object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        return "Settings(" + ", ".join(f"{k}={v!r}" for k, v in self._values.items()) + ")"


settings = Settings()
