"""TOTALVI: its likelihood, the peer's recorded answers, simulated cells with known proteins, bad input."""

import logging

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from conftest import SHARED
from mudata import MuData, set_options
from scipy.stats import nbinom, poisson
from sklearn.mixture import GaussianMixture
from test_ddp import run_on_two_ranks
from torch.distributions import LogNormal, Normal, kl_divergence

from scvi_lite.data import synthetic_iid
from scvi_lite.distributions import NegativeBinomial, NegativeBinomialMixture
from scvi_lite.distributions.counts import nb_mixture_log_prob
from scvi_lite.model import TOTALVI
from scvi_lite.nn.protein import ProteinRates, background_prior, lower_of_two

GOLDEN = SHARED / "golden" / "totalvi"
SILENT = {"accelerator": "cpu", "enable_progress_bar": False}
N_GENES, N_PROTEINS = 30, 12
SMALL = {"n_latent": 4, "n_hidden": 24, "n_layers_encoder": 1}


def cells_of_two_types(n_cells=300, seed=0, shift=0.0):
    """Proteins 0 to 3 are on the first type, 4 to 7 on the second, 8 to 11 on none; genes 0 to 9 differ alike."""
    rng = np.random.default_rng(seed)
    kind = rng.integers(2, size=n_cells)
    scale = np.ones((2, N_GENES))
    scale[0, :5], scale[1, 5:10] = 6, 6
    x = rng.poisson(rng.gamma(5, 1 / 5, (n_cells, N_GENES)) * scale[kind] * 3)
    on = np.zeros((2, N_PROTEINS), bool)
    on[0, :4], on[1, 4:8] = True, True
    background = np.exp(rng.normal(2 + shift, 0.2, (n_cells, N_PROTEINS)))
    y = rng.poisson(rng.gamma(10, 1 / 10, background.shape) * background * np.where(on[kind], 12, 1))
    adata = anndata.AnnData(sp.csr_matrix(x.astype(np.float32)))
    adata.obs_names = [f"cell_{i}" for i in range(n_cells)]
    adata.var_names = [f"gene_{i}" for i in range(N_GENES)]
    adata.obs["kind"] = pd.Categorical(np.array(["first", "second"])[kind])
    adata.obs["batch"] = pd.Categorical(np.array(["a", "b"])[np.arange(n_cells) % 2])
    names = [f"protein_{i}" for i in range(N_PROTEINS)]
    adata.obsm["protein"] = pd.DataFrame(y.astype(np.float32), index=adata.obs_names, columns=names)
    return adata, on[kind], background


def as_mudata(adata, order=("rna", "protein")):
    parts = {
        "rna": anndata.AnnData(adata.X.copy(), var=adata.var.copy(), obs=pd.DataFrame(index=adata.obs_names)),
        "protein": anndata.AnnData(adata.obsm["protein"]),
    }
    with set_options(pull_on_update=False):
        mdata = MuData({name: parts[name] for name in order})
    mdata.obs = adata.obs.copy()
    return mdata


MODALITIES = {"rna_layer": "rna", "protein_layer": "protein"}


def make(adata, seed=0, setup=None, **options):
    TOTALVI.setup_anndata(adata, "protein", **({"batch_key": "batch"} if setup is None else setup))
    torch.manual_seed(seed)
    return TOTALVI(adata, **SMALL | options)


@pytest.fixture(scope="module")
def trained():
    """A model of cells of which every other one, batch b, has no proteins; and the truth."""
    adata, on_np, background_np = cells_of_two_types()
    adata.obsm["protein"].loc[adata.obs["batch"] == "b"] = 0
    model = make(adata)
    model.train(120, batch_size=64, n_epochs_kl_warmup=60, early_stopping=False, **SILENT)
    return model, on_np, background_np


# The likelihood -------------------------------------------------------------------------------------------------------


def test_mixture():
    rng = np.random.default_rng(0)
    x, mu1, theta = rng.poisson(8, 40), rng.gamma(2, 3, 40), rng.gamma(2, 2, 40)
    mu2, logit = mu1 * (1 + rng.gamma(2, 2, 40)), rng.normal(0, 2, 40)
    p = 1 / (1 + np.exp(-logit))
    truth = p * nbinom.pmf(x, theta, theta / (theta + mu1)) + (1 - p) * nbinom.pmf(x, theta, theta / (theta + mu2))
    inputs = [torch.from_numpy(a) for a in (np.log(mu1), np.log(mu2), np.log(theta), logit)]
    counts = torch.from_numpy(x.astype(float))
    np.testing.assert_allclose(nb_mixture_log_prob(counts, *inputs), np.log(truth), rtol=1e-10)
    torch.autograd.gradcheck(lambda *a: nb_mixture_log_prob(counts, *a), [a.requires_grad_() for a in inputs])
    narrow = nb_mixture_log_prob(counts.float(), *(a.detach().float() for a in inputs))
    np.testing.assert_allclose(narrow, np.log(truth), rtol=1e-4)


