"""Weights of MULTIVI."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from scvi_lite.io.translators.common import Rules, Setup, counts, encoder, in_rows, rename, split_one_hot
from scvi_lite.io.translators.peakvi import head
from scvi_lite.io.translators.totalvi import protein_decoder, split_deep

ENCODERS = ("encoder_expression", "library_encoder", "depth_encoder")
DECODERS = ("decoder", "decoder_accessibility")
DEEP_ENCODERS = ("encoder_accessibility", "encoder_protein")  # covariates enter each layer, if they enter at all
PARTS = {  # what has to do with each modality, and weights with a row for each of its features; in order of the weights
    ("z_encoder_expression", "l_encoder_expression", "z_decoder_expression", "px_r"): (
        "z_decoder_expression.px_scale_decoder.0.weight"
    ),
    ("z_encoder_accessibility", "l_encoder_accessibility", "z_decoder_accessibility", "region_factors"): (
        "z_decoder_accessibility.output.0.weight"
    ),
    ("background_pro_alpha", "background_pro_log_beta", "py_r", "z_encoder_protein", "z_decoder_pro"): "py_r",
}
TRANSPOSED = ("log_theta", "proteins.log_theta", "proteins.background_loc", "proteins.background_log_scale")


def translate(weights: dict[str, Any], setup: Setup) -> dict[str, Tensor]:
    """MULTIVI: encoders and decoders of each modality, size factors, dispersions, region factors."""
    arguments = setup.arguments
    there = [len(weights[name]) > 0 for name in PARTS.values()]
    absent = [name for part, is_there in zip(PARTS, there) if not is_there for name in part]
    learned = arguments.get("modality_weights", "equal") != "equal"
    library: Rules = head("l_encoder_expression", "library_encoder")
    rules: Rules = [
        *((name, None) for name in absent),
        *encoder("z_encoder_expression", "encoder_expression"),
        *encoder("z_encoder_accessibility", "encoder_accessibility"),
        *([("l_encoder_expression", None)] if setup.has_size_factor else library),
        *([("l_encoder_accessibility", None)] if setup.has_depth else head("l_encoder_accessibility", "depth_encoder")),
        *counts("z_decoder_expression", arguments),
        *head("z_decoder_accessibility", "decoder_accessibility"),
        ("region_factors", "factor_r"),
        ("mod_weights", "weight_logit" if learned else None),
        *proteins(),
    ]
    state = rename(weights, rules)
    in_encoder, in_decoder = setup.encoded_covariates(), setup.covariates()
    covariates = dict.fromkeys(ENCODERS, in_encoder) | dict.fromkeys(DECODERS, in_decoder)
    state = split_one_hot(state, covariates, deeply=arguments.get("deeply_inject_covariates", False))
    state = split_one_hot(state, dict.fromkeys(DEEP_ENCODERS, in_encoder))
    state = split_deep(state, r"proteins\..*", in_decoder)
    if learned:
        state["weight_logit"] = state["weight_logit"][..., there].contiguous()  # theirs has those of absent ones too
    return in_rows(state, TRANSPOSED)


def proteins() -> Rules:
    """Rules for what has to do with proteins."""
    return [
        *encoder("z_encoder_protein", "encoder_protein"),
        *protein_decoder("z_decoder_pro", "proteins.decoder"),
        ("py_r", "proteins.log_theta"),
        ("background_pro_alpha", "proteins.background_loc"),
        ("background_pro_log_beta", "proteins.background_log_scale"),
    ]
