"""Decoded expression, parameters and samples: recorded answers, scipy, and minified data."""

from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse, stats

from scvi_lite.analysis import predictive
from scvi_lite.data import simulate
from scvi_lite.model import SCVI
from scvi_lite.nn import vae

GOLDEN = Path(__file__).parents[2] / "shared" / "golden"
CASES = [
    "scvi_default",
    "scvi_library_latent",
    "scvi_size_factor",
    "scvi_gene_cell_dispersion",
    "scvi_covariates_encoded",
]


@pytest.fixture
def at_the_mean(monkeypatch):
    """Draws from a posterior are its mean, as in the recorded answers."""

    def mean(loc, scale, n_samples=None):
        return loc if n_samples is None else loc.expand(n_samples, *loc.shape)

    monkeypatch.setattr(vae, "draw_normal", mean)


def make(**options):
    adata = simulate(n_cells=90, n_genes=25, n_types=2, n_batches=3)
    SCVI.setup_anndata(adata, batch_key="batch")
    model = SCVI(adata, n_latent=4, n_hidden=16, **options)
    model.is_trained = True
    return model


@pytest.fixture
def model():
    return make()


@pytest.mark.skipif(not GOLDEN.exists(), reason="no recorded answers")
@pytest.mark.parametrize("case", CASES)
def test_recorded_parameters(case, at_the_mean):
    model, recorded = SCVI.load(GOLDEN / case, accelerator="cpu"), np.load(GOLDEN / case / "outputs.npz")
    tolerance = {"rtol": 2e-4, "atol": 1e-7}
    np.testing.assert_allclose(model.get_normalized_expression(return_numpy=True), recorded["px_scale"], **tolerance)
    found = model.get_likelihood_parameters()
    np.testing.assert_allclose(found["mean"], recorded["px_mu"], **tolerance)
    np.testing.assert_allclose(
        found["dispersions"], np.broadcast_to(recorded["px_theta"], found["mean"].shape), **tolerance
    )
    assert ("dropout" in found) == ("px_zi_logits" in recorded)
    if "dropout" in found:
        np.testing.assert_allclose(found["dropout"], 1 / (1 + np.exp(-recorded["px_zi_logits"])), **tolerance)
    latent = model.get_normalized_expression(library_size="latent", return_numpy=True)
    np.testing.assert_allclose(latent, recorded["px_mu"], **tolerance)


def test_genes_library_and_batches(model, at_the_mean):
    whole = model.get_normalized_expression()
    np.testing.assert_allclose(whole.sum(axis=1), 1, rtol=1e-5)
    some = model.get_normalized_expression(gene_list=["gene_9", "gene_2"], library_size=1e4, indices=[70, 4])
    pd.testing.assert_frame_equal(some, whole.iloc[[70, 4]][["gene_9", "gene_2"]] * 1e4, rtol=1e-4)
    one, two = (model.get_normalized_expression(transform_batch=name) for name in ("batch_0", 2))
    both = model.get_normalized_expression(transform_batch=["batch_0", "batch_2"])
    pd.testing.assert_frame_equal(both, (one + two) / 2, rtol=1e-4)
    own = np.flatnonzero(model.adata.obs["batch"] == "batch_0")
    pd.testing.assert_frame_equal(one.iloc[own], whole.iloc[own], rtol=1e-4)
    assert np.abs(one.to_numpy() - two.to_numpy()).max() > 1e-4
    pd.testing.assert_frame_equal(model.get_normalized_expression(batch_size=7), whole, rtol=1e-4)


