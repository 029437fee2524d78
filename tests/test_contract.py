"""What every model must do. A new model is one line in ``CASES``."""

import warnings
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

import scvi_lite
from scvi_lite.data.batch import Batch
from scvi_lite.model import MULTIVI, PEAKVI, SCANVI, SCVI, TOTALVI, CondSCVI, DestVI, LinearSCVI
from scvi_lite.nn import layers

SILENT = {"accelerator": "cpu", "enable_progress_bar": False}
SMALL = {"n_hidden": 8, "n_latent": 3}
N_CELLS, N_GENES = 80, 12


@dataclass
class Case:
    """One model on one setup of the data."""

    model: Any
    setup: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    def make(self, seed=0):
        np.random.seed(0)  # the data are drawn from NumPy's global state
        adata = scvi_lite.data.synthetic_iid(batch_size=N_CELLS // 2, n_genes=N_GENES)
        rng = np.random.default_rng(0)
        adata.obs["donor"] = rng.choice(["a", "b", "c"], adata.n_obs)
        adata.obs["depth"] = rng.normal(size=adata.n_obs)
        adata.obs["size"] = rng.uniform(10, 100, adata.n_obs)
        self.model.setup_anndata(adata, **self.setup)
        torch.manual_seed(seed)
        return self.model(adata, **SMALL | self.options)

    def answer(self, model):
        """What the model finds out about a minibatch."""
        return model.module.encode(minibatch(model)).z_loc_nk


class SpotCase(Case):
    """A model of spots, made from one of single cells."""

    def make(self, seed=0):
        np.random.seed(0)
        sizes = {"batch_size": N_CELLS // 2, "n_genes": N_GENES}
        cells, spots = (scvi_lite.data.synthetic_iid(**sizes) for _ in range(2))
        CondSCVI.setup_anndata(cells, **LABELS)
        torch.manual_seed(0)
        sc_model = CondSCVI(cells, **SMALL)
        sc_model.train(max_epochs=1, **SILENT)
        torch.manual_seed(seed)
        return self.model.from_rna_model(spots, sc_model, anndata_setup_kwargs=self.setup, **self.options)

    def answer(self, model):
        return model.module.infer(minibatch(model)).proportion_nt


BATCH = {"batch_key": "batch"}
LABELS = {"labels_key": "labels"}
SOME_LABELS = LABELS | {"unlabeled_category": "label_2"}
COVARIATES = BATCH | {"categorical_covariate_keys": ["donor"], "continuous_covariate_keys": ["depth"]}
PROTEINS = {"protein_expression_obsm_key": "protein_expression"}
CASES = {
    "SCVI": Case(SCVI),
    "SCVI, batches": Case(SCVI, BATCH, {"gene_likelihood": "nb", "n_layers": 2}),
    "SCVI, covariates": Case(SCVI, COVARIATES, {"encode_covariates": True, "batch_representation": "embedding"}),
    "SCVI, latent library": Case(SCVI, BATCH, {"use_observed_lib_size": False, "latent_distribution": "ln"}),
    "SCVI, size factor": Case(SCVI, BATCH | {"size_factor_key": "size"}, {"dispersion": "gene-cell"}),
    "LinearSCVI": Case(LinearSCVI, BATCH),
    "LinearSCVI, bias": Case(LinearSCVI, {}, {"use_batch_norm": False, "bias": True, "gene_likelihood": "zinb"}),
    "CondSCVI": Case(CondSCVI, LABELS),
    "CondSCVI, mixture": Case(CondSCVI, LABELS | BATCH, {"prior": "mog", "weight_obs": True}),
    "CondSCVI, fine labels": Case(CondSCVI, LABELS | {"fine_labels_key": "donor"}, {"prior": "vamp", "n_layers": 1}),
    "DestVI": SpotCase(DestVI, {}, {"augmentation": True}),
    "DestVI, no networks": SpotCase(DestVI, BATCH, {"amortization": "none", "prior_mode": "normal"}),
    "SCANVI": Case(SCANVI, SOME_LABELS | BATCH),
    "SCANVI, covariates": Case(
        SCANVI,
        SOME_LABELS | COVARIATES,
        {"n_layers": 2, "linear_classifier": True, "encode_covariates": True, "use_observed_lib_size": False},
    ),
    "SCANVI, by label": Case(SCANVI, SOME_LABELS, {"dispersion": "gene-label", "latent_distribution": "ln"}),
    "PEAKVI": Case(PEAKVI, BATCH),
    "PEAKVI, covariates": Case(PEAKVI, COVARIATES, {"encode_covariates": True, "deeply_inject_covariates": True}),
    "MULTIVI": Case(MULTIVI, BATCH, {"n_genes": 7, "modality_weights": "universal", "gene_likelihood": "nb"}),
    "MULTIVI, proteins": Case(MULTIVI, BATCH | {"protein_expression_obsm_key": "protein_expression"}, {"n_genes": 7}),
    "MULTIVI, covariates": Case(
        MULTIVI,
        COVARIATES | {"size_factor_key": "size"},
        {"n_regions": 5, "modality_weights": "cell", "modality_penalty": "MMD", "encode_covariates": True},
    ),
    "TOTALVI": Case(TOTALVI, PROTEINS | BATCH),
    "TOTALVI, covariates": Case(
        TOTALVI,
        PROTEINS | COVARIATES | {"labels_key": "labels", "panel_key": "donor"},
        {
            "gene_likelihood": "zinb",
            "gene_dispersion": "gene-label",
            "protein_dispersion": "protein-batch",
            "use_observed_lib_size": False,
            "latent_distribution": "ln",
            "n_layers_decoder": 2,
        },
    ),
    "TOTALVI, bare": Case(TOTALVI, PROTEINS, {"encode_covariates": False, "log_variational": False}),
    "PEAKVI, bare": Case(PEAKVI, {}, {"model_depth": False, "region_factors": False, "latent_distribution": "ln"}),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)

OPTIONS = {
    "gene_likelihood": ["zinb", "nb", "poisson", "normal"],
    "dispersion": ["gene", "gene-batch", "gene-label", "gene-cell"],
    "latent_distribution": ["normal", "ln"],
    "library": ["observed", "latent", "size factor"],
    "covariates": [False, True],
    "encode_covariates": [False, True],
    "deeply_inject_covariates": [True, False],
    "batch_representation": ["one-hot", "embedding"],
    "use_batch_norm": ["both", "none", "encoder", "decoder"],
    "use_layer_norm": ["none", "both", "encoder", "decoder"],
    "n_layers": [1, 2],
}


def pairwise(options):
    """Few combinations in which every pair of values of two options occurs: the one with most new pairs next."""

    def pairs(row):
        return {((a, row[a]), (b, row[b])) for a in options for b in options if a < b}

    rng = np.random.default_rng(0)
    missing = set()
    for a, b in product(options, options):
        if a < b:
            missing |= {((a, x), (b, y)) for x, y in product(options[a], options[b])}
    while missing:
        drawn = [{name: values[rng.integers(len(values))] for name, values in options.items()} for _ in range(100)]
        fixed = sorted(missing, key=str)[0]
        best = max(({**row, **dict(fixed)} for row in drawn), key=lambda row: len(pairs(row) & missing))
        missing -= pairs(best)
        yield best


COMBINATIONS = [
    Case(
        SCVI,
        (COVARIATES if row["covariates"] else BATCH)
        | {"labels_key": "labels"}
        | ({"size_factor_key": "size"} if row["library"] == "size factor" else {}),
        {name: value for name, value in row.items() if name not in ("library", "covariates")}
        | {"use_observed_lib_size": row["library"] != "latent"},
    )
    for row in pairwise(OPTIONS)
]
every_combination = pytest.mark.parametrize("case", COMBINATIONS, ids=lambda c: "-".join(map(str, c.options.values())))


def minibatch(model) -> Batch:
    return next(iter(model._minibatches(batch_size=32)))


def same_weights(first, second):
    ours, theirs = first.module.state_dict(), second.module.state_dict()
    return list(ours) == list(theirs) and all(torch.equal(value, theirs[name]) for name, value in ours.items())


@every_case
def test_trains(case, recwarn):
    """Without a warning, and what it minimises goes down."""
    model = case.make()
    model.train(max_epochs=15, batch_size=16, plan_kwargs={"lr": 5e-3, "n_epochs_kl_warmup": 1}, **SILENT)
    loss = model.history["train_loss"]["train_loss"]
    assert loss.iloc[-3:].mean() < loss.iloc[1]
    assert model.is_trained
    assert not model.module.training
    assert not [w for w in recwarn if not issubclass(w.category, DeprecationWarning)]


@pytest.mark.parametrize("case", [*CASES.values(), *COMBINATIONS])
def test_gradients_reach_every_parameter(case):
    """So that no parameter is dead weight, and DDP needs no search for unused ones."""
    model = case.make()
    loss = model.module.train().loss(minibatch(model), 0.5)
    loss.total.backward()
    assert loss.total.isfinite()
    free = {n: p for n, p in model.module.named_parameters() if p.requires_grad}
    without = [n for n, p in free.items() if p.grad is None or not p.grad.isfinite().all()]
    assert not without
    # A ReLU may be off for all cells of a minibatch, but not for whole layers.
    assert not [n for n, p in free.items() if not p.grad.any()]


@every_combination
def test_shapes(case):
    model = case.make()
    batch = minibatch(model)
    with torch.no_grad():
        q = model.module.encode(batch)
        loss = model.module.loss(batch)
        assert q.z_loc_nk.shape == q.z_scale_nk.shape == q.sample_z().shape == (32, 3)
        assert (q.z_scale_nk > 0).all()
        library = model.module.library(batch, q)
        assert library.shape == (32,)
        rates = model.module.decode(q.sample_z(), library, batch)
        assert rates.mu_ng.shape == (32, N_GENES)
        assert rates.log_likelihood(batch.x).shape == (32,)
        samples = model.module.decode(q.sample_z(4), library, batch)
        assert samples.mu_ng.shape == (4, 32, N_GENES)
        assert samples.log_likelihood(batch.x).shape == (4, 32)
    assert loss.total.shape == ()
    assert loss.n_cells == 32
    assert float(loss.total) == pytest.approx(float(loss.reconstruction + loss.kl_local) / 32, rel=1e-4)


@every_case
def test_loaded_equals_saved(case, tmp_path):
    model = case.make()
    model.train(max_epochs=1, **SILENT)
    model.save(tmp_path / "model")
    loaded = case.model.load(tmp_path / "model", model.adata)
    assert same_weights(model, loaded)
    assert all(frame.equals(loaded.history[name]) for name, frame in model.history.items())
    first, second = (case.answer(m) for m in (model, loaded))
    assert torch.equal(first, second)


@every_case
def test_resumed_equals_uninterrupted(case, tmp_path):
    whole = case.make(seed=1)
    whole.train(max_epochs=3, batch_size=16, enable_checkpointing=True, default_root_dir=tmp_path, **SILENT)
    stopped = case.make(seed=1)
    stopped.train(max_epochs=2, batch_size=16, enable_checkpointing=True, default_root_dir=tmp_path / "two", **SILENT)
    resumed = case.make(seed=2)
    resumed.train(max_epochs=3, batch_size=16, ckpt_path=tmp_path / "two" / "checkpoints" / "last.ckpt", **SILENT)
    assert same_weights(whole, resumed)
    assert all(frame.equals(resumed.history[name]) for name, frame in whole.history.items())


@pytest.mark.parametrize("case", [case for case in CASES.values() if hasattr(case.model, "differential_expression")])
def test_differential_expression_columns(case):
    model = case.make()
    model.train(max_epochs=1, **SILENT)
    table = model.differential_expression(groupby="labels", group1="label_0", mode="change")
    assert {"proba_de", "lfc_mean", "lfc_median", "raw_mean1", "raw_mean2", "non_zeros_proportion1"} <= set(
        table.columns
    )
    assert set(model._gene_names) <= set(table.index) and table.index.is_unique


@every_case
def test_loss_compiles_whole_and_once(case, monkeypatch):
    """One graph without a break, which serves other minibatches and other weights of the KL terms."""
    # Compiled or not, the same units are left out: those that PyTorch draws.
    monkeypatch.setattr(layers, "dropout", lambda h, rate: h * F.dropout(h.new_ones(h.shape[-2:]), rate))
    model = case.make()
    model.module.train()
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model.module.loss, fullgraph=True, dynamic=True, backend=counter)
    kl_weight = torch.tensor(0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        for step, batch in enumerate(model._minibatches(batch_size=23)):
            kl_weight.fill_(step / 4)
            rng = torch.get_rng_state()
            expected = model.module.train().loss(batch, kl_weight)
            torch.set_rng_state(rng)
            loss = compiled(batch, kl_weight)
            assert float(loss.total) == pytest.approx(float(expected.total), rel=1e-4)
            assert loss.n_cells == batch.n_cells
    assert step == 3
    assert counter.frame_count == 1
