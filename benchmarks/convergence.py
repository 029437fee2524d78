"""How soon ``train(preset="fast")`` is where a full training ends: validation ELBO, cell types, mixing of batches.

::

    python benchmarks/convergence.py --data DATA_FOLDER --reference REFERENCE_FOLDER
    python benchmarks/convergence.py --data ... --reference ... --models SCANVI LinearSCVI --cases pbmc_multitech_2000

Where a run of scvi-tools is recorded, its genes, validation cells and final validation ELBO are those to reach; the
time is that from the start of ``train()`` to the end of the first epoch whose ELBO on these cells, with the full weight
of the KL terms, is as high. With other data sets and models, our usual training, ``--default-epochs`` long, stands
beside the preset. ``accuracy`` is that of SCANVI's labels on the validation cells, whose own were hidden.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from quality import UNLABELLED, latent_quality

import scvi_lite

OUT = Path(__file__).parent / "results" / "convergence.json"
RECORDED = ("pbmc_multitech_2000", "kang_ctrl_8donors")
OTHERS = ("paul15", "pbmc10k_cite", "hashed_celllines_doublets")


def main() -> None:
    """Train, measure, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--reference", type=Path, required=True)
    parser.add_argument("--cases", nargs="+", default=[*RECORDED, *OTHERS], choices=[*RECORDED, *OTHERS])
    parser.add_argument("--models", nargs="+", default=["SCVI"], choices=["SCVI", "SCANVI", "LinearSCVI"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--default-epochs", type=int, help="of our usual training; as many as it takes if not given")
    args = parser.parse_args()
    results = json.loads(OUT.read_text()) if OUT.exists() else {"rows": []}
    for model, case in itertools.product(args.models, args.cases):
        results["rows"] = [row for row in results["rows"] if (row["model"], row["case"]) != (model, case)]
        for row in measure(model, case, args):
            results["rows"].append({"model": model, "case": case, **row})
            print(results["rows"][-1], flush=True)
            OUT.write_text(json.dumps(results, indent=1) + "\n")
    print(f"Written to {OUT}")


def measure(model: str, case: str, args: argparse.Namespace) -> Any:
    """Rows of one model and data set: what is to be reached, and how the preset gets there."""
    if case in RECORDED:
        recorded = np.load(args.reference / f"{case}.npz")
        about = json.loads((args.reference / f"{case}.json").read_text())
        adata = anndata.read_h5ad(args.data / about["data"])
        adata = adata[:, recorded["genes"]].copy() if "genes" in recorded else adata
        validation = recorded["validation_indices"]
    else:
        adata = anndata.read_h5ad(args.data / f"{case}.h5ad")
        validation = np.random.default_rng(0).permutation(adata.n_obs)[: adata.n_obs // 10]
    if case in RECORDED and model == "SCVI":
        reached = {
            "training": "scvi-tools, recorded",
            "elbo": -abs(about["val_elbo"]),
            "epochs": about["epochs"],
            "seconds": about["seconds"],
            **latent_quality(recorded["z"], of_cells(adata)),
        }
    else:
        reached = train(model, adata, validation, args.seeds[0], None, max_epochs=args.default_epochs)
    yield reached
    for seed in args.seeds:
        yield train(model, adata, validation, seed, reached["elbo"], preset="fast")


class Watch(Callback):
    """ELBO of the validation cells and seconds so far, at the end of each epoch."""

    def __init__(self) -> None:
        self.start, self.elbo, self.seconds = time.perf_counter(), [], []

    def on_validation_end(self, trainer: Any, task: Any) -> None:
        """Look."""
        self.elbo.append(-float(trainer.callback_metrics["elbo_validation"]))
        self.seconds.append(time.perf_counter() - self.start)


def train(
    name: str, adata: Any, validation: np.ndarray, seed: int, target: float | None, **options: Any
) -> dict[str, Any]:
    """One training, and when it was where it should be."""
    scvi_lite.settings.seed = seed
    model, watch = make(name, adata, validation), Watch()
    training = np.setdiff1d(np.arange(adata.n_obs), validation)
    split = {"external_indexing": [training, validation]}
    silent = {"accelerator": "cpu", "enable_progress_bar": False}
    model.train(datasplitter_kwargs=split, callbacks=watch, check_val_every_n_epoch=1, **options, **silent)
    n_epochs, seconds = len(watch.elbo), time.perf_counter() - watch.start
    row = {
        "training": f"preset {options['preset']}, seed {seed}" if "preset" in options else f"usual, seed {seed}",
        "elbo": float(np.mean([float(model.get_elbo(indices=validation)) for _ in range(4)])),
        "epochs": n_epochs,
        "steps": model.trainer.global_step,
        "seconds": seconds,
        "torch_threads": torch.get_num_threads(),
        **latent_quality(model.get_latent_representation(), of_cells(adata)),
    }
    if name == "SCANVI":
        truth = of_cells(adata)["cell_type"][validation]
        known = ~np.isin(truth, UNLABELLED)
        row["accuracy"] = float((model.predict(indices=validation)[known] == truth[known]).mean())
    reached = [epoch for epoch, elbo in enumerate(watch.elbo) if target is not None and elbo >= target]
    if reached:
        steps = row["steps"] * (reached[0] + 1) // n_epochs
        row["reached"] = {"epochs": reached[0] + 1, "steps": steps, "seconds": watch.seconds[reached[0]]}
    return row


def make(name: str, adata: Any, validation: np.ndarray) -> Any:
    """A model of the cells with its defaults. The labels of validation cells are hidden from it."""
    kind, keys = getattr(scvi_lite.model, name), {"batch_key": "batch" if "batch" in adata.obs else None}
    if name == "SCANVI":
        label_n = of_cells(adata)["cell_type"].astype(object)
        label_n[np.isin(label_n, UNLABELLED)] = label_n[validation] = UNLABELLED[0]
        adata.obs["label"] = label_n
        keys |= {"labels_key": "label", "unlabeled_category": UNLABELLED[0]}
    kind.setup_anndata(adata, **keys)
    return kind(adata)


def of_cells(adata: Any) -> dict[str, np.ndarray]:
    """Cell types and batches; without batches, halves of the cells, which mix."""
    n_cells = adata.n_obs
    batch = adata.obs["batch"].astype(str).to_numpy() if "batch" in adata.obs else np.arange(n_cells) % 2
    if len(np.unique(batch)) == 1:
        batch = np.arange(n_cells) % 2
    return {"cell_type": adata.obs["cell_type"].astype(str).to_numpy(), "batch": batch}


if __name__ == "__main__":
    main()
