"""Worker processes as forks of one that has imported what they need: the same work, without ten seconds of imports."""

import multiprocessing
import multiprocessing.connection
import os
import subprocess
import sys

import torch

from scvi_lite.train import worker

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([worker.__name__, "pytest"])  # what is found without the paths of the tests
DEVNULL, TimeoutExpired = subprocess.DEVNULL, subprocess.TimeoutExpired


class Popen:
    """What :mod:`scvi_lite.train.processes` asks of ``subprocess.Popen``."""

    def __init__(self, command, env, stdin, stdout, stderr, pass_fds, start_new_session):
        *_, folder, _ = command
        (connection,) = pass_fds
        talk, errors = multiprocessing.connection.Connection(os.dup(connection)), stderr.name
        self.process = CONTEXT.Process(target=be_worker, args=(folder, talk, errors, env, os.getcwd()))
        self.process.start()
        talk.close()
        self.pid = self.process.pid

    def wait(self, timeout=None):
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise TimeoutExpired("worker", timeout)
        return self.process.exitcode


def be_worker(folder, talk, errors, variables, place):
    """What a fresh process does that is started with these variables in this place."""
    os.setsid()
    os.chdir(place)
    os.environ.clear()
    os.environ.update(variables)
    torch.set_num_threads(int(variables["OMP_NUM_THREADS"]))  # which PyTorch read before the fork
    os.dup2(os.open(errors, os.O_WRONLY | os.O_APPEND), 2)
    sys.argv = ["worker", folder, str(talk.fileno())]
    worker.main()
