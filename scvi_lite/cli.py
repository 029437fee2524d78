"""The ``scvi-lite`` command: train a model on a file, look into a model folder, see a demonstration.

Exit codes: 0 done, 1 failed, 2 a wrong call, 130 interrupted (what was trained until then is kept).
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

from scvi_lite.errors import listing, unknown

INTERRUPTED = 130
FROM_ONE_FILE = ("SCVI", "SCANVI", "LinearSCVI", "CondSCVI", "PEAKVI", "TOTALVI")
OUT_FILES = "model.json, model.safetensors, adata.h5ad, training.png, umap.png and metrics.json"

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Deep generative models of single-cell data.",
    context_settings={"help_option_names": ["-h", "--help"]},
)
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder for the results.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Write into a folder that is not empty.")]


class WrongCall(ValueError):
    """A value on the command line that can be refused before any file is read."""


def main() -> None:
    """Run the command with the arguments of the process, and exit."""
    os.environ.setdefault("MPLBACKEND", "Agg")  # pictures go to files: no display is needed
    app(prog_name="scvi-lite")


@contextmanager
def errors_in_one_line(debug: bool) -> Iterator[None]:
    """Turn an exception into a line on stderr and an exit code."""
    try:
        yield
    except typer.Exit:
        raise
    except KeyboardInterrupt:
        typer.echo("scvi-lite: interrupted; nothing was saved.", err=True)
        raise typer.Exit(INTERRUPTED) from None
    except Exception as error:
        if debug:
            raise
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        typer.echo(f"scvi-lite: {' '.join(str(message).split()) or type(error).__name__}", err=True)
        raise typer.Exit(2 if isinstance(error, WrongCall) else 1) from None


def exit_if(interrupted: bool) -> None:
    """Leave with the code of an interrupt, if there was one."""
    if interrupted:
        typer.echo("scvi-lite: interrupted; the model was saved as trained so far.", err=True)
        raise typer.Exit(INTERRUPTED)


def show_version(wanted: bool) -> None:
    """Print the version and stop, for ``--version``."""
    if wanted:
        typer.echo(f"scvi-lite {version('scvi-lite')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Options that come before the subcommand."""


