"""What a model reads from an AnnData: fields check the data at setup and read it again later.

A field *registers* once, which checks the data and gives its state (plain, JSON-able), and *reads* any AnnData against
that state, the one it was registered with or a new one.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import sparse

from scvi_lite.errors import UnknownKeyError, listing, unknown

if TYPE_CHECKING:
    from anndata import AnnData

CHUNK = 1 << 22  # numbers looked at in one go when counts are checked


class Field(ABC):
    """One thing that a model reads. ``name`` is the attribute of :class:`~scvi_lite.data.batch.Batch` it fills."""

    kind: str

    def __init__(self, name: str):
        self.name = name

    @abstractmethod
    def register(self, adata: AnnData) -> dict[str, Any]:
        """Check the data and give the field's state."""

    @staticmethod
    @abstractmethod
    def read(adata: AnnData, state: dict[str, Any]) -> Any:
        """The data of this field, in the coding of ``state``."""


class Matrix(Field):
    """A cells × features matrix of counts: ``X`` or a layer."""

    kind = "matrix"

    def __init__(self, name: str, layer: str | None, counts: bool = True):
        super().__init__(name)
        self.layer, self.counts = layer, counts

    def register(self, adata: AnnData) -> dict[str, Any]:
        state = {"layer": self.layer}
        matrix = self.read(adata, state)
        check_counts(matrix, "adata.X" if self.layer is None else f"adata.layers[{self.layer!r}]", self.counts)
        return state

    @staticmethod
    def read(adata: AnnData, state: dict[str, Any]) -> Any:
        layer = state.get("layer")
        if layer is None:
            if adata.X is None:
                raise ValueError("adata.X is empty. Put the counts there, or name the layer that has them: layer=...")
            return adata.X
        if layer not in adata.layers:
            raise UnknownKeyError(unknown("layer", layer, adata.layers.keys(), "a key of adata.layers", "Layers"))
        return adata.layers[layer]


class Categorical(Field):
    """A column of ``obs`` as codes; without a key, one category for all cells."""

    kind = "categorical"

    def __init__(self, name: str, argument: str, key: str | None):
        super().__init__(name)
        self.argument, self.key = argument, key

    def register(self, adata: AnnData) -> dict[str, Any]:
        state: dict[str, Any] = {"argument": self.argument, "key": self.key, "categories": [0]}
        if self.key is not None:
            state["categories"] = categories_of(obs_column(adata, self.argument, self.key), self.argument, self.key)
        return state

    @staticmethod
    def read(adata: AnnData, state: dict[str, Any]) -> np.ndarray:
        """Codes (n,) int64."""
        if state.get("key") is None:
            return np.zeros(adata.n_obs, dtype=np.int64)
        column = obs_column(adata, state["argument"], state["key"])
        return encode(column, state["categories"], state["argument"], state["key"])


class Categoricals(Field):
    """Several columns of ``obs`` as codes (n, c)."""

    kind = "categoricals"

    def __init__(self, name: str, argument: str, keys: Sequence[str] | None):
        super().__init__(name)
        self.argument, self.keys = argument, check_keys(argument, keys)

    def register(self, adata: AnnData) -> dict[str, Any]:
        columns = [Categorical(self.name, self.argument, key).register(adata) for key in self.keys]
        return {"columns": columns}

    @staticmethod
    def read(adata: AnnData, state: dict[str, Any]) -> np.ndarray:
        """Codes (n, c) int64."""
        columns = [Categorical.read(adata, column) for column in state["columns"]]
        return np.stack(columns, axis=1) if columns else np.zeros((adata.n_obs, 0), dtype=np.int64)


