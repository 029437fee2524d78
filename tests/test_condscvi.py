"""CondSCVI: the recorded answers of scvi-tools, its priors, and fine labels on data whose truth is known."""

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import SHARED
from scipy import stats
from test_golden import answers, recording

import scvi_lite
from scvi_lite.analysis.cell_types import cluster
from scvi_lite.model import CondSCVI, DestVI
from scvi_lite.nn.conditional import LabelMixture

CASE = SHARED / "golden" / "condscvi"
SILENT = {"accelerator": "cpu", "enable_progress_bar": False}
QUICK = {"plan_kwargs": {"lr": 1e-2, "n_epochs_kl_warmup": 1}, **SILENT}
golden = pytest.mark.skipif(not CASE.exists(), reason="the recorded models are not here")


def small(setup=None, **options):
    adata = scvi_lite.data.synthetic_iid(batch_size=40, n_genes=12)
    CondSCVI.setup_anndata(adata, **{"labels_key": "labels"} | (setup or {}))
    return CondSCVI(adata, **{"n_hidden": 8, "n_latent": 3} | options)


@pytest.fixture(scope="module")
def two_by_two():
    """Two cell types, each in two states that differ in other genes; a third of the cells have no fine label."""
    rng = np.random.default_rng(0)
    n = 300
    kind_n, state_n = rng.integers(2, size=n), rng.integers(2, size=n)
    log_rate_ng = np.full((n, 20), 2.0)
    log_rate_ng[kind_n == 1, :5] += 1.5
    log_rate_ng[state_n == 1, 5:12] += 1.2
    obs = pd.DataFrame({"kind": kind_n, "true": [f"{k}{s}" for k, s in zip(kind_n, state_n)]}, index=map(str, range(n)))
    obs["kind"] = obs["kind"].map({0: "B", 1: "T"})
    obs["fine"] = np.where(np.arange(n) % 3 == 0, "unlabeled", obs["true"])
    return anndata.AnnData(rng.poisson(np.exp(log_rate_ng)).astype(np.float32), obs)


@golden
def test_recorded_answers():
    adata = anndata.read_h5ad(CASE / "adata.h5ad")
    model = CondSCVI.load(CASE, adata, accelerator="cpu")
    recorded, found = recording(CASE), answers(model, adata) | model.get_vamp_prior()
    assert set(recorded) <= set(found)
    for name, expected in recorded.items():
        zero = 1e-5 * expected.std() if name in ("z_mean", "mean_vprior") else 0.0
        np.testing.assert_allclose(found[name], expected, rtol=1e-4, atol=zero, err_msg=name)


@pytest.mark.parametrize("prior", ["normal", "mog", "vamp"])
@pytest.mark.parametrize("setup", [{}, {"batch_key": "batch", "fine_labels_key": "fine"}, {"size_factor_key": "size"}])
def test_trains_saves_and_loads(prior, setup, tmp_path):
    adata = scvi_lite.data.synthetic_iid(batch_size=40, n_genes=12)
    adata.obs["fine"] = [f"{name}_{i % 2}" for i, name in enumerate(adata.obs["labels"])]
    adata.obs["size"] = np.random.default_rng(0).uniform(10, 100, adata.n_obs)
    CondSCVI.setup_anndata(adata, labels_key="labels", **setup)
    model = CondSCVI(adata, n_hidden=8, n_latent=3, prior=prior, encode_covariates=True, weight_obs=True)
    model.train(max_epochs=2, **SILENT)
    model.save(tmp_path / "model")
    loaded = CondSCVI.load(tmp_path / "model", adata)
    first, second = (m.get_latent_representation() for m in (model, loaded))
    np.testing.assert_array_equal(first, second)
    assert first.shape == (80, 3)
    assert np.isfinite(float(model.get_elbo())) and float(model.get_marginal_ll(n_mc_samples=20)) < 0
    draws = model.get_normalized_expression(n_samples_overall=20, weights="importance")
    assert draws.shape == (20, 12) and np.isfinite(draws).all()
    mixture = loaded.get_vamp_prior(p=4)
    assert mixture["mean_vprior"].shape == mixture["var_vprior"].shape == (3, 4 if prior == "normal" else 10, 3)
    np.testing.assert_allclose(mixture["weights_vprior"].sum(1), 1, rtol=1e-5)
    assert (mixture["var_vprior"] > 0).all()


