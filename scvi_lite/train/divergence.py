"""Training that ran away: how it is noticed, and where to look for the cause."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

from scvi_lite.train.plan import metric_names


class TrainingDivergedError(RuntimeError):
    """The loss or a weight became NaN or infinite."""


def what_diverged(metrics: Mapping[str, float], module: nn.Module | None = None) -> str:
    """Which terms of the loss, or else weights of a module, are not finite, and the likely cause; empty if all are."""
    terms = {*metric_names("train"), *metric_names("validation")}
    bad = [name for name, value in metrics.items() if name in terms and not math.isfinite(value)]
    if not bad and (module is None or weights_are_finite(module)):
        return ""
    found = ", ".join(f"{name}={metrics[name]:g}" for name in bad) or "a weight is not finite"
    return f"{found}. Most likely {likely_cause(bad)}."


def weights_are_finite(module: nn.Module) -> bool:
    """Whether all weights of a module are."""
    norms = torch.stack(torch._foreach_norm([p.detach() for p in module.parameters()]))
    return bool(norms.isfinite().all())


def likely_cause(bad: list[str]) -> str:
    """Where to look when these metrics are not finite."""
    terms = {name.rsplit("_", 1)[0] for name in bad}
    if bad and all(name.endswith("validation") or name.startswith("validation") for name in bad):
        return "a validation cell is unlike the training cells: look for extreme counts or covariates among them"
    if "reconstruction_loss" in terms:
        return "the reconstruction term did: look for extreme counts, or a covariate on a scale far from 1"
    if "kl_local" in terms:
        return "the KL term did: the posterior ran away"
    return "a weight did in the last step"
