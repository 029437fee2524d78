"""The setup of one AnnData or MuData for one model: plain data that JSON and the data's own files hold."""

from __future__ import annotations

import json
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from scvi_lite.data.fields import Categorical, Categoricals, Continuous, Continuouses, Embedding, Field, Matrix
from scvi_lite.data.labels import Labels
from scvi_lite.data.modalities import check_data, is_mudata, part_of, place_of
from scvi_lite.data.proteins import Proteins
from scvi_lite.errors import StateError, UnknownKeyError, listing, unknown

if TYPE_CHECKING:
    import numpy as np

    from scvi_lite._typing import Data
    from scvi_lite.data.rows import Rows

FIELDS: tuple[type[Field], ...] = (
    Matrix, Categorical, Categoricals, Continuous, Continuouses, Embedding, Proteins, Labels,
)  # fmt: skip
KINDS = {field.kind: field for field in FIELDS}
UNS_KEY = "scvi_lite"
MINIFY_KEY = "_scvi_adata_minify_type"  #: of uns, in which scvi-tools notes how data were minified
WITHOUT_COUNTS = "latent_posterior_parameters"
PARTS = {"model_name": str, "setup_args": dict, "fields": dict, "n_cells": int, "n_features": int}
THEIRS = ("field_registries", "scvi_version", "setup_method_name")  #: what scvi-tools has beside some of them


class FieldStates(dict[str, dict[str, Any]]):
    """States by the name of their field; one that a model needs and that is not there is an error with the cure."""

    def __missing__(self, name: str) -> dict[str, Any]:
        raise ValueError(
            f"The setup of these data has no field {name!r}, which the model reads. Call setup_anndata again; in a "
            "saved model, restore model.json from a copy."
        )


@dataclass(frozen=True)
class Registry:
    """What a model reads from an AnnData or a MuData and how it is coded.

    Attributes
    ----------
    model_name
        Class that the data were set up for.
    setup_args
        Arguments of ``setup_anndata`` or ``setup_mudata``, as given.
    fields
        For each field, by the name of the :class:`~scvi_lite.data.batch.Batch` attribute it fills: its ``kind``
        and its state.
    n_cells, n_features
        Size of the data at setup: cells, and columns of the counts ``x``.
    """

    model_name: str
    setup_args: dict[str, Any]
    fields: dict[str, dict[str, Any]]
    n_cells: int
    n_features: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "fields", FieldStates(self.fields))

    def __getitem__(self, part: str) -> Any:
        """A part by its name, as in ``registry["setup_args"]["batch_key"]``."""
        if part in THEIRS:
            raise UnknownKeyError(f"{part!r} is a part of a registry of scvi-tools: see model.adata_manager.registry.")
        if part not in PARTS:
            raise UnknownKeyError(unknown("registry", part, PARTS, "a part of a registry", "Parts"))
        return getattr(self, part)

    def keys(self) -> Collection[str]:
        """Names of the parts, so that ``dict(registry)`` and ``"fields" in registry`` work as on a dictionary."""
        return PARTS.keys()

    def __iter__(self) -> Iterator[str]:
        return iter(PARTS)

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
    def n_categories(self) -> dict[str, int]:
        """Number of categories of each categorical field; of each column, where a field has several."""
        columns = dict(self.fields)
        for name, state in self.fields.items():
            if state["kind"] == Categoricals.kind:
                columns |= {f"{name}.{i}": column for i, column in enumerate(state["columns"])}
        return {name: len(column["categories"]) for name, column in columns.items() if "categories" in column}

    @property
    def n_labels(self) -> int:
        return len(self.categories("label_n"))

    def read(self, adata: Data, field: str) -> Any:
        """The data of one field of ``adata``, coded as this registry says."""
        state = self.fields[field]
        return KINDS[state["kind"]].read(adata, state)

    @property
    def matrices(self) -> list[str]:
        """The fields that are matrices of counts, ``x`` first."""
        return [name for name, state in self.fields.items() if state["kind"] == Matrix.kind]

    @property
    def modalities(self) -> dict[str, str]:
        """Of a MuData, the modality of each field that has a feature for each of its variables."""
        named = {name: state["modality"] for name, state in self.fields.items() if "modality" in state}
        return {name: modality for name, modality in named.items() if KINDS[self.fields[name]["kind"]].has_features}

    def place(self, adata: Data, field: str) -> np.ndarray | None:
        """Row (n,) of each cell in what the field reads, -1 where it was not measured; None where rows are the same."""
        return place_of(adata, self.modalities.get(field))

    def rows(self, adata: Data, field: str = "x") -> Rows:
        """The rows of a matrix of counts, one for each cell."""
        from scvi_lite.data.rows import Rows  # needs torch, which a look at a setup does not

        return Rows(self.read(adata, field), self.place(adata, field))

    def var_names(self, adata: Data) -> list[str] | dict[str, list[str]]:
        """Names of the features; of a MuData by modality."""
        if not self.modalities:
            return adata.var_names.astype(str).tolist()
        return {name: part_of(adata, name).var_names.astype(str).tolist() for name in self.modalities.values()}

    def check(self, adata: Data) -> None:
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
        if not self.fields["x"].get("minified"):
            refuse_minified(adata, self.model_name)
        for state in sorted(self.fields.values(), key=lambda state: state["kind"] == Matrix.kind):  # counts last
            KINDS[state["kind"]].check(adata, state)


