"""Two real processes over gloo, started as a user does: ``python script.py`` with ``devices=2``."""

import json
import os
import socket
import subprocess
import sys
import textwrap

import numpy as np
import pytest

import scvi_lite
from scvi_lite.model import SCVI
from scvi_lite.train.plan import Plan
from scvi_lite.train.presets import FAST

SCRIPT = """
import json, os, sys, time
import numpy as np, torch
from lightning.pytorch.callbacks import Callback
import scvi_lite
from scvi_lite.model import SCVI

rank = int(os.environ.get("LOCAL_RANK", 0))
# Ranks that share no seed, unlike the data, which are the same
adata = scvi_lite.data.synthetic_iid(batch_size=75, n_genes=12)
torch.manual_seed(100 + rank)
SCVI.setup_anndata(adata, batch_key="batch")
options = dict(accelerator="cpu", devices=2, strategy="ddp", batch_size=16, enable_progress_bar=False)

class Watch(Callback):
    "Which cells this rank sees, in which epoch, and what dropout draws."
    def __init__(self): self.train, self.validation, self.noise, self.rates = [], [], [], []
    def on_train_batch_start(self, trainer, task, batch, batch_idx):
        self.train.append([trainer.current_epoch, batch.row_n.tolist()])
    def on_train_batch_end(self, trainer, task, *_):
        self.noise.append(torch.get_rng_state().sum().item())
        self.rates.append([trainer.optimizers[0].param_groups[0]["lr"], float(task.kl_weight)])
    def on_validation_batch_start(self, trainer, task, batch, batch_idx):
        self.validation.append([trainer.current_epoch, batch.row_n.tolist()])

def describe(model, watch, **more):
    state = model.module.state_dict()
    return dict(
        weights={k: v.double().sum().item() for k, v in state.items()},
        history={k: v[k].tolist() for k, v in model.history.items()},
        indices=[model.train_indices.tolist(), model.validation_indices.tolist()],
        trained=model.is_trained, draw=torch.rand(1).item(),
        train=watch.train, validation=watch.validation, noise=watch.noise, rates=watch.rates, **more)

def tell(**content):
    with open(f"rank{rank}.json", "w") as file: json.dump(content, file)
"""


