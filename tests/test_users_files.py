"""Model folders as they come back from people: edited by hand, from other programs, with data of another setup."""

import hashlib
import json
import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

import scvi_lite
from scvi_lite.model import SCVI


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a small model and its data."""
    adata = scvi_lite.data.synthetic_iid(batch_size=20, n_genes=6)
    SCVI.setup_anndata(adata, batch_key="batch")
    model = SCVI(adata, n_latent=2, n_hidden=4)
    model.train(max_epochs=1, accelerator="cpu", enable_progress_bar=False)
    folder = tmp_path_factory.mktemp("models") / "model"
    model.save(folder, save_anndata=True)
    return folder


def load_edited(saved, edit):
    """Load a copy whose model.json was changed."""
    shutil.copytree(saved, "copy")
    info = json.loads(Path("copy/model.json").read_text())
    edit(info)
    Path("copy/model.json").write_text(json.dumps(info))
    return SCVI.load("copy", accelerator="cpu")


def test_an_accelerator_that_is_not_there_is_refused(saved, monkeypatch):
    """The one that was asked for, not another in its place."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for absent in ("gpu", "cuda", "mps"):
        with pytest.raises(ValueError, match=f"accelerator='{absent}': PyTorch finds none in this machine"):
            SCVI.load(saved, accelerator=absent)
    with pytest.raises(ValueError, match="accelerator='gpus' is not an option. Did you mean 'gpu'"):
        SCVI.load(saved, accelerator="gpus")
    assert SCVI.load(saved).device.type == "cpu"


EDITS = {
    "a huge width": (lambda d: d["arguments"].update(n_hidden=10**12), "weights do not fit its argument n_hidden"),
    "a huge depth": (lambda d: d["arguments"].update(n_layers=10**9), "weights do not fit its argument n_layers"),
    "another width": (lambda d: d["arguments"].update(n_latent=3), r"\(2, 4\) torch.float32, not \(3, 4\)"),
    "a switch as text": (lambda d: d["arguments"].update(log_variational="no"), "True or False is needed"),
    "a rate as text": (lambda d: d["arguments"].update(dropout_rate="0.1"), "dropout_rate='0.1'"),
    "no setup": (lambda d: d.update(registry={}), "'model_name'.* of the right type"),
    "fields as a list": (lambda d: d["registry"].update(fields=[]), "'fields' of the right type"),
    "an unknown kind": (lambda d: d["registry"]["fields"]["x"].update(kind="odd"), "'x' of the right"),
    "no layer": (lambda d: d["registry"]["fields"]["x"].pop("layer"), "'x' of the right type"),
    "no columns": (lambda d: d["registry"]["fields"]["cats_nc"].pop("columns"), "'cats_nc' of the right"),
    "a category twice": (
        lambda d: d["registry"]["fields"]["batch_n"].update(categories=["a", "b", "a"]),
        "'batch_n' of the right type",
    ),
    "a huge number of genes": (lambda d: d["registry"].update(n_features=10**13), "not 10000000000000 different"),
    "a gene twice": (lambda d: d.update(var_names=["gene_0"] * 6), "not 6 different names"),
    "too few genes": (lambda d: d["var_names"].pop(), "not 6 different names"),
    "a huge epoch": (lambda d: d["history"].update(x={"epoch": [10**30], "value": [1]}), "history of 'x'"),
    "a huge value": (lambda d: d["history"].update(x={"epoch": [0], "value": [10**400]}), "history of 'x'"),
    "a missing value": (lambda d: d["history"].update(x={"epoch": [0, 1], "value": [1]}), "1 values for 2 epochs"),
}


@pytest.mark.parametrize("name", EDITS)
def test_edited_by_hand(name, saved):
    edit, message = EDITS[name]
    with pytest.raises(ValueError, match=message):
        load_edited(saved, edit)


def load_with_weights(saved, weights):
    """Load a copy whose model.safetensors was replaced, with the checksum that fits."""
    shutil.copytree(saved, "copy")
    Path("copy/model.safetensors").write_bytes(weights)
    info = json.loads(Path("copy/model.json").read_text())
    info["weights"] = {"bytes": len(weights), "sha256": hashlib.sha256(weights).hexdigest()}
    Path("copy/model.json").write_text(json.dumps(info))
    return SCVI.load("copy", accelerator="cpu")


TENSORS = {
    "a shape": ({"decoder.scale.bias": torch.zeros(3)}, r"decoder.scale.bias \(3,\)"),
    "whole numbers": ({"decoder.scale.bias": torch.zeros(6, dtype=torch.int64)}, "int64, not"),
    "cells as fractions": ({"indices/train": torch.zeros(4)}, "no positions of cells"),
    "cells below zero": ({"indices/train": torch.tensor([-1])}, "no positions of cells"),
    "cells in a table": ({"indices/train": torch.zeros(2, 2, dtype=torch.int64)}, "no positions of cells"),
}


