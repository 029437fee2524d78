"""Model folders: what is written comes back, damage is told apart, and no interruption loses a model."""

import errno
import json
import os
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

import scvi_lite
from scvi_lite.io.folder import FORMAT_VERSION, SavedModel, find_data, read_folder, read_info, write_folder

HERE = Path(__file__).parent


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


def test_whole_numbers_that_a_mudata_has_of_its_cells_and_features(tmp_path):
    mdata = scvi_lite.data.synthetic_iid(batch_size=10, n_genes=8, n_proteins=3, n_regions=0, return_mudata=True)
    mdata.obsm["place"], mdata.varm["rank"] = np.arange(40).reshape(20, 2), np.arange(11).reshape(11, 1)
    where = {"rna_layer": "rna", "protein_layer": "protein_expression"}
    scvi_lite.model.TOTALVI.setup_mudata(mdata, batch_key="batch", modalities=where)
    scvi_lite.model.TOTALVI(mdata, n_hidden=8).save(tmp_path / "model", save_anndata=True)
    loaded = scvi_lite.model.TOTALVI.load(tmp_path / "model", accelerator="cpu").adata
    np.testing.assert_array_equal(loaded.obsm["place"], mdata.obsm["place"])
    np.testing.assert_array_equal(loaded.varm["rank"], mdata.varm["rank"])
