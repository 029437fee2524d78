"""Fresh worker processes, as a notebook trains on several devices: what travels, what fails and how."""

import copy
import json
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from multiprocessing.forkserver import ensure_running
from pathlib import Path

import anndata
import cloudpickle
import forked
import lightning.pytorch as pl
import numpy as np
import pandas as pd
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy

import scvi_lite
from scvi_lite.data.datamodule import CellDataModule, Split
from scvi_lite.data.disk import LazyStore
from scvi_lite.data.store import load
from scvi_lite.model import SCVI
from scvi_lite.train import launch, processes
from scvi_lite.train.divergence import TrainingDivergedError
from scvi_lite.train.plan import Plan
from scvi_lite.train.task import Task

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # as what a notebook defines
FORKS = pytest.mark.usefixtures("forks")
WORKERS = dict(accelerator="cpu", devices=2, strategy="ddp_notebook", enable_progress_bar=False)


@pytest.fixture(scope="module")
def adata():
    adata = scvi_lite.data.simulate(n_cells=120, n_genes=10, seed=0)
    SCVI.setup_anndata(adata, batch_key="batch")
    return adata


@pytest.fixture
def model(adata):
    """What failures happen to."""
    return SCVI(adata, n_latent=2)


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def nothing_left(tmp_path, monkeypatch):
    """Temporary files are removed, however a training ends."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    yield
    assert list(folder.iterdir()) == []


@pytest.fixture(scope="module")
def fork_server():
    ensure_running()


@pytest.fixture
def forks(fork_server, monkeypatch):
    """Workers are forks, where it is not the start of processes that is tested."""
    monkeypatch.setattr(processes, "subprocess", forked)


def weights(model):
    return {name: value.clone() for name, value in model.module.state_dict().items()}


def same(one, other):
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=0)
    return True


# What travels ---------------------------------------------------------------------------------------------------------


class Watch(pl.Callback):
    """Writes which cells this rank saw; speaks, warns, and remembers."""

    def __init__(self):
        self.seen = {"train": [], "validation": []}
        self.n_epochs = 0

    def on_train_batch_start(self, trainer, task, batch, batch_idx):
        self.seen["train"].append((trainer.current_epoch, batch.row_n.tolist()))

    def on_validation_batch_start(self, trainer, task, batch, batch_idx, dataloader_idx=0):
        self.seen["validation"].append((trainer.current_epoch, batch.row_n.tolist()))

    def on_train_epoch_end(self, trainer, task):
        self.n_epochs += 1
        print("epoch", trainer.current_epoch, "of rank", trainer.global_rank)

    def on_train_end(self, trainer, task):
        if trainer.is_global_zero:
            warnings.warn("a word from the worker", stacklevel=1)
        sizes = {part: len(store) for part, store in trainer.datamodule.shards.items()}
        about = {"seen": self.seen, "sizes": sizes, "pid": os.getpid(), "folder": os.getcwd()}
        Path(f"rank_{trainer.global_rank}.json").write_text(json.dumps(about))


def seen_by_ranks(part):
    """For each epoch, the cells that all ranks saw."""
    epochs = {}
    for rank in range(2):
        for epoch, rows in json.loads(Path(f"rank_{rank}.json").read_text())["seen"][part]:
            epochs.setdefault(epoch, []).extend(rows)
    return epochs


def test_a_training_and_its_resumption_from_a_backed_file(adata, tmp_path, capsys, monkeypatch):
    model, watch, logger = SCVI(adata, n_latent=2), Watch(), CSVLogger("logs")
    split = [np.arange(0, 99), np.array([99])]  # the second rank has no validation cell
    options = WORKERS | dict(
        batch_size=16,
        logger=logger,
        enable_checkpointing=True,
        early_stopping=True,
        gradient_clip_val=1.0,
        precision="bf16-mixed",
        datasplitter_kwargs={"external_indexing": split, "shuffle_over": "all"},
        plan_kwargs={"reduce_lr_on_plateau": True, "lr_patience": 1, "scale_lr": True},
    )
    with pytest.warns(UserWarning, match="a word from the worker"):
        model.train(max_epochs=2, callbacks=[watch], **options)
    assert model.is_trained and model.trainer is None
    assert model.history["elbo_validation"].index.tolist() == [0, 1]
    assert model.history["lr-Adam"].iloc[0, 0] == pytest.approx(2e-3)
    assert model.train_indices.tolist() == list(range(99))
    # Each training cell once an epoch, each validation cell once, and not the same to a rank in every epoch.
    assert [sorted(rows) for rows in seen_by_ranks("train").values()] == [list(range(99))] * 2
    assert [sorted(rows) for rows in seen_by_ranks("validation").values()] == [[99]] * 2
    by_epoch = [set(), set()]
    for epoch, rows in watch.seen["train"]:
        by_epoch[epoch] |= set(rows)
    assert by_epoch[0] != by_epoch[1]
    # What the user gave holds what the first rank's copy held.
    assert watch.n_epochs == 2
    assert capsys.readouterr().out == "epoch 0 of rank 0\nepoch 1 of rank 0\n"
    metrics = pd.read_csv(Path(logger.log_dir) / "metrics.csv")
    assert metrics["elbo_train"].dropna().tolist() == pytest.approx(model.history["elbo_train"]["elbo_train"].tolist())
    about = json.loads(Path("rank_0.json").read_text())
    assert about["folder"] == str(tmp_path)
    with pytest.raises(ProcessLookupError):
        os.kill(about["pid"], 0)

    # It goes on with the same cells in a file, which each worker opens again; their batches are in memory only.
    in_file = adata.copy()
    del in_file.obs["batch"]
    in_file.write_h5ad("cells.h5ad")
    backed = anndata.read_h5ad("cells.h5ad", backed="r")
    backed.obs["batch"] = adata.obs["batch"].copy()
    monkeypatch.setattr("scvi_lite.model.training.load_for_training", LazyStore)
    before = model.history["elbo_train"]
    model.adata = backed
    options["logger"] = False
    with pytest.warns(UserWarning, match="a word from the worker"):
        model.train(max_epochs=3, callbacks=[watch], ckpt_path="scvi_lite_runs/checkpoints/last.ckpt", **options)
    assert model.history["elbo_train"].index.tolist() == [0, 1, 2]
    pd.testing.assert_frame_equal(model.history["elbo_train"].iloc[:2], before)
    assert sorted(seen_by_ranks("train")[2]) == list(range(99))
    SCVI.setup_anndata(backed, batch_key="batch")
    with pytest.raises(ValueError, match="view of a backed file.*to_memory"):
        SCVI(backed[:60], n_latent=2).train(max_epochs=1, **WORKERS)


SCRIPT = """
import json, sys, scvi_lite, torch
from scvi_lite.model import SCVI
adata = scvi_lite.data.simulate(n_cells=120, n_genes=10, seed=0)
SCVI.setup_anndata(adata, batch_key="batch")
scvi_lite.settings.seed = 3
for i in range(2):
    model = SCVI(adata, n_latent=2)
    model.train(max_epochs=2, batch_size=16, accelerator="cpu", devices=2, enable_progress_bar=False, **{options})
    model.save(f"model_{{i}}_{{sys.argv[1]}}")
