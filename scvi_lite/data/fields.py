"""What a model reads from an AnnData: fields check the data at setup and read it again later.

A field *registers* once, which checks the data and gives its state (plain, JSON-able), and *reads* any AnnData against
that state, the one it was registered with or a new one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd

from scvi_lite.data.checks import check_counts
from scvi_lite.errors import UnknownKeyError, listing, unknown

if TYPE_CHECKING:
    from anndata import AnnData


class Field(ABC):
    """One thing that a model reads. ``name`` is the attribute of :class:`~scvi_lite.data.batch.Batch` it fills."""

    kind: ClassVar[str]
    parts: ClassVar[dict[str, Any]]  #: what a state holds, and of which types

    def __init__(self, name: str):
        self.name = name

    @abstractmethod
    def register(self, adata: AnnData) -> dict[str, Any]:
        """Check the data and give the field's state."""

    @classmethod
    def fits(cls, state: Any) -> bool:
        """Whether a state that comes from a file is one of this field."""
        return isinstance(state, dict) and all(isinstance(state.get(part, ...), of) for part, of in cls.parts.items())

    @classmethod
    @abstractmethod
    def read(cls, adata: AnnData, state: dict[str, Any]) -> Any:
        """The data of this field, in the coding of ``state``."""

    @classmethod
    def check(cls, adata: AnnData, state: dict[str, Any]) -> None:
        """Refuse data that cannot be read, or, having been read, not be used."""
        cls.read(adata, state)


class Matrix(Field):
    """A cells × features matrix of counts: ``X`` or a layer."""

    kind = "matrix"
    parts = {"layer": str | None}

    def __init__(self, name: str, layer: str | None, counts: bool = True):
        super().__init__(name)
        self.layer, self.counts = layer, counts

    def register(self, adata: AnnData) -> dict[str, Any]:
        state = {"layer": self.layer, "counts": self.counts}
        self.check(adata, state)
        return state

    @classmethod
    def check(cls, adata: AnnData, state: dict[str, Any]) -> None:
        """One pass over the numbers."""
        where = "adata.X" if state["layer"] is None else f"adata.layers[{state['layer']!r}]"
        check_counts(cls.read(adata, state), where, state.get("counts", True))

    @classmethod
    def read(cls, adata: AnnData, state: dict[str, Any]) -> Any:
        """The matrix as it is, in memory or in a file."""
        layer = state["layer"]
        if layer is None:
            matrix = adata.X  # asked for once, because a view makes it anew each time
            if matrix is None:
                raise ValueError("adata.X is empty. Put the counts there, or name the layer that has them: layer=...")
            return matrix
        if not isinstance(layer, str) or layer not in adata.layers:
            raise UnknownKeyError(unknown("layer", layer, adata.layers.keys(), "a key of adata.layers", "Layers"))
        return adata.layers[layer]


class Categorical(Field):
    """A column of ``obs`` as codes; without a key, one category for all cells."""

    kind = "categorical"
    parts = {"argument": str, "key": str | int | None, "categories": list}

    def __init__(self, name: str, argument: str, key: str | None):
        super().__init__(name)
        self.argument, self.key = argument, key

    def register(self, adata: AnnData) -> dict[str, Any]:
        categories = [0] if self.key is None else categories_of(adata, self.argument, self.key)
        return {"argument": self.argument, "key": self.key, "categories": categories}

    @classmethod
    def fits(cls, state: Any) -> bool:
        """Whether it has the parts, and its categories differ."""
        return super().fits(state) and 0 < len(state["categories"]) == len(set(map(text_of, state["categories"])))

    @classmethod
    def read(cls, adata: AnnData, state: dict[str, Any]) -> np.ndarray:
        """Codes (n,) int64."""
        if state["key"] is None:
            return np.zeros(adata.n_obs, dtype=np.int64)
        return encode(adata, state["categories"], state["argument"], state["key"])


