"""Counts of proteins beside those of genes: a matrix of ``obsm``, or a modality of its own."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import sparse

from scvi_lite.data.checks import check_counts
from scvi_lite.data.fields import Categorical, Field, Matrix
from scvi_lite.data.modalities import name_of, part_of, place_of
from scvi_lite.errors import UnknownKeyError, listing, unknown, warn

if TYPE_CHECKING:
    from scvi_lite._typing import Data

logger = logging.getLogger("scvi_lite")


def panels_of(columns: Sequence[Field]) -> Categorical:
    """The column that tells where which proteins were measured: the panel, or else the batch."""
    by_name = {column.name: column for column in columns if isinstance(column, Categorical)}
    return by_name.get("panel_n", by_name["batch_n"])


class Proteins(Field):
    """Counts of proteins (n, p): a matrix of ``obsm``, or the variables of a modality. Columns are found by name.

    Parameters
    ----------
    key, names_key
        Keys of ``obsm``, and of ``uns`` where the names of the columns are, if these have none.
    layer, modality
        Where the counts are in a MuData.
    panels
        The batches or panels: a protein that is zero in all cells of one was not measured there.
    """

    kind = "proteins"
    parts = {"argument": str, "names": list, "measured": list}
    parts |= dict.fromkeys(("key", "layer", "names_key"), str | None)
    has_features = True

    def __init__(
        self,
        name: str,
        key: str | None = None,
        names_key: str | None = None,
        layer: str | None = None,
        modality: str | None = None,
        panels: Categorical | None = None,
    ):
        super().__init__(name, modality)
        self.panels = panels
        self.argument = "protein_expression_obsm_key" if modality is None else "protein_layer"
        self.key, self.names_key, self.layer = key, names_key, layer

    def register(self, adata: Data) -> dict[str, Any]:
        state = self.state(argument=self.argument, key=self.key, layer=self.layer, names_key=self.names_key)
        matrix = self._matrix(adata, state)
        names = self._names(adata, state, matrix)
        if names is None:
            names = [f"protein_{i}" for i in range(matrix.shape[1])]
        if len(names) != matrix.shape[1]:
            raise ValueError(f"{self.argument}: {len(names)} names were found for {matrix.shape[1]} proteins.")
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"{self.argument}: the names of proteins repeat: {listing(repeated)}. Give each its own.")
        state["names"] = names
        self.check(adata, state)
        state["measured"] = self._measured(adata, self.read(adata, state), names)
        return state

    def _measured(self, adata: Data, values_np: np.ndarray, names: list[str]) -> list[list[bool]]:
        """Of each panel, which proteins have counts."""
        panel_n, panels = np.zeros(len(values_np), np.int64), ["the data"]
        if self.panels is not None:
            state = self.panels.register(adata)
            panel_n, panels = self.panels.read(adata, state), state["categories"]
        measured_qp = np.stack([(values_np[panel_n == q] > 0).any(0) for q in range(len(panels))])
        if not measured_qp.any():
            raise ValueError(f"{self.argument}: all counts of proteins are zero.")
        if nowhere := [name for name, there_q in zip(names, measured_qp.T) if not there_q.any()]:
            warn(f"{listing(nowhere)} have no counts in any cell: nothing is learned of them, and answers are NaN.")
        for panel, measured_p in zip(panels, measured_qp):
            missing = [name for name, there in zip(names, measured_p) if not there]
            if missing:
                which = "all proteins" if len(missing) == len(names) else listing(missing)
                logger.info(f"{which} have no counts in {panel!r}, and count as not measured there.")
        return measured_qp.tolist()

    @classmethod
    def _matrix(cls, adata: Data, state: dict[str, Any]) -> Any:
        """The counts as they are: a frame, an array, or a sparse matrix."""
        if "modality" in state:
            return Matrix.read(adata, state)
        if state["key"] not in adata.obsm:
            message = unknown(state["argument"], state["key"], adata.obsm, "a key of adata.obsm", "Keys")
            if names := state.get("names"):  # of a model
                message += f" Without proteins: adata.obsm[{state['key']!r}] = np.zeros((adata.n_obs, {len(names)}))"
            raise UnknownKeyError(message)
        matrix = adata.obsm[state["key"]]
        if matrix.ndim != 2 or matrix.shape[1] == 0:
            raise ValueError(
                f"{state['argument']}={state['key']!r} has shape {matrix.shape}; a matrix (n, p) of counts is needed, "
                "of zeros where no protein was measured."
            )
        return matrix

    @classmethod
    def _names(cls, adata: Data, state: dict[str, Any], matrix: Any) -> list[str] | None:
        """Names of its columns, where they have some."""
        if "modality" in state:
            return part_of(adata, state["modality"]).var_names.astype(str).tolist()
        if isinstance(matrix, pd.DataFrame):
            return matrix.columns.astype(str).tolist()
        key = state["names_key"]
        if key is None:
            return None
        if key not in adata.uns:
            raise UnknownKeyError(unknown("protein_names_uns_key", key, adata.uns, "a key of adata.uns", "Keys"))
        return [str(name) for name in adata.uns[key]]

    @classmethod
    def check(cls, adata: Data, state: dict[str, Any]) -> None:
        """Refuse what are no counts."""
        name = name_of(adata, state.get("modality"))
        where = f"{name}.X" if state["key"] is None else f"{name}.obsm[{state['key']!r}]"
        values_np = cls.read(adata, state)
        if np.isnan(values_np).any():
            raise ValueError(
                f"{where} holds NaN in {np.isnan(values_np).any(1).sum()} cells. Put 0 where a protein was not "
                "measured: one that is 0 in all cells of a batch counts as missing there. "
                f"{where} = {where}.fillna(0), or np.nan_to_num({where}) of an array"
            )
        check_counts(values_np, where, cure=f"put them there: {where} = ...")

    @classmethod
    def read(cls, adata: Data, state: dict[str, Any]) -> np.ndarray:
        """Counts (n, p) float32 in the order of the names; 0 for cells that the modality does not have."""
        matrix = cls._matrix(adata, state)
        names, here = state["names"], cls._names(adata, state, matrix)
        values = matrix.toarray() if sparse.issparse(matrix) else np.asarray(matrix)
        try:
            values_np = values.astype(np.float32)
        except (TypeError, ValueError):
            raise ValueError(f"{state['argument']}: the proteins hold {values.dtype}, not numbers.") from None
        if here is not None and here != names:
            position_p = pd.Index(here).get_indexer(names)
            missing = [name for name, i in zip(names, position_p) if i < 0]
            if missing:
                message = unknown("protein", missing[0], here, "among those of these data", "Proteins")
                raise UnknownKeyError(f"{message} Where it was not measured, give zeros.")
            values_np = values_np[:, position_p]
        if values_np.shape[1] != len(names):
            raise ValueError(f"{values_np.shape[1]} proteins are there; the model has {len(names)}: {listing(names)}.")
        place_n = place_of(adata, state.get("modality"))
        if place_n is None:
            return np.ascontiguousarray(values_np)
        found_np = np.zeros((len(place_n), len(names)), np.float32)
        found_np[place_n >= 0] = values_np[place_n[place_n >= 0]]
        return found_np
