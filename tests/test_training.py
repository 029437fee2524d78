"""Splits, schedules, options of the trainer, progress: what ``train`` does with what it is given."""

import io
import re
import sys
import weakref

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

import scvi_lite
from scvi_lite.model import SCVI, CondSCVI
from scvi_lite.train.plan import Plan
from scvi_lite.train.presets import FAST
from scvi_lite.train.progress import Progress, TrainingBar, TrainingLines

SILENT = {"accelerator": "cpu", "enable_progress_bar": False}
NAMES = ("elbo", "reconstruction_loss", "kl_local", "kl_global")


def name(value):
    """Of a case; the same in every process, which an address in memory is not."""
    return re.sub(r" at 0x\w+", "", str(value))


@pytest.fixture(scope="module")
def adata():
    adata = scvi_lite.data.synthetic_iid(batch_size=50, n_genes=10)
    SCVI.setup_anndata(adata, batch_key="batch")
    return adata


@pytest.fixture
def model(adata):
    return SCVI(adata, n_hidden=4)


class Steps(Callback):
    """What each step used."""

    def __init__(self):
        self.kl_weight, self.lr, self.epoch, self.n_cells = [], [], [], []

    def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
        self.kl_weight.append(float(task.kl_weight))
        self.lr.append(trainer.optimizers[0].param_groups[0]["lr"])
        self.epoch.append(trainer.current_epoch)
        self.n_cells.append(batch.n_cells)


# Splits ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "sizes"),
    [
        ({}, (90, 10, 0)),
        ({"train_size": 0.5}, (50, 50, 0)),
        ({"train_size": 0.5, "validation_size": 0.2}, (50, 20, 30)),
        ({"validation_size": 0.3}, (70, 30, 0)),
        ({"train_size": 1.0}, (100, 0, 0)),
        ({"train_size": 1}, (100, 0, 0)),
        ({"train_size": 0.5, "validation_size": 0.0}, (50, 0, 50)),
    ],
)
def test_shares(model, given, sizes):
    model.train(max_epochs=1, **given, **SILENT)
    parts = [model.train_indices, model.validation_indices, model.test_indices]
    assert tuple(map(len, parts)) == sizes
    assert sorted(np.concatenate(parts)) == list(range(100))
    assert ("elbo_validation" in model.history) == (sizes[1] > 0)


def test_order_without_shuffling(model):
    model.train(max_epochs=1, shuffle_set_split=False, **SILENT)
    assert model.validation_indices.tolist() == list(range(10))
    assert model.train_indices.tolist() == list(range(10, 100))


@pytest.mark.parametrize("as_mask", [False, True])
def test_external_indexing(model, as_mask):
    rows = [np.arange(0, 60), np.arange(60, 75), np.arange(80, 100)]
    given = [np.isin(np.arange(100), part) for part in rows] if as_mask else [part.tolist() for part in rows]
    seen = Steps()
    model.train(max_epochs=1, datasplitter_kwargs={"external_indexing": given}, callbacks=seen, **SILENT)
    for part, expected in zip((model.train_indices, model.validation_indices, model.test_indices), rows, strict=True):
        assert part.tolist() == expected.tolist()
    assert seen.n_cells == [60]


@pytest.mark.parametrize("seeding", ["settings", "torch"])
def test_same_seed_same_numbers(adata, seeding):
    def fit():
        if seeding == "settings":
            scvi_lite.settings.seed = 3
        else:
            torch.manual_seed(3)
        model = SCVI(adata, n_hidden=4)
        model.train(max_epochs=2, **SILENT)
        return model

    try:
        first, second = fit(), fit()
    finally:
        scvi_lite.settings.seed = None
    assert all(frame.equals(second.history[name]) for name, frame in first.history.items())
    assert np.array_equal(first.validation_indices, second.validation_indices)
    assert all(torch.equal(v, second.module.state_dict()[k]) for k, v in first.module.state_dict().items())


def test_without_a_seed_splits_differ(adata):
    models = [SCVI(adata, n_hidden=4) for _ in range(2)]
    for model in models:
        model.train(max_epochs=1, **SILENT)
    assert set(models[0].validation_indices) != set(models[1].validation_indices)


# History --------------------------------------------------------------------------------------------------------------


