"""New data as a trained model needs them: the genes of its reference, and their own batches beside those it knows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import sparse

from scvi_lite.data.columns import categories_of, text_of
from scvi_lite.data.fields import Categorical, Categoricals
from scvi_lite.data.gene_names import LEAST_SHARE, naming_hint
from scvi_lite.data.modalities import check_anndata, name_of, part_of
from scvi_lite.data.proteins import Proteins
from scvi_lite.data.registry import Registry
from scvi_lite.errors import UnknownKeyError, listing, warn

if TYPE_CHECKING:
    from scvi_lite._typing import AnnData, Data


def fill_genes(adata: AnnData, var_names: Sequence[str]) -> AnnData:
    """A copy with these genes in this order: others left out, missing ones filled with zeros, and said so.

    ``varm``, ``varp`` and, of the missing genes, the columns of ``var`` have no values.

    Raises
    ------
    ValueError
        If less than ``LEAST_SHARE`` of the genes are there.
    """
    check_anndata(adata)
    wanted = pd.Index(var_names)
    found = adata.var_names.astype(str).get_indexer(wanted)
    there = np.flatnonzero(found >= 0)
    missing = wanted[found < 0]
    if len(missing):
        share = len(there) / len(wanted)
        hint = naming_hint(adata, var_names)
        message = f"adata has {len(there)} of the reference's {len(wanted)} genes, {share:.0%}"
        if share < LEAST_SHARE:
            raise ValueError(
                f"{message}; at least {LEAST_SHARE:.0%} are needed. Not found: {listing(missing)}. {hint}".rstrip()
            )
        warn(f"{message}. Filled with zeros: {listing(missing)}. {hint}".rstrip())
    part = adata[:, found[there]]
    part = part.to_memory() if adata.isbacked else part.copy()
    return _widen(part, there, wanted) if len(missing) else part


def without_cells(var_names: Sequence[str], layer: str | None) -> AnnData:
    """A modality that no cell was measured for, with the layer that is read of it."""
    from anndata import AnnData

    empty = sparse.csr_matrix((0, len(var_names)), dtype=np.float32)
    return AnnData(empty, var=pd.DataFrame(index=list(var_names)), layers={} if layer is None else {layer: empty})


def _widen(part: AnnData, place_g: np.ndarray, var_names: pd.Index) -> AnnData:
    """The same cells with further genes; ``place_g`` says where those that are there go."""
    from anndata import AnnData

    var = part.var.astype({name: "boolean" for name in part.var if part.var[name].dtype == bool})  # which knows absence
    layers = {name: widen_matrix(matrix, place_g, len(var_names)) for name, matrix in part.layers.items()}
    cells = {name: dict(getattr(part, name)) for name in ("obsm", "obsp", "uns")}
    x = None if part.X is None else widen_matrix(part.X, place_g, len(var_names))
    wide = AnnData(x, part.obs, var.reindex(var_names), layers=layers, shape=None, **cells)
    if part.raw is not None:
        wide.raw = part.raw.to_adata()
    return wide


def widen_matrix(matrix: Any, place_g: np.ndarray, n_genes: int) -> Any:
    """The columns of a matrix at their places among more, the others zero; what is sparse stays so.

    >>> widen_matrix(sparse.csr_matrix([[1, 2]]), np.array([0, 2]), 3).toarray()
    array([[1, 0, 2]])
    """
    if sparse.issparse(matrix):
        csr = matrix.tocsr()
        wide = type(csr)((csr.data, place_g[csr.indices], csr.indptr), shape=(csr.shape[0], n_genes))
        return wide.asformat(matrix.format)
    wide = np.zeros((matrix.shape[0], n_genes), matrix.dtype)
    wide[:, place_g] = matrix
    return wide


def extend(registry: Registry, data: Data, transfer_batch: bool = True, needs_labels: bool = True) -> Registry:
    """The setup of a query: that of the reference, with the query's new categories behind those it has.

    Parameters
    ----------
    registry
        The setup of the reference, for counts.
    data
        The query.
    transfer_batch
        Whether there may be new batches.
    needs_labels
        Whether the labels that the reference names are read for more than to be there.

    Raises
    ------
    KeyError
        If a column that the reference reads is not there.
    ValueError
        If there are new batches, and ``transfer_batch`` is False.
    """
    fields = dict(registry.fields)
    for name, state in sorted(fields.items(), key=lambda field: field[1]["kind"] == Proteins.kind):  # of panels
        if state["kind"] == Categorical.kind:
            without = name == "label_n" and not needs_labels and state["key"] not in data.obs
            fields[name] = state | {"key": None} if without else _extend_column(state, data)
        elif state["kind"] == Categoricals.kind:
            fields[name] = state | {"columns": [_extend_column(column, data) for column in state["columns"]]}
        elif state["kind"] == Proteins.kind:
            fields[name] = _extend_proteins(state, data, fields.get("panel_n", fields["batch_n"]))
    new = fields["batch_n"]["categories"][registry.n_batches :]
    if new and not transfer_batch:
        raise ValueError(
            f"transfer_batch=False: the query has the batches {listing(new)}, which the reference does not know: "
            f"{listing(registry.categories('batch_n'))}. Recode them, or leave transfer_batch out."
        )
    return replace(registry, fields=fields, n_cells=data.n_obs)


def _extend_column(state: dict[str, Any], data: Data) -> dict[str, Any]:
    """The categories of one column, and those that are new."""
    key, argument, modality = state["key"], state["argument"], state.get("modality")
    if key is None:
        return state
    if key not in part_of(data, modality).obs:
        name = name_of(data, modality)
        raise UnknownKeyError(
            f"The reference was set up with {argument}={key!r}, and {name}.obs has no such column. Say what it is of "
            f"the query's cells: {name}.obs[{key!r}] = 'name of the query'."
        )
    known = {text_of(category) for category in state["categories"]}
    new = [c for c in categories_of(data, argument, key, modality) if text_of(c) not in known]
    return state | {"categories": [*state["categories"], *new]}


def _extend_proteins(state: dict[str, Any], data: Data, panels: dict[str, Any]) -> dict[str, Any]:
    """Which proteins were measured in each panel, new ones among them."""
    panel_n, found_np = Categorical.read(data, panels), Proteins.read(data, state) > 0
    new = range(len(state["measured"]), len(panels["categories"]))
    return state | {"measured": [*state["measured"], *(found_np[panel_n == q].any(0).tolist() for q in new)]}
