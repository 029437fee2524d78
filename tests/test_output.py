"""Large answers: put into files and arrays without being whole in memory, the same numbers as in memory."""

import gc
import os
from pathlib import Path

import anndata
import h5py
import numpy as np
import pytest
import scipy.sparse as sp
import torch
import zarr

from scvi_lite import model as models
from scvi_lite.data import synthetic_iid

SIZES = {"MULTIVI": {"n_genes": 12, "n_regions": 8}}
QUESTIONS = [
    ("SCVI", "get_normalized_expression", {}),
    ("SCVI", "get_normalized_expression", {"n_samples": 3, "return_mean": False, "gene_list": ["gene_7", "gene_1"]}),
    ("SCVI", "get_normalized_expression", {"n_samples": 3, "library_size": "latent", "indices": [9, 3, 60]}),
    ("SCVI", "get_normalized_expression", {"n_samples_overall": 9, "transform_batch": ["batch_0", "batch_1"]}),
    ("SCVI", "get_likelihood_parameters", {"n_samples": 2}),
    ("SCVI", "posterior_predictive_sample", {}),
    ("SCVI", "posterior_predictive_sample", {"n_samples": 3, "gene_list": ["gene_7", "gene_1"]}),
    ("PEAKVI", "get_normalized_accessibility", {"transform_batch": ["batch_0", "batch_1"]}),
    ("MULTIVI", "get_normalized_accessibility", {"region_list": ["gene_14"]}),
    ("MULTIVI", "get_normalized_expression", {"n_samples": 2, "use_z_mean": False}),
    ("TOTALVI", "get_normalized_expression", {"n_samples": 2, "library_size": 100}),
    ("TOTALVI", "get_normalized_expression", {"n_samples": 2, "return_mean": False}),
    ("TOTALVI", "get_likelihood_parameters", {}),
    ("TOTALVI", "posterior_predictive_sample", {"n_samples": 2}),
]


def make(name, adata=None, **options):
    adata = synthetic_iid(batch_size=50, n_genes=20, n_proteins=5) if adata is None else adata
    proteins = {"protein_expression_obsm_key": "protein_expression"} if name == "TOTALVI" else {}
    kind = getattr(models, name)
    kind.setup_anndata(adata, batch_key="batch", **proteins)
    model = kind(adata, n_hidden=8, n_latent=3, **SIZES.get(name, {}), **options)
    model.is_trained = True
    return model


@pytest.fixture(scope="module")
def made():
    torch.manual_seed(0)
    return {name: make(name) for name in ("SCVI", "PEAKVI", "MULTIVI", "TOTALVI")}


def dense(value):
    return value.todense() if sp.issparse(value) else np.asarray(value)


def places(name, shape):
    """One of each kind that an answer of this shape can go to."""
    yield f"{name}.npy"
    yield Path("new_folder") / f"{name}.zarr"
    yield np.full(shape, np.nan)
    yield h5py.File(f"{name}.h5", "w").create_dataset("X", shape, "float32")


@pytest.mark.parametrize(("name", "question", "options"), QUESTIONS)
def test_is_the_answer_in_memory(made, name, question, options):
    ask, options = getattr(made[name], question), {"batch_size": 7, **options}
    torch.manual_seed(1)
    expected = ask(**options)
    parts = expected if isinstance(expected, dict) else dict(enumerate(expected if name == "TOTALVI" else [expected]))
    for outs in zip(*(places(part, value.shape) for part, value in parts.items())):
        by_name = dict(zip(parts, outs))
        out = by_name if isinstance(expected, dict) else outs if name == "TOTALVI" else outs[0]
        torch.manual_seed(1)
        answer = ask(**options, out=out)
        answers = answer if isinstance(expected, dict) else dict(enumerate(answer if name == "TOTALVI" else [answer]))
        for part, value in parts.items():
            kinds = {".npy": np.memmap, ".zarr": zarr.Array}
            if isinstance(by_name[part], str | Path):
                assert type(answers[part]) is kinds[Path(by_name[part]).suffix]
            else:
                assert answers[part] is by_name[part]
            np.testing.assert_array_equal(answers[part][:], dense(value))


def test_one_of_two_answers(made):
    rna, protein = made["TOTALVI"].get_normalized_expression(out=("rna.npy", None))
    assert isinstance(rna, np.memmap) and protein.columns.tolist() == made["TOTALVI"].protein_names


def test_no_cells(made):
    for place in ("none.npy", "none.zarr"):
        assert made["SCVI"].get_normalized_expression(indices=[], out=place).shape == (0, 20)


def test_layer_of_a_file(made):
    """The matrix of a backed AnnData is filled where it is."""
    adata = made["SCVI"].adata
    anndata.AnnData(np.zeros(adata.shape, np.float32), obs=adata.obs, var=adata.var).write_h5ad("denoised.h5ad")
    with h5py.File("denoised.h5ad", "r+") as file:
        made["SCVI"].get_normalized_expression(out=file["X"])
    np.testing.assert_allclose(anndata.read_h5ad("denoised.h5ad").X.sum(1), 1, rtol=1e-5)
    anndata.AnnData(sp.csr_matrix(adata.shape, dtype=np.float32)).write_h5ad("sparse.h5ad")
    backed = anndata.read_h5ad("sparse.h5ad", backed="r+")
    with pytest.raises(ValueError, match="Dataset of float32: an array of floating-point numbers"):
        made["SCVI"].get_normalized_expression(out=backed.X)
    backed.file.close()


