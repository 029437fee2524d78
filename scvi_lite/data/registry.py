"""The setup of one AnnData for one model: plain data that JSON and ``.h5ad`` files hold."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from scvi_lite.data.fields import KINDS, Field

if TYPE_CHECKING:
    from anndata import AnnData

UNS_KEY = "scvi_lite"


@dataclass(frozen=True)
class Registry:
    """What a model reads from an AnnData and how it is coded.

    Attributes
    ----------
    model_name
        Class that the data were set up for.
    setup_args
        Arguments of ``setup_anndata``, as given.
    fields
        For each field, by the name of the :class:`~scvi_lite.data.batch.Batch` attribute it fills: its ``kind``
        and its state.
    n_cells, n_features
        Size of the data at setup.
    """

    model_name: str
    setup_args: dict[str, Any]
    fields: dict[str, dict[str, Any]]
    n_cells: int
    n_features: int

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries, lists, strings and numbers."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Registry:
        """From :meth:`to_dict`, also after a trip through a file."""
        plain = _plain(data)
        try:
            return cls(**{name: plain[name] for name in cls.__dataclass_fields__})
        except KeyError as error:
            raise ValueError(f"The setup that was found has no {error}; it is damaged. Call setup_anndata again.") from None

    def categories(self, field: str) -> list[Any]:
        """The categories of a categorical field, in the order of their codes."""
        return self.fields[field]["categories"]

    @property
    def n_batches(self) -> int:
        return len(self.categories("batch_n"))

    @property
    def n_labels(self) -> int:
        return len(self.categories("label_n"))

    def read(self, adata: AnnData, field: str) -> Any:
        """The data of one field of ``adata``, coded as this registry says."""
        state = self.fields[field]
        return KINDS[state["kind"]].read(adata, state)


def register(adata: AnnData, model_name: str, fields: Sequence[Field], setup_args: dict[str, Any]) -> Registry:
    """Check ``adata`` against the fields and write the result to ``adata.uns["scvi_lite"][model_name]``.

    Raises
    ------
    ValueError
        If there are no cells or genes, if names repeat, or if a field does not fit.
    """
    check_anndata(adata)
    states = {field.name: {"kind": field.kind, **field.register(adata)} for field in fields}
    registry = Registry(model_name, setup_args, states, adata.n_obs, adata.n_vars)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Trying to modify attribute", category=UserWarning)  # a view becomes a copy
        setups = dict(adata.uns.get(UNS_KEY, {}))
        adata.uns[UNS_KEY] = setups | {model_name: _without_none(registry.to_dict())}
    return registry


def find(adata: AnnData, model_name: str) -> Registry:
    """The setup that :func:`register` wrote.

    Raises
    ------
    RuntimeError
        If there is none for this model.
    """
    setups = adata.uns.get(UNS_KEY, {})
    if model_name not in setups:
        other = f" It is set up for {', '.join(setups)}." if len(setups) else ""
        raise RuntimeError(
            f"This AnnData is not set up for {model_name}.{other} Call {model_name}.setup_anndata(adata, ...) first."
        )
    return Registry.from_dict(setups[model_name])


def check_anndata(adata: Any) -> None:
    """Refuse what is not an AnnData, or an empty one, or one with repeated gene names."""
    from anndata import AnnData

    if not isinstance(adata, AnnData):
        raise TypeError(f"adata is a {type(adata).__name__}; an AnnData is needed: anndata.read_h5ad(path).")
    if adata.n_obs == 0 or adata.n_vars == 0:
        raise ValueError(f"adata has {adata.n_obs} cells and {adata.n_vars} genes; at least one of each is needed.")
    if not adata.var_names.is_unique:
        repeated = adata.var_names[adata.var_names.duplicated()]
        raise ValueError(
            f"adata.var_names repeats {len(repeated)} names, {repeated[0]!r} for one. "
            "Call adata.var_names_make_unique() first."
        )


def _without_none(value: Any) -> Any:
    """Drop what is None: ``.h5ad`` files of every version hold the rest."""
    if isinstance(value, dict):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return {str(i): _without_none(v) for i, v in enumerate(value)} if _has_dicts(value) else list(value)
    return value


def _plain(value: Any) -> Any:
    """Undo :func:`_without_none` and what an ``.h5ad`` file makes of lists and numbers."""
    if isinstance(value, dict):
        if value and all(k.isdigit() for k in value):
            return [_plain(value[str(i)]) for i in range(len(value))]
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value


def _has_dicts(value: list[Any]) -> bool:
    return any(isinstance(v, dict) for v in value)
