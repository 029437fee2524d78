"""A training that goes on from a checkpoint ends where the uninterrupted one does, bit for bit."""

import os
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

import scvi_lite
from scvi_lite.model import SCVI

SILENT = {"accelerator": "cpu", "enable_progress_bar": False}


@pytest.fixture(scope="module")
def adata():
    adata = scvi_lite.data.synthetic_iid(batch_size=75, n_genes=20, n_labels=2)
    SCVI.setup_anndata(adata, batch_key="batch")
    return adata


def make(adata, seed):
    """A model whose weights, and whatever is drawn after it, follow from a seed."""
    for draw in (torch.manual_seed, np.random.seed, random.seed):
        draw(seed)
    return SCVI(adata, n_hidden=8, n_latent=3)


def fit(adata, seed, *, max_epochs=3, batch_size=32, early_stopping_patience=4, **options):
    """Train as every test here does: early stopping and a plateau schedule that both have something to remember."""
    model = make(adata, seed)
    model.train(
        max_epochs=max_epochs,
        batch_size=batch_size,
        early_stopping=True,
        early_stopping_patience=early_stopping_patience,
        early_stopping_min_delta=5.0,
        plan_kwargs={
            "n_epochs_kl_warmup": 4,
            "reduce_lr_on_plateau": True,
            "lr_patience": 0,
            "lr_threshold": 5.0,
            "lr_factor": 0.5,
        }
        | options.pop("plan_kwargs", {}),
        **SILENT,
        **options,
    )
    return model


def assert_equal(resumed, whole):
    for name, value in whole.module.state_dict().items():
        assert torch.equal(value, resumed.module.state_dict()[name]), name
    ours, theirs = (m.trainer.optimizers[0].state_dict() for m in (resumed, whole))
    assert ours["param_groups"] == theirs["param_groups"]
    for i, state in theirs["state"].items():
        assert all(torch.equal(value, ours["state"][i][name]) for name, value in state.items())
    assert list(resumed.history) == list(whole.history)
    for name, frame in whole.history.items():
        assert frame.equals(resumed.history[name]), name
    for part in ("train", "validation", "test"):
        assert np.array_equal(getattr(resumed, f"{part}_indices"), getattr(whole, f"{part}_indices"))


CASES = {
    "end of an epoch": ({"save_on_train_epoch_end": True}, {}),
    "end of a validation": ({"save_on_train_epoch_end": False}, {}),
    "end of every second epoch's validation": ({"save_on_train_epoch_end": False}, {"check_val_every_n_epoch": 2}),
    "within epochs": ({"every_n_train_steps": 2}, {}),
    "after each step": ({"every_n_train_steps": 1}, {"val_check_interval": 0.5}),
    "within epochs without validation": ({"every_n_train_steps": 2}, {"check_val_every_n_epoch": 2}),
    "gradients of several minibatches": ({"every_n_train_steps": 1}, {"accumulate_grad_batches": 2}),
    "warm-up in steps": ({"every_n_train_steps": 3}, {"plan_kwargs": {"n_steps_kl_warmup": 25}}),
    "cosine schedule": (
        {"every_n_train_steps": 2},
        {"plan_kwargs": {"reduce_lr_on_plateau": False, "lr_schedule": "cosine"}},
    ),
    "in doubles": ({"every_n_train_steps": 3}, {"precision": "64-true"}),
}


