"""A script that torchrun starts once for each device, on two CPU processes over gloo."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from scvi_lite.train.launch import free_port

SCRIPT = """
import json, os, sys
import lightning.pytorch as pl, numpy as np, torch
import scvi_lite
from scvi_lite.model import SCVI

rank = int(os.environ["RANK"])
adata = scvi_lite.data.simulate(n_cells=101, n_genes=10, seed=0)
SCVI.setup_anndata(adata, batch_key="batch")
options = dict(max_epochs=3, batch_size=16, accelerator="cpu", devices=2, enable_progress_bar=False)

class Watch(pl.Callback):
    seen = {"train": [], "validation": []}
    def on_train_batch_start(self, trainer, task, batch, batch_idx):
        if trainer.current_epoch == 0:
            self.seen["train"] += batch.row_n.tolist()
    def on_validation_batch_start(self, trainer, task, batch, batch_idx, dataloader_idx=0):
        if trainer.current_epoch == 0:
            self.seen["validation"] += batch.row_n.tolist()

def summary(model):
    return {
        "weights": [float(value.double().sum()) for value in model.module.state_dict().values()],
        "history": {name: frame.iloc[:, 0].tolist() for name, frame in model.history.items()},
        "train": model.train_indices.tolist(),
        "validation": model.validation_indices.tolist(),
        "latent": model.get_latent_representation().tolist(),
    }
"""
WORK = """
first, watch = SCVI(adata, n_latent=2), Watch()
first.train(callbacks=[watch], early_stopping=True, **options)
second = SCVI(adata, n_latent=2)
second.train(plan_kwargs={"n_epochs_kl_warmup": None, "n_steps_kl_warmup": 24}, **options)
second.save("model")
loaded = SCVI.load("model", adata)
about = {"first": summary(first), "second": summary(second), "loaded": summary(loaded), "seen": watch.seen}
json.dump(about, open(f"rank_{rank}.json", "w"))
"""
FAILURE = """
class Trouble(pl.Callback):
    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == 3 and rank == 1:
            raise RuntimeError("only on one rank")

model = SCVI(adata, n_latent=2)
model.train(callbacks=[Trouble()], **(options | {"max_epochs": 100_000}))
"""


def torchrun(script, timeout=120):
    Path("train.py").write_text(script)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port"]
    return subprocess.run(
        [*command, str(free_port()), "train.py"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )


def test_every_rank_holds_the_same_model_and_complete_answers():
    """Two models in one script, without a seed."""
    done = torchrun(SCRIPT + WORK)
    assert done.returncode == 0, done.stdout
    zero, one = (json.loads(Path(f"rank_{rank}.json").read_text()) for rank in range(2))
    for model in ("first", "second", "loaded"):
        assert zero[model] == one[model]
    assert zero["loaded"] == zero["second"]
    assert zero["first"]["train"] != zero["second"]["train"]
    assert np.shape(zero["first"]["latent"]) == (101, 2)
    for part in ("train", "validation"):  # each cell once, on one rank
        assert sorted(zero["seen"][part] + one["seen"][part]) == sorted(zero["first"][part])
    assert not set(zero["first"]["train"]) & set(zero["first"]["validation"])
    # Six minibatches an epoch over both devices: the warm-up of 24 is at 2/24 in the last step of epoch 0 ...
    assert zero["second"]["history"]["kl_weight"] == pytest.approx([4 / 24, 10 / 24, 16 / 24])
    assert done.stdout.count("Training on 2 devices") == 2


def test_an_exception_on_one_rank_ends_all():
    done = torchrun(SCRIPT + FAILURE, timeout=90)
    assert done.returncode != 0
    assert "RuntimeError: only on one rank" in done.stdout
