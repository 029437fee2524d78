"""The command as a shell user meets it: results, exit codes, and one line of error."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import anndata
import h5py
import pandas as pd
import pytest

from scvi_lite import cli, demo
from scvi_lite.data import simulate

COMMAND = [sys.executable, "-m", "scvi_lite.cli"]
QUICK = ["--max-epochs", "2", "--accelerator", "cpu", "--devices", "1", "--no-umap", "--no-progress"]


def call(*arguments, **options):
    environment = os.environ | {"COLUMNS": "200", "NO_COLOR": "1"}
    return subprocess.run(
        [*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=120, env=environment, **options
    )


@pytest.fixture
def here(capsys, monkeypatch):
    """Run the command in this process: exit code, stdout, stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["scvi-lite", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return ended.value.code or 0, out, err

    return run


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "cells.h5ad"
    simulate(n_cells=120, n_genes=30, n_types=2).write_h5ad(path)
    return path


@pytest.fixture(scope="module")
def folder(data, tmp_path_factory):
    """A folder that ``train`` wrote."""
    out = tmp_path_factory.mktemp("run") / "run"
    options = ["--batch-key", "batch", "--labels-key", "cell_type", "--n-latent", "4", "--out", str(out)]
    done = call("train", data, *QUICK, *options)
    assert done.returncode == 0, done.stderr
    assert "2 epochs" in done.stdout
    return out


def test_train_writes_everything(folder):
    names = {path.name for path in folder.iterdir()}
    assert names == {"model.json", "model.safetensors", "adata.h5ad", "training.png", "metrics.json"}
    adata = anndata.read_h5ad(folder / "adata.h5ad")
    assert adata.obsm["X_scVI"].shape == (120, 4)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["model"] == "SCVI" and metrics["epochs"] == 2 and metrics["interrupted"] is False
    assert metrics["elbo_train"] > 0 and metrics["n_cells"] == 120


def test_the_folder_is_a_model(folder):
    from scvi_lite import SCVI

    model = SCVI.load(folder)
    assert model.is_trained and model.registry.categories("batch_n") == ["batch_0", "batch_1"]
    again = model.get_latent_representation()
    assert abs(again - model.adata.obsm["X_scVI"]).max() < 1e-5


def test_info(folder, here):
    code, out, _ = here("info", folder)
    assert code == 0
    for part in ("SCVI", "120", "30", "n_latent=4", "batch_key=batch", "elbo_train="):
        assert part in out
    code, out, _ = here("info", folder, "--json")
    facts = json.loads(out)
    assert facts["model"] == "SCVI" and facts["epochs"] == 2 and facts["trained"] is True
    assert facts["last_values"]["elbo_train"] == json.loads((folder / "metrics.json").read_text())["elbo_train"]


def test_the_same_seed_gives_the_same_model(data, folder, here, tmp_path):
    options = ["--batch-key", "batch", "--labels-key", "cell_type", "--n-latent", "4", "--out", tmp_path / "again"]
    code, _, _ = here("train", data, *QUICK, *options)
    assert code == 0
    first, again = (json.loads((path / "metrics.json").read_text()) for path in (folder, tmp_path / "again"))
    assert again["elbo_validation" if "elbo_validation" in first else "elbo_train"] == pytest.approx(
        first["elbo_validation" if "elbo_validation" in first else "elbo_train"], rel=1e-4
    )


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["train", "nothing.h5ad"], 1, "'nothing.h5ad' does not exist"),
        (["train", "{text}"], 1, "is not an .h5ad file"),
        (["train", "{hdf5}"], 1, "but not of an AnnData"),
        (["train", "{data}", "--batch-key", "bach"], 1, "Did you mean 'batch'?"),
        (["train", "{data}", "--layer", "counts"], 1, "counts"),
        (
            ["train", "{data}", "--model", "SVCI"],
            2,
            "--model='SVCI' is not a model of this command. Did you mean 'SCVI'?",
        ),
        (["train", "{data}", "--model", "DestVI"], 2, "DestVI is made in Python"),
        (["train", "{data}", "--model", "SCANVI", "--labels-key", "cell_type"], 2, "SCANVI needs --unlabeled-category"),
        (["train", "{data}", "--model", "PEAKVI", "--proteins", "p"], 2, "PEAKVI has no use for --proteins"),
        (["train", "{data}", "--out", "{full}"], 1, "is not empty: add --overwrite"),
        (["train", "{data}", "--out", "{text}"], 1, "is a file: name a folder"),
        (["info", "{full}"], 1, "not a model folder"),
        (["info", "nowhere"], 1, "does not exist"),
    ],
)
def test_errors_are_one_line(arguments, code, message, here, data, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    (tmp_path / "text.h5ad").write_text("not HDF5")
    h5py.File(tmp_path / "other.h5ad", "w").close()
    places = {"data": data, "full": tmp_path / "full", "text": tmp_path / "text.h5ad", "hdf5": tmp_path / "other.h5ad"}
    found, out, err = here(*[argument.format(**places) for argument in arguments])
    assert found == code
    assert err.startswith("scvi-lite: ") and err.count("\n") == 1 and message in err
    assert out == "" and "Traceback" not in err


def test_overwrite(data, here, tmp_path):
    (tmp_path / "kept.txt").write_text("kept")
    code, _, _ = here("train", data, *QUICK, "--out", tmp_path, "--overwrite")
    assert code == 0 and (tmp_path / "kept.txt").read_text() == "kept" and (tmp_path / "model.json").exists()


def test_debug_shows_the_traceback():
    done = call("train", "nothing.h5ad", "--debug")
    assert done.returncode == 1 and "Traceback" in done.stderr


@pytest.mark.parametrize(
    "arguments", [["train"], ["train", "x.h5ad", "--max-epochs", "0"], ["nonsense"], ["info", "--x"]]
)
def test_usage_errors_exit_with_2(arguments, here):
    code, _, err = here(*arguments)
    assert code == 2 and "Usage" in err


def test_names_of_options_are_whole_in_a_narrow_window():
    done = subprocess.run(
        [*COMMAND, "train", "--help"], capture_output=True, text=True, env=os.environ | {"COLUMNS": "60"}
    )
    assert all(name in done.stdout for name in ("--unlabeled-category <", "--categorical-covariate <", "LinearSCVI"))


def test_interrupt_keeps_the_model(data, tmp_path):
    """Ctrl-C during training: what was trained is saved, and the exit code says so."""
    out = tmp_path / "run"
    arguments = ["train", data, "--max-epochs", "100000", "--accelerator", "cpu", "--devices", "1", "--no-umap"]
    process = subprocess.Popen(
        [*COMMAND, *map(str, arguments), "--out", str(out)], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=False
    )
    os.set_blocking(process.stderr.fileno(), False)
    seen, deadline = b"", time.monotonic() + 100
    while b"train=" not in seen and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
        seen += process.stderr.read() or b""
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=60)
    assert process.returncode == 130, seen + rest
    assert b"saved as trained so far" in rest and b"Traceback" not in rest
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["interrupted"] is True and metrics["epochs"] >= 1
    assert json.loads((out / "model.json").read_text())["is_trained"] is True


def test_demo(capsys, tmp_path):
    demo.run(tmp_path / "demo", max_epochs=3)
    names = {path.name for path in (tmp_path / "demo").iterdir()}
    assert names == {
        "model.json", "model.safetensors", "adata.h5ad", "training.png", "umap.png", "metrics.json",
        "differential_expression.csv", "volcano.png",
    }  # fmt: skip
    printed = capsys.readouterr().out
    assert "700 blood cells x 765 genes" in printed and "CD19+ B" in printed
    table = pd.read_csv(tmp_path / "demo" / "differential_expression.csv", index_col=0)
    assert len(table) == 10 * 765 and table["lfc_mean"].notna().all()


def test_pyproject_names_the_command():
    assert 'scvi-lite = "scvi_lite.cli:main"' in (Path(__file__).parents[1] / "pyproject.toml").read_text()
