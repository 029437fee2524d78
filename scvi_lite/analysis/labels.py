"""Which label a cell has, and which genes say so (Xu et al. 2021; Sundararajan et al. 2017, arXiv:1703.01365)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from scvi_lite.analysis.inputs import to_numpy

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

    from scvi_lite.model.scanvi import SCANVI


def predict(
    model: SCANVI,
    adata: AnnData | None = None,
    indices: Any = None,
    soft: bool = False,
    batch_size: int | None = None,
    use_posterior_mean: bool = True,
    ig_interpretability: bool = False,
    ig_args: Mapping[str, Any] | None = None,
) -> np.ndarray | pd.DataFrame | tuple[np.ndarray | pd.DataFrame, pd.DataFrame]:
    """The label of each cell."""
    import pandas as pd

    model._warn_if_untrained()
    names = np.asarray(model.registry.categories("label_n")[:-1])
    adata = model._check(adata)
    rows = model._rows(adata, indices)
    probability: list[Tensor] = []
    for batch in model._minibatches(adata, rows, batch_size):
        q = model.module.encode(batch)
        probability.append(model.module.classifier(q.z_loc_nk if use_posterior_mean else q.sample_z()).softmax(-1))
    prob_nl = to_numpy(probability)
    if soft:
        return pd.DataFrame(prob_nl, index=adata.obs_names[rows], columns=names)
    return names[prob_nl.argmax(1)]
