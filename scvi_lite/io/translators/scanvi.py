"""Weights of SCANVI."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from scvi_lite.io.translators import scvi
from scvi_lite.io.translators.common import Rules, Setup, encoder, hidden


def translate(weights: dict[str, Any], setup: Setup) -> dict[str, Tensor]:
    """SCANVI: as SCVI, and a classifier, the two networks between latent spaces, and the prior of the labels."""
    rules: Rules = [
        *hidden(r"classifier\.classifier\.0", "classifier"),
        (r"classifier\.classifier\.[01]", "classifier.logits"),  # 0 where there is no hidden layer
        *encoder("encoder_z2_z1", "u_encoder"),
        *hidden(r"decoder_z1_z2\.decoder", "z_decoder"),
        (r"decoder_z1_z2\.mean_decoder", "z_decoder.loc"),
        (r"decoder_z1_z2\.var_decoder", "z_decoder.log_var"),
        ("y_prior", "label_prior"),
    ]
    n_labels = [weights["y_prior"].numel()]
    state = scvi.translate(weights, setup, rules, {"u_encoder": n_labels, "z_decoder": n_labels})
    state["label_prior"] = state["label_prior"].flatten()
    return state
