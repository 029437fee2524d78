"""A worker process of :mod:`scvi_lite.train.launch`: ``python -m scvi_lite.train.worker FOLDER ADDRESS``."""

from __future__ import annotations

import os
import sys
import threading
import traceback
from multiprocessing.connection import Client, Connection
from pathlib import Path

import cloudpickle
import torch

from scvi_lite.data.shared import read_store
from scvi_lite.train import fit as fitting
from scvi_lite.train.callbacks import StopFlag
from scvi_lite.train.launch import Job, Outcome
from scvi_lite.train.progress import Progress
from scvi_lite.train.strategies import as_list, worker_strategy
from scvi_lite.train.task import TrainingDivergedError


class RemoteDisplay:
    """Sends progress to the notebook, where the bar is."""

    def __init__(self, connection: Connection):
        self.connection = connection

    def show(self, position: float, total: int | None, metrics: dict[str, float]) -> None:
        self.connection.send(("progress", (position, total, metrics)))

    def close(self) -> None:
        pass


class RemoteOutput:
    """A text stream whose lines appear in the notebook."""

    def __init__(self, connection: Connection):
        self.connection = connection

    def write(self, text: str) -> int:
        self.connection.send(("print", text))
        return len(text)

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return False


def obey(connection: Connection, stop: StopFlag) -> None:
    """Wait for the notebook's word to stop; if the notebook is gone, end."""
    try:
        connection.recv()
        stop.request()
        connection.recv()
    except (EOFError, OSError):
        os._exit(1)


def work(folder: Path, connection: Connection, rank: int) -> None:
    """Train one rank's share; the first rank hands the result back."""
    job: Job = cloudpickle.loads((folder / "job.pkl").read_bytes())
    job.data.store = read_store(folder)
    options = job.options | {"strategy": worker_strategy(job.options["strategy"])}
    stop = StopFlag()
    threading.Thread(target=obey, args=(connection, stop), daemon=True).start()
    progress = Progress(RemoteDisplay(connection)) if rank == 0 else None
    diverged, interrupted = None, False
    try:
        _, interrupted = fitting.run(job.task, job.data, job.stopping, options, progress, stop)
        state = job.task.module.state_dict()
    except TrainingDivergedError as error:
        diverged, state = str(error), job.task.last_good
    if rank == 0:
        torch.save({name: value.cpu() for name, value in state.items()}, folder / "state.pt")
        outcome = Outcome(
            job.task.epoch_history,
            job.data.split,
            interrupted,
            [callback.state_dict() for callback in as_list(options.get("callbacks"))],
            diverged,
        )
        (folder / "outcome.pkl").write_bytes(cloudpickle.dumps(outcome))


def main() -> None:
    """Entry point of the process."""
    folder, address = Path(sys.argv[1]), sys.argv[2]
    rank = int(os.environ["LOCAL_RANK"])
    connection = Client(address, authkey=bytes.fromhex(os.environ.pop("SCVI_LITE_KEY")))
    connection.send(rank)
    if rank == 0:
        sys.stdout = RemoteOutput(connection)
    try:
        work(folder, connection, rank)
        connection.send(("done", None))
    except BaseException as error:
        connection.send(("error", (portable(error), traceback.format_exc())))
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
