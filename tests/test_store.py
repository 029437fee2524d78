"""Cells in memory and in files: what is gathered is what was stored, in the order asked for, in bounded memory."""

import tracemalloc

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from scvi_lite.data import checks, disk, fields, registry, rows, store
from scvi_lite.data.batch import Counts

WIDTHS = ["bool", "u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8", "g"]
KINDS = {
    "dense": np.asarray,
    "fortran": np.asfortranarray,
    "csr": sp.csr_matrix,
    "csc": sp.csc_matrix,
    "csr_array": sp.csr_array,
    "csc_array": sp.csc_array,
}


def untidy(x_ng, seed=0):
    """CSR with the same sums, but explicit zeros, entries in two parts, and columns in any order."""
    rng = np.random.default_rng(seed)
    n, g = x_ng.shape
    row, col = np.divmod(np.tile(rng.permutation(n * g), 2), g)
    part = x_ng // 2
    value = np.concatenate([part.ravel(), (x_ng - part).ravel()])[np.r_[row * g + col + np.repeat([0, n * g], n * g)]]
    order = np.argsort(row, kind="stable")
    start = np.arange(0, 2 * n * g + 1, 2 * g)
    return sp.csr_matrix((value[order], col[order], start), shape=(n, g))


def made(matrix, **obs):
    adata = anndata.AnnData(matrix)
    adata.obs = pd.DataFrame(obs, index=adata.obs_names)
    return adata


def registered(adata, layer=None):
    several = [fields.Categoricals("cats_nc", "cats", None), fields.Continuouses("conts_nd", "conts", None)]
    one = [fields.Categorical("batch_n", "batch_key", None), fields.Categorical("label_n", "labels_key", None)]
    return registry.register(adata, "SCVI", [fields.Matrix("x", layer), *one, *several], {})


def both(adata, layer=None):
    setup = registered(adata, layer)
    return store.load(adata, setup), disk.LazyStore(adata, setup)


counts = hnp.arrays(np.int64, hnp.array_shapes(min_dims=2, max_dims=2, max_side=9), elements=st.integers(0, 100))


@given(counts, st.sampled_from(WIDTHS), st.sampled_from(list(KINDS)), st.data())
def test_stores_give_the_rows_asked_for(x_ng, width, kind, data):
    x_ng = x_ng.astype(width)
    row_n = torch.tensor(data.draw(st.lists(st.integers(0, len(x_ng) - 1), max_size=12)), dtype=torch.int64)
    for cells in both(made(KINDS[kind](x_ng))):
        batch = cells[row_n]
        expected = x_ng[row_n.numpy()].astype(np.float32)
        assert np.array_equal(batch.x.x_ng.numpy(), expected)
        assert np.array_equal(batch.total_n.numpy(), expected.sum(1))
        assert batch.row_n.tolist() == row_n.tolist()
        assert batch.x.n_cells == batch.n_cells == len(row_n)
        assert (batch.x.value_m != 0).all()
        assert batch.x.start.dtype == batch.x.row_m.dtype == batch.x.col_m.dtype == torch.int64
        assert batch.x.value_m.dtype == torch.float32


@pytest.mark.parametrize("dtype", ["float16", ">f4", ">i4"])
def test_number_types_that_scipy_does_not_know(dtype):
    x_ng = np.arange(12).reshape(4, 3)
    for cells in both(made(x_ng.astype(dtype))):
        assert np.array_equal(cells[torch.arange(4)].x.x_ng.numpy(), x_ng)


@given(counts)
def test_untidy_sparse_data_are_read_right_and_left_alone(x_ng):
    matrix = untidy(x_ng.astype(np.uint8))
    before = [array.copy() for array in (matrix.data, matrix.indices, matrix.indptr)]
    for cells in both(made(matrix)):
        assert np.array_equal(cells[torch.arange(len(x_ng))].x.x_ng.numpy(), x_ng)
    assert all(map(np.array_equal, before, (matrix.data, matrix.indices, matrix.indptr)))


