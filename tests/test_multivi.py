"""MULTIVI: the peer's recorded answers, cells that lack a modality, imputation, joined data, and bad input."""

import math
import warnings
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from conftest import SHARED
from mudata import MuData, read_h5mu, set_options
from scipy.stats import norm
from test_ddp import run_on_two_ranks

from scvi_lite.data import organize_multiome_anndatas
from scvi_lite.model import MULTIVI
from scvi_lite.nn.disagreement import DISTANCES, jeffreys, mmd
from scvi_lite.nn.vae import Posterior

GOLDEN = SHARED / "golden" / "multivi"
SILENT = {"accelerator": "cpu", "enable_progress_bar": False}
WHERE = {"rna_layer": "rna", "atac_layer": "atac"}
N_GENES, N_REGIONS = 20, 30


@pytest.fixture(autouse=True)
def as_it_will_be():
    """mudata changes a default, and warns of it."""
    with set_options(pull_on_update=False):
        yield


def two_types(n_cells=240, seed=0):
    """RNA and chromatin of two types of cells, which differ in half of their genes and regions."""
    rng = np.random.default_rng(seed)
    kind = np.arange(n_cells) % 2
    mean_kg = np.full((2, N_GENES), 4.0)
    mean_kg[0, :5], mean_kg[1, 5:10] = 30.0, 30.0
    p_kr = np.full((2, N_REGIONS), 0.4)
    p_kr[0, :10], p_kr[1, :10], p_kr[0, 10:20], p_kr[1, 10:20] = 0.8, 0.05, 0.05, 0.8
    rna = anndata.AnnData(sp.csr_matrix(rng.poisson(mean_kg[kind]).astype(np.float32)))
    atac = anndata.AnnData(sp.csr_matrix((rng.random((n_cells, N_REGIONS)) < p_kr[kind]).astype(np.float32)))
    for part, name in ((rna, "gene"), (atac, "region")):
        part.var_names = [f"{name}_{i}" for i in range(part.n_vars)]
        part.obs_names = [f"cell_{i}" for i in range(n_cells)]
    return rna, atac, kind


def mosaic(order=("rna", "atac"), shuffled=False):
    """A third of the cells with both, a third with RNA, a third with chromatin."""
    rna, atac, kind = two_types()
    rng = np.random.default_rng(1)
    has_rna, has_atac = np.arange(160), np.arange(80, 240)
    if shuffled:
        has_rna, has_atac = rng.permutation(has_rna), rng.permutation(has_atac)
    parts = {"rna": rna[has_rna].copy(), "atac": atac[has_atac].copy()}
    mdata = MuData({name: parts[name] for name in order})[rna.obs_names].copy()
    mdata.obs["kind"] = np.array(["first", "second"])[kind]
    mdata.obs["has"] = np.repeat(["expression", "paired", "accessibility"], 80)
    return mdata, rna, atac, kind


@pytest.fixture(scope="module")
def trained():
    with set_options(pull_on_update=False):
        mdata, rna, atac, kind = mosaic(("atac", "rna"), shuffled=True)
        MULTIVI.setup_mudata(mdata, batch_key="has", modalities=WHERE)
        torch.manual_seed(0)
        model = MULTIVI(mdata, n_hidden=32, n_latent=4)
        model.train(60, lr=5e-3, batch_size=48, n_epochs_kl_warmup=20, early_stopping=False, **SILENT)
        return model, rna, atac, kind


def recorded():
    with np.load(GOLDEN / "outputs.npz") as arrays:
        return dict(arrays)


@pytest.mark.skipif(not GOLDEN.exists(), reason="the recorded model is not here")
def test_recorded_answers(tmp_path):
    mdata, outputs = read_h5mu(GOLDEN / "mdata.h5mu"), recorded()
    model = MULTIVI.load(GOLDEN, mdata, accelerator="cpu")
    model.save(tmp_path / "ours")
    for answering in (model, MULTIVI.load(tmp_path / "ours", mdata, accelerator="cpu")):
        for modality in ("joint", "expression", "accessibility"):
            z_nk = answering.get_latent_representation(modality=modality)
            np.testing.assert_allclose(z_nk, outputs[f"z_{modality}"], rtol=1e-4, atol=1e-5)
        for found, name in (
            (answering.get_normalized_expression(), "normalized_expression"),
            (answering.get_normalized_accessibility(), "normalized_accessibility"),
            (answering.get_region_factors(), "region_factors"),
        ):
            np.testing.assert_allclose(found, outputs[name], rtol=1e-4, atol=1e-7)