class Continuous(Field):
    """A column of ``obs`` as numbers (n,); ``positive`` for size factors."""

    kind = "continuous"

    def __init__(self, name: str, argument: str, key: str, positive: bool = False):
        super().__init__(name)
        self.argument, self.key, self.positive = argument, key, positive

    def register(self, adata: AnnData) -> dict[str, Any]:
        state = {"argument": self.argument, "key": self.key, "positive": self.positive}
        self.read(adata, state)
        return state

    @staticmethod
    def read(adata: AnnData, state: dict[str, Any]) -> np.ndarray:
        """Numbers (n,) float32."""
        argument, key = state["argument"], state["key"]
        column = obs_column(adata, argument, key)
        try:
            values = column.to_numpy(dtype=np.float64, na_value=np.nan)
        except (TypeError, ValueError):
            raise ValueError(
                f"{argument}={key!r}: adata.obs[{key!r}] holds {column.dtype}, not numbers. "
                f"Convert it with pandas.to_numeric, or give it as a categorical covariate."
            ) from None
        bad = ~np.isfinite(values)
        if bad.any():
            raise ValueError(
                f"{argument}={key!r}: {bad.sum()} of {len(values)} cells have a missing or infinite value in "
                f"adata.obs[{key!r}]. Fill them, or leave these cells out: adata[adata.obs[{key!r}].notna()].copy()"
            )
        if state["positive"] and (values <= 0).any():
            raise ValueError(
                f"{argument}={key!r}: {(values <= 0).sum()} cells have a value of zero or less; all must be positive."
            )
        return values.astype(np.float32)


class Continuouses(Field):
    """Several columns of ``obs`` as numbers (n, d)."""

    kind = "continuouses"

    def __init__(self, name: str, argument: str, keys: Sequence[str] | None):
        super().__init__(name)
        self.argument, self.keys = argument, check_keys(argument, keys)

    def register(self, adata: AnnData) -> dict[str, Any]:
        return {"columns": [Continuous(self.name, self.argument, key).register(adata) for key in self.keys]}

    @staticmethod
    def read(adata: AnnData, state: dict[str, Any]) -> np.ndarray:
        """Numbers (n, d) float32."""
        columns = [Continuous.read(adata, column) for column in state["columns"]]
        return np.stack(columns, axis=1) if columns else np.zeros((adata.n_obs, 0), dtype=np.float32)


class Embedding(Field):
    """A matrix of ``obsm`` (n, k)."""

    kind = "embedding"

    def __init__(self, name: str, argument: str, key: str):
        super().__init__(name)
        self.argument, self.key = argument, key

    def register(self, adata: AnnData) -> dict[str, Any]:
        state = {"argument": self.argument, "key": self.key}
        self.read(adata, state)
        return state

    @staticmethod
    def read(adata: AnnData, state: dict[str, Any]) -> np.ndarray:
        """Numbers (n, k) float32."""
        argument, key = state["argument"], state["key"]
        if key not in adata.obsm:
            raise UnknownKeyError(unknown(argument, key, adata.obsm.keys(), "a key of adata.obsm", "Keys"))
        return np.ascontiguousarray(adata.obsm[key], dtype=np.float32)


KINDS: dict[str, type[Field]] = {f.kind: f for f in (Matrix, Categorical, Categoricals, Continuous, Continuouses, Embedding)}


def check_keys(argument: str, keys: Sequence[str] | None) -> list[str]:
    """The keys as a list; one string where a list belongs is a common slip."""
    if isinstance(keys, str):
        raise ValueError(f"{argument}={keys!r}: a list of column names is needed. Write {argument}=[{keys!r}].")
    return list(keys or [])


def obs_column(adata: AnnData, argument: str, key: str) -> pd.Series:
    """A column of ``adata.obs``, or an error that names the nearest one."""
    if not isinstance(key, str) or key not in adata.obs.columns:
        raise UnknownKeyError(unknown(argument, key, adata.obs.columns, "a column of adata.obs", "Columns"))
    return adata.obs[key]


def categories_of(column: pd.Series, argument: str, key: str) -> list[Any]:
    """The categories in use: in their own order for a categorical column, else sorted."""
    check_missing(column, argument, key)
    if isinstance(column.dtype, pd.CategoricalDtype):
        categories = column.cat.remove_unused_categories().cat.categories
    else:
        categories = pd.Index(sorted(column.unique(), key=lambda value: (str(type(value)), value)))
    return [value.item() if isinstance(value, np.generic) else value for value in categories.tolist()]


