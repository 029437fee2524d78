"""Where the time of a training step goes, and how far it is from what the machine can do; a table and a JSON file.

::

    python benchmarks/step.py --data DATA_FOLDER --threads 2

Parts are timed one by one, in the order of a step of SCVI with a minibatch of 128 cells; the least of many repetitions
counts. The limit is the matrix products at the rate measured here on the same shapes, plus the memory traffic of
reading and writing each (cells x genes) number once each way and of Adam's four numbers a weight, at the bandwidth
measured here. The overhead of ``fit`` is the time of an epoch in ``train()`` less that of a bare loop over the same
module, minibatches and optimiser.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from compare_scvi_tools import machine

RESULTS = Path(__file__).parent / "results" / "step.json"
FILES = {"1,287 genes": "kang_ctrl_8donors.h5ad", "8,732 genes": "pbmc_multitech.h5ad"}
SIMULATED = "16,000 genes, simulated"
BATCH = 128


class Clock:
    """The least time of each part, in milliseconds."""

    def __init__(self) -> None:
        self.least: dict[str, float] = defaultdict(lambda: float("inf"))

    def __call__(self, name: str, part: Callable[[], Any]) -> Any:
        begin = time.perf_counter()
        result = part()
        self.least[name] = min(self.least[name], 1e3 * (time.perf_counter() - begin))
        return result


def simulated(n_cells: int = 20_000, n_genes: int = 16_000) -> Any:
    """Counts of which about one in seven is above zero."""
    import anndata
    from scipy import sparse

    rng = np.random.default_rng(0)
    share_g = rng.dirichlet(np.full(n_genes, 0.3))
    rows = [
        sparse.csr_matrix(rng.poisson(3_000 * share_g, size=(1_000, n_genes)).astype(np.float32))
        for _ in range(n_cells // 1_000)
    ]
    return anndata.AnnData(sparse.vstack(rows, format="csr"))


def parts_of_a_step(model: Any, repeats: int) -> dict[str, float]:
    """Milliseconds of each part."""
    from scvi_lite.data.store import load
    from scvi_lite.nn.normal import kl_normal
    from scvi_lite.train.adam import Adam

    module, clock = model.module.train(), Clock()
    store = load(model.adata, model.registry)
    optimizer = Adam(module.parameters(), lr=1e-3, eps=0.01, weight_decay=1e-6, fused=True)
    rng, decoder = np.random.default_rng(0), module.decoder
    for _ in range(repeats):
        rows = torch.from_numpy(rng.permutation(len(store))[:BATCH])
        batch = clock("read the minibatch", lambda rows=rows: store[rows])
        q = clock("encode", lambda batch=batch: module.encode(batch))
        z = q.sample_z()
        h = clock("decoder, hidden layers", lambda z=z, batch=batch: decoder.hidden(z, *module.covariates(batch)))
        rates = clock("decode", lambda z=z, batch=batch: module.decode(z, batch.library_n, batch))
        score_n = clock("score", lambda rates=rates, batch=batch: rates.log_likelihood(batch.x))
        total = clock("KL and mean", lambda q=q, s=score_n: (kl_normal(q.z_loc_nk, q.z_scale_nk).sum(-1) - s).mean())
        optimizer.zero_grad()
        clock("backward", total.backward)
        clock("Adam", optimizer.step)
        optimizer.zero_grad()
        clock("forward, as a whole", lambda batch=batch: module.loss(batch, torch.tensor(0.5))).total.backward()
        del h
    return dict(clock.least)


def loop_and_fit(model: Any) -> tuple[float, float]:
    """Milliseconds a step of a bare loop and of ``train()``."""
    from scvi_lite.data.store import load
    from scvi_lite.train.adam import Adam

    module, store, weight = model.module.train(), load(model.adata, model.registry), torch.tensor(0.5)
    optimizer = Adam(module.parameters(), lr=1e-3, eps=0.01, weight_decay=1e-6, fused=True)
    rng, n = np.random.default_rng(0), -(-len(store) // BATCH)
    bare, once, thrice = [], [], []
    for _ in range(4):
        begin = time.perf_counter()
        for rows in torch.from_numpy(rng.permutation(len(store))).split(BATCH):
            optimizer.zero_grad()
            module.loss(store[rows], weight).total.backward()
            optimizer.step()
        bare.append((time.perf_counter() - begin) / n)
        once.append(epochs_of(model, 1))
        thrice.append(epochs_of(model, 3))
    return 1e3 * min(bare), 1e3 * (min(thrice) - min(once)) / (2 * n)  # without what a call of train() begins with


def epochs_of(model: Any, epochs: int) -> float:
    """Seconds of a training without validation."""
    begin = time.perf_counter()
    model.train(max_epochs=epochs, train_size=1.0, validation_size=None, batch_size=BATCH, enable_progress_bar=False)
    return time.perf_counter() - begin


def rate(make: Callable[[], Any], amount: float, repeats: int = 30) -> float:
    """Amount a second, at best."""
    best = float("inf")
    for _ in range(repeats):
        begin = time.perf_counter()
        make()
        best = min(best, time.perf_counter() - begin)
    return amount / best


def limit(n_genes: int, n_weights: int, n_hidden: int = 128) -> dict[str, float]:
    """Milliseconds a step that this machine needs for the matrix products and the memory traffic of a step."""
    h, w, d = torch.randn(BATCH, n_hidden), torch.randn(n_genes, n_hidden), torch.randn(BATCH, n_genes)
    work = 2.0 * BATCH * n_hidden * n_genes
    forward, to_weight, to_input = (
        rate(product, work) for product in (lambda: h @ w.t(), lambda: d.t() @ h, lambda: d @ w)
    )
    # The encoder's first layer has no gradient for its input; the decoder has two heads.
    products = work * (3 / forward + 3 / to_weight + 2 / to_input)
    x = torch.randn(1 << 24)
    y = torch.zeros_like(x)
    bandwidth = rate(lambda: torch.mul(x, 2, out=y), 2 * x.nbytes)
    numbers = 2 * 2 * 2 * BATCH * n_genes + 7 * n_weights  # two outputs, read and written, both ways; Adam
    return {
        "matrix products": 1e3 * products,
        "memory": 1e3 * 4 * numbers / bandwidth,
        "gflops": forward / 1e9,
        "gigabytes_per_second": bandwidth / 1e9,
    }


def measure(name: str, adata: Any, repeats: int) -> dict[str, Any]:
    """All figures of one data set."""
    import scvi_lite

    scvi_lite.settings.seed = 0
    scvi_lite.SCVI.setup_anndata(adata)
    model = scvi_lite.SCVI(adata)
    epochs_of(model, 1)
    parts = parts_of_a_step(model, repeats)
    bare, fit = loop_and_fit(model)
    best = limit(adata.n_vars, sum(p.numel() for p in model.module.parameters()))
    ideal = best["matrix products"] + best["memory"]
    return {
        "data": name,
        "cells": adata.n_obs,
        "genes": adata.n_vars,
        "share_of_nonzeros": adata.X.nnz / adata.n_obs / adata.n_vars,
        "parts_ms": parts,
        "bare_loop_ms": bare,
        "fit_ms": fit,
        "overhead_of_fit_ms": fit - bare,
        "limit_ms": best | {"sum": ideal},
        "fit_over_limit": fit / ideal,
    }


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--simulated", action="store_true", help="also 20,000 cells x 16,000 genes")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("scvi_lite").setLevel(logging.ERROR)
    if options.threads:
        torch.set_num_threads(options.threads)
    import anndata

    rows = [measure(name, anndata.read_h5ad(options.data / file), options.repeats) for name, file in FILES.items()]
    if options.simulated:
        rows.append(measure(SIMULATED, simulated(), options.repeats))
    for row in rows:
        print(f"\n{row['data']}: {row['fit_ms']:.2f} ms a step in train(), {row['bare_loop_ms']:.2f} in a bare loop")
        for part, value in row["parts_ms"].items():
            print(f"  {part:24s} {value:7.2f} ms")
        print(f"  limit of the machine     {row['limit_ms']['sum']:7.2f} ms")
    RESULTS.write_text(json.dumps({"machine": machine(), "threads": torch.get_num_threads(), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
