"""Genes by how they change between groups, or along a factor."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from scvi_lite.errors import listing, unknown
from scvi_lite.plot.style import BLUE, GREY, ORANGE, new_axes, saved, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STRONG_EVIDENCE = 3.0  # Bayes factor above which a table without calls counts a gene as changed


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

    ax = new_axes(6.4, 4.8) if ax is None else ax
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
    tidy(ax)
    ax.set_ylim(bottom=evidence_g.min() - 0.04 * np.ptp(evidence_g) - 1e-3)
    score_g = np.abs(change_g) * evidence_g.clip(min=0) + 1e6 * is_de_g
    chosen = [gene for gene in np.argsort(-score_g, kind="stable")[:n_labels] if score_g[gene] > 0]
    _label_points(ax, change_g, evidence_g, chosen, table.index.astype(str))
    return saved(ax, save)


def _one_comparison(de_table: pd.DataFrame, comparison: str | None) -> pd.DataFrame:
    if not isinstance(de_table, pd.DataFrame) or "bayes_factor" not in de_table:
        what = "has no column 'bayes_factor'" if isinstance(de_table, pd.DataFrame) else f"is {type(de_table).__name__}"
        raise TypeError(f"de_table {what}: a table that differential_expression() gave is needed.")
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


def loadings(
    model_or_table: Any,
    factor: str | int = 0,
    n_genes: int = 20,
    ax: Axes | None = None,
    save: str | PathLike | None = None,
) -> Axes:
    """Draw the genes that a factor moves most, by their loadings.

    Parameters
    ----------
    model_or_table
        A trained :class:`~scvi_lite.model.LinearSCVI`, or its loadings: a data frame of genes × factors.
    factor
        Name of the factor (``"Z_3"``) or its number, from 0.
    n_genes
        How many genes to draw, those with the largest loadings in either direction.
    ax
        Where to draw; None makes a new figure.
    save
        File to write as well.

    Raises
    ------
    ValueError
        If there is no such factor, or ``n_genes`` is below 1.

    Examples
    --------
    >>> table = pd.DataFrame({"Z_0": [0.5, -2.0, 0.1]}, index=["ACTB", "CD3E", "MALAT1"])
    >>> ax = loadings(table, n_genes=2)
    >>> [label.get_text() for label in ax.get_yticklabels()]
    ['CD3E', 'ACTB']
    """
    table = model_or_table if isinstance(model_or_table, pd.DataFrame) else model_or_table.get_loadings()
    names = [str(name) for name in table.columns]
    is_number = isinstance(factor, int | np.integer) and not isinstance(factor, bool)
    name = f"Z_{factor}" if is_number and f"Z_{factor}" in names else factor
    if str(name) not in names:
        raise ValueError(unknown("factor", factor, names, "a factor of this table", "Factors"))
    if isinstance(n_genes, bool) or not isinstance(n_genes, int | np.integer) or n_genes < 1:
        raise ValueError(f"n_genes={n_genes!r}: a whole number of at least 1 is needed.")
    loading_g = table.iloc[:, names.index(str(name))].astype(float)
    top_g = loading_g.iloc[np.argsort(-loading_g.abs(), kind="stable")[:n_genes]].sort_values()

    ax = new_axes(4.8, 1.0 + 0.22 * len(top_g)) if ax is None else ax
    color_g = np.where(top_g > 0, ORANGE, BLUE)
    at_g = np.arange(len(top_g))
    ax.hlines(at_g, 0, top_g, color=color_g, linewidth=1.2)
    ax.scatter(top_g, at_g, color=color_g, s=24, zorder=3)
    ax.axvline(0, color="black", linewidth=0.6, zorder=0)
    ax.set_yticks(at_g, top_g.index.astype(str))
    ax.set_xlabel("loading (natural log of expression per unit)")
    ax.set_title(str(name))
    ax.set_ylim(-0.7, len(top_g) - 0.3)
    tidy(ax)
    return saved(ax, save)