def test_density_of_a_mixture():
    """Against SciPy."""
    rng = np.random.default_rng(0)
    loc, scale, weight = rng.normal(size=(2, 3, 4)), rng.uniform(0.5, 2, (2, 3, 4)), rng.dirichlet(np.ones(3), 2)
    z, label = rng.normal(size=(5, 4)), np.array([0, 1, 1, 0, 1])
    mixture = LabelMixture(*(torch.from_numpy(a) for a in (loc, scale, np.log(weight))))
    expected = [
        np.log(sum(w * stats.norm(m, s).pdf(z_k).prod() for m, s, w in zip(loc[y], scale[y], weight[y])))
        for z_k, y in zip(z, label)
    ]
    found = mixture.log_prob(torch.from_numpy(z), torch.from_numpy(label))
    np.testing.assert_allclose(found, expected, rtol=1e-10)


def test_clusters_of_a_type():
    """Centre, within and between variance, and share, where the clusters are far apart; surplus ones weigh nothing."""
    loc = np.array([[0.0, 0], [2, 0], [100, 100]], dtype=np.float32)
    mean, var, weight = cluster(loc, np.full_like(loc, 0.5), 2)
    order = np.argsort(mean[:, 0])
    np.testing.assert_allclose(mean[order], [[1, 0], [100, 100]])
    np.testing.assert_allclose(var[order], [[1.5, 0.5], [0.5, 0.5]])
    np.testing.assert_allclose(weight[order], [2 / 3, 1 / 3])
    mean, var, weight = cluster(loc, np.full_like(loc, 0.5), 5)
    assert (weight > 0).sum() == 3 and (var[weight == 0] == 1).all()


def test_rare_types_count_as_much():
    model = small(weight_obs=True)
    label_n = model.registry.read(model.adata, "label_n")
    weight_n = model.module.label_weight_l.numpy()[label_n]
    sums = [weight_n[label_n == label].sum() for label in range(3)]
    np.testing.assert_allclose(sums, model.adata.n_obs, rtol=1e-5)
    (batch,) = model._minibatches()
    plain, weighted = small(), model
    plain.module.load_state_dict({k: v for k, v in model.module.state_dict().items() if k != "label_weight_l"})
    losses = []
    for m in (plain, weighted):
        torch.manual_seed(0)
        with torch.no_grad():
            losses.append(m.module.loss(batch))
    assert float(losses[0].reconstruction) == pytest.approx(float(losses[1].reconstruction))
    assert float(losses[1].total) > 2 * float(losses[0].total)


def test_given_weights(tmp_path):
    model = small(ct_weight=np.array([1.0, 2, 3]), extra_encoder_kwargs={}, extra_decoder_kwargs={})
    assert model.module.label_weight_l.tolist() == [1, 2, 3]
    model.save(tmp_path / "model")
    assert CondSCVI.load(tmp_path / "model", model.adata).module.label_weight_l.tolist() == [1, 2, 3]


def test_one_type():
    """Without labels; DestVI then finds states alone."""
    with pytest.warns(UserWarning, match="all cells count as one type"):
        model = small({"labels_key": None}, prior="mog")
    model.train(max_epochs=1, **SILENT)
    assert model.get_vamp_prior()["mean_vprior"].shape == (1, 10, 3)
    assert model.confusion_coarse_celltypes().shape == (1, 1)
    spots = DestVI.from_rna_model(model.adata, model)
    spots.train(max_epochs=1, **SILENT)
    assert (spots.get_proportions() == 1).all(axis=None)


