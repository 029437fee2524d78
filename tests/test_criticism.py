"""Posterior predictive checks, against the formulas on dense arrays, and models that draw from the truth."""

import anndata
import numpy as np
import pytest
import torch
from scipy import sparse

import scvi_lite
from scvi_lite.criticism import LEVELS, PosteriorPredictiveCheck

RNG = np.random.default_rng(0)
MEAN_NG = RNG.gamma(2, 20, (60, 1)) * RNG.dirichlet(np.ones(8), 60)


class Drawing:
    """Stands in for a model that draws Poisson counts of some mean."""

    def __init__(self, mean_ng):
        self.mean_ng, self.rng = mean_ng, np.random.default_rng(1)

    def _check(self, adata):
        return adata

    def posterior_predictive_sample(self, adata, indices):
        return sparse.csr_array(self.rng.poisson(self.mean_ng[indices]))


@pytest.fixture(scope="module")
def check():
    adata = anndata.AnnData(sparse.csr_matrix(RNG.poisson(MEAN_NG), dtype=np.float32))
    models = {"truth": Drawing(MEAN_NG), "wrong": Drawing(3 * MEAN_NG.mean(0).repeat(60).reshape(8, 60).T)}
    return PosteriorPredictiveCheck(adata, models, n_samples=50)


def dense(check, model):
    return np.stack([x_ng.toarray() for x_ng in check.samples[model]])


@pytest.mark.parametrize(("dim", "metric", "axis"), [("cells", "cv_gene", 0), ("features", "cv_cell", 1)])
def test_variation_is_deviation_by_mean(check, dim, metric, axis):
    check.coefficient_of_variation(dim)
    frame, x_ng, x_sng = check.metrics[metric], check.raw_counts.toarray(), dense(check, "truth")
    assert list(frame) == ["truth", "wrong", "Raw"]
    assert frame.index.equals(check.adata.var_names if axis == 0 else check.adata.obs_names)
    np.testing.assert_allclose(frame["Raw"], x_ng.std(axis) / x_ng.mean(axis))
    expected = np.nan_to_num(x_sng.std(axis + 1) / np.maximum(x_sng.mean(axis + 1), 1e-12)).mean(0)
    np.testing.assert_allclose(frame["truth"], expected)


def test_share_of_zeros(check):
    check.zero_fraction()
    frame = check.metrics["zero_fraction"]
    np.testing.assert_allclose(frame["Raw"], (check.raw_counts.toarray() == 0).mean(0))
    np.testing.assert_allclose(frame["wrong"], (dense(check, "wrong") == 0).mean((0, 1)))
    assert abs(frame["truth"] - frame["Raw"]).max() < 0.1 < abs(frame["wrong"] - frame["Raw"]).max()


def test_calibration_is_that_of_quantiles_in_blocks_of_cells_too(check, monkeypatch):
    check.calibration_error()
    whole = check.metrics["calibration"]
    monkeypatch.setattr("scvi_lite.criticism.BLOCK", 50 * 8 * 7)
    check.calibration_error(LEVELS)
    np.testing.assert_allclose(check.metrics["calibration"], whole)
    x_ng, x_sng, expected = check.raw_counts.toarray(), dense(check, "wrong"), 0.0
    for low, high in zip(LEVELS[:7], LEVELS[:6:-1], strict=True):
        least_ng, most_ng = np.quantile(x_sng, [low, high], axis=0)
        expected += (((least_ng <= x_ng) & (x_ng <= most_ng)).mean() - (high - low)) ** 2
    assert whole["wrong"].item() == pytest.approx(expected)
    assert whole["truth"].item() < 0.1 * whole["wrong"].item()


@pytest.mark.parametrize("levels", [0.5, [], [0.1, 0.5, 0.9], [0.9, 0.1], [5, 95]])
def test_quantiles_that_are_no_pairs_are_refused(check, levels):
    with pytest.raises(ValueError, match="confidence_intervals="):
        check.calibration_error(levels)


