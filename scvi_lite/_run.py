"""A training from a file of counts to a folder of results: the steps that the command and the demonstration take."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

from scvi_lite.errors import listing, unknown

FROM_ONE_FILE = ("SCVI", "SCANVI", "LinearSCVI", "CondSCVI", "PEAKVI", "TOTALVI")
FLAGS = {
    "protein_expression_obsm_key": "--proteins",
    "categorical_covariate_keys": "--categorical-covariate",
    "continuous_covariate_keys": "--continuous-covariate",
}


class WrongCall(ValueError):
    """A value on the command line that can be refused before any file is read."""


def check_model_name(name: str) -> None:
    """Refuse the name of a model that there is not, or that needs more than a file of counts."""
    from scvi_lite import MODELS

    if name not in FROM_ONE_FILE:
        known = name in MODELS
        hint = f" {name} is made in Python: it needs more than one file of counts." if known else ""
        raise WrongCall(unknown("--model", name, FROM_ONE_FILE, "a model of this command", "Models") + hint)


def check_out(out: Path, overwrite: bool) -> None:
    """Refuse a place that cannot hold the results, before the time of a training is spent."""
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"--out '{out}' is a file: name a folder.")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise FileExistsError(f"--out '{out}' is not empty: add --overwrite, or name another folder.")
    existing = next(folder for folder in [out, *out.absolute().parents] if folder.exists())
    if not os.access(existing, os.W_OK):
        raise PermissionError(f"--out '{out}' cannot be written: '{existing}' is read-only.")


def read_counts(path: Path) -> Any:
    """Read an ``.h5ad`` file.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is a folder or another kind of file.
    """
    if not path.exists():
        raise FileNotFoundError(f"'{path}' does not exist.")
    import anndata
    import h5py

    if path.is_dir() or not h5py.is_hdf5(path):
        raise ValueError(f"'{path}' is not an .h5ad file; write one with adata.write_h5ad(path).")
    with h5py.File(path) as file:
        if not {"obs", "var"} <= set(file):
            raise ValueError(f"'{path}' is an HDF5 file, but not of an AnnData: it holds {listing(file)}.")
    return anndata.read_h5ad(path)


def set_up(adata: Any, model_name: str, n_latent: int | None, seed: int, **setup: Any) -> Any:
    """Make an untrained model of the data.

    Raises
    ------
    WrongCall
        If an option is missing that the model needs, or given that it does not have.
    """
    import inspect

    import scvi_lite

    scvi_lite.settings.seed = seed
    model_class = getattr(scvi_lite.model, model_name)
    given = {key: value for key, value in setup.items() if value is not None}
    _, *parameters = inspect.signature(model_class.setup_anndata).parameters.values()
    needed = [p.name for p in parameters if p.default is inspect.Parameter.empty]
    for name in [*given, *needed]:
        flag = FLAGS.get(name, "--" + name.replace("_", "-"))
        if name not in given:
            raise WrongCall(f"{model_name} needs {flag}.")
        if name not in [p.name for p in parameters]:
            raise WrongCall(f"{model_name} has no use for {flag}.")
    model_class.setup_anndata(adata, **given)
    return model_class(adata) if n_latent is None else model_class(adata, n_latent=n_latent)


def fit(model: Any, **arguments: Any) -> bool:
    """Train; true if the user interrupted, which train() says as a warning, once the model holds what it learned."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Training was interrupted", UserWarning)
        try:
            model.train(**arguments)
        except UserWarning:
            return True
    return False


def write_results(model: Any, out: Path, colors: list[str], umap: bool, interrupted: bool) -> dict[str, Any] | None:
    """Write the model with its data and latent space, pictures and metrics; on the first of several processes only."""
    from scvi_lite import plot

    if not model.trainer.is_global_zero:
        return None
    model.adata.obsm["X_scVI"] = model.get_latent_representation()
    out.mkdir(parents=True, exist_ok=True)
    if umap:
        plot.umap(model.adata, color=colors or None, save=out / "umap.png")
    model.save(out, overwrite=True, save_anndata=True)
    metrics = {
        "model": type(model).__name__,
        "n_cells": model.adata.n_obs,
        "n_genes": model.adata.n_vars,
        "epochs": max((len(frame) for frame in model.history.values()), default=0),
        "interrupted": interrupted,
        **{name: float(frame.iloc[-1, 0]) for name, frame in model.history.items() if len(frame)},
    }
    if "elbo_train" in metrics:
        plot.training_curves(model, save=out / "training.png")
    (out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    return metrics
