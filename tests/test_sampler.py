"""Which rows a rank sees, and in which order."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from scvi_lite.data.sampler import SequentialSampler, TrainingSampler, shard, split_rows

cells, sizes, worlds = st.integers(2, 300), st.integers(2, 70), st.integers(1, 9)


def samplers(n, batch_size, world, seed=0, **options):
    """The sampler of each rank, with the rows of that rank, as the data module makes them."""
    rows = torch.arange(n)
    shards = [shard(rows, rank, world) for rank in range(world)]
    makes = [
        TrainingSampler(len(part), batch_size, seed, n_fewest=n // world, rank=rank, **options)
        for rank, part in enumerate(shards)
    ]
    return list(zip(makes, shards, strict=True))


def epoch_of(sampler, epoch):
    sampler.set_epoch(epoch)
    return [row_n.tolist() for row_n in sampler]


@given(cells, sizes, worlds)
def test_an_epoch_uses_each_cell_once_in_equal_steps_and_no_step_has_one_cell(n, batch_size, world):
    assume(n >= 2 * world)
    steps, seen = set(), []
    for sampler, rows in samplers(n, batch_size, world):
        batches = epoch_of(sampler, 0)
        steps.add(len(batches))
        assert len(sampler) == len(batches)
        assert all(2 <= len(batch) <= batch_size + 2 for batch in batches)
        seen += [int(rows[i]) for batch in batches for i in batch]
    assert len(steps) == 1
    assert sorted(seen) == list(range(n))


@given(cells, sizes, st.integers(2, 5))
def test_dealt_out_anew_each_cell_is_used_once_and_by_another_rank_in_another_epoch(n, batch_size, world):
    assume(n >= 2 * world)
    ranks = [TrainingSampler(n, batch_size, 0, n_fewest=n // world, rank=rank, deal_to=world) for rank in range(world)]
    epochs = [[sum(epoch_of(sampler, epoch), []) for sampler in ranks] for epoch in range(6)]
    for dealt in epochs:
        assert sorted(sum(dealt, [])) == list(range(n))
    assert len({len(sampler) for sampler in ranks}) == 1
    assert n < 20 or len({tuple(sorted(dealt[0])) for dealt in epochs}) > 1


@given(cells, sizes, worlds)
def test_drop_last_keeps_whole_minibatches_only(n, batch_size, world):
    assume(n // world >= batch_size)
    batches = [epoch_of(sampler, 0) for sampler, _ in samplers(n, batch_size, world, drop_last=True)]
    assert {len(one) for one in batches} == {(n // world) // batch_size}
    assert {len(batch) for one in batches for batch in one} == {batch_size}


def test_drop_last_with_less_than_a_minibatch_trains_on_what_there_is():
    assert [len(batch) for batch in TrainingSampler(7, 10, 0, drop_last=True)] == [7]


@given(st.integers(-(1 << 40), 1 << 64), st.integers(0, 1000))
def test_order_is_reproducible_and_new_in_each_epoch_for_each_seed_and_rank(seed, epoch):
    def order(seed, epoch, rank):
        return epoch_of(TrainingSampler(100, 30, seed, rank=rank), epoch)

    here = order(seed, epoch, 0)
    assert here == order(seed, epoch, 0)
    assert here not in (order(seed, epoch + 1, 0), order(seed + 1, epoch, 0), order(seed, epoch, 1))


@given(cells, sizes, st.integers(0, 10))
def test_a_resumed_epoch_goes_on_where_it_stopped(n, batch_size, skip):
    whole = epoch_of(TrainingSampler(n, batch_size, 3), 5)
    resumed = TrainingSampler(n, batch_size, 3)
    resumed.skip = min(skip, len(whole) - 1)
    assert epoch_of(resumed, 5) == whole[min(skip, len(whole) - 1) :]
    assert len(epoch_of(resumed, 6)) == len(whole)


@given(st.integers(0, 300), st.integers(1, 70), worlds)
def test_validation_covers_each_cell_once(n, batch_size, world):
    seen = []
    for rank in range(world):
        rows = shard(torch.arange(n), rank, world)
        sampler = SequentialSampler(len(rows), batch_size)
        batches = list(sampler)
        assert len(sampler) == len(batches)
        seen += [int(rows[i]) for batch in batches for i in batch]
    assert sorted(seen) == list(range(n))


def test_minibatches_of_one_cell_are_refused():
    with pytest.raises(ValueError, match="batch_size=1: training needs minibatches of at least 2 cells"):
        TrainingSampler(10, 1, 0)


shares = st.floats(0.01, 1.0)


@given(st.integers(1, 500), shares, st.none() | st.floats(0, 0.99), st.booleans())
def test_split_puts_each_cell_in_one_part(n, train_size, validation_size, shuffle):
    assume(validation_size is None or train_size + validation_size <= 1)
    parts = split_rows(n, train_size, validation_size, shuffle, torch.Generator())
    assert sorted(np.concatenate(parts)) == list(range(n))
    assert len(parts[0]) == int(np.ceil(train_size * n - 1e-9)) >= 1
    assert validation_size is not None or len(parts[2]) == 0
    if not shuffle:
        train, validation, test = parts
        assert np.concatenate([validation, train, test]).tolist() == list(range(n))


def test_split_takes_nine_tenths_unless_told():
    assert [len(part) for part in split_rows(100, None, None, True, torch.Generator())] == [90, 10, 0]
    assert [len(part) for part in split_rows(100, None, 0.25, True, torch.Generator())] == [75, 25, 0]


@pytest.mark.parametrize(
    ("sizes", "names"),
    [
        ((0, None), "train_size=0"),
        ((1.5, None), "train_size=1.5"),
        ((float("nan"), None), "train_size=nan"),
        (("0.9", None), "train_size='0.9'"),
        ((True, None), "train_size=True"),
        ((None, 1.0), "validation_size=1.0"),
        ((0.5, -0.1), "validation_size=-0.1"),
        ((0.9, 0.2), "train_size=0.9 and validation_size=0.2"),
    ],
)
def test_split_refuses_shares_out_of_range(sizes, names):
    with pytest.raises(ValueError, match=names):
        split_rows(100, *sizes, True, torch.Generator())
