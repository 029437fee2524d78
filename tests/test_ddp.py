"""Two real processes over gloo, started as a user does: ``python script.py`` with ``devices=2``."""

import json
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest

import scvi_lite
from scvi_lite.model import SCVI
from scvi_lite.train.plan import Plan
from scvi_lite.train.presets import FAST
from scvi_lite.train.processes import free_port

SCRIPT = """
import json, os, sys, time
import numpy as np, torch
from lightning.pytorch.callbacks import Callback
import scvi_lite
from scvi_lite.model import SCVI

rank = int(os.environ.get("LOCAL_RANK", 0))
# The same cells on both ranks, which share no other random numbers
adata = scvi_lite.data.synthetic_iid(batch_size=75, n_genes=12, seed=0)
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

def numbers(model):
    state = {k: v.double().flatten().tolist() for k, v in model.module.state_dict().items()}
    return dict(weights=state, history={k: v[k].tolist() for k, v in model.history.items()})

def describe(model, watch=None, **more):
    watched = {k: vars(watch)[k] for k in ("train", "validation", "noise", "rates")} if watch else {}
    return dict(
        indices=[model.train_indices.tolist(), model.validation_indices.tolist()],
        trained=model.is_trained, draw=torch.rand(1).item(), **numbers(model), **watched, **more)

told = {}

def tell(**content):
    with open(f"rank{rank}.json", "w") as file: json.dump(content, file)
"""