def test_history(model):
    model.train(max_epochs=3, **SILENT)
    expected = {f"{part}_loss" for part in ("train", "validation")} | {"kl_weight"}
    expected |= {f"{name}_{part}" for part in ("train", "validation") for name in NAMES}
    assert set(model.history) == expected
    for name, frame in model.history.items():
        assert frame.columns.tolist() == [name]
        assert frame.index.name == "epoch"
        assert frame.index.tolist() == [0, 1, 2]
        assert frame.index.dtype.kind == "i"
        assert frame[name].dtype == np.float64
    elbo, reconstruction, kl = (model.history[f"{name}_train"].to_numpy() for name in NAMES[:3])
    assert (elbo > 0).all()
    assert elbo == pytest.approx(reconstruction + kl)
    weight = model.history["kl_weight"].to_numpy()
    assert model.history["train_loss"].to_numpy() == pytest.approx(reconstruction + weight * kl, rel=1e-5)


def test_training_metrics_are_means_over_cells(adata):
    """Unequal minibatches weigh by their cells."""
    model, terms = SCVI(adata, n_hidden=4), []
    model.module.loss, inner = lambda *a: terms.append(inner(*a)) or terms[-1], model.module.loss
    model.train(max_epochs=1, train_size=1.0, batch_size=33, **SILENT)
    assert [term.n_cells for term in terms] == [33, 33, 34]
    total = sum(float(term.reconstruction.detach() + term.kl_local.detach()) for term in terms)
    assert model.history["elbo_train"].iloc[0, 0] == pytest.approx(total / 100, rel=1e-6)


def test_second_training_continues_the_history(model):
    model.train(max_epochs=2, **SILENT)
    first = model.history["elbo_train"]
    model.train(
        max_epochs=2,
        train_size=1.0,
        plan_kwargs={"reduce_lr_on_plateau": True, "lr_scheduler_metric": "elbo_train"},
        **SILENT,
    )
    assert model.history["elbo_train"].index.tolist() == [0, 1, 2, 3]
    assert model.history["elbo_train"].iloc[:2].equals(first)
    assert model.history["lr-Adam"].index.tolist() == [2, 3]
    assert model.history["elbo_validation"].index.tolist() == [0, 1]


def test_what_only_training_needs_is_freed(model):
    model.train(max_epochs=1, **SILENT)
    assert all(weight.grad is None for weight in model.module.parameters())
    assert model.trainer.lightning_module.last_good is None
    moments = [weakref.ref(state["exp_avg"]) for state in model.trainer.optimizers[0].state.values()]
    assert len(moments) == len(list(model.module.parameters()))
    found = []

    class Look(Callback):
        def on_train_start(self, trainer, task):
            found.extend(moment() for moment in moments)

    model.train(max_epochs=1, callbacks=[Look()], **SILENT)
    assert found and all(moment is None for moment in found)


# Schedules ------------------------------------------------------------------------------------------------------------


def test_kl_warmup_in_epochs(model):
    steps = Steps()
    plan = {"n_epochs_kl_warmup": 4, "min_kl_weight": 0.2, "max_kl_weight": 0.6}
    model.train(max_epochs=6, batch_size=45, plan_kwargs=plan, callbacks=[steps], **SILENT)
    expected = [0.2, 0.3, 0.4, 0.5, 0.6, 0.6]
    assert steps.kl_weight == pytest.approx(np.repeat(expected, 2))
    assert model.history["kl_weight"]["kl_weight"].tolist() == pytest.approx(expected)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_kl_warmup_in_minibatches(model, accumulate):
    steps = Steps()
    plan = {"n_steps_kl_warmup": 5, "n_epochs_kl_warmup": 400}
    model.train(
        max_epochs=4, batch_size=45, plan_kwargs=plan, callbacks=[steps], accumulate_grad_batches=accumulate, **SILENT
    )
    assert steps.kl_weight == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1, 1, 1])


def test_no_warmup(model):
    steps = Steps()
    model.train(max_epochs=1, plan_kwargs={"n_epochs_kl_warmup": None, "max_kl_weight": 0.5}, callbacks=steps, **SILENT)
    assert steps.kl_weight == [0.5]


