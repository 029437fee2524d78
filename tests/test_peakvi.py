"""PEAKVI: its likelihood, the peer's recorded answers, answers about simulated chromatin, and bad input."""

import logging

import anndata
import numpy as np
import pytest
import scipy.sparse as sp
import torch
from conftest import SHARED
from scipy.special import expit
from scipy.stats import bernoulli as scipy_bernoulli

from scvi_lite.data.batch import Counts
from scvi_lite.distributions.bernoulli import bernoulli, bernoulli_log_prob
from scvi_lite.model import PEAKVI

GOLDEN = SHARED / "golden" / "peakvi"
SILENT = {"accelerator": "cpu", "enable_progress_bar": False}


def regions_of_two_types(n_cells=240, n_regions=60, seed=0):
    """Open regions whose truth is known: 20 regions open in one type, 20 in the other, the rest in both."""
    rng = np.random.default_rng(seed)
    kind = np.arange(n_cells) % 2
    p_kr = np.full((2, n_regions), 0.5)
    p_kr[0, :20], p_kr[1, 20:40], p_kr[0, 20:40], p_kr[1, :20] = 0.8, 0.8, 0.1, 0.1
    depth_n = rng.uniform(0.3, 1.0, n_cells)
    x = rng.random((n_cells, n_regions)) < p_kr[kind] * depth_n[:, None]
    adata = anndata.AnnData(sp.csr_matrix(x.astype(np.float32)))
    adata.obs["kind"] = np.array(["first", "second"])[kind]
    adata.obs["batch"] = np.array(["x", "y"])[(np.arange(n_cells) // 2) % 2]
    return adata, depth_n


@pytest.fixture(scope="module")
def trained():
    adata, depth_n = regions_of_two_types()
    PEAKVI.setup_anndata(adata, batch_key="batch")
    torch.manual_seed(0)
    model = PEAKVI(adata, n_hidden=32, n_latent=4, region_factors=False)
    model.train(50, lr=5e-3, batch_size=48, n_epochs_kl_warmup=5, early_stopping=False, **SILENT)
    return model, depth_n


def draws(dtype=torch.float64):
    torch.manual_seed(0)
    x_nr = (torch.rand(7, 11) < 0.3).to(dtype) * 2
    parts = 3 * torch.randn(7, 11), torch.randn(7), torch.randn(11)
    return x_nr, [part.to(dtype).requires_grad_() for part in parts]


@pytest.mark.parametrize("given", [(True, True), (True, False), (False, True), (False, False)])
def test_likelihood(given):
    x_nr, (logit_nr, depth_n, factor_r) = draws()
    depth, factor = (t if is_given else None for t, is_given in zip((depth_n, factor_r), given))
    p_nr = expit(logit_nr.detach().numpy())
    p_nr = p_nr * (1 if depth is None else expit(depth.detach().numpy())[:, None])
    p_nr = p_nr * (1 if factor is None else expit(factor.detach().numpy()))
    truth_n = scipy_bernoulli.logpmf(x_nr.numpy() > 0, p_nr).sum(1)
    counts = Counts.from_dense(x_nr)
    value_n = bernoulli(counts, logit_nr, depth, factor)
    reference = bernoulli_log_prob(x_nr, logit_nr, None if depth is None else depth[:, None], factor)
    np.testing.assert_allclose(value_n.detach(), truth_n, rtol=1e-12)
    np.testing.assert_allclose(reference.sum(1).detach(), truth_n, rtol=1e-12)
    inputs = [t for t in (logit_nr, depth, factor) if t is not None]
    torch.autograd.gradcheck(lambda *_: bernoulli(counts, logit_nr, depth, factor), inputs)
    weight_n = torch.rand(7, dtype=torch.float64)
    expected = torch.autograd.grad((weight_n * value_n).sum(), inputs)
    narrow = bernoulli(counts, *(None if t is None else t.float() for t in (logit_nr, depth, factor)))
    for one, other in zip(torch.autograd.grad((weight_n * narrow).sum(), inputs, retain_graph=True), expected):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    means = (
        torch.autograd.grad(-value.mean(), inputs) for value in (bernoulli(counts, logit_nr, depth, factor), narrow)
    )
    for one, other in zip(*means):  # of a mean, which needs no further scale
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_gradients_of_a_transposed_decoder():
    x_nr, (logit_nr, depth_n, factor_r) = draws(torch.float32)
    counts, logit_rn = Counts.from_dense(x_nr), logit_nr.detach().t().contiguous().requires_grad_()
    (expected_nr,) = torch.autograd.grad(bernoulli(counts, logit_nr, depth_n, factor_r).sum(), [logit_nr])
    (grad_rn,) = torch.autograd.grad(bernoulli(counts, logit_rn.t(), depth_n, factor_r).sum(), [logit_rn])
    torch.testing.assert_close(grad_rn.t(), expected_nr)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("depth", [None, 50.0, -200.0])
def test_likelihood_of_extreme_logits_is_finite(dtype, depth):
    logit_nr = torch.tensor([[-1e4, -100.0, 0.0, 100.0, 1e4] * 2], dtype=dtype, requires_grad=True)
    x_nr = torch.tensor([[0.0] * 5 + [1.0] * 5], dtype=dtype)
    depth_n = None if depth is None else torch.tensor([depth], dtype=dtype, requires_grad=True)
    value_n = bernoulli(Counts.from_dense(x_nr), logit_nr, depth_n)
    value_n.sum().backward()
    assert value_n.isfinite().all() and logit_nr.grad.isfinite().all()
    assert logit_nr.grad[0, 5] == 1
    assert depth_n is None or depth_n.grad.isfinite().all()


def test_rare_regions_keep_their_digits():
    """log(1 - p) of a small p in single precision."""
    logit_nr = torch.full((1, 1), -18.0)
    value = bernoulli(Counts.from_dense(torch.zeros(1, 1)), logit_nr, torch.full((1,), -5.0))
    assert float(value) == pytest.approx(np.log1p(-expit(-18.0) * expit(-5.0)), rel=1e-6)


@pytest.mark.skipif(not GOLDEN.exists(), reason="the recorded model is not here")
def test_recorded_answers():
    adata = anndata.read_h5ad(GOLDEN / "adata.h5ad")
    model = PEAKVI.load(GOLDEN, adata, accelerator="cpu")
    with np.load(GOLDEN / "outputs.npz") as arrays:
        recorded = dict(arrays)
    mean_nk, variance_nk = model.get_latent_representation(return_dist=True)
    depth_n, factor_r = model.get_library_size_factors(), model.get_region_factors()
    p_nr = recorded["normalized_accessibility"]
    found_nr = p_nr * recorded["depth_factor"] * recorded["region_factors"]
    for found, expected in (
        (mean_nk, recorded["z_mean"]),
        (variance_nk**0.5, recorded["z_scale"]),
        (depth_n, recorded["depth_factor"][:, 0]),
        (factor_r, recorded["region_factors"]),
        (model.get_normalized_accessibility(return_numpy=True), p_nr),
        (model.get_normalized_accessibility(normalize_cells=True, normalize_regions=True).to_numpy(), found_nr),
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_finds_what_differs(trained):
    model, depth_n = trained
    table = model.differential_accessibility(groupby="kind", group1="first", group2="second", silent=True)
    columns = ["prob_da", "is_da_fdr", "bayes_factor", "effect_size", "emp_effect"]
    assert list(table.columns[:9]) == [*columns, "est_prob1", "est_prob2", "emp_prob1", "emp_prob2"]
    names = model.adata.var_names
    assert set(table.index[table["is_da_fdr"]]) >= set(names[:40])
    assert (table.loc[names[:20], "effect_size"] < -0.2).all() and (table.loc[names[20:40], "effect_size"] > 0.2).all()
    is_open = model.adata.X.toarray() > 0
    np.testing.assert_allclose(table.loc[names, "emp_prob1"], is_open[model.adata.obs["kind"] == "first"].mean(0))
    assert np.corrcoef(model.get_library_size_factors(), depth_n)[0, 1] > 0.7
    z_nk = model.get_latent_representation()
    first = (model.adata.obs["kind"] == "first").to_numpy()
    centres = z_nk[first].mean(0), z_nk[~first].mean(0)
    nearer_first = ((z_nk - centres[0]) ** 2).sum(1) < ((z_nk - centres[1]) ** 2).sum(1)
    assert (nearer_first == first).mean() > 0.95


def test_forms_of_differential_accessibility(trained):
    model, _ = trained
    bare = model.differential_accessibility(idx1=[0, 2, 4], all_stats=False, batch_correction=True, silent=True)
    assert "emp_prob1" not in bare and "comparison" not in bare and bare["is_da_fdr"].dtype == bool
    vanilla = model.differential_accessibility(groupby="kind", mode="vanilla", silent=True)
    assert "is_da_fdr" not in vanilla and len(vanilla) == 2 * model.adata.n_vars
    question = {"groupby": "kind", "group1": "first", "silent": True}
    for added, effect in (
        (None, lambda a, b: np.log2(a) - np.log2(b)),
        (1.0, lambda a, b: np.log2(a + 1) - np.log2(b + 1)),
    ):
        torch.manual_seed(0)
        one = model.differential_accessibility(change_fn="log-fold", pseudocounts=added, **question)
        torch.manual_seed(0)
        other = model.differential_accessibility(change_fn=effect, **question)
        np.testing.assert_allclose(one["prob_da"], other.loc[one.index, "prob_da"], atol=2e-3)
    with pytest.raises(ValueError, match="Did you mean 'log-fold'"):
        model.differential_accessibility(groupby="kind", change_fn="logfold")


def test_forms_of_accessibility(trained):
    model, _ = trained
    whole = model.get_normalized_accessibility()
    assert whole.shape == model.adata.shape and whole.dtypes.iloc[0] == np.float32
    sparse = model.get_normalized_accessibility(threshold=0.5, return_numpy=True, batch_size=50)
    assert sp.issparse(sparse)
    np.testing.assert_allclose(sparse.toarray(), np.where(whole >= 0.5, whole, 0), atol=1e-6)
    frame = model.get_normalized_accessibility(threshold=0.5, indices=[7, 3], region_list=["9", "0"])
    assert frame.columns.tolist() == ["9", "0"] and frame.index.tolist() == ["7", "3"]
    np.testing.assert_allclose(frame.to_numpy(), sparse[[7, 3]][:, [9, 0]].toarray(), atol=1e-6)
    mean = model.get_normalized_accessibility(transform_batch=["x", "y"], return_numpy=True)
    parts = [model.get_normalized_accessibility(transform_batch=b, return_numpy=True) for b in ("x", "y")]
    np.testing.assert_allclose(mean, (parts[0] + parts[1]) / 2, atol=1e-6)
    assert model.get_normalized_accessibility(n_samples_overall=9, use_z_mean=False).shape == (9, 60)
    assert len(model.get_normalized_accessibility(indices=[], threshold=0.1, return_numpy=True).indptr) == 1
    with pytest.raises(ValueError, match="region_list: 1 of 1 names"):
        model.get_normalized_accessibility(region_list=["nowhere"])
    with pytest.raises(ValueError, match="threshold=2"):
        model.get_normalized_accessibility(threshold=2)
    with pytest.raises(RuntimeError, match="region_factors=False"):
        model.get_region_factors()
    with pytest.raises(RuntimeError, match="region_factors=False"):
        model.get_normalized_accessibility(normalize_regions=True)


def test_elbo_is_the_history(trained):
    model, _ = trained
    rows = model.validation_indices
    now = float(model.get_elbo(indices=rows))
    assert -now == pytest.approx(model.history["elbo_validation"]["elbo_validation"].iloc[-1], rel=0.05)
    assert float(model.get_marginal_ll(indices=rows, n_mc_samples=50)) > now


def test_kl_scale():
    """The other scale of the KL term: what it weighs, and that an unknown one is refused."""
    adata, _ = regions_of_two_types(40)
    PEAKVI.setup_anndata(adata)
    model = PEAKVI(adata)
    (batch,) = model._minibatches()
    losses = {}
    for scale in ("cell", "minibatch"):
        torch.manual_seed(0)
        with torch.no_grad():
            losses[scale] = model.module.loss(batch, 1.0, kl_scale=scale)
    cell, minibatch = losses["cell"], losses["minibatch"]
    assert float(cell.kl_local) == float(minibatch.kl_local) > 0
    difference = float(cell.kl_local) / 40 * (1 - 1 / 40)
    assert float(cell.total - minibatch.total) == pytest.approx(difference, rel=1e-3)
    model.train(1, plan_kwargs={"kl_scale": "cell"}, **SILENT)
    with pytest.raises(ValueError, match="Did you mean 'minibatch'"):
        model.train(1, plan_kwargs={"kl_scale": "minibach"}, **SILENT)


def test_regions_and_cells_without_counts(caplog):
    """Regions that are never open, cells without any, fragment counts, covariates: trained, with a note on counts."""
    adata, _ = regions_of_two_types(60)
    x = adata.X.toarray() * 3
    x[:, 5], x[7] = 0, 0
    adata.layers["fragments"] = sp.csc_matrix(x)
    with caplog.at_level(logging.INFO, logger="scvi_lite"):
        PEAKVI.setup_anndata(adata, layer="fragments")
    assert sum("open or closed" in record.getMessage() for record in caplog.records) == 1
    model = PEAKVI(adata)
    model.train(30, lr=0.01, **SILENT)
    assert all(np.isfinite(frame.to_numpy()).all() for frame in model.history.values())
    assert np.isfinite(model.get_latent_representation()).all()
    found = model.get_normalized_accessibility(normalize_regions=True, return_numpy=True)
    assert found[:, 5].mean() < found.mean()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_hidden": 0}, "n_hidden=0"),
        ({"n_layers_decoder": 0}, "n_layers_decoder=0"),
        ({"n_layers_encoder": 0}, "n_layers_encoder=0"),
        ({"model_depth": "yes"}, "model_depth='yes'"),
        ({"use_layer_norm": "all"}, "use_layer_norm='all'"),
    ],
)
def test_bad_options(options, message):
    adata, _ = regions_of_two_types(20)
    PEAKVI.setup_anndata(adata)
    with pytest.raises(ValueError, match=message):
        PEAKVI(adata, **options)


def test_memory_is_bounded():
    """100,000 regions: probabilities above a threshold come without all cells × regions in memory."""
    tracemalloc = pytest.importorskip("tracemalloc")
    x = sp.random(300, 100_000, density=1e-3, format="csr", dtype=np.float32, random_state=0)
    x.data[:] = 1
    adata = anndata.AnnData(x)
    PEAKVI.setup_anndata(adata)
    model = PEAKVI(adata, n_hidden=4, n_latent=2)
    model.is_trained = True
    tracemalloc.start()
    found = model.get_normalized_accessibility(threshold=0.9999, return_numpy=True, batch_size=16)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found.shape == x.shape
    assert peak < 300 * 100_000 * 4 / 2


def test_depth_is_read_alike_whatever_the_norms_and_covariates_of_other_networks():
    adata, *_ = regions_of_two_types(20)
    adata.obs["batch"] = ["a", "b"] * 10
    PEAKVI.setup_anndata(adata, batch_key="batch")
    model = PEAKVI(adata, encode_covariates=True, deeply_inject_covariates=True, use_batch_norm="both")
    names = [name for name, _ in model.module.depth_encoder.named_parameters()]
    assert not any("batch_norm" in name for name in names) and sum("tables" in name for name in names) == 1
    assert any("batch_norm" in name for name, _ in model.module.encoder.named_parameters())
