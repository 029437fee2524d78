"""Latent space, library sizes and the density of a population, against scipy and closed forms."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from scvi_lite.analysis.latent import log_density, mixture
from scvi_lite.data import simulate, synthetic_iid
from scvi_lite.model import SCVI

GOLDEN = Path(__file__).parents[2] / "shared" / "golden"


def make(adata, train=True, **options):
    """A model on the data, marked as trained, or trained for an epoch."""
    SCVI.setup_anndata(adata, batch_key="batch")
    model = SCVI(adata, n_latent=4, n_hidden=16, **options)
    model.is_trained = train
    return model


@pytest.fixture(scope="module")
def adata():
    return simulate(n_cells=120, n_genes=30, n_types=2)


@pytest.fixture
def model(adata):
    return make(adata.copy())


def test_order_of_indices_is_kept(model):
    whole = model.get_latent_representation()
    rows = [100, 3, 57, 3]
    np.testing.assert_allclose(model.get_latent_representation(indices=rows), whole[rows], atol=1e-6)
    mask = np.arange(120) % 3 == 0
    np.testing.assert_allclose(model.get_latent_representation(indices=mask), whole[mask], atol=1e-6)
    np.testing.assert_allclose(model.get_latent_representation(batch_size=7), whole, atol=1e-6)


def test_draws_have_the_moments_of_the_posterior(model):
    loc, variance = model.get_latent_representation(return_dist=True)
    np.testing.assert_allclose(loc, model.get_latent_representation(), atol=1e-6)
    z = np.stack([model.get_latent_representation(give_mean=False) for _ in range(100)])
    error = np.sqrt(variance / 100)
    assert stats.kstest(((z.mean(0) - loc) / error).ravel(), "norm").pvalue > 1e-4
    np.testing.assert_allclose(z.var(0).mean(), variance.mean(), rtol=0.05)


def test_mean_of_a_logistic_normal(adata):
    model = make(adata.copy(), latent_distribution="ln")
    z = model.get_latent_representation(mc_samples=4000)
    np.testing.assert_allclose(z.sum(1), 1, atol=1e-5)
    loc, variance = model.get_latent_representation(return_dist=True)
    draws = np.random.default_rng(0).normal(loc, np.sqrt(variance), (4000, *loc.shape))
    expected = (np.exp(draws) / np.exp(draws).sum(-1, keepdims=True)).mean(0)
    np.testing.assert_allclose(z, expected, atol=0.02)


def test_observed_library_is_the_total(adata, model):
    np.testing.assert_allclose(model.get_latent_library_size()[:, 0], np.ravel(adata.X.sum(1)), rtol=1e-5)


def test_latent_library_is_lognormal(adata):
    model = make(adata.copy(), use_observed_lib_size=False)
    mean = model.get_latent_library_size()
    for batch in model._minibatches():
        q = model.module.encode(batch)
    frozen = stats.lognorm(s=q.library_scale_n.numpy(), scale=q.library_loc_n.exp().numpy())
    np.testing.assert_allclose(mean[:, 0], frozen.mean(), rtol=1e-4)
    draws = np.hstack([model.get_latent_library_size(give_mean=False) for _ in range(40)])
    assert stats.kstest(frozen.cdf(draws.T).ravel(), "uniform").pvalue > 1e-4


def test_batch_representation(adata, model):
    with pytest.raises(ValueError, match="batch_representation='embedding'"):
        model.get_batch_representation()
    embedded = make(adata.copy(), batch_representation="embedding")
    code = adata.obs["batch"].cat.codes.to_numpy()
    expected = embedded.module.batch_embedding.weight.detach().numpy()[code]
    np.testing.assert_array_equal(embedded.get_batch_representation(), expected)


@pytest.mark.parametrize("dof", [None, 3.0])
def test_density_of_a_population(model, dof):
    rows = np.arange(0, 120, 2)
    loc, variance = model.get_latent_representation(indices=rows, return_dist=True)
    z = np.random.default_rng(1).normal(size=(9, 4))
    component = stats.norm if dof is None else stats.t(df=dof)
    logpdf = component.logpdf((z[:, None] - loc) / np.sqrt(variance)) - 0.5 * np.log(variance)
    expected = np.logaddexp.reduce(logpdf.sum(-1), axis=1) - np.log(len(rows))
    found = model.get_aggregated_posterior(indices=rows, dof=dof).log_prob(torch.tensor(z, dtype=torch.float32))
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    np.testing.assert_allclose(log_density(torch.tensor(z), loc, np.sqrt(variance), dof), expected, rtol=1e-6)


def test_density_is_exact_far_from_narrow_components():
    """The quadratic form is multiplied out: its large terms must cancel."""
    loc, scale = np.array([[30.0, -5.0], [29.9, 4.0]]), np.full((2, 2), 1e-2)
    z = torch.tensor([[30.01, -5.02], [10.0, 0.0]], dtype=torch.float64)
    expected = mixture(loc, scale, None).log_prob(z)
    np.testing.assert_allclose(log_density(z, loc, scale), expected, rtol=1e-8)


def test_bad_arguments(model):
    for bad in ([500], [1.5], np.ones(7, bool)):
        with pytest.raises(IndexError, match="indices"):
            model.get_latent_representation(indices=bad)
    with pytest.raises(ValueError, match="mc_samples=0"):
        model.get_latent_representation(mc_samples=0)
    with pytest.raises(ValueError, match="dof=-1"):
        model.get_aggregated_posterior(dof=-1)
    with pytest.raises(ValueError, match="genes"):
        model.get_latent_representation(synthetic_iid(n_genes=10, seed=0))


def test_untrained_model_says_so(adata):
    model = make(adata.copy(), train=False)
    with pytest.warns(UserWarning, match="not trained"):
        model.get_latent_representation()


@pytest.mark.skipif(not GOLDEN.exists(), reason="no recorded answers")
@pytest.mark.parametrize("case", ["scvi_default", "scvi_library_latent", "scvi_covariates_encoded"])
def test_recorded_posteriors(case):
    model, recorded = SCVI.load(GOLDEN / case, accelerator="cpu"), np.load(GOLDEN / case / "outputs.npz")
    loc, variance = model.get_latent_representation(return_dist=True)
    np.testing.assert_allclose(loc, recorded["z_mean"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(np.sqrt(variance), recorded["z_scale"], rtol=1e-4)
    if "library_loc" in recorded:
        mean = np.exp(np.ravel(recorded["library_loc"]) + np.ravel(recorded["library_scale"]) ** 2 / 2)
        np.testing.assert_allclose(model.get_latent_library_size()[:, 0], mean, rtol=1e-4)
