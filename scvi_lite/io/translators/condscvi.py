"""Weights of CondSCVI."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from scvi_lite.io.translators.common import Rules, Setup, encoder, hidden, rename, split_one_hot

DECODER: Rules = [
    *hidden("decoder", "decoder"),
    ("px_decoder", "decoder.scale"),
    ("per_ct_bias", "decoder.label_bias_lg"),
    ("px_r", "log_theta"),
    (r"_embeddings_dict\.batch", "batch_embedding"),
]


def arguments(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """There, every prior that is no mixture is the standard normal, whatever its name."""
    return {**theirs} if theirs.get("prior") == "mog" else {**theirs, "prior": "normal"}


def translate(weights: dict[str, Any], setup: Setup) -> dict[str, Tensor]:
    """CondSCVI: encoder, decoder, prior, perhaps a classifier of fine labels."""
    weighted = setup.arguments.get("weight_obs", False) or setup.arguments.get("ct_weight") is not None
    rules: Rules = [
        *encoder("z_encoder", "encoder"),
        *DECODER,
        ("prior_means", "prior_loc_lpk"),
        ("prior_log_std", "prior_log_scale_lpk"),
        ("prior_logits", "prior_logit_lp"),
        ("ct_weight", "label_weight_l" if weighted else None),
        *hidden("linear_mapping", "classifier"),
        (r"classifier\.classifier\.0", "classifier.logits"),
    ]
    state = rename(weights, rules)
    for name in {"classifier.logits.weight", "classifier.logits.bias"} & state.keys():
        state[name] = state[name][:-1]  # the last class there is that of cells without a label
    labels = [setup.n_labels] if setup.n_labels > 1 else []
    return split_one_hot(state, dict.fromkeys(("encoder", "decoder", "classifier"), labels))
