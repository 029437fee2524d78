"""Populations of cells beside each other: draws of their features, statistics of their counts, and a table of both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch

from scvi_lite.analysis.by_gene import surest_first
from scvi_lite.analysis.cells import minibatches
from scvi_lite.analysis.effects import Change, Draws, Pairs, Vanilla
from scvi_lite.analysis.expression import expected
from scvi_lite.analysis.groups import Comparison, count_statistics
from scvi_lite.analysis.inputs import minibatch_size
from scvi_lite.analysis.output import writing
from scvi_lite.errors import StateError

if TYPE_CHECKING:
    from torch import Tensor

    from scvi_lite._typing import AnnData, Batch, Model

Codes = Sequence[int | None]
Sampler = Callable[[np.ndarray, Codes], np.ndarray]  # rows of a population, batches to decode as -> draws (s, g)


@dataclass(frozen=True)
class Features:
    """What is compared: genes, or other features beside or instead of them.

    Attributes
    ----------
    names
        Names of the features.
    value_of
        What a decoder says about them (n, features) at latent places of a minibatch; None for the proportions of genes.
    fields
        Where their counts are, side by side.
    """

    names: Sequence[str]
    value_of: Callable[[Tensor, Batch], Tensor] | None = None
    fields: Sequence[str] = ("x",)


def compare(
    model: Model,
    adata: AnnData,
    comparisons: Sequence[Comparison],
    sampler: Sampler,
    test: Vanilla | Change,
    codes: tuple[Codes, Codes],
    features: Features,
    all_stats: bool,
    silent: bool,
    threshold_counts: float,
    n_permuted: int | None,
) -> pd.DataFrame:
    """Compare populations feature by feature, each with draws that are decoded as from its ``codes`` of batches."""
    from tqdm.auto import tqdm

    if not features.names:
        raise StateError("The model has no features of the kind that was asked for, so there is nothing to compare.")
    counted = not model.registry.fields["x"].get("minified")
    statistics = feature_statistics(model, adata, comparisons, features.fields) if counted else []
    frames = []
    for i, comparison in enumerate(tqdm(comparisons, disable=silent, unit="comparison")):
        draws = []
        for j, rows in enumerate((comparison.rows1, comparison.rows2)):
            value_sg = sampler(rows, codes[j])
            mean_g = statistics[2 * i + j]["raw_mean"] if counted else value_sg.mean(0)
            if not counted and features.fields[0] == "x":  # of proportions: the mean count that the model expects
                mean_g = mean_g * model.registry.read(adata, "total_n")[rows].mean()
            draws.append(Draws(value_sg, mean_g < threshold_counts))
        pairs = Pairs.make(len(value_sg), len(codes[0]), n_permuted, same_batches=codes[0] == codes[1])
        columns = test(draws[0], draws[1], pairs)
        if all_stats:
            for name in ("raw_mean", "non_zeros_proportion", "raw_normalized_mean"):
                for j in (0, 1):
                    columns[f"{name}{j + 1}"] = statistics[2 * i + j][name] if counted else np.nan
        columns |= test.decide(columns)
        if comparison.name is not None:
            columns |= {"comparison": comparison.name, "group1": comparison.group1, "group2": comparison.group2}
        frames.append(pd.DataFrame(columns, index=list(features.names)).iloc[surest_first(columns, test.sort_by)])
    return pd.concat(frames)


def feature_statistics(
    model: Model, adata: AnnData, comparisons: Sequence[Comparison], fields: Sequence[str]
) -> list[dict[str, np.ndarray]]:
    """Statistics of the counts of each population, of the features of all fields side by side."""
    parts = []
    for field in fields:
        place_n = model.registry.place(adata, field)
        groups = [
            rows if place_n is None else rows[place_n[rows] >= 0]  # without cells that have no such data
            for comparison in comparisons
            for rows in (comparison.rows1, comparison.rows2)
        ]
        matrix = field in model.registry.matrices
        parts.append(count_statistics((model.registry.rows if matrix else model.registry.read)(adata, field), groups))
    return [{name: np.concatenate([part[name] for part in group]) for name in group[0]} for group in zip(*parts)]


def decode_in_turn(
    model: Model,
    adata: AnnData,
    rows: np.ndarray,
    z_sk: Tensor,
    codes: Codes,
    features: Features,
    batch_size: int | None,
) -> np.ndarray:
    """The features (s, f) at latent places, with the covariates of cells; place i as from batch ``codes[i % b]``."""
    n_features, turns = len(features.names), None if None in codes else torch.tensor(codes)
    size, with_counts = minibatch_size(batch_size, n_features), features.value_of is not None
    with writing(None, (len(rows), n_features), size) as answer:
        for cells, batch in minibatches(model, adata, rows, size, with_counts=with_counts):
            z_nk = z_sk[cells].to(model.device)
            if turns is not None:
                turn_n = torch.arange(cells.start, cells.stop) % len(codes)
                batch = replace(batch, batch_n=turns[turn_n].to(model.device))
            if features.value_of is None:
                answer.compute(batch.n_cells, partial(expected, model, z_nk, None, batch, None))
            else:
                answer.put(features.value_of(z_nk, batch))
    return answer.array