def drawn_rates(dtype, shared_theta):
    """What a decoder may say of five proteins in six cells, and a prior of the background."""
    generator, n, p = torch.Generator().manual_seed(1), 6, 5

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    ratio_np = 1.0 + 1e-8 + 3 * draw(n, p).relu()
    tensors = [draw(n, p), draw(n, p).exp(), 2 * draw(n, p) + 1, ratio_np, 3 * draw(n, p)]
    tensors += [2 * draw(*([p] if shared_theta else [n, p])), draw(n, p), draw(n, p), draw(n, p).exp()]
    return [t.to(dtype).requires_grad_() for t in tensors]


def score(y_np, measured_np, *tensors):
    return torch.stack(ProteinRates(*tensors[:7]).score(y_np, measured_np, *tensors[7:]))


@pytest.mark.parametrize("shared_theta", [True, False])
def test_compiled_score_of_proteins(shared_theta, monkeypatch):
    """Single precision, which is compiled, against the formula in doubles, and that against finite differences."""
    generator = torch.Generator().manual_seed(2)
    y_np = torch.poisson(80 * torch.rand(6, 5, generator=generator, dtype=torch.float64) ** 3, generator=generator)
    measured_np = torch.rand(6, 5, generator=generator) > 0.3
    y_np[0], measured_np[0], measured_np[2] = 0, True, False
    up_2n = torch.randn(2, 6, generator=generator)
    single, double = (drawn_rates(dtype, shared_theta) for dtype in (torch.float32, torch.float64))
    expected_2n = score(y_np, measured_np, *double)
    (expected_2n * up_2n.double()).sum().backward()
    for n_threads in (1, 2):
        monkeypatch.setattr("scvi_lite._compiled.MIN_WORK", 1)
        monkeypatch.setattr("torch.get_num_threads", lambda n=n_threads: n)
        value_2n = score(y_np.float(), measured_np, *single)
        torch.testing.assert_close(value_2n.double(), expected_2n, rtol=1e-5, atol=1e-5)
        gradients = torch.autograd.grad((value_2n * up_2n).sum(), single)
        for found, leaf in zip(gradients, double):
            torch.testing.assert_close(found.double(), leaf.grad, rtol=1e-4, atol=1e-5 * float(leaf.grad.abs().max()))
    assert value_2n[:, 2].tolist() == [0, 0]
    torch.autograd.gradcheck(lambda *leaves: score(y_np, measured_np, *leaves), double)


def test_lower_of_two_normals():
    rng = np.random.default_rng(1)
    x_np = np.where(rng.random((20, 60)) < 0.6, rng.normal(2, 0.5, (20, 60)), rng.normal(8, 0.8, (20, 60)))
    loc_n, scale_n = lower_of_two(x_np)
    for i, row in enumerate(x_np):
        fitted = GaussianMixture(2, tol=1e-8, max_iter=1000, random_state=0).fit(row[:, None])
        lower = fitted.means_.argmin()
        assert loc_n[i] == pytest.approx(fitted.means_[lower, 0], abs=1e-3)
        assert scale_n[i] == pytest.approx(np.sqrt(fitted.covariances_[lower, 0, 0]), abs=1e-3)
    assert lower_of_two(np.full((1, 5), 3.0))[0] == pytest.approx(3.0)  # one value only


def test_prior_of_the_background():
    adata, _, _ = cells_of_two_types()
    y_np = adata.obsm["protein"].to_numpy()
    y_np[::2] = 0
    loc_b, scale_b = background_prior(y_np, np.arange(300) % 2, 2)
    assert loc_b[0] == 0 and loc_b[1] == pytest.approx(2.1, abs=0.15) and 0 < scale_b[1] < 0.2


