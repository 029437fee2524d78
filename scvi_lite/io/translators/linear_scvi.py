"""Weights of LinearSCVI."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from scvi_lite.io.translators.common import Rules, Setup, encoder, in_rows, library, rename, split_columns


def translate(weights: dict[str, Any], setup: Setup) -> dict[str, Tensor]:
    """LinearSCVI: encoder, perhaps a library encoder, linear decoder, dispersion."""
    likelihood = setup.arguments.get("gene_likelihood", "nb")
    rules: Rules = [
        *encoder("z_encoder", "encoder"),
        *library(setup.latent_library(by_default=True), encoder("l_encoder", "library_encoder")),
        *_linear_map("factor_regressor", "decoder.scale"),
        *(_linear_map("px_dropout_decoder", "decoder.dropout") if likelihood == "zinb" else []),
        (r"decoder\.px_dropout_decoder", None),
        ("px_r", None if likelihood == "poisson" else "log_theta"),
        (r"_embeddings_dict", None),
    ]
    state = rename(weights, rules)
    for part in ("decoder.scale", "decoder.dropout"):
        if f"{part}.linear.weight" in state:
            state |= split_columns(f"{part}.linear", state[f"{part}.linear.weight"], setup.covariates())
            _fold_bias(state, part)
    return in_rows(state)


def _linear_map(theirs: str, ours: str) -> Rules:
    return [
        (rf"decoder\.{theirs}\.fc_layers\.Layer 0\.0", f"{ours}.linear"),
        (rf"decoder\.{theirs}\.fc_layers\.Layer 0\.1", f"{ours}.batch_norm"),
    ]


def _fold_bias(state: dict[str, Tensor], part: str) -> None:
    """Take a constant before batch norm off the mean that batch norm subtracts."""
    mean, bias = f"{part}.batch_norm.running_mean", f"{part}.linear.bias"
    if mean in state and bias in state:
        state[mean] = state[mean] - state.pop(bias)
