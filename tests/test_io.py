"""Model folders: what is written comes back, damage is told apart, and no interruption loses a model."""

import errno
import json
import os
import pickle
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from scvi_lite.io.folder import FORMAT_VERSION, SavedModel, find_data, read_folder, read_info, write_folder
from scvi_lite.io.plain_pickle import read_plain
from scvi_lite.io.scvi_tools import is_scvi_tools_folder, read_scvi_tools
from scvi_lite.io.scvi_tools_weights import TRANSLATORS

HERE = Path(__file__).parent
SHARED = HERE.parents[1] / "shared"


def example(number=1.0, **changes):
    """A saved model, small; ``number`` tells one from another."""
    history = {
        "train_loss": [3.5, float("nan"), float("inf"), number],
        "kl_weight": [0.0, 1e-300, -float("inf"), 1 / 3],
    }
    parts = {
        "class_name": "SCVI",
        "arguments": {"n_latent": 3, "dropout_rate": 0.1, "gene_likelihood": "nb", "n_cats": [2, 3], "size": None},
        "registry": {"fields": {"batch_n": {"categories": ["α", "β \U0001f9ec", '"\n\\']}}, "n_cells": 7},
        "var_names": ["CD4", "HLA-Ä", "β-actin"],
        "state": {
            "encoder.weight": torch.full((3, 2), number),
            "encoder.norm.num_batches_tracked": torch.tensor(5),
            "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
            "none": torch.zeros(0, 4),
            "log_theta": torch.nn.Parameter(torch.arange(6.0).reshape(2, 3).T),
        },
        "history": {
            name: pd.DataFrame({name: values}, index=pd.Index(range(4), name="epoch"))
            for name, values in history.items()
        },
        "indices": {"train": np.array([5, 0, 3]), "validation": np.array([1, 2]), "test": np.array([], dtype=np.int64)},
        "is_trained": True,
        "version": "0.1.0",
    }
    return SavedModel(**parts | changes)


def assert_same(one, other):
    for part in ("class_name", "arguments", "registry", "var_names", "is_trained", "version"):
        assert getattr(one, part) == getattr(other, part)
    assert list(one.state) == list(other.state) and list(one.history) == list(other.history)
    for name, tensor in one.state.items():
        assert tensor.dtype == other.state[name].dtype and tensor.shape == other.state[name].shape
        assert torch.equal(tensor, other.state[name])
    for name, frame in one.history.items():
        pd.testing.assert_frame_equal(frame, other.history[name])
    assert one.indices.keys() == other.indices.keys()
    for split, rows in one.indices.items():
        assert other.indices[split].dtype == np.int64
        np.testing.assert_array_equal(rows, other.indices[split])


def number_of(path, prefix=""):
    """Which example a folder holds; all of its parts must agree."""
    saved = read_folder(path, prefix)
    number = saved.history["train_loss"]["train_loss"].iloc[-1]
    assert_same(example(number), saved)
    return number


def write_text(content):
    """A data writer."""
    return lambda folder: (folder / "adata.h5ad").write_text(content)


# what is written comes back ------------------------------------------------------------------------------------------


def test_a_model_comes_back():
    write_folder("model", example())
    assert_same(example(), read_folder("model"))
    assert sorted(os.listdir("model")) == ["model.json", "model.safetensors"]


NO_EPOCHS = pd.DataFrame({"loss": []}, index=pd.Index([], dtype="int64", name="epoch"), dtype="float64")


@pytest.mark.parametrize(
    "changes",
    [
        {"history": {}, "indices": {}, "is_trained": False},
        {"var_names": {"rna": ["a"], "protein": ["b", "c"]}},
        {"state": {}},
        {"history": {"loss": NO_EPOCHS}},
    ],
    ids=["untrained", "modalities", "no weights", "no epochs"],
)  # fmt: skip
def test_unusual_models_come_back(changes):
    write_folder("model", example(**changes))
    assert_same(example(**changes), read_folder("model"))


def test_numpy_numbers_are_plain_data():
    write_folder("model", example(arguments={"n_latent": np.int64(3), "weights": np.array([1.0, 2.0]), "t": (1, 2)}))
    assert read_folder("model").arguments == {"n_latent": 3, "weights": [1.0, 2.0], "t": [1, 2]}