def test_loss_is_that_of_the_paper():
    """From torch.distributions, at the draws that the loss makes."""
    adata, _, _ = cells_of_two_types(80)
    model = make(adata, empirical_protein_background_prior=False)
    module = model.module
    with torch.no_grad():
        module.log_efficiency.normal_(0, 0.1)
        module.background_loc.normal_(2, 0.5)
    (batch,) = model._minibatches(batch_size=80)
    with torch.inference_mode():
        torch.manual_seed(3)
        loss = module.loss(batch, 0.5, pro_recons_weight=0.7)
        torch.manual_seed(3)
        q = module.encode(batch)
        genes, proteins = module.decode_both(q.sample_z(), batch.library_n, batch)
        gene_n = -NegativeBinomial(mu=genes.mu_ng, theta=genes.log_theta.exp()).log_prob(batch.x.x_ng).sum(1)
        efficiency_np = proteins.log_efficiency.exp()
        mixture = NegativeBinomialMixture(
            proteins.back_np * efficiency_np,
            proteins.fore_np * efficiency_np,
            proteins.log_theta.exp(),
            proteins.mixing_np,
        )
        protein_n = -mixture.log_prob(batch.proteins_np).sum(1)
        prior = Normal(module.background_loc[batch.batch_n], module.background_log_scale.exp()[batch.batch_n])
        kl_n = kl_divergence(Normal(proteins.back_loc_np, proteins.back_scale_np), prior).sum(1)
        kl_n = kl_n + kl_divergence(Normal(q.z_loc_nk, q.z_scale_nk), Normal(0, 1)).sum(1)
        kl_n = kl_n - LogNormal(0.0, 1.0).log_prob(efficiency_np).sum(1)
        kl_n = kl_n - 1e-3 * proteins.mixing_np.sigmoid().log().sum(1)
    assert float(loss.total) == pytest.approx(float((gene_n + 0.5 * (0.7 * protein_n + kl_n)).mean()), rel=1e-5)
    assert float(loss.reconstruction) == pytest.approx(float((gene_n + protein_n).sum()), rel=1e-5)
    assert float(loss.kl_local) == pytest.approx(float(kl_n.sum()), rel=1e-5)
    with torch.inference_mode():
        torch.manual_seed(3)
        full = module.loss(batch, 0.5, anneal_proteins=False)
    assert float(full.total) == pytest.approx(float((gene_n + protein_n + 0.5 * kl_n).mean()), rel=1e-5)


@pytest.mark.skipif(not GOLDEN.exists(), reason="the recorded model is not here")
def test_recorded_answers():
    adata = anndata.read_h5ad(GOLDEN / "adata.h5ad")
    model = TOTALVI.load(GOLDEN, adata, accelerator="cpu")
    with np.load(GOLDEN / "outputs.npz") as arrays:
        recorded = dict(arrays)
    (batch,) = model._minibatches(batch_size=adata.n_obs)
    with torch.inference_mode():
        q = model.module.encode(batch)
        genes, proteins = model.module.decode_both(q.z_loc_nk, batch.library_n, batch)
    found = {
        "z_mean": q.z_loc_nk,
        "z_scale": q.z_scale_nk,
        "px_scale": genes.scale_ng,
        "px_rate": genes.mu_ng,
        "px_r": genes.log_theta.exp(),
        "py_r": proteins.log_theta.exp(),
        "py_mixing": proteins.mixing_np,
        "py_fore_scale": proteins.ratio_np,
        "py_back_alpha": proteins.back_loc_np,
        "py_back_beta": proteins.back_scale_np,
    }
    assert model.protein_names == recorded.pop("protein_names").tolist()
    assert model.get_var_names() == recorded.pop("gene_names").tolist()
    assert set(recorded) == set(found)
    for name, expected in recorded.items():
        zero = 1e-5 * expected.std() if name in ("z_mean", "py_mixing") else 0.0
        np.testing.assert_allclose(found[name].detach(), expected, rtol=1e-4, atol=zero, err_msg=name)
    assert model.module.measured_qp.sum(1).tolist() == [14, 0]  # the second batch has no proteins


# What it finds out ----------------------------------------------------------------------------------------------------


def test_foreground_is_told_from_background(trained):
    model, on_np, background_np = trained
    there = (model.adata.obs["batch"] == "a").to_numpy()
    p_np = model.get_protein_foreground_probability(n_samples=5).to_numpy()[there]
    on_np, background_np = on_np[there], background_np[there]
    some = slice(0, 8)  # of a protein that no cell has, counts do not tell whether they are all foreground
    assert p_np[:, some][on_np[:, some]].mean() > 0.9 and p_np[:, some][~on_np[:, some]].mean() < 0.1
    found_np = model.get_protein_background_mean(indices=there)
    assert np.exp(np.abs(np.log(found_np / background_np)).mean()) < 1.6