@pytest.mark.parametrize(
    ("metric", "every", "rates"),
    [
        ("elbo_validation", 1, [1, 1, 0.1, 0.01, 0.001, 0.001]),
        ("elbo_train", 1, [1, 1, 0.1, 0.01, 0.001, 0.001]),
        ("elbo_validation", 2, [1, 1, 1, 1, 0.1, 0.1]),
        ("elbo_train", 2, [1, 1, 0.1, 0.01, 0.001, 0.001]),
    ],
)
def test_plateau_lowers_the_rate(model, metric, every, rates):
    """A threshold that no epoch reaches makes every look but the first a plateau."""
    steps = Steps()
    plan = {
        "reduce_lr_on_plateau": True,
        "lr_patience": 0,
        "lr_threshold": 1e6,
        "lr_factor": 0.1,
        "lr_min": 1e-6,
        "lr_scheduler_metric": metric,
    }
    model.train(max_epochs=6, plan_kwargs=plan, callbacks=steps, check_val_every_n_epoch=every, **SILENT)
    assert steps.lr == pytest.approx(np.array(rates) * 1e-3)
    assert model.history["lr-Adam"]["lr-Adam"].tolist() == steps.lr


@pytest.mark.parametrize("accumulate", [1, 2])
def test_cosine_schedule(model, accumulate):
    """Half a step into a tenth that rises, then down to nearly nothing; minibatches of one step share its rate."""
    steps = Steps()
    plan = {"lr_schedule": "cosine", "lr": 0.01}
    model.train(
        max_epochs=5, batch_size=23, plan_kwargs=plan, callbacks=steps, accumulate_grad_batches=accumulate, **SILENT
    )
    share = (np.arange(20 // accumulate) + 0.5) / (20 // accumulate)
    expected = 0.01 * np.minimum(share / 0.1, 0.5 + 0.5 * np.cos(np.pi * np.maximum(share - 0.1, 0) / 0.9))
    assert steps.lr == pytest.approx(np.repeat(expected, accumulate))
    assert model.history["lr-Adam"]["lr-Adam"].tolist() == steps.lr[3::4]


@pytest.mark.parametrize("plan", [{"lr_schedule": "cosine"}, {"n_steps_kl_warmup": 0.5}])
def test_a_share_of_the_training_needs_an_end(model, plan):
    with pytest.raises(ValueError, match=f"{min(plan)}=.*give max_epochs or max_steps"):
        model.train(max_time="00:00:01:00", plan_kwargs=plan, **SILENT)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr_schedule": "cosin"}, "Did you mean 'cosine'"),
        ({"lr_schedule": "cosine", "reduce_lr_on_plateau": True}, "reduce_lr_on_plateau=False"),
        ({"lr_schedule": "cosine", "optimizer": "Custom", "optimizer_creator": torch.optim.SGD}, "lr_schedule=None"),
    ],
)
def test_schedules_that_do_not_go(options, message):
    with pytest.raises(ValueError, match=message):
        Plan(**options)


# Presets --------------------------------------------------------------------------------------------------------------


def test_preset(model, monkeypatch):
    """How long it takes and how: 10 epochs of 2 minibatches, the first 0.22 of which warm up."""
    monkeypatch.setattr("scvi_lite.train.presets.EPOCHS_OF_FEW", 10)
    steps = Steps()
    model.train(preset="fast", batch_size=50, callbacks=steps, **SILENT)
    assert steps.kl_weight == pytest.approx([min(1, step / 4.4) for step in range(20)])
    assert max(steps.lr) == pytest.approx(FAST["lr"], rel=0.1)
    assert steps.lr[-1] < 0.02 * FAST["lr"]


@pytest.mark.parametrize(
    ("options", "n_steps"), [({"max_epochs": 3}, 6), ({"max_steps": 5}, 5), ({"max_steps": 5, "max_epochs": 9}, 5)]
)
def test_what_is_given_counts_more_than_the_preset(model, options, n_steps):
    steps = Steps()
    plan = {"lr": 2e-3, "lr_schedule": None, "n_epochs_kl_warmup": 2}
    model.train(preset="fast", batch_size=50, plan_kwargs=plan, callbacks=steps, **options, **SILENT)
    assert steps.lr == [2e-3] * n_steps
    assert steps.kl_weight == [0, 0, 0.5, 0.5, 1, 1][:n_steps]


