"""A MuData is read as one table of cells: modalities in any order, cells in any order and only partly shared."""

import warnings

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from anndata import AnnData
from mudata import MuData, read_h5mu, set_options

from scvi_lite.data import registry, store
from scvi_lite.data.disk import LazyStore, load_for_training
from scvi_lite.data.fields import Categorical, Categoricals, Continuous, Continuouses, Matrix
from scvi_lite.data.genes import match_genes
from scvi_lite.data.modalities import read_modalities
from scvi_lite.data.proteins import Proteins
from scvi_lite.data.shared import read_store, write_store

CELLS = ["a", "b", "c", "d", "e", "f"]
RNA = np.arange(1.0, 25.0).reshape(6, 4)  # of cells in the order of their names; cell e has no RNA
PEAKS = np.arange(100.0, 130.0).reshape(6, 5)  # cell b has no peaks
PROTEINS = np.arange(200.0, 212.0).reshape(6, 2)


@pytest.fixture(autouse=True)
def as_it_will_be():
    """mudata changes a default, and warns of it."""
    with set_options(pull_on_update=False):
        yield


def modality(x_nf, cells, name, kind=sp.csr_matrix, **obs):
    rows = [CELLS.index(cell) for cell in cells]
    names = [f"{name}_{i}" for i in range(x_nf.shape[1])]
    frame = pd.DataFrame({key: np.asarray(values)[rows] for key, values in obs.items()}, index=list(cells))
    return AnnData(kind(x_nf[rows].astype(np.float32)), obs=frame, var=pd.DataFrame(index=names))


def make(order=("rna", "peaks", "protein"), kind=sp.csr_matrix):
    parts = {
        "rna": modality(RNA, "dcabf", "gene", kind, batch=["x", "y", "x", "y", "x", "y"], depth=np.arange(6.0)),
        "peaks": modality(PEAKS, "fedca", "peak", kind),
        "protein": modality(PROTEINS, "abcdef", "protein", np.asarray),
    }
    mdata = MuData({name: parts[name] for name in order})[CELLS].copy()
    mdata.obs["batch"] = pd.Categorical(["x", "y", "x", "y", "x", "y"])
    mdata.obs["depth"] = np.arange(6.0)
    return mdata


def fields(batch_modality=None):
    return [
        Matrix("x", None, modality="rna"),
        Matrix("peaks", None, modality="peaks"),
        Proteins("proteins_np", modality="protein"),
        Categorical("batch_n", "batch_key", "batch", modality=batch_modality),
        Categorical("label_n", "labels_key", None),
        Categoricals("cats_nc", "categorical_covariate_keys", ["batch"]),
        Continuouses("conts_nd", "continuous_covariate_keys", ["depth"]),
    ]


def setup(mdata, **options):
    return registry.register(mdata, "Example", fields(**options), {})


def expected(rows):
    has_x, has_peaks = np.array([c != "e" for c in CELLS]), np.array([c != "b" for c in CELLS])
    return (
        RNA[rows] * has_x[rows, None],
        PEAKS[rows] * has_peaks[rows, None],
        PROTEINS[rows],
        has_x[rows],
        has_peaks[rows],
    )


def check(batch, rows):
    rna_ng, peaks_nr, proteins_np, has_x_n, has_peaks_n = expected(rows)
    np.testing.assert_array_equal(batch.x.x_ng, rna_ng)
    np.testing.assert_array_equal(batch.peaks.x_ng, peaks_nr)
    np.testing.assert_array_equal(batch.proteins_np, proteins_np)
    np.testing.assert_array_equal(batch.has_x_n, has_x_n)
    np.testing.assert_array_equal(batch.has_peaks_n, has_peaks_n)
    assert batch.has_proteins_n is None
    np.testing.assert_array_equal(batch.total_n, rna_ng.sum(1))
    np.testing.assert_array_equal(batch.batch_n, np.array(rows) % 2)
    np.testing.assert_array_equal(batch.row_n, rows)


@pytest.mark.parametrize("kind", [sp.csr_matrix, sp.csc_matrix, np.asarray])
@pytest.mark.parametrize("order", [("rna", "peaks", "protein"), ("protein", "peaks", "rna")])
def test_cells_are_matched_by_name(kind, order):
    mdata = make(order, kind)
    setup_of = setup(mdata)
    rows = [4, 1, 0, 1]
    for cells in (store.load(mdata, setup_of), LazyStore(mdata, setup_of), store.load(mdata, setup_of).to("cpu")):
        check(cells[torch.tensor(rows)], rows)
        check(cells.take(torch.tensor([5, 1, 4]))[torch.tensor([2, 1])], [4, 1])


