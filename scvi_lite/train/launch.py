"""Several devices from a notebook: fresh worker processes for each training.

A notebook cannot be run again by every process, as a script can, and a fork of its kernel inherits a CUDA context and
thread pools that do not survive it. So each ``train()`` starts new Python processes that import this package, read the
cells from memory-mapped files, train by the same :func:`~scvi_lite.train.fit.run` as everywhere, and hand weights and
history back. Nothing is left behind, so any number of models can be trained in one session.
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection, Listener, wait
from pathlib import Path
from types import FrameType
from typing import Any

import cloudpickle
import torch

from scvi_lite.data.datamodule import CellDataModule
from scvi_lite.data.shared import write_store
from scvi_lite.train.strategies import as_list
from scvi_lite.train.task import Task, TrainingDivergedError

PATIENCE = 5.0  # seconds that workers get to end by themselves before they are killed
CONNECT = 300.0  # seconds for all workers to start: importing PyTorch from a network disk can take minutes


class WorkerError(RuntimeError):
    """A worker process failed; the message holds its traceback."""


@dataclass
class Job:
    """What a worker needs, written once for all of them; the cells are in files beside it."""

    task: Task
    data: CellDataModule
    stopping: Any
    options: dict[str, Any]
    n_workers: int


@dataclass
class Outcome:
    """What the first worker hands back."""

    history: dict[str, dict[int, float]]
    split: Any
    interrupted: bool
    callbacks: list[dict[str, Any]]
    diverged: str | None = None


def launch(task: Task, data: CellDataModule, stopping: Any, options: dict[str, Any], n_workers: int) -> bool:
    """Train in ``n_workers`` fresh processes; the task, its module and the data module end as after a training here.

    Returns
    -------
    Whether the user interrupted.

    Raises
    ------
    WorkerError
        If a worker fails or dies; the others are ended and the model is as it was.
    TrainingDivergedError
        As everywhere; the task holds the last good weights.
    """
    with tempfile.TemporaryDirectory(prefix="scvi_lite_") as name:
        folder = Path(name)
        write_store(data.store, data.source, folder)
        store, data.store = data.store, None
        try:
            (folder / "job.pkl").write_bytes(cloudpickle.dumps(Job(task, data, stopping, options, n_workers)))
        finally:
            data.store = store
        with Workers(folder, n_workers, options) as workers:
            interrupted = workers.attend()
        outcome: Outcome = cloudpickle.loads((folder / "outcome.pkl").read_bytes())
        state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
    task.module.load_state_dict({name: value.to(task.device) for name, value in state.items()})
    task.last_good = state
    task.epoch_history = outcome.history
    data.split = outcome.split
    for callback, callback_state in zip(as_list(options.get("callbacks")), outcome.callbacks, strict=True):
        callback.load_state_dict(callback_state)
    if outcome.diverged is not None:
        raise TrainingDivergedError(outcome.diverged)
    return interrupted or outcome.interrupted


class Workers:
    """The processes of one training, seen from the notebook."""

    def __init__(self, folder: Path, n_workers: int, options: dict[str, Any]):
        self.folder, self.n_workers = folder, n_workers
        self.show_progress = options.get("enable_progress_bar", True)
        self.processes: list[subprocess.Popen[bytes]] = []
        self.connections: dict[Connection, int] = {}
        self.interrupts = 0

    def __enter__(self) -> Workers:
        key = secrets.token_bytes(16)
        self.listener = Listener(authkey=key)
        environment = os.environ | {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "WORLD_SIZE": str(self.n_workers),
            "NODE_RANK": "0",
            "SCVI_LITE_KEY": key.hex(),
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        }
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // self.n_workers)))
        address = self.listener.address
        command = [sys.executable, "-m", "scvi_lite.train.worker", str(self.folder), str(address)]
        for rank in range(self.n_workers):
            with open(self.folder / f"stderr_{rank}.txt", "wb") as errors:
                process = subprocess.Popen(
                    command,
                    env=environment | {"LOCAL_RANK": str(rank)},
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=errors,
                    start_new_session=True,  # an interrupt reaches the notebook only, which passes it on
                )
            self.processes.append(process)
        return self

    def __exit__(self, *error: object) -> None:
        self.listener.close()
        for process in self.processes:
            if process.poll() is None:
                process.terminate()
        deadline = time.monotonic() + PATIENCE
        for process in self.processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for connection in self.connections:
            connection.close()

    def attend(self) -> bool:
        """Show progress and pass on interrupts until all workers are done. Whether there was an interrupt."""
        main = threading.current_thread() is threading.main_thread()
        before = signal.signal(signal.SIGINT, self._interrupt) if main else None
        try:
            self._connect()
            self._listen()
        finally:
            if main:
                signal.signal(signal.SIGINT, before)
        return self.interrupts > 0

    def _interrupt(self, signum: int, frame: FrameType | None) -> None:
        self.interrupts += 1
        if self.interrupts > 1:
            raise KeyboardInterrupt
        for connection, rank in self.connections.items():
            if rank == 0:
                connection.send("stop")

    def _connect(self) -> None:
        """Wait for every worker to call, or for one to die."""

        def accept() -> None:
            while len(self.connections) < self.n_workers:
                try:
                    connection = self.listener.accept()
                    self.connections[connection] = connection.recv()
                except (OSError, EOFError):  # closed because a worker died
                    return

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        deadline = time.monotonic() + CONNECT
        while thread.is_alive():
            thread.join(0.1)
            self._raise_if_dead()
            if time.monotonic() > deadline:
                raise WorkerError(f"Not all {self.n_workers} workers started within {CONNECT:.0f} seconds.")

    def _listen(self) -> None:
        from scvi_lite.train.progress import choose_display

        bar = choose_display() if self.show_progress else None
        done: set[int] = set()
        try:
            while len(done) < self.n_workers:
                for connection in wait(list(self.connections), timeout=0.5):
                    rank = self.connections[connection]
                    try:
                        kind, content = connection.recv()
                    except (EOFError, OSError):
                        self._lost(connection, rank, done)
                        continue
                    if kind == "progress" and bar is not None:
                        bar.show(*content)
                    elif kind == "print":
                        sys.stdout.write(content)
                    elif kind == "error":
                        raise content[0] from WorkerError(content[1])
                    elif kind == "done":
                        done.add(rank)
        finally:
            if bar is not None:
                bar.close()

    def _lost(self, connection: Connection, rank: int, done: set[int]) -> None:
        """A worker hung up: fine if it was done."""
        del self.connections[connection]
        connection.close()
        if rank not in done:
            self.processes[rank].wait(PATIENCE)
            self._raise_if_dead(rank)

    def _raise_if_dead(self, rank: int | None = None) -> None:
        ranks = range(self.n_workers) if rank is None else [rank]
        for r in ranks:
            code = self.processes[r].poll()
            if code is not None:
                how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
                likely = " (out of memory, perhaps)" if code == -signal.SIGKILL else ""
                output = (self.folder / f"stderr_{r}.txt").read_text(errors="replace")[-4000:]
                raise WorkerError(f"Worker {r} of {self.n_workers} {how}{likely}. What it said last:\n{output}")


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