def test_recorded_answers_with_proteins():
    """A folder of scvi-tools 1.5.0, and what its network says of cells of which each lacks a modality or none."""
    folder = Path(__file__).parent / "data" / "scvi_tools_multivi_proteins"
    with np.load(folder / "outputs.npz") as arrays:
        recorded = dict(arrays)
    parts = {}
    for name, prefix in (("rna", "gene"), ("atac", "region"), ("protein", "protein")):
        parts[name] = anndata.AnnData(recorded.pop(name).astype(np.float32))
        parts[name].var_names = [f"{prefix}_{i}" for i in range(parts[name].n_vars)]
    parts["rna"].obs["batch"] = ["a", "b"] * 12
    model = MULTIVI.load(folder, MuData(parts), accelerator="cpu")
    (batch,) = model._minibatches()
    with torch.inference_mode():
        q = model.module.encode(batch)
        proteins = model.module.decode_proteins(q.z_loc_nk, batch)
        found = {
            "z_joint": q.z_loc_nk,
            "z_protein": model.module.encode_each(batch)["protein"].z_loc_nk,
            "variance": q.z_scale_nk**2,
            "mu": model.module.decode(q.z_loc_nk, model.module.library(batch, q), batch).mu_ng,
            "background": proteins.back_loc_np,
            "background_scale": proteins.back_scale_np,
            "ratio": proteins.ratio_np,
            "theta": proteins.log_theta.exp(),
            "foreground": model.get_protein_foreground_probability(),
            "accessibility": model.get_normalized_accessibility(),
        }
    assert found.keys() == recorded.keys()
    for name, expected in recorded.items():
        np.testing.assert_allclose(torch.as_tensor(np.asarray(found[name])), expected, 1e-4, 1e-5, err_msg=name)


@pytest.mark.parametrize("kinds", ["rna_protein", "atac_protein"])
def test_recorded_answers_without_a_modality(kinds):
    """Folders of scvi-tools 1.5.0 of two kinds of data, with learned weights; that with chromatin has given depths."""
    folder = Path(__file__).parent / "data" / f"scvi_tools_multivi_{kinds}"
    with np.load(folder / "outputs.npz") as arrays:
        recorded = dict(arrays)
    parts = {}
    for name, prefix in (("rna", "gene"), ("atac", "region"), ("protein", "protein")):
        if name in recorded:
            parts[name] = anndata.AnnData(recorded.pop(name).astype(np.float32))
            parts[name].var_names = [f"{prefix}_{i}" for i in range(parts[name].n_vars)]
    mdata = MuData(parts)
    mdata.obs = mdata.obs.assign(batch=["a", "b"] * 8, total=np.arange(1.0, 17), depth=np.arange(1.0, 17) / 20)
    model = MULTIVI.load(folder, mdata, accelerator="cpu")
    ask = {
        "z_joint": model.get_latent_representation,
        "foreground": model.get_protein_foreground_probability,
        "expression": model.get_normalized_expression,
        "accessibility": model.get_normalized_accessibility,
    }
    for name, expected in recorded.items():
        np.testing.assert_allclose(ask[name](), expected, 1e-4, 1e-6, err_msg=name)
    if "atac" in kinds:
        np.testing.assert_allclose(model.get_library_size_factors()["accessibility"], mdata.obs["depth"], rtol=1e-5)


def test_imputes_what_a_cell_lacks(trained):
    """From chromatin the genes of its type, and from genes its regions."""
    model, _, _, kind = trained
    only_atac, only_rna = np.arange(160, 240), np.arange(80)
    expression = model.get_normalized_expression(indices=only_atac, transform_batch="paired", return_numpy=True)
    first = kind[only_atac] == 0
    marker = expression[:, :5].sum(1) / expression[:, :10].sum(1)
    assert marker[first].min() > 0.7 and marker[~first].max() < 0.3
    p_nr = model.get_normalized_accessibility(indices=only_rna, return_numpy=True)
    first = kind[only_rna] == 0
    assert p_nr[first, :10].mean() > 2 * p_nr[~first, :10].mean()
    assert p_nr[~first, 10:20].mean() > 2 * p_nr[first, 10:20].mean()
    np.testing.assert_allclose(expression.sum(1), 1, rtol=1e-5)