class Continuous(Field):
    """A column of ``obs`` as numbers (n,); ``positive`` for size factors."""

    kind = "continuous"
    parts = {"argument": str, "key": str | int, "positive": bool}

    def __init__(self, name: str, argument: str, key: str, positive: bool = False):
        super().__init__(name)
        self.argument, self.key, self.positive = argument, key, positive

    def register(self, adata: AnnData) -> dict[str, Any]:
        state = {"argument": self.argument, "key": self.key, "positive": self.positive}
        self.check(adata, state)
        return state

    @classmethod
    def read(cls, adata: AnnData, state: dict[str, Any]) -> np.ndarray:
        """Numbers (n,) float32."""
        argument, key = state["argument"], state["key"]
        column = obs_column(adata, argument, key)
        if column.dtype.kind not in "uifb":
            raise ValueError(
                f"{argument}={key!r}: adata.obs[{key!r}] holds {column.dtype}, not numbers. Convert it: "
                f"adata.obs[{key!r}] = adata.obs[{key!r}].astype(float). A column of names is a categorical covariate."
            )
        check_missing(column, argument, key)
        with np.errstate(over="ignore"):  # what float32 cannot hold counts as infinite
            value_n = column.to_numpy(dtype=np.float64).astype(np.float32)
        if not np.isfinite(value_n).all():
            raise ValueError(f"{argument}={key!r}: {(~np.isfinite(value_n)).sum()} cells have an infinite value.")
        if state["positive"] and (value_n <= 0).any():
            raise ValueError(
                f"{argument}={key!r}: {(value_n <= 0).sum()} cells have a value of zero or less; all must be positive. "
                f"Leave these cells out: adata = adata[adata.obs[{key!r}] > 0].copy()"
            )
        return value_n


class Columns(Field):
    """Several columns of ``obs``, each read as a field of its own, side by side."""

    parts = {"columns": list}
    one: ClassVar[type[Categorical] | type[Continuous]]
    dtype: ClassVar[type[np.generic]]

    def __init__(self, name: str, argument: str, keys: Iterable[str] | None):
        super().__init__(name)
        self.argument, self.keys = argument, check_keys(argument, keys)

    def register(self, adata: AnnData) -> dict[str, Any]:
        return {"columns": [self.one(self.name, self.argument, key).register(adata) for key in self.keys]}

    @classmethod
    def fits(cls, state: Any) -> bool:
        """Whether each column fits."""
        return super().fits(state) and all(map(cls.one.fits, state["columns"]))

    @classmethod
    def read(cls, adata: AnnData, state: dict[str, Any]) -> np.ndarray:
        """The columns (n, number of columns)."""
        columns = [cls.one.read(adata, column) for column in state["columns"]]
        return np.stack(columns, axis=1) if columns else np.zeros((adata.n_obs, 0), cls.dtype)


class Categoricals(Columns):
    """Several columns of ``obs`` as codes (n, c) int64."""

    kind, one, dtype = "categoricals", Categorical, np.int64


class Continuouses(Columns):
    """Several columns of ``obs`` as numbers (n, d) float32."""

    kind, one, dtype = "continuouses", Continuous, np.float32


class Embedding(Field):
    """A matrix of ``obsm`` (n, k); ``variance`` for variances, which are read as standard deviations."""

    kind = "embedding"
    parts = {"argument": str, "key": str}

    def __init__(self, name: str, argument: str, key: str, variance: bool = False):
        super().__init__(name)
        self.argument, self.key, self.variance = argument, key, variance

    def register(self, adata: AnnData) -> dict[str, Any]:
        state = {"argument": self.argument, "key": self.key, "variance": self.variance}
        self.check(adata, state)
        return state

    @classmethod
    def read(cls, adata: AnnData, state: dict[str, Any]) -> np.ndarray:
        """Numbers (n, k) float32."""
        argument, key = state["argument"], state["key"]
        if key not in adata.obsm:
            raise UnknownKeyError(unknown(argument, key, adata.obsm.keys(), "a key of adata.obsm", "Keys"))
        values = np.ascontiguousarray(adata.obsm[key], dtype=np.float32)
        return np.sqrt(values) if state.get("variance") else values


