"""The options of ``train``: ours, those of ``lightning.Trainer``, and what to say of all others."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint

from scvi_lite._elsewhere import NO_LOADERS
from scvi_lite._settings import settings
from scvi_lite.errors import check_choice, check_options, check_whole, unknown, warn, without_needless
from scvi_lite.train.plan import Plan, is_of_validation, metric_names
from scvi_lite.train.strategies import as_list

NEEDLESS = {
    "load_sparse_tensor": "counts always travel sparse",
    "simple_progress_bar": "there is one progress bar, and enable_progress_bar=False hides it",
    "progress_bar_refresh_rate": "the progress bar moves a few times a second",
    **NO_LOADERS,
}
INSTEAD = {
    "datamodule": "make the model with an AnnData, which may be backed by a file larger than memory",
    "log_save_dir": "give default_root_dir=..., or logger=CSVLogger(...) of lightning.pytorch.loggers",
    "external_indexing": "give datasplitter_kwargs={'external_indexing': [train, validation, test]}",
    "max_kl_weight": "give plan_kwargs={'max_kl_weight': ...}",
    "lr": "give plan_kwargs={'lr': ...}",
    "weight_decay": "give plan_kwargs={'weight_decay': ...}",
    "n_epochs_kl_warmup": "give plan_kwargs={'n_epochs_kl_warmup': ...}",
    "n_steps_kl_warmup": "give plan_kwargs={'n_steps_kl_warmup': ...}",
    "reduce_lr_on_plateau": "give plan_kwargs={'reduce_lr_on_plateau': True}",
    "use_gpu": "give accelerator='gpu' and devices=...",
}
HALF = ("16-true", "bf16-true", "16", "bf16")


@dataclass(frozen=True)
class Stopping:
    """When to stop early and what to keep on the way. Checked when made."""

    early_stopping: bool = False
    early_stopping_monitor: str = "elbo_validation"
    early_stopping_min_delta: float = 0.0
    early_stopping_patience: int = 45
    early_stopping_warmup_epochs: int = 0
    early_stopping_mode: str = "min"
    enable_checkpointing: bool = False
    checkpointing_monitor: str | None = None  #: by default validation_loss or, without validation cells, train_loss
    learning_rate_monitor: bool = False

    def __post_init__(self) -> None:
        for name in ("early_stopping", "enable_checkpointing", "learning_rate_monitor"):
            if getattr(self, name) not in (True, False):
                raise ValueError(f"{name}={getattr(self, name)!r}: True or False is needed.")
        check_choice(("min", "max"), early_stopping_mode=self.early_stopping_mode)
        check_whole(early_stopping_patience=self.early_stopping_patience)
        check_whole(least=0, early_stopping_warmup_epochs=self.early_stopping_warmup_epochs)
        if not (math.isfinite(self.early_stopping_min_delta) and self.early_stopping_min_delta >= 0):
            raise ValueError(f"early_stopping_min_delta={self.early_stopping_min_delta!r}: zero or more is needed.")


def sort_options(options: Mapping[str, Any], named: Iterable[str] = ()) -> tuple[Stopping, dict[str, Any]]:
    """Sort the options of ``train`` into ours and those of ``lightning.Trainer``; ``named`` are its other arguments.

    Raises
    ------
    TypeError
        If an option is neither; the message names the nearest, or the form it has here.
    ValueError
        If the precision is too low for counts.
    """
    options = without_needless(options, NEEDLESS)
    for name in INSTEAD:
        if options.pop(name, None) is not None:
            raise TypeError(f"train() has no option {name!r}: {INSTEAD[name]}.")
    ours = [f.name for f in fields(Stopping)]
    theirs = list(inspect.signature(pl.Trainer).parameters)
    check_options("train()", options, dict.fromkeys([*ours, *theirs, "ckpt_path", *named]))
    by_steps = isinstance(options.get("val_check_interval"), int)
    given = {k: v for k, v in options.items() if v is not None or (by_steps and k == "check_val_every_n_epoch")}
    given.setdefault("default_root_dir", settings.logging_dir)
    callbacks = as_list(given.get("callbacks"))
    for argument, kind, objects in (
        ("callbacks", "lightning.pytorch.callbacks", [c for c in callbacks if not isinstance(c, pl.Callback)]),
        ("logger", "lightning.pytorch.loggers", [x for x in as_list(given.get("logger")) if isinstance(x, str)]),
    ):
        if objects:
            raise TypeError(f"{argument}={objects[0]!r}: an object of {kind}, or a list of them, is needed.")
    if given.get("check_val_every_n_epoch") is not None:
        check_whole(check_val_every_n_epoch=given["check_val_every_n_epoch"])
    if any(isinstance(callback, LearningRateMonitor) for callback in callbacks):
        given["learning_rate_monitor"] = True
        if not given.get("logger"):  # to which alone it would tell the learning rate
            given["callbacks"] = [c for c in callbacks if not isinstance(c, LearningRateMonitor)]
    if given.get("precision") in HALF:
        raise ValueError(
            f"precision={given['precision']!r}: counts and their likelihood do not fit 16 bits. Give "
            "precision='bf16-mixed', which computes the network in 16 bits and the likelihood in 32."
        )
    stopping = Stopping(**{k: v for k, v in given.items() if k in ours})
    return stopping, {k: v for k, v in given.items() if k not in ours}


def without_validation(stopping: Stopping, plan: Plan, defaults: Mapping[str, Any]) -> tuple[Stopping, Plan]:
    """Leave out what waits for validation cells and is on by default in ``defaults``, and warn; there are none."""
    stops = stopping.early_stopping and defaults.get("early_stopping") is True
    stops &= is_of_validation(stopping.early_stopping_monitor)
    slows = plan.reduce_lr_on_plateau and defaults.get("reduce_lr_on_plateau") is True
    slows &= is_of_validation(plan.lr_scheduler_metric)
    off = [name for name, is_off in (("early_stopping", stops), ("reduce_lr_on_plateau", slows)) if is_off]
    if off:
        warn(
            f"No cells are set aside for validation: this model is trained without {' and '.join(off)}, on by default. "
            f"Give train_size=0.9 to have cells for it, or {', '.join(f'{name}=False' for name in off)} to say so."
        )
    return (
        replace(stopping, early_stopping=False) if stops else stopping,
        replace(plan, reduce_lr_on_plateau=False) if slows else plan,
    )


def check_monitors(
    stopping: Stopping, plan: Plan, callbacks: Any, n_validation: int, extra_metrics: Sequence[str] = ()
) -> None:
    """Refuse, before training, to wait for a metric that will not come; ``extra_metrics`` are those of the module.

    Raises
    ------
    ValueError
        If a monitored metric does not exist, or is a validation metric and no cells are set aside for validation.
    """
    monitors: list[tuple[str, str | None, bool]] = [
        ("early_stopping_monitor", stopping.early_stopping_monitor, stopping.early_stopping),
        ("checkpointing_monitor", stopping.checkpointing_monitor, stopping.enable_checkpointing),
        ("lr_scheduler_metric", plan.lr_scheduler_metric, plan.reduce_lr_on_plateau),
    ]
    for callback in as_list(callbacks):
        if isinstance(callback, EarlyStopping | ModelCheckpoint):
            monitors.append((f"{type(callback).__name__}: monitor", callback.monitor, True))
    # A callback that a user wrote may log metrics of its own.
    more = any(not type(c).__module__.startswith("lightning.") for c in as_list(callbacks))
    known = [*metric_names("train"), *metric_names("validation"), *extra_metrics, "kl_weight", "epoch", "step"]
    for argument, metric, used in monitors:
        if not used or metric is None:
            continue
        if metric not in known and not more:
            raise ValueError(unknown(argument, metric, known, "a metric", "Metrics"))
        if is_of_validation(metric) and n_validation == 0:
            raise ValueError(
                f"{argument}={metric!r} needs validation cells, and none are set aside. Give train_size=0.9, or watch "
                f"{metric.replace('validation', 'train')!r}."
            )
