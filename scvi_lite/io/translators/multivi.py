"""Weights of MULTIVI."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from scvi_lite.io.translators.common import Rules, Setup, encoder, hidden, rename, split_one_hot
from scvi_lite.io.translators.peakvi import head

PROTEINS = ("background_pro_alpha", "background_pro_log_beta", "py_r", "z_encoder_protein", "z_decoder_pro")
ENCODERS = ("encoder_expression", "encoder_accessibility", "library_encoder", "depth_encoder")
DECODERS = ("decoder", "decoder_accessibility")


def translate(weights: dict[str, Any], setup: Setup) -> dict[str, Tensor]:
    """MULTIVI: encoders and decoders of genes and of regions, size factors of both, dispersions, region factors."""
    arguments = setup.arguments
    likelihood, by_cell = arguments.get("gene_likelihood", "zinb"), arguments.get("dispersion", "gene") == "gene-cell"
    poisson = likelihood == "poisson"
    if len(weights["py_r"]):
        raise ValueError(f"it has {len(weights['py_r'])} proteins, which MULTIVI has not here")
    learned = arguments.get("modality_weights", "equal") != "equal"
    library: Rules = head("l_encoder_expression", "library_encoder")
    library = [("l_encoder_expression", None)] if setup.has_size_factor else library
    rules: Rules = [
        *encoder("z_encoder_expression", "encoder_expression"),
        *encoder("z_encoder_accessibility", "encoder_accessibility"),
        *(
            [("l_encoder_expression", None)]
            if setup.has_size_factor
            else head("l_encoder_expression", "library_encoder")
        ),
        *head("l_encoder_accessibility", "depth_encoder"),
        *hidden(r"z_decoder_expression\.px_decoder", "decoder"),
        (r"z_decoder_expression\.px_scale_decoder\.0", "decoder.scale"),
        (r"z_decoder_expression\.px_dropout_decoder", "decoder.dropout" if likelihood == "zinb" else None),
        (r"z_decoder_expression\.px_r_decoder", "decoder.dispersion" if by_cell and not poisson else None),
        *head("z_decoder_accessibility", "decoder_accessibility"),
        ("px_r", None if by_cell or poisson else "log_theta"),
        ("region_factors", "factor_r"),
        ("mod_weights", "weight_logit" if learned else None),
        *((name, None) for name in (*PROTEINS, "pyro_param_store")),
    ]
    state = rename(weights, rules)
    in_encoder = setup.covariates() if arguments.get("encode_covariates", False) else []
    covariates = {
        **dict.fromkeys(
            ("encoder_expression", "encoder_accessibility", "library_encoder", "depth_encoder"), in_encoder
        ),
        **dict.fromkeys(("decoder", "decoder_accessibility"), setup.covariates()),
    }
    state = split_one_hot(state, covariates, deeply=arguments.get("deeply_inject_covariates", False))
    if learned:
        state["weight_logit"] = state["weight_logit"][..., :2].contiguous()  # the third is of proteins
    if "log_theta" in state and state["log_theta"].ndim == 2:
        state["log_theta"] = state["log_theta"].T.contiguous()
    return state
