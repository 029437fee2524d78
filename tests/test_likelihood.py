"""Likelihoods and importance weights: recorded answers, and a linear Gaussian model of which all is known."""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats

from scvi_lite.analysis import importance, likelihood
from scvi_lite.data import simulate
from scvi_lite.data.batch import Batch, Counts
from scvi_lite.model import SCVI
from scvi_lite.nn import vae
from scvi_lite.nn.vae import Posterior

GOLDEN = Path(__file__).parents[2] / "shared" / "golden"
NOISE = 0.5


@dataclass
class Gaussian:
    """Rates of x ~ N(mean, NOISE²)."""

    mean_ng: torch.Tensor

    def log_likelihood(self, counts):
        return torch.distributions.Normal(self.mean_ng, NOISE).log_prob(counts.x_ng).sum(-1)


class LinearModel:
    """x = z W + noise with z ~ N(0, I). Its posterior is normal; it factorises because the rows of W are orthogonal."""

    device = torch.device("cpu")

    def __init__(self, x_ng, w_kg, widen=1.0, shift=0.0):
        self.x_ng, self.w_kg, self.widen, self.shift = x_ng, w_kg, widen, shift
        self.registry = SimpleNamespace(fields={"x": {}})
        self.module = self
        self.config = SimpleNamespace(n_latent=len(w_kg), n_genes=w_kg.shape[1])

    def encode(self, batch):
        variance_k = 1 / (1 + (self.w_kg**2).sum(1) / NOISE**2)
        loc_nk = variance_k * (batch.x.x_ng @ self.w_kg.T) / NOISE**2
        return Posterior(loc_nk + self.shift, self.widen * variance_k.sqrt().expand_as(loc_nk))

    def library(self, batch, posterior):
        return torch.zeros(batch.n_cells)

    def log_prior_z(self, z, batch):
        return torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(-1)

    def decode(self, z, library_n, batch):
        return Gaussian(z @ self.w_kg)

    def log_joint(self, z, library_n, batch):
        return self.decode(z, library_n, batch).log_likelihood(batch.x)

    def _check(self, adata):
        return adata

    def _rows(self, adata, indices):
        return np.arange(len(self.x_ng)) if indices is None else np.asarray(indices)

    def _minibatches(self, adata=None, indices=None, batch_size=None):
        rows = torch.from_numpy(self._rows(adata, indices))
        for row_n in rows.split(batch_size or len(rows)):
            n = len(row_n)
            zero = torch.zeros(n, dtype=torch.int64)
            yield Batch(
                Counts.from_dense(self.x_ng[row_n]), row_n, zero.float(), zero, zero, zero[:, None], zero[:, None]
            )

    def _warn_if_untrained(self):
        pass


def linear(n=40, **options):
    w_kg = torch.tensor([[1.0, 0.0, 2.0, 0.0, 0.0], [0.0, 1.0, 0.0, -1.0, 0.5]])
    x_ng = torch.randn(n, 2) @ w_kg + NOISE * torch.randn(n, 5)
    return LinearModel(x_ng, w_kg, **options)


@pytest.fixture
def at_the_mean(monkeypatch):
    """Draws from a posterior are its mean, as in the recorded answers."""

    def mean(loc, scale, n_samples=None):
        return loc if n_samples is None else loc.expand(n_samples, *loc.shape)

    monkeypatch.setattr(vae, "draw_normal", mean)


@pytest.fixture(scope="module")
def model():
    adata = simulate(n_cells=150, n_genes=20, n_types=2)
    SCVI.setup_anndata(adata, batch_key="batch")
    model = SCVI(adata, n_latent=3, n_hidden=16, use_observed_lib_size=False)
    model.is_trained = True
    return model


@pytest.mark.skipif(not GOLDEN.exists(), reason="no recorded answers")
@pytest.mark.parametrize("case", ["scvi_default", "scvi_library_latent", "scvi_poisson"])
def test_recorded_bound(case, at_the_mean):
    model, recorded = SCVI.load(GOLDEN / case, accelerator="cpu"), np.load(GOLDEN / case / "outputs.npz")
    error_n = model.get_reconstruction_error(return_mean=False)["reconstruction_loss"]
    np.testing.assert_allclose(error_n, -recorded["log_likelihood_n"], rtol=1e-4)
    kl_n = recorded["kl_z_n"] + (recorded["kl_library_n"] if "kl_library_n" in recorded else 0)
    elbo_n = model.get_elbo(return_mean=False)
    np.testing.assert_allclose(elbo_n, recorded["log_likelihood_n"] - kl_n, rtol=1e-4)
    assert float(model.get_elbo()) == pytest.approx(float(elbo_n.mean()), rel=1e-5)


