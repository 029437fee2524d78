"""Weights of PEAKVI."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from scvi_lite.io.translators.common import Rules, Setup, encoder, hidden, rename, split_one_hot


def translate(weights: dict[str, Any], setup: Setup) -> dict[str, Tensor]:
    """PEAKVI: encoder, decoder, perhaps encoder of the depth and region factors."""
    arguments = setup.arguments
    depth = arguments.get("model_depth", True)
    rules: Rules = [
        *encoder("z_encoder", "encoder"),
        *head("z_decoder", "decoder"),
        *(head("d_encoder", "depth_encoder") if depth else [("d_encoder", None)]),
        ("region_factors", "factor_r"),
    ]
    in_encoder = setup.encoded_covariates()
    state = split_one_hot(rename(weights, rules), {"encoder": in_encoder})  # which enter each of its layers
    state = split_one_hot(state, {"depth_encoder": in_encoder}, deeply=False)
    deeply = arguments.get("deeply_inject_covariates", False)
    return split_one_hot(state, {"decoder": setup.covariates()}, deeply=deeply)


def head(theirs: str, ours: str) -> Rules:
    """Rules for hidden layers with a linear map on top."""
    return [*hidden(rf"{theirs}\.px_decoder", ours), (rf"{theirs}\.output\.0", f"{ours}.output")]