def test_missing_proteins_are_imputed(trained):
    model, on_np, _ = trained
    missing = (model.adata.obs["batch"] == "b").to_numpy()
    _, protein = model.get_normalized_expression(indices=missing, transform_batch="a", n_samples=5)
    log_np = np.log1p(protein.to_numpy()[:, :8])
    on = on_np[missing][:, :8]
    assert log_np[on].mean() > log_np[~on].mean() + 1
    assert np.corrcoef(log_np.ravel(), on.ravel())[0, 1] > 0.5


def test_genes_and_proteins_differ_in_one_table(trained):
    model, _, _ = trained
    there = model.adata.obs["batch"] == "a"
    idx = [np.flatnonzero(there & (model.adata.obs["kind"] == kind)) for kind in ("first", "second")]
    table = model.differential_expression(idx1=idx[0], idx2=idx[1], delta=0.5, silent=True)
    assert len(table) == N_GENES + N_PROTEINS and table.index.is_unique
    up = [f"gene_{i}" for i in range(5)] + [f"protein_{i}_protein" for i in range(4)]
    down = [f"gene_{i}" for i in range(5, 10)] + [f"protein_{i}_protein" for i in range(4, 8)]
    assert (table.loc[up, "lfc_mean"] > 1).all() and (table.loc[down, "lfc_mean"] < -1).all()
    others = table.index.difference(up + down)
    assert table.loc[up + down, "proba_de"].min() > table.loc[others, "proba_de"].median()
    y = model.adata.obsm["protein"]
    assert table.loc["protein_0_protein", "raw_mean1"] == pytest.approx(y.iloc[idx[0]]["protein_0"].mean(), rel=1e-5)
    with pytest.raises(TypeError, match="unexpected keyword"):
        model.differential_expression(groupby="kind", protein_prior=1)
    for field, names in (("rna", model.adata.var_names), (["protein"], model.protein_names)):
        names = names if field == "rna" else [f"{name}_protein" for name in names]
        alone = model.differential_expression(idx1=idx[0], idx2=idx[1], use_field=field, silent=True)
        assert set(alone.index) == set(names)
        np.testing.assert_allclose(alone["raw_mean1"], table.loc[alone.index, "raw_mean1"], rtol=1e-5)
        assert np.corrcoef(alone["lfc_mean"], table.loc[alone.index, "lfc_mean"])[0, 1] > 0.95
    options = {"use_field": "protein", "scale_protein": True, "protein_prior_count": 0.25, "silent": True}
    scaled = model.differential_expression(idx1=idx[0], idx2=idx[1], **options)
    assert scaled["scale1"].sum() == pytest.approx(1 + 0.25 * N_PROTEINS, rel=1e-4)
    with pytest.raises(ValueError, match="use_field='prot' is not an option. Did you mean 'protein'"):
        model.differential_expression(idx1=[0], use_field="prot")


def test_correlations_of_genes_and_proteins(trained):
    model, _, _ = trained
    c = model.get_feature_correlation_matrix(n_samples=2, transform_batch="a", log_transform=True)
    assert c.shape == (N_GENES + N_PROTEINS,) * 2 and np.allclose(c, c.T)
    assert c.loc["protein_0", "protein_1"] > 0.3 > -0.3 > c.loc["protein_0", "protein_5"]
    assert c.loc["gene_0", "protein_0"] > 0.3


def test_answers_have_shapes_and_names(trained):
    model, _, _ = trained
    rna, protein = model.get_normalized_expression(
        indices=[3, 1], gene_list=["gene_2", "gene_0"], protein_list=["protein_7"], library_size=100
    )
    assert list(rna.columns) == ["gene_2", "gene_0"] and list(rna.index) == ["cell_3", "cell_1"]
    assert protein.shape == (2, 1) and list(protein.columns) == ["protein_7"]
    rna, protein = model.get_normalized_expression(n_samples=3, return_mean=False, indices=range(5))
    assert rna.shape == (5, N_GENES, 3) and protein.shape == (5, N_PROTEINS, 3)
    np.testing.assert_allclose(rna.sum(1), 1, rtol=1e-5)
    _, scaled = model.get_normalized_expression(scale_protein=True, return_numpy=True)
    np.testing.assert_allclose(scaled.sum(1), 1, rtol=1e-5)
    assert model.get_normalized_expression(n_samples_overall=7)[1].shape == (7, N_PROTEINS)
    samples = model.posterior_predictive_sample(n_samples=2, indices=range(4), protein_list=["protein_1"])
    assert samples["rna"].shape == (4, N_GENES, 2) and samples["protein"].shape == (4, 1, 2)
    assert (samples["rna"] == samples["rna"].round()).all()
    parameters = model.get_likelihood_parameters(indices=range(4))
    assert parameters["protein_mixing"].shape == (4, N_PROTEINS) and (parameters["protein_mixing"] < 1).all()
    assert (parameters["protein_foreground"] >= parameters["protein_background"]).all()
    assert model.get_reconstruction_error(return_mean=False)["reconst_loss_protein"].shape == (300,)
    assert model.get_marginal_ll(n_mc_samples=100) > model.get_elbo()


