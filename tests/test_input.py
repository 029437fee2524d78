"""What a user of SCVI may bring: counts in any form give the same model, and what cannot work is refused first."""

import warnings

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

import scvi_lite
from scvi_lite.data.store import CellStore
from scvi_lite.model import SCVI

N, G = 60, 12
X = np.random.default_rng(0).poisson(1.5, (N, G))
X[3] = 0  # a cell without counts
OBS = pd.DataFrame(
    {
        "batch": np.repeat(["a", "b"], N // 2),
        "label": pd.Categorical(np.tile(["x", "y", "z"], N // 3), ["w", "z", "y", "x"]),
        "plate": np.arange(N) % 3,
        "fresh": np.arange(N) % 2 == 0,
        "age": np.linspace(0, 1, N),
        "size": np.linspace(1, 2, N),
    },
    index=[f"cell{i}" for i in range(N)],
)
VAR = pd.DataFrame(index=[f"gene/{i}-é" for i in range(G)])


def data(matrix=X, **parts):
    return anndata.AnnData(matrix, obs=OBS.copy(), var=VAR.copy(), **parts)


def trained(adata, max_epochs=1, batch_size=16, train=(), **setup):
    scvi_lite.settings.seed = 0
    SCVI.setup_anndata(adata, **({"batch_key": "batch"} | setup))
    model = SCVI(adata, n_hidden=8, n_latent=2)
    model.train(max_epochs, accelerator="cpu", batch_size=batch_size, enable_progress_bar=False, **dict(train))
    return model


def latent(model, adata=None, indices=None):
    batches = model._minibatches(adata, indices, batch_size=16)
    return torch.cat([model.module.encode(batch).z_loc_nk for batch in batches]).numpy()


@pytest.fixture(scope="module", autouse=True)
def without_a_seed_afterwards():
    yield
    scvi_lite.settings.seed = None


@pytest.fixture(scope="module")
def reference():
    """A model of dense counts, and its latent space: what every other form of the same counts has to give."""
    model = trained(data())
    return model, latent(model)


# Taken ----------------------------------------------------------------------------------------------------------------


def doubled(adata):
    return anndata.concat([adata, adata], index_unique="-")


def of_file(adata, path, backed="r"):
    adata.write_h5ad(path / "cells.h5ad")
    return anndata.read_h5ad(path / "cells.h5ad", backed=backed)


FORMS = {
    "uint8": lambda path: data(X.astype(np.uint8)),
    "float16": lambda path: data(X.astype(np.float16)),
    "float64": lambda path: data(X.astype(np.float64)),
    "fortran order": lambda path: data(np.asfortranarray(X)),
    "csr": lambda path: data(sp.csr_matrix(X.astype(np.float32))),
    "csc": lambda path: data(sp.csc_matrix(X)),
    "csr_array": lambda path: data(sp.csr_array(X)),
    "csc_array": lambda path: data(sp.csc_array(X.astype(np.uint16))),
    "layer": lambda path: data(X / 2, layers={"counts": X}),
    "sparse layer": lambda path: data(X / 2, layers={"counts": sp.csc_matrix(X)}),
    "layer without X": lambda path: anndata.AnnData(obs=OBS, var=VAR, layers={"counts": X}),
    "view": lambda path: doubled(data())[:N],
    # Rows 5 to N - 1 of the first copy and 0 to 4 of the second, put back in order.
    "sparse view of a view": lambda path: doubled(data(sp.csr_matrix(X)))[5 : N + 5][[*range(N - 5, N), *range(N - 5)]],
    "file": lambda path: of_file(data(), path, backed=None),
    "backed dense": lambda path: of_file(data(), path),
    "backed csr": lambda path: of_file(data(sp.csr_matrix(X)), path),
    "backed csc": lambda path: of_file(data(sp.csc_matrix(X)), path),
    "backed layer": lambda path: of_file(data(X / 2, layers={"counts": sp.csr_matrix(X)}), path),
}


@pytest.mark.parametrize("form", list(FORMS))
def test_the_same_counts_in_any_form_give_the_same_model(reference, form, tmp_path):
    adata = FORMS[form](tmp_path)
    model = trained(adata, layer="counts" if "layer" in form else None)
    expected = reference[1]
    assert np.allclose(latent(model), expected, atol=1e-5)
    asked = [50, 3, 3, 20, 59, 0]
    assert np.allclose(latent(model, indices=asked), expected[asked], atol=1e-5)
    assert np.allclose(latent(reference[0], data()[::-1]), expected[::-1], atol=1e-5)
    if adata.isbacked:
        adata.file.close()


def test_a_view_of_a_backed_file_is_answered_and_trained_on(reference, tmp_path):
    adata = of_file(data(sp.csr_matrix(X)), tmp_path)
    model, expected = reference
    rows = [5, 3, 40]
    assert np.allclose(latent(model, adata[rows]), expected[rows], atol=1e-5)
    SCVI.setup_anndata(adata, batch_key="batch")
    part = SCVI(adata[:40], n_hidden=8, n_latent=2)
    part.train(1, accelerator="cpu", enable_progress_bar=False)
    assert latent(part).shape == (40, 2)
    adata.file.close()


@pytest.mark.parametrize("key", ["batch", "label", "plate", "fresh"])
def test_keys_of_any_type(key):
    model = trained(data(), batch_key=key, labels_key=key, categorical_covariate_keys=[key])
    assert np.isfinite(latent(model)).all()
    assert model.registry.n_batches == OBS[key].nunique()


def test_every_field_at_once():
    covariates = {"categorical_covariate_keys": OBS.columns[2:4], "continuous_covariate_keys": ("age",)}
    model = trained(data(), labels_key="label", size_factor_key="size", **covariates)
    batch = next(model._minibatches(indices=[0, 59]))
    assert batch.cats_nc.tolist() == [[0, 1], [2, 0]]
    assert batch.conts_nd.tolist() == [[0.0], [1.0]]
    assert batch.size_factor_n.tolist() == [1.0, 2.0]
    assert [model.registry.categories("label_n")[i] for i in batch.label_n] == ["x", "z"]


@pytest.mark.parametrize(
    ("part", "batch_size"),
    [
        (np.s_[:2], 128),  # a minibatch larger than the data
        (np.s_[:3], 2),
        (np.s_[:37], 16),  # 33 training cells: one is left over
        (np.s_[:, :1], 16),  # one gene
        (np.s_[:30], 16),  # one batch
        (np.s_[[3, 3, 3, 4]], 16),  # hardly a count
    ],
    ids=str,
)
def test_small_and_odd_data_are_trained_on(part, batch_size):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Observation names are not unique", UserWarning)
        adata = data()[part].copy()
        adata.obs_names_make_unique()
    model = trained(adata, batch_size=batch_size, train={"train_size": 0.9 if adata.n_obs > 10 else 1.0})
    assert np.isfinite(latent(model)).all()
    assert np.isfinite(model.history["train_loss"].to_numpy()).all()


@pytest.mark.parametrize("factor", [1e5, 3e9])
def test_large_counts_are_finite(factor):
    model = trained(data(X * factor))
    assert np.isfinite(latent(model)).all()


def test_each_epoch_uses_each_training_cell_once_in_a_new_order(monkeypatch):
    seen = []
    gather = CellStore.__getitem__

    def spy(store, row_n):
        batch = gather(store, row_n)
        seen.append(batch.row_n.tolist())
        return batch

    monkeypatch.setattr(CellStore, "__getitem__", spy)
    model = trained(data(), max_epochs=2, train={"check_val_every_n_epoch": 3})
    first, second = sum(seen[: len(seen) // 2], []), sum(seen[len(seen) // 2 :], [])
    assert sorted(first) == sorted(second) == sorted(model.train_indices)
    assert first != second
    assert min(map(len, seen)) > 1


def test_setups_and_models_do_not_disturb_each_other():
    adata = data()
    model = trained(adata)
    before = latent(model)
    SCVI.setup_anndata(adata, batch_key="plate", layer=None)
    other = SCVI(adata, n_hidden=8, n_latent=2)
    assert (model.registry.n_batches, other.registry.n_batches) == (2, 3)
    assert np.array_equal(latent(model), before)


def test_a_setup_that_was_written_to_a_file_is_used_again(reference, tmp_path):
    adata = data()
    SCVI.setup_anndata(adata, batch_key="batch")
    again = of_file(adata, tmp_path, backed=None)
    scvi_lite.settings.seed = 0
    assert SCVI(again).registry == SCVI(adata).registry


# New data -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backed", [False, True])
def test_genes_in_another_order_are_put_in_order_and_it_is_said_once(reference, tmp_path, backed):
    model, expected = reference
    adata = data(sp.csr_matrix(X))[:, ::-1].copy()
    adata = of_file(adata, tmp_path) if backed else adata
    with pytest.warns(UserWarning, match="in another order") as said:
        found = latent(model, adata)
    assert len(said) == 1
    assert np.allclose(found, expected, atol=1e-5)
    model.save(tmp_path / "model")
    with pytest.warns(UserWarning, match="in another order"):
        loaded = SCVI.load(tmp_path / "model", adata, accelerator="cpu")
    assert np.allclose(latent(loaded), expected, atol=1e-5)  # no second warning, which would be an error
    if backed:
        adata.file.close()


def test_genes_that_the_model_does_not_know_are_left_out(reference):
    model, expected = reference
    more = anndata.AnnData(X[:, :2], obs=OBS[[]], var=pd.DataFrame(index=["p", "q"]))
    with pytest.warns(UserWarning, match="include 2 that the model does not know"):
        assert np.allclose(latent(model, anndata.concat([more, data()], axis=1, merge="first")), expected, atol=1e-5)


def changed(**obs):
    adata = data()
    for name, values in obs.items():
        adata.obs[name] = values
    return adata


REFUSED_LATER = {
    "new category": (lambda: changed(batch=["c", *OBS["batch"][1:]]), ValueError, "1 cells have 'c'.*knows 'a', 'b'"),
    "missing value": (lambda: changed(batch=[None, *OBS["batch"][1:]]), ValueError, "1 of 60 cells have no value"),
    "missing column": (lambda: anndata.AnnData(X, var=VAR), KeyError, "batch_key='batch' is not a column"),
    "missing genes": (lambda: data()[:, 2:], ValueError, "2 of the model's 12 genes are not among.*'gene/0-é'"),
    "another gene missing": (lambda: data()[:, 2:], ValueError, "not measured.$"),  # no gene of the model is its name
    "negative": (lambda: data(-X), ValueError, "negative values"),
    "NaN": (lambda: data(np.where(X > 3, np.nan, X)), ValueError, "holds NaN"),
    "path": (lambda: "cells.h5ad", TypeError, "read_h5ad"),
    "no cells": (lambda: data()[:0], ValueError, "0 cells"),
}


@pytest.mark.parametrize("case", list(REFUSED_LATER))
def test_new_data_that_do_not_fit_are_refused_when_asked_about_and_when_loaded(reference, case, tmp_path):
    make, error, message = REFUSED_LATER[case]
    with pytest.raises(error, match=message):
        latent(reference[0], make())
    reference[0].save(tmp_path / "model")
    with pytest.raises(error, match=message):
        SCVI.load(tmp_path / "model", make())


def test_new_data_with_some_of_the_categories(reference):
    model, expected = reference
    assert np.allclose(latent(model, data()[40:]), expected[40:], atol=1e-5)


# Refused --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"batch_key": "bach"}, KeyError, "batch_key='bach'.*Did you mean 'batch'"),
        ({"labels_key": "lable"}, KeyError, "labels_key='lable'.*Did you mean 'label'"),
        ({"size_factor_key": "sizes"}, KeyError, "size_factor_key='sizes'.*Did you mean 'size'"),
        ({"layer": "count"}, KeyError, "layer='count'.*Did you mean 'counts'"),
        ({"categorical_covariate_keys": ["plates"]}, KeyError, "categorical_covariate_keys='plates'.*'plate'"),
        ({"categorical_covariate_keys": "plate"}, ValueError, r"Write categorical_covariate_keys=\['plate'\]"),
        ({"continuous_covariate_keys": ["label"]}, ValueError, "continuous_covariate_keys='label'.*not numbers"),
        ({"batchkey": "batch"}, TypeError, "batchkey"),
    ],
)
def test_setup_refuses_what_is_not_there(options, error, message):
    adata = data(layers={"counts": X})
    with pytest.raises(error, match=message):
        SCVI.setup_anndata(adata, **options)
    assert not adata.uns


def test_a_model_needs_a_setup_of_its_class():
    with pytest.raises(RuntimeError, match="Call SCVI.setup_anndata"):
        SCVI(data())
    with pytest.raises(TypeError, match="an AnnData is needed"):
        SCVI(None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_size": 0}, "train_size=0"),
        ({"train_size": 90}, "train_size=90"),
        ({"train_size": "0.9"}, "train_size='0.9'"),
        ({"validation_size": 1.0}, "validation_size=1.0"),
        ({"train_size": 0.9, "validation_size": 0.2}, "add up to more than 1"),
        ({"train_size": 0.01}, "1 training cell"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": 1}, "batch_size=1"),
        ({"batch_size": "128"}, "batch_size='128'"),
    ],
    ids=str,
)
def test_training_refuses_shares_and_sizes_out_of_range(options, message):
    adata = data()
    SCVI.setup_anndata(adata)
    model = SCVI(adata)
    with pytest.raises(ValueError, match=message):
        model.train(max_epochs=1, accelerator="cpu", enable_progress_bar=False, **options)
    assert not model.is_trained
