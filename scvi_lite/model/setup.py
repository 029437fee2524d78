"""Looking at what a model was set up with: in print, and by the names that scvi-tools has for it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from scvi_lite.data.registry import Registry, describe_field
from scvi_lite.data.view import Named, SetupView
from scvi_lite.errors import UnknownKeyError, unknown

if TYPE_CHECKING:
    from scvi_lite._typing import AnnData, Model


def adata_manager(model: Model) -> SetupView:
    """The setup of the model's own data, by the names that scvi-tools has for it; the same until either changes."""
    if model._view is None or model._view.setup is not model.registry:
        model._view = SetupView(model.adata, model.registry)
    return model._view


def get_anndata_manager(model: Model, adata: AnnData, required: bool = False) -> SetupView:
    """The setup of data that fit the model, which are checked; ``required`` makes no difference."""
    return SetupView(model._check(adata), model.registry)


def get_from_registry(model: Model, adata: AnnData, registry_key: str) -> Any:
    """The data of a field, as in ``model.get_from_registry(adata, "batch")``; KeyError where there is none."""
    return get_anndata_manager(model, adata).get_from_registry(registry_key)


def data_registry(model: Model, registry_key: str) -> Any:
    """The model's own data of a field."""
    return adata_manager(model).get_from_registry(registry_key)


def get_state_registry(model: Model, registry_key: str) -> Named:
    """What is known of a field, as in ``model.get_state_registry("batch").categorical_mapping``."""
    return adata_manager(model).get_state_registry(registry_key)


def get_setup_arg(model: Model, setup_arg: str) -> Any:
    """An argument of ``setup_anndata``, as it was given."""
    given = model.registry.setup_args
    if setup_arg not in given:
        raise UnknownKeyError(unknown("setup_arg", setup_arg, given, "an argument of this setup", "Arguments"))
    return given[setup_arg]


def summary_stats(model: Model) -> Named:
    """Numbers of cells, genes, batches and labels that the model was set up with, of covariates and proteins."""
    return adata_manager(model).summary_stats


def summary_string(model: Model) -> str:
    """The model in a few words, as it is printed."""
    return repr(model)


def load_registry(dir_path: str | Path, prefix: str | None = None) -> Registry:
    """The setup in a folder that :meth:`save`, or scvi-tools, wrote; errors of ``load``."""
    from scvi_lite.model.files import check_path, read_saved

    check_path(dir_path)
    return Registry.from_dict(read_saved(dir_path, prefix or "").registry)


def view_setup_args(dir_path: str | Path, prefix: str | None = None) -> None:
    """Print the arguments that the model in a folder was set up with."""
    setup = load_registry(dir_path, prefix)
    method = "setup_mudata" if setup.modalities else "setup_anndata"
    print(f"{setup.model_name}.{method}({', '.join(f'{name}={x!r}' for name, x in setup.setup_args.items())})")


def view_anndata_setup(model: Model, adata: AnnData | None = None, hide_state_registries: bool = False) -> None:
    """Print what the model reads from the data: each field, where it is and, unless hidden, its categories."""
    from rich.console import Console
    from rich.table import Table

    adata = model._check(adata)
    table = Table(title=f"{type(model).__name__}: {adata.n_obs} cells × {adata.n_vars} features")
    columns = ["field", "kind", "where"] if hide_state_registries else ["field", "kind", "where", "what"]
    for column in columns:
        table.add_column(column)
    for name, state in model.registry.fields.items():
        for where, what in describe_field(state):
            table.add_row(*[name, state["kind"], where, what][: len(columns)])
    Console().print(table)
