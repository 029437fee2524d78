"""What draws say gene by gene: of changes, of how sure these are, and of which genes to call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

EPS = 1e-8
SMALLEST_DELTA = 0.1


def log_ratio(x1: np.ndarray, x2: np.ndarray, added: np.float32) -> np.ndarray:
    """log2 (x1 + added) / (x2 + added), of which the logarithm takes longest.

    >>> log_ratio(np.ones(1, np.float32), np.zeros(1, np.float32), np.float32(1))
    array([1.], dtype=float32)
    """
    ratio = x1 + added
    ratio /= x2 + added
    return np.log2(ratio, out=ratio)


def turned(x_sg: np.ndarray) -> np.ndarray:
    """A transposed copy, in which each gene's draws lie side by side."""
    x_sg = np.ascontiguousarray(x_sg)
    x_gs = np.empty(x_sg.shape[::-1], x_sg.dtype)
    torch.from_numpy(x_gs).copy_(torch.from_numpy(x_sg).t())  # NumPy transposes far slower
    return x_gs


def summary(effect_gs: np.ndarray, quantiles: Sequence[float]) -> dict[str, Any]:
    """Statistics of each row, whose numbers are put in another order."""
    mean_g, low_g, high_g = effect_gs.mean(1), effect_gs.min(1), effect_gs.max(1)
    off_gs = effect_gs - mean_g[:, None]
    more = {"quantiles": np.quantile(effect_gs, quantiles, axis=1)} if quantiles else {}
    return {
        "lfc_mean": mean_g,
        "lfc_median": np.where(np.isnan(mean_g), mean_g, median(effect_gs)),
        "lfc_std": np.sqrt(np.einsum("gs,gs->g", off_gs, off_gs) / effect_gs.shape[1]),
        "lfc_min": low_g,
        "lfc_max": high_g,
        **more,
    }


def median(x_gs: np.ndarray) -> np.ndarray:
    """Median of each row, (g,), whose numbers it puts in another order.

    One partition finds it, where ``np.median`` takes several.

    >>> median(np.array([[3.0, 1.0, 2.0, 9.0]]))
    array([2.5])
    """
    middle = x_gs.shape[1] // 2
    x_gs.partition(middle, axis=1)
    upper_g = x_gs[:, middle]
    return upper_g if x_gs.shape[1] % 2 else (upper_g + x_gs[:, :middle].max(1)) / 2


def log_odds(p_g: np.ndarray) -> np.ndarray:
    """Log of p / (1 - p), finite at 0 and 1.

    >>> log_odds(np.array([0.5, 1.0])).round(2)
    array([ 0.  , 18.42])
    """
    return np.log(p_g + EPS) - np.log(1 - p_g + EPS)


def called(p_g: np.ndarray, target: float) -> np.ndarray:
    """The largest set of genes, by falling probability, with an expected share of false discoveries up to the target.

    The expected share is the mean of 1 - p over the set (Newton et al. 2004, doi:10.1093/biostatistics/5.2.155).

    >>> called(np.array([0.9, 0.99, 0.5]), 0.06)
    array([ True,  True, False])
    """
    order = np.argsort(-p_g, kind="stable")
    share = np.cumsum(1 - p_g[order]) / np.arange(1, len(p_g) + 1)
    chosen = np.zeros(len(p_g), dtype=bool)
    chosen[order[: np.searchsorted(share, target, side="right")]] = True
    return chosen


def estimate_delta(effect_g: np.ndarray) -> float:
    """Half the distance from 0 at which differential genes lie, at least 0.1; see :class:`Change`."""
    from sklearn.mixture import GaussianMixture

    effect_g = np.asarray(effect_g, dtype=np.float64)
    if len(effect_g) < 3 or np.ptp(effect_g) == 0:
        return SMALLEST_DELTA
    reach = np.quantile(np.abs(effect_g), 0.95)
    fit = GaussianMixture(3, means_init=[[-reach], [0.0], [reach]], random_state=0).fit(effect_g[:, None])
    low, _, high = np.sort(fit.means_[:, 0])
    return max(SMALLEST_DELTA, (abs(low) + abs(high)) / 4)


def surest_first(columns: Mapping[str, Any], by: str) -> np.ndarray:
    """Order of the genes: by a column, falling, and where it ties by the size of the change.

    >>> surest_first({"proba_de": np.array([0.5, 1.0, 1.0]), "lfc_mean": np.array([9.0, 1.0, -2.0])}, "proba_de")
    array([2, 1, 0])
    """
    change_g = columns["lfc_mean"] if "lfc_mean" in columns else columns["scale1"] - columns["scale2"]
    return np.lexsort((-np.abs(change_g), -columns[by]))
