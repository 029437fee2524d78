"""Weights of DestVI."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from scvi_lite.errors import warn
from scvi_lite.io.translators.common import Rules, Setup, encoder, hidden, rename, split_one_hot
from scvi_lite.io.translators.condscvi import DECODER

ARGUMENTS = (
    "cell_type_mapping", "n_hidden", "n_latent", "n_layers", "amortization", "prior_mode", "n_states_per_label",
    "add_celltypes", "augmentation", "n_samples_augmentation", "dropout_amortization", "eps_v",
    "n_latent_amortization",
)  # fmt: skip


def arguments(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes and options; there the weights of the reference are arguments, too."""
    if theirs.get("mean_vprior") is None:
        raise ValueError("it has no prior of cell types from single cells, and was not made by from_rna_model")
    if theirs.get("prior_mode", "mog") == "normal" and theirs.get("amortization", "both") in ("both", "latent"):
        warn(
            "The network of this DestVI learned states of cell types with prior_mode='normal', with which scvi-tools "
            "mixes up the spots of a minibatch: its proportions hold, its states do not. Train it anew for those."
        )
    given = {name: theirs[name] for name in ARGUMENTS if name in theirs}
    return given | {"n_components": theirs["mean_vprior"].shape[1]}


def translate(weights: dict[str, Any], setup: Setup) -> dict[str, Tensor]:
    """DestVI: decoder of the reference, its prior, proportions and states of spots, gene effects."""
    options = setup.arguments
    amortization, n_labels = options.get("amortization", "both"), len(options["cell_type_mapping"])
    n_states = options.get("n_states_per_label", 3) if options.get("prior_mode", "mog") == "mog" else 1
    networks = {
        "proportions": ("V", amortization in ("proportion", "both")),
        "states": ("gamma", amortization in ("latent", "both")),
    }
    rules: Rules = [
        *DECODER,
        *(encoder("z_encoder", "encoder") if amortization != "none" else [("z_encoder", None)]),
        ("eta", "eta_ag" if options.get("add_celltypes", 1) else None),
        ("beta", "beta_g"),
        ("mean_vprior", "prior_loc_lpk"),
        ("var_vprior", "prior_var_lpk"),
        ("mp_vprior", "prior_weight_lp"),
    ]
    for ours, (theirs, amortized) in networks.items():
        if amortized:
            rules += [*hidden(rf"{theirs}_encoder\.0", ours), (rf"{theirs}_encoder\.1", f"{ours}.head")]
        rules += [(f"{theirs}_encoder", None), (theirs, None if amortized else f"{ours}.table")]
    state = rename(weights, rules)
    for name in {"proportions.table", "states.table"} & state.keys():
        state[name] = state[name].flatten(0, -2).T.contiguous()
    if n_states == 1:  # the shares of one state are not among our weights
        n_places = options["n_latent"] * n_labels
        for name in {"states.head.weight", "states.head.bias"} & state.keys():
            state[name] = state[name][:n_places]
    sizes = {"decoder": n_labels, "encoder": setup.n_batches}
    return split_one_hot(state, {network: [n] for network, n in sizes.items() if n > 1})