def run_on_two_ranks(body, folder):
    """What each rank has to tell."""
    (folder / "script.py").write_text(SCRIPT + textwrap.dedent(body))
    done = subprocess.run(
        [sys.executable, "script.py"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=280,
        env=os.environ | {"OMP_NUM_THREADS": "1", "MASTER_PORT": str(free_port())},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


# No seed, early stopping, a plateau, checkpoints, saving on both ranks, and a resumption within an epoch.
MANY_OPTIONS = """
from lightning.pytorch.callbacks import ModelCheckpoint
watch, model = Watch(), SCVI(adata, n_hidden=8)
untrained = [float(v.double().sum()) for v in model.module.state_dict().values()]
keep = ModelCheckpoint("kept", every_n_train_steps=3, save_top_k=-1)
settings = dict(max_epochs=30, early_stopping=True, early_stopping_patience=2, early_stopping_min_delta=1.0,
                plan_kwargs={"reduce_lr_on_plateau": True, "lr_patience": 0, "lr_threshold": 1.0}, **options)
model.train(callbacks=[watch, keep], **settings)
told["whole"] = describe(model, watch, untrained=untrained)
model.save("saved")
loaded = SCVI.load("saved", adata)
told["same"] = all(torch.equal(v, loaded.module.state_dict()[k]) for k, v in model.module.state_dict().items())
try:
    model.save("saved")
except FileExistsError as error:
    told["refused"] = str(error)
if rank == 0:  # as scripts do that know of ranks
    model.save("saved", overwrite=True)
torch.manual_seed(7 + rank)
watch, other = Watch(), SCVI(adata, n_hidden=8)
other.train(ckpt_path="kept/epoch=1-step=6.ckpt", callbacks=watch, **settings)
told["resumed"] = describe(other, watch)
"""

PRESET = """
torch.manual_seed(200 + rank)
within = ModelCheckpoint("preset", "within-{step}", every_n_train_steps=7, save_top_k=-1)
between = ModelCheckpoint("preset", "between-{epoch}", every_n_epochs=2, save_top_k=-1, save_on_train_epoch_end=True)
watch, again = Watch(), Watch()
settings = dict(preset="fast", max_epochs=4, **options)
model = SCVI(adata, n_hidden=8)
model.train(callbacks=[watch, within, between], **settings)
other = SCVI(adata, n_hidden=8)
other.train(callbacks=again, ckpt_path="preset/within-step=7.ckpt", **settings)
told["preset"], told["preset_resumed"] = describe(model, watch), describe(other, again)
"""

OTHER_MODELS = """
from scvi_lite.model import CondSCVI, DestVI, LinearSCVI
torch.manual_seed(300 + rank)
adata.obs["fine"] = [f"{name}_{i % 2}" for i, name in enumerate(adata.obs["labels"])]
LinearSCVI.setup_anndata(adata, batch_key="batch")
linear = LinearSCVI(adata, n_hidden=8, n_latent=2)
linear.train(max_epochs=2, **options)
CondSCVI.setup_anndata(adata, labels_key="labels", fine_labels_key="fine")
cond = CondSCVI(adata, n_hidden=8, n_latent=2, prior="mog")
cond.train(max_epochs=2, **options)
told["linear"], told["cond"] = describe(linear), describe(cond)
"""

# Each step sees the same cells or spots on two devices, half of them on each, as on one.
TWO_AS_ONE = """
from scvi_lite.nn.vae import Posterior

def make_spots():
    np.random.seed(1)
    spots = scvi_lite.data.synthetic_iid(batch_size=12, n_genes=12)
    torch.manual_seed(5)
    return DestVI.from_rna_model(spots, cond, amortization="none")

def make_cells():
    torch.manual_seed(6)
    return SCVI(adata, n_latent=2, use_batch_norm="none", use_layer_norm="none", dropout_rate=0.0)

def train(model, batch_size, **devices):
    quiet = dict(accelerator="cpu", enable_progress_bar=False)
    if isinstance(model, DestVI):
        model.train(max_epochs=15, batch_size=batch_size, n_epochs_kl_warmup=5, **quiet, **devices)
    else:
        sample_z, Posterior.sample_z = Posterior.sample_z, lambda posterior, n_samples=None: posterior.z_loc_nk
        split = {"external_indexing": [np.arange(80)]}
        model.train(max_epochs=5, batch_size=batch_size, datasplitter_kwargs=split, **quiet, **devices)
        Posterior.sample_z = sample_z
    return numbers(model)

told["cells_untrained"] = numbers(make_cells())
for name, make, n in (("spots", make_spots, 24), ("cells", make_cells, 80)):
    told[name] = {"two": train(make(), n // 2, devices=2, strategy="ddp")}
"""

# Ranks have unequal shares, and one no validation cell; a rank whose numbers are NaN stops both.
METRICS = """
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
torch.manual_seed(400 + rank)
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
    told["metrics"] = describe(model, terms=terms, message=str(error))
"""

ONE = """
if rank == 0:
    os.environ.pop("LOCAL_RANK", None)
    torch.distributed.destroy_process_group()
    for name, make, n in (("spots", make_spots, 24), ("cells", make_cells, 80)):
        told[name]["one"] = train(make(), n, devices=1)
tell(**told)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ddp")


@pytest.fixture(scope="module")
def ranks(folder):
    """What each rank has to tell of one script that does all of it: two processes take seconds to start."""
    return run_on_two_ranks(MANY_OPTIONS + PRESET + OTHER_MODELS + TWO_AS_ONE + METRICS + ONE, folder)


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


def test_metrics_are_exact_over_ranks(ranks):
    """Means over all cells, where ranks have unequal shares, and one has no validation cell; NaN stops both ranks."""
    first, second = (rank["metrics"] for rank in ranks)
    assert first["history"] == second["history"]
    terms = first["terms"] + second["terms"]
    assert sum(n for _, n in terms) == 1
    assert first["history"]["elbo_validation"] == pytest.approx([terms[0][0]], rel=1e-6)
    assert len(first["history"]["elbo_train"]) == 1
    assert first["message"] == second["message"]
    assert "diverged in epoch 1" in first["message"]
    assert first["weights"] == second["weights"]


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_preset_goes_the_same_way_on_two_ranks(ranks, folder):
    """Learning rate and KL weight follow from the share of the training that is done: on any number of devices."""
    plan, whole = Plan(**FAST), ranks[0]["preset"]

    def expected(n_steps):
        shares = [step / (4 * n_steps) for step in range(4 * n_steps)]
        return [[plan.lr_at(share + 0.5 / (4 * n_steps)), min(1, share / 0.22)] for share in shares]

    np.testing.assert_allclose(whole["rates"], expected(5), rtol=1e-6)
    for rank in ranks:
        assert rank["preset"]["rates"] == whole["rates"]
        assert rank["preset_resumed"]["rates"] == whole["rates"][7:]
        for what in ("weights", "history"):
            assert rank["preset_resumed"][what] == whole[what], what

    adata = scvi_lite.data.synthetic_iid(batch_size=75, n_genes=12)
    SCVI.setup_anndata(adata, batch_key="batch")
    half_way = folder / "preset/between-epoch=1.ckpt"
    for batch_size, n_steps, ckpt_path in ((32, 5, None), (16, 9, half_way)):
        one = SCVI(adata, n_hidden=8)
        options = dict(preset="fast", max_epochs=4, accelerator="cpu", devices=1, enable_progress_bar=False)
        one.train(batch_size=batch_size, ckpt_path=ckpt_path, **options)
        found = [one.history[name][name].to_numpy()[-2:] for name in ("lr-Adam", "kl_weight")]
        np.testing.assert_allclose(np.transpose(found), expected(n_steps)[n_steps - 1 :: n_steps][-2:], rtol=1e-6)


@pytest.mark.parametrize("model", ["linear", "cond"])
def test_ranks_end_with_the_same_other_models(ranks, model):
    first, second = (rank[model] for rank in ranks)
    for what in ("weights", "history"):
        assert first[what] == second[what], what
    assert np.isfinite(first["history"]["train_loss"]).all()


@pytest.mark.parametrize("name", ["cells", "spots"])
def test_two_devices_descend_as_one_with_twice_the_minibatch(ranks, name):
    """Gradients are means over the ranks of the means over their minibatches; what is kept for each spot is its own."""
    one, two = ranks[0][name]["one"], ranks[0][name]["two"]
    assert two == ranks[1][name]["two"]
    np.testing.assert_allclose(one["history"]["train_loss"], two["history"]["train_loss"], rtol=1e-5)
    tolerance = {"rtol": 1e-4, "atol": 1e-6} if name == "cells" else {"rtol": 1e-3, "atol": 1e-4}
    learnt = two["weights"] if name == "cells" else ("proportions.table", "states.table", "beta_g", "log_theta")
    for weight in learnt:
        np.testing.assert_allclose(one["weights"][weight], two["weights"][weight], **tolerance, err_msg=weight)
    if name == "cells":
        before = ranks[0]["cells_untrained"]["weights"]["encoder.loc.weight"]
        assert not np.allclose(before, one["weights"]["encoder.loc.weight"], atol=1e-3)
