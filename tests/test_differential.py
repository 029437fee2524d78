"""Differential expression: its parts against brute force, the whole on data whose differential genes are known."""

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse

from scvi_lite.analysis import comparing, differential
from scvi_lite.analysis.effects import Change, Draws, Pairs, Vanilla, called, estimate_delta, estimate_pseudocounts
from scvi_lite.analysis.groups import count_statistics
from scvi_lite.data import simulate
from scvi_lite.model import SCVI

STATISTICS = [
    "raw_mean1", "raw_mean2", "non_zeros_proportion1", "non_zeros_proportion2", "raw_normalized_mean1",
    "raw_normalized_mean2",
]  # fmt: skip
NAMES = ["comparison", "group1", "group2"]
VANILLA = ["proba_m1", "proba_m2", "bayes_factor", "scale1", "scale2"]
CHANGE = [
    "proba_de", "proba_not_de", "bayes_factor", "scale1", "scale2", "pseudocounts", "delta", "lfc_mean", "lfc_median",
    "lfc_std", "lfc_min", "lfc_max",
]  # fmt: skip


def make(n_cells=120, **options):
    adata = simulate(n_cells=n_cells, n_genes=20, n_types=3, n_batches=2, **options)
    SCVI.setup_anndata(adata, batch_key="batch")
    model = SCVI(adata, n_latent=4, n_hidden=16)
    model.is_trained = True
    return model


@pytest.fixture(scope="module")
def model():
    return make()


def compare(model, **options):
    return model.differential_expression(**{"groupby": "cell_type", "silent": True, "n_samples_overall": 60, **options})


# The parts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [sparse.csr_matrix, sparse.csc_matrix, np.asarray])
def test_count_statistics(kind, monkeypatch):
    monkeypatch.setattr("scvi_lite.analysis.groups.BLOCK_OF_CELLS", 7)
    x = np.random.default_rng(0).poisson(0.7, (30, 5)).astype(np.float32)
    x[3] = 0
    groups = [np.array([0, 3, 9]), np.arange(10, 30)]
    normalised = x / np.maximum(x.sum(1, keepdims=True), 1e-12) * 1e4
    for found, rows in zip(count_statistics(kind(x), groups), groups, strict=True):
        np.testing.assert_allclose(found["raw_mean"], x[rows].mean(0), rtol=1e-6)
        np.testing.assert_allclose(found["non_zeros_proportion"], (x[rows] > 0).mean(0))
        np.testing.assert_allclose(found["raw_normalized_mean"], normalised[rows].mean(0), rtol=1e-5)


def test_called_genes_against_brute_force():
    rng = np.random.default_rng(0)
    for target in (0.01, 0.05, 0.2):
        p = rng.beta(2, 0.3, 50)
        sizes = [k for k in range(1, 51) if np.sort(1 - p)[:k].mean() <= target]
        expected = np.zeros(50, bool)
        expected[np.argsort(-p)[: max(sizes, default=0)]] = True
        np.testing.assert_array_equal(called(p, target), expected)


def test_effects_of_known_draws():
    """Log2 fold changes of log-normal draws are normal, with moments and tail probabilities that scipy knows."""
    from scipy import stats

    rng, n = np.random.default_rng(0), 40_000
    mean, spread = np.array([0.0, 0.5, -2.0]), np.array([0.3, 0.2, 0.5])
    one = Draws(2.0 ** rng.normal(mean, spread, (n, 3)).astype(np.float32), np.zeros(3, bool))
    two = Draws(np.ones((n, 3), np.float32), np.zeros(3, bool))
    columns = Change(delta=0.25, intervals=(0.9,))(one, two, Pairs())
    np.testing.assert_allclose(columns["lfc_mean"], mean, atol=0.02)
    np.testing.assert_allclose(columns["lfc_std"], spread, rtol=0.03)
    lfc = stats.norm(mean, spread)
    up, down = lfc.sf(0.25), lfc.cdf(-0.25)
    np.testing.assert_allclose(columns["proba_de"], np.maximum(up, down), atol=0.01)
    np.testing.assert_allclose(columns["lfc_confidence_interval_0.9_min"], lfc.ppf(0.05), atol=0.03)
    np.testing.assert_allclose(columns["lfc_confidence_interval_0.9_max"], lfc.ppf(0.95), atol=0.03)
    both = Change(delta=0.25, test_mode="two")(one, two, Pairs())
    np.testing.assert_allclose(both["proba_de"], up + down, atol=0.01)
    np.testing.assert_allclose(Vanilla()(one, two, Pairs())["proba_m1"], lfc.sf(0), atol=0.01)
    own = Change(effect=lambda x1, x2: x1 - x2, region=lambda effect: effect > 1)(one, two, Pairs())
    np.testing.assert_allclose(own["proba_de"], lfc.sf(1), atol=0.01)


