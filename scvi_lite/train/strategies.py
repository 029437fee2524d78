"""Which strategy a training uses: one device, DDP in a script, or fresh worker processes from a notebook."""

from __future__ import annotations

import logging
import os
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.imports import _IS_INTERACTIVE
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.plugins.environments import LightningEnvironment, SLURMEnvironment
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    Strategy,
    StrategyRegistry,
)
from lightning.pytorch.utilities import rank_zero_only

from scvi_lite.errors import check_choice, unknown
from scvi_lite.train.quiet import quiet

logger = logging.getLogger("scvi_lite")

STARTING = ("ddp_notebook", "ddp_spawn")  # beginnings of the names of strategies that start processes by themselves
SPREADING = (FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy)


def as_list(value: Any) -> list[Any]:
    """None, one or several as a list."""
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def workers_needed(options: dict[str, Any]) -> int:
    """How many worker processes this training needs; 0 where it runs in this process. Says in one line what is chosen.

    In a notebook, several devices are trained on by fresh processes. So they are wherever a strategy is named that
    starts processes without running a script again: ``ddp_notebook`` and ``ddp_spawn`` with all their endings.

    Raises
    ------
    ValueError
        If there is no such accelerator, strategy or device, or the strategy cannot work here.
    """
    strategy, n_nodes = options.get("strategy", "auto"), options.get("num_nodes", 1)
    if isinstance(strategy, str):
        strategy = strategy.lower()
    _check_strategy(strategy)
    devices = find_devices(options)
    starts = isinstance(strategy, str) and strategy.startswith(STARTING)
    of_ddp = starts or strategy == "auto" or _is_ddp(strategy)
    if not of_ddp or not (starts or _IS_INTERACTIVE):
        _say(devices, n_nodes)
        return 0
    if _IS_INTERACTIVE and n_nodes > 1:
        raise ValueError(
            f"num_nodes={n_nodes}: a notebook reaches the devices of its own machine only. Run a script on each "
            "machine, with torchrun or srun."
        )
    if not _IS_INTERACTIVE and ("LOCAL_RANK" in os.environ or SLURMEnvironment.detect()):
        raise ValueError(
            f"strategy={strategy!r} starts a process for each device, and this one was itself started for a device, by "
            "torchrun, SLURM or strategy='ddp'. Give strategy='ddp'."
        )
    if len(devices) < 2:
        options["strategy"] = "auto"
        _say(devices, 1)
        return 0
    logger.info("Training on %d devices (%s), each in a fresh process.", len(devices), _names(devices))
    return len(devices)


def _check_strategy(strategy: Any) -> None:
    if isinstance(strategy, str):
        known = ["auto", *(name for name in StrategyRegistry.available_strategies() if not name.startswith("ddp_fork"))]
        if strategy.startswith("ddp_fork"):
            raise ValueError(
                f"strategy={strategy!r} forks this process, which hangs once the process has computed with several "
                "threads and fails once it has used CUDA. Give strategy='ddp_notebook', which starts fresh processes, "
                "or leave strategy='auto'."
            )
        check_choice(known, "a strategy", "Strategies", strategy=strategy)
    elif not isinstance(strategy, Strategy):
        raise ValueError(f"strategy={strategy!r}: the name of a strategy, or a Strategy of Lightning's, is needed.")
    kind = (
        StrategyRegistry[strategy]["strategy"] if isinstance(strategy, str) and strategy != "auto" else type(strategy)
    )
    if issubclass(kind, SPREADING):
        raise ValueError(
            f"strategy={strategy!r} spreads the weights of a network that one device cannot hold; those here are "
            "small. Give strategy='ddp', or leave strategy='auto'."
        )
    if isinstance(strategy, DDPStrategy) and strategy._start_method != "popen":
        raise ValueError(
            f"DDPStrategy(start_method={strategy._start_method!r}): leave start_method out, or give "
            "strategy='ddp_notebook', which starts fresh processes."
        )


def _is_ddp(strategy: Any) -> bool:
    return isinstance(strategy, DDPStrategy) or (isinstance(strategy, str) and strategy.startswith("ddp"))


def find_devices(options: dict[str, Any]) -> list[torch.device]:
    """What Lightning makes of ``accelerator`` and ``devices`` on this machine, unless the strategy brings its own.

    Raises
    ------
    ValueError
        If there are no such devices.
    """
    strategy = options.get("strategy")
    if isinstance(strategy, DDPStrategy) and strategy.parallel_devices:
        return list(strategy.parallel_devices)
    asked = {name: options.get(name, "auto") for name in ("accelerator", "devices")}
    text = ", ".join(f"{name}={value!r}" for name, value in asked.items())
    known = ["auto", "gpu", *AcceleratorRegistry.available_accelerators()]
    if isinstance(asked["accelerator"], str) and asked["accelerator"] not in known:
        raise ValueError(unknown("accelerator", asked["accelerator"], known, "an accelerator", "Accelerators"))
    number = asked["devices"]
    if isinstance(number, bool) or (isinstance(number, int) and (number == 0 or number < -1)):
        raise ValueError(f"{text}: give a number of devices, -1 for all, a list of their numbers, or 'auto'.")
    unused = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    rank = rank_zero_only.rank  # which a Trainer sets
    try:
        with quiet():
            # This machine alone: what torchrun or SLURM left in the variables counts later, if at all.
            trainer = pl.Trainer(**asked, **unused, plugins=[LightningEnvironment()])
    except (MisconfigurationException, TypeError, ValueError) as error:
        cure = " Give the number of processes, as devices=2." if "CPUAccelerator" in str(error) else ""
        raise ValueError(f"{text}: {error}{cure}") from error
    finally:
        rank_zero_only.rank = rank
    if trainer.num_devices > 1:
        return list(trainer.strategy.parallel_devices)
    return [trainer.strategy.root_device]


def _names(devices: list[torch.device]) -> str:
    names = [str(device) for device in devices]
    return ", ".join(names if len(set(names)) == len(names) else sorted(set(names)))


def _say(devices: list[torch.device], n_nodes: int) -> None:
    """The one line, from the first process."""
    if not _IS_INTERACTIVE and rank_zero_only.rank != 0:
        return
    if n_nodes > 1:
        logger.info("Training on %d machines by DDP, each with %s.", n_nodes, _names(devices))
    elif len(devices) > 1:
        logger.info("Training on %d devices (%s) by DDP, each running this script.", len(devices), _names(devices))
    else:
        logger.info("Training on %s.", devices[0])


def worker_strategy(strategy: Any) -> Any:
    """What a worker process, whose launcher is this package, asks Lightning for."""
    if isinstance(strategy, DDPStrategy):
        return strategy
    return "ddp_find_unused_parameters_true" if strategy.lower().endswith("find_unused_parameters_true") else "ddp"
