"""Ctrl-C, the stop button and a poisoned loss end a training without losing the model."""

import os
import signal
import subprocess
import sys
import threading
import time
from itertools import takewhile

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback

import scvi_lite
from scvi_lite.model import SCVI
from scvi_lite.train import TrainingDivergedError

SILENT = {"accelerator": "cpu", "enable_progress_bar": False}

SCRIPT = """
import os, signal, sys, threading, time, warnings
import numpy as np, torch
from lightning.pytorch.callbacks import Callback
import scvi_lite
from scvi_lite.model import SCVI

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background has it ignored

class At(Callback):
    def __init__(self, **actions): self.actions = actions
    def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
        self.step = trainer.global_step
        self.actions.get("step", lambda n: None)(trainer.global_step)
    def on_validation_batch_start(self, trainer, task, batch, batch_idx):
        self.actions.get("validation", lambda n: None)(trainer.global_step)

def interrupt(*args):
    os.kill(os.getpid(), signal.SIGINT)

adata = scvi_lite.data.synthetic_iid(batch_size=100, n_genes=10)
SCVI.setup_anndata(adata)
model = SCVI(adata, n_hidden=4)
options = dict(max_epochs=50, batch_size=30, accelerator="cpu", enable_progress_bar=False)
"""


# One interrupt ends the training after the minibatch, also with a least number of epochs, and in a validation.
ONE = """
for when in ("step", "validation"):
    at = At(**{when: lambda n: n == 15 + 3 * (when == "validation") and interrupt()})
    model = SCVI(adata, n_hidden=4)
    model.train(callbacks=at, min_epochs=40, **options)
    assert at.step == {"step": 15, "validation": 18}[when]
    assert model.is_trained and not model.module.training
    assert len(model.history["elbo_train"]) == 3
    assert all(model.module.encode(b).z_loc_nk.isfinite().all() for b in model._minibatches())
    model.save(when)
    assert SCVI.load(when, adata).history["elbo_train"].equals(model.history["elbo_train"])
assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
model.train(**options | {"max_epochs": 2})
assert len(model.history["elbo_train"]) == 5
print("went on")
"""

# The second one is a KeyboardInterrupt where Python stands; the model is there and can be used.
TWO = """
def twice(n):
    if n == 15:
        interrupt()
        interrupt()
        time.sleep(5)
        print("not at once")
model = SCVI(adata, n_hidden=4)
before = {name: value.clone() for name, value in model.module.state_dict().items()}
try:
    model.train(callbacks=At(step=twice), **options)
except KeyboardInterrupt:
    print("interrupted")
assert model.is_trained and not model.module.training
assert len(model.history["elbo_train"]) == 2
assert not torch.equal(before["encoder.loc.weight"], model.module.encoder.loc.weight)
model.save("kept")
assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
"""

# The stop button of a notebook is a SIGINT from another process, at any moment.
FROM_OUTSIDE = """
model = SCVI(adata, n_hidden=4)
try:
    at = At(step=lambda n: n == 30 and print("running", flush=True))
    model.train(callbacks=at, **options | {"max_epochs": 100000})
except KeyboardInterrupt:
    print("not reached")
print("epochs", len(model.history["elbo_train"]))
"""


def test_interrupts_in_a_script(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT + ONE + TWO + FROM_OUTSIDE)
    command, environment = [sys.executable, script], os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, **pipes) as process:
        before = list(takewhile(lambda line: line != "running\n", process.stdout))
        time.sleep(0.3)
        sent = time.monotonic()
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    assert before == ["went on\n", "interrupted\n"], errors
    assert time.monotonic() - sent < 20
    assert process.returncode == 0, errors
    assert int(output.removeprefix("epochs ")) >= 5
    assert errors.count("Training was interrupted in epoch 2. The model is kept as trained so far.") == 2


@pytest.fixture
def model():
    adata = scvi_lite.data.synthetic_iid(batch_size=60, n_genes=10)
    adata.obs["depth"] = np.linspace(-1, 1, adata.n_obs)
    SCVI.setup_anndata(adata, continuous_covariate_keys=["depth"])
    return SCVI(adata, n_hidden=4)


def test_training_in_a_thread(model):
    """Only the main thread can handle signals; a training elsewhere leaves them alone."""
    before = signal.getsignal(signal.SIGINT)
    errors = []

    def train():
        try:
            model.train(max_epochs=2, **SILENT)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=train)
    thread.start()
    thread.join(60)
    assert not errors
    assert len(model.history["elbo_train"]) == 2
    assert signal.getsignal(signal.SIGINT) is before


