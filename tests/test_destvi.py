"""DestVI: the recorded answers of scvi-tools, proportions of simulated spots, and what a user may get wrong."""

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import SHARED
from test_golden import recording

import scvi_lite
from scvi_lite.model import SCVI, CondSCVI, DestVI

CASE = SHARED / "golden" / "destvi"
SILENT = {"accelerator": "cpu", "enable_progress_bar": False}
golden = pytest.mark.skipif(not CASE.exists(), reason="the recorded models are not here")


def reference(setup=None, train=True, **options):
    adata = scvi_lite.data.synthetic_iid(batch_size=40, n_genes=12)
    adata.obs["fine"] = [f"{name}_{i % 2}" for i, name in enumerate(adata.obs["labels"])]
    CondSCVI.setup_anndata(adata, **{"labels_key": "labels"} | (setup or {}))
    model = CondSCVI(adata, **{"n_hidden": 8, "n_latent": 3} | options)
    if train:
        model.train(max_epochs=1, **SILENT)
    return model


@pytest.fixture(scope="module")
def sc_model():
    return reference(setup={"fine_labels_key": "fine"})


def spots(n=24):
    np.random.seed(1)  # the data are drawn from NumPy's global state
    return scvi_lite.data.synthetic_iid(batch_size=n // 2, n_genes=12)


@pytest.fixture(scope="module")
def simulated():
    """Three cell types with genes of their own, one of them in two states; spots of ten cells."""
    rng = np.random.default_rng(0)
    rate_lg = np.ones((3, 30))
    for kind in range(3):
        rate_lg[kind, 6 * kind : 6 * kind + 6] = 8
    kind_n, state_n = rng.integers(3, size=600), rng.integers(2, size=600)

    def expression(kinds, states):
        rate_ng = rate_lg[kinds].copy()
        rate_ng[(kinds == 0) & (states == 1), 20:26] *= 8
        return rate_ng

    cells = anndata.AnnData(rng.poisson(expression(kind_n, state_n)).astype(np.float32))
    cells.obs["kind"] = pd.Categorical.from_codes(kind_n, ["A", "B", "C"])
    share_nl, state_n = rng.dirichlet(np.full(3, 0.5), 80), rng.integers(2, size=80)
    members = np.stack([rng.multinomial(10, share) for share in share_nl])
    rate_ng = sum(
        members[:, [kind]] * expression(np.full(80, kind), state_n if kind == 0 else np.zeros(80)) for kind in range(3)
    )
    tissue = anndata.AnnData(rng.poisson(rate_ng).astype(np.float32))
    CondSCVI.setup_anndata(cells, labels_key="kind")
    torch.manual_seed(0)
    sc_model = CondSCVI(cells, n_hidden=32, n_latent=2)
    sc_model.train(max_epochs=50, lr=5e-3, batch_size=64, **SILENT)
    return sc_model, tissue, members / 10, state_n


@golden
def test_recorded_proportions():
    adata = anndata.read_h5ad(CASE / "adata.h5ad")
    model = DestVI.load(CASE, adata, accelerator="cpu")
    recorded, found = recording(CASE), model.get_proportions()
    np.testing.assert_allclose(found, recorded["proportions"], rtol=1e-4)
    assert found.columns.tolist() == recorded["cell_types"].tolist()


@pytest.mark.parametrize("amortization", ["both", "none"])
def test_proportions_of_simulated_spots(simulated, amortization):
    sc_model, tissue, truth_nl, state_n = simulated
    torch.manual_seed(0)
    model = DestVI.from_rna_model(tissue, sc_model, amortization=amortization)
    # What is kept for each spot is learned from that spot alone, which takes longer.
    model.train(max_epochs=150, batch_size=40, lr=1e-2 if amortization == "both" else 3e-2, **SILENT)
    found = model.get_proportions()
    assert found.columns.tolist() == ["A", "B", "C"]
    for kind in range(3):
        assert np.corrcoef(found.to_numpy()[:, kind], truth_nl[:, kind])[0, 1] > 0.95
    assert np.sqrt(np.mean((found.to_numpy() - truth_nl) ** 2)) < 0.1
    # The state of A is seen where there is enough of it.
    scale = model.get_scale_for_ct("A").to_numpy()
    enough_n = truth_nl[:, 0] > 0.3
    marker_n = scale[:, 20:26].sum(1)
    assert marker_n[enough_n & (state_n == 1)].mean() > 3 * marker_n[enough_n & (state_n == 0)].mean()


OPTIONS = [
    {"augmentation": True},
    {"amortization": "none", "prior_mode": "normal"},
    {"amortization": "latent", "n_states_per_label": 1, "add_celltypes": 0},
    {"amortization": "proportion", "n_states_per_label": 2, "add_celltypes": 2},
    {"amortization": "both", "n_latent_amortization": 4},
]


@pytest.mark.parametrize("prior", ["normal", "mog", "vamp"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_answers_saving_and_gradients(prior, options, tmp_path):
    sc_model = reference(prior=prior)
    st_adata = spots()
    model = DestVI.from_rna_model(st_adata, sc_model, anndata_setup_kwargs={"batch_key": "batch"}, **options)
    batch = next(iter(model._minibatches()))
    model.module.train().loss(batch, 0.5).total.backward()
    free = {n: p for n, p in model.module.named_parameters() if p.requires_grad}
    assert not [n for n, p in free.items() if p.grad is None or not p.grad.isfinite().all() or not p.grad.any()]
    held = {n: v.clone() for n, v in model.module.state_dict().items() if n.startswith(("decoder", "prior"))}
    model.train(max_epochs=2, batch_size=8, **SILENT)
    after = model.module.state_dict()
    assert all(torch.equal(after[name], value) for name, value in held.items())
    assert {"v_sparsity_train", "augmentation_train"} <= model.history.keys()

    n_extra = options.get("add_celltypes", 1)
    everything = model.get_proportions(keep_additional=True)
    assert everything.shape == (24, 3 + n_extra) and np.allclose(everything.sum(1), 1, atol=1e-5)
    assert np.allclose(model.get_proportions().sum(1), 1, atol=1e-5)
    some = model.get_proportions(normalize=False, indices=[7, 2])
    np.testing.assert_allclose(some, everything.iloc[[7, 2], :3], rtol=1e-4)
    assert some.index.tolist() == st_adata.obs_names[[7, 2]].tolist()
    gamma = model.get_gamma()
    assert list(gamma) == ["label_0", "label_1", "label_2"] and gamma["label_1"].shape == (24, 3)
    assert np.allclose(model.get_gamma(return_numpy=True)[:, :, 1], gamma["label_1"], atol=1e-6)
    assert np.allclose(model.get_scale_for_ct("label_2").sum(1), 1, atol=1e-5)
    parts = sum(model.get_expression_for_ct(name) for name in everything.columns)
    np.testing.assert_allclose(parts, st_adata.X, rtol=1e-4)
    extra = f"additional_{n_extra}"  # one too many
    with pytest.raises(KeyError, match=extra):
        model.get_scale_for_ct(extra)
    counts = model.get_expression_for_ct("label_0", return_sparse_array=True, indices=[3, 4])
    np.testing.assert_allclose(counts.toarray(), model.get_expression_for_ct("label_0").iloc[[3, 4]], rtol=1e-5)

    model.save(tmp_path / "model")
    loaded = DestVI.load(tmp_path / "model", model.adata)
    np.testing.assert_array_equal(loaded.get_proportions(), model.get_proportions())
    np.testing.assert_array_equal(loaded.get_scale_for_ct("label_1"), model.get_scale_for_ct("label_1"))


def test_latent_space_of_spots(sc_model):
    model = DestVI.from_rna_model(spots(), sc_model, n_latent_amortization=4)
    model.train(max_epochs=1, **SILENT)
    assert model.get_latent_representation(indices=[3, 1]).shape == (2, 4)
    mean, variance = model.get_latent_representation(return_dist=True)
    assert (variance > 0).all() and mean.shape == (24, 4)
    with pytest.raises(RuntimeError, match="n_latent_amortization=10"):
        DestVI.from_rna_model(spots(), sc_model).get_latent_representation()


@pytest.mark.parametrize("n_layers", [1, 3])
def test_networks_are_those_of_scvi_tools(n_layers):
    """What finds proportions, and the latent space, is as deep as the reference; the latter is told the batch."""
    adata = spots()
    DestVI.setup_anndata(adata, batch_key="batch")
    model = DestVI.from_rna_model(adata, reference(n_layers=n_layers), n_latent_amortization=4)
    parts = model.module.proportions.hidden, model.module.states.hidden, model.module.encoder.hidden
    assert [len(part.blocks) for part in parts] == [n_layers, 2, n_layers]
    assert [len(part.blocks[0].linear.tables) for part in parts] == [0, 0, 1]
    (batch,) = model._minibatches()
    _, scale_nk = model.module.posterior(batch.x.x_ng.log1p(), batch)
    h = model.module.encoder.hidden(batch.x.x_ng.log1p(), [batch.batch_n])
    variance_nk = torch.nn.functional.softplus(model.module.encoder.log_var(h)) + 1e-4
    torch.testing.assert_close(scale_nk**2, variance_nk, rtol=1e-5, atol=0)


@pytest.mark.parametrize("eps_v", [0.0, 0.01])
def test_no_cell_type_is_out_of_reach(sc_model, eps_v):
    """In training, each type counts by a little more than its share."""
    model = DestVI.from_rna_model(spots(), sc_model, dropout_amortization=0.0, eps_v=eps_v)
    (batch,) = model._minibatches()
    module = model.module
    kinds = dict(zip("ab", (module.infer(batch), module.mean(module.infer(batch), batch)), strict=True))
    each_ntg = torch.stack([module.expression(kinds["a"], batch, code) for code in range(4)], 1)
    torch.testing.assert_close(each_ntg[0, 3], module.eta_ag[0].softmax(-1))
    module.train()
    for eps, mean_ng in ((0.0, kinds["b"]), (eps_v, module.mean(kinds["a"], batch))):
        expected_ng = ((kinds["a"].proportion_nt[..., None] + eps) * each_ntg).sum(1)
        torch.testing.assert_close(mean_ng, expected_ng, rtol=1e-5, atol=1e-8)
    mu_ng = batch.library_n.exp()[:, None] * mean_ng
    from scvi_lite.distributions import NegativeBinomial

    log_p_n = NegativeBinomial(mu=mu_ng, theta=module.log_theta.exp()).log_prob(batch.x.x_ng).sum(-1)
    torch.testing.assert_close(module.loss(batch).reconstruction, -log_p_n.sum(), rtol=1e-5, atol=0)


def test_fine_cell_types(sc_model):
    model = DestVI.from_rna_model(spots(), sc_model)
    model.train(max_epochs=1, **SILENT)
    fine = model.get_fine_celltypes(sc_model, indices=[2, 0])
    assert fine.shape == (2, 6) and np.allclose(fine.sum(1), 1, atol=1e-5)
    with pytest.raises(RuntimeError, match="no fine labels"):
        model.get_fine_celltypes(reference())
    with pytest.raises(ValueError, match="not the model"):
        model.get_fine_celltypes(reference({"labels_key": "batch", "fine_labels_key": "fine"}))


def smoothed(sc_model, smoothed_layer="smooth", **options):
    adata = spots()
    adata.layers["smooth"] = np.repeat(adata.X.reshape(12, 2, -1).mean(1), 2, axis=0)  # pairs of neighbours
    return DestVI.from_rna_model(adata, sc_model, anndata_setup_kwargs={"smoothed_layer": smoothed_layer}, **options)


def test_neighbours_are_drawn_together(simulated, tmp_path):
    sc_model, tissue, *_ = simulated
    tissue = tissue.copy()
    tissue.layers["smooth"] = np.repeat(tissue.X.reshape(40, 2, -1).mean(1), 2, axis=0)
    distances = []
    for weight in (0.0, 1000.0):
        torch.manual_seed(0)
        setup = {"smoothed_layer": "smooth"}
        model = DestVI.from_rna_model(tissue, sc_model, anndata_setup_kwargs=setup, extra_encoder_kwargs={})
        plan = {"weighting_smoothing": weight, "lr": 1e-2}
        model.train(max_epochs=20, batch_size=20, n_epochs_kl_warmup=5, plan_kwargs=plan, **SILENT)
        pairs = model.get_proportions().to_numpy().reshape(40, 2, -1)
        distances.append(np.abs(pairs[:, 0] - pairs[:, 1]).mean())
    assert distances[0] > 0.1 and distances[1] < 0.5 * distances[0]
    model.save(tmp_path / "model")
    loaded = DestVI.load(tmp_path / "model", tissue)
    np.testing.assert_array_equal(loaded.get_proportions(), model.get_proportions())


def test_cost_of_the_neighbourhood(sc_model):
    """The KL of the proportions from those found in the neighbourhood, mean over spots; in the units of the loss."""
    model = smoothed(sc_model)
    model.is_trained = True
    (batch,) = model._minibatches()
    plain, weighted = (model.module.loss(batch, weighting_smoothing=w).total.item() for w in (0.0, 10.0))
    shares = model.get_proportions(keep_additional=True).to_numpy().astype(float)
    model.adata.X = model.adata.layers["smooth"]
    around = model.get_proportions(keep_additional=True).to_numpy().astype(float)
    assert (weighted - plain) / 10 == pytest.approx((around * np.log(around / shares)).sum(1).mean(), rel=1e-2)


def test_genes_in_another_order(sc_model):
    shuffled = spots()[:, ::-1].copy()
    with pytest.warns(UserWarning, match="another order"):
        model = DestVI.from_rna_model(shuffled, sc_model)
    assert model.get_var_names() == sc_model.get_var_names()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_loss_compiles_whole(sc_model):
    model = DestVI.from_rna_model(spots(), sc_model, augmentation=True)
    model.module.train()
    torch._dynamo.reset()
    compiled = torch.compile(model.module.loss, fullgraph=True, dynamic=True, backend="eager")
    batch, kl_weight = next(iter(model._minibatches())), torch.tensor(0.5)
    losses = []
    for loss in (model.module.loss, compiled):
        torch.manual_seed(0)
        losses.append(loss(batch, kl_weight).total.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_resumed_equals_uninterrupted(sc_model, tmp_path):
    def make(seed):
        torch.manual_seed(seed)
        return DestVI.from_rna_model(spots(), sc_model, amortization="none")

    options = {"batch_size": 8, "enable_checkpointing": True} | SILENT
    torch.manual_seed(0)
    whole, stopped, resumed = make(1), make(1), make(2)
    for model, epochs, folder in ((whole, 3, "whole"), (stopped, 2, "stopped")):
        torch.manual_seed(3)
        model.train(max_epochs=epochs, default_root_dir=tmp_path / folder, **options)
    resumed.train(max_epochs=3, batch_size=8, ckpt_path=tmp_path / "stopped" / "checkpoints" / "last.ckpt", **SILENT)
    for name, value in whole.module.state_dict().items():
        assert torch.equal(value, resumed.module.state_dict()[name]), name


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda m: DestVI.from_rna_model(spots(), reference(train=False)), RuntimeError, "not trained"),
        (lambda m: DestVI.from_rna_model(spots(), "model"), TypeError, "a trained CondSCVI is needed"),
        (lambda m: DestVI.from_rna_model(spots()[:, 2:].copy(), m), ValueError, "lacks 2 of the 12 genes.*gene_0"),
        (lambda m: DestVI.from_rna_model(spots(), m, amortisation="both"), TypeError, "Did you mean 'amortization'"),
        (lambda m: DestVI.from_rna_model(spots(), m, amortization="latents"), ValueError, "Did you mean 'latent'"),
        (lambda m: DestVI.from_rna_model(spots(), m, n_states_per_label=0), ValueError, "n_states_per_label=0"),
        (lambda m: DestVI.from_rna_model(spots(), m, vamp_prior_p=0), ValueError, "p=0"),
        (lambda m: DestVI.from_rna_model(spots(), m).get_scale_for_ct("label_9"), KeyError, "Cell types"),
        (lambda m: DestVI.from_rna_model(spots(), m).get_expression_for_ct("lable_1"), KeyError, "'label_1'"),
        (lambda m: DestVI.from_rna_model(spots(), m).train(plan_kwargs={"l1_reg": 1}), TypeError, "no option 'l1_reg'"),
        (lambda m: DestVI.from_rna_model(spots(), m).train(plan_kwargs={"eta_reg": -1}), ValueError, "eta_reg=-1"),
        (lambda m: DestVI(spots(), m), TypeError, "DestVI.from_rna_model"),
        (lambda m: DestVI.from_rna_model(spots(), m, dropout_decoder=0.1), TypeError, "the reference is held"),
        (lambda m: smoothed(m, smoothed_layer="smoth"), KeyError, "Did you mean 'smooth'"),
        (lambda m: smoothed(m, amortization="latent"), ValueError, "smoothed_layer needs a network"),
    ],
)
def test_refuses(make, error, message, sc_model):
    with pytest.raises(error, match=message):
        make(sc_model)


@pytest.mark.parametrize("options", [{"train_size": 0.9}, {"train_size": None}, {"early_stopping": True}])
def test_spots_with_their_own_parameters_are_not_held_out(sc_model, options):
    model = DestVI.from_rna_model(spots(), sc_model, amortization="latent")
    with pytest.raises(ValueError, match="would stay random.*amortization='both'"):
        model.train(max_epochs=1, **options, **SILENT)
    model = DestVI.from_rna_model(spots(), sc_model)
    model.train(max_epochs=1, **({"train_size": 0.9} | options), **SILENT)
    assert "validation_loss" in model.history


def test_other_spots(sc_model):
    """A network reads new spots; parameters of each spot are of no use to others."""
    read, kept = (DestVI.from_rna_model(spots(), sc_model, amortization=a) for a in ("both", "latent"))
    for model in (read, kept):
        model.train(max_epochs=1, **SILENT)
    read.adata = spots()[:7].copy()
    assert len(read.get_proportions()) == 7
    with pytest.raises(ValueError, match="keeps parameters of each of its 24 spots"):
        kept.adata = spots()[:7].copy()
    with pytest.raises(ValueError, match="keeps parameters"):
        kept.adata = spots()[::-1].copy()


def test_another_kind_of_reference():
    adata = spots()
    SCVI.setup_anndata(adata)
    with pytest.raises(TypeError, match="sc_model is a SCVI"):
        DestVI.from_rna_model(adata, SCVI(adata))
