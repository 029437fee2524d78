"""Ready-made ways to train, chosen by name: ``train(preset="fast")``."""

from __future__ import annotations

import math
from typing import Any

from scvi_lite.errors import unknown
from scvi_lite.train.plan import heuristic_epochs

PRESETS = ("fast",)
FAST = {"lr": 2e-2, "eps": 1e-4, "lr_schedule": "cosine"}
WARMUP = 0.2  # share of the minibatches over which the weight of the KL terms grows
FEWER = 9  # than the epochs of the default
FEW_CELLS, EPOCHS_OF_FEW = 5_000, 60  # longer, the networks learn few cells by heart


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
    """Passes over the data of the fast preset: a ninth of the default, and a few more for few cells.

    >>> [fast_epochs(n_cells) for n_cells in (500, 8_000, 100_000, 10_000_000)]
    [60, 44, 9, 1]
    """
    return EPOCHS_OF_FEW if n_cells < FEW_CELLS else max(1, round(heuristic_epochs(n_cells) / FEWER))