def test_entries_in_parts_do_not_overflow_their_type():
    matrix = sp.csr_matrix((np.array([200, 200], np.uint8), np.array([0, 0]), np.array([0, 2])), shape=(1, 2))
    for cells in both(made(matrix)):
        assert cells[torch.tensor([0])].x.x_ng.tolist() == [[400.0, 0.0]]


def test_indices_of_64_bits():
    x_ng = np.random.default_rng(0).poisson(1, (20, 5))
    matrix = sp.csr_matrix(x_ng)
    matrix.indptr, matrix.indices = matrix.indptr.astype(np.int64), matrix.indices.astype(np.int64)
    for cells in both(made(matrix)):
        assert np.array_equal(cells[torch.arange(20)].x.x_ng.numpy(), x_ng)


@pytest.mark.parametrize(
    ("largest", "dtype"),
    [
        (0, torch.uint8),
        (255, torch.uint8),
        (256, torch.int16),
        (40_000, torch.int32),
        (2.0**31, torch.float32),
        (2.5, torch.float32),
    ],
)
@pytest.mark.parametrize("given_as", ["f4", "f8"])
def test_counts_are_stored_as_narrowly_as_they_fit(largest, dtype, given_as):
    compact = store.CompactCSR.from_matrix(np.array([[0, 1, largest]], dtype=given_as))
    assert compact.value.dtype == dtype
    assert compact.gather(torch.tensor([0])).x_ng.tolist() == [[0.0, 1.0, largest]]


def test_blocks_of_different_width_join(monkeypatch):
    monkeypatch.setattr(rows, "CHUNK", 4)
    x_ng = np.array([[0, 1], [0, 0], [300, 0], [70_000, 0], [0.5, 2.0]])
    assert np.array_equal(store.read_rows(x_ng).gather(torch.arange(5)).x_ng.numpy(), x_ng.astype(np.float32))


def test_totals_over_blocks_and_empty_rows(monkeypatch):
    monkeypatch.setattr(rows, "BLOCK", 7)
    x_ng = np.random.default_rng(0).poisson(0.5, (50, 6))
    x_ng[[0, 10, 11, 49]] = 0
    assert np.array_equal(store.read_rows(sp.csr_matrix(x_ng)).totals().numpy(), x_ng.sum(1))


def test_a_share_of_a_store_keeps_the_numbers_of_its_cells():
    x_ng = np.random.default_rng(0).poisson(1, (30, 4))
    row_n = torch.tensor([7, 2, 29, 11])
    for cells in both(made(x_ng)):
        part = cells.take(row_n).to("cpu")
        assert len(part) == 4
        batch = part[torch.tensor([3, 0])]
        assert batch.row_n.tolist() == [11, 7]
        assert np.array_equal(batch.x.x_ng.numpy(), x_ng[[11, 7]])
        assert torch.equal(torch.cat([b.row_n for b in part.batches(3)]), row_n)


@pytest.mark.parametrize("n", [0, 1, 7, 50])
def test_rows_are_copied_in_blocks(n, monkeypatch):
    monkeypatch.setattr(store, "ROWS", 7)
    x_ng = np.random.default_rng(0).poisson(0.5, (30, 6))
    row_n = torch.randint(30, (n,))
    part = store.read_rows(x_ng).take(row_n)
    assert len(part) == n
    assert np.array_equal(part.gather(torch.arange(n)).x_ng.numpy(), x_ng[row_n.numpy()])


