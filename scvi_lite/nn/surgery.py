"""Architectural surgery: weights for new categories, beside those of a trained network (Lotfollahi et al. 2022).

Of a parameter that has a row for each category, the rows of a query's new categories come after the reference's. They
begin as the mean of these: before any training, a new batch looks like an average one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from scvi_lite.nn.layers import Block, CovariateLinear
from scvi_lite.nn.module import Frozen, Module

COVARIATES = ("batch_n", "cats_nc")  # fields that have tables in a layer, in this order
OF_LABELS = ("u_encoder", "z_decoder")  # networks over latent space and labels
OWN_OF_THE_QUERY = ("library_encoder",)  # trained whole: how deep the query was sequenced is its own affair


@dataclass(frozen=True)
class Freeze:
    """Which of the reference's weights a training on a query leaves as they are; see ``load_query_data``."""

    dropout: bool = False
    expression: bool = True
    decoder_first_layer: bool = True
    batchnorm_encoder: bool = True
    batchnorm_decoder: bool = False
    classifier: bool = True

    def holds(self, part: str, of: nn.Module, is_first: bool) -> bool:
        """Whether the weights of a module are held; ``part`` is the network that it is in, and not the query's own."""
        if part == "classifier":
            return self.classifier
        if isinstance(of, nn.BatchNorm1d):
            return self.batchnorm_decoder if "decoder" in part else self.batchnorm_encoder
        if part in OF_LABELS or not (is_first and isinstance(of, CovariateLinear)):
            return True
        return self.decoder_first_layer if "decoder" in part else self.expression


def choose_frozen(module: Module, n_old: Mapping[str, int], freeze: Freeze) -> Frozen:
    """What of a query's network is frozen.

    Parameters
    ----------
    module
        The network.
    n_old
        Of each parameter that has grown, the number of its rows that are the reference's; see :func:`grow`.
    freeze
        What is asked for.
    """
    weights, still = [], []
    for path, of in module.named_modules():
        part = path.partition(".")[0]
        own = part in OWN_OF_THE_QUERY
        held = not own and freeze.holds(part, of, is_first=re.search(r"blocks\.[1-9]", path) is None)
        for name, _ in of.named_parameters(prefix=path, recurse=False):
            weights += [name] if held and name not in n_old and name not in module.per_cell else []
        if (held and isinstance(of, nn.BatchNorm1d)) or (freeze.dropout and isinstance(of, Block | nn.Dropout)):
            still.append(path)
    rows = {name: n for name, n in n_old.items() if name.partition(".")[0] not in OWN_OF_THE_QUERY}
    return Frozen(tuple(weights), rows, tuple(still))


def grow(
    module: Module, state: Mapping[str, Tensor], n_old: Mapping[str, int], n_new: Mapping[str, int]
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """The weights of a reference, with rows for what is new in a query.

    Parameters
    ----------
    module
        A new network for the query.
    state
        Weights of the reference.
    n_old, n_new
        Number of categories of each categorical field, in the reference and with the query.

    Returns
    -------
    The weights, and for each parameter that has grown the number of rows that are the reference's.
    """
    state, fresh = dict(state), module.state_dict()
    covariates = [(n_old[name], n_new[name]) for name in n_new if name.startswith(COVARIATES)]
    for prefix in {name.rpartition(".")[0] for name in fresh if re.search(r"(^|\.)tables\.\d+$", name)}:
        state |= _align(prefix, state, fresh, covariates)
    for name in module.per_cell:  # the query's cells begin as the mean of the reference's
        state[name] = state[name].mean(0, keepdim=True).expand_as(fresh[name])
    parameters, rows = dict(module.named_parameters()), {}
    sizes = {(n_old[name], n_new[name]) for name in n_new if n_old[name] < n_new[name]}
    for name, tensor in fresh.items():
        old = state.get(name)
        if old is None or old.ndim == 0 or old.shape[1:] != tensor.shape[1:] or (len(old), len(tensor)) not in sizes:
            continue  # nothing new; or weights of something else, which will be refused when they are loaded
        n = len(old)
        new = tensor[n:]  # of a buffer, what the query's cells say
        if name in parameters:
            rows[name], new = n, old.mean(0, keepdim=True).expand_as(new)
        state[name] = torch.cat([old, new.to(old)])
    return state, rows


def _align(
    prefix: str, state: Mapping[str, Tensor], fresh: Mapping[str, Tensor], covariates: Sequence[tuple[int, int]]
) -> dict[str, Tensor]:
    """The tables of a layer under the numbers they have now.

    A covariate with one category has no table. If it gets a second one, there is a table more, and the covariate's
    first category, which added nothing, has a row of zeros.
    """
    now = _tables(prefix, fresh)
    before = iter(_tables(prefix, state))
    sizes = [n for _, n in covariates if n > 1]
    if sizes != [len(table) for table in now[: len(sizes)]]:
        covariates = covariates[1:]  # batches that are embedded have no table
    aligned: list[Tensor | None] = []
    for was, will_be in covariates:
        if will_be > 1:
            aligned.append(next(before, None) if was > 1 else now[len(aligned)].new_zeros(1, now[0].shape[1]))
    aligned += before  # tables of what is no covariate
    return {f"{prefix}.{i}": table for i, table in enumerate(aligned) if table is not None}


def _tables(prefix: str, state: Mapping[str, Tensor]) -> list[Tensor]:
    names = [name for name in state if re.fullmatch(rf"{re.escape(prefix)}\.\d+", name)]
    return [state[name] for name in sorted(names, key=lambda name: int(name.rpartition(".")[2]))]
