"""Scripts on two CPU processes over gloo: under torchrun, and how both ranks end if one fails or by Ctrl-C."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from scvi_lite.train.processes import free_port

SCRIPT = """
import json, os, sys
import lightning.pytorch as pl, numpy as np, torch
import scvi_lite
from scvi_lite.model import SCVI

rank = int(os.environ.get("LOCAL_RANK", 0))
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
        if trainer.global_step == 3:
            open(f"step_{rank}", "w").close()
            if sys.argv[1:] == ["raise", str(rank)]:
                raise RuntimeError("only on one rank")
            if sys.argv[1:] == ["kill", str(rank)]:
                os.kill(os.getpid(), 9)

model = SCVI(adata, n_latent=2)
model.train(callbacks=[Trouble()], **(options | {"max_epochs": 100_000}))
open(f"steps_{rank}", "w").write(str(model.trainer.global_step))
"""


def start(script, *args, launcher=()):
    """A script in a session of its own, as a terminal would start it."""
    Path("train.py").write_text(script)
    return subprocess.Popen(
        [sys.executable, *launcher, "train.py", *args],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def torchrun(script, *args):
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    return start(script, *args, launcher=launcher)


def finish(process, timeout=120):
    """What the script said, and its exit code, once all processes that hold its output have ended."""
    try:
        said, _ = process.communicate(timeout=timeout)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return said, process.returncode


def test_every_rank_holds_the_same_model_and_complete_answers():
    """Two models in one script, without a seed."""
    said, code = finish(torchrun(SCRIPT + WORK))
    assert code == 0, said
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
    assert said.count("Training on 2 devices") == 2


@pytest.mark.parametrize(
    ("launch", "trouble"),
    [(torchrun, ("raise", "1")), (start, ("raise", "1")), (start, ("raise", "0")), (start, ("kill", "1"))],
)
def test_a_rank_that_fails_ends_all(launch, trouble):
    process = launch(SCRIPT + FAILURE, *trouble)
    said, code = finish(process, timeout=90)
    assert len(list(Path().glob("step_?"))) >= 1
    assert code != 0
    if trouble[0] == "raise":
        assert "RuntimeError: only on one rank" in said


def test_ctrl_c_ends_all_ranks_after_the_same_step():
    process = start(SCRIPT + FAILURE)
    while len(list(Path().glob("step_?"))) < 2:
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    said, code = finish(process, timeout=30)
    assert code == 0, said
    assert "Training was interrupted in epoch" in said
    assert Path("steps_0").read_text() == Path("steps_1").read_text()
