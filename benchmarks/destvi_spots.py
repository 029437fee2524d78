"""Proportions of cell types in pseudo-spots whose cells are known: DestVI, non-negative least squares, and scvi-tools.

::

    python benchmarks/destvi_spots.py --data seqfishplus_cortex_svz.h5ad --peer PYTHON_WITH_SCVI_TOOLS
    python benchmarks/destvi_spots.py --data seqfishplus_cortex_svz.h5ad --methods scvi_lite_normal --seeds 1 2

Cells of the cortex in seqFISH+ data (Eng et al. 2019). The reference is made of some fields of view. Spots are squares
at random places of others; their counts are the sums over the cells inside. The truth is the share of each cell type in
the counts of a spot, which is what all methods estimate. A seed draws the places of the spots and the first weights of
the networks. Both implementations of DestVI get the same cells, spots and numbers of epochs, and otherwise their own
defaults, but for the prior: scvi-tools fails with its default. What is measured is added to the results that are there.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
from scipy.optimize import nnls

OUT = Path(__file__).parent / "results" / "destvi_spots.json"
REFERENCE, TISSUE = ("fov_0", "fov_1", "fov_2"), ("fov_3", "fov_4")
N_GENES, N_SPOTS, LEAST_CELLS = 500, 200, 8
SIDE = 500  # of a spot, in the units of the positions
BATCH = 32  # cells or spots in a minibatch: both are few
METHODS = {  # package, prior of CondSCVI, options of DestVI
    "least_squares": None,
    "scvi_lite_normal": ("scvi_lite", "normal", {}),
    "scvi_lite_mog": ("scvi_lite", "mog", {}),
    "scvi_tools_mog": ("scvi", "mog", {}),
    "scvi_tools_mog_not_augmented": ("scvi", "mog", {"augmentation": False}),
}
SCORES = ("correlation", "median_correlation_of_a_type", "rmse")


def main() -> None:
    """Make the spots of each seed, run each method, add its row to the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--peer", help="Python with scvi-tools; left out if not given")
    parser.add_argument("--epochs", type=int, nargs=2, default=[100, 200], help="of CondSCVI and DestVI")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--run", nargs=3, help=argparse.SUPPRESS)  # method, seed, folder: in a process of its own
    args = parser.parse_args()
    if args.run:
        run(args.run[0], int(args.run[1]), Path(args.run[2]), *args.epochs)
        return
    for seed in args.seeds:
        cells, spots, truth = simulate(args.data, seed)
        about = {"cells": cells.n_obs, "spots": spots.n_obs, "cell_types": truth.shape[1], "genes": cells.n_vars}
        with tempfile.TemporaryDirectory() as folder:
            cells.write_h5ad(Path(folder) / "cells.h5ad")
            spots.write_h5ad(Path(folder) / "spots.h5ad")
            for method in args.methods:
                row = {"method": method, "seed": seed}
                if (setup := METHODS[method]) is None:
                    add(row | score(least_squares(cells, spots, truth.columns), truth), about, args.out)
                elif python := sys.executable if setup[0] == "scvi_lite" else args.peer:
                    options = ["--data", args.data, "--epochs", *map(str, args.epochs), "--run", method, str(seed)]
                    quiet = {"stdout": subprocess.DEVNULL, "env": os.environ | {"PYTHONWARNINGS": "ignore"}}
                    subprocess.run([python, __file__, *options, folder], check=True, **quiet)
                    found = pd.read_csv(Path(folder) / "found.csv", index_col=0)
                    cost = json.loads((Path(folder) / "cost.json").read_text())
                    add(row | {"epochs": args.epochs} | score(found, truth) | cost, about, args.out)


def add(row: dict[str, object], about: dict[str, object], out: Path) -> None:
    """Put a row into the results, in the place of an older one of the same method and seed; means over the seeds."""
    print(row, flush=True)
    before = json.loads(out.read_text()) if out.exists() else {"rows": []}
    same = (row["method"], row["seed"])
    rows = [other for other in before["rows"] if (other["method"], other["seed"]) != same] + [row]
    rows.sort(key=lambda r: (list(METHODS).index(r["method"]), r["seed"]))
    table = pd.DataFrame(rows).groupby("method", sort=False)[[*SCORES]]
    mean, low, high = table.mean().round(4), table.min(), table.max()
    summary = {
        method: {name: [mean.loc[method, name], low.loc[method, name], high.loc[method, name]] for name in SCORES}
        for method in mean.index
    }
    out.write_text(json.dumps({**before, **about, "mean_lowest_highest": summary, "rows": rows}, indent=1) + "\n")


