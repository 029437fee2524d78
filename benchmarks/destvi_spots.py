"""Proportions of cell types in pseudo-spots whose cells are known: DestVI, non-negative least squares, and scvi-tools.

::

    python benchmarks/destvi_spots.py --data seqfishplus_cortex_svz.h5ad --peer PYTHON_WITH_SCVI_TOOLS

Cells of the cortex in seqFISH+ data (Eng et al. 2019). The reference is made of some fields of view. Spots are squares
at random places of others; their counts are the sums over the cells inside. The truth is the share of each cell type in
the counts of a spot, which is what all methods estimate. Both implementations of DestVI get the same cells, spots and
options, a mixture as prior (scvi-tools fails with its default), and the same number of epochs.
"""

from __future__ import annotations

import argparse
import json
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
BATCH = 32  # cells or spots in a minibatch: both are few


def main() -> None:
    """Make the spots, run each method, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--peer", help="Python with scvi-tools; left out if not given")
    parser.add_argument("--side", type=float, default=500, help="of a spot, in the units of the positions")
    parser.add_argument("--epochs", type=int, nargs=2, default=[80, 100], help="of CondSCVI and DestVI")
    parser.add_argument("--run", nargs=3, help=argparse.SUPPRESS)  # package, prior, folder: in a process of its own
    args = parser.parse_args()
    if args.run:
        run(*args.run, *args.epochs)
        return
    cells, spots, truth = simulate(args.data, args.side)
    about = {"cells": cells.n_obs, "spots": spots.n_obs, "cell_types": truth.shape[1], "genes": cells.n_vars}
    about |= {"cells_in_a_spot": float(spots.obs["n_cells"].mean()), "epochs": args.epochs}
    print(about, flush=True)
    rows = [score("non-negative least squares", least_squares(cells, spots, truth.columns), truth)]
    with tempfile.TemporaryDirectory() as folder:
        cells.write_h5ad(Path(folder) / "cells.h5ad")
        spots.write_h5ad(Path(folder) / "spots.h5ad")
        methods = [(sys.executable, "scvi_lite", prior) for prior in ("mog", "normal")]
        methods += [(args.peer, "scvi-tools", "mog")] if args.peer else []
        for python, package, prior in methods:
            options = ["--data", args.data, "--epochs", *map(str, args.epochs), "--run", package, prior, folder]
            subprocess.run([python, __file__, *options], check=True, stdout=subprocess.DEVNULL)
            found = pd.read_csv(Path(folder) / "found.csv", index_col=0)
            seconds = json.loads((Path(folder) / "seconds.json").read_text())
            rows.append(score(f"DestVI of {package}, {prior} prior", found, truth) | seconds)
    OUT.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
    print(f"Written to {OUT}")


def simulate(path: Path, side: float) -> tuple[anndata.AnnData, anndata.AnnData, pd.DataFrame]:
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

    rng = np.random.default_rng(0)
    xy_n2, field_n = np.asarray(tissue.obsm["spatial"], dtype=float), tissue.obs["batch"].to_numpy()
    member_sn = np.zeros((0, tissue.n_obs), dtype=bool)
    while len(member_sn) < N_SPOTS:
        centre = rng.integers(tissue.n_obs)
        place = xy_n2[centre] + rng.uniform(-side / 2, side / 2, 2)
        inside_n = (np.abs(xy_n2 - place) <= side / 2).all(1) & (field_n == field_n[centre])
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


def run(package: str, prior: str, folder: str, cond_epochs: int, spot_epochs: int) -> None:
    """Train both models and leave the proportions and the time in the folder."""
    if package == "scvi_lite":
        import scvi_lite as scvi
    else:
        import scvi
    cells, spots = (anndata.read_h5ad(Path(folder) / f"{name}.h5ad") for name in ("cells", "spots"))
    scvi.settings.seed = 0
    silent = {"accelerator": "cpu", "enable_progress_bar": False}
    start = time.perf_counter()
    scvi.model.CondSCVI.setup_anndata(cells, labels_key="cell_type")
    sc_model = scvi.model.CondSCVI(cells, prior=prior)
    sc_model.train(max_epochs=cond_epochs, batch_size=BATCH, **silent)
    middle = time.perf_counter()
    scvi.model.DestVI.setup_anndata(spots)
    model = scvi.model.DestVI.from_rna_model(spots, sc_model)
    model.train(max_epochs=spot_epochs, n_epochs_kl_warmup=spot_epochs // 5, batch_size=BATCH, **silent)
    seconds = {"seconds_cells": round(middle - start, 1), "seconds_spots": round(time.perf_counter() - middle, 1)}
    model.get_proportions().to_csv(Path(folder) / "found.csv")
    (Path(folder) / "seconds.json").write_text(json.dumps(seconds))


def score(method: str, found: pd.DataFrame, truth: pd.DataFrame) -> dict[str, object]:
    """Correlation over all spots and types, and its median over the types; root mean square error."""
    found = found[truth.columns]
    there = truth.columns[truth.std() > 0]
    by_type = [np.corrcoef(found[name], truth[name])[0, 1] if found[name].std() > 0 else 0.0 for name in there]
    row = {
        "method": method,
        "correlation": round(float(np.corrcoef(found.to_numpy().ravel(), truth.to_numpy().ravel())[0, 1]), 4),
        "median_correlation_of_a_type": round(float(np.median(by_type)), 4),
        "rmse": round(float(np.sqrt(np.mean((found.to_numpy() - truth.to_numpy()) ** 2))), 4),
    }
    print(row, flush=True)
    return row


if __name__ == "__main__":
    main()