def test_background_counts_where_it_is_asked_for(trained):
    model, _, _ = trained
    values = []
    for options in ({}, {"include_protein_background": True}):
        torch.manual_seed(0)
        values.append(model.get_normalized_expression(**options)[1].to_numpy())
    torch.manual_seed(0)
    parameters = model.get_likelihood_parameters()
    mixing, background = parameters["protein_mixing"], parameters["protein_background"]
    with torch.no_grad():
        efficiency = model.module.log_efficiency.exp().numpy()[model.registry.read(model.adata, "batch_n")]
    np.testing.assert_allclose(values[1] - values[0], mixing * background / efficiency, rtol=1e-3, atol=1e-3)


def test_new_proteins_and_genes_are_named_when_wrong(trained):
    model, _, _ = trained
    with pytest.raises(ValueError, match="protein_list: 1 of 1 names.*Did you mean 'protein_1"):
        model.get_normalized_expression(protein_list=["Protein_1"])
    with pytest.raises(ValueError, match="library_size='latnt'"):
        model.get_normalized_expression(library_size="latnt")
    with pytest.raises(ValueError, match="name one"):
        model.posterior_predictive_sample(transform_batch=["a", "b"])


# Missing proteins -----------------------------------------------------------------------------------------------------


def test_a_batch_without_proteins_is_noted_and_not_scored(caplog):
    adata, _, _ = cells_of_two_types(80)
    adata.obsm["protein"].loc[adata.obs["batch"] == "b"] = 0
    adata.obsm["protein"].loc[adata.obs["batch"] == "a", "protein_3"] = 0
    unknown = pytest.warns(UserWarning, match="'protein_3' have no counts in any")
    with caplog.at_level(logging.INFO, "scvi_lite"), unknown:
        model = make(adata)
    model.is_trained = True
    for protein in (model.get_protein_foreground_probability(), model.get_normalized_expression(scale_protein=True)[1]):
        assert protein["protein_3"].isna().all() and protein.drop(columns="protein_3").notna().all().all()
    assert "all proteins have no counts in 'b'" in caplog.text and "'protein_3' have no counts in 'a'" in caplog.text
    assert model._adversary(None) is not None and model._adversary(False) is None
    (batch,) = model._minibatches(batch_size=80)
    with torch.inference_mode():
        terms = model.module.reconstruction(torch.zeros(80, 4), batch.library_n, batch)
    assert (terms["reconst_loss_protein"][batch.batch_n == 1] == 0).all()
    assert (terms["reconst_loss_protein"][batch.batch_n == 0] > 0).all()
    with pytest.warns(UserWarning, match="no counts in any"):
        model = make(adata, override_missing_proteins=True)
    assert bool(model.module.measured_qp.all()) and model._adversary(None) is None


def test_panels_may_cut_across_batches():
    adata, _, _ = cells_of_two_types(80)
    adata.obs["panel"] = ["p", "q", "q", "r"] * 20
    adata.obsm["protein"].loc[adata.obs["panel"] == "q", "protein_0"] = 0
    setup = {"batch_key": "batch", "panel_key": "panel"}
    model = make(adata, setup=setup, empirical_protein_background_prior=True)
    module = model.module
    assert module.measured_qp[:, 0].tolist() == [True, False, True] and bool(module.measured_qp[:, 1:].all())
    assert module.log_efficiency.shape == (2, N_PROTEINS)
    (batch,) = model._minibatches(batch_size=80)
    assert module.measured(batch)[:, 0].tolist() == [True, False, False, True] * 20
    loc_np, _ = module.background_prior(batch)
    assert torch.equal(loc_np, module.background_loc[[0, 1, 1, 2] * 20])
    assert len(loc_np[:, 0].unique()) == len(module.background_loc) == 3
    model.train(1, **SILENT)
    assert model.get_normalized_expression()[1].notna().all().all()


