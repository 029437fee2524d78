"""Proteins imputed where they were not measured, beside scvi-tools, with one recipe in one run.

``python benchmarks/missing_protein.py DATA --peer /path/to/python`` hides the proteins of some cells of
``pbmc10k_cite``, which become a batch without proteins, trains TOTALVI on all cells, and imputes the hidden proteins as
from the other batch. Each side runs in a process of its own, in turn, for each seed. Reported are

- ``pearson`` and ``spearman``: the mean over proteins of the correlation of the imputed with the measured counts (of
  log1p for Pearson's), with the background;
- ``coverage_50`` and ``coverage_90``: the share of the hidden counts that lie in the central 50 and 90 % of what the
  model draws for their cell; calibrated intervals hold as many, or a little more, as counts are whole.
"""

from __future__ import annotations

import importlib
import logging
import warnings
from pathlib import Path

import numpy as np
from two_sides import main

OUT = Path(__file__).parent / "results" / "missing_protein.json"
SIZES = {"cells": 3000, "genes": 1000, "epochs": 100}
SHARE_HIDDEN, N_SAMPLES, KEY = 0.3, 50, "protein_expression"


def impute(package: str, data: Path, seed: int, cells: int, genes: int, epochs: int) -> dict[str, float]:
    """One side, one seed."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    import anndata
    import pandas as pd

    scvi, model_of = importlib.import_module(package), importlib.import_module(f"{package}.model")
    scvi.settings.seed = seed
    rng = np.random.default_rng(seed)
    adata = anndata.read_h5ad(data)
    most = np.argsort(-np.asarray(adata.X.mean(0)).ravel())[:genes]
    adata = adata[rng.permutation(adata.n_obs)[:cells], np.sort(most)].copy()
    hidden_n = rng.random(adata.n_obs) < SHARE_HIDDEN
    truth_np = np.asarray(adata.obsm[KEY], dtype=np.float64)[hidden_n]
    adata.obs["batch"] = pd.Categorical(np.where(hidden_n, "rna_only", "cite"))
    adata.obsm[KEY].loc[hidden_n] = 0
    model_of.TOTALVI.setup_anndata(adata, protein_expression_obsm_key=KEY, batch_key="batch")
    model = model_of.TOTALVI(adata)
    model.train(epochs, accelerator="cpu", enable_progress_bar=False, early_stopping=False)
    rows = np.flatnonzero(hidden_n)
    options = {"transform_batch": "cite", "include_protein_background": True, "n_samples": N_SAMPLES}
    _, imputed_np = model.get_normalized_expression(indices=rows, return_numpy=True, **options)
    _, rate_nps = model.get_normalized_expression(
        indices=rows, return_numpy=True, sample_protein_mixing=True, return_mean=False, **options
    )
    log_theta = model.module.protein_log_theta if package == "scvi_lite" else model.module.py_r
    theta_p1 = np.exp(log_theta.detach().numpy())[:, None]
    drawn_nps = rng.poisson(rng.gamma(theta_p1, rate_nps / theta_p1))
    return score(truth_np, imputed_np, drawn_nps)


def score(truth_np: np.ndarray, imputed_np: np.ndarray, drawn_nps: np.ndarray) -> dict[str, float]:
    """Correlations over cells, mean over proteins; and how many counts lie in intervals of the draws."""
    from scipy.stats import pearsonr, spearmanr

    pairs = [(truth_np[:, p], imputed_np[:, p]) for p in range(truth_np.shape[1])]
    result = {
        "pearson": float(np.mean([pearsonr(np.log1p(t), np.log1p(i))[0] for t, i in pairs])),
        "spearman": float(np.mean([spearmanr(t, i)[0] for t, i in pairs])),
    }
    for level in (50, 90):
        low, high = np.percentile(drawn_nps, [50 - level / 2, 50 + level / 2], axis=-1)
        result[f"coverage_{level}"] = float(((truth_np >= low) & (truth_np <= high)).mean())
    return result


if __name__ == "__main__":
    main(__doc__, "pbmc10k_cite.h5ad", SIZES, impute, OUT)
