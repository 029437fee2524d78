"""The notebooks run, from the first cell to the last, in a real kernel."""

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[1] / "notebooks"


def execute(notebook, folder, timeout=240):
    """Run a notebook in a fresh kernel; one thread for each process, since two cores serve several."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
    client = NotebookClient(notebook, timeout=timeout, kernel_name="python3", resources={"metadata": {"path": folder}})
    client.execute(env=environment)
    return notebook


def printed(notebook):
    """All text that the cells put out."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output.get("text", "") or output.get("data", {}).get("text/plain", "") for output in outputs)


@pytest.mark.filterwarnings("ignore")  # of the kernel's client, not of ours
@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebook_runs(path, tmp_path):
    notebook = execute(nbformat.read(path, as_version=4), tmp_path)
    assert all(cell.get("execution_count") for cell in notebook.cells if cell.cell_type == "code")


@pytest.mark.filterwarnings("ignore")
def test_progress_and_history_reach_the_notebook(tmp_path):
    source = """
import scvi_lite
from scvi_lite.model import SCVI
adata = scvi_lite.data.simulate(n_cells=200, n_genes=20, seed=0)
SCVI.setup_anndata(adata, batch_key="batch")
model = SCVI(adata, n_latent=2)
model.train(max_epochs=2, accelerator="cpu", devices=2)
print("epochs:", len(model.history["elbo_train"]), "cells:", len(model.train_indices) + len(model.validation_indices))
"""
    # Classes of the notebook's own travel there and back; it goes on after an error.
    more = """
import lightning.pytorch as pl
class Mine(Exception):
    pass
class Fails(pl.Callback):
    def on_train_start(self, trainer, task):
        if trainer.global_rank == 1:
            raise Mine("of rank 1")
try:
    model.train(max_epochs=2, accelerator="cpu", devices=2, callbacks=[Fails()])
except Mine as error:
    print("caught", error, "after", len(model.history["elbo_train"]), "epochs")
"""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(text) for text in (source, more)])
    text = printed(execute(notebook, tmp_path))
    assert "epochs: 2 cells: 200" in text
    assert "2/2 epochs" in text
    assert "2 devices (cpu), each in a fresh process" in text
    assert "caught of rank 1 after 2 epochs" in text