def test_preset_is_ahead_of_the_default_after_as_many_epochs():
    adata = scvi_lite.data.synthetic_iid(batch_size=300, n_genes=30)
    SCVI.setup_anndata(adata, batch_key="batch")
    elbo = {}
    for preset in (None, "fast"):
        torch.manual_seed(0)
        fitted = SCVI(adata, n_hidden=16)
        fitted.train(max_epochs=8, batch_size=64, preset=preset, **SILENT)
        elbo[preset] = float(fitted.get_elbo())
    assert elbo["fast"] > elbo[None] + 1


def test_presets_that_are_not_there(model):
    with pytest.raises(ValueError, match="Did you mean 'fast'"):
        model.train(preset="fsat", **SILENT)
    CondSCVI.setup_anndata(adata := scvi_lite.data.synthetic_iid(batch_size=20, n_genes=5), labels_key="labels")
    with pytest.raises(TypeError, match="CondSCVI has no presets"):
        CondSCVI(adata).train(preset="fast", **SILENT)


def test_learning_rate_monitor(model):
    model.train(max_epochs=2, learning_rate_monitor=True, plan_kwargs={"optimizer": "AdamW", "lr": 0.01}, **SILENT)
    assert model.history["lr-AdamW"]["lr-AdamW"].tolist() == [0.01, 0.01]


def test_optimizer_options(model):
    plan = {"optimizer": "AdamW", "lr": 2e-3, "eps": 1e-5, "weight_decay": 0.3}
    model.train(max_epochs=1, plan_kwargs=plan, **SILENT)
    (group,) = model.trainer.optimizers[0].param_groups
    assert (group["lr"], group["eps"], group["weight_decay"]) == (2e-3, 1e-5, 0.3)
    assert isinstance(model.trainer.optimizers[0], torch.optim.AdamW)


def test_custom_optimizer(model):
    plan = {"optimizer": "Custom", "optimizer_creator": lambda parameters: torch.optim.SGD(parameters, lr=1e-4)}
    model.train(max_epochs=1, plan_kwargs=plan, **SILENT)
    assert isinstance(model.trainer.optimizers[0], torch.optim.SGD)


@pytest.mark.parametrize(
    ("options", "n_epochs"),
    [
        ({"early_stopping_patience": 2}, 3),
        ({"early_stopping_patience": 2, "early_stopping_warmup_epochs": 4}, 7),
        ({"early_stopping_patience": 2, "early_stopping_monitor": "elbo_train"}, 3),
        ({"early_stopping_patience": 2, "early_stopping_monitor": "train_loss", "train_size": 1.0}, 3),
        ({"early_stopping_patience": 2, "check_val_every_n_epoch": 2}, 6),
        ({"early_stopping_patience": 2, "early_stopping_monitor": "elbo_train", "check_val_every_n_epoch": 2}, 3),
        ({"early_stopping_patience": 2, "val_check_interval": 0.5, "batch_size": 45}, 2),
        ({"early_stopping_patience": 2, "early_stopping_mode": "max"}, 3),
    ],
)
def test_early_stopping(model, options, n_epochs):
    """A change that no epoch reaches uses the patience up."""
    model.train(max_epochs=9, early_stopping=True, early_stopping_min_delta=1e6, **options, **SILENT)
    assert len(model.history["elbo_train"]) == n_epochs


# Options of the trainer -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"precision": "bf16-mixed"},
        {"precision": "64-true"},
        {"gradient_clip_val": 0.1},
        {"accumulate_grad_batches": 2},
        {"deterministic": True},
        {"detect_anomaly": True},
        {"profiler": "simple"},
        {"num_sanity_val_steps": 2},
        {"limit_val_batches": 0},
        {"enable_model_summary": False},
        {"reload_dataloaders_every_n_epochs": 1},
        {"logger": None, "check_val_every_n_epoch": None, "callbacks": None, "datamodule": None},
    ],
    ids=name,
)
def test_trainer_option(model, options):
    model.train(max_epochs=2, batch_size=30, **options, **SILENT)
    assert len(model.history["elbo_train"]) == 2
    assert all(np.isfinite(frame).all(axis=None) for frame in model.history.values())
    assert {value.dtype for value in model.module.parameters()} == {torch.float32}
    assert not torch.are_deterministic_algorithms_enabled()
    assert ("elbo_validation" in model.history) == (options.get("limit_val_batches") != 0)
    assert model.module.encode(next(iter(model._minibatches()))).z_loc_nk.isfinite().all()


