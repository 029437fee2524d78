"""The gradient of scVI that is written out, against that of autograd, and trainings with either."""

import contextlib
import copy
import warnings

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, StochasticWeightAveraging

import scvi_lite
from scvi_lite.model import SCVI, LinearSCVI
from scvi_lite.model.scvi import SCVIModule
from scvi_lite.nn import layers

SILENT = dict(accelerator="cpu", enable_progress_bar=False)


def make(n_batches=2, covariates=False, model=SCVI, **options):
    adata = scvi_lite.data.synthetic_iid(batch_size=60, n_genes=30, n_batches=n_batches, seed=0)
    adata.obs["donor"] = np.resize(["a", "b", "c"], adata.n_obs)
    more = {"categorical_covariate_keys": ["donor"]} if covariates else {}
    model.setup_anndata(adata, batch_key="batch", **more)
    torch.manual_seed(0)
    return model(adata, n_hidden=24, n_latent=4, **options)


def readable_and_by_hand(model, monkeypatch):
    """Loss, its parts, gradients and running statistics, in doubles by autograd and by hand, with the same draws."""
    (batch,) = model._minibatches(batch_size=1000)
    noise_nk, kept_nh = torch.randn(batch.n_cells, 4), (torch.rand(batch.n_cells, 24) > 0.2) / 0.8
    monkeypatch.setattr(torch, "randn", lambda *shape, **options: noise_nk.to(options.get("dtype")))
    monkeypatch.setattr(layers, "dropout", lambda h, rate: h * kept_nh.to(h.dtype))
    results = []
    for by_hand in (False, True):
        module = copy.deepcopy(model.module).train()
        assert module.is_by_hand
        if by_hand:
            with torch.no_grad():
                loss, gradients = module.loss_and_gradients(batch, 0.3)
        else:
            module, given = module.double(), copy.copy(batch)
            given.x, given.total_n = batch.x.map(lambda value: value.double()), batch.total_n.double()
            loss = module.loss(given, 0.3)
            weights = list(module.parameters())
            gradients = dict(zip(weights, torch.autograd.grad(loss.total, weights)))
        names = {name: gradients.pop(weight) for name, weight in module.named_parameters()}
        assert not gradients
        parts = {"total": loss.total, "reconstruction": loss.reconstruction, "kl": loss.kl_local}
        results.append(parts | names | dict(module.named_buffers()))
    return results


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gene_likelihood": "nb", "dropout_rate": 0.2},
        {"dropout_rate": 0.2, "covariates": True},
        {"n_batches": 1, "log_variational": False},
        {"n_batches": 3, "covariates": True, "gene_likelihood": "nb", "deeply_inject_covariates": False},
    ],
    ids=str,
)
def test_gradients_are_those_of_the_readable_loss(options, monkeypatch):
    model = make(**({"dropout_rate": 0.0} | options))
    readable, by_hand = readable_and_by_hand(model, monkeypatch)
    assert readable.keys() == by_hand.keys()
    for name, expected in readable.items():
        scale = max(1e-3, float(expected.detach().abs().max()))
        torch.testing.assert_close(
            by_hand[name].double(), expected.detach().double(), rtol=1e-4, atol=2e-5 * scale, msg=name
        )


def trained(by_hand, monkeypatch, callbacks=(), **options):
    monkeypatch.setattr(SCVIModule, "is_by_hand", by_hand)
    model = make(**options)
    taken = []
    monkeypatch.setattr(
        SCVIModule, "loss_and_gradients", lambda *given, do=LOSS_AND_GRADIENTS: taken.append(1) or do(*given)
    )
    model.train(max_epochs=5, batch_size=32, callbacks=list(callbacks), **SILENT)
    return model, len(taken)


IS_BY_HAND, LOSS_AND_GRADIENTS = SCVIModule.is_by_hand, SCVIModule.loss_and_gradients


def test_a_training_learns_the_same(monkeypatch):
    usual, n_usual = trained(False, monkeypatch)
    by_hand, n_by_hand = trained(IS_BY_HAND, monkeypatch)
    assert n_usual == 0 and n_by_hand == 20
    assert usual.history.keys() == by_hand.history.keys()
    for name, frame in usual.history.items():
        np.testing.assert_allclose(by_hand.history[name].astype(float), frame.astype(float), rtol=1e-4, atol=1e-6)
    weights = by_hand.module.state_dict()
    for name, weight in usual.module.state_dict().items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-3, atol=1e-4, msg=name)


class Looks(Callback):
    """Reads gradients."""

    seen = 0

    def on_after_backward(self, trainer, pl_module):
        assert all(weight.grad is not None for weight in pl_module.module.parameters())
        self.seen += 1