def test_latent_spaces(trained):
    model, _, _, kind = trained
    z_nk = model.get_latent_representation()
    assert np.isfinite(z_nk).all()
    centres = [z_nk[kind == k].mean(0) for k in (0, 1)]
    nearest = np.argmin([((z_nk - centre) ** 2).sum(1) for centre in centres], axis=0)
    assert (nearest == kind).mean() > 0.95
    of_rna = model.get_latent_representation(modality="expression")
    of_atac = model.get_latent_representation(modality="accessibility")
    assert np.isnan(of_rna[160:]).all() and np.isnan(of_atac[:80]).all()
    np.testing.assert_allclose(z_nk[:80], of_rna[:80], atol=1e-5)
    np.testing.assert_allclose(z_nk[160:], of_atac[160:], atol=1e-5)
    np.testing.assert_allclose(z_nk[80:160], (of_rna + of_atac)[80:160] / 2, atol=1e-5)
    assert model.get_latent_representation(modality="expression", give_mean=False).shape == z_nk.shape
    with pytest.raises(ValueError, match="Did you mean 'expression'"):
        model.get_latent_representation(modality="expresion")


def test_order_of_modalities_and_cells_does_not_matter(trained):
    model, *_ = trained
    mdata, *_ = mosaic(("rna", "atac"))
    MULTIVI.setup_mudata(mdata, batch_key="has", modalities=WHERE)
    np.testing.assert_allclose(
        model.get_latent_representation(mdata), model.get_latent_representation(), rtol=1e-4, atol=1e-5
    )


def test_differences(trained):
    model, rna, *_ = trained
    genes = model.differential_expression(groupby="kind", group1="first", group2="second", silent=True)
    assert (genes.loc[rna.var_names[:5], "lfc_mean"] > 1).all()
    assert set(genes.index[genes["is_de_fdr_0.05"]]) >= set(rna.var_names[:10])
    regions = model.differential_accessibility(groupby="kind", group1="first", group2="second", silent=True)
    assert (regions.loc[[f"region_{i}" for i in range(10)], "effect_size"] < -0.1).all()
    # Cells without RNA are no cells without the gene.
    has_rna = (model.adata.obs["kind"] == "first").to_numpy() & (model.adata.obs["has"] != "accessibility").to_numpy()
    mean_g = np.asarray(rna.X[has_rna].mean(0))[0]
    np.testing.assert_allclose(genes.loc[rna.var_names, "raw_mean1"], mean_g, rtol=1e-4)


def test_answers(trained):
    model, *_ = trained
    factors = model.get_library_size_factors()
    assert np.isnan(factors["expression"][160:]).all() and (factors["expression"][:160] > 1).all()
    assert np.isnan(factors["accessibility"][:80]).all() and (factors["accessibility"][80:] < 1).all()
    errors = model.get_reconstruction_error(return_mean=False)
    assert (errors["reconstruction_loss_expression"][160:] == 0).all()
    assert (errors["reconstruction_loss_accessibility"][:80] == 0).all()
    assert float(model.get_marginal_ll(n_mc_samples=30)) > float(model.get_elbo())
    draws = model.get_normalized_expression(use_z_mean=False, n_samples=3, gene_list=["gene_3", "gene_1"])
    assert draws.shape == (3, 240, 2)
    assert model.get_normalized_expression(n_samples_overall=7, transform_batch=["paired", "expression"]).shape == (
        7,
        20,
    )
    assert model.history["modality_penalty_train"].iloc[-1, 0] >= 0
    assert model.summary_stats["n_cells"] == 240
    with pytest.warns(UserWarning, match="Give use_z_mean=False for draws"):
        assert model.get_normalized_expression(n_samples=3).shape == (240, 20)


def test_joined_data_say_the_same_as_a_mudata():
    """Three AnnDatas joined, and a MuData with missing cells: one network gives both the same answers."""
    mdata, rna, atac, _ = mosaic()
    both = anndata.concat([rna[80:160], atac[80:160]], axis=1)
    both.var["modality"] = ["Gene Expression"] * N_GENES + ["Peaks"] * N_REGIONS
    joined = organize_multiome_anndatas(both, rna[:80], atac[160:])
    assert joined.obs["modality"].value_counts().to_dict() == dict.fromkeys(
        ["paired", "expression", "accessibility"], 80
    )
    MULTIVI.setup_anndata(joined, batch_key="modality")
    one = MULTIVI(joined, n_hidden=8, n_latent=2)
    assert one._gene_names == rna.var_names.tolist() and one._region_names == atac.var_names.tolist()
    MULTIVI.setup_mudata(mdata, batch_key="has", modalities=WHERE)
    other = MULTIVI(mdata, n_hidden=8, n_latent=2)
    other.module.load_state_dict(one.module.state_dict())
    one.is_trained = other.is_trained = True
    in_order = [f"cell_{i}" for i in range(240)]
    places = [list(joined.obs_names.str.split("_").str[:2].str.join("_")).index(name) for name in in_order]
    for ask in (
        lambda model: model.get_latent_representation(),
        lambda model: model.get_normalized_accessibility(return_numpy=True),
        lambda model: model.get_library_size_factors()["expression"],
    ):
        np.testing.assert_allclose(ask(one)[places], ask(other), rtol=1e-4, atol=1e-6)
    one.train(1, **SILENT)


