"""Expression and accessibility imputed where they were not measured, beside scvi-tools, with one recipe in one run.

``python benchmarks/multiome_imputation.py DATA --peer /path/to/python`` takes some cells of ``snare_mouse_cortex`` with
the genes and regions that most cells have, hides the RNA of three tenths and the chromatin of another three
tenths, trains MULTIVI on all, and imputes what is hidden as if the cells were paired. Seeds can be run one at a time.
Reported are

- ``pearson``: the mean over genes of the correlation over cells of imputed with measured expression (log1p of 10,000
  times the proportions), which would be 0 if types were not told apart;
- ``auroc``: the mean over regions of the area under the curve that tells open from closed cells, likewise 0.5;
- ``auprc``: the area under the curve of precision and recall over all cells and regions, and ``auprc_constant``, that
  of regions as open as in the cells where they were measured;
- ``label_accuracy``: the share of the cells with a hidden modality that have the type of most of their 15 nearest
  paired cells in the joint latent space, and ``silhouette``, that of the types in it;
- ``cpu_seconds``: of the training.
"""

from __future__ import annotations

import importlib
import logging
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from two_sides import main

if TYPE_CHECKING:
    from mudata import MuData

OUT = Path(__file__).parent / "results" / "multiome_imputation.json"
SIZES = {"cells": 2500, "genes": 1000, "regions": 2000, "epochs": 50}
WARMUP = 40  # times as many epochs: counts are so few that the full KL term leaves nothing in latent space
SHARES = {"paired": 0.4, "rna": 0.3, "atac": 0.3}  # of the cells, by what is left of them
LEAST_OPEN = 5  # cells with an open region, to have a curve of it
N_NEIGHBOURS = 15


def impute(package: str, data: Path, seed: int, cells: int, genes: int, regions: int, epochs: int) -> dict[str, float]:
    """One side, one seed."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    import mudata

    scvi, model_of = importlib.import_module(package), importlib.import_module(f"{package}.model")
    scvi.settings.seed = seed
    rng = np.random.default_rng(seed)
    with mudata.set_options(pull_on_update=False):
        mdata = subset(mudata.read_h5mu(data), rng.permutation, cells, genes, regions)
        has_n = rng.choice(list(SHARES), mdata.n_obs, p=list(SHARES.values()))
        truth = {"rna": mdata["rna"].X[has_n == "atac"].toarray(), "atac": mdata["atac"].X[has_n == "rna"].toarray()}
        hide(mdata, has_n)
        where = {"rna_layer": "rna", "atac_layer": "atac", "batch_key": "rna"}
        model_of.MULTIVI.setup_mudata(mdata, batch_key="has", modalities=where)
        model = model_of.MULTIVI(mdata, n_genes=genes, n_regions=regions)
        start = time.process_time()
        options = {"accelerator": "cpu", "enable_progress_bar": False, "early_stopping": False}
        model.train(epochs, lr=3e-3, n_epochs_kl_warmup=WARMUP * epochs, **options)
        seconds = time.process_time() - start
        as_paired = {"transform_batch": "paired", "return_numpy": True}
        rate_ng = model.get_normalized_expression(indices=np.flatnonzero(has_n == "atac"), **as_paired)
        p_nr = model.get_normalized_accessibility(
            indices=np.flatnonzero(has_n == "rna"), normalize_regions=True, **as_paired
        )
        z_nk = model.get_latent_representation()
    open_r = np.asarray((mdata["atac"].X[has_n != "rna"] > 0).mean(0)).ravel()
    return (
        {"cpu_seconds": seconds}
        | score_expression(truth["rna"], np.asarray(rate_ng))
        | score_accessibility(truth["atac"] > 0, np.asarray(p_nr), open_r)
        | score_latent(z_nk, mdata.obs["cell_type"].to_numpy(str), has_n == "paired")
    )


def subset(mdata: MuData, permutation: object, cells: int, genes: int, regions: int) -> MuData:
    """Some cells with the features that most cells have; those without any count of them are left out."""
    from mudata import MuData

    parts = {}
    for name, n in (("rna", genes), ("atac", regions)):
        common = np.argsort(-np.asarray((mdata[name].X > 0).sum(0)).ravel())[:n]
        parts[name] = mdata[name][:, np.sort(common)]
    enough = np.ravel(parts["rna"].X.sum(1) >= 50) & np.ravel(parts["atac"].X.sum(1) >= 20)
    rows = permutation(np.flatnonzero(enough))[:cells]
    some = MuData({name: part[rows].copy() for name, part in parts.items()})
    some.obs["cell_type"] = mdata.obs["cell_type"].to_numpy()[rows]
    return some


def hide(mdata: MuData, has_n: np.ndarray) -> None:
    """Zeros where a modality is hidden, which both packages take as not measured."""
    from scipy import sparse

    for name, other in (("rna", "atac"), ("atac", "rna")):
        adata = mdata[name]
        adata.X = sparse.csr_matrix(sparse.diags((has_n != other).astype(np.float32)) @ adata.X, dtype=np.float32)
        adata.X.eliminate_zeros()
        adata.obs["has"] = has_n


def score_expression(truth_ng: np.ndarray, rate_ng: np.ndarray) -> dict[str, float]:
    """Correlation of the logarithms over cells, mean over genes that vary."""
    truth_ng = np.log1p(1e4 * truth_ng / truth_ng.sum(1, keepdims=True))
    varies = truth_ng.std(0) > 0
    centred = [x - x.mean(0) for x in (truth_ng[:, varies], np.log1p(1e4 * rate_ng)[:, varies])]
    norm_g = np.sqrt((centred[0] ** 2).sum(0) * (centred[1] ** 2).sum(0))
    return {"pearson": float(((centred[0] * centred[1]).sum(0) / norm_g).mean())}


def score_accessibility(open_nr: np.ndarray, p_nr: np.ndarray, open_r: np.ndarray) -> dict[str, float]:
    """Areas under curves: over cells, mean over regions that open often enough; and over everything."""
    from sklearn.metrics import average_precision_score, roc_auc_score

    curves = np.flatnonzero(open_nr.sum(0) >= LEAST_OPEN)
    return {
        "auroc": float(np.mean([roc_auc_score(open_nr[:, r], p_nr[:, r]) for r in curves])),
        "auprc": float(average_precision_score(open_nr.ravel(), p_nr.ravel())),
        "auprc_constant": float(average_precision_score(open_nr.ravel(), np.tile(open_r, len(open_nr)))),
    }


def score_latent(z_nk: np.ndarray, label_n: np.ndarray, paired_n: np.ndarray) -> dict[str, float]:
    """Labels of cells with a hidden modality from paired ones, and how far types are apart."""
    from sklearn.metrics import silhouette_score
    from sklearn.neighbors import KNeighborsClassifier

    nearest = KNeighborsClassifier(N_NEIGHBOURS).fit(z_nk[paired_n], label_n[paired_n])
    return {
        "label_accuracy": float(nearest.score(z_nk[~paired_n], label_n[~paired_n])),
        "silhouette": float(silhouette_score(z_nk, label_n)),
    }


if __name__ == "__main__":
    main(__doc__, "snare_mouse_cortex.h5mu", SIZES, impute, OUT)