# Bad input ------------------------------------------------------------------------------------------------------------


def with_proteins(change):
    adata, _, _ = cells_of_two_types(20)
    change(adata)
    return adata


def set_value(adata, value):
    adata.obsm["protein"].iloc[0, 0] = value


BAD = {
    "NaN": (
        lambda a: set_value(a, np.nan),
        ValueError,
        r"holds NaN in 1 cells. Put 0 where a protein was not measured",
    ),
    "negative": (lambda a: set_value(a, -1), ValueError, r"adata.obsm\['protein'\] holds negative values"),
    "scaled": (
        lambda a: set_value(a, 0.5),
        UserWarning,
        r"if you have them, put them there: adata.obsm\['protein'\] =",
    ),
    "infinite": (lambda a: set_value(a, np.inf), ValueError, "holds infinite values"),
    "all zero": (lambda a: a.obsm["protein"].__imul__(0), ValueError, "all counts of proteins are zero"),
    "no such key": (lambda a: a.obsm.pop("protein"), KeyError, "protein_expression_obsm_key='protein' is not a key of"),
}


@pytest.mark.parametrize(("change", "error", "message"), BAD.values(), ids=BAD)
def test_bad_proteins_are_refused(change, error, message):
    adata = with_proteins(change)
    with pytest.raises(error, match=message):
        TOTALVI.setup_anndata(adata, "protein", batch_key="batch")


def test_odd_proteins():
    adata = with_proteins(lambda a: None)
    adata.obsm["protein"].columns = ["p", "p", *adata.obsm["protein"].columns[2:]]
    with pytest.raises(ValueError, match="names of proteins repeat: 'p'"):
        TOTALVI.setup_anndata(adata, "protein")
    adata = with_proteins(lambda a: set_value(a, 0.5))
    with pytest.warns(UserWarning, match="holds fractions"):
        TOTALVI.setup_anndata(adata, "protein")
    adata.obsm["array"] = adata.obsm["protein"].to_numpy().round()
    adata.uns["names"] = ["x", "y"]
    with pytest.raises(ValueError, match="2 names were found for 12 proteins"):
        TOTALVI.setup_anndata(adata, "array", protein_names_uns_key="names")


def test_bad_options_are_named():
    adata, _, _ = cells_of_two_types(20)
    with pytest.raises(TypeError, match="no option 'n_layer'. Did you mean 'n_layers_"):
        make(adata, n_layer=1)
    with pytest.raises(ValueError, match="gene_dispersion='gene-cell'"):
        make(adata, gene_dispersion="gene-cell")
    with pytest.raises(ValueError, match="protein_dispersion='gene'"):
        make(adata, protein_dispersion="gene")
    with pytest.raises(ValueError, match="gene_likelihood='normal'"):
        make(adata, gene_likelihood="normal")
    model = make(adata)
    with pytest.raises(ValueError, match="pro_recons_weight=-1"):
        model.train(1, plan_kwargs={"pro_recons_weight": -1}, **SILENT)


def test_poisson():
    adata, _, _ = cells_of_two_types(40)
    model = make(adata, gene_likelihood="poisson")
    model.train(2, **SILENT)
    found = model.get_likelihood_parameters()
    assert "dispersions" not in found and found["mean"].shape == adata.shape
    (batch,) = model._minibatches()
    with torch.inference_mode():
        terms = model.module.reconstruction(z_nk := torch.zeros(40, 4), batch.library_n, batch)
        mu_ng = model.module.decode(z_nk, batch.library_n, batch).mu_ng
    np.testing.assert_allclose(terms["reconst_loss_gene"], -poisson.logpmf(adata.X.toarray(), mu_ng).sum(1), rtol=1e-4)
    assert model.get_feature_correlation_matrix(n_samples=1).shape == (N_GENES + N_PROTEINS,) * 2


def test_new_cells_with_proteins_in_another_order(trained):
    model, _, _ = trained
    adata, _, _ = cells_of_two_types(30, seed=5)
    z_nk = model.get_latent_representation(adata)
    adata.obsm["protein"] = adata.obsm["protein"].iloc[:, ::-1]
    np.testing.assert_array_equal(model.get_latent_representation(adata), z_nk)
    adata.obsm["protein"] = adata.obsm["protein"].rename(columns={"protein_0": "CD3"})
    with pytest.raises(KeyError, match="protein='protein_0' is not among those of these data"):
        model.get_latent_representation(adata)