def test_evidence_of_a_linear_model():
    """With the exact posterior one draw suffices; with a poor one it takes many."""
    model = linear()
    covariance = model.w_kg.T @ model.w_kg + NOISE**2 * torch.eye(5)
    expected = stats.multivariate_normal(np.zeros(5), covariance.double().numpy()).logpdf(model.x_ng.double().numpy())
    found = likelihood.get_marginal_ll(model, n_mc_samples=1, return_mean=False)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    poor = LinearModel(model.x_ng, model.w_kg, widen=1.5, shift=0.3)
    found = likelihood.get_marginal_ll(poor, n_mc_samples=8000, return_mean=False)
    np.testing.assert_allclose(found, expected, atol=0.15)
    assert float(likelihood.get_marginal_ll(poor, n_mc_samples=1)) < expected.mean() - 0.1


def test_passes_do_not_matter(monkeypatch):
    """Samples come in passes of bounded size: the last may be smaller."""
    model = linear(widen=1.2)
    monkeypatch.setattr(likelihood, "NUMBERS_AT_ONCE", 40 * 5 * 300)
    in_passes = likelihood.get_marginal_ll(model, n_mc_samples=1000)
    assert isinstance(in_passes, float)
    monkeypatch.setattr(likelihood, "NUMBERS_AT_ONCE", 40 * 5 * 1000)
    assert float(in_passes) == pytest.approx(float(likelihood.get_marginal_ll(model, n_mc_samples=1000)), abs=0.05)


def test_bound_is_below_the_evidence(model):
    """Also where the library is latent."""
    elbo = np.mean([float(model.get_elbo()) for _ in range(20)])
    few, many = (float(model.get_marginal_ll(n_mc_samples=n)) for n in (2, 500))
    assert elbo < few < many


def test_subsets(model, at_the_mean):
    whole = model.get_elbo(return_mean=False)
    rows = [140, 7, 33]
    np.testing.assert_allclose(model.get_elbo(indices=rows, return_mean=False), whole[rows], rtol=1e-4)
    np.testing.assert_allclose(model.get_elbo(batch_size=11, return_mean=False), whole, rtol=1e-4)


def test_weights_are_equal_if_the_encoder_is_exact():
    model = linear()
    _, z = importance.draw_latent(model, None, np.arange(40), 200)
    weights = importance.get_importance_weights(model, None, np.arange(40), z)
    np.testing.assert_allclose(weights, 1 / 200, rtol=1e-2)


def test_weights_mend_a_poor_encoder():
    """The encoder is shifted and too wide; weighted draws have the moments of the exact population posterior."""
    exact = linear()
    poor = LinearModel(exact.x_ng, exact.w_kg, widen=2.0, shift=0.3)
    options = {"n_mc_samples": 4000, "n_mc_samples_per_pass": 1000}
    loc, scale = importance.posterior_parameters(exact, None)
    variance = loc.var(0) + (scale**2).mean(0)
    _, plain = importance.draw_latent(poor, None, np.arange(40), 4000)
    _, z = importance.draw_latent(poor, None, np.arange(40), 4000, "importance", options)
    assert np.abs(plain.mean(0).numpy() - loc.mean(0)).min() > 0.2
    np.testing.assert_allclose(z.mean(0), loc.mean(0), atol=0.1)
    np.testing.assert_allclose(z.var(0), variance, rtol=0.15)


def test_truncation_bounds_the_weights():
    model = linear(widen=3.0, shift=2.0)
    _, z = importance.draw_latent(model, None, np.arange(40), 400)
    weights = []
    for truncation in (False, True):
        torch.manual_seed(3)
        weights.append(importance.get_importance_weights(model, None, np.arange(40), z, truncation=truncation))
    free, cut = weights
    assert free.max() > 20 / 400  # so that there is something to cut
    expected = np.minimum(free, 20 / 400)
    np.testing.assert_allclose(cut, expected / expected.sum())


def test_bad_arguments(model):
    with pytest.raises(ValueError, match="n_mc_samples=0"):
        model.get_marginal_ll(n_mc_samples=0)
    with pytest.raises(ValueError, match="zs has shape"):
        model.get_importance_weights(None, None, np.zeros((5, 2)))
    with pytest.raises(ValueError, match="max_cells=0"):
        model.get_importance_weights(None, None, np.zeros((5, 3)), max_cells=0)
