"""Model folders of scvi-tools: they become ours, old and odd ones too, and nothing in them runs."""

import json
import os
import pickle
import subprocess
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import SHARED
from test_io import assert_same, example

from scvi_lite.analysis.minify import WITH_COUNTS
from scvi_lite.io.folder import read_folder, write_folder
from scvi_lite.io.plain_pickle import read_plain
from scvi_lite.io.scvi_tools import is_scvi_tools_folder, read_scvi_tools
from scvi_lite.io.translators import ARGUMENTS, TRANSLATORS
from scvi_lite.model import SCVI

N_GENES, N_HIDDEN, N_LATENT, N_BATCHES, N_SITES = 4, 5, 2, 3, 2


def peer_stack(name, n_in, n_one_hot, n_layers=2):
    state = {}
    for i in range(n_layers):
        width = (n_in if i == 0 else N_HIDDEN) + n_one_hot
        state[f"{name}.fc_layers.Layer {i}.0.weight"] = torch.randn(N_HIDDEN, width)
        state[f"{name}.fc_layers.Layer {i}.0.bias"] = torch.randn(N_HIDDEN)
        state[f"{name}.fc_layers.Layer {i}.1.running_mean"] = torch.randn(N_HIDDEN)
    return state


def peer_linear(name, n_out):
    return {f"{name}.weight": torch.randn(n_out, N_HIDDEN), f"{name}.bias": torch.randn(n_out)}


def peer_content():
    """What scvi-tools saves for an SCVI with all kinds of covariates, written down by hand."""
    one_hot = N_BATCHES + N_SITES
    names = np.array([f"g{i}" for i in range(N_GENES)], dtype=object)
    state = {
        "px_r": torch.randn(N_GENES, N_BATCHES),
        "library_log_means": torch.randn(1, N_BATCHES),
        "library_log_vars": torch.rand(1, N_BATCHES),
        **peer_stack("z_encoder.encoder", N_GENES + 1, one_hot),
        **peer_linear("z_encoder.mean_encoder", N_LATENT),
        **peer_linear("z_encoder.var_encoder", N_LATENT),
        **peer_stack("l_encoder.encoder", N_GENES + 1, one_hot, 1),
        **peer_linear("l_encoder.mean_encoder", 1),
        **peer_linear("l_encoder.var_encoder", 1),
        **peer_stack("decoder.px_decoder", N_LATENT + 1, one_hot),
        **peer_linear("decoder.px_scale_decoder.0", N_GENES),
        **peer_linear("decoder.px_r_decoder", N_GENES),
        **peer_linear("decoder.px_dropout_decoder", N_GENES),
        "pyro_param_store": {"params": {}, "constraints": {}},
    }
    fields = {
        "X": {
            "data_registry": {"attr_name": "layers", "attr_key": "counts"},
            "state_registry": {"n_obs": 10, "n_vars": N_GENES, "column_names": names},
        },
        "batch": {
            "data_registry": {"attr_name": "obs", "attr_key": "_scvi_batch"},
            "state_registry": {"categorical_mapping": np.array(["a", "b", "c"], object), "original_key": "donor"},
        },
        "labels": {
            "data_registry": {"attr_name": "obs", "attr_key": "_scvi_labels"},
            "state_registry": {"categorical_mapping": np.array([0]), "original_key": "_scvi_labels"},
        },
        "size_factor": {"data_registry": {}, "state_registry": {}},
        "extra_categorical_covs": {
            "data_registry": {"attr_name": "obsm", "attr_key": "_scvi_extra_categorical_covs"},
            "state_registry": {
                "mappings": {"site": np.array(["x", "y"], object), "one": np.array([True])},
                "field_keys": ["site", "one"],
                "n_cats_per_key": [2, 1],
            },
        },
        "extra_continuous_covs": {
            "data_registry": {"attr_name": "obsm", "attr_key": "_scvi_extra_continuous_covs"},
            "state_registry": {"columns": np.array(["age"], object)},
        },
    }
    index = pd.RangeIndex(2, name="epoch")
    attributes = {
        "is_trained_": True,
        "train_indices_": np.array([3, 1]),
        "validation_indices_": np.array([2]),
        "history_": {
            "train_loss": pd.DataFrame({"train_loss": [2.0, np.nan]}, index=index),
            "half": pd.DataFrame({"half": np.array([1.5, 2.5], np.float16)}, index=pd.Index([0, 5], name="epoch")),
            "mixed": pd.DataFrame({"mixed": [torch.tensor(1.0), np.float64(2)]}, index=index, dtype=object),
        },
        "init_params_": {
            "kwargs": {"model_kwargs": {"encode_covariates": True}},
            "non_kwargs": {
                "n_layers": 2, "dispersion": "gene-batch", "use_observed_lib_size": False, "gene_likelihood": "nb",
                "registry": {"a": np.zeros(1)},
            },
        },
        "registry_": {
            "scvi_version": "1.2.0",
            "model_name": "SCVI",
            "setup_args": {"layer": "counts", "batch_key": "donor", "size_factor_key": None},
            "field_registries": fields,
        },
    }  # fmt: skip
    return {"model_state_dict": state, "var_names": names, "attr_dict": attributes}


