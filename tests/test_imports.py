"""What is not imported before it is needed: one fresh process does more and more, and looks at what is loaded."""

import subprocess
import sys

from test_io import example

import scvi_lite
from scvi_lite.io.folder import write_folder
from scvi_lite.model import SCVI

SCRIPT = """
import sys
from scvi_lite import cli

def absent(*names):
    assert not set(names) & set(sys.modules), set(names) & set(sys.modules)

def command(*arguments):
    sys.argv = ["scvi-lite", *arguments]
    try:
        cli.main()
    except SystemExit as end:
        assert not end.code, end.code

# To answer such questions nothing heavy is loaded.
for arguments in (["--version"], ["--help"], ["train", "--help"]):
    command(*arguments)
    absent("torch", "lightning", "anndata", "pandas", "matplotlib", "numpy")

from scvi_lite.io.folder import read_info
info = read_info("example")
print(info["class"], info["tensors"]["encoder.weight"], info["history"]["train_loss"]["value"][1])
absent("torch", "pandas", "numpy", "safetensors")

command("info", "model")
absent("torch", "anndata")

import scvi_lite.distributions.fused, scvi_lite.distributions.sparse
absent("scvi_lite.distributions.classes")

import scvi_lite.plot
absent("matplotlib")

import scvi_lite
from scvi_lite.model import SCVI
adata = scvi_lite.data.synthetic_iid(batch_size=20, n_genes=5)
SCVI.setup_anndata(adata)
model = SCVI(adata)
absent("mudata", "lightning.pytorch")

model.train(1)  # says that it loads Lightning
model.train(1)
"""


def test_nothing_is_imported_too_early():
    write_folder("example", example())
    adata = scvi_lite.data.synthetic_iid(batch_size=20, n_genes=6)
    SCVI.setup_anndata(adata)
    SCVI(adata, n_latent=2, n_hidden=4).save("model", save_anndata=True)
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "SCVI [3, 2] nan\n" in done.stdout
    assert done.stderr.count("Loading Lightning") == 1
    assert done.stderr.index("Loading Lightning") < done.stderr.index("Training:")
