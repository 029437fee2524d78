"""Weights of TOTALVI."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

from scvi_lite.io.translators.common import Rules, Setup, hidden, in_rows, library, rename, split_columns, split_one_hot

TRANSPOSED = ("background_loc", "background_log_scale", "log_efficiency", "log_theta", "protein_log_theta")
PARTS = {"py_back_decoder": "back", "py_fore_decoder": "fore", "sigmoid_decoder": "mixing"}
PROTEIN_HEADS = {
    "py_back_mean_log_alpha": "back_loc",
    "py_back_mean_log_beta": "back_scale",
    "py_fore_scale_decoder": "ratio",
    "py_background_decoder": "mixing_logit",
}


def translate(weights: dict[str, Any], setup: Setup) -> dict[str, Tensor]:
    """TOTALVI: encoder, decoders of genes and of the three parts of proteins, priors, dispersions."""
    zinb = setup.arguments.get("gene_likelihood", "nb") == "zinb"
    dropout = head(r"decoder\.px_dropout_decoder_gene", "decoder.dropout")
    rules: Rules = [
        *hidden(r"encoder\.encoder", "encoder"),
        (r"encoder\.z_mean_encoder", "encoder.loc"),
        (r"encoder\.z_var_encoder", "encoder.log_var"),
        *library(setup.latent_library(), library_encoder(), r"encoder\.l_gene\w*"),
        *hidden(r"decoder\.px_decoder", "decoder"),
        head(r"decoder\.px_scale_decoder", "decoder.scale"),
        dropout if zinb else (r"decoder\.px_dropout_decoder_gene", None),
        *protein_decoder("decoder", "protein_decoder"),
        ("px_r", "log_theta"),
        ("py_r", "protein_log_theta"),
        ("background_pro_alpha", "background_loc"),
        ("background_pro_log_beta", "background_log_scale"),
        ("log_per_batch_efficiency", "log_efficiency"),
    ]
    state = rename(weights, rules)
    in_encoder, in_decoder = setup.encoded_covariates(by_default=True), setup.covariates()
    state = split_one_hot(state, {"encoder": in_encoder, "library_encoder": in_encoder, "decoder": in_decoder})
    state = split_deep(state, r"protein_decoder\..*|decoder\.(scale|dropout)", in_decoder)
    return in_rows(state, TRANSPOSED)


def arguments(given: dict[str, Any]) -> dict[str, Any]:
    """Its arguments; whatever the likelihood is called there, it is negative binomial if it is not zero-inflated."""
    return given | ({} if given.get("gene_likelihood") == "zinb" else {"gene_likelihood": "nb"})


def head(theirs: str, ours: str) -> tuple[str, str]:
    """The rule for a linear map of hidden units, latent position and covariates."""
    return rf"{theirs}\.fc_layers\.Layer 0\.0", f"{ours}.linear"


def protein_decoder(theirs: str, ours: str) -> Rules:
    """Rules for the decoder of proteins: three stacks of hidden layers, and what is read off them."""
    rules = [head(rf"{theirs}\.{name}", f"{ours}.{own}") for name, own in PROTEIN_HEADS.items()]
    for name, part in PARTS.items():
        for place, layer in (("0", "linear"), ("1", "batch_norm")):
            rules.append((rf"{theirs}\.{name}\.fc_layers\.Layer (\d+)\.{place}", rf"{ours}.{part}.blocks.\1.{layer}"))
    return rules


def split_deep(state: dict[str, Tensor], layers: str, covariates: list[int]) -> dict[str, Tensor]:
    """Make tables of the one-hot columns of each linear layer whose name the pattern fits."""
    for name in [name for name in state if re.fullmatch(rf"({layers})\.linear\.weight", name)]:
        state = state | split_columns(name.removesuffix(".weight"), state[name], covariates)
    return state


def library_encoder() -> Rules:
    """Rules for the encoder of the library."""
    return [
        *hidden(r"encoder\.l_gene_encoder", "library_encoder"),
        (r"encoder\.l_gene_mean_encoder", "library_encoder.loc"),
        (r"encoder\.l_gene_var_encoder", "library_encoder.log_var"),
    ]