# MuData ---------------------------------------------------------------------------------------------------------------


def test_a_mudata_gives_the_same_model():
    adata, _, _ = cells_of_two_types(60)
    model = make(adata)
    model.train(2, **SILENT)
    mdata = as_mudata(adata, order=("protein", "rna"))
    mdata.mod["protein"] = mdata["protein"][::-1].copy()  # in another order
    TOTALVI.setup_mudata(mdata, batch_key="batch", modalities=MODALITIES)
    torch.manual_seed(0)
    other = TOTALVI(mdata, **SMALL)
    other.train(2, datasplitter_kwargs={"external_indexing": [model.train_indices, model.validation_indices]}, **SILENT)
    (one,), (two,) = (m._minibatches(batch_size=60) for m in (model, other))
    assert torch.equal(one.proteins_np, two.proteins_np) and torch.equal(one.x.x_ng, two.x.x_ng)
    assert other.get_var_names()["protein"] == model.protein_names == other.protein_names
    assert set(other.differential_expression(groupby="kind", silent=True).index) == {*adata.var_names} | {
        f"{name}_protein" for name in model.protein_names
    }


def test_cells_of_one_modality_only(tmp_path):
    adata, _, _ = cells_of_two_types(60)
    whole = as_mudata(adata)
    with set_options(pull_on_update=False):
        mdata = MuData({"rna": whole["rna"][:50].copy(), "protein": whole["protein"][5:].copy()})
    mdata.obs["batch"] = adata.obs["batch"].reindex(mdata.obs_names)
    TOTALVI.setup_mudata(mdata, batch_key="batch", modalities=MODALITIES)
    torch.manual_seed(0)
    model = TOTALVI(mdata, **SMALL)
    (batch,) = model._minibatches(batch_size=60)
    assert batch.has_x_n.sum() == 50 and batch.has_proteins_n.sum() == 55
    with torch.inference_mode():
        terms = model.module.reconstruction(torch.zeros(60, 4), batch.library_n, batch)
    assert ((terms["reconst_loss_gene"] == 0) == ~batch.has_x_n).all()
    assert ((terms["reconst_loss_protein"] == 0) == ~batch.has_proteins_n).all()
    model.train(2, **SILENT)
    rna, protein = model.get_normalized_expression()
    assert rna.notna().all().all() and protein.notna().all().all() and list(rna.index) == list(mdata.obs_names)
    model.save(tmp_path / "model", save_anndata=True)
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == ["mdata.h5mu", "model.json", "model.safetensors"]
    loaded = TOTALVI.load(tmp_path / "model")
    np.testing.assert_array_equal(loaded.get_latent_representation(), model.get_latent_representation())
    with pytest.raises(TypeError, match="mdata is a AnnData; a MuData with the modalities 'rna', 'protein'"):
        model.get_latent_representation(adata)


def test_minified_mudata(tmp_path):
    adata, _, _ = cells_of_two_types(40)
    mdata = as_mudata(adata)
    mdata["protein"].layers["counts"] = mdata["protein"].X
    mdata.var["kept"], mdata.varm["place"] = np.arange(mdata.n_vars), np.ones((mdata.n_vars, 2))
    mdata.obsp["distances"] = np.eye(mdata.n_obs)
    TOTALVI.setup_mudata(mdata, protein_layer="counts", batch_key="batch", modalities=MODALITIES)
    model = TOTALVI(mdata, **SMALL)
    model.train(1, **SILENT)
    z_nk, library = model.get_latent_representation(), model.get_latent_library_size()
    p_np = model.get_protein_foreground_probability
    torch.manual_seed(0)
    before = p_np()
    model.minify_mudata()
    assert model.minified_data_type == "latent_posterior_parameters" and model.adata["rna"].X.nnz == 0
    assert mdata["rna"].X.nnz > 0 and "observed_lib_size" not in mdata.obs
    assert model.adata["protein"].layers["counts"].nnz == 0 and model.adata.var["kept"].equals(mdata.var["kept"])
    assert {"place"} <= model.adata.varm.keys() and {"distances"} <= model.adata.obsp.keys()
    np.testing.assert_array_equal(model.get_latent_representation(), z_nk)
    np.testing.assert_array_equal(model.get_latent_library_size(), library)
    torch.manual_seed(0)
    np.testing.assert_allclose(p_np(), before, rtol=1e-6)
    with pytest.raises(RuntimeError, match="needs counts"):
        model.get_elbo()
    model.save(tmp_path / "model", save_anndata=True)
    loaded = TOTALVI.load(tmp_path / "model")
    np.testing.assert_array_equal(loaded.get_latent_representation(), z_nk)
    full = TOTALVI.load(tmp_path / "model", mdata)
    np.testing.assert_allclose(full.get_latent_representation(), z_nk, rtol=1e-4, atol=1e-5)


