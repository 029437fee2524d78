"""Embedded and simulated data: exact counts, the peer's names, and a truth that the counts agree with."""

import warnings

import mudata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata import read_h5ad
from scipy import stats

from scvi_lite.data import datasets, simulator
from scvi_lite.data.datasets import pbmc68k_reduced, simulate, synthetic_iid


def test_pbmc_counts_are_exact():
    """Undoing scanpy's normalisation gives integers, but for its rounding to three decimals."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adata = pbmc68k_reduced()
    raw, _, _ = datasets._unrounded_pbmc68k()
    assert np.abs(raw.data - np.rint(raw.data)).max() < 0.11
    assert np.array_equal(adata.X.toarray(), np.rint(raw.toarray()))
    # and redoing it on the integers gives the shipped numbers, to those three decimals
    import scanpy

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shipped = scanpy.datasets.pbmc68k_reduced()
    total_n = shipped.obs["n_counts"].to_numpy()[:, None]
    again = np.log1p(adata.X.toarray() / total_n * 1e4)
    assert np.abs(again - shipped.raw.X.toarray()).max() < 0.05
    assert np.median(np.abs(again - shipped.raw.X.toarray())[adata.X.toarray() > 0]) < 5e-4


def test_pbmc_is_as_described():
    adata = pbmc68k_reduced()
    assert adata.shape == (700, 765)
    assert sp.issparse(adata.X) and adata.X.format == "csr" and adata.X.dtype == np.float32
    assert adata.X.data.min() == 1 and adata.X.data.max() == 259 and adata.X.sum() == 486651
    assert adata.var_names.is_unique and {"CD8A", "NKG7", "CST3"} <= set(adata.var_names)
    assert adata.obs["bulk_labels"].value_counts()["Dendritic"] == 240
    assert {"louvain", "phase", "n_counts"} <= set(adata.obs)
    assert (np.asarray(adata.X.sum(1)).ravel() <= adata.obs["n_counts"]).all()
    assert adata.raw is None


def test_synthetic_iid_has_the_known_names():
    adata = synthetic_iid(generate_coordinates=True)
    assert adata.shape == (400, 100) and adata.X.dtype == np.int64
    assert adata.obs_names[:2].tolist() == ["0", "1"] and adata.var_names[:2].tolist() == ["gene_0", "gene_1"]
    assert adata.obs["batch"].cat.categories.tolist() == ["batch_0", "batch_1"]
    assert (adata.obs["batch"].to_numpy() == np.repeat(["batch_0", "batch_1"], 200)).all()
    assert adata.obs["labels"].cat.categories.tolist() == ["label_0", "label_1", "label_2"]
    assert set(adata.obsm) == {"accessibility", "protein_expression", "coordinates"}
    assert adata.uns["protein_names"][:2].tolist() == ["protein_0", "protein_1"]


def test_synthetic_iid_with_other_names():
    names = {"batch_key": "donor", "rna_key": "RNA", "protein_expression_key": "ADT", "protein_names_prefix": "CD"}
    mdata = synthetic_iid(batch_size=5, n_genes=4, n_proteins=2, n_regions=3, return_mudata=True, **names)
    assert list(mdata.mod) == ["RNA", "accessibility", "ADT"] and list(mdata.obs) == ["donor", "labels"]
    assert mdata["ADT"].var_names.tolist() == ["CD_0", "CD_1"]
    adata = synthetic_iid(batch_size=5, n_genes=4, n_proteins=2, n_regions=0, protein_names_key="markers", **names)
    assert set(adata.obsm) == {"ADT"} and adata.uns["markers"].tolist() == ["CD_0", "CD_1"]
    with pytest.raises(TypeError, match="Did you mean 'batch_key'"):
        synthetic_iid(bach_key="donor")


def test_synthetic_iid_that_is_no_counts():
    adata = synthetic_iid(batch_size=2000, n_genes=10, n_proteins=0, n_regions=0, rna_dist="normal", seed=0)
    kept = adata.X[adata.X != 0]
    assert abs(kept.mean() - 5) < 0.05 and abs(kept.std() - 2) < 0.05 and abs((adata.X != 0).mean() - 0.7) < 0.01
    with pytest.raises(ValueError, match="rna_dist='gamma'"):
        synthetic_iid(rna_dist="gamma")


def test_synthetic_iid_moments():
    adata = synthetic_iid(batch_size=2000, seed=1)
    mean, variance = stats.nbinom.stats(5, 0.3)
    counts = adata.X
    assert abs(counts.mean() - 0.7 * mean) < 0.05
    assert abs((counts == 0).mean() - 0.3 - 0.7 * stats.nbinom.pmf(0, 5, 0.3)) < 0.003
    assert abs(adata.obsm["protein_expression"].var() / variance - 1) < 0.02


def test_synthetic_iid_leaves_parts_away():
    adata = synthetic_iid(n_proteins=0, n_regions=0, n_labels=0, n_batches=1)
    assert list(adata.obs) == ["batch"] and not adata.obsm and not adata.uns


@pytest.mark.parametrize("name", ["csr_matrix", "csc_matrix", "csr_array", "csc_array"])
def test_synthetic_iid_sparse(name):
    adata = synthetic_iid(batch_size=20, sparse_format=name)
    assert type(adata.X).__name__ == type(adata.obsm["accessibility"]).__name__ == name


def test_synthetic_iid_as_mudata():
    mdata = synthetic_iid(return_mudata=True, sparse_format="csr_matrix", generate_coordinates=True)
    assert isinstance(mdata, mudata.MuData) and mdata.shape == (400, 300)
    assert list(mdata.mod) == ["rna", "accessibility", "protein_expression"]
    assert list(mdata.obs) == ["batch", "labels"] and mdata.obsm["coordinates"].shape == (400, 2)
    assert mdata["accessibility"].var_names[0] == "region_0" and not len(mdata["rna"].obs.columns)


def test_synthetic_iid_follows_the_global_seed():
    np.random.seed(3)
    first = synthetic_iid().X
    np.random.seed(3)
    assert np.array_equal(first, synthetic_iid().X)
    assert not np.array_equal(first, synthetic_iid().X)


def test_synthetic_iid_refuses():
    with pytest.raises(ValueError, match="sparse_format='csr'.*Did you mean 'csr_"):
        synthetic_iid(sparse_format="csr")
    with pytest.raises(ValueError, match="at least 1"):
        synthetic_iid(n_batches=0)


def rates(adata):
    """The mean of each count, from the recorded truth alone."""
    types, batches = adata.obs["cell_type"].cat.codes, adata.obs["batch"].cat.codes
    rho_ng = (adata.varm["scale"].to_numpy()[:, types] * np.exp(adata.varm["batch_effect"].to_numpy())[:, batches]).T
    return adata.obs["library"].to_numpy()[:, None] * rho_ng / rho_ng.sum(1, keepdims=True)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_simulated_counts_have_the_stated_moments(dropout):
    """Standardised by the recorded mean and variance, counts average to 0 and their squares to 1."""
    adata = simulate(n_cells=4000, n_genes=100, dropout=dropout, seed=2)
    mu_ng, theta_g = rates(adata), adata.var["theta"].to_numpy()
    mean_ng = (1 - dropout) * mu_ng
    variance_ng = (1 - dropout) * (mu_ng + mu_ng**2 / theta_g + mu_ng**2) - mean_ng**2
    score_ng = (adata.X.toarray() - mean_ng) / np.sqrt(variance_ng)
    assert abs(score_ng.mean()) * np.sqrt(score_ng.size) < 4
    assert np.abs(score_ng.mean(0) * np.sqrt(4000)).max() < 4.5
    assert abs((score_ng**2).mean() - 1) < 0.02


def test_simulated_counts_are_negative_binomial():
    adata = simulate(n_cells=20_000, n_genes=20, depth=50, seed=1)
    mu_ng, theta_g = rates(adata), adata.var["theta"].to_numpy()
    zero_ng = stats.nbinom.pmf(0, theta_g, theta_g / (theta_g + mu_ng))
    observed_g = (adata.X.toarray() == 0).mean(0)
    assert np.abs(observed_g - zero_ng.mean(0)).max() < 4.5 * 0.5 / np.sqrt(20_000)


def test_simulated_truth_is_consistent():
    adata = simulate(n_cells=500, n_genes=300, n_types=5, n_batches=3)
    scale, lfc, differential = adata.varm["scale"], adata.varm["lfc"], adata.varm["differential"]
    np.testing.assert_allclose(scale.sum(), 1.0, rtol=1e-12)
    np.testing.assert_allclose(scale, adata.var["baseline"].to_numpy()[:, None] * 2.0**lfc, rtol=1e-9)
    assert (differential.sum() == 60).all() and ((lfc != 0) == differential).all(None)
    assert lfc.abs().to_numpy()[differential.to_numpy()].min() > 0.5
    assert (differential.sum(axis=1) < 5).any() and not differential["type_0"].equals(differential["type_1"])
    np.testing.assert_allclose(adata.varm["batch_effect"].mean(axis=1), 0, atol=1e-12)
    assert abs(np.log(adata.obs["library"] / 2000).mean()) < 0.1
    assert abs(np.log(adata.obs["library"]).std() / 0.4 - 1) < 0.15


def test_null_genes_show_no_difference_and_others_do():
    """A t-test on proportions rejects a null gene as often as its level says, and finds the true ones."""
    adata = simulate(n_cells=3000, n_genes=400, n_types=2, n_batches=1, dispersion=20, seed=4)
    share = adata.X.toarray() / adata.obs["library"].to_numpy()[:, None]
    first = (adata.obs["cell_type"] == "type_0").to_numpy()
    p_value = stats.ttest_ind(share[first], share[~first]).pvalue
    true = adata.varm["lfc"]["type_0"] != adata.varm["lfc"]["type_1"]
    n_null = (~true).sum()
    assert stats.binomtest((p_value[~true] < 0.05).sum(), n_null, 0.05).pvalue > 1e-3
    assert (p_value[true] < 0.05).mean() > 0.8


def test_simulate_composition_and_seed():
    adata = simulate(n_cells=3000, n_genes=10, n_types=2, composition_bt=[[0.9, 0.1], [0.0, 1.0]])
    table = pd.crosstab(adata.obs["batch"], adata.obs["cell_type"], normalize="index")
    assert abs(table.loc["batch_0", "type_0"] - 0.9) < 0.03 and table.loc["batch_1", "type_1"] == 1
    again = simulate(n_cells=3000, n_genes=10, n_types=2, composition_bt=[[0.9, 0.1], [0.0, 1.0]])
    assert (adata.X != again.X).nnz == 0
    assert (adata.X != simulate(n_cells=3000, n_genes=10, n_types=2, seed=1).X).nnz > 0


def test_simulate_in_chunks(monkeypatch):
    monkeypatch.setattr(simulator, "CELLS_PER_CHUNK", 64)
    adata = simulate(n_cells=130, n_genes=10)
    assert adata.shape == (130, 10) and adata.X.has_canonical_format


def test_simulated_data_survive_a_file(tmp_path):
    adata = simulate(n_cells=50, n_genes=10)
    adata.write_h5ad(tmp_path / "simulated.h5ad")
    again = read_h5ad(tmp_path / "simulated.h5ad")
    pd.testing.assert_frame_equal(again.varm["lfc"], adata.varm["lfc"])
    assert again.uns["simulation"]["seed"] == 0


def test_simulate_without_differences():
    adata = simulate(n_cells=10, n_genes=10, differential_share=0)
    assert not adata.varm["differential"].any(axis=None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_genes": 1}, "n_genes"),
        ({"dropout": 1.5}, "dropout=1.5"),
        ({"differential_share": -0.1}, "differential_share"),
        ({"composition_bt": np.ones((3, 4))}, "2 batches by 4 types"),
    ],
)
def test_simulate_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        simulate(**arguments)
