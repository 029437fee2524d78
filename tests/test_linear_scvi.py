"""LinearSCVI: loadings that mean what they say, and the recorded answers of scvi-tools."""

import anndata
import numpy as np
import pytest
import torch
from conftest import SHARED
from test_golden import answers, recording

import scvi_lite
from scvi_lite.model import LinearSCVI

CASE = SHARED / "golden" / "linear_scvi"
SILENT = {"accelerator": "cpu", "enable_progress_bar": False}
golden = pytest.mark.skipif(not CASE.exists(), reason="the recorded models are not here")


def small(**options):
    adata = scvi_lite.data.synthetic_iid(batch_size=60, n_genes=12)
    LinearSCVI.setup_anndata(adata, batch_key="batch", labels_key="labels")
    return LinearSCVI(adata, n_hidden=8, n_latent=3, **options)


@golden
def test_recorded_answers():
    adata = anndata.read_h5ad(CASE / "adata.h5ad")
    model = LinearSCVI.load(CASE, adata, accelerator="cpu")
    recorded, found = recording(CASE), answers(model, adata)
    found["loadings"] = model.get_loadings().to_numpy()
    assert set(recorded) <= set(found)
    for name, expected in recorded.items():
        zero = 1e-5 * expected.std() if name in ("z_mean", "library_loc", "loadings") else 0.0
        np.testing.assert_allclose(found[name], expected, rtol=1e-4, atol=zero, err_msg=name)


@pytest.mark.parametrize("use_batch_norm", [True, False])
@pytest.mark.parametrize("gene_likelihood", ["nb", "zinb"])
def test_loadings_are_the_derivatives_of_the_decoder(use_batch_norm, gene_likelihood):
    """A step of one along a factor changes log expression, relative to the other genes, by its loading."""
    model = small(use_batch_norm=use_batch_norm, gene_likelihood=gene_likelihood)
    model.train(max_epochs=3, plan_kwargs={"lr": 0.05}, **SILENT)
    loadings = model.get_loadings()
    assert loadings.shape == (12, 3)
    assert loadings.columns.tolist() == ["Z_0", "Z_1", "Z_2"]
    assert loadings.index.tolist() == model.adata.var_names.tolist()
    (batch,) = model._minibatches(indices=[0])
    z_nk = torch.cat([torch.zeros(1, 3), torch.eye(3)])
    (batch,) = model._minibatches(indices=[0, 0, 0, 0])
    with torch.no_grad():
        log_ng = model.module.decode(z_nk, batch.library_n, batch).scale_ng.log().numpy()
    change_gk = (log_ng[1:] - log_ng[0]).T
    relative = loadings.to_numpy() - loadings.to_numpy().mean(0)
    np.testing.assert_allclose(change_gk - change_gk.mean(0), relative, atol=1e-5)
    assert np.abs(relative).max() > 0.05


def test_finds_the_genes_of_a_programme():
    """One factor, which moves half of the genes in half of the cells: it loads on these genes."""
    rng = np.random.default_rng(0)
    on_n, in_g = rng.random(400) < 0.5, np.arange(20) < 6
    rate_ng = 5 * np.exp(1.5 * np.outer(on_n, in_g))
    adata = anndata.AnnData(rng.poisson(rate_ng).astype(np.float32))
    LinearSCVI.setup_anndata(adata)
    model = LinearSCVI(adata, n_latent=1, n_hidden=16, use_observed_lib_size=True)
    model.train(max_epochs=30, batch_size=32, plan_kwargs={"lr": 2e-2, "n_epochs_kl_warmup": 1}, **SILENT)
    loading_g = model.get_loadings()["Z_0"].to_numpy()
    loading_g *= np.sign(np.corrcoef(loading_g, in_g)[0, 1])
    assert loading_g[in_g].min() > loading_g[~in_g].max()


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"dispersion": "gene-cell"}, ValueError, "linear decoder has no hidden layer"),
        ({"encode_covariates": True}, TypeError, "no option 'encode_covariates'"),
        ({"use_batch_norm": "both"}, ValueError, "use_batch_norm='both'"),
        ({"bias": 1}, ValueError, "bias=1"),
    ],
)
def test_refuses(options, error, message):
    with pytest.raises(error, match=message):
        small(**options)


def test_a_bias_before_batch_norm_is_folded_into_it():
    from scvi_lite.io.translators.common import Setup
    from scvi_lite.io.translators.linear_scvi import translate

    model = small()
    ours = model.module.state_dict()
    norm = {n: ours[f"decoder.scale.batch_norm.{n}"] for n in ("weight", "bias", "running_mean", "running_var")}
    theirs = {f"decoder.factor_regressor.fc_layers.Layer 0.1.{name}": value for name, value in norm.items()}
    theirs["decoder.factor_regressor.fc_layers.Layer 0.0.weight"] = torch.cat(
        [ours["decoder.scale.linear.weight"], ours["decoder.scale.linear.tables.0"].T], dim=1
    )
    theirs["decoder.factor_regressor.fc_layers.Layer 0.0.bias"] = torch.arange(12.0)
    state = translate(theirs, Setup({"use_observed_lib_size": True}, 2, (), False))
    assert torch.equal(state["decoder.scale.batch_norm.running_mean"], norm["running_mean"] - torch.arange(12.0))
    assert torch.equal(state["decoder.scale.linear.tables.0"], ours["decoder.scale.linear.tables.0"])
    assert "decoder.scale.linear.bias" not in state
