"""What a model reads from an AnnData or a MuData: fields check the data at setup and read it again later.

A field *registers* once, which checks the data and gives its state (plain, JSON-able), and *reads* any data against
that state, those it was registered with or new ones. In a MuData, a state may name the modality in which to look.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from scvi_lite.data.checks import check_counts
from scvi_lite.data.columns import categories_of, check_missing, encode, obs_column, text_of
from scvi_lite.data.modalities import name_of, part_of
from scvi_lite.errors import UnknownKeyError, unknown, warn

if TYPE_CHECKING:
    from scvi_lite._typing import Data

FAR_FROM_ONE = 1000.0  # of a covariate: counts are beyond, percentages and ages are not


class Field(ABC):
    """One thing that a model reads. ``name`` is the attribute of :class:`~scvi_lite.data.batch.Batch` it fills."""

    kind: ClassVar[str]
    parts: ClassVar[dict[str, Any]]  #: what a state holds, and of which types
    has_features: ClassVar[bool] = False  #: whether it reads the variables of a modality

    def __init__(self, name: str, modality: str | None = None):
        self.name, self.modality = name, modality

    @abstractmethod
    def register(self, adata: Data) -> dict[str, Any]:
        """Check the data and give the field's state."""

    def state(self, **parts: Any) -> dict[str, Any]:
        """The parts of a state, with the modality where there is one."""
        return parts if self.modality is None else {**parts, "modality": self.modality}

    @classmethod
    def fits(cls, state: Any) -> bool:
        """Whether a state that comes from a file is one of this field."""
        return isinstance(state, dict) and all(isinstance(state.get(part, ...), of) for part, of in cls.parts.items())

    @classmethod
    @abstractmethod
    def read(cls, adata: Data, state: dict[str, Any]) -> Any:
        """The data of this field, in the coding of ``state``."""

    @classmethod
    def check(cls, adata: Data, state: dict[str, Any]) -> None:
        """Refuse data that cannot be read, or, having been read, not be used."""
        cls.read(adata, state)


class Matrix(Field):
    """A cells × features matrix of counts: ``X`` or a layer.

    A state may have ``columns``, the first and the one after the last, where a matrix holds several kinds of features.
    """

    kind = "matrix"
    parts = {"layer": str | None}
    has_features = True

    def __init__(
        self,
        name: str,
        layer: str | None,
        counts: bool = True,
        modality: str | None = None,
        columns: list[int] | None = None,
    ):
        super().__init__(name, modality)
        self.layer, self.counts = layer, counts
        self.columns = {} if columns is None else {"columns": columns}

    def register(self, adata: Data) -> dict[str, Any]:
        state = self.state(layer=self.layer, counts=self.counts, **self.columns)
        self.check(adata, state)
        return state

    @classmethod
    def check(cls, adata: Data, state: dict[str, Any]) -> None:
        """One pass over the numbers."""
        where = "X" if state["layer"] is None else f"layers[{state['layer']!r}]"
        name = name_of(adata, state.get("modality"))
        check_counts(cls.read(adata, state), f"{name}.{where}", state.get("counts", True))

    @classmethod
    def read(cls, adata: Data, state: dict[str, Any]) -> Any:
        """The matrix as it is, in memory or in a file; in a modality with the cells and in the order that it has."""
        layer, modality = state["layer"], state.get("modality")
        name, part = name_of(adata, modality), part_of(adata, modality)
        if layer is None:
            matrix = part.X  # asked for once, because a view makes it anew each time
            if matrix is None:
                raise ValueError(f"{name}.X is empty. Put the counts there, or name the layer that has them: layer=...")
        elif not isinstance(layer, str) or layer not in part.layers:
            raise UnknownKeyError(unknown("layer", layer, part.layers.keys(), f"a key of {name}.layers", "Layers"))
        else:
            matrix = part.layers[layer]
        return matrix[:, slice(*state["columns"])] if "columns" in state else matrix


class Categorical(Field):
    """A column of ``obs`` as codes; without a key, one category for all cells."""

    kind = "categorical"
    parts = {"argument": str, "key": str | int | None, "categories": list}

    def __init__(self, name: str, argument: str, key: str | None, modality: str | None = None):
        super().__init__(name, modality)
        self.argument, self.key = argument, key

    def register(self, adata: Data) -> dict[str, Any]:
        categories = [0] if self.key is None else categories_of(adata, self.argument, self.key, self.modality)
        return self.state(argument=self.argument, key=self.key, categories=categories)

    @classmethod
    def fits(cls, state: Any) -> bool:
        """Whether it has the parts, and its categories differ."""
        return super().fits(state) and 0 < len(state["categories"]) == len(set(map(text_of, state["categories"])))

    @classmethod
    def read(cls, adata: Data, state: dict[str, Any]) -> np.ndarray:
        """Codes (n,) int64."""
        if state["key"] is None:
            return np.zeros(adata.n_obs, dtype=np.int64)
        return encode(adata, state["categories"], state["argument"], state["key"], state.get("modality"))


