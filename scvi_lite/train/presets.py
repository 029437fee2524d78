"""Ready-made ways to train, chosen by name: ``train(preset="fast")``."""

from __future__ import annotations

from typing import Any

from scvi_lite.errors import check_choice
from scvi_lite.train.plan import heuristic_epochs

PRESETS = ("fast",)
FAST = {"lr": 2e-2, "eps": 1e-4, "lr_schedule": "cosine", "n_steps_kl_warmup": 0.22}
FEWER = 9  # than the epochs of the default
FEW_CELLS, EPOCHS_OF_FEW = 5_000, 60  # longer, the networks learn few cells by heart


def preset_plan(preset: str, n_cells: int) -> tuple[int, dict[str, Any]]:
    """How many epochs to train, and options of the plan.

    Raises
    ------
    ValueError
        If there is no such preset.

    Examples
    --------
    >>> preset_plan("fast", n_cells=8_000)[0]
    44
    """
    check_choice(PRESETS, "a preset", "Presets", preset=preset)
    return fast_epochs(n_cells), dict(FAST)


def fast_epochs(n_cells: int) -> int:
    """Passes over the data of the fast preset: a ninth of the default, and a few more for few cells.

    >>> [fast_epochs(n_cells) for n_cells in (500, 8_000, 100_000, 10_000_000)]
    [60, 44, 9, 1]
    """
    return EPOCHS_OF_FEW if n_cells < FEW_CELLS else max(1, round(heuristic_epochs(n_cells) / FEWER))
