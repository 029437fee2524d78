"""SCANVI: labels learned from some cells, every cell used, and the recorded answers of scvi-tools."""

import warnings

import anndata
import numpy as np
import pytest
import torch
from conftest import SHARED
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score
from sklearn.neighbors import KNeighborsClassifier
from test_ddp import run_on_two_ranks
from test_golden import SIGNED, answers, recording

import scvi_lite
from scvi_lite.data.sampler import TrainingSampler
from scvi_lite.data.supervision import SupervisedSampler, Supervision
from scvi_lite.model import SCANVI, SCVI
from scvi_lite.nn.scanvi import SCANVIModule
from scvi_lite.nn.vae import Posterior

CASES = sorted((SHARED / "golden").glob("scanvi_*"))
SILENT = {"accelerator": "cpu", "enable_progress_bar": False}
SMALL = {"n_hidden": 8, "n_latent": 3}
SETUP = {"labels_key": "known", "unlabeled_category": "Unknown"}
in_order = pytest.mark.filterwarnings("ignore:The genes of adata are in another order")
golden = pytest.mark.skipif(not CASES, reason="the recorded models are not here")


def cells(share=0.4, n=120, n_genes=12):
    """Cells of three labels, of which a share is known."""
    adata = scvi_lite.data.synthetic_iid(batch_size=n // 2, n_genes=n_genes)
    known = np.random.default_rng(0).random(adata.n_obs) < share
    adata.obs["known"] = adata.obs["labels"].astype(str).where(known, "Unknown")
    return adata


def small(share=0.4, setup=None, **options):
    adata = cells(share)
    SCANVI.setup_anndata(adata, **SETUP, batch_key="batch", **(setup or {}))
    return SCANVI(adata, **SMALL | options)


# Beside scvi-tools ----------------------------------------------------------------------------------------------------


@golden
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_recorded_answers(case):
    adata = anndata.read_h5ad(case / "adata.h5ad")
    model = SCANVI.load(case, adata, accelerator="cpu")
    recorded, found = recording(case), answers(model, adata)
    soft = model.predict(soft=True)
    found["label_probability"] = soft.to_numpy()
    assert recorded.pop("label_names").tolist() == soft.columns.tolist()
    for name, expected in recorded.items():
        zero = 1e-5 * expected.std() if name in SIGNED else 0.0
        np.testing.assert_allclose(found[name], expected, rtol=1e-4, atol=zero, err_msg=name)


@golden
def test_recorded_loss(monkeypatch):
    """That of scvi-tools on its own model, where each draw is the mean plus half a standard deviation."""
    (case,) = (case for case in CASES if case.name == "scanvi_default")
    model = SCANVI.load(case, anndata.read_h5ad(case / "adata.h5ad"), accelerator="cpu")
    for module in ("scvi_lite.nn.scanvi", "scvi_lite.nn.vae"):
        monkeypatch.setattr(f"{module}.draw_normal", lambda loc, scale, n_samples=None: loc + 0.5 * scale)
    (batch,) = model._minibatches(batch_size=500)
    for kl_weight, ratio, total in ((1.0, 0, 495.19357), (1.0, 50, 580.75), (0.3, 0, 494.93298), (0.3, 50, 580.48944)):
        with torch.no_grad():
            loss = model.module.loss(batch, kl_weight, ratio)
        assert float(loss.total) == pytest.approx(total, rel=1e-6)
    assert float(loss.reconstruction) == pytest.approx(247410.65625, rel=1e-6)
    assert float(loss.kl_local) == pytest.approx(186.15494, rel=1e-5)
    assert model.module.summarise(loss.extra, 500)["classification_loss"] == pytest.approx(1.7111288, rel=1e-6)


# What is learned ------------------------------------------------------------------------------------------------------


def test_running_moments_move_as_in_scvi_tools():
    """It runs encoder and classifier twice a step, the other networks once: 0.99² is left of what the moments were."""
    model = small(share=1.0)
    model.train(1, batch_size=120, train_size=1.0, plan_kwargs={"lr": 0.0}, **SILENT)
    blocks = {part: model.module.get_submodule(part).hidden.blocks[0] for part in ("encoder", "classifier", "decoder")}
    x_ng = torch.from_numpy(np.log1p(model.adata.to_df().to_numpy(np.float32)))
    with torch.no_grad():
        loc_h = blocks["encoder"].linear(x_ng).mean(0)
    torch.testing.assert_close(blocks["encoder"].batch_norm.running_mean, (1 - 0.99**2) * loc_h)
    momenta = {part: block.batch_norm.momentum for part, block in blocks.items()}
    assert momenta == pytest.approx({"encoder": 1 - 0.99**2, "classifier": 1 - 0.99**2, "decoder": 0.01})


def test_labels_the_other_cells():
    """Of simulated cells, 30 % labelled; about as well as neighbours among principal components."""
    adata = scvi_lite.data.simulate(n_cells=900, n_genes=100, n_types=4, seed=0)
    truth = adata.obs["cell_type"].astype(str).to_numpy()
    hidden = np.random.default_rng(1).random(adata.n_obs) > 0.3
    adata.obs["known"] = np.where(hidden, "Unknown", truth)
    SCANVI.setup_anndata(adata, **SETUP, batch_key="batch")
    model = SCANVI(adata, n_latent=8, n_hidden=64)
    model.train(max_epochs=25, batch_size=64, plan_kwargs={"lr": 3e-3, "n_epochs_kl_warmup": 20}, **SILENT)
    accuracy = (model.predict() == truth)[hidden].mean()
    x_ng = adata.X.toarray()
    log_ng = np.log1p(x_ng / x_ng.sum(1, keepdims=True) * 1e3)
    z_nk = np.linalg.svd(log_ng - log_ng.mean(0), full_matrices=False)[0][:, :8]
    neighbours = KNeighborsClassifier(15).fit(z_nk[~hidden], truth[~hidden]).score(z_nk[hidden], truth[hidden])
    assert accuracy > max(0.9, neighbours - 0.02)
    assert model.history["train_accuracy"].iloc[-1, 0] > model.history["train_accuracy"].iloc[0, 0]
    assert model.history["validation_accuracy"].iloc[-1, 0] > 0.85
    assert model.get_latent_representation().shape == (900, 8)


def test_metrics_of_an_epoch():
    """As scikit-learn counts them; the calibration error as its definition."""
    model = small()
    rng = np.random.default_rng(0)
    logits_nl = torch.from_numpy(rng.normal(size=(300, 3))).float() * 2
    label_n = torch.from_numpy(rng.integers(0, 4, 300))  # 3 is the code of those without
    known_n = label_n < 3
    mean, sums = model.module.taught(logits_nl, label_n, known_n)
    found = model.module.summarise(sums, 300.0)
    truth, predicted = label_n[known_n].numpy(), logits_nl.argmax(1)[known_n].numpy()
    confidence, right = logits_nl.softmax(1).max(1).values[known_n].numpy(), truth == predicted
    assert found["accuracy"] == pytest.approx(accuracy_score(truth, predicted))
    assert found["f1_score"] == pytest.approx(f1_score(truth, predicted, average="macro"))
    bins = np.minimum((confidence * 15).astype(int), 14)
    gaps = [abs(confidence[bins == b].mean() - right[bins == b].mean()) * (bins == b).mean() for b in np.unique(bins)]
    assert found["calibration_error"] == pytest.approx(sum(gaps), rel=1e-5)
    assert found["classification_loss"] == pytest.approx(float(mean), rel=1e-6)
    assert float(mean) == pytest.approx(float(torch.nn.functional.cross_entropy(logits_nl[known_n], label_n[known_n])))


def test_the_prior_of_z_is_a_density():
    """It integrates to one, and the bound lies below the likelihood."""
    model = small(n_latent=2)
    model.train(max_epochs=3, **SILENT)
    normal = torch.distributions.Normal(0.0, 3.0)
    z_sk = normal.sample((40_000, 2))
    with torch.no_grad():
        weight_s = (model.module.log_prior_z(z_sk, None) - normal.log_prob(z_sk).sum(-1)).exp()
    assert float(weight_s.mean()) == pytest.approx(1, abs=0.05)
    assert model.get_elbo() < model.get_marginal_ll(n_mc_samples=100)


def test_integrated_gradients_add_up():
    pytest.importorskip("captum")
    model = small()
    model.train(max_epochs=2, **SILENT)
    labels, genes = model.predict(indices=[5], ig_interpretability=True, ig_args={"n_steps": 200})
    assert genes.columns.tolist() == ["feature", "attribution_mean", "attribution_std", "cells"]
    assert set(genes["feature"]) == set(model.adata.var_names)
    x_ng = torch.from_numpy(np.asarray(model.adata.X[[5]])).float()
    code = int(labels[0].removeprefix("label_"))
    with torch.no_grad():
        logit, at_zero = (
            model.module.classifier(model.module.encoder(x.log1p())[0])[0, code] for x in (x_ng, 0 * x_ng)
        )
    assert genes["attribution_mean"].sum() == pytest.approx(float(logit - at_zero), abs=0.02)
    absent = model.adata.var_names[x_ng[0].numpy() == 0]
    assert np.allclose(genes.set_index("feature").loc[absent, "attribution_mean"], 0)
    with pytest.raises(TypeError, match="ig_args has no option 'steps'. Did you mean 'n_steps'"):
        model.predict(ig_interpretability=True, ig_args={"steps": 3})


def test_integrated_gradients_without_captum(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "captum.attr", None)
    with pytest.raises(ImportError, match="pip install captum"), pytest.warns(UserWarning, match="not trained"):
        small().predict(ig_interpretability=True)


# Which cells a training uses ------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(st.integers(8, 120), st.integers(2, 30), st.integers(1, 4), st.integers(0, 5), st.sampled_from([None, 2, 5]))
def test_an_epoch_uses_each_cell_once_and_extra_ones_have_labels(n, batch_size, world, seed, n_per_label):
    rng = np.random.default_rng(seed)
    label_n = torch.from_numpy(rng.choice(4, n, p=[0.2, 0.1, 0.02, 0.68]))
    label_n[:3] = torch.tensor([0, 1, 2])
    supervision = Supervision(["a", "b", "c"], 0.5, n_per_label)
    n_extra = supervision.n_extra(batch_size, label_n)
    own, steps = [], set()
    for rank in range(world):
        mine, lent = supervision.deal(label_n, rank, world)
        held = torch.cat([mine, lent])
        options = dict(n_rows=len(mine), batch_size=batch_size, seed=seed, n_fewest=n // world, rank=rank)
        if n_extra == 0:
            assert (label_n < 3).float().mean() >= 0.5 - 1e-6
            batches = [(held[row_n], held[:0]) for row_n in TrainingSampler(**options)]
        else:
            sampler = SupervisedSampler(supervision, label_n[held], n_extra, world, **options)
            batches = [(held[row_n[:-n_extra]], held[row_n[-n_extra:]]) for row_n in sampler]
        extra = torch.cat([more for _, more in batches])
        own += torch.cat([row_n for row_n, _ in batches]).tolist()
        steps.add(len(batches))
        assert (label_n[extra] < 3).all()
        pool = label_n[held][label_n[held] < 3]
        assert set(pool.tolist()) == {0, 1, 2}  # no rank forgets a label
        uses = torch.bincount(extra, minlength=n)[extra.unique()]
        assert n_extra == 0 or uses.max() - uses.min() <= 1
        if n_per_label is not None:
            assert torch.bincount(label_n[extra.unique()]).max() <= -(-n_per_label // world)
    assert sorted(own) == list(range(n))
    assert len(steps) == 1


def test_extra_cells_are_drawn_anew_and_resumed_alike():
    label_n = torch.tensor([0, 1, 2, 2, 2, 2, 2, 2] * 10)
    sampler = SupervisedSampler(Supervision(["a", "b"], 0.5, 3), label_n, 4, 1, n_rows=80, batch_size=8, seed=0)
    epochs = []
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        epochs.append([row_n.tolist() for row_n in sampler])
    assert {row for batch in epochs[0] for row in batch[-4:]} != {row for batch in epochs[1] for row in batch[-4:]}
    sampler.skip = 3
    assert [row_n.tolist() for row_n in sampler] == epochs[1][3:]


def test_no_extra_cells_where_all_have_a_label():
    model, seen = small(share=1.1), []
    loss = model.module.loss
    model.module.loss = lambda batch, *options, **more: seen.append(batch) or loss(batch, *options, **more)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.train(max_epochs=1, train_size=1.0, batch_size=32, **SILENT)
    assert all(batch.extra is None for batch in seen)
    assert model.history["train_accuracy"].shape == (1, 1)


def test_few_of_each_label():
    """Labels are learned from the drawn cells alone: as many in each epoch as asked for."""
    model, seen = small(), []
    loss = model.module.loss
    model.module.loss = lambda batch, *options, **more: seen.append(batch) or loss(batch, *options, **more)
    model.train(max_epochs=1, n_samples_per_label=2, train_size=1.0, batch_size=20, **SILENT)
    rows = np.unique(np.concatenate([batch.extra.row_n.numpy() for batch in seen]))
    assert model.adata.obs["known"].iloc[rows].value_counts().to_dict() == {f"label_{i}": 2 for i in range(3)}
    assert not any(batch.teaches for batch in seen)
    assert sum(batch.n_cells for batch in seen) == 120
    taught = sum(float(loss(batch).extra["confusion"].sum()) for batch in seen)
    assert taught == sum(batch.extra.n_cells for batch in seen) == 60


def test_adversary():
    """It trains along, where there are batches to tell apart."""
    adata = scvi_lite.data.simulate(n_cells=300, n_genes=40, n_types=2, seed=0)
    adata.obs["known"] = adata.obs["cell_type"].astype(str)
    SCANVI.setup_anndata(adata, **SETUP, batch_key="batch")
    model = SCANVI(adata, **SMALL)
    weights = {name: value.clone() for name, value in model.module.state_dict().items()}
    model.train(max_epochs=2, adversarial_classifier=True, plan_kwargs={"scale_adversarial_loss": 1.0}, **SILENT)
    assert any(not torch.equal(value, weights[name]) for name, value in model.module.state_dict().items())
    SCANVI.setup_anndata(adata, **SETUP)
    with pytest.raises(ValueError, match="adversarial_classifier=True: there is one batch"):
        SCANVI(adata, **SMALL).train(adversarial_classifier=True, **SILENT)


def test_two_ranks(tmp_path):
    """Each training cell once an epoch, a rare label on both ranks, the same exact metrics."""
    ranks = run_on_two_ranks(
        """
        from scvi_lite.model import SCANVI
        cell = np.arange(adata.n_obs)
        labels = np.where(cell % 5 > 0, "Unknown", np.array(["label_0", "label_1", "label_2"])[cell // 5 % 3])
        labels[7] = "rare"
        adata.obs["known"] = labels
        SCANVI.setup_anndata(adata, labels_key="known", unlabeled_category="Unknown", batch_key="batch")
        class WatchExtra(Watch):
            def __init__(self): super().__init__(); self.extra = []
            def on_train_batch_start(self, trainer, task, batch, batch_idx):
                super().on_train_batch_start(trainer, task, batch, batch_idx)
                self.extra += batch.extra.row_n.tolist()
        watch, model = WatchExtra(), SCANVI(adata, n_hidden=8)
        split = {"external_indexing": [np.arange(130), np.arange(130, 150)]}
        model.train(max_epochs=2, callbacks=watch, datasplitter_kwargs=split, n_samples_per_label=4, **options)
        tell(**describe(model, watch, extra=watch.extra, labels=labels.tolist()))
        """,
        tmp_path,
    )
    first, second = ranks
    assert first["weights"] == second["weights"]
    assert first["history"] == second["history"]
    for epoch in (0, 1):
        assert sorted(row for rank in ranks for e, rows in rank["train"] if e == epoch for row in rows) == list(
            range(130)
        )
    for rank in ranks:
        found = [rank["labels"][row] for row in rank["extra"]]
        assert set(found) == {"label_0", "label_1", "label_2", "rare"}
    known = [row for row in range(130, 150) if first["labels"][row] != "Unknown"]
    accuracy = first["history"]["validation_accuracy"][-1] * len(known)
    assert accuracy == pytest.approx(round(accuracy), abs=1e-5)


# From SCVI ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference():
    adata = cells()
    SCVI.setup_anndata(adata, batch_key="batch", labels_key="known")
    model = SCVI(adata, **SMALL, gene_likelihood="nb", encode_covariates=True)
    model.train(max_epochs=1, **SILENT)
    return model


def takes_over(model, reference):
    ours, theirs = model.module.state_dict(), reference.module.state_dict()
    return all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_from_scvi_model(reference, tmp_path):
    model = SCANVI.from_scvi_model(reference, "Unknown", linear_classifier=True)
    assert takes_over(model, reference) and model.module.config.gene_likelihood == "nb"
    assert model.module.classifier.hidden is None and not model.is_trained
    with pytest.warns(UserWarning, match="not trained"):
        z_nk = model.get_latent_representation()
    assert np.array_equal(z_nk, reference.get_latent_representation())
    model.train(max_epochs=1, **SILENT)
    assert not takes_over(model, reference)
    reference.save(tmp_path / "model", save_anndata=True)
    loaded = SCVI.load(tmp_path / "model", accelerator="cpu")
    assert takes_over(SCANVI.from_scvi_model(loaded, "Unknown"), reference)


@in_order
def test_from_scvi_model_with_other_cells(reference):
    """Genes in another order, one batch of the two, labels named here: read in the reference's coding."""
    other = cells()[60:, ::-1].copy()
    other.obs["fine"] = other.obs["labels"].astype(str)
    model = SCANVI.from_scvi_model(reference, "Unknown", labels_key="fine", adata=other)
    assert model.adata.var_names.equals(reference.adata.var_names) and model.adata.n_obs == 60
    assert model.registry.categories("batch_n") == ["batch_0", "batch_1"]
    assert model.registry.categories("label_n") == ["label_0", "label_1", "label_2", "Unknown"]
    assert model.registry.read(model.adata, "batch_n").tolist() == [1] * 60
    assert takes_over(model, reference)
    other.obs["batch"] = "new"
    with pytest.raises(ValueError, match="'new'"):
        SCANVI.from_scvi_model(reference, "Unknown", labels_key="fine", adata=other)


def test_from_a_minified_model(reference, tmp_path):
    reference.save(tmp_path / "model", save_anndata=True)
    full = reference.adata
    for kind in ("latent_posterior_parameters_with_counts", "latent_posterior_parameters"):
        small_one = SCVI.load(tmp_path / "model", full.copy(), accelerator="cpu")
        small_one.minify_adata(kind)
        model = SCANVI.from_scvi_model(small_one, "Unknown", adata=None if kind.endswith("counts") else full)
        assert takes_over(model, reference) and "qz_loc_nk" not in model.registry.fields
        model.train(max_epochs=1, **SILENT)
    with pytest.raises(RuntimeError, match="adata=..., or minify with"):
        SCANVI.from_scvi_model(small_one, "Unknown")


def test_from_scvi_model_with_a_dispersion_of_each_label():
    """Each label keeps its own, though the unlabelled category moves to the end."""
    adata = cells()
    adata.obs["known"] = adata.obs["known"].replace({"Unknown": "a first name"})
    SCVI.setup_anndata(adata, labels_key="known")
    reference = SCVI(adata, **SMALL, dispersion="gene-label")
    reference.train(max_epochs=1, **SILENT)
    model, theirs = SCANVI.from_scvi_model(reference, "a first name"), reference.module.log_theta
    assert torch.equal(model.module.log_theta, theirs[[1, 2, 3, 0]])
    model = SCANVI.from_scvi_model(reference, "another name")
    assert torch.equal(model.module.log_theta, torch.cat([theirs, theirs.mean(0, keepdim=True)]))
    adata.obs["other"] = adata.obs["labels"].astype(str) + " cell"
    with pytest.raises(ValueError, match="learned none for the label 'label_0 cell'"):
        SCANVI.from_scvi_model(reference, "Unknown", labels_key="other")


def test_from_scvi_model_says_what_it_does_not_do(reference):
    with pytest.warns(UserWarning, match="n_latent is that of scvi_model, 3"):
        SCANVI.from_scvi_model(reference, "Unknown", n_latent=7)
    SCANVI.from_scvi_model(reference, "Unknown", n_latent=3)
    with pytest.raises(TypeError, match="'linear_clasifier'. Did you mean 'linear_classifier'"):
        SCANVI.from_scvi_model(reference, "Unknown", linear_clasifier=True)
    with pytest.raises(TypeError, match="scvi_model is a AnnData; a trained SCVI is needed"):
        SCANVI.from_scvi_model(reference.adata, "Unknown")
    with pytest.raises(KeyError, match="labels_key='labls' is not a column.*Did you mean 'labels'"):
        SCANVI.from_scvi_model(reference, "Unknown", labels_key="labls")
    adata = cells()
    SCVI.setup_anndata(adata)
    untrained = SCVI(adata, **SMALL)
    with pytest.warns(UserWarning, match="not trained"), pytest.raises(ValueError, match="labels_key"):
        SCANVI.from_scvi_model(untrained, "Unknown")


@pytest.mark.parametrize(("n_cells", "expected"), [(120, 10), (1_000_000, 3), (100_000_000, 2)])
def test_epochs_after_scvi(reference, monkeypatch, n_cells, expected):
    """A third of SCVI's number, from 2 to 10, as in scvi-tools; from scratch as many as SCVI."""
    asked = {}
    monkeypatch.setattr("scvi_lite.model.training.fit_model", lambda model, **options: asked.update(options))
    monkeypatch.setattr(anndata.AnnData, "n_obs", n_cells)
    model = SCANVI.__new__(SCANVI)
    model.__dict__ |= {"_adata": reference.adata, "registry": reference.registry, "_is_pretrained": True}
    model.module = reference.module
    model.train()
    assert asked["max_epochs"] == expected
    model._is_pretrained = False
    model.train()
    assert asked["max_epochs"] is None


# Answers and files ----------------------------------------------------------------------------------------------------


@in_order
def test_predict():
    model = small()
    model.train(max_epochs=2, **SILENT)
    hard, soft = model.predict(), model.predict(soft=True)
    assert hard.shape == (120,) and set(hard) <= {"label_0", "label_1", "label_2"}
    assert soft.columns.tolist() == ["label_0", "label_1", "label_2"]
    assert soft.index.equals(model.adata.obs_names)
    assert np.allclose(soft.sum(axis=1), 1, atol=1e-5)
    assert (soft.to_numpy().argmax(1) == [int(name[-1]) for name in hard]).all()
    some = model.predict(indices=[7, 3, 5], soft=True, batch_size=2)
    assert np.allclose(some, soft.iloc[[7, 3, 5]], atol=1e-6)
    draws = [model.predict(soft=True, use_posterior_mean=False).to_numpy() for _ in range(2)]
    assert not np.allclose(*draws)
    assert model.predict(indices=[]).shape == (0,)
    new = model.adata[::-1, ::-1].copy()
    assert (model.predict(new) == hard[::-1]).all()
    del new.obs["known"]  # new cells have no labels yet
    assert (model.predict(new) == hard[::-1]).all()
    new.obs["known"] = "another"
    with pytest.raises(ValueError, match="'another'.*To have them predicted: adata.obs\\['known'\\] = 'Unknown'"):
        model.predict(new)
    model.minify_adata()
    assert (model.predict() == hard).all()
    with pytest.raises(RuntimeError, match="ig_interpretability=True needs counts"):
        pytest.importorskip("captum")
        model.predict(ig_interpretability=True)


def test_options_are_saved(tmp_path):
    model = small(
        y_prior=torch.tensor([[0.2, 0.3, 0.5]]),
        classifier_parameters={
            "n_hidden": 5,
            "n_layers": 2,
            "dropout_rate": 0.3,
            "use_batch_norm": False,
            "logits": True,
        },
        use_layer_norm="encoder",
    )
    assert model.module.label_prior.tolist() == pytest.approx([0.2, 0.3, 0.5])
    assert len(model.module.classifier.hidden.blocks) == 2 and model.module.classifier.logits.in_features == 5
    model.train(max_epochs=1, **SILENT)
    model.save(tmp_path / "model")
    loaded = SCANVI.load(tmp_path / "model", model.adata, accelerator="cpu")
    assert np.array_equal(loaded.predict(soft=True), model.predict(soft=True))
    assert loaded.module.classifier.hidden.blocks[0].batch_norm is None


def test_the_unlabelled_category_comes_last():
    adata = cells()
    adata.obs["known"] = adata.obs["known"].replace({"Unknown": "a first name"})
    SCANVI.setup_anndata(adata, "known", "a first name")
    assert SCANVI(adata, **SMALL).registry.categories("label_n") == ["label_0", "label_1", "label_2", "a first name"]
    SCANVI.setup_anndata(adata, "labels", "Unknown")  # that no cell has
    assert SCANVI(adata, **SMALL).registry.categories("label_n")[-1] == "Unknown"
    adata.obs["code"] = adata.obs["labels"].cat.codes.astype(float)
    SCANVI.setup_anndata(adata, "code", 2)
    model = SCANVI(adata, **SMALL)
    assert model.registry.categories("label_n") == [0, 1, 2]
    model.train(max_epochs=1, **SILENT)
    assert set(model.predict()) <= {0, 1}


# Errors ---------------------------------------------------------------------------------------------------------------


def test_setup_errors():
    adata = cells()
    with pytest.raises(TypeError, match="unlabeled_category"):
        SCANVI.setup_anndata(adata, "known")
    for unlabeled in (None, float("nan"), ["Unknown"]):
        with pytest.raises(ValueError, match="unlabeled_category=.*: the name is needed"):
            SCANVI.setup_anndata(adata, "known", unlabeled)
    with pytest.raises(KeyError, match="labels_key='knwn'.*Did you mean 'known'"):
        SCANVI.setup_anndata(adata, "knwn", "Unknown")
    with pytest.raises(KeyError, match="labels_key=None"):
        SCANVI.setup_anndata(adata, None, "Unknown")
    with pytest.warns(UserWarning, match="every cell counts as labelled. Did you mean 'Unknown'"):
        SCANVI.setup_anndata(adata, "known", "unknown")
    adata.obs["none"], adata.obs["one"] = "Unknown", np.where(adata.obs["labels"] == "label_0", "T cell", "Unknown")
    with pytest.raises(ValueError, match="two labels are needed to tell apart, and none is all"):
        SCANVI.setup_anndata(adata, "none", "Unknown")
    with pytest.raises(ValueError, match="and 'T cell' is all .* CondSCVI without fine_labels_key"):
        SCANVI.setup_anndata(adata, "one", "Unknown")
    adata.obs["holes"] = adata.obs["labels"].astype(object).where(adata.obs["labels"] != "label_0")
    with pytest.raises(ValueError, match=r"have no value .* Give them one: .*astype\(object\).fillna\('Unknown'\)$"):
        SCANVI.setup_anndata(adata, "holes", "Unknown")


def test_groups_of_labels_have_no_effect():
    with pytest.warns(UserWarning, match="labels_groups has no effect"):
        small(labels_groups=[0, 0, 1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"linear_clasifier": True}, "Did you mean 'linear_classifier'"),
        ({"linear_classifier": "yes"}, "True or False is needed"),
        ({"classifier_parameters": {"hidden": 3}}, "Did you mean 'n_hidden'"),
        ({"classifier_parameters": 3}, "a dictionary"),
        ({"y_prior": [0.5, 0.5]}, "3 positive numbers that sum to 1"),
        ({"y_prior": [0.5, 0.5, 0.5]}, "3 positive numbers that sum to 1"),
    ],
)
def test_model_errors(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        small(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"plan_kwargs": {"classification_ration": 3}}, "Did you mean 'classification_ratio'"),
        ({"plan_kwargs": {"classification_ratio": -1}}, "zero or more"),
        ({"adversarial_classifier": "yes"}, "True or False is needed"),
        ({"n_samples_per_label": 0}, "n_samples_per_label=0: a number of at least 1"),
        ({"datasplitter_kwargs": {"labeled_share": -1}}, "labeled_share=-1: a number of 0 or more"),
        ({"datasplitter_kwargs": {"labelled_share": 1}}, "Did you mean 'labeled_share'"),
        (
            {"early_stopping": True, "early_stopping_monitor": "validation_acuracy"},
            "Did you mean 'validation_accuracy'",
        ),
        ({"n_sample_per_label": 3}, "Did you mean 'n_samples_per_label'"),
    ],
)
def test_train_errors(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        small().train(max_epochs=1, **options, **SILENT)


def test_labels_without_a_training_cell():
    model = small()
    known = np.flatnonzero(model.adata.obs["known"] != "Unknown")
    others = np.flatnonzero(model.adata.obs["known"] == "Unknown")
    with pytest.raises(ValueError, match="None of the .* training cells has a label"):
        model.train(max_epochs=1, datasplitter_kwargs={"external_indexing": [others, known]}, **SILENT)
    assert not model.is_trained
    rare = np.flatnonzero(model.adata.obs["known"] == "label_1")
    rest = np.setdiff1d(np.arange(model.adata.n_obs), rare)
    with pytest.warns(UserWarning, match="No training cell has the label 'label_1'"):
        model.train(max_epochs=1, datasplitter_kwargs={"external_indexing": [rest, rare]}, **SILENT)
    assert model.is_trained


def test_validation_cells_without_a_label():
    """A metric of nothing is NaN, and training goes on."""
    model = small()
    others = np.flatnonzero(model.adata.obs["known"] == "Unknown")[:5]
    rest = np.setdiff1d(np.arange(model.adata.n_obs), others)
    model.train(max_epochs=2, datasplitter_kwargs={"external_indexing": [rest, others]}, **SILENT)
    assert model.history["validation_accuracy"]["validation_accuracy"].isna().all()
    assert model.history["elbo_validation"].notna().all(axis=None)


def test_early_stopping_on_accuracy():
    model = small()
    model.train(
        max_epochs=60,
        early_stopping=True,
        early_stopping_monitor="validation_accuracy",
        early_stopping_mode="max",
        early_stopping_patience=2,
        **SILENT,
    )
    assert len(model.history["validation_accuracy"]) < 60


# Compiled form --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("mode", ["training", "evaluation", "frozen encoder"])
def test_compiled_label_terms(mode, dtype):
    """Values, gradients and running moments are those of the readable form; in doubles to 12 digits."""
    module = small(n_layers=1).module.to(dtype).train(mode != "evaluation")
    module.u_encoder.train(mode == "training")
    rng = torch.Generator().manual_seed(0)
    z_nk, loc_nk = torch.randn(2, 9, 3, generator=rng, dtype=dtype)
    scale_nk, logit_nl = torch.randn(2, 9, 3, generator=rng, dtype=dtype)
    leaves = [t.requires_grad_() for t in (z_nk, loc_nk, scale_nk.exp(), logit_nl)]
    weights = {
        f"{part}.{name}": p
        for part in ("u_encoder", "z_decoder")
        for name, p in getattr(module, part).named_parameters()
    }
    up_2n = torch.rand(2, 9, generator=rng, dtype=dtype)
    assert module.is_plain(z_nk)
    found, state = [], {name: value.clone() for name, value in module.state_dict().items()}
    for form in (module.label_terms, module.readable_label_terms):
        module.load_state_dict(state)
        torch.manual_seed(0)
        terms = form(leaves[0], Posterior(*leaves[1:3]), leaves[3].log_softmax(-1))
        grads = torch.autograd.grad(torch.stack(terms), [*leaves, *weights.values()], up_2n)
        found.append([*(term.detach() for term in terms), *grads, *(b.clone() for b in module.buffers())])
    names = ["misfit", "kl", "z", "loc", "scale", "logits", *weights, *(name for name, _ in module.named_buffers())]
    rtol = 1e-12 if dtype == torch.float64 else 2e-5
    for name, ours, expected in zip(names, *found, strict=True):
        atol = rtol * max(1.0, float(expected.abs().max()))  # batch norm takes the bias away, up to rounding
        torch.testing.assert_close(ours, expected, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


def test_other_shapes_take_the_readable_form(monkeypatch):
    taken = []
    readable = SCANVIModule.readable_label_terms
    monkeypatch.setattr(SCANVIModule, "readable_label_terms", lambda *a: taken.append(1) or readable(*a))
    for options in ({"n_layers": 2}, {"use_batch_norm": "none"}, {"use_layer_norm": "both"}):
        small(**options).train(max_epochs=1, **SILENT)
        assert taken
        taken.clear()
    small().train(max_epochs=1, **SILENT)
    assert not taken