def test_one_fine_label():
    adata = scvi_lite.data.synthetic_iid(batch_size=40, n_genes=12)
    adata.obs["fine"] = np.where(np.arange(80) % 2, "known", "unlabeled")
    CondSCVI.setup_anndata(adata, labels_key="labels", fine_labels_key="fine")
    model = CondSCVI(adata, n_hidden=8, n_latent=3)
    model.train(max_epochs=1, **SILENT)
    assert set(model.predict()) == {"known"}
    adata.obs["fine"] = "unlabeled"
    with pytest.raises(ValueError, match="a label is needed"):
        CondSCVI.setup_anndata(adata, labels_key="labels", fine_labels_key="fine")


def test_fine_labels_are_found(two_by_two):
    CondSCVI.setup_anndata(two_by_two, labels_key="kind", fine_labels_key="fine")
    model = CondSCVI(two_by_two, n_hidden=32, n_latent=2)
    model.train(max_epochs=40, batch_size=64, **QUICK)
    hidden = (two_by_two.obs["fine"] == "unlabeled").to_numpy()
    predicted = model.predict()
    assert set(predicted) == {"00", "01", "10", "11"}
    assert (predicted == two_by_two.obs["true"])[hidden].mean() > 0.85
    soft = model.predict(soft=True, indices=[5, 3])
    assert soft.index.tolist() == ["5", "3"] and np.allclose(soft.sum(1), 1)
    assert model.history["accuracy_train"].iloc[-1, 0] > 0.9 > model.history["accuracy_train"].iloc[0, 0]
    confusion = model.confusion_coarse_celltypes()
    assert confusion.index.tolist() == confusion.columns.tolist() == ["B", "T"]
    np.testing.assert_allclose(confusion.sum(1), 1)
    assert np.diag(confusion).min() > 0.9


def test_a_prior_finds_the_states_of_a_type(two_by_two):
    """Its two components are the two states of each type."""
    CondSCVI.setup_anndata(two_by_two, labels_key="kind")
    model = CondSCVI(two_by_two, n_hidden=32, n_latent=2, prior="vamp", num_classes_mog=2)
    model.train(max_epochs=30, batch_size=32, lr=5e-3, **SILENT)
    state_n = two_by_two.obs["true"].str[1].to_numpy()
    z_nk, mixture = model.get_latent_representation(), model.module.prior()
    own_n = torch.from_numpy(model.registry.read(two_by_two, "label_n"))
    log_p_npk = torch.distributions.Normal(mixture.loc_lpk[own_n], mixture.scale_lpk[own_n]).log_prob(
        torch.from_numpy(z_nk)[:, None]
    )
    component_n = (log_p_npk.sum(-1) + mixture.log_weight_lp[own_n]).argmax(1).numpy()
    for kind in "BT":
        of_kind = (two_by_two.obs["kind"] == kind).to_numpy()
        agree = np.mean((component_n == 1)[of_kind] == (state_n == "1")[of_kind])
        assert max(agree, 1 - agree) > 0.8


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: small({"labels_key": "lables"}), KeyError, "Did you mean 'labels'"),
        (lambda: small(prior="mixture"), ValueError, "prior='mixture'"),
        (lambda: small(prior_classes=3), TypeError, "no option 'prior_classes'"),
        (lambda: small(ct_weight=[1, 2]), ValueError, "each of the 3 cell types"),
        (lambda: small(ct_weight=[1, 2, 3], weight_obs=True), ValueError, "weight_obs=False"),
        (lambda: small(extra_encoder_kwargs={"bias": False}), TypeError, "layers are chosen by"),
        (lambda: small(num_classes_mog=0), ValueError, "num_classes_mog=0"),
        (lambda: small(weight_obs="yes"), ValueError, "weight_obs='yes'"),
        (lambda: small().predict(), RuntimeError, "fine_labels_key"),
        (lambda: small().get_vamp_prior(p=0), ValueError, "p=0"),
        (lambda: small().train(plan_kwargs={"classification_ratio": -1}), ValueError, "classification_ratio=-1"),
    ],
)
def test_refuses(make, error, message):
    with pytest.raises(error, match=message):
        make()