def test_tensors_that_share_memory():
    table = torch.arange(4.0)
    write_folder("model", example(state={"whole": table, "same": table, "part": table[1:3]}))
    state = read_folder("model").state
    assert state["same"].tolist() == [0, 1, 2, 3] and state["part"].tolist() == [1, 2]


@pytest.mark.parametrize(
    "argument", [object(), float("nan"), {1, 2}, lambda: None], ids=["object", "nan", "set", "code"]
)
def test_what_json_cannot_hold_is_refused(argument):
    with pytest.raises(ValueError, match="The arguments of the model cannot be saved"):
        write_folder("model", example(arguments={"n_latent": argument}))
    assert os.listdir() == []


def test_kinds_of_path(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in ("relative", "deep/down/model", tmp_path / "absolute", "~/home", Path("~") / "home path ü"):
        write_folder(path, example())
        assert_same(example(), read_folder(path))
        assert read_info(str(path))["class"] == "SCVI"
    assert sorted(os.listdir(tmp_path)) == ["absolute", "deep", "home", "home path ü", "relative"]


def test_a_link_stays_a_link():
    os.mkdir("target")
    os.symlink("target", "link")
    write_folder("link", example())
    write_folder("link", example(2.0), overwrite=True)
    assert os.path.islink("link") and number_of("target") == 2.0


def test_many_names_are_quick():
    names = [f"ENSG{i:011d}" for i in range(100_000)]
    start = time.perf_counter()
    write_folder("model", example(var_names=names))
    assert read_folder("model").var_names == names
    assert time.perf_counter() - start < 5


def test_info_needs_no_torch():
    write_folder("model", example())
    code = (
        "import sys; from scvi_lite.io.folder import read_info; info = read_info('model'); "
        "assert not {'torch', 'pandas', 'numpy', 'safetensors'} & set(sys.modules); "
        "print(info['class'], info['tensors']['encoder.weight'], info['history']['train_loss']['value'][1])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[0] == "SCVI [3, 2] nan"


def test_json_is_for_everybody():
    """No NaN literals, which only Python reads, and text as it is."""
    write_folder("model", example())
    text = Path("model/model.json").read_text(encoding="utf-8")
    json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert "β-actin" in text


def test_folders_of_each_format_can_be_read():
    """`tests/data/format_N` was written when N was the newest format."""
    folders = sorted((HERE / "data").glob("format_*"))
    assert len(folders) == FORMAT_VERSION
    for folder in folders:
        assert_same(example(), read_folder(folder))
        assert find_data(folder).read_text() == "cells"


# folders that exist --------------------------------------------------------------------------------------------------


def test_an_existing_folder_is_kept():
    write_folder("model", example(1.0))
    with pytest.raises(FileExistsError, match=r"'model' exists.*'model.json'.*overwrite=True"):
        write_folder("model", example(2.0))
    assert number_of("model") == 1.0
    os.makedirs("papers/draft")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        write_folder("papers", example())
    os.mkdir("empty")
    write_folder("empty", example())
    assert number_of("empty") == 1.0


def test_overwriting_replaces_the_model_and_nothing_else():
    write_folder("model", example(1.0), write_data=write_text("old"))
    Path("model/notes.txt").write_text("mine")
    os.makedirs("model/figures/deep")
    write_folder("model", example(5.0), prefix="b_", overwrite=True, write_data=write_text("b"))
    write_folder("model", example(2.0), overwrite=True)
    assert number_of("model") == 2.0 and number_of("model", "b_") == 5.0
    assert find_data("model") is None and find_data("model", "b_").read_text() == "b"
    assert sorted(os.listdir("model")) == [
        "b_adata.h5ad", "b_model.json", "b_model.safetensors", "figures", "model.json", "model.safetensors",
        "notes.txt",
    ]  # fmt: skip
    assert os.listdir("model/figures") == ["deep"]


def test_a_file_is_not_a_folder():
    Path("model").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match="'model' is a file"):
            write_folder("model", example(), overwrite=overwrite)
    with pytest.raises(FileNotFoundError, match=r"'model' is a file: give the folder that holds the model, '\.'"):
        read_folder("model")
    assert Path("model").read_text() == "mine"


def test_prefixes_stay_in_the_folder():
    with pytest.raises(ValueError, match=r"prefix='\.\./a_' holds a path separator"):
        write_folder("model", example(), prefix="../a_")


def test_data_travel_with_the_model():
    write_folder("model", example(), write_data=write_text("cells"))
    assert find_data("model").read_text() == "cells" and read_info("model")["data"] == ["adata.h5ad"]
    os.remove("model/adata.h5ad")
    with pytest.raises(FileNotFoundError, match="adata.h5ad, saved with the model, is gone.*adata="):
        find_data("model")


# interruptions -------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """The process is gone: nothing after it runs."""


class Interruption:
    """Lets ``n_steps`` calls that change the disk pass, then fails: once, as a full disk does, or for good."""

    CALLS = ("mkdir", "rename", "replace", "unlink", "rmdir", "fsync")

    def __init__(self, monkeypatch, n_steps, for_good):
        self.left, self.for_good, self.failed = n_steps, for_good, False
        for name in self.CALLS:
            monkeypatch.setattr(os, name, self.guard(getattr(os, name)))
        write_bytes = Path.write_bytes

        def half_written(file, content):
            write_bytes(file, content[: len(content) // 2])
            self.step()
            write_bytes(file, content)

        monkeypatch.setattr(Path, "write_bytes", half_written)

    def step(self):
        self.left -= 1
        if self.left == -1 or (self.left < 0 and self.for_good):
            self.failed = True
            raise Killed if self.for_good else OSError(errno.ENOSPC, "No space left on device")

    def guard(self, function):
        def call(*args, **kwargs):
            self.step()
            return function(*args, **kwargs)

        return call


def interrupted_saves(save, for_good):
    """Interrupt a save after 0, 1, 2, ... steps, until it gets through; after each, yield whether it did."""
    for n_steps in range(100):
        with pytest.MonkeyPatch.context() as patch:
            interruption = Interruption(patch, n_steps, for_good)
            try:
                save()
            except (Killed, OSError):
                assert interruption.failed
        yield not interruption.failed
        if not interruption.failed:
            assert n_steps > 8
            return
    pytest.fail("The save never got through.")


@pytest.mark.parametrize("for_good", [False, True], ids=["error", "kill"])
def test_interrupted_overwriting_leaves_old_or_new(for_good):
    """... and later saves work on what it left."""
    os.mkdir("model")
    Path("model/notes.txt").write_text("mine")
    write_folder("model", example(1.0), overwrite=True, write_data=write_text("1.0"))
    seen, expected = set(), 1.0

    def save():
        write_folder("model", example(expected + 1), overwrite=True, write_data=write_text(f"{expected + 1}"))

    for done in interrupted_saves(save, for_good):
        number = number_of("model")
        assert number in (expected, expected + 1) and (not done or number == expected + 1)
        assert find_data("model").read_text() == str(number)
        seen.add(number - expected)
        expected = number
    assert seen == {0.0, 1.0}
    write_folder("model", example(99.0), overwrite=True)
    assert number_of("model") == 99.0 and find_data("model") is None
    left = {name for name in os.listdir("model") if not name.endswith(".partial")}
    assert left == {"model.json", "model.safetensors", "notes.txt"}
    assert for_good or len(os.listdir("model")) == 3


@pytest.mark.parametrize("for_good", [False, True], ids=["error", "kill"])
def test_interrupted_first_save_leaves_nothing_or_the_model(for_good):
    names = iter(f"model{i}" for i in range(100))
    tried = []

    def save():
        tried.append(next(names))
        write_folder(tried[-1], example(), write_data=write_text("cells"))

    for done in interrupted_saves(save, for_good):
        if done or os.path.exists(tried[-1]):
            assert number_of(tried[-1]) == 1.0 and find_data(tried[-1]).read_text() == "cells"
        else:
            write_folder(tried[-1], example())
            assert number_of(tried[-1]) == 1.0


def test_killed_for_real():
    """SIGKILL at any time, in a process that does nothing but save."""
    code = (
        f"import sys; sys.path.insert(0, {str(HERE)!r})\n"
        "from test_io import example, write_folder\n"
        "write_folder('model', example(1.0))\nprint('ready', flush=True)\n"
        "number = 2.0\nwhile True:\n    write_folder('model', example(number), overwrite=True)\n    number += 1\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        deadline = time.monotonic() + 30
        while number_of_or_none("model") in (None, 1.0) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    assert number_of("model") > 1.0
    write_folder("model", example(0.5), overwrite=True)
    assert number_of("model") == 0.5


def number_of_or_none(path):
    """A reader beside a writer may meet the files of two saves, and says so."""
    try:
        return number_of(path)
    except (ValueError, FileNotFoundError):
        return None


def test_a_full_disk_keeps_the_old_model():
    write_folder("model", example(1.0))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(OSError):
            write_folder("model", example(2.0), overwrite=True)
        with pytest.raises(OSError):
            write_folder("other", example(2.0))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert number_of("model") == 1.0
    assert os.listdir() == ["model"] and len(os.listdir("model")) == 2


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="there is no /proc, which nobody can write to")
def test_a_place_that_nobody_can_write_to():
    with pytest.raises(OSError):
        write_folder("/proc/model", example())
    with pytest.raises(OSError):
        write_folder("/proc/self", example(), overwrite=True)


def test_a_data_writer_that_fails():
    write_folder("model", example(1.0), write_data=write_text("old"))

    def fail(folder):
        write_text("half")(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_folder("model", example(2.0), overwrite=True, write_data=fail)
    assert number_of("model") == 1.0 and find_data("model").read_text() == "old"
    assert len(os.listdir("model")) == 3


# damage --------------------------------------------------------------------------------------------------------------


def change_json(**changes):
    info = json.loads(Path("model/model.json").read_text())
    Path("model/model.json").write_text(json.dumps({k: v for k, v in (info | changes).items() if v is not ...}))


def truncate(name):
    content = Path("model", name).read_bytes()
    Path("model", name).write_bytes(content[: len(content) // 2])


def flip_bit(name):
    content = bytearray(Path("model", name).read_bytes())
    content[-3] ^= 1
    Path("model", name).write_bytes(content)


DAMAGE = {
    "truncated weights": (lambda: truncate("model.safetensors"), ValueError, r"is damaged: it holds \d+ bytes"),
    "corrupted weights": (lambda: flip_bit("model.safetensors"), ValueError, "damaged: its checksum"),
    "no weights": (lambda: os.remove("model/model.safetensors"), FileNotFoundError, "copy the whole folder"),
    "truncated JSON": (lambda: truncate("model.json"), ValueError, "not valid JSON"),
    "binary JSON": (lambda: Path("model/model.json").write_bytes(b"\xff\xfe\x00\xd8"), ValueError, "not valid JSON"),
    "empty JSON": (lambda: Path("model/model.json").write_text(""), ValueError, "not valid JSON"),
    "foreign JSON": (lambda: Path("model/model.json").write_text('{"a": 1}'), ValueError, "not written by scvi_lite"),
    "list in JSON": (lambda: Path("model/model.json").write_text("[1]"), ValueError, "not written by scvi_lite"),
    "newer": (lambda: change_json(format_version=99, version="9.9"), RuntimeError, "newer scvi_lite, 9.9.*--upgrade"),
    "no format": (lambda: change_json(format_version="one"), ValueError, "its format_version is 'one'"),
    "parts missing": (lambda: change_json(registry=..., arguments=3), ValueError, "'arguments', 'registry' missing"),
    "tensors missing": (lambda: change_json(tensors={"encoder.bias": [3]}), ValueError, "the tensors 'encoder.bias'"),
    "odd history": (lambda: change_json(history={"loss": [1.0]}), ValueError, "history.*'loss'"),
    "uneven history": (lambda: change_json(history={"a": {"epoch": [1], "value": [1, 2]}}), ValueError, "history.*'a'"),
    "no model": (lambda: os.remove("model/model.json"), FileNotFoundError, "has no model.json, it holds 'model.s"),
    "nothing": (lambda: os.rename("model", "other"), FileNotFoundError, "'model' does not exist"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_told(damage):
    write_folder("model", example())
    do, error, message = DAMAGE[damage]
    do()
    with pytest.raises(error, match=message):
        read_folder("model")


def test_a_forgotten_prefix_is_found():
    write_folder("model", example(), prefix="liver_")
    with pytest.raises(FileNotFoundError, match="There are models with prefix='liver_'"):
        read_folder("model")
    with pytest.raises(FileNotFoundError, match=r"has no liver_model\.json"):
        read_folder(HERE / "data" / "format_1", prefix="liver_")


# scvi-tools ----------------------------------------------------------------------------------------------------------

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
    assert (
        given["args"].items() <= saved.arguments.items()
        and given["setup"].items() <= saved.registry["setup_args"].items()
    )
    write_folder("ours", saved)
    assert_same(saved, read_folder("ours"))