def test_saved_and_loaded(trained, tmp_path):
    model, *_ = trained
    model.save(tmp_path / "model", save_anndata=True)
    loaded = MULTIVI.load(tmp_path / "model")
    np.testing.assert_array_equal(loaded.get_latent_representation(), model.get_latent_representation())


@pytest.mark.parametrize("weights", ["universal", "cell"])
def test_learned_weights(weights):
    mdata, *_ = mosaic()
    MULTIVI.setup_mudata(mdata, modalities=WHERE)
    model = MULTIVI(mdata, n_hidden=8, n_latent=2, modality_weights=weights, modality_penalty="MMD")
    with torch.no_grad():
        model.module.weight_logit.copy_(torch.tensor([1.0, 3.0]).expand_as(model.module.weight_logit))
    (batch,) = model._minibatches()
    weight_n2 = model.module.weights(batch).detach().numpy()
    share = 1 / (1 + np.exp(2))
    np.testing.assert_allclose(weight_n2[[0, 100, 200]], [[1, 0], [share, 1 - share], [0, 1]], rtol=1e-5)
    model.train(2, adversarial_mixing=False, **SILENT)
    other, *_ = mosaic()
    assert np.isfinite(model.get_latent_representation(other[70:100].copy())).all()


def test_query_of_cells_with_one_modality(trained):
    """New cells of which none has chromatin."""
    model, *_ = trained
    mdata, *_ = mosaic()
    query = mdata[:30].copy()
    assert query["atac"].n_obs == 0
    p_nr = model.get_normalized_accessibility(query, return_numpy=True)
    np.testing.assert_allclose(p_nr, model.get_normalized_accessibility(indices=np.arange(30), return_numpy=True), 1e-4)
    with pytest.raises(ValueError, match="has no cells"):
        MULTIVI.setup_mudata(query, modalities=WHERE)


def test_query_without_a_modality(trained):
    """It is added without cells, and is imputed from what there is."""
    model, rna, _, kind = trained
    rna = rna[:40].copy()
    query = MuData({"rna": rna})
    query.obs["has"] = "expression"
    with pytest.raises(KeyError, match=r"modality='atac' is not.*prepare_query_mudata\(mdata, model\)"):
        model.get_normalized_accessibility(query)
    with pytest.raises(KeyError, match="modality='rna' is not|modality='atac' is not"):
        MULTIVI.prepare_query_mudata(MuData({"other": rna}), model)
    with pytest.warns(UserWarning, match="no modality 'atac'"):
        MULTIVI.prepare_query_mudata(query, model)
    assert query["atac"].shape == (0, N_REGIONS) and query["rna"].n_obs == 40
    p_nr = model.get_normalized_accessibility(query, return_numpy=True)
    np.testing.assert_allclose(p_nr, model.get_normalized_accessibility(indices=np.arange(40), return_numpy=True), 1e-4)
    query.obs["has"] = "new"
    mapped = MULTIVI.load_query_data(query, model, accelerator="cpu")
    mapped.train(2, plan_kwargs={"weight_decay": 0.0}, **SILENT)
    assert np.isfinite(mapped.get_latent_representation()).all()


def test_cells_without_counts():
    """Cells with none in one modality are as cells that lack it; with none in both, as the prior."""
    rna, atac, _ = two_types(60)
    for part, empty in ((rna, slice(20)), (atac, slice(10, 30))):
        counts = part.X.toarray()
        counts[empty] = 0
        part.X = sp.csr_matrix(counts)
    mdata = MuData({"rna": rna, "atac": atac})
    MULTIVI.setup_mudata(mdata, modalities=WHERE)
    model = MULTIVI(mdata, n_hidden=8, n_latent=2)
    model.train(3, **SILENT)
    assert all(np.isfinite(frame.to_numpy()).all() for frame in model.history.values())
    mean_nk, variance_nk = model.get_latent_representation(return_dist=True)
    assert (mean_nk[10:20] == 0).all() and (variance_nk[10:20] == 1).all()
    assert (mean_nk[30:] != 0).all()


