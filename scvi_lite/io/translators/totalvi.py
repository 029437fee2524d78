"""Weights of TOTALVI."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

from scvi_lite.io.translators.common import Rules, Setup, hidden, rename, split_columns, split_one_hot

TRANSPOSED = ("background_loc", "background_log_scale", "log_efficiency", "log_theta", "protein_log_theta")
PARTS = {"py_back_decoder": "back", "py_fore_decoder": "fore", "sigmoid_decoder": "mixing"}
HEADS = {
    "px_scale_decoder": "decoder.scale",
    "py_back_mean_log_alpha": "protein_decoder.back_loc",
    "py_back_mean_log_beta": "protein_decoder.back_scale",
    "py_fore_scale_decoder": "protein_decoder.ratio",
    "py_background_decoder": "protein_decoder.mixing_logit",
}


def translate(weights: dict[str, Any], setup: Setup) -> dict[str, Tensor]:
    """TOTALVI: encoder, decoders of genes and of the three parts of proteins, priors, dispersions."""
    arguments = setup.arguments
    latent_library = not (arguments.get("use_observed_lib_size", True) or setup.has_size_factor)
    zinb = arguments.get("gene_likelihood", "nb") == "zinb"
    heads = HEADS | ({"px_dropout_decoder_gene": "decoder.dropout"} if zinb else {})
    rules: Rules = [
        *hidden(r"encoder\.encoder", "encoder"),
        (r"encoder\.z_mean_encoder", "encoder.loc"),
        (r"encoder\.z_var_encoder", "encoder.log_var"),
        *(library_encoder() if latent_library else [(r"encoder\.l_gene\w*", None)]),
        ("library_log_means", "library_prior_loc" if latent_library else None),
        ("library_log_vars", "library_prior_var" if latent_library else None),
        *hidden(r"decoder\.px_decoder", "decoder"),
        *(rule for theirs, ours in PARTS.items() for rule in part(theirs, ours)),
        *((rf"decoder\.{theirs}\.fc_layers\.Layer 0\.0", f"{ours}.linear") for theirs, ours in heads.items()),
        (r"decoder\.px_dropout_decoder_gene", None),
        ("px_r", "log_theta"),
        ("py_r", "protein_log_theta"),
        ("background_pro_alpha", "background_loc"),
        ("background_pro_log_beta", "background_log_scale"),
        ("log_per_batch_efficiency", "log_efficiency"),
        ("pyro_param_store", None),
    ]
    state = rename(weights, rules)
    in_encoder = setup.covariates() if arguments.get("encode_covariates", True) else []
    in_decoder = setup.covariates()
    state = split_one_hot(state, {"encoder": in_encoder, "library_encoder": in_encoder, "decoder": in_decoder})
    with_covariates = [rf"protein_decoder\.{ours}\.blocks\.\d+" for ours in PARTS.values()] + list(heads.values())
    for name in [name for name in state if re.fullmatch(rf"({'|'.join(with_covariates)})\.linear\.weight", name)]:
        state |= split_columns(name.removesuffix(".weight"), state[name], in_decoder)
    for name in {"library_prior_loc", "library_prior_var"} & state.keys():
        state[name] = state[name].flatten()
    for name in TRANSPOSED:
        if state[name].ndim == 2:
            state[name] = state[name].T.contiguous()
    return state


def part(theirs: str, ours: str) -> Rules:
    """Rules for the hidden layers of one part of the proteins."""
    return [
        (rf"decoder\.{theirs}\.fc_layers\.Layer (\d+)\.0", rf"protein_decoder.{ours}.blocks.\1.linear"),
        (rf"decoder\.{theirs}\.fc_layers\.Layer (\d+)\.1", rf"protein_decoder.{ours}.blocks.\1.batch_norm"),
    ]


def library_encoder() -> Rules:
    """Rules for the encoder of the library."""
    return [
        *hidden(r"encoder\.l_gene_encoder", "library_encoder"),
        (r"encoder\.l_gene_mean_encoder", "library_encoder.loc"),
        (r"encoder\.l_gene_var_encoder", "library_encoder.log_var"),
    ]
