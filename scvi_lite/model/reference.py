"""What DestVI takes over from a model of single cells."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scvi_lite.errors import StateError
from scvi_lite.model.condscvi import CondSCVI
from scvi_lite.nn.deconvolution import SpotModule


@dataclass
class Reference:
    """What DestVI takes over from a trained :class:`~scvi_lite.model.CondSCVI`."""

    sizes: dict[str, Any]  #: names of the cell types, and sizes of the networks
    state: dict[str, Tensor]  #: decoder, dispersion, prior of each cell type

    @classmethod
    def of(cls, sc_model: CondSCVI, p: int) -> Reference:
        """From the model of the single cells; ``p`` components of the prior, where the model has no mixture."""
        module, prior = sc_model.module, sc_model.get_vamp_prior(p=p)
        theirs = {name: value.detach().cpu() for name, value in module.state_dict().items()}
        state = {name: value for name, value in theirs.items() if name.startswith("decoder.")}
        state |= {
            "log_theta": theirs["log_theta"],
            "prior_loc_lpk": torch.from_numpy(prior["mean_vprior"]),
            "prior_var_lpk": torch.from_numpy(prior["var_vprior"]),
            "prior_weight_lp": torch.from_numpy(prior["weights_vprior"]),
        }
        sizes = {
            "cell_type_mapping": [str(name) for name in sc_model.registry.categories("label_n")],
            "n_hidden": module.config.n_hidden,
            "n_latent": module.config.n_latent,
            "n_layers": module.config.n_layers,
            "n_components": prior["mean_vprior"].shape[1],
            "batch_embedding_dim": module.config.batch_embedding_dim,
        }
        return cls(sizes, state | {"batch_embedding": theirs["batch_embedding.weight"].mean(0)})

    def fill(self, module: SpotModule) -> None:
        """Put its weights into a new module; each batch of spots starts from the mean of the reference's batches."""
        state = module.state_dict() | self.state
        mean_d = state.pop("batch_embedding")
        state["batch_embedding.weight"] = mean_d.expand_as(module.batch_embedding.weight)
        module.load_state_dict(state)


def check_reference(sc_model: Any) -> None:
    """Refuse what is not a trained model of single cells."""
    if not isinstance(sc_model, CondSCVI):
        raise TypeError(f"sc_model is a {type(sc_model).__name__}; a trained CondSCVI is needed.")
    if not sc_model.is_trained:
        raise StateError("sc_model is not trained, so there is nothing to take over. Call sc_model.train() first.")
