"""Training of SCVI on a GPU, beside scvi-tools and the bandwidth of its memory; a table and a JSON file.

::

    python benchmarks/gpu.py --peer PEER_ENV/bin/python

Each measurement is a process of its own, and the sides take turns. Counts are simulated: 2,000 genes, of which a cell
has 200. The first epochs, which compile and record, are left out; nothing is validated. The limit is the time in which
the memory, at the bandwidth measured here, moves each number of the decoder's two outputs once each way and Adam's
seven a weight. Both sides may multiply float32 in TF32, as ``torch.set_float32_matmul_precision("high")`` lets them.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import logging
import os
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results" / "gpu.json"
GENES, EXPRESSED = 2_000, 200
# cells, minibatch, epochs that are timed, whether scvi-tools takes part
ROWS = [(100_000, 128, 2, True), (100_000, 4_096, 5, True), (1_000_000, 4_096, 3, False)]
# What is measured of ours: options of the plan.
OURS: dict[str, dict[str, Any]] = {"scvi_lite": {}, "scvi_lite, cuda_graph": {"cuda_graph": True}}
FIRST = 2  # epochs left out


def simulated(n_cells: int) -> Any:
    """Sparse counts; drawn by gene of each tenth, which takes seconds for a million cells."""
    import anndata
    from scipy import sparse

    rng = np.random.default_rng(0)
    step = GENES // EXPRESSED
    gene_m = rng.integers(step, size=(n_cells, EXPRESSED), dtype=np.int32) + step * np.arange(EXPRESSED, dtype=np.int32)
    count_m = rng.geometric(0.5, n_cells * EXPRESSED).astype(np.float32)
    start_n = np.arange(n_cells + 1) * EXPRESSED
    return anndata.AnnData(sparse.csr_matrix((count_m, gene_m.ravel(), start_n), (n_cells, GENES)))


def measure(package: str, n_cells: int, batch_size: int, epochs: int, plan: dict[str, Any]) -> dict[str, float]:
    """Train in this process."""
    import torch
    from scaling import epoch_clock

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_float32_matmul_precision("high")
    scvi = importlib.import_module(package)
    SCVI = importlib.import_module(f"{package}.model").SCVI
    scvi.settings.seed = 0
    adata = simulated(n_cells)
    SCVI.setup_anndata(adata)
    model, times = SCVI(adata), []
    options = dict(accelerator="gpu", devices=1, train_size=1.0, batch_size=batch_size, enable_progress_bar=False)
    clock = epoch_clock(times)
    model.train(max_epochs=FIRST + epochs, callbacks=[clock], plan_kwargs=plan, **options)
    seconds = statistics.median(np.diff(times)[FIRST - 1 :])
    return {
        "seconds_per_epoch": seconds,
        "cells_per_second": n_cells / seconds,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "elbo_train": float(model.history["elbo_train"].iloc[-1, 0]),
        "weights": sum(p.numel() for p in model.module.parameters()),
    }


def bandwidth() -> float:
    """Bytes a second, read and written, of a large copy."""
    import torch

    x = torch.randn(1 << 28, device="cuda")
    y, times = torch.empty_like(x), []
    for _ in range(20):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        y.copy_(x)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return 2 * x.nbytes / min(times)


def run(python: str, *task: Any) -> dict[str, float]:
    """A measurement in a fresh process."""
    environment = os.environ | {"PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [python, __file__, "--one", json.dumps(task)], capture_output=True, text=True, env=environment
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return json.loads(done.stdout.strip().splitlines()[-1])


def compare(python: str | None, n_cells: int, batch_size: int, epochs: int, repeats: int) -> dict[str, Any]:
    """All sides in turn; ratios are of medians."""
    sides: dict[str, list[dict[str, float]]] = {name: [] for name in [*OURS, *(["scvi-tools"] if python else [])]}
    for _ in range(repeats):
        for name, runs in sides.items():
            ours = name in OURS
            task = "scvi_lite" if ours else "scvi", n_cells, batch_size, epochs, OURS.get(name, {})
            runs.append(run(sys.executable if ours else str(python), *task))
    median = {name: statistics.median(one["seconds_per_epoch"] for one in runs) for name, runs in sides.items()}
    steps = -(-n_cells // batch_size)
    numbers = 8 * batch_size * GENES + 7 * sides["scvi_lite"][0]["weights"]
    limit = 4 * numbers * steps / bandwidth()
    row = {
        "cells": n_cells,
        "batch_size": batch_size,
        "seconds_per_epoch": median,
        "limit_seconds": limit,
        "runs": sides,
    }
    print(f"\n{n_cells:,} cells, minibatch {batch_size:,}: memory alone would take {limit:.3f} s an epoch")
    for name, seconds in median.items():
        ratio = f", {median['scvi-tools'] / seconds:.1f} x scvi-tools" if python else ""
        print(f"  {name:24s} {seconds:8.3f} s an epoch, {n_cells / seconds:12,.0f} cells/s{ratio}", flush=True)
    return row


def main() -> None:
    """Measure all rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", help="Python of an environment with scvi-tools")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(*json.loads(options.one))))
        return
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("There is no GPU here that PyTorch can use: nothing was measured.")
    about: dict[str, Any] = {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    for package in ("torch", "triton", "lightning", "scvi-lite"):
        try:
            about[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            about[package] = None
    rows = [compare(options.peer if peer else None, n, size, e, options.repeats) for n, size, e, peer in ROWS]
    RESULTS.write_text(json.dumps({"machine": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
