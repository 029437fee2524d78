"""Curves of a training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

import pandas as pd

from scvi_lite.errors import unknown
from scvi_lite.plot.style import BLUE, ORANGE, new_axes, saved, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes


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

    ax = new_axes(6.4, 4.0) if ax is None else ax
    for end, curve in curves.items():
        label, color = ends[end]
        marker = "o" if len(curve) < 3 else None  # a line through one or two points cannot be seen without
        ax.plot(curve.index, curve.to_numpy(), color=color, label=label, linewidth=1.8, marker=marker)
    labels = {"elbo": "negative ELBO", "reconstruction_loss": "reconstruction loss", "kl_local": "KL divergence"}
    ax.set_xlabel("epoch")
    ax.set_ylabel(f"{labels.get(metric, metric)} (nats per cell)" if metric in labels else metric)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    _leave_out_the_first_drop(ax, list(curves.values()))
    if len(curves) > 1:
        ax.legend(frameon=False)
    tidy(ax)
    return saved(ax, save)


def _leave_out_the_first_drop(ax: Axes, curves: Sequence[pd.Series]) -> None:
    """Let the first epochs leave the picture at the top where they would flatten all that follows."""
    bottom = min(curve.min() for curve in curves)
    later = max(curve.iloc[len(curve) // 10 :].max() for curve in curves)
    first = max(curve.max() for curve in curves)
    if first - bottom > 2.5 * (later - bottom) > 0:
        room = 0.06 * (later - bottom)
        ax.set_ylim(bottom - room, later + room)