latent = model.get_latent_representation()
"""


@FORKS
def test_the_seed_decides_and_a_script_gives_the_same(adata):
    """Two trainings in one session; the second shows that the random numbers of the session go on alike."""
    Path("train.py").write_text(SCRIPT.format(options="{}"))
    subprocess.run([sys.executable, "train.py", "script"], check=True, timeout=120)
    scvi_lite.settings.seed = 3
    try:
        models = []
        for _ in range(2):
            models.append(SCVI(adata, n_latent=2))
            models[-1].train(max_epochs=2, batch_size=16, **WORKERS)
    finally:
        scvi_lite.settings.seed = None
    for i, model in enumerate(models):
        script = SCVI.load(f"model_{i}_script", adata)
        assert same(weights(model), weights(script))
        pd.testing.assert_frame_equal(model.history["elbo_validation"], script.history["elbo_validation"])
        assert np.array_equal(model.train_indices, script.train_indices)


def test_cells_are_not_pickled(tmp_path):
    adata = scvi_lite.data.simulate(n_cells=2000, n_genes=100, seed=0)
    SCVI.setup_anndata(adata, batch_key="batch")
    model = SCVI(adata, n_latent=2, n_hidden=8)
    store = load(adata, model.registry)
    data = CellDataModule(store, Split(*np.split(np.arange(10), [5, 10])), 128, 0)
    launch.write_job(tmp_path, Task(model.module, Plan()), data, None, {})
    assert (tmp_path / "job.pkl").stat().st_size < 100_000 < store.n_bytes
    assert data.store is store
    (tmp_path / "temporary").rename(tmp_path / "other")
    (tmp_path / "temporary").mkdir()


def test_the_package_and_the_paths_of_the_session_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", ["", "relative", *sys.path])
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    variables = processes.environment(2)
    paths = variables["PYTHONPATH"].split(os.pathsep)
    assert paths[0] == str(tmp_path / "relative")
    assert str(Path(scvi_lite.__file__).parents[1]) in paths
    assert variables["OMP_NUM_THREADS"] == "7"


def test_too_few_cells_are_refused_before_a_process_starts(adata, monkeypatch):
    monkeypatch.setattr(processes.Workers, "attend", lambda self: pytest.fail("started"))
    with pytest.raises(ValueError, match="3 training cells are too few for 2 device"):
        SCVI(adata[:4].copy(), n_latent=2).train(train_size=0.75, max_epochs=1, **WORKERS)


# On a GPU ------------------------------------------------------------------------------------------------------------

ON_GPU = dict(max_epochs=2, batch_size=16, accelerator="gpu", enable_progress_bar=False)


@pytest.mark.gpu
def test_workers_share_a_gpu_that_the_session_uses(adata):
    """Two ranks on one GPU, over gloo, after this process used it; then a model from the first, and again."""
    strategy = DDPStrategy(process_group_backend="gloo", parallel_devices=[torch.device("cuda", 0)] * 2)
    one = SCVI(adata, n_latent=2)
    one.train(devices=1, **ON_GPU)
    assert one.device.type == "cuda"
    monkey = pytest.MonkeyPatch()
    monkey.setattr("scvi_lite.train.strategies._IS_INTERACTIVE", True)
    try:
        for two in (SCVI(adata, n_latent=2), one):
            two.train(strategy=copy.deepcopy(strategy), **ON_GPU)
            assert two.device.type == "cuda"
            assert np.isfinite(two.get_latent_representation()).all()
            assert two.history["elbo_train"].notna().all().all()
    finally:
        monkey.undo()


@pytest.mark.gpu
def test_nccl_with_one_rank():
    options = "{'strategy': 'ddp'}"
    script = SCRIPT.format(options=options).replace('"cpu", devices=2', '"gpu", devices=1')
    Path("train.py").write_text(script)
    subprocess.run([sys.executable, "train.py", "nccl"], check=True, timeout=120)


# What fails -----------------------------------------------------------------------------------------------------------


class Oops(Exception):
    pass


class Trouble(pl.Callback):
    """Does something in the third step, on some ranks; notes who is there."""

    def __init__(self, act, ranks=(0, 1)):
        self.act, self.ranks = act, ranks

    def on_train_start(self, trainer, task):
        Path(f"pid_{trainer.global_rank}").write_text(str(os.getpid()))

    def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
        if trainer.global_step == 3 and trainer.global_rank in self.ranks:
            self.act(task)

    def on_train_end(self, trainer, task):
        Path(f"steps_{trainer.global_rank}").write_text(str(trainer.global_step))


def kill(task):
    os.kill(os.getpid(), signal.SIGKILL)


def fail(task):
    raise Oops(f"in a callback of rank {task.global_rank}")


def announce(task):
    Path("third_step").touch()


def dawdle(task):
    Path("third_step").touch()
    time.sleep(100)


def poison(task):
    next(task.module.parameters()).data.fill_(float("nan"))


def pids():
    return [int(path.read_text()) for path in sorted(Path().glob("pid_*"))]


def gone(pid, patience=10.0):
    """Whether a process has ended, or ends soon."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def attempt(model, act, ranks=(0, 1), max_epochs=1000):
    model.train(max_epochs=max_epochs, batch_size=16, callbacks=[Trouble(act, ranks)], **WORKERS)