def save_peer(content, path="peer"):
    os.makedirs(path, exist_ok=True)
    torch.save(content, Path(path) / "model.pt")
    return path


def test_a_folder_of_scvi_tools_is_recognised():
    folder = save_peer({})
    assert (
        is_scvi_tools_folder(folder) and not is_scvi_tools_folder(folder, "other_") and not is_scvi_tools_folder("no")
    )
    write_folder(folder, example(), overwrite=True)
    assert not is_scvi_tools_folder(folder), "the model saved last counts"


def test_a_model_of_scvi_tools_in_our_words():
    content = peer_content()
    saved = read_scvi_tools(save_peer(content))
    assert (saved.class_name, saved.is_trained, saved.version) == ("SCVI", True, "scvi-tools 1.2.0")
    assert saved.var_names == ["g0", "g1", "g2", "g3"]
    assert saved.arguments == {
        "n_layers": 2, "dispersion": "gene-batch", "use_observed_lib_size": False, "gene_likelihood": "nb",
        "encode_covariates": True,
    }  # fmt: skip
    assert {split: rows.tolist() for split, rows in saved.indices.items()} == {"train": [3, 1], "validation": [2]}
    fields = saved.registry["fields"]
    assert fields["x"] == {"kind": "matrix", "layer": "counts"}
    assert (fields["batch_n"]["key"], fields["batch_n"]["categories"]) == ("donor", ["a", "b", "c"])
    assert (fields["label_n"]["key"], fields["label_n"]["categories"]) == (None, [0])
    assert [(c["key"], c["categories"]) for c in fields["cats_nc"]["columns"]] == [
        ("site", ["x", "y"]),
        ("one", [True]),
    ]
    assert [column["key"] for column in fields["conts_nd"]["columns"]] == ["age"]
    assert "size_factor_n" not in fields and (saved.registry["n_cells"], saved.registry["n_features"]) == (10, 4)
    assert saved.history["half"].to_dict() == {"half": {0: 1.5, 5: 2.5}}
    assert saved.history["mixed"]["mixed"].tolist() == [1, 2] and np.isnan(saved.history["train_loss"].iloc[1, 0])
    write_folder("ours", saved)  # plain data throughout
    assert_same(saved, read_folder("ours"))


