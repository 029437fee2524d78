"""Pictures in one call: training curves, UMAP of a latent space, volcano of differential expression.

Colours are those of Okabe and Ito and of Paul Tol, which people with colour vision deficiencies can tell apart.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from scvi_lite.errors import listing, unknown

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OKABE_ITO = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
TOL_MUTED = (
    "#332288",
    "#88CCEE",
    "#44AA99",
    "#117733",
    "#999933",
    "#DDCC77",
    "#CC6677",
    "#882255",
    "#AA4499",
    "#000000",
)
STRONG_EVIDENCE = 3.0  # Bayes factor above which a table without calls counts a gene as changed
MARKERS = "o^sDvP*X"  # a second sign, once the colours have run out
BLUE, ORANGE, GREY = OKABE_ITO[0], OKABE_ITO[5], "#BBBBBB"
DPI = 150


def training_curves(
    model_or_history: Any, metric: str = "elbo", ax: Axes | None = None, save: str | PathLike | None = None
) -> Axes:
    """Draw a loss over the epochs, on training and validation cells.

    Parameters
    ----------
    model_or_history
        A trained model, or its ``history``: data frames of one column, indexed by epoch.
    metric
        ``"elbo"`` (which history holds as a loss, the negative of the bound), ``"reconstruction_loss"``,
        ``"kl_local"`` or any other entry of the history without ``_train`` or ``_validation``.
    ax
        Where to draw; None makes a new figure.
    save
        File to write as well.

    Raises
    ------
    ValueError
        If the history holds no such metric.

    Examples
    --------
    >>> history = {"elbo_train": pd.DataFrame({"elbo_train": [300.0, 250.0, 240.0]})}
    >>> training_curves(history).get_ylabel()
    'negative ELBO (nats per cell)'
    """
    from matplotlib.ticker import MaxNLocator

    history: Mapping[str, pd.DataFrame] = (
        model_or_history if isinstance(model_or_history, Mapping) else model_or_history.history
    )
    ends = {"_train": ("training", BLUE), "_validation": ("validation", ORANGE)}
    curves = {end: history[metric + end].iloc[:, 0].dropna() for end in ends if metric + end in history}
    curves = {end: curve for end, curve in curves.items() if len(curve)}
    if not curves:
        metrics = sorted({name.removesuffix("_train").removesuffix("_validation") for name in history})
        raise ValueError(unknown("metric", metric, metrics, "in the history of this model", "Metrics"))

    ax = _new_axes(6.4, 4.0) if ax is None else ax
    for end, curve in curves.items():
        label, color = ends[end]
        ax.plot(curve.index, curve.to_numpy(), color=color, label=label, linewidth=1.8, marker=_marker_of_few(curve))
    labels = {"elbo": "negative ELBO", "reconstruction_loss": "reconstruction loss", "kl_local": "KL divergence"}
    ax.set_xlabel("epoch")
    ax.set_ylabel(f"{labels.get(metric, metric)} (nats per cell)" if metric in labels else metric)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    _leave_out_the_first_drop(ax, list(curves.values()))
    if len(curves) > 1:
        ax.legend(frameon=False)
    _tidy(ax)
    return _saved(ax, save)


def _marker_of_few(curve: pd.Series) -> str | None:
    """A line through one or two points cannot be seen without markers."""
    return "o" if len(curve) < 3 else None


def _leave_out_the_first_drop(ax: Axes, curves: Sequence[pd.Series]) -> None:
    """Let the first epochs leave the picture at the top where they would flatten all that follows."""
    bottom = min(curve.min() for curve in curves)
    later = max(curve.iloc[len(curve) // 10 :].max() for curve in curves)
    first = max(curve.max() for curve in curves)
    if first - bottom > 2.5 * (later - bottom) > 0:
        room = 0.06 * (later - bottom)
        ax.set_ylim(bottom - room, later + room)


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
        _tidy(ax)
    return _saved(figure, save)


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
    from anndata import AnnData

    cells = AnnData(obs=pd.DataFrame(index=[str(i) for i in range(len(z_nk))]), obsm={"z": z_nk})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries behind it: threads, deprecations
        scanpy.pp.neighbors(cells, use_rep="z", n_neighbors=min(n_neighbors, len(z_nk) - 1), random_state=seed)
        scanpy.tl.umap(cells, random_state=seed)
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


def volcano(
    de_table: pd.DataFrame,
    comparison: str | None = None,
    n_labels: int = 12,
    ax: Axes | None = None,
    save: str | PathLike | None = None,
) -> Axes:
    """Draw one comparison of ``differential_expression``: size of the change against evidence for it.

    Parameters
    ----------
    de_table
        What ``differential_expression`` returned, in either mode: one gene a row. In vanilla mode the change is the
        log2 ratio of ``scale1`` and ``scale2``.
    comparison
        Which value of the column ``comparison`` to draw, where the table holds several.
    n_labels
        How many genes to name at most, those that were called and changed most first; a name that would cover
        another is left away.
    ax
        Where to draw; None makes a new figure.
    save
        File to write as well.

    Raises
    ------
    ValueError
        If the table holds several comparisons and none was chosen, or not the one that was.

    Examples
    --------
    >>> table = pd.DataFrame({"lfc_mean": [2.0, 0.1], "bayes_factor": [5.0, -3.0]}, index=["CD3E", "ACTB"])
    >>> volcano(table).get_xlabel()
    'log2 fold change'
    """
    table = _one_comparison(de_table, comparison)
    change_g, evidence_g, is_de_g = _change_and_evidence(table)

    ax = _new_axes(6.4, 4.8) if ax is None else ax
    up_g, down_g = is_de_g & (change_g > 0), is_de_g & (change_g <= 0)
    drawn = [(~is_de_g, GREY, "not called"), (down_g, BLUE, "lower"), (up_g, ORANGE, "higher")]
    for rows, color, label in drawn:
        if rows.any():
            label = f"{label} ({int(rows.sum())})"
            ax.scatter(change_g[rows], evidence_g[rows], s=14, color=color, linewidths=0, alpha=0.8, label=label)
    ax.axvline(0, color="black", linewidth=0.6, zorder=0)
    ax.set_xlabel("log2 fold change")
    ax.set_ylabel("Bayes factor (natural log of odds)")
    if "comparison" in table:
        ax.set_title(str(table["comparison"].iloc[0]))
    ax.legend(frameon=False, fontsize="small", handletextpad=0.1, loc="upper left", bbox_to_anchor=(1, 1))
    ax.margins(x=0.14, y=0.14)
    _tidy(ax)
    ax.set_ylim(bottom=evidence_g.min() - 0.04 * np.ptp(evidence_g) - 1e-3)
    score_g = np.abs(change_g) * evidence_g.clip(min=0) + 1e6 * is_de_g
    chosen = [gene for gene in np.argsort(-score_g, kind="stable")[:n_labels] if score_g[gene] > 0]
    _label_points(ax, change_g, evidence_g, chosen, table.index.astype(str))
    return _saved(ax, save)


def _one_comparison(de_table: pd.DataFrame, comparison: str | None) -> pd.DataFrame:
    if "comparison" not in de_table:
        return de_table
    options = list(de_table["comparison"].unique())
    if comparison is None and len(options) > 1:
        raise ValueError(f"The table holds {len(options)} comparisons: choose with comparison=, of {listing(options)}.")
    if comparison is not None and comparison not in options:
        raise ValueError(unknown("comparison", comparison, options, "in this table", "Comparisons"))
    return de_table if comparison is None else de_table[de_table["comparison"] == comparison]


def _change_and_evidence(table: pd.DataFrame) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Log2 fold changes, Bayes factors and calls, (g,) each, from a table of either mode."""
    bayes_factor_g = table["bayes_factor"].to_numpy(float)
    if "lfc_mean" in table:
        change_g, evidence_g = table["lfc_mean"].to_numpy(float), bayes_factor_g
    else:  # vanilla mode: the sign of the Bayes factor says which group is higher
        tiny = 1e-8
        change_g = np.log2((table["scale1"].to_numpy(float) + tiny) / (table["scale2"].to_numpy(float) + tiny))
        evidence_g = np.abs(bayes_factor_g)
    calls = [name for name in table if str(name).startswith("is_de_fdr_")]
    is_de_g = table[calls[0]].to_numpy(bool) if calls else evidence_g > STRONG_EVIDENCE
    return change_g, evidence_g, is_de_g


