"""As good as the peer: validation ELBO and latent space beside a recorded run of scvi-tools.

::

    python benchmarks/quality.py --data DATA_FOLDER --reference REFERENCE_FOLDER

trains SCVI on the genes and validation cells of the recorded run (``pbmc_multitech_2000``: 200 epochs, KL warm-up over
100, defaults otherwise) with several seeds, and measures, for the recorded latent space and for each of ours,

- the silhouette of the cell types, over the labelled cells;
- batch mixing: of each cell's 50 nearest neighbours the share from another batch, over the share expected if batches
  did not matter; 1 is perfect mixing.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

OUT = Path(__file__).parent / "results"
UNLABELLED = ("unlabelled", "unlabeled", "Unknown", "unknown", "nan")


def main() -> None:
    """Train, measure, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--reference", type=Path, required=True)
    parser.add_argument("--case", default="pbmc_multitech_2000")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--warmup", type=int, default=100)
    args = parser.parse_args()
    recorded = np.load(args.reference / f"{args.case}.npz")
    about = json.loads((args.reference / f"{args.case}.json").read_text())
    out = OUT / f"quality_{args.case}.json"
    rows = [{"model": "scvi-tools, recorded", "elbo": about["val_elbo"], **latent_quality(recorded["z"], recorded)}]
    print(rows[0], flush=True)
    for seed in args.seeds:
        rows.append(train(args.data / about["data"], recorded, seed, args.epochs, args.warmup))
        print(rows[-1], flush=True)
        result = {"epochs": args.epochs, "warmup": args.warmup, "rows": rows}
        out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"Written to {out}")


def train(path: Path, recorded: np.lib.npyio.NpzFile, seed: int, epochs: int, warmup: int) -> dict[str, object]:
    """One run on the recorded genes and split."""
    import time

    import anndata

    import scvi_lite
    from scvi_lite.model import SCVI

    adata = anndata.read_h5ad(path)[:, recorded["genes"]].copy()
    scvi_lite.settings.seed = seed
    SCVI.setup_anndata(adata, batch_key="batch")
    model = SCVI(adata)
    validation = recorded["validation_indices"]
    training = np.setdiff1d(np.arange(adata.n_obs), validation)
    start = time.perf_counter()
    model.train(
        max_epochs=epochs,
        accelerator="cpu",
        datasplitter_kwargs={"external_indexing": [training, validation]},
        plan_kwargs={"n_epochs_kl_warmup": warmup},
        enable_progress_bar=False,
    )
    seconds = time.perf_counter() - start
    elbo = -abs(float(model.get_elbo(indices=validation)))
    quality = latent_quality(model.get_latent_representation(), recorded)
    return {"model": f"scvi_lite, seed {seed}", "elbo": elbo, **quality, "seconds": seconds}


def latent_quality(z_nk: np.ndarray, recorded: np.lib.npyio.NpzFile) -> dict[str, float]:
    """Silhouette of the cell types and mixing of the batches."""
    from sklearn.metrics import silhouette_score
    from sklearn.neighbors import NearestNeighbors

    cell_type, batch = recorded["cell_type"], recorded["batch"]
    labelled = ~np.isin(cell_type, UNLABELLED)
    neighbours = NearestNeighbors(n_neighbors=51).fit(z_nk).kneighbors(z_nk, return_distance=False)[:, 1:]
    other = (batch[neighbours] != batch[:, None]).mean(1)
    share = {name: (batch == name).mean() for name in np.unique(batch)}
    expected = np.array([1 - share[name] for name in batch])
    return {
        "silhouette": float(silhouette_score(z_nk[labelled], cell_type[labelled])),
        "batch_mixing": float((other / expected).mean()),
    }


if __name__ == "__main__":
    main()
