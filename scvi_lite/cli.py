"""The ``scvi-lite`` command: train a model on a file, look into a model folder, see a demonstration.

Exit codes: 0 done, 1 failed, 2 a wrong call, 130 interrupted (what was trained until then is kept).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from scvi_lite import _run

INTERRUPTED = 130
OUT_FILES = "model.json, model.safetensors, adata.h5ad, training.png, umap.png and metrics.json"

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Deep generative models of single-cell data.",
    context_settings={"help_option_names": ["-h", "--help"]},
)
Debug = Annotated[bool, Option("--debug", help="Show the traceback of an error.")]
Out = Annotated[Path, Option("--out", "-o", help="Folder for the results.")]
Overwrite = Annotated[bool, Option("--overwrite", help="Write into a folder that is not empty.")]


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
        raise typer.Exit(2 if isinstance(error, _run.WrongCall) else 1) from None


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
        bool, Option("--version", callback=show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Options that come before the subcommand."""


@app.command()
def train(
    data: Annotated[Path, Argument(help="AnnData file (.h5ad) with counts.", show_default=False)],
    model: Annotated[str, Option(help=", ".join(_run.FROM_ONE_FILE) + ".")] = "SCVI",
    batch_key: Annotated[str | None, Option(help="Column of obs with the batch.")] = None,
    labels_key: Annotated[str | None, Option(help="Column of obs with the cell type.")] = None,
    unlabeled_category: Annotated[str | None, Option(help="SCANVI: the label of cells without one.")] = None,
    proteins: Annotated[str | None, Option(help="TOTALVI: key of obsm with the proteins.")] = None,
    layer: Annotated[str | None, Option(help="Layer with the counts; X if not given.")] = None,
    categorical_covariate: Annotated[
        list[str] | None, Option(help="Column of obs to correct for; may be repeated.")
    ] = None,
    continuous_covariate: Annotated[
        list[str] | None, Option(help="Column of obs to correct for; may be repeated.")
    ] = None,
    n_latent: Annotated[
        int | None, Option(min=1, show_default="by model", help="Dimensions of the latent space.")
    ] = None,
    max_epochs: Annotated[
        int | None, Option(min=1, show_default="by number of cells", help="Passes over the data.")
    ] = None,
    batch_size: Annotated[int | None, Option(min=1, show_default="by model", help="Cells in a minibatch.")] = None,
    early_stopping: Annotated[bool, Option("--early-stopping", help="Stop when validation is at rest.")] = False,
    accelerator: Annotated[str, Option(help="cpu, gpu, mps, auto, ...")] = "auto",
    devices: Annotated[str, Option(help="How many devices, or which, as Lightning reads it.")] = "auto",
    strategy: Annotated[str, Option(help="auto, ddp, ...")] = "auto",
    seed: Annotated[int, Option(help="The same seed gives the same model.")] = 0,
    umap: Annotated[bool, Option("--umap/--no-umap", help="Draw a UMAP of the latent space.")] = True,
    progress: Annotated[bool, Option("--progress/--no-progress", help="Show a progress bar.")] = True,
    out: Out = Path("scvi_lite_runs/run"),
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """Train a model on a file of counts.

    Writes the model, the data with its latent space, pictures and metrics to a folder.
    """
    with errors_in_one_line(debug):
        _run.check_model_name(model)
        _run.check_out(out, overwrite)
        adata = _run.read_counts(data)
        trained = _run.set_up(
            adata, model, n_latent, seed,
            layer=layer, batch_key=batch_key, labels_key=labels_key,
            unlabeled_category=unlabeled_category, protein_expression_obsm_key=proteins,
            categorical_covariate_keys=categorical_covariate or None,
            continuous_covariate_keys=continuous_covariate or None,
        )  # fmt: skip
        chosen = {"batch_size": batch_size, "early_stopping": early_stopping or None}  # else as the model does it
        interrupted = _run.fit(
            trained, max_epochs=max_epochs, accelerator=accelerator, devices=devices, strategy=strategy,
            enable_progress_bar=progress, **{name: value for name, value in chosen.items() if value is not None},
        )  # fmt: skip
        colors = [key for key in (labels_key, batch_key) if key is not None]
        metrics = _run.write_results(trained, out, colors, umap=umap, interrupted=interrupted)
        if metrics is not None:
            losses = ", ".join(f"{name} {metrics[name]:.2f}" for name in metrics if name.startswith("elbo_"))
            typer.echo(f"{metrics['epochs']} epochs, {losses or 'no loss'}; wrote {OUT_FILES} to {out}")
        exit_if(interrupted)


@app.command()
def info(
    folder: Annotated[Path, Argument(help="Folder with a saved model.", show_default=False)],
    as_json: Annotated[bool, Option("--json", help="Print JSON.")] = False,
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
    max_epochs: Annotated[int, Option(min=1, help="Passes over the data.")] = 200,
    seed: Annotated[int, Option(help="The same seed gives the same model.")] = 0,
    debug: Debug = False,
) -> None:
    """Train SCVI on 700 real blood cells and show what it learned."""
    with errors_in_one_line(debug):
        from scvi_lite.demo import run

        exit_if(run(out, max_epochs, seed))


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