def register(adata: Data, model_name: str, fields: Sequence[Field], setup_args: dict[str, Any]) -> Registry:
    """Check ``adata`` against the fields and write the result to ``adata.uns["scvi_lite"][model_name]``.

    Raises
    ------
    StateError
        If the data were minified without counts.
    ValueError
        If there are no cells or genes, if names repeat, or if a field does not fit.
    """
    modalities = [field.modality for field in fields if field.modality is not None]
    check_data(adata, modalities)
    refuse_minified(adata, model_name)
    if empty := [modality for modality in modalities if part_of(adata, modality).n_obs == 0]:  # as a query's may be
        raise ValueError(f"mdata[{empty[0]!r}] has no cells, and the model is to learn from some.")
    if adata.isbacked and adata.is_view:
        raise ValueError(
            "adata is a view of a backed file, in which nothing can be noted. Call setup_anndata with the whole "
            "AnnData and take the view then; or read the view into memory: adata = adata.to_memory()."
        )
    # The counts last: a wrong key is refused before they are read.
    state_of = {
        f.name: {"kind": f.kind, **f.register(adata)} for f in sorted(fields, key=lambda f: isinstance(f, Matrix))
    }
    states = {field.name: state_of[field.name] for field in fields}
    n_features = part_of(adata, states["x"].get("modality")).n_vars
    registry = Registry(model_name, setup_args, states, adata.n_obs, n_features)
    note(registry, adata)
    return registry


def note(registry: Registry, adata: Data) -> None:
    """Write a setup to ``adata.uns["scvi_lite"]``."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Trying to modify attribute", category=UserWarning)  # a view becomes a copy
        # As text, because an .h5ad file keeps no None and no empty or mixed list as it was.
        adata.uns[UNS_KEY] = setups_of(adata) | {registry.model_name: json.dumps(registry.to_dict())}


def refuse_minified(adata: Data, model_name: str) -> None:
    """Refuse data that were minified without counts, here or by scvi-tools."""
    # A setup that cannot be read, as of another version, is no reason to refuse data: it is not used.
    here = '"minified": true' in str(setups_of(adata))
    if here or str(adata.uns.get(MINIFY_KEY)) == WITHOUT_COUNTS:
        raise StateError(
            f"adata was minified and holds no counts, which {model_name} reads. Give the full data, or load the model "
            "that minified them."
        )


def setups_of(adata: Data) -> dict[str, Any]:
    """What is noted in ``adata.uns``, by the name of the model; nothing where something else took the place."""
    noted = adata.uns.get(UNS_KEY)
    return dict(noted) if isinstance(noted, Mapping) else {}


def find(adata: Data, model_name: str) -> Registry:
    """The setup that :func:`register` wrote.

    Raises
    ------
    StateError
        If there is none for this model, or genes were added or left out since.
    ValueError
        If it is damaged.
    """
    setups = setups_of(adata)
    kind, call = (
        ("MuData", "setup_mudata(mdata, ...)") if is_mudata(adata) else ("AnnData", "setup_anndata(adata, ...)")
    )
    if model_name not in setups:
        other = f" It is set up for {', '.join(setups)}." if len(setups) else ""
        raise StateError(f"This {kind} is not set up for {model_name}.{other} Call {model_name}.{call} first.")
    try:
        noted = json.loads(setups[model_name])
    except (TypeError, ValueError):  # not text, or not JSON
        noted = {}
    registry = Registry.from_dict(noted)
    check_data(adata, registry.modalities.values())
    n_features = part_of(adata, registry.modalities.get("x")).n_vars
    if registry.n_features != n_features:
        raise StateError(
            f"This {kind} was set up for {model_name} with {registry.n_features} genes and has {n_features} now. "
            f"Call {model_name}.{call} again."
        )
    return registry


def _fits(state: Any) -> bool:
    """Whether the state of a field, read from a file, is one."""
    kind = state.get("kind") if isinstance(state, dict) else None
    return isinstance(kind, str) and kind in KINDS and KINDS[kind].fits(state)


def describe_field(state: dict[str, Any]) -> list[tuple[str, str]]:
    """Where a field is in the data and what it holds, a line each."""
    part = f"{state['modality']}." if "modality" in state else ""
    if state.get("kind") in (Matrix.kind, Proteins.kind) and state.get("key") is None:
        which = "[:, {}:{}]".format(*state["columns"]) if "columns" in state else ""
        where = "X" if state.get("layer") is None else f"layers[{state['layer']!r}]"
        return [(f"{part}{where}{which}", "counts")]
    if "columns" in state:
        return [line for column in state["columns"] for line in describe_field(column)]
    if state.get("key") is None:
        return [("—", "one category")]
    if "categories" in state:
        categories = state["categories"]
        return [(f"{part}obs[{state['key']!r}]", f"{len(categories)} categories: {listing(categories)}")]
    if "names" in state:
        return [(f"obsm[{state['key']!r}]", f"counts of {len(state['names'])} proteins: {listing(state['names'])}")]
    return [(f"{part}{'obsm' if state.get('kind') == 'embedding' else 'obs'}[{state['key']!r}]", "numbers")]
