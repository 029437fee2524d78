"""A worker process of :mod:`scvi_lite.train.launch`: ``python -m scvi_lite.train.worker FOLDER DESCRIPTOR``."""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time
import traceback
import warnings
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import cloudpickle
import torch
from lightning.pytorch.plugins.environments import LightningEnvironment

from scvi_lite.data.shared import read_store
from scvi_lite.train import fit as fitting
from scvi_lite.train.callbacks import StopFlag
from scvi_lite.train.divergence import TrainingDivergedError
from scvi_lite.train.launch import TRAVELS, Job, Outcome, pack, travellers
from scvi_lite.train.progress import Progress
from scvi_lite.train.strategies import as_list, worker_strategy


class Channel:
    """The way to the notebook: a display of progress, a text stream, and a place for warnings."""

    def __init__(self, connection: Connection):
        self.connection = connection
        self.lock = threading.Lock()  # threads of callbacks may print too

    def send(self, kind: str, content: Any = None) -> None:
        """Send one message; by value what the notebook defined."""
        message = cloudpickle.dumps((kind, content))
        with self.lock:
            self.connection.send_bytes(message)

    def show(self, position: float, total: int | None, metrics: dict[str, float]) -> None:
        self.send("progress", (position, total, metrics))

    def close(self) -> None:
        """The bar is closed in the notebook."""

    def write(self, text: str) -> int:
        self.send("print", text)
        return len(text)

    def flush(self) -> None:
        """Nothing is held back."""

    def isatty(self) -> bool:
        return False

    def warn(self, message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None) -> None:
        """In the place of ``warnings.showwarning``: the notebook decides what to do with a warning."""
        self.send("warning", (str(message), category, filename, lineno))


def obey(connection: Connection, stop: StopFlag, folder: Path) -> None:
    """Wait for the notebook's word to stop; if the notebook is gone, end and clean up after it."""
    try:
        connection.recv()
        stop.request()
        connection.recv()
    except (EOFError, OSError):
        shutil.rmtree(folder, ignore_errors=True)
        os._exit(1)


def work(folder: Path, channel: Channel, rank: int) -> None:
    """Train one rank's share; the first rank hands the result back."""
    job: Job = cloudpickle.loads((folder / "job.pkl").read_bytes())
    job.data.store = read_store(folder)
    stop = StopFlag()
    threading.Thread(target=obey, args=(channel.connection, stop, folder), daemon=True).start()
    options = job.options | {
        "strategy": worker_strategy(job.options["strategy"]),
        "plugins": [*as_list(job.options.get("plugins")), LightningEnvironment()],
    }
    progress = Progress(channel) if options.get("enable_progress_bar", True) else None
    seed, state = job.random_state
    torch.manual_seed(seed)
    torch.set_rng_state(state)
    diverged, interrupted = None, False
    try:
        _, interrupted = fitting.run(job.task, job.data, job.stopping, options, progress, stop)
        weights = job.task.module.state_dict()
    except TrainingDivergedError as error:
        diverged, weights = str(error), job.task.last_good
    if rank == 0:
        torch.save({name: value.cpu() for name, value in weights.items()}, folder / "state.pt")
        outcome = Outcome(
            {name: getattr(job.task, name) for name in TRAVELS},
            job.data.split,
            torch.initial_seed(),
            interrupted,
            [pack(one) for one in travellers(options)],
            diverged,
        )
        (folder / "outcome.pkl").write_bytes(cloudpickle.dumps(outcome))


def main() -> None:
    """Entry point of the process."""
    folder, channel = Path(sys.argv[1]), Channel(Connection(int(sys.argv[2])))
    rank = int(os.environ["LOCAL_RANK"])
    if rank == 0:
        sys.stdout = channel
        warnings.showwarning = channel.warn
    try:
        work(folder, channel, rank)
        channel.send("done")
    except BaseException as error:
        channel.send("error", (time.monotonic(), portable(error), traceback.format_exc()))
        os._exit(1)


def portable(error: BaseException) -> Exception:
    """The error, or, where it cannot travel, one of the same words."""
    try:
        restored = cloudpickle.loads(cloudpickle.dumps(error))
    except Exception:  # an error class may hold anything
        restored = None
    return restored if isinstance(restored, Exception) else RuntimeError(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