@pytest.mark.parametrize("name", TENSORS)
def test_other_tensors(name, saved):
    tensors, message = TENSORS[name]
    weights = safetensors.torch.load_file(saved / "model.safetensors") | tensors
    with pytest.raises(ValueError, match=message):
        load_with_weights(saved, safetensors.torch.save(weights))


@pytest.mark.parametrize("weights", [b"", b"no tensors" * 9, b"\xff" * 8 + b"{}"])
def test_no_safetensors(weights, saved):
    with pytest.raises(ValueError, match=r"model.safetensors is damaged: .* Restore it"):
        load_with_weights(saved, weights)


@pytest.mark.parametrize("noted", ["text", {"SCVI": "{broken"}, {"SCVI": "[1]"}])
def test_an_odd_setup_in_the_data(noted, saved):
    """It does not matter to a model that brings its own, and is named where it is needed."""
    adata = SCVI.load(saved, accelerator="cpu").adata
    adata.uns["scvi_lite"] = noted
    assert np.isfinite(SCVI.load(saved, adata, accelerator="cpu").get_latent_representation()).all()
    with pytest.raises((RuntimeError, ValueError), match="Call SCVI.setup_anndata|is damaged"):
        SCVI(adata)
    SCVI.setup_anndata(adata)
    assert SCVI(adata).registry.n_batches == 1


@pytest.fixture(scope="module")
def checkpoint(saved, tmp_path_factory):
    """A checkpoint of the same network, after one epoch."""
    folder = tmp_path_factory.mktemp("checkpoints")
    model = SCVI.load(saved, accelerator="cpu")
    quiet = {"accelerator": "cpu", "enable_progress_bar": False, "enable_checkpointing": True}
    model.train(max_epochs=1, default_root_dir=str(folder), **quiet)
    return next(folder.rglob("last.ckpt"))


def resume(saved, path):
    model = SCVI.load(saved, accelerator="cpu")
    model.train(max_epochs=2, ckpt_path=path, accelerator="cpu", enable_progress_bar=False)


CHECKPOINTS = {
    "no cells": lambda c: c["scvi_lite"].pop("n_cells"),
    "nothing of ours": lambda c: c.update(scvi_lite=None),
    "weights as a list": lambda c: c.update(state_dict=[1]),
    "a weight as text": lambda c: c["state_dict"].update({next(iter(c["state_dict"])): "text"}),
    "cells that are not there": lambda c: c["scvi_lite"]["indices"].update(train=torch.arange(1000)),
    "cells as fractions": lambda c: c["scvi_lite"]["indices"].update(train=torch.arange(4.0)),
    "a part too many": lambda c: c["scvi_lite"]["indices"].update(more=torch.arange(4)),
    "a seed as text": lambda c: c["scvi_lite"].update(seed="text"),
    "no random state": lambda c: c["scvi_lite"].pop("random_states"),
    "no optimiser": lambda c: c.pop("optimizer_states"),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_edited_checkpoints(name, saved, checkpoint):
    content = torch.load(checkpoint, weights_only=True)
    CHECKPOINTS[name](content)
    torch.save(content, "edited.ckpt")
    with pytest.raises(ValueError, match="ckpt_path='edited.ckpt' is (damaged|not a checkpoint|of another network)"):
        resume(saved, "edited.ckpt")


class Payload:
    """Becomes a call when unpickled."""

    def __reduce__(self):
        return os.system, ("touch ran",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_runs_nothing(zipped, saved, checkpoint):
    content = torch.load(checkpoint, weights_only=True) | {"callbacks": {"x": np.array([Payload()], dtype=object)}}
    torch.save(content, "evil.ckpt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match="ckpt_path='evil.ckpt' is damaged, or not a checkpoint") as error:
        resume(saved, "evil.ckpt")
    assert not Path("ran").exists()
    assert "weights_only" not in str(error.value)  # PyTorch's advice how to run it all the same


def test_a_changed_bit_in_a_checkpoint(saved, checkpoint):
    with zipfile.ZipFile(checkpoint) as archive:
        largest = archive.read(max(archive.infolist(), key=lambda record: record.file_size))
    content = bytearray(checkpoint.read_bytes())
    content[content.index(largest) + len(largest) // 2] ^= 1
    Path("changed.ckpt").write_bytes(content)
    with pytest.raises(ValueError, match="is damaged"):
        resume(saved, "changed.ckpt")
