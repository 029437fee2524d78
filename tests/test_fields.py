"""What the fields take from an AnnData, and what they refuse: every message names the argument and the cure."""

import warnings

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st

from scvi_lite.data import checks
from scvi_lite.data.fields import Categorical, Categoricals, Continuous, Continuouses, Embedding, Matrix

N = 6


def with_obs(**columns):
    adata = anndata.AnnData(np.ones((N, 2)))
    for name, values in columns.items():
        adata.obs[name] = values
    return adata


def categories(values, **other):
    """Categories at setup, and codes of the same cells."""
    adata = with_obs(key=values, **other)
    state = Categorical("batch_n", "batch_key", "key").register(adata)
    return state["categories"], Categorical.read(adata, state).tolist()


# Categories -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (list("bababa"), ["a", "b"]),
        (pd.array(list("bababa"), dtype="string"), ["a", "b"]),
        ([2, 10, 2, 10, 2, 10], [2, 10]),
        (np.array([2, 10] * 3, np.uint8), [2, 10]),
        (pd.array([2, 10] * 3, dtype="Int64"), [2, 10]),
        ([True, False] * 3, [False, True]),
        (pd.array([True, False] * 3, dtype="boolean"), [False, True]),
        ([1.0, 2.0] * 3, [1, 2]),
        ([0.5, 2.0] * 3, [0.5, 2]),
        ([1, "a"] * 3, [1, "a"]),
        (pd.Categorical(list("bababa"), ["c", "b", "a"]), ["b", "a"]),
        (pd.to_datetime(["2020-01-02", "2020-01-01"] * 3), ["2020-01-01 00:00:00", "2020-01-02 00:00:00"]),
        (["ж/ñ", ""] * 3, ["", "ж/ñ"]),
        (["one"] * N, ["one"]),
    ],
    ids=repr,
)
def test_keys_of_every_type(values, expected):
    found, codes = categories(values)
    assert found == expected
    assert [type(value) for value in found] == [type(value) for value in expected]
    texts = [str(int(v)) if isinstance(v, float) and v.is_integer() else str(v) for v in pd.Series(values)]
    assert codes == [[str(e) for e in expected].index(text) for text in texts]


@given(st.lists(st.text() | st.integers(), min_size=N, max_size=N))
def test_codes_and_categories_give_the_values_back(values):
    texts = {str(value) for value in values}
    if len(texts) < len({(type(value), value) for value in values}):
        with pytest.raises(ValueError, match="different types"):
            categories(pd.Series(values, dtype=object).to_numpy())
        return
    found, codes = categories(pd.Series(values, dtype=object).to_numpy())
    assert [str(found[code]) for code in codes] == [str(value) for value in values]
    assert sorted(map(str, found)) == sorted(texts)


@pytest.mark.parametrize(
    "later",
    [
        ["1", "2"] * 3,
        [1.0, 2.0] * 3,
        pd.array([1, 2] * 3, dtype="Int64"),
        pd.Categorical(["1", "2"] * 3, ["2", "9", "1"]),
        pd.Categorical([1, 2] * 3),
    ],
    ids=repr,
)
def test_a_key_is_the_same_after_its_type_changed(later):
    state = Categorical("batch_n", "batch_key", "key").register(with_obs(key=[1, 2] * 3))
    assert Categorical.read(with_obs(key=later), state).tolist() == [0, 1] * 3


def test_cells_of_some_categories_only():
    state = Categorical("batch_n", "batch_key", "key").register(with_obs(key=list("aabbcc")))
    assert Categorical.read(with_obs(key=["c"] * N), state).tolist() == [2] * N


def test_a_new_category_is_refused_by_name():
    state = Categorical("batch_n", "batch_key", "key").register(with_obs(key=list("aabbcc")))
    with pytest.raises(ValueError, match=r"batch_key='key': 2 cells have 'd', 'e' in .*It knows 'a', 'b', 'c'.*recode"):
        Categorical.read(with_obs(key=list("adbbce")), state)


@pytest.mark.parametrize("missing", [None, np.nan, pd.NA, pd.NaT])
@pytest.mark.parametrize("kind", [object, "category"])
def test_missing_values_are_refused(missing, kind):
    values = pd.Series(["a", missing, "b", "a", "b", missing], dtype=object).astype(kind).to_numpy()
    with pytest.raises(ValueError, match=r"batch_key='key': 2 of 6 cells have no value in adata.obs\['key'\].*notna"):
        categories(values)
    state = Categorical("batch_n", "batch_key", "key").register(with_obs(key=list("aabbab")))
    with pytest.raises(ValueError, match="2 of 6 cells have no value"):
        Categorical.read(with_obs(key=values), state)