def test_some_cells_of_a_layer_of_a_model():
    adata = scvi_lite.data.synthetic_iid(batch_size=20, n_genes=6, n_proteins=3, n_regions=0)
    adata.layers["counts"] = adata.X.copy()
    adata.X = np.zeros_like(adata.X)
    scvi_lite.model.TOTALVI.setup_anndata(adata, "protein_expression", layer="counts")
    models = {"untrained": scvi_lite.model.TOTALVI(adata, n_hidden=8)}
    with pytest.warns(UserWarning, match="not trained"):
        check = PosteriorPredictiveCheck(adata, models, "counts", n_samples=2, indices=[5, 3], modality="rna")
    np.testing.assert_array_equal(check.raw_counts.toarray(), adata.layers["counts"][[5, 3]])
    check.coefficient_of_variation("features")
    assert check.metrics["cv_cell"].index.tolist() == ["5", "3"] and "untrained" in repr(check)
    with pytest.raises(ValueError, match="modality='rn' .*Did you mean 'rna'"), pytest.warns(UserWarning):
        PosteriorPredictiveCheck(adata, models, "counts", modality="rn")
    with pytest.raises(KeyError, match="Did you mean 'counts'"):
        PosteriorPredictiveCheck(adata, models, "count")
    with pytest.raises(AttributeError, match="rank_genes_groups"):
        check.differential_expression("labels")


@pytest.mark.filterwarnings("ignore:.*not trained", "ignore:The genes of adata are in another order")
def test_genes_are_compared_by_name():
    """Data in another order than the model's, with a gene more, are compared gene by gene."""
    adata = scvi_lite.data.synthetic_iid(batch_size=40, n_genes=5, n_proteins=0, n_regions=0)
    scvi_lite.model.SCVI.setup_anndata(adata)
    model = scvi_lite.model.SCVI(adata, n_hidden=8)
    with torch.no_grad():  # gene_0 takes it all
        model.module.decoder.scale.bias.copy_(torch.tensor([9.0, 0, 0, 0, 0]))
    more = anndata.AnnData(adata.X[:, [2, 1, 0, 3, 4, 4]], adata.obs)
    more.var_names = ["gene_2", "gene_1", "gene_0", "gene_3", "gene_4", "other"]
    check = PosteriorPredictiveCheck(more, {"model": model}, n_samples=2)
    check.zero_fraction()
    frame = check.metrics["zero_fraction"]
    assert list(frame.index) == list(more.var_names[:5]) and frame["model"].idxmin() == "gene_0"
    np.testing.assert_array_equal(check.raw_counts.toarray(), np.asarray(more.X[:, :5]))


@pytest.mark.filterwarnings("ignore:.*not trained")
def test_proteins_beside_genes():
    adata = scvi_lite.data.synthetic_iid(batch_size=20, n_genes=6, n_proteins=3, n_regions=0)
    scvi_lite.model.TOTALVI.setup_anndata(adata, "protein_expression")
    models = {"TOTALVI": scvi_lite.model.TOTALVI(adata, n_hidden=8)}
    check = PosteriorPredictiveCheck(adata, models, n_samples=2, modality="protein")
    check.zero_fraction()
    assert check.metrics["zero_fraction"].index.tolist() == models["TOTALVI"].protein_names
    np.testing.assert_array_equal(check.raw_counts.toarray(), np.asarray(adata.obsm["protein_expression"]))
    adata.layers["counts"] = adata.X
    with pytest.raises(ValueError, match="count_layer_key='counts': the proteins"):
        PosteriorPredictiveCheck(adata, models, "counts", modality="protein")


def test_what_cannot_be_compared():
    adata = scvi_lite.data.synthetic_iid(batch_size=20, n_genes=6)
    with pytest.raises(ValueError, match="no cells"):
        PosteriorPredictiveCheck(adata, {}, indices=[])
    with pytest.raises(TypeError, match="models_dict=3: a dictionary"):
        PosteriorPredictiveCheck(adata, 3)