def test_blocks_of_genes_do_not_matter(monkeypatch):
    rng = np.random.default_rng(0)
    one, two = (Draws(rng.gamma(2, size=(50, 9)).astype(np.float32), np.zeros(9, bool)) for _ in range(2))
    whole = Change(delta=None)(one, two, Pairs())
    monkeypatch.setattr("scvi_lite.analysis.effects.BLOCK", 100)
    pd.testing.assert_frame_equal(pd.DataFrame(Change(delta=None)(one, two, Pairs())), pd.DataFrame(whole))


def test_permuted_pairs_stay_within_a_batch():
    """Batches differ a thousandfold and populations do not: only pairs across batches would show a change."""
    scale = np.where(np.arange(60) % 2 == 0, 1.0, 1000.0)[:, None] * np.ones((1, 4))
    draws = Draws(scale.astype(np.float32), np.zeros(4, bool))
    within = Change()(draws, draws, Pairs.make(60, 2, n_permuted=500))
    across = Change()(draws, draws, Pairs.make(60, 2, n_permuted=500, same_batches=False))
    assert (within["proba_de"] == 0).all() and (across["proba_de"] > 0.1).all()
    shuffled = Change()(draws, draws, Pairs.make(60, 2, same_batches=False))
    assert (shuffled["proba_de"] > 0.1).all()


def test_pseudocounts_come_from_silent_genes():
    value = np.array([[1.0, 5.0, 2.0], [3.0, 4.0, 2.0]], np.float32)
    none, first = np.zeros(3, bool), np.array([True, False, False])
    assert estimate_pseudocounts(Draws(value, none), Draws(value, none)) == 1e-10
    assert estimate_pseudocounts(Draws(value, first), Draws(value, none)) == pytest.approx(1.0)


def test_delta_lies_between_null_and_differential_genes():
    rng = np.random.default_rng(0)
    effects = np.concatenate([rng.normal(0, 0.05, 400), rng.normal(2, 0.2, 50), rng.normal(-1.6, 0.2, 50)])
    assert estimate_delta(effects) == pytest.approx(0.9, abs=0.1)
    assert estimate_delta(np.zeros(10)) == 0.1


# The whole -------------------------------------------------------------------------------------------------------


def test_columns(model):
    vanilla = compare(model)
    assert list(vanilla) == VANILLA + STATISTICS + NAMES
    assert vanilla.shape[0] == 60 and set(vanilla["comparison"]) == {f"type_{i} vs Rest" for i in range(3)}
    change = compare(model, mode="change", fdr_target=[0.05, 0.2], cred_interval_lvls=[0.5])
    interval = ["lfc_confidence_interval_0.5_min", "lfc_confidence_interval_0.5_max"]
    assert list(change) == CHANGE + interval + STATISTICS + ["is_de_fdr_0.05", "is_de_fdr_0.2"] + NAMES
    bare = compare(model, mode="change", all_stats=False, group1=["type_1", "type_0"], group2="type_2")
    assert list(bare) == [*CHANGE, "is_de_fdr_0.05", *NAMES]
    assert list(dict.fromkeys(bare["comparison"])) == ["type_1 vs type_2", "type_0 vs type_2"]
    by_rows = compare(model, groupby=None, idx1=[0, 1, 2])
    assert list(by_rows) == VANILLA + STATISTICS
    for frame, key in ((vanilla, "bayes_factor"), (change, "proba_de")):
        one = frame[frame["group1"] == "type_1"]
        assert one[key].is_monotonic_decreasing and set(one.index) == set(model.get_var_names())


