"""Labels of new data from a reference, beside scvi-tools, with one recipe in one run.

``python benchmarks/label_transfer.py DATA --peer /path/to/python`` trains SCVI, then SCANVI, on the two 10x batches of
``pbmc_multitech`` (2,000 genes that vary there), maps ``kang_ctrl`` and ``kang_stim`` onto it, both without labels, and
trains each for a few epochs with the reference frozen. Each side runs in a process of its own, in turn, for each
seed, and its row takes the place of an older one. Reported are

- ``accuracy`` and ``f1`` (mean over types) on the labelled cells of ``kang_ctrl``, and ``accuracy_unmapped`` where the
  query is asked before any training on it;
- of the types predicted in ``kang_stim``, whose true labels are not known: ``nearest_profile``, the share of types (of
  those with 10 cells or more) whose mean expression is nearest to that of the same type in the reference, ``profile``,
  their mean correlation, and ``markers``, the share of the reference's 20 top markers of a type that are among its 20
  top markers in these cells. Chance is 1 / types for the first, about 0 and 0.01 for the others.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from anndata import AnnData

OUT = Path(__file__).parent / "results" / "label_transfer.json"
REFERENCE, QUERIES = ("zheng17_facs_v1", "pbmc4k_v2"), ("kang_ctrl", "kang_stim")
UNKNOWN, N_GENES, N_MARKERS, LEAST_CELLS = "unlabelled", 2000, 20, 10
NETWORK = {  # for mapping, as scArches has it
    "n_layers": 2,
    "dropout_rate": 0.2,
    "encode_covariates": True,
    "deeply_inject_covariates": False,
    "use_layer_norm": "both",
    "use_batch_norm": "none",
}
EPOCHS = {"scvi": 10, "scanvi": 4, "query": 15}


def main() -> None:
    """Prepare the cells once, run both sides on each seed, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="pbmc_multitech.h5ad")
    parser.add_argument("--peer", help="a Python interpreter that has scvi-tools; without it, only ours is run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--side", nargs=2, metavar=("PACKAGE", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(transfer(*args.side, seed=args.seeds[0])))
        return
    sides = {"scvi_lite": sys.executable} | ({"scvi": args.peer} if args.peer else {})
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    recipe = {"epochs": EPOCHS, "network": NETWORK}
    before = json.loads(OUT.read_text()) if OUT.exists() else {}
    rows: list[dict[str, Any]] = before["rows"] if recipe == {name: before.get(name) for name in recipe} else []
    with tempfile.TemporaryDirectory() as folder:
        prepare(args.data, Path(folder))
        for seed in args.seeds:
            for package, python in sides.items():
                command = [python, __file__, str(args.data), "--side", package, folder, "--seeds", str(seed)]
                done = subprocess.run(command, capture_output=True, text=True, env=environment)
                if done.returncode:
                    raise SystemExit(done.stderr)
                rows = [row for row in rows if (row["package"], row["seed"]) != (package, seed)]
                rows.append({"package": package, "seed": seed} | json.loads(done.stdout.splitlines()[-1]))
                print(rows[-1], flush=True)
                OUT.write_text(json.dumps(recipe | {"rows": rows}, indent=1) + "\n")
    for package in dict.fromkeys(row["package"] for row in rows):
        ours = [row for row in rows if row["package"] == package]
        means = {name: np.mean([row[name] for row in ours]) for name in ours[0] if name not in ("package", "seed")}
        print(f"{package:10}", "  ".join(f"{name} {value:.3f}" for name, value in means.items()))


def prepare(data: Path, folder: Path) -> None:
    """Write the reference and the queries, with the genes that vary in the reference."""
    import anndata
    import scanpy

    adata = anndata.read_h5ad(data)
    adata.obs["label"] = adata.obs["cell_type"].astype(str)
    logged = adata[adata.obs["batch"].isin(REFERENCE)].copy()
    scanpy.pp.normalize_total(logged, target_sum=1e4)
    scanpy.pp.log1p(logged)
    scanpy.pp.highly_variable_genes(logged, n_top_genes=N_GENES, batch_key="batch")
    adata = adata[:, logged.var["highly_variable"].to_numpy()]
    adata[adata.obs["batch"].isin(REFERENCE)].copy().write_h5ad(folder / "reference.h5ad")
    for name in QUERIES:
        query = adata[adata.obs["batch"] == name].copy()
        query.obs["truth"], query.obs["label"] = query.obs["label"], UNKNOWN
        query.write_h5ad(folder / f"{name}.h5ad")


def transfer(package: str, folder: str, seed: int) -> dict[str, float]:
    """One side, one seed."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    import anndata

    scvi = importlib.import_module(package)
    model = importlib.import_module(f"{package}.model")
    scvi.settings.seed = seed
    silent = {"accelerator": "cpu", "enable_progress_bar": False}
    cells = {name: anndata.read_h5ad(f"{folder}/{name}.h5ad") for name in ("reference", *QUERIES)}
    start = time.perf_counter()
    reference = cells["reference"]
    model.SCVI.setup_anndata(reference, batch_key="batch", labels_key="label")
    plain = model.SCVI(reference, **NETWORK)
    plain.train(max_epochs=EPOCHS["scvi"], plan_kwargs={"n_epochs_kl_warmup": EPOCHS["scvi"]}, **silent)
    labelled = model.SCANVI.from_scvi_model(plain, unlabeled_category=UNKNOWN)
    labelled.train(max_epochs=EPOCHS["scanvi"], **silent)
    result = {"seconds_reference": time.perf_counter() - start}
    start = time.perf_counter()
    for name in QUERIES:
        query = cells[name]
        model.SCANVI.prepare_query_anndata(query, labelled)
        mapped = model.SCANVI.load_query_data(query, labelled, accelerator="cpu")
        if name == "kang_ctrl":
            result["accuracy_unmapped"], _ = score(query, untrained_labels(mapped))
        mapped.train(max_epochs=EPOCHS["query"], plan_kwargs={"weight_decay": 0.0}, **silent)
        query.obs["predicted"] = mapped.predict()
    result["seconds_queries"] = time.perf_counter() - start
    result["accuracy"], result["f1"] = score(cells["kang_ctrl"], cells["kang_ctrl"].obs["predicted"].to_numpy())
    return result | agreement(reference, cells["kang_stim"])


def untrained_labels(mapped: Any) -> np.ndarray:
    """What the reference alone says; scvi-tools answers only when told that there was a training."""
    mapped.is_trained_ = True
    labels = mapped.predict()
    mapped.is_trained_ = False
    return labels


def score(query: AnnData, predicted: np.ndarray) -> tuple[float, float]:
    """Accuracy, and F1 as the mean over types, on the cells whose type is known."""
    truth = query.obs["truth"].to_numpy().astype(str)
    known = truth != UNKNOWN
    truth, predicted = truth[known], np.asarray(predicted)[known].astype(str)
    f1 = []
    for kind in np.unique(truth):
        hits = ((truth == kind) & (predicted == kind)).sum()
        f1.append(2 * hits / ((truth == kind).sum() + (predicted == kind).sum()))
    return float((truth == predicted).mean()), float(np.mean(f1))


def profiles(adata: AnnData, labels: np.ndarray, kinds: list[str]) -> np.ndarray:
    """Mean log expression of each type, less the mean over types: (types, genes)."""
    x_ng = np.asarray(adata.X.todense(), dtype=np.float64)
    logged_ng = np.log1p(1e4 * x_ng / x_ng.sum(1, keepdims=True))
    mean_tg = np.stack([logged_ng[labels == kind].mean(0) for kind in kinds])
    return mean_tg - mean_tg.mean(0)


def agreement(reference: AnnData, query: AnnData) -> dict[str, float]:
    """Whether the types predicted look like those of the reference."""
    predicted, known = query.obs["predicted"].to_numpy().astype(str), reference.obs["label"].to_numpy().astype(str)
    kinds = [kind for kind in np.unique(predicted) if (predicted == kind).sum() >= LEAST_CELLS]
    ours_tg, theirs_tg = profiles(query, predicted, kinds), profiles(reference, known, kinds)
    correlation_tt = np.corrcoef(ours_tg, theirs_tg)[: len(kinds), len(kinds) :]
    top = [np.argsort(-tg, axis=1)[:, :N_MARKERS] for tg in (ours_tg, theirs_tg)]
    shared = [len(np.intersect1d(a, b)) / N_MARKERS for a, b in zip(*top, strict=True)]
    return {
        "types_stim": len(kinds),
        "nearest_profile": float((correlation_tt.argmax(1) == np.arange(len(kinds))).mean()),
        "profile": float(correlation_tt.diagonal().mean()),
        "markers": float(np.mean(shared)),
    }


if __name__ == "__main__":
    main()