def test_double_precision_is_double(adata):
    """64-true is the same training with more digits."""
    ends = {}
    for precision in ("32-true", "64-true"):
        torch.manual_seed(0)
        model = SCVI(adata, n_hidden=4, dropout_rate=0.0)
        dtypes = set()

        class Look(Callback):
            def on_train_batch_end(self, trainer, task, *_, seen=dtypes):
                seen |= {p.dtype for p in task.parameters()}

        model.train(max_epochs=1, precision=precision, callbacks=Look(), **SILENT)
        assert dtypes == {torch.float64 if precision == "64-true" else torch.float32}
        ends[precision] = model.history["elbo_train"].iloc[0, 0]
    assert ends["64-true"] == pytest.approx(ends["32-true"], rel=0.2)


@pytest.mark.parametrize(
    "options", [{"max_steps": 3}, {"max_epochs": 9, "max_steps": 3}, {"limit_train_batches": 3, "max_epochs": 1}]
)
def test_number_of_steps(model, options):
    steps = Steps()
    model.train(batch_size=20, callbacks=steps, **options, **SILENT)
    assert len(steps.lr) == 3


def test_max_time(model):
    model.train(max_time="00:00:00:01", **SILENT)
    assert model.is_trained


def test_fast_dev_run(model):
    steps = Steps()
    model.train(fast_dev_run=True, early_stopping=True, batch_size=20, callbacks=steps, **SILENT)
    assert len(steps.lr) == 1


