"""A training step as a CUDA graph: recorded once, then replayed for every minibatch of the same size.

A step of these networks is about a hundred small kernels, and a host takes longer to launch them than a GPU to run
them. A graph launches all of them at once. What differs between steps lies in tensors that the graph reads: the numbers
of the cells, the weight of the KL terms and the learning rate. Random numbers go on from replay to replay, as PyTorch
sees to it.

The first steps are taken one kernel after the other, which makes the moments of the optimiser and compiles what is
compiled; then a step is recorded, which computes nothing, and replayed. So the weights see the same steps as without a
graph. Where recording fails, as a step that waits for the device does, training goes on without.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import lightning.pytorch as pl
import torch
from torch import Tensor

from scvi_lite.errors import warn

WARM_UP = 3
PRECISIONS = ("32-true", "bf16-mixed")


def record(work: Callable[[], None]) -> Callable[[], None]:
    """Record what a function asks of the GPU, and give what does it again."""
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    before, graph = generator.clone_state(), torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            work()
    except RuntimeError:
        # A recording that breaks off leaves the generator waiting for its end, and refusing to draw.
        generator.graphsafe_set_state(before)
        raise
    return graph.replay


@contextmanager
def apart() -> Iterator[None]:
    """On another stream than the default one, as what is to be recorded must first run."""
    stream, here = torch.cuda.Stream(), torch.cuda.current_stream()
    stream.wait_stream(here)
    with torch.cuda.stream(stream):
        yield
    here.wait_stream(stream)


def obstacle(trainer: pl.Trainer, is_plain: bool) -> str:
    """What keeps the steps of a training from being recorded; empty if nothing does."""
    task, data = trainer.lightning_module, trainer.datamodule
    reasons = {
        "it needs a CUDA device": task.device.type != "cuda",
        "something looks into steps, such as a callback, clipping, or several devices": not is_plain,
        f"it needs precision {' or '.join(PRECISIONS)}": trainer.precision not in PRECISIONS,
        "the loss is compiled": task.plan.compile,
        "the model has an adversary, or learns labels from extra cells": task.adversary is not None or data.n_extra > 0,
        "the cells do not lie on the GPU as Triton's kernels read them": data.shards["train"].row_device.type != "cuda",
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def graphed_step(trainer: pl.Trainer, is_plain: bool) -> GraphedStep | None:
    """What takes the steps of a training as a graph, if that is asked for and possible; says why not."""
    if not trainer.lightning_module.plan.cuda_graph:
        return None
    if reason := obstacle(trainer, is_plain):
        warn(f"cuda_graph=True: {reason}. Training without.")
        return None
    return GraphedStep(trainer)


class GraphedStep:
    """Takes training steps with minibatches of one size; others are left to the usual loop."""

    def __init__(self, trainer: pl.Trainer):
        self.trainer, self.task, self.data = trainer, trainer.lightning_module, trainer.datamodule
        device = self.task.device
        self.row_n = torch.zeros(self.data.batch_size, dtype=torch.int64, device=device)
        self.lr = torch.zeros((), device=device)
        self.n_cells = 0
        self.to_warm_up = WARM_UP
        self.failed = False
        self.replay: Callable[[], None] | None = None

    def fits(self, row_n: Tensor) -> bool:
        """Whether it takes a step with these cells."""
        return not self.failed and len(row_n) == len(self.row_n)

    def take(self, row_n: Tensor) -> None:
        """One step with the cells of some rows."""
        self.task.set_schedules()
        self.row_n.copy_(row_n)
        self.lr.fill_(self.trainer.optimizers[0].param_groups[0]["lr"])
        if self.replay is None and self.to_warm_up == 0:
            self._record()
        if self.replay is not None:
            self.replay()
        elif self.failed:
            self._work()
        else:
            self.to_warm_up -= 1
            with apart():
                self._work()
        self.task.count_step(self.n_cells)

    def _work(self) -> None:
        """All that a step asks of the device."""
        batch = self.data.transfer_batch_to_device(self.row_n, self.task.device, 0)
        with self.trainer.precision_plugin.train_step_context():
            total, self.n_cells = self.task.score(batch)
        self.task.descend(total, self.trainer.optimizers[0])

    def _record(self) -> None:
        fused = self.trainer.optimizers[0].fused_step
        try:
            if fused is None:
                raise RuntimeError("the optimiser is not fused.")
            fused.lr = self.lr
            self.replay = record(self._work)
        except RuntimeError as error:
            self.failed = True
            cause = error.__context__ or error  # what broke the recording off, which then cannot be ended either
            warn(f"cuda_graph=True: a step could not be recorded. Training without. The error: {cause}")
        finally:
            if fused is not None:
                fused.lr = None