def test_divergences():
    """Against the integral of the Jeffreys divergence, and MMD of samples of the same and of different populations."""
    one = Posterior(torch.tensor([[0.3]]), torch.tensor([[1.2]]))
    other = Posterior(torch.tensor([[-0.5]]), torch.tensor([[0.7]]))
    x = np.linspace(-15, 15, 200_001)
    p, q = norm(0.3, 1.2), norm(-0.5, 0.7)
    integral = np.sum((p.pdf(x) - q.pdf(x)) * (p.logpdf(x) - q.logpdf(x))) * (x[1] - x[0])
    assert float(jeffreys(one, other)[0]) == pytest.approx(integral, rel=1e-5)
    torch.manual_seed(0)
    x_nk, y_nk, some_n = torch.randn(500, 2), torch.randn(500, 2), torch.ones(500)
    assert float(mmd(x_nk, y_nk, some_n)) < 0.02 < float(mmd(x_nk, y_nk + 1, some_n))
    few_n = (torch.arange(500) < 9).float()
    torch.testing.assert_close(mmd(x_nk, y_nk, few_n), mmd(x_nk[:9], y_nk[:9], some_n[:9]))
    for dtype in (torch.float32, torch.float64):
        x_nk, y_nk, some_n = x_nk.to(dtype), y_nk.to(dtype), some_n.to(dtype)
        exactly = torch.zeros_like(x_nk)
        penalty = DISTANCES["MMD"](Posterior(x_nk, exactly), Posterior(y_nk, exactly), few_n > 0)
        torch.testing.assert_close(penalty, 9 * mmd(x_nk[:9], y_nk[:9], some_n[:9]))  # for each cell


@pytest.mark.parametrize(("name", "power"), [("Jeffreys", 0.5), ("exact-Jeffreys", 1.0), ("None", 0.0)])
def test_penalty_of_cells_with_both(name, power):
    """Against the closed form for two normals; nothing where a modality is absent."""
    mdata, *_ = mosaic()
    MULTIVI.setup_mudata(mdata, modalities=WHERE)
    module = MULTIVI(mdata, modality_penalty=name).module.eval()
    batch = next(MULTIVI(mdata)._minibatches(batch_size=mdata.n_obs))
    n, k = batch.n_cells, module.config.n_latent
    parts = {"expression": Posterior(torch.zeros(n, k), torch.full((n, k), 0.3))}
    parts["accessibility"] = Posterior(torch.full((n, k), 0.2), torch.full((n, k), 0.5))
    a, b = 0.3**power, 0.5**power
    both = 0.5 * ((a**2 + 0.04) / b**2 + (b**2 + 0.04) / a**2 - 2) * k * (power > 0)
    expected_n = torch.where(batch.has_x_n & batch.has_peaks_n, both, 0.0)
    torch.testing.assert_close(module.penalty(parts, batch), expected_n)
    assert expected_n.unique().numel() == 1 + (power > 0)


def test_bad_input():
    mdata, rna, atac, _ = mosaic()
    with pytest.raises(ValueError, match="neither RNA nor chromatin"):
        MULTIVI.setup_mudata(mdata, modalities={"protein_layer": "rna"})
    with pytest.raises(ValueError, match="both for 'rna'"):
        MULTIVI.setup_mudata(mdata, modalities=WHERE | {"atac_layer": "rna"})
    with pytest.raises(KeyError, match="Did you mean 'atac'"):
        MULTIVI.setup_mudata(mdata, modalities=WHERE | {"atac_layer": "ATAC"})
    MULTIVI.setup_mudata(mdata, modalities=WHERE)
    with pytest.raises(ValueError, match="Did you mean 'Jeffreys'"):
        MULTIVI(mdata, modality_penalty="jeffreys")
    with pytest.raises(ValueError, match="n_genes=27: the data have 20"):
        MULTIVI(mdata, n_genes=27)
    with pytest.raises(ValueError, match="modality_weights='same'"):
        MULTIVI(mdata, modality_weights="same")
    for option in ({"n_genes": "20"}, {"n_layers_encoder": 0}, {"fully_paired": "yes"}):
        ((name, value),) = option.items()
        with pytest.raises(ValueError, match=f"{name}={value!r}"):
            MULTIVI(mdata, **option)
    both = anndata.concat([rna, atac], axis=1)
    MULTIVI.setup_anndata(both)
    with pytest.raises(ValueError, match="Which variables are genes"):
        MULTIVI(both)
    with pytest.raises(ValueError, match="do not add up to the 50 variables"):
        MULTIVI(both, n_genes=20, n_regions=20)
    with pytest.raises(ValueError, match="size_factor_key=.*one for RNA, one for chromatin"):
        MULTIVI.setup_mudata(mdata, size_factor_key=["has", "has", "has"], modalities=WHERE)
    mdata.obs["total"] = 7.0
    with pytest.raises(ValueError, match="'total' is for chromatin.*up to 7. Divide"):
        MULTIVI.setup_mudata(mdata, size_factor_key=["total", "total"], modalities=WHERE)
    both.var["feature_types"] = pd.Series(["Peaks"] * N_REGIONS + ["Gene Expression"] * N_GENES, index=both.var_names)
    with pytest.raises(ValueError, match="genes must come first"):
        MULTIVI(both)
    assert organize_multiome_anndatas(both).var_names[0] == "region_10"
    with pytest.raises(ValueError, match="does not tell genes"):
        organize_multiome_anndatas(rna, rna, atac)
    foreign = rna.copy()
    foreign.var_names = [f"other_{i}" for i in range(N_GENES)]
    with pytest.raises(ValueError, match="rna_anndata: none of its 20 features"):
        organize_multiome_anndatas(both, foreign)