def test_default_number_of_epochs(adata, monkeypatch):
    monkeypatch.setattr("scvi_lite.model.training.heuristic_epochs", lambda n_cells: n_cells // 50)
    model = SCVI(adata, n_hidden=4)
    model.train(**SILENT)
    assert len(model.history["elbo_train"]) == 2


@pytest.mark.parametrize("logger", [True, "csv", "tensorboard"])
def test_loggers_get_the_metrics_of_the_history(model, tmp_path, logger):
    pytest.importorskip("tensorboard")
    made = {"csv": CSVLogger, "tensorboard": TensorBoardLogger}
    given = made[logger](tmp_path) if logger in made else logger
    model.train(max_epochs=2, logger=given, default_root_dir=tmp_path, **SILENT)
    if logger == "csv":
        import pandas as pd

        table = pd.read_csv(next(tmp_path.rglob("metrics.csv"))).groupby("epoch").first()
        for name, frame in model.history.items():
            assert table[name].to_numpy() == pytest.approx(frame[name].to_numpy(), rel=1e-5)
    else:
        assert list(tmp_path.rglob("events.out.tfevents*"))


@pytest.mark.parametrize("monitor", [None, "elbo_validation", "elbo_train"])
@pytest.mark.parametrize("every", [1, 2])
def test_checkpoints_of_the_best_epoch(model, tmp_path, monitor, every):
    more = {} if monitor is None else {"checkpointing_monitor": monitor}
    model.train(
        max_epochs=4,
        enable_checkpointing=True,
        default_root_dir=tmp_path,
        check_val_every_n_epoch=every,
        **more,
        **SILENT,
    )
    values = model.history[monitor or "validation_loss"].iloc[:, 0]
    best = torch.load(tmp_path / "checkpoints" / "best.ckpt", weights_only=True)
    assert best["epoch"] == values.idxmin()


def test_checkpoints_without_validation_cells_watch_the_training(model, tmp_path):
    model.train(max_epochs=2, enable_checkpointing=True, default_root_dir=tmp_path, train_size=1.0, **SILENT)
    assert model.trainer.checkpoint_callback.monitor == "train_loss"


def test_own_checkpoint_callback_takes_the_place_of_ours(model, tmp_path):
    own = ModelCheckpoint(tmp_path / "own", monitor="elbo_validation")
    model.train(max_epochs=1, callbacks=own, enable_checkpointing=True, default_root_dir=tmp_path, **SILENT)
    assert list(tmp_path.rglob("*.ckpt")) == [own.best_model_path and tmp_path / "own" / "epoch=0-step=1.ckpt"]


def test_nothing_is_written_unasked(model, tmp_path):
    model.train(max_epochs=1, **SILENT)
    assert not list(tmp_path.iterdir())


# Refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_epochs": 0}, "max_epochs=0: a whole number of at least 1"),
        ({"max_epochs": -3}, "max_epochs=-3"),
        ({"max_epochs": 2.5}, "max_epochs=2.5: a whole number"),
        ({"max_epochs": True}, "max_epochs=True: a whole number"),
        ({"batch_size": 0}, "batch_size=0: a whole number of at least 2"),
        ({"batch_size": 1}, "batch_size=1: a whole number of at least 2"),
        ({"batch_size": 12.0}, "batch_size=12.0"),
        ({"train_size": 1.2}, "train_size=1.2"),
        ({"train_size": 0}, "train_size=0"),
        ({"train_size": -0.1}, "train_size=-0.1"),
        ({"train_size": float("nan")}, "train_size=nan"),
        ({"train_size": 0.8, "validation_size": 0.3}, "add up to more than 1"),
        ({"validation_size": -0.3}, "validation_size=-0.3"),
        ({"train_size": 0.01}, r"1 training cell\(s\) of 100: at least two"),
        ({"plan_kwargs": {"lr": -1}}, "lr=-1: a number of zero or more"),
        ({"plan_kwargs": {"lr_factor": 1.5}}, "lr_factor=1.5"),
        ({"plan_kwargs": {"optimizer": "Adamw"}}, "Did you mean 'AdamW'"),
        ({"plan_kwargs": {"optimizer": "Custom"}}, "optimizer_creator"),
        ({"early_stopping": True, "early_stopping_monitor": "elbo_valid"}, "Did you mean 'elbo_validation'"),
        ({"early_stopping": True, "train_size": 1.0}, "Give train_size=0.9, or watch 'elbo_train'"),
        ({"early_stopping": True, "limit_val_batches": 0}, "needs validation cells"),
        ({"early_stopping": True, "early_stopping_patience": 0}, "early_stopping_patience=0"),
        ({"early_stopping_mode": "least"}, "early_stopping_mode='least' is not an option"),
        (
            {"plan_kwargs": {"reduce_lr_on_plateau": True}, "train_size": 1.0},
            "lr_scheduler_metric='elbo_validation' needs",
        ),
        (
            {"enable_checkpointing": True, "checkpointing_monitor": "val_loss"},
            "checkpointing_monitor='val_loss' is not a metric",
        ),
        ({"callbacks": [EarlyStopping("val_loss")]}, "EarlyStopping: monitor='val_loss' is not a metric"),
        ({"callbacks": ModelCheckpoint(monitor="elbo_validation"), "train_size": 1.0}, "ModelCheckpoint: monitor"),
        ({"precision": "16-true"}, "precision='bf16-mixed'"),
        ({"datasplitter_kwargs": {"external_indexing": [[], [1]]}}, "training"),
        ({"datasplitter_kwargs": {"external_indexing": [[0, 1, 100]]}}, "there are 100 cells"),
        ({"datasplitter_kwargs": {"external_indexing": [[0, 1, 2], [2, 3]]}}, "twice"),
    ],
    ids=name,
)
def test_refused_before_any_work(model, options, message, monkeypatch):
    monkeypatch.setattr("lightning.pytorch.Trainer.fit", None)
    with pytest.raises(ValueError, match=message):
        model.train(**options, **SILENT)
    assert not model.is_trained
    assert not model.module.training


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_epoch": 1}, r"train\(\) has no option 'max_epoch'. Did you mean 'max_epochs'"),
        ({"early_stoping_patience": 1}, "Did you mean 'early_stopping_patience'"),
        ({"gradient_clip": 1}, "Did you mean 'gradient_clip_val'"),
        ({"plan_kwargs": {"n_epochs_kl_warm_up": 1}}, "Did you mean 'n_epochs_kl_warmup'"),
        ({"datasplitter_kwargs": {"droplast": True}}, "Did you mean 'drop_last'"),
        ({"lr": 1e-3}, r"plan_kwargs=\{'lr'"),
        ({"datamodule": object()}, "AnnData"),
        ({"log_save_dir": "runs"}, "default_root_dir"),
    ],
    ids=name,
)
def test_unknown_options(model, options, message):
    with pytest.raises(TypeError, match=message):
        model.train(**options, **SILENT)