def all_ended(model, before):
    """Both workers were there and are gone, and the model is as it was."""
    assert len(pids()) == 2
    assert all(gone(pid, 0.1) for pid in pids())
    assert same(before, weights(model))
    return not model.is_trained and not model.history


def test_a_worker_that_is_killed_ends_all(model):
    before = weights(model)
    with pytest.raises(processes.WorkerError, match="Worker 1 of 2 was killed by signal 9"):
        attempt(model, kill, [1])
    assert all_ended(model, before)


@FORKS
@pytest.mark.parametrize("rank", [1, 0])
def test_a_worker_that_fails_ends_all_with_its_error(rank, model):
    before = weights(model)
    with pytest.raises(Oops, match=f"in a callback of rank {rank}") as raised:
        attempt(model, fail, [rank])
    assert f"Worker {rank} of 2" in str(raised.value.__cause__)
    assert "raise Oops" in str(raised.value.__cause__)
    assert all_ended(model, before)


def test_a_worker_that_cannot_start(model, tmp_path, monkeypatch):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "cloudpickle.py").write_text("raise ImportError('no such luck')")
    monkeypatch.syspath_prepend(tmp_path / "bad")
    with pytest.raises(processes.WorkerError, match=r"(?s)ended with exit code 1.*ImportError: no such luck"):
        attempt(model, fail)
    assert not model.is_trained


