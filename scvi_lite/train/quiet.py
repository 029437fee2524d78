"""Lightning without its start-up talk."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

# What Lightning says of every small model on a CPU, and its tips; none of it is for our users to mend.
NOISE = (
    ".*The number of training batches.*is smaller than the logging interval.*",
    ".*Checkpoint directory .* exists and is not empty.*",
    ".*is supported for historical reasons but its usage is discouraged.*",
    ".*You're resuming from a checkpoint that ended before the epoch ended.*",
    r""".*Please add the following callbacks: \[("(Model|Save)Checkpoint[^"]*"(, )?)+\]""",
    ".*Total length of `list` across ranks is zero.*",
    ".*GPU available but not used.*",
    ".*in eval mode at the start of training.*",  # what is frozen
    ".*torch.autograd.function.Function.* should not be instantiated.*",  # of torch.compile
    ".*isinstance.treespec, LeafSpec.. is deprecated.*",
)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep Lightning's start-up talk from the user."""
    loggers = [logging.getLogger(f"lightning.{name}") for name in ("pytorch", "fabric")]
    loggers += [logging.getLogger(f"lightning.pytorch.{name}") for name in ("utilities.rank_zero", "accelerators.cuda")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            for message in NOISE:
                warnings.filterwarnings("ignore", message)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
