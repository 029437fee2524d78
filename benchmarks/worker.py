"""One measurement in a process of its own, the same for scvi_lite and scvi-tools.

``python benchmarks/worker.py PACKAGE TASK DATA EPOCHS`` prints one line of JSON. PACKAGE is ``scvi_lite`` or ``scvi``,
whichever the interpreter has.
"""

from __future__ import annotations

import importlib
import json
import logging
import resource
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

REPEATS = 5  # calls whose median counts, after the first


def main(package: str, task: str, data: str, epochs: int) -> dict[str, float]:
    """Run a task and give its figures."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    import anndata

    scvi = importlib.import_module(package)
    importlib.import_module(f"{package}.model")
    importlib.import_module("lightning.pytorch")  # which scvi_lite imports when it first trains
    imports = peak_memory()
    adata = anndata.read_h5ad(data)
    scvi.settings.seed = 0
    scvi.model.SCVI.setup_anndata(adata, batch_key="batch")
    model = scvi.model.SCVI(adata)
    options: dict[str, Any] = dict(accelerator="cpu", train_size=0.9, batch_size=128, enable_progress_bar=False)
    before = peak_memory()
    model.train(max_epochs=1, **options)  # what is done once: threads, allocations, compilation
    if task == "train":
        # Our validation is switched off because the peer's is off unless it stops early.
        seconds = timed(lambda: model.train(max_epochs=epochs, **options, **without_validation(package, epochs)))
        n_cells = epochs * len(model.train_indices)
        return {
            "seconds": seconds,
            "cells_per_second": n_cells / seconds,
            "peak_mib": peak_memory(),
            "before_mib": before,
            "beyond_imports_mib": peak_memory() - imports,
        }
    first, *others = (timed(INFERENCE[task](model)) for _ in range(1 + REPEATS))  # the first loads what is compiled
    return {"seconds": statistics.median(others), "first_seconds": first, "peak_mib": peak_memory()}


def without_validation(package: str, epochs: int) -> dict[str, int]:
    """scvi-tools does not validate by default; neither does scvi_lite in the comparison."""
    return {"check_val_every_n_epoch": epochs + 1} if package == "scvi_lite" else {}


def latent(model: Any) -> Callable[[], Any]:
    return lambda: model.get_latent_representation()


def expression(model: Any) -> Callable[[], Any]:
    return lambda: model.get_normalized_expression(return_numpy=True)


def differential(model: Any) -> Callable[[], Any]:
    groups = model.adata.obs["cell_type"].value_counts().index[:2].tolist()
    return lambda: model.differential_expression(groupby="cell_type", group1=groups[0], group2=groups[1], mode="change")


def marginal(model: Any) -> Callable[[], Any]:
    return lambda: model.get_marginal_ll(indices=list(range(200)), n_mc_samples=100)


INFERENCE = {
    "latent": latent,
    "expression": expression,
    "differential_expression": differential,
    "marginal_ll": marginal,
}


def timed(call: Callable[[], Any]) -> float:
    """Seconds of wall time."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def peak_memory() -> float:
    """Largest resident set so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))))