def _label_points(ax: Axes, x_g: np.ndarray, y_g: np.ndarray, chosen: Sequence[int], names: Sequence[str]) -> None:
    """Name points in the order given, each where its name covers no other name or point, else not at all."""
    from matplotlib.text import Annotation, Text

    ax.get_figure(root=True).draw_without_rendering()
    taken: list[Any] = []
    points = ax.transData.transform(np.column_stack([x_g, y_g])[chosen])
    offsets = [(side * reach, rise) for rise in (4, -8, 14, -18, 26, -30) for reach in (6, 16) for side in (1, -1)]
    for gene in chosen:
        for dx, dy in sorted(offsets, key=lambda offset: np.sign(x_g[gene]) * offset[0] < 0):
            text = ax.annotate(
                names[gene], (x_g[gene], y_g[gene]), (dx, dy), textcoords="offset points", fontsize=8,
                ha="left" if dx > 0 else "right", annotation_clip=True,
                arrowprops={"arrowstyle": "-", "linewidth": 0.5, "color": "#666666", "shrinkA": 0, "shrinkB": 2},
            )  # fmt: skip
            Annotation.get_window_extent(text)  # moves the text to its place, and measures it with its arrow
            box = Text.get_window_extent(text).padded(1)
            inside = ax.bbox.contains(box.x0, box.y0) and ax.bbox.contains(box.x1, box.y1)
            covers = any(box.contains(*point) for point in points) or any(box.overlaps(other) for other in taken)
            if inside and not covers:
                taken.append(box)
                break
            text.remove()


def _new_axes(width: float, height: float) -> Axes:
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(width, height), layout="constrained")[1]


def _tidy(ax: Axes) -> None:
    ax.spines[["top", "right"]].set_visible(False)


def _saved(drawn: Any, save: str | PathLike | None) -> Any:
    """Write the figure of axes, or a figure, to a file if there is one; return what was given."""
    if save is not None:
        from matplotlib.figure import Figure

        (drawn if isinstance(drawn, Figure) else drawn.figure).savefig(save, dpi=DPI, bbox_inches="tight")
    return drawn