@pytest.fixture(scope="module")
def with_proteins():
    with set_options(pull_on_update=False):
        rna, atac, kind = two_types()
        mean_kp = np.array([[60.0, 4.0, 60.0], [4.0, 60.0, 60.0]])
        counts = np.random.default_rng(2).poisson(mean_kp[kind]).astype(np.float32)
        protein = anndata.AnnData(counts, obs=rna.obs.copy(), var=pd.DataFrame(index=["CD1", "CD2", "CD3"]))
        mdata = MuData({"protein": protein[40:].copy(), "atac": atac[:200].copy(), "rna": rna})[rna.obs_names].copy()
        MULTIVI.setup_mudata(mdata, modalities=WHERE | {"protein_layer": "protein"})
        torch.manual_seed(0)
        model = MULTIVI(mdata, n_hidden=16, n_latent=3)
        model.train(40, lr=5e-3, batch_size=64, n_epochs_kl_warmup=10, early_stopping=False, **SILENT)
        return model, kind


def test_proteins(with_proteins, tmp_path):
    model, kind = with_proteins
    p_np = model.get_protein_foreground_probability()
    assert p_np.columns.tolist() == ["CD1", "CD2", "CD3"] and p_np.to_numpy().min() >= 0 and p_np.to_numpy().max() <= 1
    unmeasured = np.arange(40)  # told from RNA and chromatin
    higher = (p_np["CD1"] > p_np["CD2"]).to_numpy()
    assert (higher == (kind == 0))[unmeasured].mean() > 0.9
    draws = model.get_protein_foreground_probability(
        protein_list=["CD3"], use_z_mean=False, n_samples=2, return_mean=False
    )
    assert draws.shape == (240, 1, 2)
    with pytest.warns(UserWarning, match="n_samples=2 changes nothing"):  # as notebooks written for TOTALVI ask
        np.testing.assert_array_equal(model.get_protein_foreground_probability(n_samples=2), p_np)
    of_protein = model.get_latent_representation(modality="protein")
    assert np.isnan(of_protein[:40]).all() and np.isfinite(of_protein[40:]).all()
    errors = model.get_reconstruction_error(return_mean=False)
    assert (errors["reconstruction_loss_protein"][:40] == 0).all()
    assert (errors["reconstruction_loss_protein"][40:] > 0).all()
    assert float(model.get_marginal_ll(n_mc_samples=30)) > float(model.get_elbo())
    model.save(tmp_path / "model", save_anndata=True)
    loaded = MULTIVI.load(tmp_path / "model")
    np.testing.assert_array_equal(loaded.get_latent_representation(), model.get_latent_representation())
    with pytest.raises(ValueError, match="Did you mean 'CD1'"):
        model.get_protein_foreground_probability(protein_list=["cd1"])


def test_a_model_without_proteins_says_so(trained):
    model, *_ = trained
    with pytest.raises(RuntimeError, match="has no proteins"):
        model.get_protein_foreground_probability()
    with pytest.raises(ValueError, match="modality='protein'"):
        model.get_latent_representation(modality="protein")


