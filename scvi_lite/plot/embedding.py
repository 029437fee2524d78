"""Cells by their place in latent space."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from scvi_lite.errors import unknown
from scvi_lite.plot.style import OKABE_ITO, TOL_MUTED, saved, tidy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from scvi_lite._typing import AnnData, Axes

MARKERS = "o^sDvP*X"  # a second sign, once the colours have run out


def umap(
    adata: AnnData,
    color: str | Sequence[str] | None = None,
    use_rep: str = "X_scVI",
    n_neighbors: int = 15,
    seed: int = 0,
    save: str | PathLike | None = None,
) -> Figure:
    """Draw cells by a UMAP of their latent space (McInnes et al., 2018), one panel per colour.

    The positions are left in ``adata.obsm["X_umap"]``.

    Parameters
    ----------
    adata
        Cells, with the latent space in ``obsm``.
    color
        Columns of ``obs`` or names of genes.
    use_rep
        Key of the latent space in ``obsm``.
    n_neighbors
        Cells that count as near in the graph that UMAP lays out.
    seed
        Of the layout.
    save
        File to write as well.

    Raises
    ------
    ValueError
        For a colour or a representation that ``adata`` does not hold.
    """
    import matplotlib.pyplot as plt

    if use_rep not in adata.obsm:
        cure = "Store it first: adata.obsm['X_scVI'] = model.get_latent_representation()."
        raise ValueError(unknown("use_rep", use_rep, adata.obsm, "a key of adata.obsm", "Keys") + " " + cure)
    names = [color] if isinstance(color, str) else list(color or [])
    values = [_values_of(adata, name) for name in names] or [
        pd.Series("cells", index=adata.obs_names, dtype="category")
    ]
    adata.obsm["X_umap"] = xy_n2 = _layout(np.asarray(adata.obsm[use_rep]), n_neighbors, seed)

    figure, axes = plt.subplots(1, len(values), figsize=(5.6 * len(values), 4.2), squeeze=False, layout="constrained")
    order_n = np.random.default_rng(seed).permutation(adata.n_obs)  # no category lies on top of the others
    for ax, value in zip(axes[0], values, strict=True):
        _scatter(ax, xy_n2[order_n], value.iloc[order_n])
        ax.set(title=value.name or "", xlabel="UMAP 1", ylabel="UMAP 2", xticks=[], yticks=[], aspect="equal")
        ax.set_adjustable("datalim")
        tidy(ax)
    return saved(figure, save)


def _values_of(adata: AnnData, name: str) -> pd.Series:
    """A column of obs, categorical where it is not a number, or log1p of the counts of a gene."""
    if name in adata.obs:
        value = adata.obs[name]
        is_number = pd.api.types.is_numeric_dtype(value) and not pd.api.types.is_bool_dtype(value)
        return value if is_number else value.astype("category")
    if name not in adata.var_names:
        options = [*adata.obs, *adata.var_names]
        raise ValueError(unknown("color", name, options, "a column of adata.obs or a gene", "Columns and genes"))
    counts_n = adata[:, name].X
    counts_n = counts_n.toarray() if sp.issparse(counts_n) else np.asarray(counts_n)
    return pd.Series(np.log1p(counts_n.ravel()), index=adata.obs_names, name=f"{name} (log1p)")


def _layout(z_nk: np.ndarray, n_neighbors: int, seed: int) -> np.ndarray:
    """UMAP positions (n, 2), by way of scanpy."""
    import scanpy
    import torch
    from anndata import AnnData

    cells = AnnData(obs=pd.DataFrame(index=[str(i) for i in range(len(z_nk))]), obsm={"z": z_nk})
    n_threads = torch.get_num_threads()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries behind it: threads, deprecations
        scanpy.pp.neighbors(cells, use_rep="z", n_neighbors=min(n_neighbors, len(z_nk) - 1), random_state=seed)
        scanpy.tl.umap(cells, random_state=seed)
    torch.set_num_threads(n_threads)  # Numba's OpenMP takes all processors for PyTorch, too, which was told otherwise
    return cells.obsm["X_umap"]


def _scatter(ax: Axes, xy_n2: np.ndarray, value: pd.Series) -> None:
    """Points coloured by a category, with a legend beside them, or by a number, with a colour bar."""
    style: dict[str, Any] = {"s": float(np.clip(20_000 / len(xy_n2), 1, 14)), "linewidths": 0, "rasterized": True}
    known_n = value.notna().to_numpy()
    ax.scatter(*xy_n2[~known_n].T, color="#DDDDDD", **style)
    if not isinstance(value.dtype, pd.CategoricalDtype):
        x_n, y_n = xy_n2[known_n].T
        drawn = ax.scatter(x_n, y_n, c=value[known_n], cmap="viridis", **style)
        ax.figure.colorbar(drawn, ax=ax, shrink=0.7).outline.set_visible(False)
        return
    value = value.cat.remove_unused_categories()
    categories = value.cat.categories
    palette = np.array(OKABE_ITO if len(categories) <= len(OKABE_ITO) else TOL_MUTED)
    code_n = value.cat.codes.to_numpy()
    for first in range(0, len(categories), len(palette)):
        rows = known_n & (code_n >= first) & (code_n < first + len(palette))
        marker = MARKERS[first // len(palette) % len(MARKERS)]
        ax.scatter(xy_n2[rows, 0], xy_n2[rows, 1], c=palette[code_n[rows] - first], marker=marker, **style)
        for color, category in zip(palette, categories[first : first + len(palette)], strict=False):
            ax.scatter([], [], color=color, marker=marker, label=str(category), s=28)
    if value.name is not None:
        columns = 1 + (len(categories) - 1) // 16
        ax.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small", ncols=columns)