def simulate(path: Path, seed: int) -> tuple[anndata.AnnData, anndata.AnnData, pd.DataFrame]:
    """Reference cells, spots, and the share of each cell type in the counts of a spot."""
    adata = anndata.read_h5ad(path)
    adata.obs["cell_type"] = adata.obs["cell_type"].astype(str).str.strip()
    cells = adata[adata.obs["batch"].isin(REFERENCE)]
    count = cells.obs["cell_type"].value_counts()
    kept = sorted(count.index[(count >= LEAST_CELLS) & (count.index != "unannotated")])
    cells = cells[cells.obs["cell_type"].isin(kept)]
    log = cells.X.multiply(1e4 / cells.X.sum(1)).tocsr().log1p()
    variance_g = np.asarray(log.power(2).mean(0) - np.square(log.mean(0))).ravel()
    genes = np.sort(np.argsort(-variance_g)[:N_GENES])
    cells = cells[:, genes].copy()
    tissue = adata[adata.obs["batch"].isin(TISSUE) & adata.obs["cell_type"].isin(kept), genes].copy()

    rng = np.random.default_rng(seed)
    xy_n2, field_n = np.asarray(tissue.obsm["spatial"], dtype=float), tissue.obs["batch"].to_numpy()
    member_sn = np.zeros((0, tissue.n_obs), dtype=bool)
    while len(member_sn) < N_SPOTS:
        centre = rng.integers(tissue.n_obs)
        place = xy_n2[centre] + rng.uniform(-SIDE / 2, SIDE / 2, 2)
        inside_n = (np.abs(xy_n2 - place) <= SIDE / 2).all(1) & (field_n == field_n[centre])
        if inside_n.sum() >= 2:
            member_sn = np.vstack([member_sn, inside_n])
    names = pd.Index([f"spot_{i}" for i in range(N_SPOTS)])
    spots = anndata.AnnData((member_sn.astype(np.float32) @ tissue.X.toarray()), obs=pd.DataFrame(index=names))
    spots.var_names, spots.obs["n_cells"] = tissue.var_names, member_sn.sum(1)
    total_n = np.asarray(tissue.X.sum(1)).ravel()
    type_nl = pd.get_dummies(pd.Categorical(tissue.obs["cell_type"], categories=kept)).to_numpy()
    counts_sl = member_sn @ (type_nl * total_n[:, None])
    return cells, spots, pd.DataFrame(counts_sl / counts_sl.sum(1, keepdims=True), names, kept)


def least_squares(cells: anndata.AnnData, spots: anndata.AnnData, kept: pd.Index) -> pd.DataFrame:
    """Non-negative weights of the mean profiles, scaled to sum to 1."""
    share_ng = cells.X.toarray() / cells.X.sum(1)
    label_n = cells.obs["cell_type"].to_numpy()
    profile_gl = np.stack([np.asarray(share_ng[label_n == label]).mean(0) for label in kept], axis=1)
    weight_sl = np.stack([nnls(profile_gl, x / x.sum())[0] for x in spots.X])
    return pd.DataFrame(weight_sl / weight_sl.sum(1, keepdims=True), spots.obs_names, kept)


def run(method: str, seed: int, folder: Path, cond_epochs: int, spot_epochs: int) -> None:
    """Train both models and leave the proportions, and the seconds of the processor, in the folder."""
    package, prior, options = METHODS[method]
    scvi = importlib.import_module(package)
    cells, spots = (anndata.read_h5ad(folder / f"{name}.h5ad") for name in ("cells", "spots"))
    scvi.settings.seed = seed
    silent = {"accelerator": "cpu", "enable_progress_bar": False, "batch_size": BATCH}
    start = time.process_time()
    scvi.model.CondSCVI.setup_anndata(cells, labels_key="cell_type")
    sc_model = scvi.model.CondSCVI(cells, prior=prior)
    sc_model.train(max_epochs=cond_epochs, **silent)
    middle = time.process_time()
    scvi.model.DestVI.setup_anndata(spots)
    model = scvi.model.DestVI.from_rna_model(spots, sc_model, **options)
    model.train(max_epochs=spot_epochs, n_epochs_kl_warmup=spot_epochs // 10, **silent)
    cost = {"seconds_cells": round(middle - start, 1), "seconds_spots": round(time.process_time() - middle, 1)}
    model.get_proportions().to_csv(folder / "found.csv")
    (folder / "cost.json").write_text(json.dumps(cost))


def score(found: pd.DataFrame, truth: pd.DataFrame) -> dict[str, float]:
    """Correlation over all spots and types, and its median over the types; root mean square error."""
    found = found[truth.columns]
    there = truth.columns[truth.std() > 0]
    by_type = [np.corrcoef(found[name], truth[name])[0, 1] if found[name].std() > 0 else 0.0 for name in there]
    values = (
        np.corrcoef(found.to_numpy().ravel(), truth.to_numpy().ravel())[0, 1],
        np.median(by_type),
        np.sqrt(np.mean((found.to_numpy() - truth.to_numpy()) ** 2)),
    )
    return {name: round(float(value), 4) for name, value in zip(SCORES, values)}


if __name__ == "__main__":
    main()