def test_exit_from_a_callback_stays_an_exit(model):
    class Leave(Callback):
        def on_train_epoch_end(self, trainer, task):
            sys.exit(3)

    with pytest.raises(SystemExit) as error:
        model.train(max_epochs=3, callbacks=Leave(), **SILENT)
    assert error.value.code == 3
    assert not model.module.training


def test_error_in_a_callback_keeps_what_was_trained(model):
    class Fail(Callback):
        def on_train_epoch_start(self, trainer, task):
            if trainer.current_epoch == 2:
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        model.train(max_epochs=5, callbacks=Fail(), **SILENT)
    assert model.is_trained
    assert len(model.history["elbo_train"]) == 2


class Poison(Callback):
    """Makes a weight NaN before a step."""

    def __init__(self, at_step):
        self.at_step = at_step
        self.seen = 0

    def on_train_batch_start(self, trainer, task, batch, batch_idx):
        self.seen += 1
        if self.seen == self.at_step:
            with torch.no_grad():
                task.module.encoder.loc.weight.fill_(torch.nan)


def test_nan_keeps_the_last_good_weights_and_history(model):
    good = []

    class Watch(Callback):
        def on_train_epoch_end(self, trainer, task):
            good.append({name: value.clone() for name, value in task.module.state_dict().items()})

    message = r"diverged in epoch 3: .*elbo_train=nan.*lr=0.001.*'lr': 0.0001"
    with pytest.raises(TrainingDivergedError, match=message) as error:
        model.train(max_epochs=9, batch_size=27, callbacks=[Watch(), Poison(at_step=4 * 3 + 2)], **SILENT)
    assert "gradient_clip_val=1" in str(error.value)
    assert model.is_trained
    assert model.history["elbo_train"].index.tolist() == [0, 1, 2]
    assert all(torch.equal(good[2][name], value) for name, value in model.module.state_dict().items())
    assert all(model.module.encode(batch).z_loc_nk.isfinite().all() for batch in model._minibatches())
    model.train(max_epochs=1, **SILENT)
    assert model.history["elbo_train"].index.tolist() == [0, 1, 2, 3]


def test_nan_in_the_first_epoch_leaves_an_untrained_model(model):
    before = {name: value.clone() for name, value in model.module.state_dict().items()}
    with pytest.raises(TrainingDivergedError, match="diverged in epoch 0"):
        model.train(max_epochs=9, callbacks=Poison(at_step=1), **SILENT)
    assert not model.is_trained
    assert not model.history
    assert all(torch.equal(before[name], value) for name, value in model.module.state_dict().items())


def test_nan_is_noticed_early_in_a_long_epoch(model):
    """After some steps, not after the epoch; what a long epoch learned before is kept."""
    poison = Poison(at_step=5)
    with pytest.raises(TrainingDivergedError, match="diverged in epoch 0, minibatch 50"):
        model.train(max_epochs=1, batch_size=2, train_size=1.0, callbacks=poison, **SILENT)
    assert poison.seen == 50


def test_huge_learning_rate(model):
    with pytest.raises(TrainingDivergedError, match="diverged in epoch"):
        model.train(max_epochs=50, plan_kwargs={"lr": 1e18, "eps": 1e-20}, **SILENT)
    assert all(value.isfinite().all() for value in model.module.state_dict().values())


def test_poisoned_covariate_is_named_as_the_likely_cause():
    adata = scvi_lite.data.synthetic_iid(batch_size=60, n_genes=10)
    adata.obs["depth"] = np.full(adata.n_obs, 3e38)
    with pytest.warns(UserWarning, match="values reach 3e\\+38"):
        SCVI.setup_anndata(adata, continuous_covariate_keys=["depth"])
    with pytest.raises(TrainingDivergedError, match="look for extreme counts, or a covariate on a scale far from 1"):
        SCVI(adata, n_hidden=4).train(max_epochs=2, **SILENT)


def test_poisoned_validation_cell_is_told_apart():
    adata = scvi_lite.data.synthetic_iid(batch_size=60, n_genes=10)
    adata.obs["depth"] = np.zeros(adata.n_obs)
    adata.obs.iloc[7, adata.obs.columns.get_loc("depth")] = 3e38
    with pytest.warns(UserWarning, match="values reach 3e\\+38"):
        SCVI.setup_anndata(adata, continuous_covariate_keys=["depth"])
    others = np.delete(np.arange(adata.n_obs), [7, 8])
    with pytest.raises(TrainingDivergedError, match="a validation cell is unlike the training cells"):
        SCVI(adata, n_hidden=4, use_batch_norm="none").train(
            max_epochs=2, datasplitter_kwargs={"external_indexing": [others, [7, 8]]}, **SILENT
        )
