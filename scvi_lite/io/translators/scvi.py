"""Weights of SCVI."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from scvi_lite.io.translators.common import Rules, Setup, counts, encoder, in_rows, library, rename, split_one_hot


def translate(
    weights: dict[str, Any],
    setup: Setup,
    more_rules: Rules | None = None,
    more_covariates: Mapping[str, Sequence[int]] | None = None,
) -> dict[str, Tensor]:
    """SCVI: encoder, perhaps a library encoder, decoder, dispersion; and what a model has beside them."""
    rules: Rules = [
        *encoder("z_encoder", "encoder"),
        *library(setup.latent_library(), encoder("l_encoder", "library_encoder")),
        *counts("decoder", setup.arguments),
        (r"_embeddings_dict\.batch", "batch_embedding"),
        *(more_rules or []),
    ]
    in_encoder = setup.encoded_covariates()
    covariates = {"encoder": in_encoder, "library_encoder": in_encoder, "decoder": setup.covariates()}
    deeply = setup.arguments.get("deeply_inject_covariates", True)
    state = split_one_hot(rename(weights, rules), covariates, deeply)
    return in_rows(split_one_hot(state, more_covariates or {}))