def test_genes_of_a_model_with_size_factors(at_the_mean):
    adata = simulate(n_cells=40, n_genes=12)
    adata.obs["factor"] = np.linspace(0.5, 2, 40)
    SCVI.setup_anndata(adata, size_factor_key="factor")
    model = SCVI(adata, n_hidden=16)
    model.is_trained = True
    whole = model.get_normalized_expression(library_size="latent")
    some = model.get_normalized_expression(library_size="latent", gene_list=["gene_3"])
    pd.testing.assert_frame_equal(some, whole[["gene_3"]], rtol=1e-4)
    scale = model.get_normalized_expression().mul(adata.obs["factor"], axis=0)
    np.testing.assert_allclose(scale, whole, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "shape", "kind"),
    [
        ({}, (90, 25), pd.DataFrame),
        ({"return_numpy": True}, (90, 25), np.ndarray),
        ({"n_samples": 3}, (90, 25), pd.DataFrame),
        ({"n_samples": 3, "return_mean": False}, (3, 90, 25), np.ndarray),
        ({"n_samples": 1, "return_mean": False}, (90, 25), pd.DataFrame),
        ({"n_samples_overall": 11}, (11, 25), np.ndarray),
        ({"n_samples_overall": 11, "transform_batch": ["batch_0", "batch_1"]}, (11, 25), np.ndarray),
        ({"n_samples_overall": 5, "gene_list": ["gene_1"], "indices": [3]}, (5, 1), np.ndarray),
    ],
)
def test_shapes(model, options, shape, kind):
    value = model.get_normalized_expression(**options)
    assert isinstance(value, kind) and value.shape == shape
    assert np.asarray(value).dtype == np.float32


def test_samples_average_to_the_expectation(model):
    """Means over samples, and over cells drawn at random, agree with the draws within sampling error."""
    draws = model.get_normalized_expression(n_samples=400, return_mean=False)
    error = draws.std(0) / np.sqrt(400) + 1e-9
    mean = model.get_normalized_expression(n_samples=400, return_numpy=True)
    assert np.abs((mean - draws.mean(0)) / error).mean() < 1.5
    overall = model.get_normalized_expression(n_samples_overall=4000)
    spread = draws.reshape(-1, 25).std(0) / np.sqrt(4000)
    assert (np.abs(overall.mean(0) - draws.mean((0, 1))) < 6 * spread).all()


@pytest.mark.parametrize("gene_likelihood", ["nb", "zinb", "poisson"])
def test_predictive_samples_have_the_moments_of_the_likelihood(gene_likelihood, at_the_mean):
    model = make(gene_likelihood=gene_likelihood)
    draws = model.posterior_predictive_sample(n_samples=300).todense()
    assert draws.shape == (90, 25, 300)
    found = model.get_likelihood_parameters()
    keep = 1 - found["dropout"] if "dropout" in found else 1
    variance = found["mean"] * keep
    if "dispersions" in found:
        variance = variance * (1 + found["mean"] / found["dispersions"] + found["mean"] * (1 - keep))
    standardised = (draws.mean(-1) - found["mean"] * keep) / np.sqrt(variance / 300)
    assert abs(standardised.mean()) < 0.1 and 0.85 < standardised.std() < 1.15


def test_predictive_samples_are_sparse_and_of_the_genes_asked_for(model, at_the_mean):
    one = model.posterior_predictive_sample(gene_list=["gene_4", "gene_0"], indices=[5, 2, 80])
    assert isinstance(one, sparse.csr_array) and one.shape == (3, 2) and one.dtype == np.float32
    whole = model.posterior_predictive_sample(n_samples=200).todense()[[5, 2, 80]][:, [4, 0]]
    some = model.posterior_predictive_sample(
        gene_list=["gene_4", "gene_0"], indices=[5, 2, 80], n_samples=200
    ).todense()
    assert stats.ks_2samp(whole.ravel(), some.ravel()).pvalue > 1e-4
    batches = model.posterior_predictive_sample(transform_batch=["batch_0", "batch_1"], n_samples=2)
    assert batches.shape == (90, 25, 2)


def test_correlation_against_scipy():
    x = np.random.default_rng(0).poisson(1.0, size=(50, 6)).astype(np.float32)
    np.testing.assert_allclose(predictive.correlation(x, "spearman"), stats.spearmanr(x).statistic, atol=1e-12)
    np.testing.assert_allclose(predictive.correlation(x, "pearson"), np.corrcoef(x.T.astype(float)), atol=1e-12)
    assert np.isnan(predictive.correlation(np.ones((5, 2), np.float32), "pearson")).all()