def test_needless_options_are_told(model):
    with pytest.warns(UserWarning, match="has no effect") as told:
        model.train(
            max_epochs=1,
            load_sparse_tensor=True,
            simple_progress_bar=True,
            datasplitter_kwargs={"num_workers": 4, "pin_memory": True},
            **SILENT,
        )
    assert len(told) == 4
    assert all(warning.filename == __file__ for warning in told)


def test_a_callback_may_log_metrics_of_its_own(model):
    class Own(Callback):
        def on_train_epoch_end(self, trainer, task):
            task.log("mine", 1.0)

    model.train(max_epochs=3, callbacks=[Own(), EarlyStopping("mine", patience=1)], **SILENT)
    assert len(model.history["elbo_train"]) == 2


def test_plan_refuses_impossible_weights():
    with pytest.raises(ValueError, match="min_kl_weight=2 is above max_kl_weight=1"):
        Plan(min_kl_weight=2, max_kl_weight=1)


# Progress -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("total", [1, 7, 400, 5000, None])
def test_a_log_file_is_not_flooded(monkeypatch, total):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    lines = TrainingLines()
    for epoch in np.arange(0, (total or 5000) + 0.1, 0.1):
        lines.show(epoch, total, {"train": 5.0})
    lines.close()
    written = sys.stderr.getvalue().splitlines()
    assert 1 <= len(written) <= 21
    assert written[-1].startswith(f"Training: {total or 5000}/{total or '?'} epochs, train=5.0")


def test_progress_of_a_training_in_a_file(model, capsys, monkeypatch):
    """Each line has the metrics of the epochs that it says are complete."""
    monkeypatch.setattr(Progress, "INTERVAL", -1.0)  # told of each minibatch
    model.train(max_epochs=3, accelerator="cpu")
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Training:")]
    assert len(lines) == 3
    for epoch, line in enumerate(lines):
        assert line.startswith(f"Training: {epoch + 1}/3 epochs")
        elbo = {part: model.history[f"elbo_{part}"].iloc[epoch - 3, 0] for part in ("train", "validation")}
        assert all(f"{part}={value:.1f}" in line for part, value in elbo.items())


