"""The cells that a question is about: found, gone through in minibatches, asked, and named in the answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from scvi_lite.analysis.inputs import draw, minibatch_size
from scvi_lite.analysis.output import Out, collect
from scvi_lite.errors import check_whole, warn

if TYPE_CHECKING:
    from scvi_lite._typing import Batch, Data, Model, Posterior

Parts = dict[str, Tensor]  # what is asked of a minibatch, (..., n, features) each


class Cells(NamedTuple):
    """Data that fit the model, and the rows of the cells that a question is about."""

    adata: Any
    rows: np.ndarray

    @property
    def names(self) -> pd.Index:
        return self.adata.obs_names[self.rows]


def find_cells(model: Model, adata: Data | None, indices: Any, n_overall: int | None = None) -> Cells:
    """The cells asked about, or ``n_overall`` of them, drawn at random. Warns where the model is not trained."""
    adata = model._check(adata)
    rows = model._rows(adata, indices)
    if n_overall is not None:
        check_whole(n_samples_overall=n_overall)
        rows = draw(rows, n_overall)
    model._warn_if_untrained()
    return Cells(adata, rows)


@dataclass(frozen=True)
class How:
    """How cells are asked: at which places in latent space, as from which batches. Checked when made."""

    codes: Sequence[int | None] = (None,)  #: batches to decode as, over which is averaged; None for each cell's own
    n_samples: int = 1  #: draws from the posterior of each cell
    average: bool = True  #: over the draws
    at_mean: bool = False  #: ask at the posterior mean instead
    draws_last: bool = False  #: whether draws that are not averaged are the last dimension of an answer, not the first
    batch_size: int | None = None
    silent: bool = True

    def __post_init__(self) -> None:
        check_whole(n_samples=self.n_samples)
        if self.at_mean and self.n_samples > 1:
            warn(
                f"n_samples={self.n_samples} changes nothing: the posterior mean is decoded. Give use_z_mean=False for "
                "draws."
            )


def check_samples(n_samples: int, n_samples_overall: int | None) -> None:
    """Refuse numbers of draws below 1, or both of each cell and overall."""
    check_whole(n_samples=n_samples)
    if n_samples_overall is not None:
        check_whole(n_samples_overall=n_samples_overall)
        if n_samples > 1:
            raise ValueError("n_samples and n_samples_overall are given; use one of them.")


def minibatches(
    model: Model, adata: Data, rows: np.ndarray, size: int, silent: bool = True, with_counts: bool = True
) -> Iterator[tuple[slice, Batch]]:
    """Minibatches, and where their cells are among the rows."""
    from tqdm.auto import tqdm

    start = 0
    with tqdm(total=len(rows), disable=silent, unit="cell") as bar:
        for batch in model._minibatches(adata, rows, size, with_counts):
            yield slice(start, start + batch.n_cells), batch
            start += batch.n_cells
            bar.update(batch.n_cells)


def ask_cells(
    model: Model,
    cells: Cells,
    ask: Callable[[Batch, Posterior, Tensor], Parts],
    how: How | None = None,
    out: Mapping[str, Out] | None = None,
) -> dict[str, Any]:
    """What is asked of each cell, averaged over batches and perhaps draws.

    Parameters
    ----------
    ask
        The question: of a minibatch, its posterior and positions z, (n, k) or (s, n, k).
    out
        By name, where to put what is asked, if not into memory.

    Returns
    -------
    dict
        (n, features) float32 each; (s, n, features) with several draws that are not averaged.
    """
    how = how or How()
    several = how.n_samples > 1 and not how.at_mean
    draws_last = how.draws_last and several and not how.average

    def answers() -> Iterator[Parts]:
        size = minibatch_size(how.batch_size, (how.n_samples if several else 1) * model.module.config.n_inputs)
        for _, batch in minibatches(model, *cells, size, how.silent):
            q = model.module.encode(batch)
            z = q.z_loc_nk if how.at_mean else q.sample_z(how.n_samples if several else None)
            parts: Parts = {}
            for code in how.codes:
                for name, value in ask(batch.with_batch(code), q, z).items():
                    parts[name] = parts[name] + value if name in parts else value
            for name, value in parts.items():
                value = value.mean(0) if several and how.average else value.movedim(0, -1) if draws_last else value
                parts[name] = value if len(how.codes) == 1 else value / len(how.codes)
            yield parts

    return collect(answers(), len(cells.rows), out, draws_last)


def n_draws(z: Tensor) -> int | None:
    """How many draws there are of each cell, where these are a dimension of their own."""
    return len(z) if z.ndim == 3 else None


def chosen(value: Tensor, positions: np.ndarray | None) -> Tensor:
    """Some of the features, or all."""
    return value if positions is None else value[..., torch.from_numpy(positions).to(value.device)]


def mean_over(values: Iterator[Tensor]) -> Tensor:
    """The mean of several tensors, of which two are there at a time."""
    total, n = next(values), 1
    for n, value in enumerate(values, start=2):  # noqa: B007
        total += value
    return total if n == 1 else total / n


def frame(
    value: Any, cells: pd.Index, names: Sequence[str], positions: np.ndarray | None = None, plain: Any = False
) -> Any:
    """Values (n, features), dense or sparse, with the names of cells and of the features, all or some.

    What is to stay ``plain``, or has a dimension of draws, is given as it is.
    """
    if plain or value.ndim == 3:
        return value
    columns = pd.Index(names) if positions is None else pd.Index(names)[positions]
    if isinstance(value, np.ndarray):
        return pd.DataFrame(value, index=cells, columns=columns, copy=False)
    return pd.DataFrame.sparse.from_spmatrix(value, index=cells, columns=columns)
