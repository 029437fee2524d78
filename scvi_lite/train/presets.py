"""Ready-made ways to train, chosen by name: ``train(preset="fast")``."""

from __future__ import annotations

import math
from typing import Any

from scvi_lite.errors import unknown
from scvi_lite.train.plan import heuristic_epochs

PRESETS = ("fast",)
FAST = {"lr": 3e-3, "eps": 1e-4, "lr_schedule": "cosine"}
WARMUP = 0.5  # share of the minibatches over which the weight of the KL terms grows
FEWER, LEAST_CELLS = 9, 320_000  # of the epochs of the default, and cells seen in all: 2,500 minibatches of 128


def preset_plan(
    preset: str, max_epochs: int | None, max_steps: int | None, n_cells: int, batch_size: int
) -> tuple[int | None, dict[str, Any]]:
    """How long to train, where nobody says, and options of the plan.

    Raises
    ------
    ValueError
        If there is no such preset.

    Examples
    --------
    >>> preset_plan("fast", None, None, n_cells=8_000, batch_size=128)[0]
    44
    """
    if preset not in PRESETS:
        raise ValueError(unknown("preset", preset, PRESETS, "a preset", "Presets"))
    if max_epochs is None and max_steps is None:
        max_epochs = fast_epochs(n_cells)
    n_steps = max_steps if max_epochs is None else math.ceil(max_epochs * n_cells / batch_size)
    return max_epochs, FAST | {"n_steps_kl_warmup": max(1, int(WARMUP * (n_steps or 0)))}


def fast_epochs(n_cells: int) -> int:
    """Passes over the data of the fast preset: a ninth of the default, and more where there are few cells.

    >>> [fast_epochs(n_cells) for n_cells in (500, 2_000, 8_000, 100_000, 10_000_000)]
    [400, 160, 44, 9, 1]
    """
    usual = heuristic_epochs(n_cells)
    return min(usual, max(round(usual / FEWER), math.ceil(LEAST_CELLS / n_cells)))
