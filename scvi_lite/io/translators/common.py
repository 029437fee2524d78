"""The names and layout of the weights that scvi-tools saves, and ours.

There, a linear layer takes dense inputs joined with one-hot columns of the categorical covariates. Ours keeps a table
per covariate instead (:class:`scvi_lite.nn.layers.CovariateLinear`), the same numbers transposed. Everything else is a
matter of names, and each model has a list of rules: the beginning of a name there, as a regular expression, and here;
None for what we do not keep, such as weights that no gradient reaches.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from scvi_lite.errors import listing

Rules = list[tuple[str, str | None]]
LINEAR = re.compile(r"(\w+)\.hidden\.blocks\.(\d+)\.linear\.weight")


@dataclass(frozen=True)
class Setup:
    """What the layout of the weights depends on."""

    arguments: dict[str, Any]  #: of the constructor
    n_batches: int
    n_cats: tuple[int, ...]  #: categories of each categorical covariate
    has_size_factor: bool
    n_labels: int = 1
    has_depth: bool = False

    def covariates(self) -> list[int]:
        """Number of one-hot columns of each covariate that has some."""
        one_hot = self.arguments.get("batch_representation", "one-hot") == "one-hot"
        return [n for n in ((self.n_batches,) if one_hot else ()) + self.n_cats if n > 1]

    def encoded_covariates(self, by_default: bool = False) -> list[int]:
        """The same of the covariates that an encoder reads: all, or none."""
        return self.covariates() if self.arguments.get("encode_covariates", by_default) else []

    def latent_library(self, by_default: bool = False) -> bool:
        """Whether the library size is inferred, where the model can do so."""
        return not (self.arguments.get("use_observed_lib_size", not by_default) or self.has_size_factor)


def hidden(theirs: str, ours: str) -> Rules:
    """Rules for a stack of hidden layers."""
    return [
        (rf"{theirs}\.fc_layers\.Layer (\d+)\.0", rf"{ours}.hidden.blocks.\1.linear"),
        (rf"{theirs}\.fc_layers\.Layer (\d+)\.1", rf"{ours}.hidden.blocks.\1.batch_norm"),
    ]


def encoder(theirs: str, ours: str) -> Rules:
    """Rules for an encoder: hidden layers, mean and variance."""
    return [
        *hidden(rf"{theirs}\.encoder", ours),
        (rf"{theirs}\.mean_encoder", f"{ours}.loc"),
        (rf"{theirs}\.var_encoder", f"{ours}.log_var"),
    ]


def library(is_latent: bool, rules: Rules, name: str = "l_encoder") -> Rules:
    """Rules for the encoder of the library, given for where it is latent, and for its prior."""
    return [
        *(rules if is_latent else [(name, None)]),
        ("library_log_means", "library_prior_loc" if is_latent else None),
        ("library_log_vars", "library_prior_var" if is_latent else None),
    ]


def counts(theirs: str, arguments: Mapping[str, Any]) -> Rules:
    """Rules for a decoder of counts, and their dispersions."""
    likelihood, by_cell = arguments.get("gene_likelihood", "zinb"), arguments.get("dispersion", "gene") == "gene-cell"
    poisson = likelihood == "poisson"
    return [
        *hidden(rf"{theirs}\.px_decoder", "decoder"),
        (rf"{theirs}\.px_scale_decoder\.0", "decoder.scale"),
        (rf"{theirs}\.px_dropout_decoder", "decoder.dropout" if likelihood == "zinb" else None),
        (rf"{theirs}\.px_r_decoder", "decoder.dispersion" if by_cell and not poisson else None),
        ("px_r", None if by_cell or poisson else "log_theta"),
    ]


def rename(weights: dict[str, Any], rules: Rules) -> dict[str, Tensor]:
    """The tensors under our names, by the first rule that fits the beginning of a name.

    >>> import torch
    >>> rename({"px_r": torch.zeros(2), "l_encoder.bias": torch.zeros(1)}, [("px_r", "log_theta"), ("l_encoder", None)])
    {'log_theta': tensor([0., 0.])}

    Raises
    ------
    ValueError
        No rule fits a tensor.
    """
    state, strange = {}, []
    rules = [*rules, ("pyro_param_store", None)]
    for name, tensor in weights.items():
        matches = ((re.match(rf"{theirs}(?=\.|$)", name), ours) for theirs, ours in rules)
        match, ours = next(((match, ours) for match, ours in matches if match), (None, None))
        if match is None or not (ours is None or isinstance(tensor, Tensor)):
            strange.append(name)
        elif ours is not None:
            state[match.expand(ours) + name[match.end() :]] = tensor
    if strange:
        raise ValueError(f"there is no place for its weights {listing(strange)}")
    return state


def in_rows(state: dict[str, Tensor], names: Sequence[str] = ("log_theta",)) -> dict[str, Tensor]:
    """With a row for each category, where there it is a column, and the prior of the library as a vector."""
    priors = {name: state[name].flatten() for name in ("library_prior_loc", "library_prior_var") if name in state}
    turned = {name: state[name].T.contiguous() for name in names if name in state and state[name].ndim == 2}
    return state | priors | turned


def split_one_hot(
    state: dict[str, Tensor], covariates: Mapping[str, Sequence[int]], deeply: bool = True
) -> dict[str, Tensor]:
    """Cut the one-hot columns, which come last, off the weights of hidden layers and make them tables.

    Parameters
    ----------
    state
        Tensors under our names.
    covariates
        By network: the number of columns of each covariate that enters it.
    deeply
        Whether the covariates enter each hidden layer, or the first only.
    """
    result: dict[str, Tensor] = {}
    for name, tensor in state.items():
        layer = LINEAR.fullmatch(name)
        sizes = covariates.get(layer[1], ()) if layer and (deeply or layer[2] == "0") else ()
        result |= split_columns(name.removesuffix(".weight"), tensor, sizes) if sizes else {name: tensor}
    return result


def split_columns(layer: str, weight: Tensor, sizes: Sequence[int]) -> dict[str, Tensor]:
    """The weights of a :class:`~scvi_lite.nn.layers.CovariateLinear` from one matrix with the one-hot columns last.

    >>> import torch
    >>> {name: tuple(tensor.shape) for name, tensor in split_columns("layer", torch.ones(3, 6), [2]).items()}
    {'layer.weight': (3, 4), 'layer.tables.0': (2, 3)}
    """
    dense, *tables = weight.split([weight.shape[1] - sum(sizes), *sizes], dim=1)
    split = {f"{layer}.weight": dense.contiguous()}
    return split | {f"{layer}.tables.{i}": table.T.contiguous() for i, table in enumerate(tables)}
