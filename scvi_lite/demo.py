"""The demonstration: SCVI on real blood cells, from counts to pictures and marker genes.

Lopez et al., Nature Methods 15, 1053 (2018); the cells are of Zheng et al., Nature Communications 8, 14049 (2017).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from anndata import AnnData

LABELS = "bulk_labels"
SHOWN_TYPES = ("CD14+ Monocyte", "CD19+ B", "CD56+ NK", "CD34+")
TICKS = "▁▂▃▄▅▆▇█"


def run(out: Path, max_epochs: int = 200, seed: int = 0) -> bool:
    """Train SCVI on :func:`~scvi_lite.data.pbmc68k_reduced`, print what it learned and write it all to a folder.

    Parameters
    ----------
    out
        Folder to write to; the files of an earlier demonstration are replaced.
    max_epochs
        Passes over the data.
    seed
        The same seed gives the same model.

    Returns
    -------
    bool
        Whether the user interrupted the training; the model is written even so.
    """
    import scvi_lite
    from scvi_lite import plot
    from scvi_lite._run import fit, write_results

    scvi_lite.settings.seed = seed
    adata = scvi_lite.data.pbmc68k_reduced()
    print(f"Data: {adata.n_obs} blood cells x {adata.n_vars} genes, counts, {adata.obs[LABELS].nunique()} cell types\n")
    scvi_lite.model.SCVI.setup_anndata(adata)
    model = scvi_lite.model.SCVI(adata)
    interrupted = fit(model, max_epochs=max_epochs, check_val_every_n_epoch=1)
    write_results(model, out, [LABELS], umap=True, interrupted=interrupted)

    print("\nNegative ELBO, nats per cell (lower is better)")
    for part in ("train", "validation"):
        print("  " + curve_in_words(part, model.history[f"elbo_{part}"].iloc[:, 0].to_numpy()))

    if interrupted:
        return True

    print("\nHow well 10 dimensions tell the cell types apart")
    print("                        silhouette   type named by the 15 nearest cells")
    for name, z_nk in {
        "latent space": adata.obsm["X_scVI"],
        "principal components": principal_components(adata),
    }.items():
        width, share = separation(z_nk, adata.obs[LABELS].astype(str).to_numpy())
        print(f"  {name:<22}{width:10.3f}   {share:.1%}")

    table = model.differential_expression(groupby=LABELS, mode="change", silent=True)
    table.to_csv(out / "differential_expression.csv")
    print("\nGenes that are higher than in all other cells, of the largest log2 fold change among the likeliest")
    for cell_type in SHOWN_TYPES:
        print(f"  {cell_type:<15} {', '.join(top_genes(table, cell_type))}")
    plot.volcano(table, f"{SHOWN_TYPES[1]} vs Rest", save=out / "volcano.png")

    print(f"\nWritten to {out}/:")
    for path in sorted(out.iterdir()):
        print(f"  {path.name:<28} {path.stat().st_size / 1024:8.0f} KiB")
    return False


def curve_in_words(name: str, value_e: np.ndarray, width: int = 40) -> str:
    """A loss over the epochs in one line of text.

    >>> import numpy as np
    >>> curve_in_words("train", np.array([8.0, 4.0, 1.0]))
    'train           8.0 █▄▁ 1.0   3 epochs'
    """
    import numpy as np

    shown = value_e[np.linspace(0, len(value_e) - 1, min(width, len(value_e))).round().astype(int)]
    height = (shown - shown.min()) / max(np.ptp(shown), 1e-9) * (len(TICKS) - 1)
    ticks = "".join(TICKS[round(h)] for h in height)
    return f"{name:<12} {value_e[0]:6.1f} {ticks} {value_e[-1]:.1f}   {len(value_e)} epochs"


def separation(z_nk: np.ndarray, labels_n: np.ndarray) -> tuple[float, float]:
    """Mean silhouette width of the labels (Rousseeuw, 1987), and the share that a vote of 15 neighbours gets right.

    >>> import numpy as np
    >>> separation(np.arange(100.0)[:, None] // 50, np.arange(100) // 50)
    (1.0, 1.0)
    """
    from sklearn.metrics import silhouette_score
    from sklearn.model_selection import cross_val_predict
    from sklearn.neighbors import KNeighborsClassifier

    named_n = cross_val_predict(KNeighborsClassifier(15), z_nk, labels_n)
    return float(silhouette_score(z_nk, labels_n)), float((named_n == labels_n).mean())


def principal_components(adata: AnnData, n: int = 10) -> np.ndarray:
    """Coordinates (n, k) of log-normalised counts: what the latent space is compared with."""
    import scanpy
    from sklearn.decomposition import PCA

    normalised = scanpy.pp.log1p(scanpy.pp.normalize_total(adata, copy=True), copy=True).X
    return PCA(n, random_state=0).fit_transform(normalised.toarray())


def top_genes(table: pd.DataFrame, group: str, n: int = 6) -> list[str]:
    """The ``n`` genes of the largest fold change among the 20 that are likeliest to be higher in a group."""
    higher = table[(table["group1"] == group) & (table["lfc_mean"] > 0)]
    likely = higher.nlargest(20, "proba_de")
    return likely.nlargest(n, "lfc_mean").index.tolist()
