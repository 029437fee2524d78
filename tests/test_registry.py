"""The setup of one AnnData for one model: read the same from memory and from files, disturbed by nothing."""

import json
import warnings
from pathlib import Path

import anndata
import mudata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st

from scvi_lite.data import registry
from scvi_lite.data.fields import Categorical, Categoricals, Continuous, Continuouses, Matrix


def data(n=8, g=3, **obs):
    adata = anndata.AnnData(np.ones((n, g), np.float32), layers={"raw counts": np.ones((n, g), np.float32)})
    for name, values in obs.items():
        adata.obs[name] = values
    return adata


def register(adata, name="SCVI", batch=None, cats=(), conts=(), layer=None):
    several = [Categoricals("cats_nc", "cats", cats), Continuouses("conts_nd", "conts", conts)]
    one = [Categorical("batch_n", "batch_key", batch), Categorical("label_n", "labels_key", None)]
    arguments = {"batch_key": batch, "layer": layer, "cats": list(cats), "empty": [], "one": ["a"]}
    return registry.register(adata, name, [Matrix("x", layer), *one, *several], arguments)


def test_setups_come_back_from_files_as_they_were(tmp_path):
    adata = data(ints=[3, 1] * 4, texts=["ж/ñ", "3"] * 4, flags=[True, False] * 4, same="one", age=np.arange(8.0))
    written = register(adata, batch="texts", cats=["ints", "flags", "same"], conts=["age"], layer="raw counts")
    other = register(adata, "LinearSCVI")
    adata.write_h5ad(tmp_path / "a.h5ad")
    back = anndata.read_h5ad(tmp_path / "a.h5ad", backed="r")
    for again in (adata, adata.copy(), adata[2:5], back, back.to_memory()):
        assert registry.find(again, "SCVI") == written
        assert registry.find(again, "LinearSCVI") == other
    back.file.close()
    assert written.setup_args == {
        "batch_key": "texts", "layer": "raw counts", "cats": ["ints", "flags", "same"], "empty": [], "one": ["a"],
    }  # fmt: skip
    assert [column["categories"] for column in written.fields["cats_nc"]["columns"]] == [[1, 3], [False, True], ["one"]]
    assert written.categories("batch_n") == ["3", "ж/ñ"]
    assert (written.n_batches, written.n_labels, written.n_cells, written.n_features) == (2, 1, 8, 3)


# The character 0, which pandas takes for the end of a text, is refused.
TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)))


@given(values=st.lists(TEXT | st.integers(), min_size=8, max_size=8, unique_by=str))
def test_categories_of_any_text_come_back(values):
    adata = data(key=pd.Series(values, dtype=object).to_numpy())
    written = register(adata, batch="key")
    assert registry.find(adata, "SCVI") == written
    assert registry.Registry.from_dict(json.loads(json.dumps(written.to_dict()))) == written
    assert sorted(map(str, written.categories("batch_n"))) == sorted(map(str, values))


@pytest.mark.parametrize("kind", [object, "category"])
def test_a_name_with_the_character_0_is_refused(kind):
    """pandas would take it and the empty name for one."""
    adata = data(key=pd.Series(["\0", "a"] * 4, dtype=object).astype(kind).to_numpy())
    with pytest.raises(ValueError, match="character 0"):
        register(adata, batch="key")
    adata = data(key=pd.Series(["", "\0"] * 4, dtype=object).to_numpy())
    with pytest.raises(ValueError, match="character 0"):
        register(adata, batch="key")


def test_a_second_setup_disturbs_no_earlier_one():
    adata = data(a=list("xy") * 4, b=list("xyzw") * 2)
    first = register(adata, batch="a")
    before = first.to_dict()
    register(adata, "LinearSCVI", batch="b")
    assert registry.find(adata, "SCVI") == first
    register(adata, batch="b")
    assert registry.find(adata, "SCVI").n_batches == 4
    assert first.to_dict() == before
    found = registry.find(adata, "SCVI")
    found.fields["batch_n"]["categories"].clear()
    assert registry.find(adata, "SCVI").n_batches == 4