def test_a_part_of_a_store_shares_its_memory_until_it_is_moved():
    x_ng = np.random.default_rng(0).poisson(1, (30, 4))
    cells, _ = both(made(x_ng))
    part = cells.take(torch.tensor([1, 3]))
    assert part.to("cpu") is part
    assert part.x is cells.x
    assert len(part.to("meta").x) == 2


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int32, np.int64, np.uint8])
@pytest.mark.parametrize("spoil", ["nothing", "order", "zero", "twice"])
def test_rows_are_gathered_as_scipy_gives_them(dtype, spoil, monkeypatch):
    monkeypatch.setattr("scvi_lite._compiled.MIN_WORK", 8)  # so that threads share even few rows
    x_ng = np.random.default_rng(0).poisson(0.8, (40, 6)).astype(dtype)
    x_ng[0], x_ng[7] = [1, 2, 0, 3, 0, 0], 0
    matrix = sp.csr_matrix(x_ng)
    if spoil == "order":
        matrix.indices[:2], matrix.data[:2] = [1, 0], [2, 1]
    elif spoil == "zero":
        matrix.data[0] = 0
    elif spoil == "twice":
        matrix.indices[1] = 0
    asked, place_n = np.array([3, 0, 7, 7, 39, 1]), np.arange(-1, 39)
    for source in (rows.Rows(matrix.copy()), rows.Rows(matrix.copy(), place_n)):
        expected = source[asked]
        counts, total_n = source.gather(asked)
        assert np.array_equal(counts.start.numpy(), expected.indptr)
        assert np.array_equal(counts.col_m.numpy(), expected.indices)
        assert np.array_equal(counts.value_m.numpy(), expected.data)
        assert np.array_equal(counts.row_m.numpy(), np.repeat(np.arange(6), np.diff(expected.indptr)))
        assert np.array_equal(total_n.numpy(), np.ravel(expected.sum(1)))


def test_counts_can_be_mapped_summed_and_read_from_dense():
    x_ng = torch.tensor([[0.0, 2.0], [0.0, 0.0], [3.0, 4.0]])
    x = Counts.from_dense(x_ng)
    assert torch.equal(x.x_ng, x_ng)
    assert x.start.tolist() == [0, 1, 1, 3]
    assert torch.equal(x.sum_rows(x.value_m), x_ng.sum(1))
    assert torch.equal(x.map(torch.log1p).x_ng, x_ng.log1p())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_dense_matrix_of_every_type_and_with_gradients(dtype):
    x_ng = torch.tensor([[0.0, 2.0], [0.0, 0.0], [3.0, 4.0]], dtype=dtype)
    x = Counts.from_dense(x_ng)
    assert x.x_ng.dtype == dtype
    assert torch.equal(x.x_ng, x_ng)
    x.value_m.requires_grad_()
    x.x_ng.square().sum().backward()
    assert x.value_m.grad.tolist() == [4.0, 6.0, 8.0]


def test_a_cell_without_counts_has_log_library_zero():
    cells, _ = both(made(np.array([[0, 0], [3, 4]])))
    assert torch.allclose(cells[torch.arange(2)].library_n, torch.tensor([0.0, 1.9459101]))


# Files ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["csr", "csc", "dense"])
def on_disk(request, tmp_path):
    """A backed AnnData with its counts."""
    x_ng = np.random.default_rng(0).poisson(0.7, (60, 9)).astype(np.float32)
    made(KINDS[request.param](x_ng)).write_h5ad(tmp_path / "cells.h5ad")
    adata = anndata.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    yield adata, x_ng
    adata.file.close()


@pytest.mark.parametrize(
    "asked", [[], [5], [5, 6, 7], [59, 0, 30], [4, 4, 4], [9, 8, 7, 7, 8, 9], list(range(60)), list(range(59, -1, -1))]
)
def test_files_give_rows_in_the_asked_order(on_disk, asked):
    adata, x_ng = on_disk
    for cells in both(adata):
        batch = cells[torch.tensor(asked, dtype=torch.int64)]
        assert np.array_equal(batch.x.x_ng.numpy(), x_ng[asked])
        assert np.array_equal(batch.total_n.numpy(), x_ng[asked].sum(1))


def test_a_view_of_a_file(on_disk):
    adata, x_ng = on_disk
    setup, back = registered(adata), list(range(8, -1, -1))
    for view, expected in ((adata[[7, 3, 3]], x_ng[[7, 3, 3]]), (adata[:, back], x_ng[:, back])):
        for cells in (store.load(view, setup), disk.LazyStore(view, setup)):
            assert np.array_equal(cells[torch.arange(len(expected))].x.x_ng.numpy(), expected)