def test_modalities_of_one_order_are_not_copied():
    cells = [c for c in CELLS if c not in "be"]
    mdata = make()[cells].copy()
    for name in mdata.mod:
        mdata.mod[name] = mdata.mod[name][cells].copy()
    mdata.update()
    batch = store.load(mdata, setup(mdata))
    assert np.shares_memory(batch.x.value.numpy(), mdata["rna"].X.data)
    assert batch[torch.tensor([0])].has_x_n is None and batch[torch.tensor([0])].has_peaks_n is None


def test_workers_read_it_from_files(tmp_path):
    mdata = make()
    write_store(store.load(mdata, setup(mdata)), None, tmp_path)
    check(read_store(tmp_path)[torch.tensor([3, 4])], [3, 4])


def test_a_file_stays_a_file(tmp_path, monkeypatch):
    mdata, path = make(kind=np.asarray), tmp_path / "data.h5mu"
    setup_of = setup(mdata)
    mdata.write_h5mu(path)
    backed = read_h5mu(path, backed="r")
    monkeypatch.setattr("scvi_lite.data.disk._free_memory", lambda: 0)
    cells = load_for_training(backed, registry.find(backed, "Example"))
    assert isinstance(cells, LazyStore) and registry.find(backed, "Example") == setup_of
    check(cells[torch.tensor([5, 4])], [5, 4])
    write_store(cells, (str(path), setup_of), tmp_path)
    check(read_store(tmp_path)[torch.tensor([5, 4])], [5, 4])


def test_a_view_has_its_own_cells():
    mdata = make()
    setup_of = setup(mdata)
    batch = store.load(mdata[["e", "c"]], setup_of)[torch.tensor([0, 1])]
    np.testing.assert_array_equal(batch.x.x_ng, [np.zeros(4), RNA[2]])
    np.testing.assert_array_equal(batch.proteins_np, PROTEINS[[4, 2]])


def test_columns_come_from_where_the_user_says():
    mdata = make()
    with pytest.raises(ValueError, match=r"1 of 6 cells have no value in mdata\['rna'\].obs\['batch'\]"):
        setup(mdata, batch_modality="rna")
    mdata = mdata[["a", "b", "c", "d", "f"]].copy()
    del mdata.obs["batch"]
    with pytest.raises(KeyError, match=r"not a column of mdata.obs.*say modalities=\{'batch_key': 'rna'\}"):
        setup(mdata)
    mdata.obs["batch"] = mdata["rna"].obs.pop("batch")
    with pytest.raises(KeyError, match=r"There is mdata.obs\['batch'\]: leave 'batch_key' out of modalities"):
        setup(mdata, batch_modality="rna")
    mdata["rna"].obs["batch"] = mdata.obs.pop("batch")
    field = Categorical("batch_n", "batch_key", "batch", modality="rna")
    np.testing.assert_array_equal(field.read(mdata, field.register(mdata)), [0, 1, 0, 1, 1])
    field = Continuous("size_factor_n", "size_factor_key", "depth", modality="rna")
    np.testing.assert_array_equal(field.read(mdata, field.register(mdata)), [0, 1, 2, 3, 5])


def test_columns_that_disagree_are_not_chosen_between():
    mdata = make()
    mdata["protein"].obs["batch"] = ["x", "y", "x", "y", "x", "x"]
    with pytest.raises(ValueError, match=r"1 cells have another value in mdata\['protein'\].obs.*del mdata"):
        setup(mdata)
    mdata = mdata[["a", "b", "c", "d", "f"]].copy()
    with pytest.warns(
        UserWarning, match=r"mdata\['protein'\].obs than in mdata\['rna'\].obs\['batch'\], which is used"
    ):
        setup_of = registry.register(mdata, "Example", [*fields("rna")[:5], *fields()[6:]], {})
    assert setup_of.fields["batch_n"]["categories"] == ["x", "y"]


def test_modalities_are_named():
    mdata = make()
    arguments, needed = ("rna_layer", "protein_layer", "batch_key"), ("rna_layer", "protein_layer")
    found = read_modalities(mdata, {"protein_layer": "protein", "rna_layer": "rna"}, arguments, needed)
    assert found == {"rna_layer": "rna", "protein_layer": "protein", "batch_key": None}
    with pytest.raises(ValueError, match=r"protein_layer is for. Write modalities=\{'rna_layer': ..., 'protein_lay"):
        read_modalities(mdata, {"rna_layer": "rna"}, arguments, needed)
    with pytest.raises(KeyError, match=r"modalities\['rna_layer'\]='RNA' is not a modality.*Did you mean 'rna'"):
        read_modalities(mdata, {"rna_layer": "RNA", "protein_layer": "protein"}, arguments, needed)
    with pytest.raises(TypeError, match="no option 'rna_key'. Did you mean 'rna_layer'"):
        read_modalities(mdata, {"rna_key": "rna"}, arguments, needed)
    with pytest.raises(TypeError, match="mdata is a AnnData; a MuData"):
        read_modalities(mdata["rna"], {}, arguments, needed)