def test_statistics_are_of_the_groups(model):
    frame = compare(model, group1="type_1").loc[model.get_var_names()]
    inside = (model.adata.obs["cell_type"] == "type_1").to_numpy()
    dense = model.adata.X.toarray()
    np.testing.assert_allclose(frame["raw_mean1"], dense[inside].mean(0), rtol=1e-5)
    np.testing.assert_allclose(frame["raw_mean2"], dense[~inside].mean(0), rtol=1e-5)


def test_ways_to_select_cells(model, monkeypatch):
    """A mask, row numbers and a query name the same cells."""
    seen = []
    monkeypatch.setattr(comparing, "count_statistics", lambda matrix, groups: seen.append(groups) or none(groups))

    def none(groups):
        zero = np.zeros(20, np.float32)
        return [dict.fromkeys(("raw_mean", "non_zeros_proportion", "raw_normalized_mean"), zero) for _ in groups]

    inside = (model.adata.obs["cell_type"] == "type_1").to_numpy()
    for idx1 in (inside, np.flatnonzero(inside), "cell_type == 'type_1'"):
        compare(model, groupby=None, idx1=idx1)
    compare(model, group1="type_1")
    for one, two in seen:
        np.testing.assert_array_equal(one, np.flatnonzero(inside))
        np.testing.assert_array_equal(two, np.flatnonzero(~inside))


def test_only_drawn_cells_are_decoded(monkeypatch):
    model = make(n_cells=3000)
    expression, n_decoded = model.module.expression, []

    def counting(z, batch, out):
        n_decoded.append(z.shape[:-1].numel())
        return expression(z, batch, out)

    monkeypatch.setattr(model.module, "expression", counting)
    compare(model, group1="type_0", n_samples_overall=100, mode="change", batch_correction=True)
    assert sum(n_decoded) == 200


def test_batch_correction(model, monkeypatch):
    """Draws are decoded as from the batches asked for, each as often."""
    seen, expression = [], model.module.expression

    def watching(z, batch, out):
        seen.append(batch.batch_n.clone())
        return expression(z, batch, out)

    monkeypatch.setattr(model.module, "expression", watching)
    compare(model, group1="type_0", batch_correction=True)
    assert [batch_n.bincount().tolist() for batch_n in seen] == [[30, 30], [30, 30]]
    seen.clear()
    compare(model, group1="type_0", batch_correction=True, batchid1=["batch_1"], batchid2=["batch_0"])
    assert [batch_n.bincount(minlength=2).tolist() for batch_n in seen] == [[0, 60], [60, 0]]
    seen.clear()
    compare(model, group1="type_0", n_samples_overall=7, batch_correction=True)
    assert [len(batch_n) for batch_n in seen] == [8, 8]


def test_outliers_are_left_out(model, monkeypatch):
    z = np.random.default_rng(0).normal(size=(120, 4)).astype(np.float32)
    z[:6] += 20
    monkeypatch.setattr(differential, "posterior_parameters", lambda m, a, rows, size: (z[rows], None))
    kept = differential.inliers(model, model.adata, np.arange(120))
    assert len(kept) == 108 and kept.min() == 6
    few = np.arange(10)
    assert differential.inliers(model, model.adata, few) is few