FIELDS: tuple[type[Field], ...] = (Matrix, Categorical, Categoricals, Continuous, Continuouses, Embedding)
KINDS = {field.kind: field for field in FIELDS}


def check_keys(argument: str, keys: Iterable[str] | None) -> list[str]:
    """The keys as a list; one string where a list belongs is a common slip."""
    if isinstance(keys, str):
        raise ValueError(f"{argument}={keys!r}: a list of column names is needed. Write {argument}=[{keys!r}].")
    keys = [] if keys is None else list(keys)
    if repeated := [key for i, key in enumerate(keys) if key in keys[:i]]:
        raise ValueError(f"{argument} names {repeated[0]!r} more than once; give each column once.")
    return keys


def obs_column(adata: AnnData, argument: str, key: str) -> pd.Series:
    """A column of ``adata.obs``, or an error that names the nearest one."""
    if not isinstance(key, str | int) or key not in adata.obs.columns:
        raise UnknownKeyError(unknown(argument, key, adata.obs.columns, "a column of adata.obs", "Columns"))
    column = adata.obs[key]
    if column.ndim > 1:
        raise ValueError(f"{argument}={key!r}: adata.obs has {column.shape[1]} columns of this name; rename them.")
    return column


def categories_of(adata: AnnData, argument: str, key: str) -> list[Any]:
    """The categories in use: in their own order for a categorical column, else sorted."""
    column = obs_column(adata, argument, key)
    check_missing(column, argument, key)
    if isinstance(column.dtype, pd.CategoricalDtype):
        values = column.cat.remove_unused_categories().cat.categories.tolist()
    else:
        values = sorted(column.unique().tolist(), key=lambda value: (str(type(value)), value))
    texts = pd.Index([text_of(value) for value in values])
    if not texts.is_unique:
        raise ValueError(
            f"{argument}={key!r}: values of different types in adata.obs[{key!r}] read "
            f"{texts[texts.duplicated()][0]!r}. Make them one: adata.obs[{key!r}] = adata.obs[{key!r}].astype(str)"
        )
    # What JSON has no type for (dates, intervals) is kept as text, and a whole number as an integer.
    values = [int(value) if isinstance(value, float) and value.is_integer() else value for value in values]
    return [value if isinstance(value, bool | int | float | str) else str(value) for value in values]


def text_of(value: Any) -> str:
    """How a category is compared: files and pandas versions change between bool, int, float, str and categorical.

    >>> text_of(2.0), text_of(2), text_of("2"), text_of(0.5), text_of(True)
    ('2', '2', '2', '0.5', 'True')
    """
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def encode(adata: AnnData, categories: Sequence[Any], argument: str, key: str) -> np.ndarray:
    """Codes (n,) int64 of a column's values among ``categories``; an error for a value that is not one of them."""
    column = obs_column(adata, argument, key)
    check_missing(column, argument, key)
    column = column.astype("category")
    here = column.cat.categories.tolist()
    code_of = pd.Index([text_of(c) for c in categories]).get_indexer([text_of(c) for c in here])
    code_n = code_of[column.cat.codes.to_numpy()].astype(np.int64)
    if (code_n < 0).any():
        new = list(dict.fromkeys(column[code_n < 0].astype(str)))
        raise ValueError(
            f"{argument}={key!r}: {(code_n < 0).sum()} cells have {listing(new)} in adata.obs[{key!r}], which the "
            f"model was not set up with. It knows {listing(categories)}. Leave these cells out, "
            "recode them, or train a model with them."
        )
    return code_n


def check_missing(column: pd.Series, argument: str, key: str) -> None:
    """Refuse missing values."""
    missing = column.isna().to_numpy()
    if missing.any():
        raise ValueError(
            f"{argument}={key!r}: {missing.sum()} of {len(column)} cells have no value in adata.obs[{key!r}]. Give "
            f"them one, or leave them out: adata = adata[adata.obs[{key!r}].notna()].copy()"
        )
