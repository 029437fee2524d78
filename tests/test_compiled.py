"""Shares of rows on the threads of PyTorch."""

import threading

import pytest
import torch

from scvi_lite import _compiled
from scvi_lite._compiled import on_threads


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


def test_a_share_that_nobody_took_is_an_interrupt(four_threads, monkeypatch):
    monkeypatch.setattr(_compiled._Shares, "take", lambda self: None)
    monkeypatch.setattr(_compiled, "_openmp", lambda: None)
    with pytest.raises(KeyboardInterrupt):
        on_threads(lambda first, last: None, 4, 4)