def test_options_work_together(model):
    frame = compare(
        model,
        group1="type_0",
        mode="change",
        delta=None,
        weights="importance",
        filter_outlier_cells=True,
        batch_correction=True,
        use_permutation=True,
        m_permutation=80,
        importance_weighting_kwargs={"max_cells": 30, "n_mc_samples": 20, "truncation": True},
    )
    assert frame["proba_de"].between(0, 1).all() and frame["delta"].iloc[0] >= 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groupby": None}, "Give groupby"),
        ({"group1": "typ_1"}, "Did you mean 'type_1'"),
        ({"group2": "typ_1"}, "Did you mean 'type_1'"),
        ({"group1": []}, "no group is named"),
        ({"group1": "type_1", "group2": "type_1"}, "both 'type_1'"),
        ({"idx2": [1]}, "idx2 is given without idx1"),
        ({"idx1": []}, "idx1 selects no cells"),
        ({"idx1": np.zeros(120, bool)}, "idx1 selects no cells"),
        ({"idx1": "cel_type == 'type_1'"}, "not a query"),
        ({"idx1": "cell_type =="}, "not a query"),
        ({"idx1": "cell_type == 'no such type'"}, "idx1 selects no cells"),
        ({"idx1": np.arange(120)}, "all cells"),
        ({"mode": "chang"}, "Did you mean 'change'"),
        ({"mode": "change", "test_mode": "tree"}, "Did you mean 'three'"),
        ({"mode": "change", "delta": -1}, "delta=-1"),
        ({"mode": "change", "fdr_target": 5}, "fdr_target"),
        ({"mode": "change", "cred_interval_lvls": [95]}, "cred_interval_lvls"),
        ({"weights": "importanc"}, "Did you mean 'importance'"),
        ({"change_fn": "logfold"}, "Did you mean 'log-fold'"),
        ({"n_samples_overall": 0}, "n_samples_overall=0"),
        ({"batchid1": ["batch_0"]}, "batch_correction=True"),
        ({"batch_correction": True, "batchid1": ["batch_7"]}, "'batch_1'"),
        ({"batch_correction": True, "batchid1": ["batch_0"]}, "overlap"),
    ],
)
def test_refused(model, options, message):
    with pytest.raises(ValueError, match=message):
        compare(model, **options)


def test_refused_by_kind(model):
    with pytest.raises(KeyError, match="Did you mean 'cell_type'"):
        compare(model, groupby="celltype")
    with pytest.raises(IndexError, match="500"):
        compare(model, groupby=None, idx1=[500])
    with pytest.raises(TypeError, match="Did you mean 'truncation'"):
        compare(model, importance_weighting_kwargs={"truncate": True})
    with pytest.raises(TypeError, match="n_sample"):
        compare(model, n_sample=3)
    model.adata.obs["one"] = "a"
    with pytest.raises(ValueError, match="one group only"):
        compare(model, groupby="one")
    del model.adata.obs["one"]


def test_finds_the_differential_genes():
    """On simulated data: nearly all true genes rank before the others, and the stated rate of false calls holds."""
    from sklearn.metrics import average_precision_score

    adata = simulate(n_cells=900, n_genes=200, n_types=2, n_batches=2, depth=1000.0, seed=3)
    SCVI.setup_anndata(adata, batch_key="batch")
    torch.manual_seed(0)
    model = SCVI(adata, gene_likelihood="nb", n_latent=5, n_hidden=64)
    model.train(
        max_epochs=40, batch_size=128, enable_progress_bar=False, plan_kwargs={"lr": 4e-3, "n_epochs_kl_warmup": 20}
    )
    lfc = adata.varm["lfc"]["type_0"] - adata.varm["lfc"]["type_1"]
    true = lfc.abs() > 0.25
    frame = model.differential_expression(
        groupby="cell_type", group1="type_0", group2="type_1", mode="change", silent=True
    ).loc[adata.var_names]
    assert average_precision_score(true, frame["proba_de"]) > 0.97
    assert np.corrcoef(frame["lfc_median"], lfc)[0, 1] > 0.97
    is_de = frame["is_de_fdr_0.05"]
    n_false, n_called = int((is_de & ~true).sum()), int(is_de.sum())
    assert n_called > 0.8 * true.sum()
    assert n_false <= 0.05 * n_called + 3 * np.sqrt(0.05 * n_called)
    vanilla = model.differential_expression(groupby="cell_type", group1="type_0", group2="type_1", silent=True)
    up = vanilla.loc[adata.var_names, "bayes_factor"]
    assert average_precision_score(lfc > 0.25, up) > 0.9