def test_those_who_look_into_steps_see_the_same_gradients(monkeypatch):
    looks = Looks()
    seen, n_seen = trained(IS_BY_HAND, monkeypatch, [looks])
    unseen, _ = trained(IS_BY_HAND, monkeypatch)
    assert looks.seen == n_seen == 20
    weights = unseen.module.state_dict()
    assert all(torch.equal(weights[name], weight) for name, weight in seen.module.state_dict().items())


@pytest.mark.parametrize(
    "options",
    [
        {"n_layers": 2},
        {"dispersion": "gene-batch"},
        {"gene_likelihood": "poisson"},
        {"latent_distribution": "ln"},
        {"use_observed_lib_size": False},
        {"encode_covariates": True},
        {"use_layer_norm": "both"},
        {"use_batch_norm": "encoder"},
        {"var_activation": "softplus"},
        {"batch_representation": "embedding"},
        {"model": LinearSCVI},
    ],
    ids=str,
)
def test_other_networks_go_by_autograd(options, monkeypatch):
    assert not make(**options).module.is_by_hand
    model, n_taken = trained(IS_BY_HAND, monkeypatch, **options)
    assert n_taken == 0 and np.isfinite(model.history["elbo_train"].to_numpy(float)).all()


def test_what_is_frozen_hooked_or_in_doubles_goes_by_autograd():
    assert make().module.is_by_hand
    assert not make().module.double().is_by_hand
    reference = make()
    reference.is_trained_ = True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert not SCVI.load_query_data(reference.adata.copy(), reference).module.is_by_hand
    for hook in (
        lambda module: module.encoder.register_forward_hook(lambda *_: None),
        lambda module: module.decoder.scale.register_full_backward_hook(lambda *_: None),
        lambda module: module.log_theta.register_hook(lambda gradient: gradient),
        lambda module: module.log_theta.requires_grad_(False),
        lambda module: module.decoder.hidden.blocks[0].batch_norm.eval(),
        lambda module: setattr(module, "encoder", torch.nn.SyncBatchNorm.convert_sync_batchnorm(module.encoder)),
        lambda module: setattr(module, "loss", module.loss),
        lambda module: setattr(module.encoder, "forward", module.encoder.forward),
        lambda module: setattr(module.decoder, "dropout", module.decoder.scale),
        lambda module: setattr(module.decoder, "scale", torch.nn.Sequential(module.decoder.scale)),
        lambda module: setattr(module.decoder, "scale", torch.nn.Linear(24, 30, bias=False)),
        lambda module: torch.nn.utils.parametrizations.weight_norm(module.decoder.scale),
        lambda module: setattr(module.decoder.hidden.blocks[0], "activation", torch.nn.functional.gelu),
        lambda module: setattr(module.decoder.hidden.blocks[0], "dropout_rate", 0.1),
        lambda module: setattr(module.decoder.hidden.blocks[0].batch_norm, "momentum", None),
        lambda module: torch.nn.utils.vector_to_parameters(torch.zeros(10_000), module.parameters()),  # stored anew
    ):
        module = make().module.train()
        hook(module)
        assert not module.is_by_hand


@pytest.mark.parametrize("around", [torch.float64, torch.autocast("cpu", torch.bfloat16)], ids=["doubles", "autocast"])
def test_what_is_set_around_a_training_changes_no_type(around):
    model = make()
    before = torch.get_default_dtype()
    with contextlib.ExitStack() as stack:
        if around is torch.float64:
            torch.set_default_dtype(around)
            stack.callback(torch.set_default_dtype, before)
        else:
            stack.enter_context(around)
        model.train(max_epochs=2, batch_size=32, **SILENT)
    assert np.isfinite(model.history["elbo_validation"].to_numpy(float)).all()
    assert all(weight.dtype == torch.float32 for weight in model.module.parameters())


class Freezes(Callback):
    """Holds the encoder from the second epoch on."""

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            pl_module.module.encoder.requires_grad_(False)
            self.held = pl_module.module.encoder.loc.weight.detach().clone()


@pytest.mark.parametrize("by_hand", [False, IS_BY_HAND], ids=["autograd", "by hand"])
def test_what_a_callback_freezes_between_epochs_stays(by_hand, monkeypatch):
    freezes = Freezes()
    model, n_taken = trained(by_hand, monkeypatch, [freezes])
    assert torch.equal(model.module.encoder.loc.weight, freezes.held)
    assert n_taken == (4 if by_hand else 0)


def test_averaged_weights_are_finite():
    model = make()
    averaging = StochasticWeightAveraging(1e-3, swa_epoch_start=1, annealing_epochs=1)
    model.train(max_epochs=4, batch_size=32, callbacks=[averaging], **SILENT)
    assert np.isfinite(model.history["elbo_validation"].to_numpy(float)).all()
