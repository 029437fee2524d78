"""Differential abundance, on samples that differ in which cell types they have."""

import numpy as np
import pytest
import torch

from scvi_lite.data import simulate
from scvi_lite.model import SCVI


@pytest.fixture(scope="module")
def model():
    """Sample batch_0 has nine cells of type_0 for each of type_1, batch_1 the other way round."""
    adata = simulate(
        n_cells=400, n_genes=60, n_types=2, batch_effect=0.0, composition_bt=np.array([[0.9, 0.1], [0.1, 0.9]])
    )
    SCVI.setup_anndata(adata)
    torch.manual_seed(0)
    model = SCVI(adata, n_latent=3, n_hidden=32, gene_likelihood="nb")
    model.train(max_epochs=25, enable_progress_bar=False, plan_kwargs={"lr": 5e-3, "n_epochs_kl_warmup": 1})
    return model


@pytest.mark.parametrize("dof", [None, 3.0])
def test_log_densities_are_those_of_the_samples(model, dof):
    found = model.differential_abundance(sample_key="batch", dof=dof)
    assert found is not None and list(found) == ["batch_0", "batch_1"]
    assert found.equals(model.adata.obsm["da_log_probs"])
    z = torch.from_numpy(model.get_latent_representation())
    for name in found:
        rows = np.flatnonzero(model.adata.obs["batch"] == name)
        expected = model.get_aggregated_posterior(indices=rows, dof=dof).log_prob(z)
        np.testing.assert_allclose(found[name], expected, atol=1e-3)


def test_abundant_types_stand_out(model):
    found = model.differential_abundance(sample_key="batch")
    score = found["batch_0"] - found["batch_1"]
    is_0 = model.adata.obs["cell_type"] == "type_0"
    # The density of a type is nine times as high in the sample that has nine times as many of its cells.
    assert np.median(score[is_0]) == pytest.approx(np.log(9), abs=0.7)
    assert np.median(score[~is_0]) == pytest.approx(-np.log(9), abs=0.7)


def test_subsets(model):
    part = model.adata[:30].copy()
    whole = model.differential_abundance(sample_key="batch")
    found = model.differential_abundance(adata_sub=part, sample_key="batch")
    np.testing.assert_allclose(found, whole.iloc[:30], atol=1e-3)
    assert "da_log_probs" in part.obsm
    thinned = model.differential_abundance(sample_key="batch", num_cells_posterior=40)
    assert thinned.shape == (400, 2) and not np.allclose(thinned, whole, atol=1e-3)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ValueError, "sample_key is needed"),
        ({"sample_key": "bach"}, KeyError, "Did you mean 'batch'"),
        ({"sample_key": "batch", "num_cells_posterior": 0}, ValueError, "num_cells_posterior=0"),
        ({"sample_key": "batch", "dof": 0}, ValueError, "dof=0"),
    ],
)
def test_refused(model, options, error, message):
    with pytest.raises(error, match=message):
        model.differential_abundance(**options)