@app.command()
def train(
    data: Annotated[Path, typer.Argument(help="AnnData file (.h5ad) with counts.", show_default=False)],
    model: Annotated[str, typer.Option(help=", ".join(FROM_ONE_FILE) + ".")] = "SCVI",
    batch_key: Annotated[str | None, typer.Option(help="Column of obs with the batch.")] = None,
    labels_key: Annotated[str | None, typer.Option(help="Column of obs with the cell type.")] = None,
    unlabeled_category: Annotated[str | None, typer.Option(help="SCANVI: the label of cells without one.")] = None,
    proteins: Annotated[str | None, typer.Option(help="TOTALVI: key of obsm with the proteins.")] = None,
    layer: Annotated[str | None, typer.Option(help="Layer with the counts; X if not given.")] = None,
    categorical_covariate: Annotated[
        list[str] | None, typer.Option(help="Column of obs to correct for; may be repeated.")
    ] = None,
    continuous_covariate: Annotated[
        list[str] | None, typer.Option(help="Column of obs to correct for; may be repeated.")
    ] = None,
    n_latent: Annotated[
        int | None, typer.Option(min=1, show_default="by model", help="Dimensions of the latent space.")
    ] = None,
    max_epochs: Annotated[
        int | None, typer.Option(min=1, show_default="by number of cells", help="Passes over the data.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, show_default="by model", help="Cells in a minibatch.")
    ] = None,
    early_stopping: Annotated[bool, typer.Option("--early-stopping", help="Stop when validation is at rest.")] = False,
    accelerator: Annotated[str, typer.Option(help="cpu, gpu, mps, auto, ...")] = "auto",
    devices: Annotated[str, typer.Option(help="How many devices, or which, as Lightning reads it.")] = "auto",
    strategy: Annotated[str, typer.Option(help="auto, ddp, ...")] = "auto",
    seed: Annotated[int, typer.Option(help="The same seed gives the same model.")] = 0,
    umap: Annotated[bool, typer.Option("--umap/--no-umap", help="Draw a UMAP of the latent space.")] = True,
    progress: Annotated[bool, typer.Option("--progress/--no-progress", help="Show a progress bar.")] = True,
    out: Out = Path("scvi_lite_runs/run"),
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """Train a model on a file of counts.

    Writes the model, the data with its latent space, pictures and metrics to a folder.
    """
    with errors_in_one_line(debug):
        check_model_name(model)
        check_out(out, overwrite)
        adata = read_counts(data)
        trained = set_up(
            adata, model, n_latent, seed,
            layer=layer, batch_key=batch_key, labels_key=labels_key,
            unlabeled_category=unlabeled_category, protein_expression_obsm_key=proteins,
            categorical_covariate_keys=categorical_covariate or None,
            continuous_covariate_keys=continuous_covariate or None,
        )  # fmt: skip
        interrupted = fit(
            trained,
            max_epochs=max_epochs,
            **({} if batch_size is None else {"batch_size": batch_size}),
            **({"early_stopping": True} if early_stopping else {}),
            accelerator=accelerator,
            devices=devices,
            strategy=strategy,
            enable_progress_bar=progress,
        )
        colors = [key for key in (labels_key, batch_key) if key is not None]
        metrics = write_results(trained, out, colors, umap=umap, interrupted=interrupted)
        if metrics is not None:
            losses = ", ".join(f"{name} {metrics[name]:.2f}" for name in metrics if name.startswith("elbo_"))
            typer.echo(f"{metrics['epochs']} epochs, {losses or 'no loss'}; wrote {OUT_FILES} to {out}")
        exit_if(interrupted)


@app.command()
def info(
    folder: Annotated[Path, typer.Argument(help="Folder with a saved model.", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Say what is in a model folder, without loading the weights."""
    from scvi_lite.io.folder import read_info

    with errors_in_one_line(debug):
        facts = describe(read_info(folder))
        if as_json:
            typer.echo(json.dumps(facts, indent=2))
            return
        for name, value in facts.items():
            shown = ", ".join(f"{k}={readable(v)}" for k, v in value.items()) if isinstance(value, dict) else value
            typer.echo(f"{name.replace('_', ' '):<12} {'none' if shown in ('', None) else shown}")


def readable(value: Any) -> str:
    """A value with five digits, where it is a number with a fraction.

    >>> readable(1234.5678), readable(0.1), readable(128)
    ('1234.6', '0.1', '128')
    """
    return f"{value:.5g}" if isinstance(value, float) else str(value)


@app.command()
def demo(
    out: Out = Path("demo_output"),
    max_epochs: Annotated[int, typer.Option(min=1, help="Passes over the data.")] = 200,
    seed: Annotated[int, typer.Option(help="The same seed gives the same model.")] = 0,
    debug: Debug = False,
) -> None:
    """Train SCVI on 700 real blood cells and show what it learned."""
    with errors_in_one_line(debug):
        from scvi_lite.demo import run

        exit_if(run(out, max_epochs, seed))


FLAGS = {
    "protein_expression_obsm_key": "--proteins",
    "categorical_covariate_keys": "--categorical-covariate",
    "continuous_covariate_keys": "--continuous-covariate",
}


def check_model_name(name: str) -> None:
    """Refuse the name of a model that there is not, or that needs more than a file of counts."""
    from scvi_lite import MODELS

    if name not in FROM_ONE_FILE:
        known = name in MODELS
        hint = f" {name} is made in Python: it needs more than one file of counts." if known else ""
        raise WrongCall(unknown("--model", name, FROM_ONE_FILE, "a model of this command", "Models") + hint)


def check_out(out: Path, overwrite: bool) -> None:
    """Refuse a place that cannot hold the results, before the time of a training is spent."""
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"--out '{out}' is a file: name a folder.")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise FileExistsError(f"--out '{out}' is not empty: add --overwrite, or name another folder.")
    existing = next(folder for folder in [out, *out.absolute().parents] if folder.exists())
    if not os.access(existing, os.W_OK):
        raise PermissionError(f"--out '{out}' cannot be written: '{existing}' is read-only.")


def read_counts(path: Path) -> Any:
    """Read an ``.h5ad`` file.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is a folder or another kind of file.
    """
    if not path.exists():
        raise FileNotFoundError(f"'{path}' does not exist.")
    import anndata
    import h5py

    if path.is_dir() or not h5py.is_hdf5(path):
        raise ValueError(f"'{path}' is not an .h5ad file; write one with adata.write_h5ad(path).")
    with h5py.File(path) as file:
        if not {"obs", "var"} <= set(file):
            raise ValueError(f"'{path}' is an HDF5 file, but not of an AnnData: it holds {listing(file)}.")
    return anndata.read_h5ad(path)


def set_up(adata: Any, model_name: str, n_latent: int | None, seed: int, **setup: Any) -> Any:
    """Make an untrained model of the data.

    Raises
    ------
    WrongCall
        If an option is missing that the model needs, or given that it does not have.
    """
    import inspect

    import scvi_lite

    scvi_lite.settings.seed = seed
    model_class = getattr(scvi_lite.model, model_name)
    given = {key: value for key, value in setup.items() if value is not None}
    _, *parameters = inspect.signature(model_class.setup_anndata).parameters.values()
    needed = [p.name for p in parameters if p.default is inspect.Parameter.empty]
    for name in [*given, *needed]:
        flag = FLAGS.get(name, "--" + name.replace("_", "-"))
        if name not in given:
            raise WrongCall(f"{model_name} needs {flag}.")
        if name not in [p.name for p in parameters]:
            raise WrongCall(f"{model_name} has no use for {flag}.")
    model_class.setup_anndata(adata, **given)
    return model_class(adata) if n_latent is None else model_class(adata, n_latent=n_latent)


def fit(model: Any, **arguments: Any) -> bool:
    """Train; true if the user interrupted, which train() says as a warning, once the model holds what it learned."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Training was interrupted", UserWarning)
        try:
            model.train(**arguments)
        except UserWarning:
            return True
    return False


def write_results(model: Any, out: Path, colors: list[str], umap: bool, interrupted: bool) -> dict[str, Any] | None:
    """Write the model with its data and latent space, pictures and metrics; on the first of several processes only."""
    from scvi_lite import plot

    if not model.trainer.is_global_zero:
        return None
    model.adata.obsm["X_scVI"] = model.get_latent_representation()
    out.mkdir(parents=True, exist_ok=True)
    if umap:
        plot.umap(model.adata, color=colors or None, save=out / "umap.png")
    model.save(out, overwrite=True, save_anndata=True)
    metrics = {
        "model": type(model).__name__,
        "n_cells": model.adata.n_obs,
        "n_genes": model.adata.n_vars,
        "epochs": max((len(frame) for frame in model.history.values()), default=0),
        "interrupted": interrupted,
        **{name: float(frame.iloc[-1, 0]) for name, frame in model.history.items() if len(frame)},
    }
    if "elbo_train" in metrics:
        plot.training_curves(model, save=out / "training.png")
    (out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    return metrics


def describe(info: dict[str, Any]) -> dict[str, Any]:
    """What a user wants to know of the contents of ``model.json``."""
    from scvi_lite.data.registry import Registry

    registry, history = Registry.from_dict(info["registry"]), info["history"]
    given = {key: value for key, value in registry.setup_args.items() if value}
    return {
        "model": info["class"],
        "version": info["version"],
        "trained": info["is_trained"],
        "epochs": max((len(column["epoch"]) for column in history.values()), default=0),
        "cells": registry.n_cells,
        "genes": registry.n_features,
        "set_up_with": given,
        "arguments": info["arguments"],
        "last_values": {name: float(column["value"][-1]) for name, column in history.items() if column["value"]},
        "data": info["data"],
        "bytes": info["weights"]["bytes"],
    }


if __name__ == "__main__":
    main()
