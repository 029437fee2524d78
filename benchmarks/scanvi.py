"""Training of SCANVI beside scvi-tools, with few and with many labelled cells.

``python benchmarks/scanvi.py DATA --peer /path/to/python`` runs each side in processes of its own, in turn, and prints
a line for each share of labelled cells: training cells per second, counting every training cell once an epoch; accuracy
on the cells whose label was hidden; peak memory. The interpreter of scvi-tools is the one given.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import resource
import statistics
import subprocess
import sys
import time
import warnings
from typing import Any

SHARES = (0.1, 0.5, 1.0)


def measure(package: str, data: str, share: float, epochs: int) -> dict[str, float]:
    """One training, after a first epoch that is not counted."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    import anndata
    import numpy as np

    scvi = importlib.import_module(package)
    SCANVI = importlib.import_module(f"{package}.model").SCANVI
    adata = anndata.read_h5ad(data)
    scvi.settings.seed = 0
    truth = adata.obs["cell_type"].astype(str).to_numpy()
    hidden = np.random.default_rng(0).random(adata.n_obs) >= share
    adata.obs["known"] = np.where(hidden, "Unknown", truth)
    SCANVI.setup_anndata(adata, labels_key="known", unlabeled_category="Unknown", batch_key="batch")
    model = SCANVI(adata)
    options: dict[str, Any] = dict(accelerator="cpu", train_size=0.9, batch_size=128, enable_progress_bar=False)
    model.train(max_epochs=1, **options)
    start = time.perf_counter()
    # scvi-tools validates only if it is asked to.
    model.train(max_epochs=epochs, check_val_every_n_epoch=epochs + 1, **options)
    seconds = time.perf_counter() - start
    seen = hidden if hidden.any() else ~hidden
    return {
        "cells_per_second": epochs * len(model.train_indices) / seconds,
        "accuracy": float((model.predict()[seen] == truth[seen]).mean()),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def compare(data: str, peer: str, epochs: int, repeats: int) -> None:
    """Each side in turn, so that both meet the same other users of the machine."""
    sides = {"scvi_lite": sys.executable, "scvi": peer}
    for share in SHARES:
        runs: dict[str, list[dict[str, float]]] = {package: [] for package in sides}
        for _ in range(repeats):
            for package, python in sides.items():
                command = [python, __file__, data, "--one", package, str(share), "--epochs", str(epochs)]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                runs[package].append(json.loads(done.stdout.splitlines()[-1]))
        median = {p: {name: statistics.median(run[name] for run in of) for name in of[0]} for p, of in runs.items()}
        ratio = median["scvi_lite"]["cells_per_second"] / median["scvi"]["cells_per_second"]
        print(json.dumps({"labelled": share, "times_faster": round(ratio, 2), **median}), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data")
    parser.add_argument("--peer", default="python", help="interpreter that has scvi-tools")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--one", nargs=2, metavar=("PACKAGE", "SHARE"), help="measure one side in this process")
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measure(given.one[0], given.data, float(given.one[1]), given.epochs)))
    else:
        compare(given.data, given.peer, given.epochs, given.repeats)
