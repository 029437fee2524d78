"""From a user's arguments and the setup of the data to the configuration of a network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from scvi_lite.data.store import read_rows
from scvi_lite.errors import as_options, check_options
from scvi_lite.nn.layers import VARIANCE
from scvi_lite.nn.vae import VAEConfig

if TYPE_CHECKING:
    from anndata import AnnData

    from scvi_lite.data.registry import Registry

FROM_DATA = (
    "n_genes", "n_batches", "n_labels", "n_cats", "n_conts", "use_size_factor", "n_proteins", "n_panels",
)  # fmt: skip


def configure(registry: Registry, arguments: Mapping[str, Any], kind: type[VAEConfig] = VAEConfig, **sizes: Any) -> Any:
    """The network's configuration: sizes from the data, options from the user. ``kind`` may have further ones of both.

    Raises
    ------
    TypeError
        If an argument does not exist; the message names the nearest.
    """
    options = dict(arguments)
    known = [f.name for f in fields(kind) if f.name not in (*FROM_DATA, "batch_embedding_dim")]
    check_options("The model", options, [*known, "batch_embedding_kwargs"])
    embedding = as_options("batch_embedding_kwargs", options.pop("batch_embedding_kwargs", None))
    check_options("batch_embedding_kwargs", embedding, ["embedding_dim"])
    if embedding:
        options["batch_embedding_dim"] = embedding["embedding_dim"]
    options["var_activation"] = activation_name(options.pop("var_activation", None))
    return kind(
        n_genes=registry.n_features,
        n_batches=registry.n_batches,
        n_labels=registry.n_labels,
        n_cats=tuple(len(column["categories"]) for column in registry.fields["cats_nc"]["columns"]),
        n_conts=len(registry.fields["conts_nd"]["columns"]),
        use_size_factor="size_factor_n" in registry.fields,
        **sizes,
        **options,
    )


def activation_name(activation: Any) -> Any:
    """The name of a variance activation that was given as a function or a module, or anything else as it is.

    >>> activation_name(torch.nn.Softplus()), activation_name(torch.exp), activation_name(None)
    ('softplus', 'exp', 'exp')
    """
    if isinstance(activation, nn.Softplus) and (activation.beta, activation.threshold) == (1, 20):
        return "softplus"
    return {None: "exp", **{function: name for name, function in VARIANCE.items()}}.get(activation, activation)


def library_prior(adata: AnnData, registry: Registry, config: VAEConfig) -> tuple[Tensor, Tensor] | None:
    """Mean and variance of the log total counts in each batch, each (b,); cells without counts are left out.

    None where the library size is no latent variable.
    """
    if not config.latent_library:
        return None
    total_n = read_rows(registry.read(adata, "x"), registry.place(adata, "x")).totals().numpy().astype(np.float64)
    batch_n = registry.read(adata, "batch_n")
    loc_b, var_b = np.zeros(registry.n_batches), np.ones(registry.n_batches)
    for b in range(registry.n_batches):
        log_total = np.log(total_n[(batch_n == b) & (total_n > 0)])
        if len(log_total):
            loc_b[b] = log_total.mean()
            var_b[b] = max(log_total.var(), 1e-4)  # cells of one size would make an improper prior
    return torch.from_numpy(loc_b).float(), torch.from_numpy(var_b).float()
