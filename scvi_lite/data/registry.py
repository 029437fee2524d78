"""The setup of one AnnData for one model: plain data that JSON and ``.h5ad`` files hold."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from scvi_lite.data.fields import KINDS, Field, Matrix
from scvi_lite.errors import StateError, listing

if TYPE_CHECKING:
    from anndata import AnnData

UNS_KEY = "scvi_lite"
PARTS = {"model_name": str, "setup_args": dict, "fields": dict, "n_cells": int, "n_features": int}
CURES = {
    "NoneType": "Give the data that setup_anndata was called with.",
    "str": "Read the file first: anndata.read_h5ad(path).",
    "PosixPath": "Read the file first: anndata.read_h5ad(path).",
    "DataFrame": "Make one: anndata.AnnData(frame), with cells as rows.",
    "MuData": "Give one of its modalities, as in mdata['rna'].",
    "ndarray": "Make one: anndata.AnnData(counts), with cells as rows.",
}


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
        """From :meth:`to_dict`.

        Raises
        ------
        ValueError
            If a part is missing or of the wrong type.
        """
        data = data if isinstance(data, dict) else {}
        wrong = [part for part, kind in PARTS.items() if not isinstance(data.get(part), kind)]
        wrong += [field for field, state in data.get("fields", {}).items() if not _fits(state)] if not wrong else []
        if wrong:
            raise ValueError(
                f"The setup that was found is damaged, it has no {listing(wrong)} of the right type. Call "
                "setup_anndata again; in a saved model, restore model.json from a copy."
            )
        return cls(**{part: data[part] for part in PARTS})

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

    def check(self, adata: AnnData) -> None:
        """Refuse data that the model cannot read, or whose counts are none.

        Raises
        ------
        StateError
            If the data were minified and this setup reads counts.
        KeyError
            If a column or layer does not exist.
        ValueError
            If values are missing or new to the model, or counts are negative, NaN or infinite.
        """
        # A setup that cannot be read, as of another version, is no reason to refuse data: it is not used.
        minified = '"minified": true' in str(setups_of(adata).get(self.model_name))
        if minified and not self.fields["x"].get("minified"):
            raise StateError(
                f"adata was minified and holds no counts, which this {self.model_name} reads. Give the full data, or "
                "load the model that minified them."
            )
        for state in self.fields.values():
            KINDS[state["kind"]].check(adata, state)


def register(adata: AnnData, model_name: str, fields: Sequence[Field], setup_args: dict[str, Any]) -> Registry:
    """Check ``adata`` against the fields and write the result to ``adata.uns["scvi_lite"][model_name]``.

    Raises
    ------
    ValueError
        If there are no cells or genes, if names repeat, or if a field does not fit.
    """
    check_anndata(adata)
    if adata.isbacked and adata.is_view:
        raise ValueError(
            "adata is a view of a backed file, in which nothing can be noted. Call setup_anndata with the whole "
            "AnnData and take the view then; or read the view into memory: adata = adata.to_memory()."
        )
    states = {field.name: {"kind": field.kind, **field.register(adata)} for field in fields}
    registry = Registry(model_name, setup_args, states, adata.n_obs, adata.n_vars)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Trying to modify attribute", category=UserWarning)  # a view becomes a copy
        # As text, because an .h5ad file keeps no None and no empty or mixed list as it was.
        adata.uns[UNS_KEY] = setups_of(adata) | {model_name: json.dumps(registry.to_dict())}
    return registry


def setups_of(adata: AnnData) -> dict[str, Any]:
    """What is noted in ``adata.uns``, by the name of the model; nothing where something else took the place."""
    noted = adata.uns.get(UNS_KEY)
    return dict(noted) if isinstance(noted, Mapping) else {}


def find(adata: AnnData, model_name: str) -> Registry:
    """The setup that :func:`register` wrote.

    Raises
    ------
    StateError
        If there is none for this model, or genes were added or left out since.
    ValueError
        If it is damaged.
    """
    setups = setups_of(adata)
    if model_name not in setups:
        other = f" It is set up for {', '.join(setups)}." if len(setups) else ""
        raise StateError(
            f"This AnnData is not set up for {model_name}.{other} Call {model_name}.setup_anndata(adata, ...) first."
        )
    try:
        noted = json.loads(setups[model_name])
    except (TypeError, ValueError):  # not text, or not JSON
        noted = {}
    registry = Registry.from_dict(noted)
    if registry.n_features != adata.n_vars:
        raise StateError(
            f"This AnnData was set up for {model_name} with {registry.n_features} genes and has {adata.n_vars} now. "
            f"Call {model_name}.setup_anndata(adata, ...) again."
        )
    return registry


def _fits(state: Any) -> bool:
    """Whether the state of a field, read from a file, is one."""
    kind = state.get("kind") if isinstance(state, dict) else None
    return isinstance(kind, str) and kind in KINDS and KINDS[kind].fits(state)


def check_anndata(adata: Any) -> None:
    """Refuse what is not an AnnData, or an empty one, or one with repeated gene names.

    Raises
    ------
    TypeError
        If it is something else.
    ValueError
        If there are no cells or no genes, or names repeat.
    """
    from anndata import AnnData

    if not isinstance(adata, AnnData):
        kind = type(adata).__name__
        raise TypeError(f"adata is a {kind}; an AnnData is needed. {CURES.get(kind, '')}".rstrip())
    if adata.n_obs == 0 or adata.n_vars == 0:
        raise ValueError(f"adata has {adata.n_obs} cells and {adata.n_vars} genes; at least one of each is needed.")
    if not adata.var_names.is_unique:
        repeated = adata.var_names[adata.var_names.duplicated()]
        raise ValueError(
            f"adata.var_names repeats {len(repeated)} names, {repeated[0]!r} for one. "
            "Call adata.var_names_make_unique() first."
        )


def describe_field(state: dict[str, Any]) -> list[tuple[str, str]]:
    """Where a field is in the data and what it holds, a line each."""
    if "columns" in state:
        return [line for column in state["columns"] for line in describe_field(column)]
    if state.get("kind") == Matrix.kind:
        return [("X" if state.get("layer") is None else f"layers[{state['layer']!r}]", "counts")]
    if state.get("key") is None:
        return [("—", "one category")]
    if "categories" in state:
        categories = state["categories"]
        return [(f"obs[{state['key']!r}]", f"{len(categories)} categories: {listing(categories)}")]
    return [(f"{'obsm' if state.get('kind') == 'embedding' else 'obs'}[{state['key']!r}]", "numbers")]
