"""A classifier over latent space, and the adversary that is one (Ganin et al. 2016, arXiv:1505.07818)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scvi_lite.nn.layers import Hidden


class Classifier(nn.Module):
    """Logits (n, l) of ``l`` classes from positions (n, k): hidden layers, or none for a linear classifier.

    Examples
    --------
    >>> Classifier(10, 3)(torch.ones(5, 10)).shape
    torch.Size([5, 3])
    """

    def __init__(
        self,
        n_in: int,
        n_classes: int,
        n_hidden: int = 128,
        n_layers: int = 1,
        dropout_rate: float = 0.1,
        batch_norm: bool = True,
        layer_norm: bool = False,
    ):
        super().__init__()
        self.hidden = (
            Hidden(n_in, n_hidden, n_layers, batch_norm=batch_norm, layer_norm=layer_norm, dropout_rate=dropout_rate)
            if n_layers
            else None
        )
        self.logits = nn.Linear(n_hidden if n_layers else n_in, n_classes)

    def forward(self, z: Tensor) -> Tensor:
        return self.logits(z if self.hidden is None else self.hidden(z))


class Adversary(nn.Module):
    """Tells batches apart in latent space, while the encoder learns to make it fail.

    One backward pass serves both: the encoder sees the adversary with its weights held, the adversary sees latent
    positions that are held. So it needs no second optimiser, and works as any loss under every strategy.
    """

    def __init__(self, n_latent: int, n_batches: int, n_hidden: int = 32, n_layers: int = 2):
        super().__init__()
        self.classifier = Classifier(n_latent, n_batches, n_hidden, n_layers)

    def loss(self, z_nk: Tensor, batch_n: Tensor, weight: float | Tensor) -> Tensor:
        """What is added to a model's loss: ``weight`` · (how well the encoder fools it + how well it tells batches)."""
        held = {name: parameter.detach() for name, parameter in self.classifier.named_parameters()}
        log_prob_nb = torch.func.functional_call(self.classifier, held, (z_nk,)).log_softmax(-1)
        own_n = log_prob_nb.gather(1, batch_n[:, None])[:, 0]
        # The encoder wants every other batch to look equally likely.
        fooled = -((log_prob_nb.sum(1) - own_n) / max(1, log_prob_nb.shape[1] - 1)).mean()
        told_apart = F.cross_entropy(self.classifier(z_nk.detach()), batch_n)
        return weight * (fooled + told_apart)