def test_one_hot_columns_become_tables():
    """The same linear map of the same inputs."""
    content = peer_content()
    theirs, ours = content["model_state_dict"], read_scvi_tools(save_peer(content)).state
    batch_n, site_n = torch.tensor([0, 2, 1, 2]), torch.tensor([1, 0, 0, 1])
    for their_name, name, widths in (
        ("z_encoder.encoder", "encoder", (N_GENES + 1, N_HIDDEN)),
        ("l_encoder.encoder", "library_encoder", (N_GENES + 1,)),
        ("decoder.px_decoder", "decoder", (N_LATENT + 1, N_HIDDEN)),
    ):
        for i, width in enumerate(widths):
            x_nd = torch.randn(4, width)
            one_hot = [torch.eye(N_BATCHES)[batch_n], torch.eye(N_SITES)[site_n]]
            expected = torch.cat([x_nd, *one_hot], 1) @ theirs[f"{their_name}.fc_layers.Layer {i}.0.weight"].T
            layer = f"{name}.hidden.blocks.{i}.linear"
            tables = ours[f"{layer}.tables.0"][batch_n] + ours[f"{layer}.tables.1"][site_n]
            torch.testing.assert_close(x_nd @ ours[f"{layer}.weight"].T + tables, expected)
    assert torch.equal(ours["log_theta"], theirs["px_r"].T)
    assert torch.equal(ours["library_prior_var"], theirs["library_log_vars"][0])
    assert not [name for name in ours if name.startswith(("decoder.dropout", "decoder.dispersion"))]


def test_shallow_covariates_and_an_observed_library():
    content = peer_content()
    keywords = {"deeply_inject_covariates": False, "use_observed_lib_size": True, "dispersion": "gene-cell"}
    content["attr_dict"]["init_params_"]["kwargs"] = {"kwargs": keywords}
    state = content["model_state_dict"]
    state["decoder.px_decoder.fc_layers.Layer 1.0.weight"] = torch.randn(N_HIDDEN, N_HIDDEN)
    state["z_encoder.encoder.fc_layers.Layer 0.0.weight"] = torch.randn(N_HIDDEN, N_GENES)
    del state["px_r"]
    ours = read_scvi_tools(save_peer(content)).state
    assert ours["decoder.hidden.blocks.1.linear.weight"].shape == (N_HIDDEN, N_HIDDEN)
    assert ours["decoder.hidden.blocks.0.linear.tables.0"].shape == (N_BATCHES, N_HIDDEN)
    tables = [name for name in ours if ".tables." in name]
    assert tables == [f"decoder.hidden.blocks.0.linear.tables.{i}" for i in (0, 1)], "nothing else has covariates"
    assert not [name for name in ours if name.startswith(("library", "log_theta"))]
    assert ours["decoder.dispersion.bias"].shape == (N_GENES,)


@pytest.mark.parametrize(
    "frame",
    [
        pd.DataFrame({"odd": ["x", "y"]}),
        pd.DataFrame({"odd": pd.to_datetime(["2020-01-01", "2020-01-02"])}),
        pd.DataFrame({"odd": pd.Categorical(["x", "y"])}),
        pd.DataFrame({"odd": pd.array([1, 2], dtype="Int64")}),
        pd.DataFrame({"odd": [1.0, 2.0]}, index=["a", "b"]),
        pd.DataFrame({"odd": [1.0], "even": [2.0]}),
        pd.Series([1.0]),
        "text",
    ],
    ids=["text", "dates", "categories", "extension", "named rows", "two columns", "series", "no frame"],
)
def test_an_odd_history_is_left_out(frame):
    content = peer_content()
    content["attr_dict"]["history_"]["odd"] = frame
    with pytest.warns(UserWarning, match="metric 'odd' of the history cannot be read"):
        saved = read_scvi_tools(save_peer(content))
    assert list(saved.history) == ["train_loss", "half", "mixed"]


@pytest.mark.parametrize("history", [None, {}])
def test_an_untrained_model_of_scvi_tools(history):
    content = peer_content()
    attributes = content["attr_dict"]
    attributes |= {"history_": history, "is_trained_": False, "train_indices_": None}
    del attributes["validation_indices_"]
    saved = read_scvi_tools(save_peer(content))
    assert not saved.is_trained and saved.history == {} and saved.indices == {}


class Payload:
    """Becomes a call when unpickled."""

    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


PAYLOADS = {
    "os.system": (os.system, "touch ran"),
    "builtins.eval": (eval, "open('ran', 'w')"),
    "builtins.exec": (exec, "open('ran', 'w')"),
    "builtins.getattr": (getattr, os, "system"),
    "subprocess.Popen": (subprocess.Popen, ["touch", "ran"]),
    "_pickle.loads": (pickle.loads, b""),
    "numpy.fromfile": (np.fromfile, "ran"),
    "torch.load": (torch.load, "evil.pt"),
    "pandas.eval": (pd.eval, "@open('ran', 'w')"),
    "pandas.read_pickle": (pd.read_pickle, "evil.pkl"),
}