def test_without_a_key_all_cells_are_one_category():
    state = Categorical("batch_n", "batch_key", None).register(with_obs())
    assert state["categories"] == [0]
    assert Categorical.read(with_obs(), state).tolist() == [0] * N


@pytest.mark.parametrize("key", ["bach", "Batch", 3, ["batch"], ("batch",), {"batch": 1}, True])
def test_an_unknown_column_is_refused_with_the_nearest(key):
    with pytest.raises(KeyError, match="batch_key=.* is not a column of adata.obs. .*Columns: 'batch'"):
        Categorical("batch_n", "batch_key", key).register(with_obs(batch="a"))
    with pytest.raises(KeyError, match="Did you mean 'batch'"):
        Categorical("batch_n", "batch_key", "bach").register(with_obs(batch="a"))


@pytest.mark.parametrize("key", ["a/b", " odd ", "ключ", "", "1", "index"])
def test_columns_of_any_name(key):
    adata = with_obs(**{key: list("ababab")})
    assert Categorical("batch_n", "batch_key", key).register(adata)["categories"] == ["a", "b"]


def test_two_columns_of_one_name_are_refused():
    adata = with_obs(batch="a")
    adata.obs = pd.concat([adata.obs, adata.obs], axis=1)
    with pytest.raises(ValueError, match="2 columns of this name"):
        Categorical("batch_n", "batch_key", "batch").register(adata)


# Covariates -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keys", [["a", "b"], ("a", "b"), pd.Index(["a", "b"]), np.array(["a", "b"])], ids=repr)
def test_several_columns(keys):
    adata = with_obs(a=list("xyxyxy"), b=[2, 2, 1, 1, 1, 1])
    state = Categoricals("cats_nc", "categorical_covariate_keys", keys).register(adata)
    assert [column["categories"] for column in state["columns"]] == [["x", "y"], [1, 2]]
    assert Categoricals.read(adata, state).T.tolist() == [[0, 1, 0, 1, 0, 1], [1, 1, 0, 0, 0, 0]]


@pytest.mark.parametrize("keys", [None, [], ()])
@pytest.mark.parametrize("kind", [Categoricals, Continuouses])
def test_no_columns(kind, keys):
    state = kind("x", "keys", keys).register(with_obs())
    assert kind.read(with_obs(), state).shape == (N, 0)


@pytest.mark.parametrize("kind", [Categoricals, Continuouses])
def test_one_string_for_a_list_is_refused(kind):
    with pytest.raises(ValueError, match=r"covariate_keys='age': a list of column names is needed. Write .*\['age'\]"):
        kind("x", "covariate_keys", "age")
    with pytest.raises(ValueError, match="names 'age' more than once"):
        kind("x", "covariate_keys", ["age", "sex", "age"])


@pytest.mark.parametrize(
    "values",
    [
        np.arange(N),
        np.arange(N, dtype=np.uint8),
        np.arange(N, dtype=np.float16),
        pd.array(range(N), dtype="Int64"),
        pd.array(range(N), dtype="Float32"),
    ],
    ids=repr,
)
def test_numbers_of_every_type(values):
    state = Continuous("x", "key", "c").register(with_obs(c=values))
    read = Continuous.read(with_obs(c=values), state)
    assert read.dtype == np.float32
    assert read.tolist() == list(range(N))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (list("abcdef"), r"holds object, not numbers. .*astype\(float\).*categorical covariate"),
        (["1"] * N, "holds object, not numbers"),
        (pd.Categorical([1, 2] * 3), "holds category, not numbers"),
        (pd.to_datetime(["2020-01-01"] * N), "holds datetime64.*, not numbers"),
        ([1.0, np.nan] * 3, "3 of 6 cells have no value"),
        (pd.array([1, None] * 3, dtype="Int64"), "3 of 6 cells have no value"),
        ([1.0, np.inf] * 3, "3 cells have an infinite value"),
        ([1.0, 1e300] * 3, "3 cells have an infinite value"),
    ],
)
def test_what_is_no_number_is_refused(values, message):
    with pytest.raises(ValueError, match="size_factor_key='c': .*" + message):
        Continuous("size_factor_n", "size_factor_key", "c").register(with_obs(c=values))


def test_covariates_on_a_scale_far_from_one_warn():
    """Counts do, with a cure that works; percentages do not, nor do size factors."""
    adata = with_obs(c=np.arange(N) * 1000.0, percent=np.linspace(0, 100, N))
    with pytest.warns(UserWarning, match=r"keys='c': values reach 5e\+03.*: adata.obs\['c'\] = ") as caught:
        Continuous("conts_nd", "continuous_covariate_keys", "c").register(adata)
    Continuous("size_factor_n", "size_factor_key", "c", positive=True).register(with_obs(c=np.full(N, 5e3)))
    Continuous("conts_nd", "continuous_covariate_keys", "percent").register(adata)
    exec(str(caught[0].message).split("near 1: ")[1], {"adata": adata})
    Continuous("conts_nd", "continuous_covariate_keys", "c").register(adata)