def test_two_ranks(tmp_path):
    """PEAKVI and MULTIVI on two devices: ranks end alike, whichever of them has the cells with chromatin."""
    first, second = run_on_two_ranks(
        """
        from scvi_lite.model import MULTIVI, PEAKVI
        told = {}
        for model_class, more in ((PEAKVI, {}), (MULTIVI, {"n_genes": 7, "modality_weights": "universal"})):
            if model_class is MULTIVI:
                adata.X[30:60, 7:], adata.X[60:90, :7] = 0, 0
            model_class.setup_anndata(adata, batch_key="batch")
            watch, model = Watch(), model_class(adata, n_hidden=8, n_latent=2, **more)
            model.train(3, lr=1e-3, callbacks=watch, **options)
            told[model_class.__name__] = describe(model, watch)
        tell(**told)
        """,
        tmp_path,
    )
    for name in ("PEAKVI", "MULTIVI"):
        for what in ("weights", "history", "indices", "draw"):
            assert first[name][what] == second[name][what], (name, what)
        assert len(first[name]["history"]["elbo_validation"]) == 3
        seen = [row for rank in (first, second) for epoch, rows in rank[name]["train"] if epoch == 0 for row in rows]
        assert sorted(seen) == sorted(first[name]["indices"][0])
    assert len(first["MULTIVI"]["history"]["modality_penalty_validation"]) == 3


def test_compiled_training():
    """Several encoders read the same counts, with gradients."""
    rna, atac, _ = two_types(40)
    both = anndata.concat([rna, atac], axis=1)
    MULTIVI.setup_anndata(both)
    losses = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = MULTIVI(both, n_genes=N_GENES, n_hidden=8, n_latent=2, dropout_rate=0.0)
        plan = {"compile": compiled, "compile_kwargs": {"backend": "eager"}}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            model.train(2, plan_kwargs=plan, train_size=1.0, early_stopping=False, batch_size=20, **SILENT)
        losses.append(model.history["train_loss"].to_numpy())
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-2)


@pytest.mark.parametrize("joined", [False, True])
def test_minified(joined, tmp_path):
    """What is decoded from latent space is answered as before, from data without counts."""
    rna, atac, kind = two_types(40)
    if joined:
        data = anndata.concat([rna, atac], axis=1)
        data.layers["counts"] = data.X.copy()
        MULTIVI.setup_anndata(data, layer="counts")
    else:
        atac.layers["counts"] = atac.X.copy()
        data = MuData({"rna": rna, "atac": atac})
        MULTIVI.setup_mudata(data, atac_layer="counts", modalities=WHERE)
    data.obs["kind"] = np.array(["first", "second"])[kind]
    model = MULTIVI(data, n_genes=N_GENES, n_hidden=8, n_latent=2)
    model.train(1, **SILENT)

    def ask(model):
        return (
            model.get_latent_representation(),
            model.get_normalized_expression(return_numpy=True),
            model.get_normalized_accessibility(return_numpy=True),
        )

    before = ask(model)
    model.minify_mudata()
    assert model.minified_data_type == "latent_posterior_parameters"
    assert (model.adata if joined else model.adata["atac"]).X.nnz == 0 and "counts" in (data if joined else atac).layers
    model.save(tmp_path / "model", save_anndata=True)
    for answering in (model, MULTIVI.load(tmp_path / "model"), MULTIVI.load(tmp_path / "model", data)):
        for found, expected in zip(ask(answering), before):
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    regions = model.differential_accessibility(groupby="kind", group1="first", silent=True)
    assert len(regions) == N_REGIONS and regions["emp_prob1"].isna().all()
    for question in (
        model.get_library_size_factors,
        model.get_elbo,
        lambda: model.get_latent_representation(modality="expression"),
        lambda: model.get_normalized_accessibility(normalize_cells=True),
    ):
        with pytest.raises(RuntimeError, match="minified without"):
            question()


