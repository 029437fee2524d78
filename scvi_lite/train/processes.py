"""The worker processes of one training: started, listened to, and ended with their children.

The first failure is the one that is raised; the others, which only complain of it, are not.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import warnings
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import cloudpickle

import scvi_lite
from scvi_lite.train.callbacks import StopFlag, handle_interrupts

PATIENCE = 10.0  # seconds that workers get to end by themselves after their work
AFTERMATH = 1.0  # seconds after a failure in which the one that caused it may still be heard of
# What started this session may have left variables that would make a worker look for others than its own.
FOREIGN = ("SLURM_", "TORCHELASTIC_", "ROLE_", "GROUP_", "OMPI_", "PMI_", "PMIX_", "LSB_", "JSM_", "PL_")


class WorkerError(RuntimeError):
    """A worker process failed; the message holds its traceback."""


@dataclass
class Failure:
    """Why a worker ended, and when by the clock that all processes of a machine share."""

    rank: int
    when: float
    error: Exception
    trace: str = ""


def environment(n_workers: int) -> dict[str, str]:
    """Variables of the worker processes; the one that starts each adds ``LOCAL_RANK``."""
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_WORLD_SIZE") and not k.startswith(FOREIGN)}
    package = str(Path(scvi_lite.__file__).parents[1])
    paths = [os.path.abspath(path) for path in sys.path if path]
    return {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // n_workers))} | {
        **kept,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(n_workers),
        "NODE_RANK": "0",
        # The session's paths, and the package from where the session has it, wherever it has gone since.
        "PYTHONPATH": os.pathsep.join(paths if package in paths else [package, *paths]),
    }


class Workers:
    """The processes of one training, seen from the notebook."""

    def __init__(self, folder: Path, n_workers: int, show_progress: bool):
        self.folder, self.n_workers, self.show_progress = folder, n_workers, show_progress
        self.processes: list[subprocess.Popen[bytes]] = []
        self.connections: dict[Connection, int] = {}
        self.stop = StopFlag()

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: Any, *error: object) -> None:
        """Let those that are done end; end the others, with the processes that they started."""
        deadline = time.monotonic() + (PATIENCE if kind is None else 0.0)
        for process in self.processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        for connection in self.connections:
            connection.close()

    def attend(self) -> bool:
        """Start the workers, show progress, pass on interrupts until all are done; whether there was an interrupt."""
        with handle_interrupts(self.stop):
            self._start()
            self._listen()
        return self.stop.requested

    def _start(self) -> None:
        variables = environment(self.n_workers)
        for rank in range(self.n_workers):
            here, there = Pipe()
            command = [sys.executable, "-m", "scvi_lite.train.worker", str(self.folder), str(there.fileno())]
            with open(self.folder / f"stderr_{rank}.txt", "wb") as errors:
                process = subprocess.Popen(
                    command,
                    env=variables | {"LOCAL_RANK": str(rank)},
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL if rank else errors,
                    stderr=errors,
                    pass_fds=[there.fileno()],
                    start_new_session=True,  # an interrupt reaches the notebook only, which passes it on
                )
            there.close()  # so that the connection ends with the worker
            self.processes.append(process)
            self.connections[here] = rank

    def _listen(self) -> None:
        """Until all are done, or a second after the first failure; of several the earliest is raised."""
        from scvi_lite.train.progress import choose_display

        bar = choose_display() if self.show_progress else None
        talking, failures, told = dict(self.connections), [], False
        deadline = float("inf")
        try:
            while talking and time.monotonic() < deadline:
                if self.stop.requested and not told:
                    with suppress(OSError):  # the first is gone already, which is noticed elsewhere
                        next(iter(self.connections)).send("stop")
                    told = True
                spoke = wait(list(talking), timeout=0.1)
                for connection in [c for c in talking if c in spoke]:
                    failure = self._hear(connection, talking, bar)
                    if failure is not None:
                        failures.append(failure)
                        deadline = min(deadline, time.monotonic() + AFTERMATH)
        finally:
            if bar is not None:
                bar.close()
        if failures:
            first = min(failures, key=lambda failure: failure.when)
            raise first.error from (WorkerError(first.trace) if first.trace else None)

    def _hear(self, connection: Connection, talking: dict[Connection, int], bar: Any) -> Failure | None:
        """One message of a worker; one that hangs up before it is done has failed."""
        rank = talking[connection]
        try:
            kind, content = cloudpickle.loads(connection.recv_bytes())
        except (EOFError, OSError):
            del talking[connection]
            return self._lost(rank)
        if kind == "progress" and bar is not None:
            bar.show(*content)
        elif kind == "print":
            sys.stdout.write(content)
        elif kind == "warning":
            warnings.warn_explicit(*content)
        elif kind in ("done", "error"):
            del talking[connection]
        if kind != "error":
            return None
        when, error, trace = content
        return Failure(rank, when, error, f"Worker {rank} of {self.n_workers}:\n{trace}")

    def _lost(self, rank: int) -> Failure:
        """A worker that died without a word: before any that complain of it."""
        try:
            code = self.processes[rank].wait(AFTERMATH)
            how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
            how += " (out of memory, perhaps)" if code == -signal.SIGKILL else ""
        except subprocess.TimeoutExpired:
            how = "hung up"
        output = (self.folder / f"stderr_{rank}.txt").read_text(errors="replace")[-4000:]
        said = f" What it said last:\n{output}" if output.strip() else ""
        return Failure(rank, 0.0, WorkerError(f"Worker {rank} of {self.n_workers} {how}.{said}"))


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