def run_on_two_ranks(body, tmp_path):
    """What each rank has to tell."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT + textwrap.dedent(body))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    done = subprocess.run(
        [sys.executable, script],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=200,
        env=os.environ | {"OMP_NUM_THREADS": "1", "MASTER_PORT": port},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """A training with all that can go wrong: no seed, early stopping, a plateau, checkpoints, saving on both ranks."""
    return run_on_two_ranks(
        """
        from lightning.pytorch.callbacks import ModelCheckpoint
        watch, model = Watch(), SCVI(adata, n_hidden=8)
        untrained = [float(v.double().sum()) for v in model.module.state_dict().values()]
        keep = ModelCheckpoint("kept", every_n_train_steps=3, save_top_k=-1)
        model.train(max_epochs=30, early_stopping=True, early_stopping_patience=2, early_stopping_min_delta=1.0,
                    plan_kwargs={"reduce_lr_on_plateau": True, "lr_patience": 0, "lr_threshold": 1.0},
                    callbacks=[watch, keep], **options)
        whole = describe(model, watch, untrained=untrained)
        model.save("saved")
        loaded = SCVI.load("saved", adata)
        same = all(torch.equal(v, loaded.module.state_dict()[k]) for k, v in model.module.state_dict().items())
        try:
            model.save("saved")
        except FileExistsError as error:
            refused = str(error)
        if rank == 0:  # as scripts do that know of ranks
            model.save("saved", overwrite=True)
        torch.manual_seed(7 + rank)
        watch, other = Watch(), SCVI(adata, n_hidden=8)
        other.train(max_epochs=30, early_stopping=True, early_stopping_patience=2, early_stopping_min_delta=1.0,
                    plan_kwargs={"reduce_lr_on_plateau": True, "lr_patience": 0, "lr_threshold": 1.0},
                    ckpt_path="kept/epoch=1-step=6.ckpt", callbacks=watch, **options)
        tell(whole=whole, same=same, refused=refused, resumed=describe(other, watch))
        """,
        tmp_path_factory.mktemp("ddp"),
    )


def test_ranks_end_with_the_same_model(ranks):
    first, second = (rank["whole"] for rank in ranks)
    assert first["untrained"] != second["untrained"]
    for what in ("weights", "history", "indices", "trained", "draw"):
        assert first[what] == second[what], what
    assert first["trained"]
    n_epochs = len(first["history"]["elbo_train"])
    assert 3 <= n_epochs < 30  # stopped early, at the same epoch
    assert first["history"]["lr-Adam"][-1] < first["history"]["lr-Adam"][0]


def test_each_cell_is_used_by_one_rank_in_an_epoch(ranks):
    train, validation = map(set, ranks[0]["whole"]["indices"])
    assert len(train) == 135
    assert not train & validation
    for epoch in range(len(ranks[0]["whole"]["history"]["elbo_train"])):
        for part, cells in (("train", train), ("validation", validation)):
            seen = [row for rank in ranks for e, rows in rank["whole"][part] if e == epoch for row in rows]
            assert sorted(seen) == sorted(cells), (part, epoch)
    orders = [[rows for _, rows in ranks[0]["whole"]["train"]][i] for i in (0, 4)]
    assert orders[0] != orders[1]
    assert len(ranks[0]["whole"]["train"]) == len(ranks[1]["whole"]["train"])


def test_ranks_draw_noise_of_their_own(ranks):
    first, second = (rank["whole"]["noise"] for rank in ranks)
    assert all(a != b for a, b in zip(first, second, strict=True))


def test_save_is_safe_on_all_ranks(ranks):
    for rank in ranks:
        assert rank["same"]
        assert "overwrite=True" in rank["refused"]


def test_resume_within_an_epoch(ranks):
    """Every rank goes on where it was, random numbers included."""
    for rank in ranks:
        for what in ("weights", "history", "indices"):
            assert rank["resumed"][what] == rank["whole"][what], what
        n_steps = len(rank["resumed"]["train"])
        assert rank["resumed"]["train"] == rank["whole"]["train"][-n_steps:]
        assert rank["resumed"]["noise"] == rank["whole"]["noise"][-n_steps:]


def test_metrics_are_exact_over_ranks(tmp_path):
    """Means over all cells, where ranks have unequal shares, and one has no validation cell; NaN stops both ranks."""
    first, second = run_on_two_ranks(
        """
        class Record(Callback):
            def __init__(self): self.terms = []
            def on_validation_start(self, trainer, task):
                self.loss = task.module.loss
                def loss(batch, kl_weight):
                    out = self.loss(batch, kl_weight)
                    self.terms.append([out.reconstruction.item() + out.kl_local.item(), out.n_cells])
                    return out
                task.module.loss = loss
            def on_validation_end(self, trainer, task):
                task.module.loss = self.loss

        from scvi_lite.train import TrainingDivergedError
        record, model = Record(), SCVI(adata, n_hidden=8)
        rows = np.arange(adata.n_obs)
        split = {"external_indexing": [rows[:-1], rows[-1:]]}
        model.train(max_epochs=1, callbacks=record, datasplitter_kwargs=split, **options)
        terms = record.terms

        class Poison(Callback):
            def on_train_batch_start(self, trainer, task, batch, batch_idx):
                if trainer.global_step == 2 and rank == 1:
                    with torch.no_grad(): task.module.log_theta.fill_(torch.nan)
        try:
            model.train(max_epochs=50, callbacks=Poison(), **options)
        except TrainingDivergedError as error:
            message = str(error)
        tell(**describe(model, Watch()), terms=terms, message=message)
        """,
        tmp_path,
    )
    assert first["history"] == second["history"]
    terms = first["terms"] + second["terms"]
    assert sum(n for _, n in terms) == 1
    assert first["history"]["elbo_validation"] == pytest.approx([terms[0][0]], rel=1e-6)
    assert len(first["history"]["elbo_train"]) == 1
    assert first["message"] == second["message"]
    assert "diverged in epoch 1" in first["message"]
    assert first["weights"] == second["weights"]


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_preset_goes_the_same_way_on_two_ranks(tmp_path):
    """Learning rate and KL weight follow from the share of the training that is done: on any number of devices."""
    ranks = run_on_two_ranks(
        """
        from lightning.pytorch.callbacks import ModelCheckpoint
        within = ModelCheckpoint("kept", "within-{step}", every_n_train_steps=7, save_top_k=-1)
        between = ModelCheckpoint("kept", "between-{epoch}", every_n_epochs=2, save_top_k=-1,
                                  save_on_train_epoch_end=True)
        watch, again = Watch(), Watch()
        settings = dict(preset="fast", max_epochs=4, **options)
        model = SCVI(adata, n_hidden=8)
        model.train(callbacks=[watch, within, between], **settings)
        other = SCVI(adata, n_hidden=8)
        other.train(callbacks=again, ckpt_path="kept/within-step=7.ckpt", **settings)
        tell(whole=describe(model, watch), resumed=describe(other, again))
        """,
        tmp_path,
    )
    plan, whole = Plan(**FAST), ranks[0]["whole"]

    def expected(n_steps):
        shares = [step / (4 * n_steps) for step in range(4 * n_steps)]
        return [[plan.lr_at(share + 0.5 / (4 * n_steps)), min(1, share / 0.22)] for share in shares]

    np.testing.assert_allclose(whole["rates"], expected(5), rtol=1e-6)
    for rank in ranks:
        assert rank["whole"]["rates"] == whole["rates"]
        assert rank["resumed"]["rates"] == whole["rates"][7:]
        for what in ("weights", "history"):
            assert rank["resumed"][what] == whole[what], what

    adata = scvi_lite.data.synthetic_iid(batch_size=75, n_genes=12)
    SCVI.setup_anndata(adata, batch_key="batch")
    half_way = tmp_path / "kept/between-epoch=1.ckpt"
    for batch_size, n_steps, ckpt_path in ((32, 5, None), (16, 9, half_way)):
        one = SCVI(adata, n_hidden=8)
        options = dict(preset="fast", max_epochs=4, accelerator="cpu", devices=1, enable_progress_bar=False)
        one.train(batch_size=batch_size, ckpt_path=ckpt_path, **options)
        found = [one.history[name][name].to_numpy()[-2:] for name in ("lr-Adam", "kl_weight")]
        np.testing.assert_allclose(np.transpose(found), expected(n_steps)[n_steps - 1 :: n_steps][-2:], rtol=1e-6)