def test_a_view_is_set_up_without_a_warning_and_its_parent_left_alone():
    adata = data(a=list("xxyy") * 2)
    view = adata[:2]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert register(view, batch="a").categories("batch_n") == ["x"]
    assert registry.UNS_KEY not in adata.uns
    assert registry.find(view, "SCVI").n_cells == 2


def test_a_view_of_a_file_cannot_be_set_up_and_its_parent_can(tmp_path):
    data(a=list("xxyy") * 2).write_h5ad(tmp_path / "a.h5ad")
    adata = anndata.read_h5ad(tmp_path / "a.h5ad", backed="r")
    with pytest.raises(ValueError, match=r"view of a backed file.*whole AnnData.*to_memory\(\)"):
        register(adata[:3], batch="a")
    register(adata, batch="a")
    assert registry.find(adata[:3], "SCVI").n_batches == 2
    adata.file.close()


def test_what_was_not_set_up_is_refused_with_the_cure():
    adata = data()
    with pytest.raises(RuntimeError, match=r"not set up for SCVI. Call SCVI.setup_anndata\(adata, ...\) first"):
        registry.find(adata, "SCVI")
    register(adata, "LinearSCVI")
    with pytest.raises(RuntimeError, match="not set up for SCVI. It is set up for LinearSCVI. Call SCVI.setup_anndata"):
        registry.find(adata, "SCVI")
    with pytest.raises(RuntimeError, match="with 3 genes and has 2 now. Call LinearSCVI.setup_anndata"):
        registry.find(adata[:, :2], "LinearSCVI")
    with pytest.raises(ValueError, match="no 'fields'.*setup_anndata again"):
        registry.Registry.from_dict({"model_name": "SCVI", "setup_args": {}})


@pytest.mark.parametrize(
    ("thing", "message"),
    [
        ("a.h5ad", r"is a str; .*read_h5ad\(path\)"),
        (Path("a.h5ad"), r"is a PosixPath; .*read_h5ad\(path\)"),
        (None, "is a NoneType; an AnnData is needed"),
        (pd.DataFrame({"g": [1]}), r"is a DataFrame; .*anndata.AnnData\(frame\)"),
        (np.ones((2, 2)), r"is a ndarray; .*anndata.AnnData\(counts\)"),
        (sp.csr_matrix(np.ones((2, 2))), "is a csr_matrix; an AnnData is needed"),
    ],
    ids=repr,
)
def test_what_is_no_anndata_is_refused(thing, message):
    with pytest.raises(TypeError, match="adata " + message):
        register(thing)


def test_a_mudata_is_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own, about a coming default
        pair = mudata.MuData({"rna": data()})
    with pytest.raises(TypeError, match=r"adata is a MuData; .*mdata\['rna'\]"):
        register(pair)


@pytest.mark.parametrize(("n", "g"), [(0, 3), (3, 0), (0, 0)])
def test_nothing_is_refused(n, g):
    with pytest.raises(ValueError, match=f"adata has {n} cells and {g} genes"):
        register(data(n, g))


def test_repeated_genes_are_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # anndata's own
        adata = data(g=4)
        adata.var_names = ["a", "b", "a", "a"]
        with pytest.raises(ValueError, match=r"repeats 2 names, 'a' for one. Call adata.var_names_make_unique\(\)"):
            register(adata)


def test_new_data_are_checked_against_a_setup():
    setup = register(data(a=list("xy") * 4, size=1.0), batch="a")
    setup.check(data(a="y"))
    with pytest.raises(ValueError, match="batch_key='a': 8 cells have 'z'"):
        setup.check(data(a="z"))
    with pytest.raises(KeyError, match="batch_key='a' is not a column"):
        setup.check(data())
    bad = data(a="x")
    bad.X[0, 0] = -1
    with pytest.raises(ValueError, match="adata.X holds negative values"):
        setup.check(bad)


def test_a_field_reads_as_registered():
    adata = data(size=np.arange(1, 9))
    setup = registry.register(adata, "SCVI", [Matrix("x", None), Continuous("s", "key", "size", positive=True)], {})
    assert setup.read(adata, "s").tolist() == list(range(1, 9))
    assert setup.read(adata, "x") is adata.X