def test_query_without_proteins():
    adata, _, _ = cells_of_two_types(60)
    TOTALVI.setup_mudata(mdata := as_mudata(adata), batch_key="batch", modalities=MODALITIES)
    model = TOTALVI(mdata, **SMALL)
    model.train(1, **SILENT)
    with set_options(pull_on_update=False):
        query = MuData({"rna": mdata["rna"][:20].copy()})
        query.obs["batch"] = "new"
        with pytest.warns(UserWarning, match="no modality 'protein'"):
            TOTALVI.prepare_query_mudata(query, model)
        mapped = TOTALVI.load_query_data(query, model, accelerator="cpu")
    mapped.train(1, plan_kwargs={"weight_decay": 0.0}, **SILENT)
    assert mapped.module.measured_qp[2].sum() == 0
    assert mapped.get_normalized_expression(transform_batch="a")[1].notna().all().all()


def test_the_right_call_is_named():
    mdata = synthetic_iid(batch_size=20, n_genes=8, n_regions=0, n_proteins=4, return_mudata=True)
    with pytest.raises(TypeError, match="or call setup_mudata where the model has it"):
        TOTALVI.setup_anndata(mdata, "protein")
    with pytest.raises(TypeError, match="mdata is a AnnData"):
        TOTALVI.setup_mudata(mdata["rna"], modalities=MODALITIES)
    with pytest.raises(ValueError, match="which modality rna_layer is for"):
        TOTALVI.setup_mudata(mdata)
    with pytest.raises(
        KeyError, match=r"modalities\['protein_layer'\]='protein' is not a modality.*protein_expression"
    ):
        TOTALVI.setup_mudata(mdata, modalities=MODALITIES)
    with pytest.raises(RuntimeError, match=r"This MuData is not set up for TOTALVI. Call TOTALVI.setup_mudata"):
        TOTALVI(mdata)


# Further data and devices ---------------------------------------------------------------------------------------------


def test_query_is_mapped(trained):
    model, _, _ = trained
    query, on_np, _ = cells_of_two_types(80, seed=7)
    query.obs["batch"] = "new"
    without = anndata.AnnData(query.X, obs=query.obs, var=query.var)
    with pytest.raises(KeyError, match=r"Without proteins: adata.obsm\['protein'\] = np.zeros\(\(adata.n_obs, 12\)\)"):
        TOTALVI.load_query_data(without, model, accelerator="cpu")
    mapped = TOTALVI.load_query_data(query, model, accelerator="cpu")
    mapped.train(5, plan_kwargs={"weight_decay": 0.0}, early_stopping=False, **SILENT)
    old = model.get_latent_representation()
    np.testing.assert_allclose(mapped.get_latent_representation(model.adata), old, rtol=1e-4, atol=1e-5)
    p_np = mapped.get_protein_foreground_probability(transform_batch="a").to_numpy()
    assert p_np[on_np].mean() > p_np[~on_np].mean() + 0.3


def test_two_processes(tmp_path):
    ranks = run_on_two_ranks(
        """
        from scvi_lite.model import TOTALVI
        proteins = adata.obsm["protein_expression"][:, :4].copy()
        proteins[adata.obs["batch"] == "batch_1"] = 0
        adata.obsm["protein"] = proteins
        TOTALVI.setup_anndata(adata, "protein", batch_key="batch")
        watch, model = Watch(), TOTALVI(adata, n_hidden=8, n_latent=3)
        model.train(max_epochs=2, callbacks=[watch], **options)
        tell(**describe(model, watch))
        """,
        tmp_path,
    )
    assert ranks[0]["weights"] == ranks[1]["weights"] and ranks[0]["history"] == ranks[1]["history"]
    seen = [row for rank in ranks for epoch, rows in rank["train"] for row in rows if epoch == 0]
    assert sorted(seen) == sorted(ranks[0]["indices"][0])
    assert len(ranks[0]["history"]["elbo_validation"]) == 2
