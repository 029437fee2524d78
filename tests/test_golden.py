"""Models that scvi-tools 1.5.0 trained and saved, loaded here, give the answers that were recorded there.

All cells in order, in evaluation mode, the latent variables at their posterior means.
"""

import json

import anndata
import numpy as np
import pytest
import torch
from conftest import SHARED

from scvi_lite.model.scvi import SCVI
from scvi_lite.nn.normal import kl_normal

CASES = sorted((SHARED / "golden").glob("scvi_*"))
SIGNED = {"z_mean", "library_loc", "px_zi_logits"}

pytestmark = pytest.mark.skipif(not CASES, reason="the recorded models are not here")


def recording(case):
    with np.load(case / "outputs.npz") as arrays:
        return dict(arrays)


def answers(model, adata):
    """What the model says about each cell, under the names of the recording."""
    (batch,) = model._minibatches(adata, batch_size=adata.n_obs)
    module = model.module
    with torch.inference_mode():
        q = module.encode(batch)
        library_n = module.library(batch, q)
        rates = module.decode(q.z_loc_nk, library_n, batch)
        found = {
            "z_mean": q.z_loc_nk,
            "z_scale": q.z_scale_nk,
            "px_scale": rates.scale_ng,
            "px_mu": rates.mu_ng,
            "px_rate": rates.mu_ng,
            "log_likelihood_n": rates.log_likelihood(batch.x),
            "kl_z_n": kl_normal(q.z_loc_nk, q.z_scale_nk).sum(-1),
        }
        if q.library_loc_n is not None:
            found["library_loc"], found["library_scale"] = q.library_loc_n[:, None], q.library_scale_n[:, None]
            found["kl_library_n"] = module.kl_library(batch, q)
        if rates.log_theta is not None:
            found["px_theta"] = rates.log_theta.exp().expand_as(rates.scale_ng)
        if rates.dropout_ng is not None:
            found["px_zi_logits"] = rates.dropout_ng
    return {name: tensor.double().numpy() for name, tensor in found.items()}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_recorded_answers(case):
    adata = anndata.read_h5ad(case / "adata.h5ad")
    model = SCVI.load(case, adata, accelerator="cpu")
    assert model.is_trained and len(model.train_indices) == 450
    recorded = recording(case)
    found = answers(model, adata)
    assert set(recorded) <= set(found)
    for name in recorded:
        expected = recorded[name].astype(np.float64)
        # Where values pass through zero, a float32 sum is exact to a fraction of its terms, not of itself.
        zero = 1e-5 * expected.std() if name in SIGNED else 0.0
        np.testing.assert_allclose(found[name], expected, rtol=1e-4, atol=zero, err_msg=name)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_latent_space(case):
    """The same through the call that a user makes."""
    adata = anndata.read_h5ad(case / "adata.h5ad")
    model = SCVI.load(case, adata, accelerator="cpu")
    recorded = recording(case)
    z_nk = model.get_latent_representation()
    if json.loads((case / "case.json").read_text())["args"].get("latent_distribution") == "ln":
        assert np.allclose(z_nk.sum(1), 1, atol=1e-5)
    else:
        np.testing.assert_allclose(z_nk, recorded["z_mean"], rtol=1e-4, atol=1e-5 * recorded["z_mean"].std())


def test_a_loaded_model_is_saved_as_ours(tmp_path):
    """From a folder of scvi-tools to a folder of ours, with the same weights, history and split."""
    case = SHARED / "golden" / "scvi_covariates_encoded"
    adata = anndata.read_h5ad(case / "adata.h5ad")
    theirs = SCVI.load(case, adata, accelerator="cpu")
    theirs.save(tmp_path / "ours", save_anndata=True)
    ours = SCVI.load(tmp_path / "ours", accelerator="cpu")
    for (name, one), other in zip(theirs.module.state_dict().items(), ours.module.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    assert ours.history["train_loss"].equals(theirs.history["train_loss"]) and len(ours.history) == 6
    np.testing.assert_array_equal(ours.validation_indices, theirs.validation_indices)
    np.testing.assert_array_equal(ours.get_latent_representation(), theirs.get_latent_representation())