def encode(column: pd.Series, categories: Sequence[Any], argument: str, key: str) -> np.ndarray:
    """Codes of the values among ``categories``; an error for a value that is not one of them."""
    check_missing(column, argument, key)
    # Values are compared as text: files and pandas versions change between bool, int, str and categorical.
    column = column.astype("category")
    code_of = pd.Index([str(c) for c in categories]).get_indexer([str(c) for c in column.cat.categories])
    codes = code_of[column.cat.codes.to_numpy()].astype(np.int64)
    if (codes < 0).any():
        new = list(dict.fromkeys(str(value) for value in column[codes < 0]))
        raise ValueError(
            f"{argument}={key!r}: {(codes < 0).sum()} cells have {listing(new)} in adata.obs[{key!r}], which the "
            f"model was not set up with. It knows {listing(categories)}. Leave these cells out, "
            "recode them, or train a model with them."
        )
    return codes


def check_missing(column: pd.Series, argument: str, key: str) -> None:
    """Refuse missing values."""
    missing = column.isna().to_numpy()
    if missing.any():
        raise ValueError(
            f"{argument}={key!r}: {missing.sum()} of {len(column)} cells have no value in adata.obs[{key!r}]. Give "
            f"them one, or leave them out: adata = adata[adata.obs[{key!r}].notna()].copy()"
        )


def value_blocks(matrix: Any) -> Iterator[np.ndarray]:
    """The stored numbers of a sparse, dense or backed matrix, in blocks of bounded size."""
    if sparse.issparse(matrix):
        for i in range(0, len(matrix.data), CHUNK):
            yield matrix.data[i : i + CHUNK]
    else:
        step = max(1, CHUNK // max(1, matrix.shape[1]))
        for i in range(0, matrix.shape[0], step):
            block = matrix[i : i + step]
            yield block.data if sparse.issparse(block) else np.asarray(block)


def check_counts(matrix: Any, where: str, counts: bool = True) -> None:
    """Refuse NaN and infinity, and for counts negative numbers; warn of fractions."""
    if not (sparse.issparse(matrix) or has_rows(matrix)):
        raise TypeError(
            f"{where} is a {type(matrix).__name__}. A NumPy array, a SciPy sparse matrix or a backed file is needed."
        )
    if np.dtype(matrix.dtype).kind not in "uifb":
        raise ValueError(f"{where} holds {matrix.dtype}, not numbers.")
    fractions = False
    for block in value_blocks(matrix):
        if block.dtype.kind == "f" and not np.isfinite(block).all():
            n_nan, n_inf = int(np.isnan(block).sum()), int(np.isinf(block).sum())
            raise ValueError(
                f"{where} holds NaN or infinite values (a block has {n_nan} NaN, {n_inf} infinite). Counts are needed: "
                "look where they come from, or leave these cells or genes out."
            )
        if counts and block.size and block.min() < 0:
            raise ValueError(
                f"{where} holds negative values (down to {block.min():g}). Raw counts are needed; scaled or centred "
                "data does not fit. If the counts are elsewhere, name their layer: layer=..."
            )
        fractions = fractions or (counts and block.dtype.kind == "f" and bool((block != np.rint(block)).any()))
    if fractions:
        warnings.warn(
            f"{where} holds fractions, not counts. The model is made for raw counts: if you have them in a layer, "
            "say layer=...",
            UserWarning,
            stacklevel=2,
        )


def has_rows(matrix: Any) -> bool:
    """Whether rows can be sliced out: NumPy arrays and the backed matrices of anndata."""
    import h5py
    from anndata.abc import CSCDataset, CSRDataset

    return isinstance(matrix, np.ndarray | CSRDataset | CSCDataset | h5py.Dataset)