@pytest.mark.parametrize("name", PAYLOADS)
@pytest.mark.parametrize("where", ["instead", "history", "weights", "argument of an array"])
def test_hostile_files_run_nothing(name, where):
    Path("evil.pkl").write_bytes(pickle.dumps(Payload(os.system, "touch ran")))
    content = peer_content()
    payload = Payload(*PAYLOADS[name])
    if where == "instead":
        content = payload
    elif where == "history":
        content["attr_dict"]["history_"] = payload
    elif where == "weights":
        content["model_state_dict"]["px_r"] = payload
    else:
        content["var_names"] = np.array([payload], dtype=object)
    if name == "builtins.getattr":  # the module itself cannot be pickled
        payload.call = (getattr, ("", "join"))
    folder = save_peer(content)
    with pytest.raises(ValueError, match="cannot be loaded" if name.startswith("pandas") else "asks for"):
        read_scvi_tools(folder)
    assert not Path("ran").exists()


def test_what_others_trust_is_not_trusted_here():
    """Functions that the process has told PyTorch to allow stay forbidden in a model, and allowed elsewhere."""
    content = peer_content() | {"var_names": Payload(eval, "open('ran', 'w')")}
    with torch.serialization.safe_globals([eval]):
        trusted = set(torch.serialization.get_safe_globals())
        with pytest.raises(ValueError, match="asks for builtins.eval"):
            read_scvi_tools(save_peer(content))
        assert set(torch.serialization.get_safe_globals()) == trusted
    assert not Path("ran").exists()