def spoil(change):
    mdata = make()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = change(mdata)
    return mdata if found is None or isinstance(found, np.ndarray) else found


def rename(mdata, name, axis):
    setattr(mdata[name], f"{axis}_names", [str(i // 2) for i in range(len(getattr(mdata[name], f"{axis}_names")))])


BAD = {
    "an AnnData": (lambda m: m["rna"], TypeError, "mdata is a AnnData; a MuData with the modalities 'rna'"),
    "a path": (lambda m: "data.h5mu", TypeError, r"Read the file first: mudata.read_h5mu"),
    "no such modality": (lambda m: MuData({"RNA": m["rna"]}), KeyError, "'rna' is not a modality.*Did you mean 'RNA'"),
    "no cells": (lambda m: m[[]].copy(), ValueError, "mdata has no cells"),
    "names of features": (lambda m: rename(m, "peaks", "var"), ValueError, r"mdata\['peaks'\].var_names repeat"),
    "names of cells": (lambda m: rename(m, "peaks", "obs"), ValueError, r"mdata\['peaks'\].obs_names repeat"),
    "negative": (
        lambda m: np.negative(m["peaks"].X.data, m["peaks"].X.data),
        ValueError,
        r"mdata\['peaks'\].X holds neg",
    ),
    "NaN": (lambda m: m["protein"].X.__setitem__((0, 0), np.nan), ValueError, r"mdata\['protein'\].X holds NaN"),
    "features shared": (lambda m: MuData(dict(m.mod), axis=1), ValueError, "shares its variables"),
}


@pytest.mark.parametrize(("change", "error", "message"), BAD.values(), ids=BAD)
def test_bad_data_are_refused(change, error, message):
    with pytest.raises(error, match=message):
        setup(spoil(change))


def test_new_data_are_matched_by_name():
    mdata = make()
    setup_of = setup(mdata)
    names = setup_of.var_names(mdata)
    assert match_genes(mdata, names) is mdata
    other = make()
    other.mod["rna"] = other["rna"][:, [2, 0, 3, 1]].copy()
    other.mod["protein"] = other["protein"][:, ::-1].copy()
    other.obs["note"] = list("uvwxyz")
    with pytest.warns(UserWarning, match="are in another order"):
        matched = match_genes(other, names)
    check(store.load(matched, setup_of)[torch.arange(6)], [0, 1, 2, 3, 4, 5])
    assert matched.obs["note"].tolist() == list("uvwxyz")
    other.mod["rna"] = other["rna"][:, :3].copy()
    with pytest.raises(ValueError, match=r"mdata\['rna'\]: 1 of the model's 4 features are not among"):
        match_genes(other, names)
    with pytest.raises(TypeError, match="mdata is a AnnData"):
        match_genes(mdata["rna"], names)
    with pytest.raises(TypeError, match="adata is a MuData; an AnnData is needed. Give one of its modalities"):
        match_genes(mdata, names["rna"])


def test_setup_is_found_again(tmp_path):
    mdata = make()
    setup_of = setup(mdata)
    mdata.write_h5mu(tmp_path / "data.h5mu")
    assert registry.find(read_h5mu(tmp_path / "data.h5mu"), "Example") == setup_of
    with pytest.raises(RuntimeError, match=r"This MuData is not set up for SCVI. It is set up for Example"):
        registry.find(mdata, "SCVI")


def test_proteins_of_obsm():
    adata = AnnData(RNA.astype(np.float32), obs=pd.DataFrame(index=CELLS))
    adata.obsm["protein"] = pd.DataFrame(PROTEINS, index=CELLS, columns=["CD3", "CD4"])
    field = Proteins("proteins_np", "protein")
    state = field.register(adata)
    assert state["names"] == ["CD3", "CD4"]
    adata.obsm["protein"] = adata.obsm["protein"][["CD4", "CD3"]]
    np.testing.assert_array_equal(field.read(adata, state), PROTEINS)
    adata.obsm["array"], adata.uns["names"] = sp.csr_matrix(PROTEINS), ["CD3", "CD4"]
    named = Proteins("proteins_np", "array", "names")
    assert named.register(adata)["names"] == ["CD3", "CD4"]
    np.testing.assert_array_equal(named.read(adata, named.register(adata)), PROTEINS)
    assert Proteins("proteins_np", "array").register(adata)["names"] == ["protein_0", "protein_1"]
    adata.obsm["protein"] = adata.obsm["protein"].rename(columns={"CD3": "CD3_TotalSeq"})
    with pytest.raises(KeyError, match="protein='CD3' is not among those of these data. Did you mean"):
        field.check(adata, state)
    adata.obsm["protein"] = adata.obsm["protein"].astype(str) + " counts"
    with pytest.raises(ValueError, match="not numbers"):
        Proteins("proteins_np", "protein").register(adata)
