"""Weights of LinearSCVI."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from scvi_lite.io.translators.common import Rules, Setup, encoder, rename, split_columns


def translate(weights: dict[str, Any], setup: Setup) -> dict[str, Tensor]:
    """LinearSCVI: encoder, perhaps a library encoder, linear decoder, dispersion."""
    likelihood = setup.arguments.get("gene_likelihood", "nb")
    latent_library = not setup.arguments.get("use_observed_lib_size", False)
    rules: Rules = [
        *encoder("z_encoder", "encoder"),
        *(encoder("l_encoder", "library_encoder") if latent_library else [("l_encoder", None)]),
        ("library_log_means", "library_prior_loc" if latent_library else None),
        ("library_log_vars", "library_prior_var" if latent_library else None),
        *_linear_map("factor_regressor", "decoder.scale"),
        *(_linear_map("px_dropout_decoder", "decoder.dropout") if likelihood == "zinb" else []),
        (r"decoder\.px_dropout_decoder", None),
        ("px_r", None if likelihood == "poisson" else "log_theta"),
        (r"_embeddings_dict", None),
        ("pyro_param_store", None),
    ]
    state = rename(weights, rules)
    for part in ("decoder.scale", "decoder.dropout"):
        if f"{part}.linear.weight" in state:
            state |= split_columns(f"{part}.linear", state[f"{part}.linear.weight"], setup.covariates())
            _fold_bias(state, part)
    for name in {"library_prior_loc", "library_prior_var"} & state.keys():
        state[name] = state[name].flatten()
    if "log_theta" in state and state["log_theta"].ndim == 2:
        state["log_theta"] = state["log_theta"].T.contiguous()
    return state


def _linear_map(theirs: str, ours: str) -> Rules:
    return [
        (rf"decoder\.{theirs}\.fc_layers\.Layer 0\.0", f"{ours}.linear"),
        (rf"decoder\.{theirs}\.fc_layers\.Layer 0\.1", f"{ours}.batch_norm"),
    ]


def _fold_bias(state: dict[str, Tensor], part: str) -> None:
    """Take a constant before batch norm off the mean that batch norm subtracts."""
    if f"{part}.batch_norm.running_mean" in state and f"{part}.linear.bias" in state:
        state[f"{part}.batch_norm.running_mean"] = state[f"{part}.batch_norm.running_mean"] - state.pop(
            f"{part}.linear.bias"
        )
