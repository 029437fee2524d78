"""Do counts drawn from a model look like those observed: posterior predictive checks.

Gelman, Meng & Stern (1996), Posterior predictive assessment of model fitness via realized discrepancies. Statistica
Sinica 6.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import pandas as pd
from scipy import sparse

from scvi_lite._elsewhere import no_attribute
from scvi_lite._lazy import lazy
from scvi_lite.analysis.inputs import cell_rows
from scvi_lite.errors import UnknownKeyError, as_options, check_choice, check_whole, unknown

if TYPE_CHECKING:
    from scvi_lite._typing import Data
    from scvi_lite.model.base import Model

LEVELS = (0.025, 0.05, 0.075, 0.1, 0.125, 0.15, 0.175, 0.825, 0.85, 0.875, 0.9, 0.925, 0.95, 0.975)
BLOCK = 1 << 22  # counts of all draws that are dense at a time

__getattr__, __dir__ = lazy(__name__, {"PosteriorPredictiveCheck": __name__})


class PosteriorPredictiveCheck:
    """Compare counts drawn from models of the same cells with the counts observed.

    Parameters
    ----------
    adata
        The cells, with raw counts.
    models_dict
        The models, by name: any that have ``posterior_predictive_sample``.
    count_layer_key
        Layer that holds the counts; ``adata.X`` by default.
    n_samples
        Draws for each cell.
    indices
        Rows of the cells to look at, as everywhere; all by default.
    modality
        Which counts to look at, where models draw several kinds: the name of a modality, or ``"rna"`` or ``"protein"``.
        Features that a model does not draw are left out.

    Attributes
    ----------
    metrics
        What was computed, by name: a frame with a column for each model and, where it can be said of them, one for the
        observed counts, ``"Raw"``.
    raw_counts, samples
        The counts observed, (n, g), and those of each draw, by model; sparse.

    Raises
    ------
    ValueError, KeyError
        If the layer or the modality does not exist, there are no cells, or ``n_samples`` is below 1.

    Examples
    --------
    >>> import scvi_lite
    >>> adata = scvi_lite.data.synthetic_iid(batch_size=50, n_genes=20)
    >>> scvi_lite.model.SCVI.setup_anndata(adata)
    >>> model = scvi_lite.model.SCVI(adata)
    >>> model.train(max_epochs=1, enable_progress_bar=False)
    >>> check = PosteriorPredictiveCheck(adata, {"SCVI": model}, n_samples=2)
    >>> check.zero_fraction()
    >>> list(check.metrics["zero_fraction"])
    ['SCVI', 'Raw']
    """

    def __init__(
        self,
        adata: Data,
        models_dict: Mapping[str, Model],
        count_layer_key: str | None = None,
        n_samples: int = 10,
        indices: Any = None,
        modality: str | None = None,
    ):
        check_whole(n_samples=n_samples)
        self.adata, self.models, self.n_samples = adata, as_options("models_dict", models_dict), n_samples
        rows = cell_rows(adata, indices)
        if not len(rows):
            raise ValueError("indices: there are no cells to look at.")
        x, names = self._observed(count_layer_key, modality)
        drawn = {name: _draw(model, adata, rows, modality, n_samples) for name, model in self.models.items()}
        kept = names
        for of_model, _ in drawn.values():
            kept = kept[kept.isin(of_model)]
        self.raw_counts = _columns(sparse.csr_array(x[rows], dtype=np.float64), names, kept)
        self.samples = {name: [_columns(x, of_model, kept) for x in draws] for name, (of_model, draws) in drawn.items()}
        self.metrics: dict[str, pd.DataFrame] = {}
        self._names = {"cells": adata.obs_names[rows], "features": kept}

    def _observed(self, layer: str | None, modality: str | None) -> tuple[Any, pd.Index]:
        """The counts of all cells, and the names of their features."""
        counted = self.adata[modality] if modality in getattr(self.adata, "mod", ()) else self.adata
        if layer is not None and layer not in counted.layers:
            raise UnknownKeyError(unknown("count_layer_key", layer, counted.layers, "a layer", "Layers"))
        with_proteins = [m for m in self.models.values() if counted is self.adata and modality == "protein"]
        if not with_proteins or "proteins_np" not in (model := with_proteins[0]).registry.fields:
            return counted.X if layer is None else counted.layers[layer], counted.var_names
        if layer is not None:
            raise ValueError(f"count_layer_key={layer!r}: the proteins are not in a layer, but where the setup says.")
        return model.registry.read(model._check(self.adata), "proteins_np"), pd.Index(model.protein_names)

    def coefficient_of_variation(self, dim: str = "cells") -> None:
        """Standard deviation by mean, over the ``"cells"`` for each gene, or over the ``"features"`` for each cell.

        It is in ``metrics["cv_gene"]`` or ``metrics["cv_cell"]``; 0 where there are no counts, and of a model the mean
        over draws.
        """
        check_choice(["cells", "features"], dim=dim)
        axis, name, others = (0, "cv_gene", "features") if dim == "cells" else (1, "cv_cell", "cells")

        def variation(x_ng: sparse.csr_array) -> np.ndarray:
            mean, square = x_ng.mean(axis), x_ng.multiply(x_ng).mean(axis)
            deviation = np.sqrt(np.maximum(square - mean**2, 0))
            return np.divide(deviation, mean, out=np.zeros_like(mean), where=mean != 0)

        self._compare(name, variation, others)

    def zero_fraction(self) -> None:
        """Share of cells without a count of each gene, in ``metrics["zero_fraction"]``; the mean over draws."""
        self._compare("zero_fraction", lambda x_ng: 1 - (x_ng != 0).sum(0) / x_ng.shape[0], "features")

    def calibration_error(self, confidence_intervals: Sequence[float] | None = None) -> None:
        """How often observed counts lie between quantiles of the draws, against how often they should.

        The squared differences of both shares, summed over intervals, are in ``metrics["calibration"]``: lower is
        better. Counts are whole, so that some of it stays however good a model is.

        Parameters
        ----------
        confidence_intervals
            Quantiles from 0 to 1, an even number in rising order: the first and the last bound an interval, and so on.

        Raises
        ------
        ValueError
            If they are not.
        """
        levels = np.asarray(LEVELS if confidence_intervals is None else confidence_intervals, dtype=float)
        n_pairs = levels.size // 2
        if levels.shape != (2 * n_pairs,) or not n_pairs or (np.diff([0, *levels, 1]) < 0).any():
            raise ValueError(
                f"confidence_intervals={confidence_intervals!r}: an even number of rising quantiles is "
                "needed, as in [0.05, 0.25, 0.75, 0.95]."
            )
        width_q = levels[: n_pairs - 1 : -1] - levels[:n_pairs]
        errors = {}
        for name, draws in self.samples.items():
            inside_q = np.zeros(n_pairs)
            for x_ng, x_sng in self._blocks(draws):
                quantile_qng = np.quantile(x_sng, levels, axis=0)
                within = (quantile_qng[:n_pairs] <= x_ng) & (x_ng <= quantile_qng[: n_pairs - 1 : -1])
                inside_q += within.sum((1, 2))
            errors[name] = [float(((inside_q / np.prod(self.raw_counts.shape) - width_q) ** 2).sum())]
        self.metrics["calibration"] = pd.DataFrame(errors, index=["features"])

    def _compare(self, metric: str, statistic: Callable[[sparse.csr_array], np.ndarray], dim: str) -> None:
        columns = {name: np.mean([statistic(x) for x in draws], 0) for name, draws in self.samples.items()}
        self.metrics[metric] = pd.DataFrame(columns | {"Raw": statistic(self.raw_counts)}, index=self._names[dim])

    def _blocks(self, draws: Sequence[sparse.csr_array]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The counts of some cells at a time, dense: those observed, (n, g), and those drawn, (s, n, g)."""
        n_cells, n_genes = self.raw_counts.shape
        size = max(1, BLOCK // (len(draws) * n_genes))
        for start in range(0, n_cells, size):
            cells = slice(start, start + size)
            yield self.raw_counts[cells].toarray(), np.stack([x_ng[cells].toarray() for x_ng in draws])

    def __repr__(self) -> str:
        n_cells, n_genes = self.raw_counts.shape
        return (
            f"PosteriorPredictiveCheck({list(self.models)}, n_samples={self.n_samples}), {n_cells} cells × {n_genes} "
            f"features, computed: {list(self.metrics)}"
        )

    def __getattr__(self, name: str) -> NoReturn:
        raise no_attribute(self, name)


def _draw(
    model: Model, adata: Data, rows: np.ndarray, modality: str | None, n_samples: int
) -> tuple[pd.Index, list[sparse.csr_array]]:
    """The features of a model, in its order, which need not be that of the data, and its draws."""
    data, draws = model._check(adata), []
    for _ in range(n_samples):
        drawn: Any = model.posterior_predictive_sample(data, rows)
        if isinstance(drawn, dict):
            check_choice(drawn, "what this model draws", "Modalities", modality=modality)
            drawn = drawn[modality]
        draws.append(sparse.csr_array(drawn, dtype=np.float64))
    if modality in getattr(data, "mod", ()):
        names = data[modality].var_names
    else:
        names = pd.Index(model.protein_names) if modality == "protein" else data.var_names
    return names, draws


def _columns(x_ng: sparse.csr_array, names: pd.Index, kept: pd.Index) -> sparse.csr_array:
    return x_ng if names.equals(kept) else x_ng[:, names.get_indexer(kept)]