def test_bar(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    bar = TrainingBar()
    bar.show(0, 4, {})
    bar.show(2.5, 4, {"train": 7.04})
    bar.close()
    assert "2/4 epochs" in sys.stderr.getvalue()
    assert "train=7.0" in sys.stderr.getvalue()


def test_own_progress_bar(model):
    model.train(max_epochs=1, accelerator="cpu", callbacks=TQDMProgressBar(refresh_rate=0))
    assert isinstance(model.trainer.progress_bar_callback, TQDMProgressBar)


@pytest.mark.parametrize("name", ["PEAKVI", "MULTIVI", "TOTALVI"])
def test_stopping_by_default_needs_no_validation_cells(name):
    adata = scvi_lite.data.synthetic_iid(batch_size=20, n_genes=10, n_proteins=5)
    model_class = getattr(scvi_lite.model, name)
    proteins = {"protein_expression_obsm_key": "protein_expression"} if name == "TOTALVI" else {}
    model_class.setup_anndata(adata, **proteins)
    model = model_class(adata, **({"n_genes": 5, "n_regions": 5} if name == "MULTIVI" else {}))
    with pytest.warns(UserWarning, match="trained without early_stopping"):
        model.train(max_epochs=2, train_size=1.0, **SILENT)
    assert len(model.history["elbo_train"]) == 2
    steady = {"reduce_lr_on_plateau": False} if name == "TOTALVI" else {}
    with pytest.raises(ValueError, match="early_stopping_monitor='elbo_valid' is not a metric"):
        model.train(early_stopping_monitor="elbo_valid", train_size=1.0, **steady, **SILENT)
    model.train(max_epochs=1, train_size=1.0, early_stopping=False, **steady, **SILENT)  # warnings are errors


@pytest.mark.parametrize("kind", ["Adam", "AdamW"])
def test_adam_of_weights_stored_by_input(kind):
    """PyTorch's numbers, also where a gradient is missing or a state is loaded, without a copy of the weights."""
    from scvi_lite.train import adam

    start, gradient = torch.randn(5, 3), torch.randn(6, 5, 3)
    results = []
    for optimizer, fused in ((getattr(torch.optim, kind), False), (getattr(adam, kind), True)):
        weight = torch.nn.Parameter(start.t().clone(memory_format=torch.contiguous_format).t())
        bias, there = torch.nn.Parameter(torch.ones(3)), weight.data_ptr()
        steps = optimizer([weight, bias], lr=0.1, weight_decay=0.1, fused=fused)
        for i, g in enumerate(gradient):
            weight.grad, bias.grad = torch.empty_like(weight).copy_(g), g[0] if i != 2 else None
            if i == 4:
                state, steps = steps.state_dict(), optimizer([weight, bias], lr=0.3, fused=fused)
                steps.load_state_dict(state)
            steps.step()
        assert weight.data_ptr() == there and weight.stride() == (1, 5)
        results.append((weight.detach().clone(), bias.detach(), [float(s["step"]) for s in steps.state.values()]))
    torch.testing.assert_close(*results)
    assert results[0][2] == [6.0, 5.0]


class Within(Callback):
    """Looks into each step, and logs."""

    n = 0

    def on_after_backward(self, trainer, task):
        self.n += all(p.grad is not None for p in task.parameters())

    def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
        task.log("twice", 2.0 * batch_idx, on_step=True, on_epoch=False)


@pytest.mark.parametrize(
    "options",
    [{}, {"val_check_interval": 0.5}, {"precision": "bf16-mixed"}, {"precision": "64-true"}, {"max_steps": 3}],
)
def test_the_short_loop_gives_the_numbers_of_lightnings(adata, options):
    """Which runs where somebody looks into a step."""
    trained, watch = [], Within()
    for callbacks in ([], [watch]):
        scvi_lite.settings.seed = 0
        model = SCVI(adata, n_hidden=4)
        model.train(max_epochs=2, batch_size=20, callbacks=callbacks, **options, **SILENT)
        assert model.trainer.fit_loop.epoch_loop.is_plain == (not callbacks)
        trained.append(model)
    short, long = trained
    for name in short.history:
        np.testing.assert_array_equal(short.history[name].to_numpy(), long.history[name].to_numpy())
    torch.testing.assert_close(short.module.state_dict(), long.module.state_dict(), rtol=0, atol=0)
    loops = [{k: v for k, v in m.trainer.fit_loop.state_dict().items() if "optim" not in k} for m in trained]
    assert loops[0] == loops[1]
    assert short.trainer.global_step == long.trainer.global_step == watch.n
    assert float(long.trainer.callback_metrics["twice"]) == (4.0 if options.get("max_steps") else 8.0)


@pytest.mark.parametrize(
    "options",
    [{"gradient_clip_val": 1.0}, {"accumulate_grad_batches": 2}, {"profiler": "simple"}, {"detect_anomaly": True}],
)
def test_what_the_short_loop_leaves_to_lightnings(model, options):
    model.train(max_epochs=1, batch_size=20, **options, **SILENT)
    assert model.trainer.fit_loop.epoch_loop.is_plain == ("detect_anomaly" in options)


def test_a_lightning_that_is_not_known_trains_by_its_own_loop(adata, monkeypatch, caplog, tmp_path):
    """Private names that the short loop needs may be gone there; a checkpoint of either goes on in the other."""
    import lightning

    scvi_lite.settings.seed = 0
    options = {"max_epochs": 2, "batch_size": 20, **SILENT}
    whole, half, rest = (SCVI(adata, n_hidden=4) for _ in range(3))
    half.module.load_state_dict(whole.module.state_dict())
    torch.manual_seed(1)
    whole.train(**options)
    torch.manual_seed(1)
    keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=3)
    half.train(**options | {"callbacks": keep, "max_steps": 3})
    monkeypatch.setattr(lightning, "__version__", "2.7.0")
    monkeypatch.setitem(sys.modules, "scvi_lite.train.loop", None)  # importing it fails
    with caplog.at_level("INFO", logger="scvi_lite"):
        rest.train(ckpt_path=tmp_path / "step=3.ckpt", callbacks=keep, **options)
    assert type(rest.trainer.fit_loop.epoch_loop).__module__.startswith("lightning.")
    assert sum("the loop of Lightning 2.7.0" in message for message in caplog.messages) == 1
    torch.testing.assert_close(rest.module.state_dict(), whole.module.state_dict(), rtol=0, atol=0)