@pytest.mark.parametrize(
    ("out", "error", "message"),
    [
        ("taken.npy", FileExistsError, "out='taken.npy' exists: remove it"),
        ("x.npz", ValueError, "Did you mean '.npy'"),
        (np.empty((20, 100), np.float32), ValueError, r"shape \(20, 100\); the answer has \(100, 20\)"),
        (np.empty((100, 20), int), ValueError, r"ndarray of int64: .* Write out=np.empty\(\(100, 20\), 'float32'\)"),
        (sp.random(100, 20, 0.1), ValueError, "an array of floating-point numbers"),
        ("expression", ValueError, "out='expression': the ending='' is not"),
        ([1.0], ValueError, "out is a list"),
        (np.broadcast_to(np.zeros(1), (100, 20)), ValueError, "cannot be written to"),
    ],
)
def test_refused_before_any_work(made, monkeypatch, out, error, message):
    Path("taken.npy").touch()
    monkeypatch.setattr(made["SCVI"].module, "decode", None)
    with pytest.raises(error, match=message):
        made["SCVI"].get_normalized_expression(out=out)
    assert os.listdir() == ["taken.npy"]


def test_refused_forms(made, monkeypatch):
    with pytest.raises(ValueError, match=r"as in out=\('rna.zarr', 'protein.npy'\)"):
        made["TOTALVI"].get_normalized_expression(out="rna.npy")
    with pytest.raises(TypeError, match="Did you mean 'rna'"):
        made["TOTALVI"].posterior_predictive_sample(out={"rma": "rna.npy"})
    for out in (("one.npy", Path("one.npy")), [np.zeros((100, 20))] * 2):
        with pytest.raises(ValueError, match="'rna' and 'protein' have the same place"):
            made["TOTALVI"].get_normalized_expression(out=out)
    with pytest.raises(ValueError, match="threshold and out"):
        made["PEAKVI"].get_normalized_accessibility(threshold=0.5, out="regions.npy")
    monkeypatch.setattr("shutil.disk_usage", lambda place: type("Usage", (), {"free": 1000}))
    with pytest.raises(OSError, match="No space left|GiB are|are free"):
        made["SCVI"].get_normalized_expression(out="expression.npy")
    assert not os.listdir()


@pytest.mark.parametrize("place", ["expression.npy", "expression.zarr"])
def test_what_is_interrupted_leaves_no_file(made, monkeypatch, place):
    module, calls = made["SCVI"].module, []
    expression = module.expression

    def interrupted(*given, **options):
        calls.append(os.listdir())
        if len(calls) == 3:
            raise KeyboardInterrupt
        return expression(*given, **options)

    monkeypatch.setattr(module, "expression", interrupted)
    with pytest.raises(KeyboardInterrupt):
        made["SCVI"].get_normalized_expression(out=place, batch_size=30)
    assert calls[-1] and place not in calls[-1]  # there was one, of another name
    assert not os.listdir()


N_CELLS, N_FEATURES = 20_000, 2_000
WHOLE = 4 * N_CELLS * N_FEATURES


def peak_of(call):
    """How far memory grows while something is called, in bytes, and what it gives."""

    def memory(key):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))

    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = memory("VmRSS")
    value = call()
    return memory("VmHWM") - before, value


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak of memory cannot be read")
@pytest.mark.parametrize(
    ("name", "question", "options", "times"),
    [
        ("SCVI", "get_normalized_expression", {}, 1),
        ("SCVI", "get_normalized_expression", {"out": "expression.npy"}, 0),
        ("SCVI", "get_normalized_expression", {"out": "expression.zarr"}, 0),
        ("TOTALVI", "get_normalized_expression", {}, 1),
        ("TOTALVI", "get_normalized_expression", {"out": ("rna.npy", None)}, 0),
        ("PEAKVI", "get_normalized_accessibility", {}, 1),
        ("PEAKVI", "get_normalized_accessibility", {"out": "regions.npy"}, 0),
        ("PEAKVI", "get_normalized_accessibility", {"threshold": 0.9999, "return_numpy": True}, 0),
    ],
)
def test_memory(name, question, options, times):
    """An answer is in memory once, or, put elsewhere, not at all."""
    x = sp.random(N_CELLS, N_FEATURES, density=0.01, format="csr", dtype=np.float32, random_state=0)
    x.data[:] = 1
    adata = anndata.AnnData(x)
    adata.obs["batch"] = "one"
    adata.obsm["protein_expression"] = np.ones((N_CELLS, 2), np.float32)
    model = make(name, adata)
    getattr(model, question)(indices=range(2000))  # what is kept for later is there
    peak, _ = peak_of(lambda: getattr(model, question)(**options))
    assert (times - 0.1) * WHOLE < peak < (times + 0.6) * WHOLE