def test_files_that_do_not_fit_are_read_as_needed(on_disk, monkeypatch):
    adata, x_ng = on_disk
    setup = registered(adata)
    assert isinstance(disk.load_for_training(adata, setup), store.CellStore)
    monkeypatch.setattr(disk, "_free_memory", lambda: 100)
    cells = disk.load_for_training(adata, setup)
    assert isinstance(cells, disk.LazyStore)
    assert np.array_equal(cells[torch.arange(60)].x.x_ng.numpy(), x_ng)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A matrix that is 64 MB when dense, and two files with it."""
    x_ng = np.random.default_rng(0).binomial(3, 0.01, (4_000, 4_000)).astype(np.float32)
    folder = tmp_path_factory.mktemp("large")
    made(sp.csr_matrix(x_ng)).write_h5ad(folder / "csr.h5ad")
    made(sp.csc_matrix(x_ng)).write_h5ad(folder / "csc.h5ad")
    made(x_ng).write_h5ad(folder / "dense.h5ad")
    return folder, x_ng.nbytes


@pytest.mark.parametrize("kind", ["csr", "csc", "dense"])
@pytest.mark.parametrize("backed", [True, False])
def test_no_large_part_is_ever_dense(large, kind, backed, monkeypatch):
    """Setup, reading everything, and reading minibatches: the memory in use stays far below the dense matrix."""
    folder, dense_bytes = large
    monkeypatch.setattr(checks, "CHUNK", 1 << 17)
    monkeypatch.setattr(rows, "CHUNK", 1 << 17)
    adata = anndata.read_h5ad(folder / f"{kind}.h5ad", backed="r" if backed else None)
    tracemalloc.start()
    try:
        cells, lazy = both(adata)
        for row_n in torch.randperm(4_000)[:512].split(128):
            assert lazy[row_n].n_cells == cells[row_n].n_cells == 128
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        if backed:
            adata.file.close()
    assert peak < dense_bytes / 4


def test_reading_takes_few_bytes_for_each_non_zero():
    matrix = sp.random(20_000, 500, 0.2, "csr", random_state=0, data_rvs=lambda m: np.full(m, 3.0)).astype(np.float32)
    adata = made(matrix)
    setup = registered(adata)
    tracemalloc.start()
    cells = store.load(adata, setup)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak / matrix.nnz < 2  # blocks of totals; the matrix of the user is used as it is
    assert np.shares_memory(cells.x.value.numpy(), adata.X.data)
    assert store.CellStore({"x": cells.x.compact()}, cells.cells).n_bytes / matrix.nnz < 4


def test_matrices_in_another_form_are_read_compactly():
    matrix = sp.random(20_000, 500, 0.2, "csc", random_state=0, data_rvs=lambda m: np.full(m, 3.0))
    adata = made(matrix)
    setup = registered(adata)
    tracemalloc.start()
    cells = store.load(adata, setup)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert cells.n_bytes / matrix.nnz < 4
    assert peak / matrix.nnz < 24


@pytest.mark.gpu
def test_a_store_on_a_gpu_gathers_the_same():
    x_ng = np.random.default_rng(0).poisson(0.3, (200, 40))
    cells, _ = both(made(sp.csr_matrix(x_ng)))
    on_gpu = cells.to("cuda")
    for row_n in (torch.tensor([5, 199, 5, 0]), torch.tensor([], dtype=torch.int64), torch.randperm(200)):
        batch, expected = on_gpu[row_n], cells[row_n]
        assert on_gpu.device.type == batch.x.start.device.type == batch.x.value_m.device.type == "cuda"
        assert torch.equal(batch.x.x_ng.cpu(), expected.x.x_ng)
        assert torch.equal(batch.total_n.cpu(), expected.total_n)
        assert torch.equal(batch.x.row_m.cpu(), expected.x.row_m)
