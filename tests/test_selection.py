"""Choice of genes by their zeros: closed forms against the formula cell by cell, and simulated overdispersion."""

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from scipy import sparse

from scvi_lite.data import poisson_gene_selection
from scvi_lite.data.rows import Rows
from scvi_lite.data.selection import zeros

N_CELLS, N_GENES = 400, 60
DISPERSED = np.arange(N_GENES) % 4 == 0


@pytest.fixture(scope="module")
def adata():
    """Poisson counts, of which every fourth gene has a gamma-distributed rate."""
    rng = np.random.default_rng(0)
    depth_n, rate_g = rng.lognormal(0, 0.5, N_CELLS), 0.8
    gamma_ng = np.where(DISPERSED, rng.gamma(0.3, 1 / 0.3, (N_CELLS, N_GENES)), 1)
    x_ng = rng.poisson(depth_n[:, None] * rate_g * gamma_ng).astype(np.float32)
    obs = pd.DataFrame({"batch": np.where(np.arange(N_CELLS) < 300, "a", "b")}, [f"c{i}" for i in range(N_CELLS)])
    return AnnData(sparse.csr_matrix(x_ng), obs=obs)


@pytest.mark.parametrize("form", [sparse.csr_matrix, sparse.csc_matrix, np.asarray])
def test_shares_of_zeros(adata, form):
    x_ng = adata.X.toarray().astype(float)
    batch_n = (adata.obs["batch"] == "b").to_numpy().astype(int)
    observed_bg, expected_bg = zeros(Rows(form(x_ng)), batch_n)
    for b in (0, 1):
        x = x_ng[batch_n == b]
        np.testing.assert_allclose(observed_bg[b], (x == 0).mean(0))
        np.testing.assert_allclose(expected_bg[b], np.exp(-np.outer(x.sum(1), x.sum(0) / x.sum())).mean(0))


@pytest.mark.parametrize("batch_key", [None, "batch"])
def test_overdispersed_genes_are_chosen(adata, batch_key):
    table = poisson_gene_selection(adata, n_top_genes=int(DISPERSED.sum()), batch_key=batch_key, inplace=False)
    assert (table["highly_variable"].to_numpy() == DISPERSED).all()
    assert (table["prob_zero_enrichment_rank"][DISPERSED].min() >= table["prob_zero_enrichment_rank"][~DISPERSED]).all()
    assert "highly_variable" not in adata.var


def test_the_probability_is_that_of_drawn_cells(adata):
    table = poisson_gene_selection(adata, inplace=False)
    rng = np.random.default_rng(0)
    drawn = [
        rng.random((20_000, N_GENES)) < table[f"{part}_fraction_zeros"].to_numpy() for part in ("observed", "expected")
    ]
    np.testing.assert_allclose(table["prob_zero_enrichment"], (drawn[0] > drawn[1]).mean(0), atol=0.015)


def test_columns_in_place_and_a_subset(adata):
    chosen = adata.copy()
    assert poisson_gene_selection(chosen, n_top_genes=7, subset=True, batch_key="batch") is None
    assert chosen.shape == (N_CELLS, 7) and chosen.var["highly_variable"].all()
    assert chosen.var["prob_zero_enriched_nbatches"].isin([0, 1, 2]).all()
    assert chosen.uns["hvg"] == {"flavor": "poisson_zeros"}


def test_wrong_calls(adata):
    with pytest.raises(KeyError, match="batch_key='bach'.*Did you mean 'batch'"):
        poisson_gene_selection(adata, batch_key="bach")
    for factor in (-1, 0.25):
        adata.layers["scaled"] = factor * adata.X
        with pytest.raises(ValueError, match=r"layers\['scaled'\] holds fractions or negative numbers"):
            poisson_gene_selection(adata, layer="scaled")
    with pytest.raises(ValueError, match="n_top_genes=0"):
        poisson_gene_selection(adata, n_top_genes=0)
    with pytest.raises(TypeError, match="has no option 'top'"):
        poisson_gene_selection(adata, top=3)
    with pytest.warns(UserWarning, match="n_samples has no effect"):
        poisson_gene_selection(adata, n_samples=100, inplace=False)