FOREIGN = {
    "no file": (lambda: None, FileNotFoundError, "'peer' has no model.pt"),
    "text": (lambda: Path("peer/model.pt").write_text("no model"), ValueError, "is damaged"),
    "empty": (lambda: Path("peer/model.pt").write_text(""), ValueError, "is damaged"),
    "a list": (lambda: save_peer([1, 2]), ValueError, "cannot be loaded"),
    "bare weights": (lambda: save_peer({"weight": torch.zeros(2)}), ValueError, "it has no 'attr_dict'"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_files_that_are_no_model_of_scvi_tools(case):
    os.mkdir("peer")
    do, error, message = FOREIGN[case]
    do()
    with pytest.raises(error, match=message):
        read_scvi_tools("peer")


def test_models_that_do_not_fit_are_named():
    content = peer_content()
    content["model_state_dict"]["classifier.weight"] = torch.zeros(2)
    with pytest.raises(ValueError, match="no place for its weights 'classifier.weight'"):
        read_scvi_tools(save_peer(content))
    content["attr_dict"]["registry_"]["model_name"] = "SOLO"
    with pytest.raises(ValueError, match="it is a SOLO; there is a counterpart of 'SCVI'"):
        read_scvi_tools(save_peer(content))
    file = Path("peer/model.pt")
    file.write_bytes(file.read_bytes()[:-2000])
    with pytest.raises(ValueError, match="is damaged"):
        read_scvi_tools("peer")


def test_minified_data_of_scvi_tools():
    """A folder that scvi-tools 1.5.0 saved after ``minify_adata()``: its data hold zeros for counts."""
    folder = Path(__file__).parent / "data" / "scvi_tools_minified"
    expected = np.load(folder / "outputs.npz")
    minified = SCVI.load(folder)
    assert minified.minified_data_type == "latent_posterior_parameters" and minified.adata.layers["counts"].nnz == 0
    with pytest.raises(RuntimeError, match="get_elbo needs counts"):
        minified.get_elbo()
    with pytest.raises(RuntimeError, match="adata was minified and holds no counts, which SCVI reads"):
        SCVI.setup_anndata(anndata.read_h5ad(folder / "adata.h5ad"), batch_key="batch")
    cells = anndata.AnnData(np.zeros((8, 6)), obs=minified.adata.obs[["batch"]], layers={"counts": expected["counts"]})
    cells.var_names = minified.adata.var_names
    full = SCVI.load(folder, adata=cells)
    assert full.minified_data_type is None and full.get_elbo().isfinite()
    with_counts = minified.adata.copy()
    with_counts.layers["counts"], with_counts.uns["_scvi_adata_minify_type"] = expected["counts"], WITH_COUNTS
    for model in (minified, full, SCVI.load(folder, adata=with_counts)):
        torch.manual_seed(0)
        z_loc, z_variance = model.get_latent_representation(return_dist=True)
        np.testing.assert_allclose(z_loc, expected["z"], rtol=1e-5)
        np.testing.assert_allclose(z_variance, expected["v"], rtol=1e-5)
        expression = model.get_normalized_expression(n_samples=20_000, return_numpy=True)
        np.testing.assert_allclose(expression, expected["expression"], atol=2e-3)


@pytest.mark.filterwarnings("ignore:the matrix subclass")
@pytest.mark.parametrize(("mask", "measured"), [(False, True), ([True, False], [True, False])])
def test_proteins_that_scvi_tools_read_from_a_mudata(mask, measured):
    """Which were measured is in matrices of NumPy; of minified data it was read from zeros."""
    content = peer_content()
    content["attr_dict"]["registry_"]["field_registries"]["proteins"] = {
        "data_registry": {"attr_name": "obsm", "attr_key": "protein_counts"},
        "state_registry": {
            "column_names": np.array(["CD3", "CD4"], object),
            "protein_batch_mask": {str(b): np.matrix(np.zeros(2, bool) | mask) for b in range(N_BATCHES)},
        },
    }
    proteins = read_scvi_tools(save_peer(content)).registry["fields"]["proteins_np"]
    assert proteins["measured"] == [np.broadcast_to(measured, 2).tolist()] * N_BATCHES


@pytest.mark.skipif(not (SHARED / "golden").is_dir(), reason="the recorded models are not here")
@pytest.mark.parametrize("case", sorted((SHARED / "golden").glob("*/model.pt")), ids=lambda file: file.parent.name)
def test_recorded_models_are_plain_data(case):
    """Each model class of scvi-tools 1.5.0 can be read, and those with a counterpart have all of their history."""
    content = read_plain(case)
    attributes = content["attr_dict"]
    assert all(isinstance(tensor, torch.Tensor) for name, tensor in content["model_state_dict"].items() if "." in name)
    assert sorted(attributes["train_indices_"])[0] >= 0
    class_name = attributes["registry_"]["model_name"]
    if class_name not in TRANSLATORS:
        with pytest.raises(ValueError, match=f"it is a {class_name}; there is a counterpart of"):
            read_scvi_tools(case.parent)
        return
    saved = read_scvi_tools(case.parent)
    assert saved.history.keys() == attributes["history_"].keys() and np.isfinite(saved.history["train_loss"]).all(None)
    given = json.loads((case.parent / "case.json").read_text())
    if "rna_model" not in given["args"]:  # else they are of from_rna_model, not of the constructor
        assert given["args"].items() <= saved.arguments.items()
    assert given["setup"].items() <= saved.registry["setup_args"].items()
    write_folder("ours", saved)
    assert_same(saved, read_folder("ours"))


@pytest.mark.parametrize(("theirs", "ours"), [("mog", "mog"), ("vamp", "normal"), ("normal", "normal")])
def test_priors_that_are_the_standard_normal(theirs, ours):
    """Those of CondSCVI of scvi-tools are, whatever they are called, unless they are mixtures."""
    assert ARGUMENTS["CondSCVI"]({"n_latent": 3, "prior": theirs}) == {"n_latent": 3, "prior": ours}


def test_states_that_were_mixed_up():
    """A normal prior of the states of spots, with a network that finds them."""
    theirs = {"mean_vprior": torch.zeros(2, 5, 3), "prior_mode": "normal"}
    with pytest.warns(UserWarning, match="its proportions hold, its states do not"):
        ARGUMENTS["DestVI"](theirs)
    assert ARGUMENTS["DestVI"](theirs | {"amortization": "proportion"})["n_components"] == 5