@pytest.mark.parametrize(("saving", "options"), CASES.values(), ids=CASES)
def test_resumed_equals_uninterrupted(adata, tmp_path, saving, options):
    keep = ModelCheckpoint(tmp_path, save_top_k=-1, **saving)
    whole = fit(adata, 1, callbacks=keep, max_epochs=3, **options)
    after_whole = torch.rand(1), np.random.rand(), random.random()
    files = sorted(tmp_path.glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    assert len(files) >= 3 or "check_val_every_n_epoch" in options
    for file in files:
        resumed = fit(adata, 2, ckpt_path=file, max_epochs=3, **options)
        assert_equal(resumed, whole)
        if (
            torch.load(file, weights_only=True)["global_step"] < whole.trainer.global_step
        ):  # else nothing was left to do
            assert after_whole == (torch.rand(1), np.random.rand(), random.random())


def test_early_stopping_and_schedule_go_on(adata, tmp_path):
    """The patience that is used up counts, and a training that had stopped stays so."""
    whole = fit(adata, 1, callbacks=ModelCheckpoint(tmp_path, save_top_k=-1), max_epochs=40)
    n_epochs = len(whole.history["elbo_train"])
    rates = whole.history["lr-Adam"]["lr-Adam"]
    assert n_epochs < 40
    assert rates.iloc[-1] < rates.iloc[0]
    for epoch in (n_epochs - 4, n_epochs - 1):
        (file,) = tmp_path.glob(f"epoch={epoch}-*.ckpt")
        assert_equal(fit(adata, 2, ckpt_path=file, max_epochs=40), whole)


def test_second_training_resumes_with_the_history_of_the_first(adata, tmp_path):
    model = make(adata, 1)
    model.train(max_epochs=2, **SILENT)
    model.train(max_epochs=3, enable_checkpointing=True, default_root_dir=tmp_path, **SILENT)
    resumed = make(adata, 2)
    resumed.train(max_epochs=4, ckpt_path=tmp_path / "checkpoints" / "last.ckpt", **SILENT)
    assert resumed.history["elbo_train"].index.tolist() == [0, 1, 2, 3, 4, 5]
    assert resumed.history["elbo_train"].iloc[:5].equals(model.history["elbo_train"])


def test_a_model_is_loaded_from_a_checkpoint(adata, tmp_path):
    model = fit(adata, 1, max_epochs=2, enable_checkpointing=True, default_root_dir=tmp_path, train_size=0.7)
    assert isinstance(model.trainer.checkpoint_callback, scvi_lite.train.SaveCheckpoint)
    last = tmp_path / "checkpoints" / "last.ckpt"
    with pytest.raises(FileNotFoundError, match="is a checkpoint.*adata=adata.*ckpt_path"):
        SCVI.load(last)
    with pytest.raises(ValueError, match="holds a SCVI"):
        scvi_lite.model.PEAKVI.load(last, adata)
    loaded = SCVI.load(last, adata, accelerator="cpu")
    assert loaded.is_trained and loaded.history["elbo_validation"].equals(model.history["elbo_validation"])
    np.testing.assert_array_equal(loaded.validation_indices, model.validation_indices)
    np.testing.assert_array_equal(loaded.get_latent_representation(), model.get_latent_representation())
    before = torch.load(last, weights_only=True)
    del before["scvi_lite"]["model"]  # as checkpoints were before
    torch.save(before, tmp_path / "before.ckpt")
    with pytest.raises(ValueError, match="does not tell what model it is of"):
        SCVI.load(tmp_path / "before.ckpt", adata)


def test_checkpoint_is_plain_data(adata, tmp_path):
    fit(adata, 1, max_epochs=1, enable_checkpointing=True, default_root_dir=tmp_path)
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert names == {"best.ckpt", "last.ckpt"}
    for name in names:
        assert "scvi_lite" in torch.load(tmp_path / "checkpoints" / name, weights_only=True)


@pytest.fixture(scope="module")
def checkpoint(adata, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    fit(adata, 1, max_epochs=1, callbacks=ModelCheckpoint(folder, every_n_train_steps=2, save_top_k=-1))
    return min(folder.glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)


def test_no_such_file(adata):
    with pytest.raises(FileNotFoundError, match="ckpt_path='nowhere.ckpt': there is no such file"):
        fit(adata, 1, ckpt_path="nowhere.ckpt")


def test_truncated_file(adata, checkpoint, tmp_path):
    part = tmp_path / "part.ckpt"
    for n_bytes in (0, 10, 2000, checkpoint.stat().st_size - 100):
        part.write_bytes(checkpoint.read_bytes()[:n_bytes])
        with pytest.raises(ValueError, match="damaged, or not a checkpoint"):
            fit(adata, 1, ckpt_path=part)


def test_foreign_files(adata, tmp_path):
    file = tmp_path / "other.ckpt"
    torch.save({"state_dict": {}}, file)
    with pytest.raises(ValueError, match="is not a checkpoint that train"):
        fit(adata, 1, ckpt_path=file)
    torch.save({"state_dict": {}, "hook": subprocess.Popen}, file)
    with pytest.raises(ValueError, match="damaged, or not a checkpoint"):
        fit(adata, 1, ckpt_path=file)


def test_checkpoint_of_another_network_or_data(adata, checkpoint):
    with pytest.raises(ValueError, match=r"is of another network: .*'encoder.loc.weight'"):
        SCVI(adata, n_hidden=8, n_latent=4).train(ckpt_path=checkpoint, **SILENT)
    fewer = adata[:100].copy()
    with pytest.raises(ValueError, match="training on 150 cells; here are 100"):
        fit(fewer, 1, ckpt_path=checkpoint)


def test_minibatches_cannot_change_within_an_epoch(adata, checkpoint):
    with pytest.raises(ValueError, match="Give batch_size=32"):
        fit(adata, 1, ckpt_path=checkpoint, batch_size=64)


def test_resume_after_a_kill(adata, tmp_path):
    """SIGKILL at any moment leaves a whole checkpoint, and what goes on from it equals the uninterrupted training."""
    adata.write_h5ad(tmp_path / "cells.h5ad")
    # One process imports all, and a child of it is killed.
    (tmp_path / "script.py").write_text(f"""
import os, signal, sys, time
sys.path.insert(0, {os.path.dirname(__file__)!r})
import anndata, torch
from lightning.pytorch.callbacks import ModelCheckpoint
from test_resume import assert_equal, fit
adata, options, last = anndata.read_h5ad("cells.h5ad"), {{"early_stopping_patience": 1000}}, "kept/last.ckpt"
child = os.fork()
if child == 0:
    keep = ModelCheckpoint("kept", every_n_train_steps=1, save_top_k=0, save_last=True)
    fit(adata, 1, callbacks=keep, max_epochs=1000, **options)
    os._exit(1)  # was not killed
while not os.path.exists(last) and os.waitpid(child, os.WNOHANG) == (0, 0):
    time.sleep(0.05)
time.sleep(0.5)
os.kill(child, signal.SIGKILL)
assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
options["max_epochs"] = torch.load(last, weights_only=True)["epoch"] + 2
assert_equal(fit(adata, 2, ckpt_path=last, **options), fit(adata, 1, **options))
""")
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
