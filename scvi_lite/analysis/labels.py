"""Which label a cell has (Xu et al. 2021), and which genes say so (Sundararajan, Taly & Yan 2017, arXiv:1703.01365)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from scvi_lite.analysis.cells import find_cells
from scvi_lite.analysis.inputs import minibatch_size, needs_counts, to_numpy
from scvi_lite.errors import as_options, check_options

if TYPE_CHECKING:
    from scvi_lite._typing import AnnData, Batch, Model, SCANVIModule

IG_OPTIONS = ("n_steps", "method")
N_STEPS = 50


def predict(
    model: Model,
    adata: AnnData | None = None,
    indices: Any = None,
    soft: bool = False,
    batch_size: int | None = None,
    use_posterior_mean: bool = True,
    ig_interpretability: bool = False,
    ig_args: Mapping[str, Any] | None = None,
) -> np.ndarray | pd.DataFrame | tuple[np.ndarray | pd.DataFrame, pd.DataFrame]:
    """The label of each cell, also of those that had one.

    Parameters
    ----------
    adata
        Cells to label; the model's own by default. New ones need no column of labels.
    indices
        Row numbers, in any order, or a mask; all cells by default.
    soft
        The probability of each label, instead of the most probable one.
    batch_size
        Cells in a minibatch.
    use_posterior_mean
        Classify the mean of each cell's posterior; else one draw from it.
    ig_interpretability
        Give, too, how much each gene speaks for the label that a cell is given: integrated gradients of its logit,
        from a cell without counts to this one. Needs captum: ``pip install captum``.
    ig_args
        ``n_steps`` (50) and ``method`` of ``captum.attr.IntegratedGradients.attribute``.

    Returns
    -------
    numpy.ndarray or pandas.DataFrame or tuple
        Labels (n,) or, if ``soft``, their probabilities, (n, labels). With ``ig_interpretability`` a frame beside it,
        of ``feature``, ``attribution_mean``, ``attribution_std`` (over cells) and ``cells`` (their number), the largest
        mean first; the attributions of a cell add up to the change of the logit.

    Raises
    ------
    IndexError
        If ``indices`` has rows that do not exist.
    ValueError
        If ``adata`` does not fit the model, or has labels that the model does not know.
    ImportError
        If captum is needed and not there.
    RuntimeError
        If genes are asked for and the data were minified without counts.

    Examples
    --------
    >>> import scvi_lite
    >>> adata = scvi_lite.data.synthetic_iid(batch_size=50, n_genes=20)
    >>> scvi_lite.model.SCANVI.setup_anndata(adata, labels_key="labels", unlabeled_category="label_2")
    >>> model = scvi_lite.model.SCANVI(adata)
    >>> model.train(max_epochs=1, enable_progress_bar=False)
    >>> model.predict(soft=True).columns.tolist()
    ['label_0', 'label_1']
    """
    adata, rows = find_cells(model, adata, indices)
    names = np.asarray(model.registry.categories("label_n")[:-1])
    probability: list[Tensor] = [torch.zeros(0, len(names))]
    for batch in model._minibatches(adata, rows, batch_size):
        q = model.module.encode(batch)
        z_nk = q.z_loc_nk if use_posterior_mean else q.sample_z()
        probability.append(model.module.classifier(z_nk).softmax(-1).cpu())
    prob_nl = to_numpy(probability)
    hard = names[prob_nl.argmax(1)]
    labels = pd.DataFrame(prob_nl, index=adata.obs_names[rows], columns=names) if soft else hard
    return (labels, explain(model, adata, rows, batch_size, ig_args)) if ig_interpretability else labels


def explain(
    model: Model, adata: AnnData, rows: np.ndarray, batch_size: int | None, ig_args: Mapping[str, Any] | None
) -> pd.DataFrame:
    """How much each gene speaks for the labels that cells are given; see :func:`predict`."""
    try:
        from captum.attr import IntegratedGradients
    except ImportError as error:
        raise ImportError("ig_interpretability=True needs captum. Install it: pip install captum") from error
    needs_counts(model, "ig_interpretability=True")
    options = as_options("ig_args", ig_args)
    check_options("ig_args", options, IG_OPTIONS)
    n_steps, n_genes = options.setdefault("n_steps", N_STEPS), len(model._gene_names)
    sum_g, square_g = np.zeros(n_genes), np.zeros(n_genes)
    for batch in model._minibatches(adata, rows, minibatch_size(batch_size, n_steps * n_genes)):
        with torch.inference_mode(False), torch.enable_grad():
            x_ng, covariates = batch.x.x_ng.clone(), dense_inputs(model.module, batch)
            wanted_n = logits_of(x_ng, *covariates, module=model.module).argmax(-1)
            gradients = IntegratedGradients(lambda *inputs: logits_of(*inputs, module=model.module))
            found = gradients.attribute(
                x_ng, target=wanted_n, additional_forward_args=covariates, internal_batch_size=None, **options
            )
        attribution_ng = to_numpy([found.detach().double()])
        sum_g += attribution_ng.sum(0)
        square_g += (attribution_ng**2).sum(0)
    n = max(1, len(rows))
    spread_g = np.sqrt(np.maximum(square_g / n - (sum_g / n) ** 2, 0))
    table = {"feature": model._gene_names, "attribution_mean": sum_g / n, "attribution_std": spread_g}
    return pd.DataFrame(table | {"cells": len(rows)}).sort_values("attribution_mean", ascending=False, kind="stable")


def dense_inputs(module: SCANVIModule, batch: Batch) -> tuple[Tensor, ...]:
    """What the encoder reads beside the counts, as tensors with a row for each cell: dense covariates last."""
    codes, dense_nd = module.covariates(batch) if module.config.encode_covariates else ([], None)
    return tuple(tensor.detach().clone() for tensor in (*codes, *(() if dense_nd is None else (dense_nd,))))


def logits_of(x_ng: Tensor, *covariates: Tensor, module: SCANVIModule) -> Tensor:
    """Logits of the labels (n, l) at the mean of the posterior, as a function of dense counts."""
    x_ng = torch.log1p(x_ng) if module.config.log_variational else x_ng
    codes = [tensor for tensor in covariates if not tensor.is_floating_point()]
    dense_nd = next((tensor for tensor in covariates if tensor.is_floating_point()), None)
    return module.classifier(module.encoder(x_ng, codes, dense_nd)[0])