def interrupt_after(path, times):
    """Send interrupts to this process once a file is there."""

    def wait():
        while not Path(path).exists():
            time.sleep(0.02)
        for _ in range(times):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.5)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


@FORKS
def test_a_second_interrupt_ends_at_once_and_leaves_the_model(model):
    before, handler = weights(model), signal.getsignal(signal.SIGINT)
    thread = interrupt_after("third_step", 2)
    with pytest.raises(KeyboardInterrupt):
        attempt(model, dawdle, [0])
    thread.join()
    assert all(gone(pid, 0.1) for pid in pids())
    assert same(before, weights(model)) and not model.is_trained
    assert signal.getsignal(signal.SIGINT) is handler


@FORKS
def test_an_interrupt_ends_after_the_same_step_and_keeps_what_was_learnt(model):
    before = weights(model)
    interrupt_after("third_step", 1)
    with pytest.warns(UserWarning, match="interrupted in epoch"):
        attempt(model, announce, [1], max_epochs=100_000)
    steps = [Path(f"steps_{rank}").read_text() for rank in range(2)]
    assert steps[0] == steps[1]
    assert model.is_trained and len(model.history["elbo_train"]) >= 1
    assert not torch.equal(before["encoder.loc.weight"], weights(model)["encoder.loc.weight"])
    assert all(gone(pid, 0.1) for pid in pids())


@FORKS
def test_divergence_leaves_the_last_good_weights(model):
    with pytest.raises(TrainingDivergedError, match="The last good weights are kept"):
        attempt(model, poison)
    assert all(bool(value.isfinite().all()) for value in weights(model).values())


def test_workers_end_with_the_session(tmp_path):
    Path("train.py").write_text(
        SCRIPT.format(options="{'strategy': 'ddp_notebook', 'callbacks': [Note()]}")
        .replace(
            "adata =",
            "import os, lightning.pytorch as pl\nclass Note(pl.Callback):\n"
            "    def on_train_batch_end(self, trainer, *args):\n"
            "        open(f'part_{trainer.global_rank}', 'w').write(str(os.getpid()))\n"
            "        os.replace(f'part_{trainer.global_rank}', f'pid_{trainer.global_rank}')\nadata =",
            1,
        )
        .replace("max_epochs=2", "max_epochs=100000")
    )
    session = subprocess.Popen(
        [sys.executable, "train.py", "x"], env=os.environ | {"TMPDIR": str(tmp_path / "temporary")}
    )
    try:
        while len(pids()) < 2:
            assert session.poll() is None
            time.sleep(0.05)
    finally:
        session.kill()
        session.wait()
    assert all(gone(pid) for pid in pids())
