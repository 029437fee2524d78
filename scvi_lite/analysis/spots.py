"""What a model of spots says: which cell types are in them, and in which states (Lopez et al. 2022)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from scvi_lite.analysis.inputs import minibatch_size, to_numpy
from scvi_lite.analysis.output import Out, collect
from scvi_lite.errors import StateError, UnknownKeyError, check_whole, listing, unknown
from scvi_lite.nn.conditional import CondSCVIModule
from scvi_lite.nn.normal import draw_normal

if TYPE_CHECKING:
    from scvi_lite._typing import AnnData, Batch, CondSCVI, DestVI, Spots, csr_matrix


def minibatches(
    model: DestVI, indices: Any, batch_size: int | None, numbers_per_spot: int = 1
) -> Iterator[tuple[Batch, Spots]]:
    """Minibatches, and what their spots are made of."""
    model._warn_if_untrained()
    for batch in model._minibatches(None, indices, minibatch_size(batch_size, numbers_per_spot)):
        yield batch, model.module.infer(batch)


def frame(model: DestVI, value: np.ndarray, indices: Any, columns: Any) -> pd.DataFrame:
    """One row for each of the spots."""
    return pd.DataFrame(value, model.adata.obs_names[model._rows(model.adata, indices)], columns)


def code_of(model: DestVI, label: str) -> int:
    """The code of a cell type; a ``KeyError`` that names the nearest if there is none."""
    names = model.cell_type_mapping + extra_types(model)
    if str(label) not in names:
        raise UnknownKeyError(unknown("label", label, names, "a cell type of the reference", "Cell types"))
    return names.index(str(label))


def extra_types(model: DestVI) -> list[str]:
    """Names of the cell types that the reference does not have."""
    return [f"additional_{i}" for i in range(model.module.config.add_celltypes)]


def get_proportions(
    model: DestVI,
    keep_additional: bool = False,
    normalize: bool = True,
    indices: Any = None,
    batch_size: int | None = None,
) -> pd.DataFrame:
    """Share of each cell type in each spot.

    Parameters
    ----------
    keep_additional
        Give the extra cell types too, as ``additional_0``, ...
    normalize
        Without the extra types, scale the others so that they sum to 1.
    indices
        Row numbers, in any order, or a mask; all spots by default.
    batch_size
        Spots in a minibatch.

    Returns
    -------
    pandas.DataFrame
        Spots × cell types, float32.

    Raises
    ------
    IndexError
        If ``indices`` has rows that do not exist.
    """
    value_nt = to_numpy([spots.proportion_nt for _, spots in minibatches(model, indices, batch_size)])
    names = model.cell_type_mapping
    if keep_additional:
        return frame(model, value_nt, indices, names + extra_types(model))
    value_nl = value_nt[:, : len(names)]
    return frame(model, value_nl / value_nl.sum(1, keepdims=True) if normalize else value_nl, indices, names)


def get_gamma(
    model: DestVI, indices: Any = None, batch_size: int | None = None, return_numpy: bool = False
) -> dict[str, pd.DataFrame] | np.ndarray:
    """Place of each cell type of each spot in the latent space of the reference, the mean over its states.

    Parameters
    ----------
    indices, batch_size
        As in :meth:`get_proportions`.
    return_numpy
        Give one array.

    Returns
    -------
    dict or numpy.ndarray
        For each cell type spots × latent dimensions; or (spots, latent dimensions, cell types).
    """
    z_nlk = to_numpy([spots.z_nlk for _, spots in minibatches(model, indices, batch_size)])
    if return_numpy:
        return z_nlk.transpose(0, 2, 1)
    columns = [str(k) for k in range(z_nlk.shape[-1])]
    return {name: frame(model, z_nlk[:, i], indices, columns) for i, name in enumerate(model.cell_type_mapping)}


def get_scale_for_ct(
    model: DestVI, label: str, indices: Any = None, batch_size: int | None = None, *, out: Out = None
) -> pd.DataFrame | Any:
    """Expected expression of a cell type in the state it has in each spot, as proportions of genes.

    Parameters
    ----------
    label
        Name of the cell type, or ``"additional_0"``, ... of an extra one.
    indices, batch_size
        As in :meth:`get_proportions`. Where the share of the type is small, its state is that of the prior.
    out
        Where to put an answer that memory cannot hold, as in ``get_normalized_expression`` of SCVI.

    Returns
    -------
    pandas.DataFrame
        Spots × genes; rows sum to 1.

    Raises
    ------
    KeyError
        If the cell type is not in the reference; the nearest is named.
    """
    c, code = model.module.config, code_of(model, label)
    parts = (
        {"scale": model.module.expression(spots, batch, code)}
        for batch, spots in minibatches(model, indices, batch_size, c.n_states * c.n_genes)
    )
    value = collect(parts, len(model._rows(model.adata, indices)), {"scale": out})["scale"]
    return value if out is not None else frame(model, value, indices, model.get_var_names())


def get_expression_for_ct(
    model: DestVI, label: str, indices: Any = None, batch_size: int | None = None, return_sparse_array: bool = False
) -> pd.DataFrame | csr_matrix:
    """Counts of each spot that come from a cell type, in expectation: its share of the model's mean, gene by gene.

    Parameters
    ----------
    label, indices, batch_size
        As in :meth:`get_scale_for_ct`.
    return_sparse_array
        Give a sparse matrix, which makes no dense one.

    Returns
    -------
    pandas.DataFrame or scipy.sparse.csr_matrix
        Spots × genes. Summed over all cell types, and the extra ones, they are the counts.

    Raises
    ------
    KeyError
        If the cell type is not in the reference; the nearest is named.
    """
    from scipy import sparse

    module, c, code = model.module, model.module.config, code_of(model, label)
    parts = []
    for batch, spots in minibatches(model, indices, batch_size, c.n_states * c.n_labels * c.n_genes):
        own_ng = spots.proportion_nt[:, code, None] * module.expression(spots, batch, code)
        share_ng = own_ng / module.mean(spots, batch)
        x = batch.x
        value_m = x.value_m * share_ng[x.row_m, x.col_m]
        coordinates = (part.cpu().numpy() for part in (value_m, x.col_m, x.start))
        parts.append(sparse.csr_matrix(tuple(coordinates), shape=(batch.n_cells, c.n_genes)))
    counts = sparse.vstack(parts, format="csr")
    return counts if return_sparse_array else frame(model, counts.toarray(), indices, model.get_var_names())


def get_latent_representation(
    model: DestVI,
    adata: AnnData | None = None,
    indices: Any = None,
    give_mean: bool = True,
    mc_samples: int = 5000,
    batch_size: int | None = None,
    return_dist: bool = False,
) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
    """Position of each spot in the latent space that the networks read, with ``n_latent_amortization``.

    Parameters
    ----------
    adata, indices, give_mean, batch_size, return_dist
        As in :meth:`scvi_lite.model.SCVI.get_latent_representation`.
    mc_samples
        Not needed, as the mean is known.

    Returns
    -------
    numpy.ndarray or tuple
        (n, k) float32; with ``return_dist`` mean and **variance**, (n, k) each.

    Raises
    ------
    RuntimeError
        If the model has no such latent space.
    """
    check_whole(mc_samples=mc_samples)
    if not model.module.has_encoder:
        raise StateError(
            "The networks of this DestVI read counts, not a latent space of the spots. Make one that has it: "
            "DestVI.from_rna_model(..., n_latent_amortization=10). The states of cell types are in get_gamma()."
        )
    model._warn_if_untrained()
    posteriors = [
        model.module.posterior(batch.x.log1p(), batch) for batch in model._minibatches(adata, indices, batch_size)
    ]
    if return_dist:
        return to_numpy([loc for loc, _ in posteriors]), to_numpy([scale**2 for _, scale in posteriors])
    return to_numpy([loc if give_mean else draw_normal(loc, scale) for loc, scale in posteriors])


@torch.inference_mode()
def get_fine_celltypes(
    model: DestVI, sc_model: CondSCVI, indices: Any = None, batch_size: int | None = None
) -> pd.DataFrame:
    """Share of each fine cell type in each spot: the fine labels of the states that the cell types are in.

    Parameters
    ----------
    sc_model
        The model of single cells that this one was made from, trained with ``fine_labels_key``.
    indices, batch_size
        As in :meth:`get_proportions`.

    Returns
    -------
    pandas.DataFrame
        Spots × fine labels; rows sum to 1.

    Raises
    ------
    RuntimeError
        If ``sc_model`` has no fine labels.
    ValueError
        If it has other cell types, or another latent space.
    """
    if not isinstance(getattr(sc_model, "module", None), CondSCVIModule) or not sc_model.fine_labels:
        raise StateError(
            "sc_model has no fine labels. Give them at setup: CondSCVI.setup_anndata(cells, labels_key=..., "
            "fine_labels_key=...), train it, and make this DestVI from it."
        )
    theirs = [str(name) for name in sc_model.registry.categories("label_n")]
    if theirs != model.cell_type_mapping or sc_model.module.config.n_latent != model.module.config.n_latent:
        raise ValueError(
            f"sc_model is not the model that this DestVI was made from: its cell types are {listing(theirs)}, "
            f"and here {listing(model.cell_type_mapping)}."
        )
    classifier, n_labels = sc_model.module.classifier.eval().to(model.device), len(theirs)
    parts: list[Tensor] = []
    for _, spots in minibatches(model, indices, batch_size):
        prob_nslf = classifier(spots.z_nslk, model.module.label_l).softmax(-1)
        share_nl = spots.proportion_nt[:, :n_labels]
        share_nl = share_nl / share_nl.sum(1, keepdim=True)
        parts.append(torch.einsum("nl,nsl,nslf->nf", share_nl, spots.state_nsl, prob_nslf))
    return frame(model, to_numpy(parts), indices, sc_model.fine_labels)