class Continuous(Field):
    """A column of ``obs`` as numbers (n,); ``positive`` for size factors."""

    kind = "continuous"
    parts = {"argument": str, "key": str | int, "positive": bool}

    def __init__(self, name: str, argument: str, key: str, positive: bool = False, modality: str | None = None):
        super().__init__(name, modality)
        self.argument, self.key, self.positive = argument, key, positive

    def register(self, adata: Data) -> dict[str, Any]:
        state = self.state(argument=self.argument, key=self.key, positive=self.positive)
        largest = np.abs(self.read(adata, state)).max()
        if largest > FAR_FROM_ONE and self.name == "conts_nd":  # which networks read
            column = f"{name_of(adata, self.modality)}.obs[{self.key!r}]"
            warn(
                f"{self.argument}={self.key!r}: values reach {largest:.3g}, and networks that read them train badly. "
                f"Bring them near 1: {column} = ({column} - {column}.mean()) / {column}.std()"
            )
        return state

    @classmethod
    def read(cls, adata: Data, state: dict[str, Any]) -> np.ndarray:
        """Numbers (n,) float32."""
        argument, key = state["argument"], state["key"]
        obs = f"{name_of(adata, state.get('modality'))}.obs"
        column = obs_column(adata, argument, key, state.get("modality"))
        if column.dtype.kind not in "uifb":
            raise ValueError(
                f"{argument}={key!r}: {obs}[{key!r}] holds {column.dtype}, not numbers. Convert it: "
                f"{obs}[{key!r}] = {obs}[{key!r}].astype(float). A column of names is a categorical covariate."
            )
        check_missing(column, argument, key, obs)
        with np.errstate(over="ignore"):  # what float32 cannot hold counts as infinite
            value_n = column.to_numpy(dtype=np.float64).astype(np.float32)
        if not np.isfinite(value_n).all():
            raise ValueError(f"{argument}={key!r}: {(~np.isfinite(value_n)).sum()} cells have an infinite value.")
        if state["positive"] and (value_n <= 0).any():
            raise ValueError(
                f"{argument}={key!r}: {(value_n <= 0).sum()} cells have a value of zero or less; all must be positive. "
                f"Leave these cells out, as in adata = adata[{obs}[{key!r}] > 0].copy()"
            )
        return value_n


class Columns(Field):
    """Several columns of ``obs``, each read as a field of its own, side by side."""

    parts = {"columns": list}
    one: ClassVar[type[Categorical] | type[Continuous]]
    dtype: ClassVar[type[np.generic]]

    def __init__(self, name: str, argument: str, keys: Iterable[str] | None, modality: str | None = None):
        super().__init__(name, modality)
        self.argument, self.keys = argument, check_keys(argument, keys)

    def register(self, adata: Data) -> dict[str, Any]:
        columns = [self.one(self.name, self.argument, key, modality=self.modality) for key in self.keys]
        return {"columns": [column.register(adata) for column in columns]}

    @classmethod
    def fits(cls, state: Any) -> bool:
        """Whether each column fits."""
        return super().fits(state) and all(map(cls.one.fits, state["columns"]))

    @classmethod
    def read(cls, adata: Data, state: dict[str, Any]) -> np.ndarray:
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

    def register(self, adata: Data) -> dict[str, Any]:
        state = {"argument": self.argument, "key": self.key, "variance": self.variance}
        self.check(adata, state)
        return state

    @classmethod
    def read(cls, adata: Data, state: dict[str, Any]) -> np.ndarray:
        """Numbers (n, k) float32."""
        argument, key = state["argument"], state["key"]
        if key not in adata.obsm:
            raise UnknownKeyError(unknown(argument, key, adata.obsm.keys(), "a key of adata.obsm", "Keys"))
        values = np.ascontiguousarray(adata.obsm[key], dtype=np.float32)
        return np.sqrt(values) if state.get("variance") else values


def columns_of_obs(
    given: Mapping[str, Any], where: Mapping[str, str | None] | None = None, labels: Field | None = None
) -> list[Field]:
    """The columns of ``obs`` that models read, as the arguments of a setup name them.

    Parameters
    ----------
    given
        The arguments.
    where
        Of a MuData, the modality in which to look for each.
    labels
        The column of labels, where some cells may have none.
    """
    modality_of = where or {}

    def column(kind: Any, name: str, argument: str, **options: Any) -> Field:
        return kind(name, argument, given.get(argument), modality=modality_of.get(argument), **options)

    columns = [
        column(Categorical, "batch_n", "batch_key"),
        labels or column(Categorical, "label_n", "labels_key"),
        column(Categoricals, "cats_nc", "categorical_covariate_keys"),
        column(Continuouses, "conts_nd", "continuous_covariate_keys"),
    ]
    if given.get("panel_key") is not None:
        columns.append(column(Categorical, "panel_n", "panel_key"))
    if given.get("size_factor_key") is not None:
        columns.append(column(Continuous, "size_factor_n", "size_factor_key", positive=True))
    return columns


def check_keys(argument: str, keys: Iterable[str] | None) -> list[str]:
    """The keys as a list; one string where a list belongs is a common slip."""
    if isinstance(keys, str):
        raise ValueError(f"{argument}={keys!r}: a list of column names is needed. Write {argument}=[{keys!r}].")
    keys = [] if keys is None else list(keys)
    if repeated := [key for i, key in enumerate(keys) if key in keys[:i]]:
        raise ValueError(f"{argument} names {repeated[0]!r} more than once; give each column once.")
    return keys
