"""The setup of a model in the names that scripts for scvi-tools use: ``model.adata_manager``, ``REGISTRY_KEYS``."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import numpy as np

from scvi_lite._elsewhere import no_attribute
from scvi_lite.data.registry import Registry
from scvi_lite.errors import UnknownKeyError, unknown

if TYPE_CHECKING:
    from scvi_lite._typing import Data


class RegistryKeys(NamedTuple):
    """What scvi-tools calls the fields of a model."""

    X_KEY: str = "X"
    BATCH_KEY: str = "batch"
    LABELS_KEY: str = "labels"
    CAT_COVS_KEY: str = "extra_categorical_covs"
    CONT_COVS_KEY: str = "extra_continuous_covs"
    SIZE_FACTOR_KEY: str = "size_factor"
    PROTEIN_EXP_KEY: str = "proteins"
    ATAC_X_KEY: str = "atac"


REGISTRY_KEYS = RegistryKeys()
#: Those, and what they are called here. ``size_factor`` stands last: it has no summary.
FIELDS = {
    "X": "x",
    "atac": "peaks",
    "x_smoothed": "smoothed",
    "batch": "batch_n",
    "labels": "label_n",
    "fine_labels": "fine_n",
    "panel": "panel_n",
    "extra_categorical_covs": "cats_nc",
    "extra_continuous_covs": "conts_nd",
    "proteins": "proteins_np",
    "size_factor": "size_factor_n",
}
NUMBERS = {"extra_categorical_covs": "columns", "extra_continuous_covs": "columns", "proteins": "names"}


class Named(dict[str, Any]):
    """Values by name, which may be read as attributes, too. A name that is not there is an error that lists them.

    >>> Named(n_cells=5).n_cells
    5
    """

    def __missing__(self, name: str) -> NoReturn:
        raise UnknownKeyError(unknown("name", name, self, "one of these", "Names"))

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(unknown("attribute", name, self, "one of these", "Names"), name=name)
        return self[name]


class SetupView:
    """What a model reads from its data, to be looked up by the names that scvi-tools has for it.

    It reads the data and the model's :class:`~scvi_lite.data.registry.Registry`, ``setup``, when asked.

    Examples
    --------
    >>> import scvi_lite
    >>> adata = scvi_lite.data.synthetic_iid(batch_size=50, n_genes=20)
    >>> scvi_lite.model.SCVI.setup_anndata(adata, batch_key="batch")
    >>> view = scvi_lite.model.SCVI(adata).adata_manager
    >>> view.get_state_registry("batch").categorical_mapping
    array(['batch_0', 'batch_1'], dtype=object)
    >>> view.get_from_registry(scvi_lite.REGISTRY_KEYS.X_KEY).shape
    (100, 20)
    """

    def __init__(self, adata: Data, setup: Registry):
        self.adata, self.setup = adata, setup

    @cached_property
    def registry(self) -> dict[str, Any]:
        """The setup: its arguments, and each field with where it is, its state and its numbers."""
        from scvi_lite import __version__

        return {
            "scvi_version": __version__,
            "model_name": self.setup.model_name,
            "setup_method_name": "setup_mudata" if self.setup.modalities else "setup_anndata",
            "setup_args": self.setup.setup_args,
            "field_registries": {
                key: {
                    "data_registry": self._place(key),
                    "state_registry": self.get_state_registry(key),
                    "summary_stats": self._numbers(key),
                }
                for key in self._keys()
            },
        }

    @property
    def data_registry(self) -> Named:
        """Where each field is: the attribute of the data, and the key in it."""
        return Named({key: self._place(key) for key in self._keys()})

    @property
    def summary_stats(self) -> Named:
        """Numbers of cells, features, batches, labels, covariates and proteins that the model was set up with."""
        numbers = Named(n_cells=self.setup.n_cells, n_vars=self.setup.n_features)
        for key, name in FIELDS.items():
            if name in self.setup.fields:
                numbers |= self._numbers(key)
        return numbers

    def get_state_registry(self, registry_key: str) -> Named:
        """What is known of a field: its categories, columns or names.

        Raises
        ------
        KeyError
            If the model has no such field.
        """
        state = self.setup.fields[self._field(registry_key)]
        if "categories" in state:
            known = {"categorical_mapping": _array(state["categories"]), "original_key": state["key"]}
            return Named(known | ({"unlabeled_category": state["categories"][-1]} if state["kind"] == "labels" else {}))
        if state["kind"] == "categoricals":
            mappings = {column["key"]: _array(column["categories"]) for column in state["columns"]}
            counts = [len(categories) for categories in mappings.values()]
            return Named(mappings=mappings, field_keys=list(mappings), n_cats_per_key=counts)
        if state["kind"] == "continuouses":
            return Named(columns=_array([column["key"] for column in state["columns"]]))
        if state["kind"] == "matrix":
            names = self.setup.var_names(self.adata)
            names = names if isinstance(names, list) else names[state["modality"]]
            names = names[slice(*state.get("columns", (None,)))]
            return Named(n_obs=self.setup.n_cells, n_vars=len(names), column_names=_array(names))
        return Named(column_names=_array(state["names"])) if state["kind"] == "proteins" else Named()

    def get_from_registry(self, registry_key: str) -> Any:
        """The data of a field: a matrix as it is, covariates as a frame, else an array of one row for each cell.

        Raises
        ------
        KeyError
            If the model has no such field.
        """
        field = self._field(registry_key)
        values = self.setup.read(self.adata, field)
        state = self.setup.fields[field]
        if state["kind"] in ("categoricals", "continuouses"):
            import pandas as pd

            return pd.DataFrame(values, self.adata.obs_names, [column["key"] for column in state["columns"]])
        return values[:, None] if values.ndim == 1 else values

    def transfer_fields(self, adata_target: Data) -> SetupView:
        """The same setup for other data, which are checked; errors of ``Registry.check``."""
        self.setup.check(adata_target)
        return SetupView(adata_target, self.setup)

    def _keys(self) -> list[str]:
        """The fields of the model; covariates where it has some."""
        fields = self.setup.fields
        return [key for key, name in FIELDS.items() if name in fields and fields[name].get("columns") != []]

    def _field(self, key: str) -> str:
        if key not in self._keys():
            raise UnknownKeyError(unknown("registry_key", key, self._keys(), "a field of this model", "Fields"))
        return FIELDS[key]

    def _place(self, key: str) -> Named:
        state = self.setup.fields[FIELDS[key]]
        place: dict[str, Any] = {"attr_name": "obs", "attr_key": state.get("key")}
        if state["kind"] in ("matrix", "proteins") and state.get("key") is None:
            layer = state.get("layer")
            place = {"attr_name": "X" if layer is None else "layers", "attr_key": layer}
        elif state["kind"] in ("proteins", "embedding"):
            place["attr_name"] = "obsm"
        elif "columns" in state:
            place["attr_key"] = [column["key"] for column in state["columns"]]
        return Named(place | ({"mod_key": state["modality"]} if "modality" in state else {}))

    def _numbers(self, key: str) -> dict[str, int]:
        state = self.setup.fields[FIELDS[key]]
        part = "categories" if "categories" in state else NUMBERS.get(key)
        if key == "X":
            return {"n_cells": self.setup.n_cells, "n_vars": self.setup.n_features}
        return {} if part is None else {f"n_{key}": len(state[part])}

    def __getattr__(self, name: str) -> NoReturn:
        raise no_attribute(self, name)


def _array(values: list[Any]) -> np.ndarray:
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array
