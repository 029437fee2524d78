"""Training of one model in a process of its own, the same lines for scvi_lite and scvi-tools.

``python benchmarks/model_worker.py PACKAGE MODEL DATA`` prints one line of JSON. PACKAGE is ``scvi_lite`` or ``scvi``,
whichever the interpreter has.
"""

from __future__ import annotations

import importlib
import json
import logging
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from worker import peak_memory, timed, without_validation

BATCH_SIZE = 128
CELLS_PER_SPOT = 10


@dataclass(frozen=True)
class Setup:
    """How a model is made from a file, and how long it trains."""

    make: Callable[[Any, Any], Any]  #: from the package and the data to an untrained model
    n_cells: int  #: cells of the file that are used
    epochs: int  #: that are timed, after one that is not: so many that what a call of train() begins with counts little
    options: dict[str, Any] = field(default_factory=dict)  #: of train(), beside those of all models


def scanvi(scvi: Any, adata: Any) -> Any:
    """Every other cell has its label."""
    adata.obs["label"] = np.where(np.arange(adata.n_obs) % 2, adata.obs["cell_type"].astype(str), "unknown")
    scvi.model.SCANVI.setup_anndata(adata, labels_key="label", unlabeled_category="unknown", batch_key="batch")
    return scvi.model.SCANVI(adata)


def linear(scvi: Any, adata: Any) -> Any:
    scvi.model.LinearSCVI.setup_anndata(adata, batch_key="batch")
    return scvi.model.LinearSCVI(adata)


def condscvi(scvi: Any, adata: Any) -> Any:
    scvi.model.CondSCVI.setup_anndata(adata, labels_key="cell_type")
    return scvi.model.CondSCVI(adata, prior="mog")  # which DestVI of scvi-tools needs


def destvi(scvi: Any, adata: Any) -> Any:
    """Spots are sums of ten cells drawn at random; the model of single cells is trained for an epoch."""
    from anndata import AnnData
    from scipy import sparse

    reference = condscvi(scvi, adata)
    reference.train(max_epochs=1, accelerator="cpu", enable_progress_bar=False)
    n_spots = adata.n_obs
    cell = np.random.default_rng(0).integers(adata.n_obs, size=n_spots * CELLS_PER_SPOT)
    member = sparse.csr_matrix((np.ones(len(cell)), (np.repeat(np.arange(n_spots), CELLS_PER_SPOT), cell)))
    spots = AnnData(sparse.csr_matrix(member @ adata.X, dtype=np.float32), var=adata.var.copy())
    spots.obs_names = [f"spot_{i}" for i in range(n_spots)]
    scvi.model.DestVI.setup_anndata(spots)
    return scvi.model.DestVI.from_rna_model(spots, reference)


def totalvi(scvi: Any, adata: Any) -> Any:
    scvi.model.TOTALVI.setup_anndata(adata, protein_expression_obsm_key="protein_expression", batch_key="batch")
    return scvi.model.TOTALVI(adata)


def peakvi(scvi: Any, mdata: Any) -> Any:
    adata = mdata["atac"].copy()
    scvi.model.PEAKVI.setup_anndata(adata, batch_key="batch")
    return scvi.model.PEAKVI(adata)


def multivi(scvi: Any, mdata: Any) -> Any:
    modalities = {"rna_layer": "rna", "atac_layer": "atac"}
    scvi.model.MULTIVI.setup_mudata(mdata, modalities=modalities)
    return scvi.model.MULTIVI(mdata, n_genes=mdata["rna"].n_vars, n_regions=mdata["atac"].n_vars)


WHOLE = {"train_size": 1.0}  # as by default in both
SETUPS = {
    "SCANVI": Setup(scanvi, 6000, 8),
    "LinearSCVI": Setup(linear, 6000, 10),
    "CondSCVI": Setup(condscvi, 6000, 6, WHOLE),
    "DestVI": Setup(destvi, 2000, 8, WHOLE),
    "TOTALVI": Setup(totalvi, 4000, 6, {"early_stopping": False, "reduce_lr_on_plateau": False}),
    "PEAKVI": Setup(peakvi, 3000, 4, {"early_stopping": False}),
    "MULTIVI": Setup(multivi, 3000, 4, {"early_stopping": False}),
}


def main(package: str, model_name: str, path: str) -> dict[str, float]:
    """Train a model and give its figures."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    import lightning.pytorch  # noqa: F401  (the first training imports it anyway)

    scvi, setup = importlib.import_module(package), SETUPS[model_name]
    getattr(importlib.import_module(f"{package}.model"), model_name)
    data = read(path)
    imported = peak_memory()
    data = data[np.random.default_rng(0).permutation(data.n_obs)[: setup.n_cells]].copy()
    scvi.settings.seed = 0
    model = setup.make(scvi, data)
    options = dict(accelerator="cpu", batch_size=BATCH_SIZE, enable_progress_bar=False, train_size=0.9) | setup.options
    validation = without_validation(package, setup.epochs) if options["train_size"] < 1 else {}
    model.train(max_epochs=1, **options, **validation)  # what is done once: threads, allocations, compilation
    seconds = timed(lambda: model.train(max_epochs=setup.epochs, **options, **validation))
    n_cells = setup.epochs * len(model.train_indices)
    return {
        "seconds": seconds,
        "cells_per_second": n_cells / seconds,
        "peak_mib": peak_memory(),
        "beyond_imports_mib": peak_memory() - imported,
    }


def read(path: str) -> Any:
    """The data of a file, which are in memory before it is measured."""
    if path.endswith(".h5mu"):
        import mudata

        with mudata.set_options(pull_on_update=False):
            return mudata.read_h5mu(path)
    import anndata

    return anndata.read_h5ad(path)


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:4])))