def test_feature_correlation(model, monkeypatch):
    """With draws of the rates replaced by their means, the matrix is the correlation of the decoded means."""
    monkeypatch.setattr(vae, "draw_normal", lambda loc, scale, n_samples=None: loc)
    monkeypatch.setattr(predictive, "denoised", lambda rates: rates.mu_ng)
    found = model.get_feature_correlation_matrix(n_samples=2, correlation_type="pearson")
    expected = np.corrcoef(model.get_normalized_expression(return_numpy=True, library_size=1000).T.astype(float))
    np.testing.assert_allclose(found, expected, atol=1e-3)
    assert list(found.index) == list(found.columns) == model.get_var_names()


def test_denoised_rates_are_gamma():
    model = make(gene_likelihood="nb")
    for batch in model._minibatches():
        rates = predictive.draw_rates(model, batch)
        rates.log_theta = torch.full((25,), 2.0).log()
        draws = torch.stack([predictive.denoised(rates) for _ in range(100)]) / rates.mu_ng
    assert stats.kstest(draws.numpy().ravel(), stats.gamma(a=2, scale=0.5).cdf).pvalue > 1e-4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gene_list": ["gene_1", "Gene_2"]}, "Did you mean 'gene_2'"),
        ({"gene_list": []}, "gene_list is empty"),
        ({"gene_list": "gene_1"}, r"gene_list=\['gene_1'\]"),
        ({"transform_batch": "batsh_1"}, "Did you mean 'batch_1'"),
        ({"transform_batch": 7}, "'batch_2'"),
        ({"library_size": 0}, "library_size=0"),
        ({"library_size": "laten"}, "Did you mean 'latent'"),
        ({"n_samples": 0}, "n_samples=0"),
        ({"n_samples": 1.5}, "n_samples=1.5"),
        ({"n_samples_overall": 0}, "n_samples_overall=0"),
        ({"n_samples": 2, "n_samples_overall": 2}, "use one of them"),
        ({"weights": "importance"}, "give n_samples_overall"),
        ({"weights": "import"}, "Did you mean 'importance'"),
        ({"n_samples_overall": 3, "indices": []}, "no cells"),
    ],
)
def test_refused(model, options, message):
    with pytest.raises(ValueError, match=message):
        model.get_normalized_expression(**options)


def test_refused_elsewhere(model):
    with pytest.raises(TypeError, match="Did you mean 'max_cells'"):
        model.get_normalized_expression(n_samples_overall=2, importance_weighting_kwargs={"max_cell": 3})
    with pytest.raises(ValueError, match="Did you mean 'pearson'"):
        model.get_feature_correlation_matrix(correlation_type="pearsn")
    with pytest.raises(ValueError, match="at least two"):
        model.get_feature_correlation_matrix(indices=[1])
    with pytest.raises(ValueError, match="n_samples=0"):
        model.posterior_predictive_sample(n_samples=0)


def test_importance_weights_give_expression(model):
    value = model.get_normalized_expression(
        n_samples_overall=50, weights="importance", importance_weighting_kwargs={"max_cells": 20, "n_mc_samples": 50}
    )
    np.testing.assert_allclose(value.sum(1), 1, rtol=1e-5)


# Minified data ----------------------------------------------------------------------------------------------------


def test_minified_data_answer_as_before(model, at_the_mean, tmp_path):
    before = model.adata
    before.layers["more"] = before.X.copy()
    answers = {
        "latent": lambda m: m.get_latent_representation(),
        "expression": lambda m: m.get_normalized_expression(library_size="latent", return_numpy=True),
        "mean": lambda m: m.get_likelihood_parameters()["mean"],
    }
    expected = {name: answer(model) for name, answer in answers.items()}
    _, variance = model.get_latent_representation(return_dist=True)
    assert model.minified_data_type is None
    model.minify_adata()
    assert model.minified_data_type == "latent_posterior_parameters"
    assert model.adata.X.nnz == model.adata.layers["more"].nnz == 0 and model.adata.raw is None
    np.testing.assert_allclose(model.adata.obsm["X_latent_qzv"], variance, rtol=1e-5)
    assert before.X.nnz > 0 and "X_latent_qzm" not in before.obsm and "observed_lib_size" not in before.obs
    model.save(tmp_path / "model", save_anndata=True)
    loaded = SCVI.load(tmp_path / "model", accelerator="cpu")
    for name, answer in answers.items():
        np.testing.assert_allclose(answer(model), expected[name], rtol=1e-4, err_msg=name)
        np.testing.assert_allclose(answer(loaded), expected[name], rtol=1e-4, err_msg=name)
    de = loaded.differential_expression(groupby="cell_type", mode="change", silent=True, n_samples_overall=50)
    assert de["raw_mean1"].isna().all() and de["lfc_mean"].notna().all()
    assert loaded.minified_data_type == "latent_posterior_parameters"
    anndata.read_h5ad(tmp_path / "model" / "adata.h5ad")