@pytest.mark.parametrize("value", [0, -1.0, 1e-60])
def test_size_factors_are_positive(value):
    with pytest.raises(ValueError, match="size_factor_key='c': 1 cells have a value of zero or less"):
        Continuous("size_factor_n", "size_factor_key", "c", positive=True).register(with_obs(c=[1.0] * 5 + [value]))


def test_embeddings():
    adata = with_obs()
    adata.obsm["X_pca"] = np.arange(12.0).reshape(N, 2)
    state = Embedding("z", "key", "X_pca").register(adata)
    assert Embedding.read(adata, state).dtype == np.float32
    assert np.array_equal(Embedding.read(adata, state), adata.obsm["X_pca"])
    with pytest.raises(KeyError, match="key='X_pc' is not a key of adata.obsm. Did you mean 'X_pca'"):
        Embedding("z", "key", "X_pc").register(adata)


# Counts ---------------------------------------------------------------------------------------------------------------


def test_a_layer_is_found_by_name_and_a_misspelt_one_refused():
    adata = anndata.AnnData(np.full((3, 2), 0.5), layers={"counts/ñ": np.ones((3, 2))})
    state = Matrix("x", "counts/ñ").register(adata)
    assert Matrix.read(adata, state).sum() == 6
    for layer in ("count", "Counts/ñ", ["counts/ñ"], 1):
        with pytest.raises(KeyError, match="layer=.* is not a key of adata.layers"):
            Matrix("x", layer).register(adata)
    with pytest.raises(ValueError, match=r"adata.X is empty. .*layer=\.\.\."):
        Matrix("x", None).register(anndata.AnnData(obs=adata.obs, var=adata.var, layers={"c": adata.X}))


KINDS = {"dense": np.asarray, "csr": sp.csr_matrix, "csc": sp.csc_matrix, "csr_array": sp.csr_array}


@given(
    st.integers(0, 8),
    st.integers(0, 5),
    st.sampled_from(
        [(np.nan, "NaN"), (np.inf, "infinite"), (-np.inf, "infinite"), (1e39, "infinite"), (-1, "negative")]
    ),
    st.sampled_from(list(KINDS)),
    st.sampled_from([1, 7, 1 << 22]),
)
def test_one_bad_number_anywhere_is_found(row, col, bad, kind, chunk):
    value, message = bad
    x_ng = np.random.default_rng(0).poisson(1, (9, 6)).astype(np.float64)
    x_ng[row, col] = value
    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(ValueError, match=rf"^adata.layers\['c'\] holds .*{message}"),
    ):
        patch.setattr(checks, "CHUNK", chunk)
        checks.check_counts(KINDS[kind](x_ng), "adata.layers['c']")


@pytest.mark.parametrize("kind", list(KINDS))
def test_fractions_are_warned_of(kind):
    x_ng = np.ones((9, 6))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checks.check_counts(KINDS[kind](x_ng), "adata.X")
    x_ng[8, 5] = 1.5
    with pytest.warns(UserWarning, match="adata.X holds fractions, not counts"):
        checks.check_counts(KINDS[kind](x_ng), "adata.X")


def test_what_need_not_be_counts_may_be_negative():
    checks.check_counts(np.array([[-0.5, 2.0]]), "adata.X", counts=False)
    with pytest.raises(ValueError, match="NaN"):
        checks.check_counts(np.array([[np.nan, 2.0]]), "adata.X", counts=False)


class Array:
    """Stands for an array of a library that is not read, such as dask's."""

    dtype, shape = np.dtype("f4"), (2, 2)


@pytest.mark.parametrize(
    "matrix",
    [Array(), sp.coo_matrix(np.ones((2, 2))), np.ma.masked_array(np.ones((2, 2))), [[1, 2]], np.ones((2, 2, 2))],
)
def test_arrays_of_other_libraries_are_refused_with_the_cure(matrix):
    with pytest.raises(TypeError, match=rf"adata.X is a .*{type(matrix).__name__}.*csr_matrix\(adata.X\).*compute\(\)"):
        checks.check_counts(matrix, "adata.X")


@pytest.mark.parametrize("dtype", [object, "complex64", "U3", "datetime64[s]"])
def test_what_is_no_number_is_no_count(dtype):
    with pytest.raises(ValueError, match=r'adata.X holds .*, not numbers. .*astype\("float32"\)'):
        checks.check_counts(np.ones((2, 2)).astype(dtype), "adata.X")


@given(st.sampled_from(["bool", "u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f2", "f4", "f8", "g", ">i4"]))
def test_counts_of_every_width_are_taken(dtype):
    checks.check_counts(np.ones((3, 2), dtype), "adata.X")
