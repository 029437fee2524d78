"""Which strategy a training uses: one device, DDP in a script, or fresh worker processes from a notebook."""

from __future__ import annotations

import logging
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.imports import _IS_INTERACTIVE

from scvi_lite.train.quiet import quiet

logger = logging.getLogger("scvi_lite")

FORKS = ("ddp_fork", "ddp_fork_find_unused_parameters_false", "ddp_fork_find_unused_parameters_true")


def as_list(value: Any) -> list[Any]:
    """None, one or several as a list."""
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def workers_needed(options: dict[str, Any]) -> int:
    """How many worker processes this training needs; 0 where it runs in this process.

    In a notebook, several devices are trained on by fresh processes. So they are wherever a strategy is named that starts
    processes without running a script again: ``ddp_notebook`` and ``ddp_spawn`` with all their endings.

    Raises
    ------
    ValueError
        If a fork is asked for, which would hang or crash.
    """
    strategy = options.get("strategy", "auto")
    if isinstance(strategy, str) and strategy in FORKS:
        raise ValueError(
            f"strategy={strategy!r} forks this process, whose thread pools and CUDA context a fork does not survive. Use "
            "strategy='ddp_notebook', which starts fresh processes instead, or leave strategy='auto'."
        )
    by_name = isinstance(strategy, str) and strategy.startswith(("ddp_notebook", "ddp_spawn"))
    if not by_name and not (strategy == "auto" and _IS_INTERACTIVE and options.get("num_nodes", 1) == 1):
        return 0
    n_devices = count_devices(options)
    if n_devices < 2:
        options["strategy"] = "auto"
        return 0
    logger.info("Training on %d devices, each in a fresh process.", n_devices)
    return n_devices


def count_devices(options: dict[str, Any]) -> int:
    """How many devices Lightning makes of ``accelerator`` and ``devices``."""
    asked = {name: options.get(name, "auto") for name in ("accelerator", "devices")}
    unused = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    with quiet():
        return pl.Trainer(**asked, **unused).num_devices


def worker_strategy(strategy: str) -> str:
    """What a worker process, whose launcher is this package, asks Lightning for."""
    return "ddp_find_unused_parameters_true" if strategy.endswith("find_unused_parameters_true") else "ddp"