@pytest.mark.parametrize("question", ["get_elbo", "get_reconstruction_error", "get_marginal_ll", "train"])
def test_minified_data_have_no_counts(model, question):
    model.minify_adata()
    with pytest.raises(RuntimeError, match="minified"):
        getattr(model, question)()
    with pytest.raises(RuntimeError, match="minified"):
        model.differential_expression(groupby="cell_type", weights="importance", silent=True)


def test_minified_data_that_keep_counts(model, at_the_mean):
    elbo = model.get_elbo()
    model.minify_adata("latent_posterior_parameters_with_counts")
    assert model.minified_data_type == "latent_posterior_parameters_with_counts"
    assert float(model.get_elbo()) == pytest.approx(float(elbo), rel=1e-5)
    model.minify_adata()
    with pytest.raises(RuntimeError, match="none left"):
        model.minify_adata("latent_posterior_parameters_with_counts")


def test_minify_takes_a_given_posterior(model):
    model.adata.obsm["m"], model.adata.obsm["v"] = np.full((90, 4), 2.0), np.full((90, 4), 0.25)
    with pytest.raises(KeyError, match="use_latent_qzv_key"):
        model.minify_adata(use_latent_qzm_key="m", use_latent_qzv_key="w")
    model.minify_adata(use_latent_qzm_key="m", use_latent_qzv_key="v")
    loc, variance = model.get_latent_representation(return_dist=True)
    assert (loc == 2).all() and np.allclose(variance, 0.25)
    z = model.get_latent_representation(give_mean=False)
    assert abs(z.std() - 0.5) < 0.1


def test_minify_refuses(model):
    with pytest.raises(ValueError, match="minified_data_type"):
        model.minify_adata("latent_posterior")
    model.adata.obsm["m"], model.adata.obsm["v"] = np.zeros((90, 3)), np.ones((90, 4))
    with pytest.raises(ValueError, match="shape"):
        model.minify_adata(use_latent_qzm_key="m", use_latent_qzv_key="v")
    model.adata.obsm["m"], model.adata.obsm["v"] = np.zeros((90, 4)), np.zeros((90, 4))
    with pytest.raises(ValueError, match="variances"):
        model.minify_adata(use_latent_qzm_key="m", use_latent_qzv_key="v")
    with pytest.raises(ValueError, match="library sizes"):
        make(use_observed_lib_size=False).minify_adata()


def test_answers_are_in_single_precision_also_under_autocast():
    adata = simulate(n_cells=60, n_genes=20)
    SCVI.setup_anndata(adata, batch_key="batch")
    model = SCVI(adata)
    model.train(max_epochs=1, enable_progress_bar=False)
    usual = model.get_elbo()
    with torch.autocast("cpu", torch.bfloat16):
        z_nk, expression_ng = model.get_latent_representation(), model.get_normalized_expression(return_numpy=True)
        assert model.get_elbo() == pytest.approx(float(usual), rel=0.05)
    np.testing.assert_array_equal(z_nk, model.get_latent_representation())
    assert expression_ng.dtype == np.float32
    np.testing.assert_allclose(expression_ng.sum(1), 1, rtol=1e-5)


def test_an_output_layer_of_another_kind_is_asked_itself():
    adata = simulate(n_cells=60, n_genes=20)
    SCVI.setup_anndata(adata, batch_key="batch")
    model = SCVI(adata)
    model.train(max_epochs=1, enable_progress_bar=False)
    torch.manual_seed(0)
    expected_ng = model.get_normalized_expression(return_numpy=True)
    model.module.decoder.scale = torch.nn.Sequential(model.module.decoder.scale)
    torch.manual_seed(0)
    np.testing.assert_allclose(model.get_normalized_expression(return_numpy=True), expected_ng, rtol=1e-5)
