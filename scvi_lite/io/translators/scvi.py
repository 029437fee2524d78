"""Weights of SCVI."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from scvi_lite.io.translators.common import Rules, Setup, encoder, hidden, in_rows, rename, split_one_hot


def translate(
    weights: dict[str, Any],
    setup: Setup,
    more_rules: Rules | None = None,
    more_covariates: Mapping[str, Sequence[int]] | None = None,
) -> dict[str, Tensor]:
    """SCVI: encoder, perhaps a library encoder, decoder, dispersion; and what a model has beside them."""
    arguments = setup.arguments
    likelihood = arguments.get("gene_likelihood", "zinb")
    by_cell = arguments.get("dispersion", "gene") == "gene-cell"
    latent_library = not (arguments.get("use_observed_lib_size", True) or setup.has_size_factor)
    poisson = likelihood == "poisson"
    rules: Rules = [
        *encoder("z_encoder", "encoder"),
        *(encoder("l_encoder", "library_encoder") if latent_library else [("l_encoder", None)]),
        ("library_log_means", "library_prior_loc" if latent_library else None),
        ("library_log_vars", "library_prior_var" if latent_library else None),
        *hidden(r"decoder\.px_decoder", "decoder"),
        (r"decoder\.px_scale_decoder\.0", "decoder.scale"),
        (r"decoder\.px_dropout_decoder", "decoder.dropout" if likelihood == "zinb" else None),
        (r"decoder\.px_r_decoder", "decoder.dispersion" if by_cell and not poisson else None),
        ("px_r", None if by_cell or poisson else "log_theta"),
        (r"_embeddings_dict\.batch", "batch_embedding"),
        ("pyro_param_store", None),
        *(more_rules or []),
    ]
    state = rename(weights, rules)
    in_encoder = setup.covariates() if arguments.get("encode_covariates", False) else []
    covariates = {"encoder": in_encoder, "library_encoder": in_encoder, "decoder": setup.covariates()}
    state = split_one_hot(state, covariates, deeply=arguments.get("deeply_inject_covariates", True))
    state = split_one_hot(state, more_covariates or {})
    return in_rows(state)