@pytest.mark.parametrize("kinds", [("rna",), ("atac",), ("rna", "protein"), ("atac", "protein")])
def test_without_a_modality(kinds, tmp_path):
    """As a model of all, of what there is; what is not there is refused."""
    rna, atac, kind = two_types(120)
    counts = np.random.default_rng(2).poisson([[60.0, 4.0], [4.0, 60.0]], (60, 2, 2)).reshape(120, 2)
    protein = anndata.AnnData(counts.astype(np.float32), obs=rna.obs.copy(), var=pd.DataFrame(index=["CD1", "CD2"]))
    mdata = MuData({"rna": rna, "atac": atac, "protein": protein})
    MULTIVI.setup_mudata(mdata, modalities={f"{name}_layer": name for name in kinds})
    torch.manual_seed(0)
    model = MULTIVI(mdata, n_hidden=16, n_latent=3, modality_weights="universal")
    model.train(40, lr=5e-3, batch_size=30, n_epochs_kl_warmup=10, early_stopping=False, **SILENT)
    z_nk = model.get_latent_representation()
    centres = [z_nk[kind == k].mean(0) for k in (0, 1)]
    assert (np.argmin([((z_nk - centre) ** 2).sum(1) for centre in centres], axis=0) == kind).mean() > 0.9
    names = {"rna": "expression", "atac": "accessibility", "protein": "protein"}
    there = {f"reconstruction_loss_{names[name]}" for name in kinds}
    assert set(model.get_reconstruction_error()) == there
    assert float(model.get_marginal_ll(n_mc_samples=20)) > float(model.get_elbo())
    factors = model.get_library_size_factors()
    for name, ask in (
        ("rna", model.get_normalized_expression),
        ("atac", model.get_normalized_accessibility),
        ("atac", lambda: model.get_normalized_accessibility(normalize_regions=True, threshold=0.1)),
        ("atac", lambda: model.get_region_factors()[None]),
    ):
        if name in kinds:
            assert ask().shape[1] == mdata[name].n_vars
        else:
            with pytest.warns(UserWarning, match=f"has no (genes|regions).*{name}_layer"):
                assert ask().shape[1] == 0
    for name, ask in (
        ("rna", lambda: model.differential_expression(idx1=[0, 1], idx2=[2, 3], silent=True).T),
        ("atac", lambda: model.differential_accessibility(idx1=[0, 1], idx2=[2, 3], silent=True).T),
        ("protein", model.get_protein_foreground_probability),
    ):
        if name in kinds:
            assert ask().shape[1] == mdata[name].n_vars
        else:
            with warnings.catch_warnings(), pytest.raises(RuntimeError, match="has no (features|proteins)"):
                warnings.simplefilter("ignore")
                ask()
    assert np.isnan(factors["expression"]).all() == ("rna" not in kinds)
    assert np.isnan(factors["accessibility"]).all() == ("atac" not in kinds)
    model.save(tmp_path / "model", save_anndata=True)
    np.testing.assert_array_equal(MULTIVI.load(tmp_path / "model").get_latent_representation(), z_nk)


def test_genes_and_proteins_of_an_anndata(capsys):
    rna, _, _ = two_types(40)
    rna.obsm["protein"] = np.random.default_rng(0).poisson(5.0, (40, 3)).astype(np.float32)
    MULTIVI.setup_anndata(rna, protein_expression_obsm_key="protein")
    model = MULTIVI(rna, n_genes=N_GENES, n_regions=0, n_hidden=8, n_latent=2)
    model.train(1, **SILENT)
    assert model.get_normalized_expression().shape == (40, N_GENES)
    with pytest.warns(UserWarning, match="has no regions"):
        assert model.get_normalized_accessibility().shape == (40, 0)
    model.view_anndata_setup()
    assert "X[:, 0:20]" in capsys.readouterr().out


def test_first_features_and_given_depth(tmp_path):
    """Of a MuData only the first genes and regions, and depths that are given and not learned."""
    rna, atac, _ = two_types(40)
    mdata = MuData({"rna": rna, "atac": atac})
    mdata.obs["total"], mdata.obs["depth"] = np.arange(1.0, 41), np.arange(1.0, 41) / 40
    MULTIVI.setup_mudata(mdata, size_factor_key=["total", "depth"], modalities=WHERE)
    with pytest.warns(UserWarning, match="idx_layer has no effect"):
        MULTIVI.setup_mudata(mdata, idx_layer="row", size_factor_key=["total", "depth"], modalities=WHERE)
    with pytest.warns(UserWarning, match="n_genes=7 of 20|n_regions=25 of 30"):
        model = MULTIVI(mdata, n_genes=7, n_regions=25, n_hidden=8, n_latent=2)
    model.train(1, **SILENT)
    model.save(tmp_path / "model", save_anndata=True)
    for answering in (model, MULTIVI.load(tmp_path / "model")):
        assert answering.get_normalized_expression().columns.tolist() == rna.var_names[:7].tolist()
        assert answering.get_normalized_accessibility().columns.tolist() == atac.var_names[:25].tolist()
        factors = answering.get_library_size_factors()
        np.testing.assert_allclose(factors["expression"], mdata.obs["total"], rtol=1e-5)
        np.testing.assert_allclose(factors["accessibility"], mdata.obs["depth"], rtol=1e-4)


@pytest.mark.parametrize(("n_genes", "n_regions", "width"), [(50, 30, 5), (50, 0, 7), (3, 17_000, 128)])
def test_width_unless_given(n_genes, n_regions, width):
    """As in scvi-tools: the root of the number of regions, of genes only where there are none, and at most 128."""
    adata = anndata.AnnData(sp.random(4, n_genes + n_regions, 0.5, "csr", np.float32, rng=0).ceil())
    MULTIVI.setup_anndata(adata)
    config = MULTIVI(adata, n_genes=n_genes, n_regions=n_regions).module.config
    assert (config.n_hidden, config.n_latent) == (width, math.isqrt(width))
