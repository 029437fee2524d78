"""Shares of rows on the threads of PyTorch; loops that give the same wherever their arrays lie; drawn dropout."""

import importlib.util
import itertools
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

from scvi_lite import _compiled
from scvi_lite._compiled import on_threads
from scvi_lite.distributions import binary_kernels, kernels
from scvi_lite.nn.dropout_kernels import kept_units


@pytest.fixture(params=["openmp", "pool"])
def four_threads(request, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(_compiled, "MIN_WORK", 1)
    if request.param == "pool":
        monkeypatch.setattr(_compiled, "_openmp", lambda: None)
    elif _compiled._openmp() is None:
        pytest.skip("PyTorch has no OpenMP that can be asked")


def test_every_row_is_in_one_share_and_answers_come_in_order(four_threads):
    for n in (1, 3, 4, 5, 1000):
        shares = on_threads(lambda first, last: (first, last), n, n)
        assert len(shares) == min(4, n)
        assert [row for first, last in shares for row in range(first, last)] == list(range(n))


def test_shares_run_at_the_same_time(four_threads):
    meeting = threading.Barrier(2, timeout=20)  # each waits for another
    on_threads(lambda first, last: meeting.wait(), 2, 2)


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
@pytest.mark.parametrize("where", [0, 3])
def test_an_error_in_a_share_is_raised_for_the_caller(four_threads, error, where):
    def share(first, last):
        if first == where:
            raise error

    with pytest.raises(type(error)):
        on_threads(share, 4, 4)
    assert on_threads(lambda first, last: first, 4, 4) == [0, 1, 2, 3]


def test_an_interrupt_that_python_drops_is_raised_though_others_take_all_shares(monkeypatch):
    here, take = threading.get_ident(), _compiled._Shares.take
    monkeypatch.setattr(_compiled, "MIN_WORK", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(_compiled, "_openmp", lambda: None)
    monkeypatch.setattr(_compiled._Shares, "take", lambda self: None if threading.get_ident() == here else take(self))
    with pytest.raises(KeyboardInterrupt):
        on_threads(lambda first, last: None, 4, 4)


def test_openmp_is_asked_for_all_threads_as_it_ends_those_left_out(monkeypatch):
    asked = []
    monkeypatch.setattr(_compiled, "_openmp", lambda: lambda call, n: (asked.append(n), call.shares.take()))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert on_threads(lambda first, last: last - first, 1000, 2 * _compiled.MIN_WORK) == [500, 500]
    assert asked == [4]


@pytest.mark.skipif(_compiled._openmp() is None, reason="PyTorch has no OpenMP that can be asked")
def test_threads_without_a_share_do_not_ask_for_the_interpreter(monkeypatch):
    came, take = [], _compiled._Shares.take
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    monkeypatch.setattr(_compiled._Shares, "take", lambda self: (came.append(threading.get_ident()), take(self)))
    for n_shares in (2, 3):
        came.clear()
        assert len(on_threads(lambda first, last: None, 1000, n_shares * _compiled.MIN_WORK)) == n_shares
        assert len(set(came)) == len(came) == n_shares


def test_where_nothing_can_be_written_functions_are_compiled_anew():
    code = """
import numba.core.caching, torch
numba.core.caching.CacheImpl._locator_classes = []
from scvi_lite.data.batch import Counts
from scvi_lite.distributions import binary_kernels, kernels, sparse_kernels
from scvi_lite.nn import label_kernels, mixing_kernels
assert torch.equal(Counts.from_dense(torch.eye(3)).x_ng, torch.eye(3))
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def row(*n_rows):  # as short as a few steps of a loop
    return np.random.default_rng(0).uniform(0.1, 3, (*n_rows, 20)).astype(np.float32)


LOOPS = {
    "genes": (kernels.dense_row, 0, 0, 0, *map(np.float32, (1, 3, -0.1)), row(), row(), *(row(1) for _ in range(5)))
    + (row(), row(1), row(1), row(1)),
    "regions": (binary_kernels.zeros_row, 0, *map(np.float32, (-0.1, 0.4, 0.6)), row(), row(1), row(), row())
    + (row(1), row()),
}


def call(function, *arguments, order, gap):
    """Everything that a function gives and writes, its arrays laid out in this order, so many bytes apart."""
    memory, begin, placed = np.zeros(1 << 16, np.uint8), 0, list(arguments)
    for i in order:
        given = arguments[i]
        placed[i] = memory[begin : begin + given.nbytes].view(given.dtype).reshape(given.shape)
        placed[i][:] = given
        begin += given.nbytes + gap
    return function(*placed), *(placed[i].tobytes() for i in sorted(order))


@pytest.mark.parametrize("name", LOOPS)
def test_results_are_the_same_wherever_arrays_lie(name):
    arrays = [i for i, argument in enumerate(LOOPS[name][1:]) if isinstance(argument, np.ndarray)]
    far = call(*LOOPS[name], order=arrays, gap=2048)
    for first, second in itertools.permutations(arrays, 2):
        others = [i for i in arrays if i not in (first, second)]
        assert call(*LOOPS[name], order=[first, second, *others], gap=16) == far, (first, second)


def test_results_on_disk_are_dropped_when_a_file_of_compiled_functions_is_younger(tmp_path):
    (tmp_path / "small.py").write_text("def grow(x):\n    return x + 1\n")
    spec = importlib.util.spec_from_file_location("small", tmp_path / "small.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    make = _compiled.compiled.__wrapped__
    assert make(module.grow)(1) == 2
    (index,) = tmp_path.rglob("*.nbi")
    make(module.grow)
    assert index.exists()
    os.utime(index, (0, 0))
    make(module.grow)
    assert not index.exists()


def test_results_on_disk_that_another_process_drops_are_no_error(tmp_path, monkeypatch):
    def grow(x):
        return x + 1

    monkeypatch.setattr(_compiled.Path, "glob", lambda self, pattern: [tmp_path / "gone.nbi"])
    assert _compiled.compiled.__wrapped__(grow)(1) == 2


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9999])
def test_dropout_leaves_out_a_share_of_units_at_random(rate):
    torch.manual_seed(0)
    drawn = torch.stack([kept_units(128, 64, rate) for _ in range(200)])
    torch.manual_seed(0)
    assert torch.equal(kept_units(128, 64, rate), drawn[0])
    torch.testing.assert_close(drawn.max(), torch.tensor(1 / (1 - rate)), rtol=1e-3, atol=0)
    out = ((drawn == 0).double() - rate) / (rate * (1 - rate)) ** 0.5  # of mean 0 and variance 1
    flat, n = out.flatten(1), out.numel()
    shifted = [flat[:, lag:] * flat[:, :-lag] for lag in (1, 2, 7, 64, 128)]
    for product in (out, flat[1:] * flat[:-1], *shifted):  # the share, and correlations
        assert abs(product.mean()) < 5 / n**0.5
