"""Training on a GPU: what a machine without one can check, and, marked `gpu`, what needs one."""

import os
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import scvi_lite
from scvi_lite.data import store as stores
from scvi_lite.data.batch import Counts
from scvi_lite.data.store import CompactCSR
from scvi_lite.distributions import counts as reference
from scvi_lite.distributions import fused
from scvi_lite.model import SCVI
from scvi_lite.train import graph
from scvi_lite.train.adam import Adam

QUIET = dict(enable_progress_bar=False, batch_size=16, max_epochs=3)
# An operation that needs a number on the host, or brings one from there, waits for the device.
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "is_nonzero", "lift_fresh", "bincount")


class Waits(TorchDispatchMode):
    """Records what would keep the host waiting for a GPU, or the GPU for the host."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, function._schema.name.removeprefix("aten::")
        by_mask = name in ("index", "index_put", "index_put_") and any(
            i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        )
        unsized = name == "repeat_interleave" and kwargs.get("output_size") is None
        if name in WAITS or by_mask or unsized:
            self.found.append(name)
        return function(*args, **kwargs)


def simulated(n_cells=84, n_genes=30):
    adata = scvi_lite.data.simulate(n_cells=n_cells, n_genes=n_genes, seed=0)
    SCVI.setup_anndata(adata, batch_key="batch")
    return adata


@pytest.fixture(scope="module")
def adata():
    return simulated()


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """A GPU, or this processor, on which Triton's interpreter runs the kernels if it is asked for from the start."""
    if (os.environ.get("TRITON_INTERPRET") == "1") != (request.param == "cpu"):
        pytest.skip("TRITON_INTERPRET=1 runs the kernels on a CPU, and only there")
    pytest.importorskip("triton")
    return request.param


def slow_forward(x_ng, *inputs):
    """What the kernels of the likelihood compute, by PyTorch."""
    return by_formula(x_ng, *inputs).detach(), torch.zeros(len(x_ng)), torch.zeros(len(x_ng))


def by_formula(x_ng, logit_ng, library_n, log_theta, dropout_ng):
    log_mu_ng = logit_ng if library_n is None else library_n[:, None] + logit_ng.log_softmax(1)
    if dropout_ng is None:
        return reference.nb_log_prob(x_ng, log_mu_ng, log_theta).sum(1)
    return reference.zinb_log_prob(x_ng, log_mu_ng, log_theta, dropout_ng).sum(1)


def gradients(x_ng, *inputs, up_n):
    leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]
    with torch.enable_grad():
        found = iter(torch.autograd.grad(by_formula(x_ng, *leaves) @ up_n, [t for t in leaves if t is not None]))
    return [None if t is None else next(found) for t in leaves]


def slow_dense(row_n, start, col, value, n_features):
    x_ng = torch.zeros(len(start) - 1, n_features)
    row_m = torch.repeat_interleave(start.diff(), output_size=len(col))
    return x_ng.index_put((row_m, col.long()), value.float()).index_select(0, row_n)


SLOW = SimpleNamespace(
    forward=slow_forward,
    backward=lambda x_ng, *rest: gradients(x_ng, *rest[:4], up_n=rest[-1]),
    dense_rows=slow_dense,
)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Take the paths of a GPU, with PyTorch in place of the kernels."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # which rules out what is compiled for a CPU
    monkeypatch.setattr(fused, "is_triton_for", lambda logit_ng: True)
    for module in (fused, stores):
        monkeypatch.setattr(module, "gpu_kernels", lambda name: SLOW)


def resident(store):
    """The store as it would lie on a GPU with kernels."""
    for name, x in store.counts.items():
        compact = x.compact()
        compact.start_there = compact.start
        store.counts[name] = compact
    return store


NETWORKS = {
    "zinb": {},
    "nb": dict(gene_likelihood="nb", dispersion="gene-batch", use_observed_lib_size=False, encode_covariates=True),
    "gene-cell": dict(dispersion="gene-cell", n_layers=2, latent_distribution="ln", batch_representation="embedding"),
}


@pytest.mark.parametrize("options", NETWORKS.values(), ids=NETWORKS)
def test_a_step_waits_for_nothing(options, adata, as_on_a_gpu):
    model = SCVI(adata, n_latent=3, **options)
    store, module = resident(stores.load(adata, model.registry)), model.module.train()
    assert store.row_device == store.device
    weight, optimizer = torch.tensor(0.5), Adam(module.parameters(), fused=True)
    for _ in range(2):  # the first makes the moments
        optimizer.zero_grad()
        with Waits() as waits:
            batch = store[torch.arange(20)]
            module.loss(batch, weight).total.backward()
        assert not waits.found
        assert "start" not in vars(batch.x)  # no coordinates, whose number the host must know
        optimizer.step()


@pytest.mark.parametrize("likelihood", ["zinb", "nb", "poisson"])
def test_a_step_without_triton_waits_for_nothing_but_the_gather(likelihood, adata, monkeypatch):
    model = SCVI(adata, n_latent=3, gene_likelihood=likelihood)
    batch, weight = stores.load(adata, model.registry)[torch.arange(20)], torch.tensor(0.5)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with Waits() as waits:
        model.module.train().loss(batch, weight).total.backward()
    assert not waits.found


def test_what_waits_is_seen():
    x = torch.ones(3)
    for wait in (lambda: x.sum().item(), lambda: x[x > 0], lambda: torch.tensor(1.0), lambda: bool(x[0]), x.nonzero):
        with Waits() as waits:
            wait()
        assert waits.found


def test_a_resident_minibatch_is_the_same(adata, as_on_a_gpu, monkeypatch):
    model = SCVI(adata)
    store, row_n = stores.load(adata, model.registry), torch.tensor([5, 83, 5, 0])
    expected = store[row_n].x
    found = resident(store)[row_n].x
    assert torch.equal(found.x_ng, expected.x_ng)
    assert torch.equal(found.map(torch.log1p).x_ng, expected.x_ng.log1p())
    assert (found.n_cells, found.n_features) == (4, 30)
    assert torch.equal(found.map(torch.log1p).value_m, expected.value_m.log1p())
    assert torch.equal(found.col_m, expected.col_m) and torch.equal(found.row_m, expected.row_m)
    doubled = Counts(found.start, found.col_m, 2 * found.value_m, 30)
    assert torch.equal(found.join(doubled).x_ng, torch.cat([expected.x_ng, 2 * expected.x_ng]))


# Kernels, on a GPU or by Triton's interpreter -------------------------------------------------------------------------

SHAPES = [(1, 1), (5, 7), (2, 1030)]  # the last beyond a block of genes; parts of the cells are at least 4


def counts_like(kind, n, g):
    x_ng = torch.poisson(torch.rand(n, g) * 6) * (torch.rand(n, g) < 0.5)
    return {
        "usual": x_ng,
        "zeros": 0 * x_ng,
        "large": (x_ng * 10 ** (torch.rand(n, g) * 5)).round(),
        "fractions": x_ng * torch.rand(n, g) * 3,
    }[kind]


@pytest.mark.parametrize("kind", ["usual", "zeros", "large", "fractions"])
@pytest.mark.parametrize(("with_library", "with_dropout"), [(True, True), (True, False), (False, True)])
def test_likelihood_kernels(kind, with_library, with_dropout, device):
    from scvi_lite.distributions import triton_kernels as kernels

    for (n, g), per_gene in zip(SHAPES * 2, [True, False, True, False, True, False]):
        x_ng = counts_like(kind, n, g)
        library_n = x_ng.sum(1).clamp(min=1).log() if with_library else None
        log_theta = 3 * torch.randn(g) if per_gene else 3 * torch.randn(n, g)
        inputs = [torch.randn(n, g), library_n, log_theta, 3 * torch.randn(n, g) if with_dropout else None]
        up_n = torch.randn(n)
        wide = [None if t is None else t.double() for t in inputs]
        expected = [by_formula(x_ng.double(), *wide), *gradients(x_ng.double(), *wide, up_n=up_n.double())]
        x_ng, up_n = x_ng.to(device), up_n.to(device)
        inputs = [None if t is None else t.to(device) for t in inputs]
        value_n, *sums = kernels.forward(x_ng, *inputs)
        for a, b in zip([value_n, *kernels.backward(x_ng, *inputs, *sums, up_n)], expected, strict=True):
            if b is None:
                assert a is None
            else:
                torch.testing.assert_close(a.double().cpu(), b, rtol=2e-5, atol=2e-5 * (1 + b.abs().max().item()))


def test_extreme_rates_stay_finite(device):
    from scvi_lite.distributions import triton_kernels as kernels

    x_ng = torch.tensor([[0.0, 1.0, 3e6], [0.0, 0.0, 0.0], [2.0, 0.5, 17.0]])
    logit_ng = torch.tensor([[-80.0, -80.0, 0.0], [80.0, -80.0, 0.0], [0.0, 3.0, -80.0]])
    dropout_ng = torch.tensor([[50.0, -50.0, 50.0], [-50.0, 50.0, 0.0], [-90.0, 90.0, -50.0]])
    for log_theta in (-90.0, -20.0, 0.0, 20.0, 90.0):
        inputs = [logit_ng, torch.tensor([15.0, 0.0, 9.0]), torch.full((3,), log_theta), dropout_ng]
        expected_n = by_formula(x_ng.double(), *(t.double() for t in inputs))
        given = [t.to(device, copy=True) for t in (x_ng, *inputs)]
        value_n, *sums = kernels.forward(*given)
        torch.testing.assert_close(value_n.double().cpu(), expected_n, rtol=2e-5, atol=1e-4)
        assert all(d.isfinite().all() for d in kernels.backward(*given, *sums, torch.ones_like(value_n)))
        given[1][1, 0] = torch.nan
        assert kernels.forward(*given)[0].isnan().tolist() == [False, True, False]


def test_kernels_check_themselves(device):
    from scvi_lite.data import triton_kernels as gather
    from scvi_lite.distributions import triton_kernels as likelihood

    gather.check(device)
    likelihood.check(device)


def test_gather_kernel(device):
    from scvi_lite.data.triton_kernels import dense_rows

    x_ng = np.random.default_rng(0).poisson(0.6, (6, 700))
    x_ng[2] = 0
    x = CompactCSR.from_matrix(x_ng)
    row_n = torch.tensor([5, 2, 0, 5])
    found = dense_rows(*(t.to(device) for t in (row_n, x.start, x.col, x.value)), 700)
    assert found.dtype == torch.float32
    assert torch.equal(found.cpu(), torch.from_numpy(x_ng[row_n]).float())


# A step as a graph ----------------------------------------------------------------------------------------------------


def trained(adata, **options):
    scvi_lite.settings.seed = 0
    model = SCVI(adata, n_latent=3)
    model.train(**(QUIET | options))
    return model


def assert_same_training(one, other, tolerance=1e-4):
    for name in ("elbo_train", "elbo_validation"):
        np.testing.assert_allclose(one.history[name], other.history[name], rtol=tolerance)
    ours, theirs = one.module.state_dict(), other.module.state_dict()
    for name in ours:
        torch.testing.assert_close(ours[name].cpu(), theirs[name].cpu(), rtol=20 * tolerance, atol=20 * tolerance)


@pytest.fixture
def recorded(monkeypatch):
    """Recording on a CPU: what would be recorded runs at each replay. Gives the list of replays."""
    replays = []

    def record(work):
        return lambda: (replays.append(1), work())

    monkeypatch.setattr(graph, "obstacle", lambda trainer, is_plain: "")
    monkeypatch.setattr(graph, "apart", nullcontext)
    monkeypatch.setattr(graph, "record", record)
    return replays


@pytest.mark.parametrize(
    "plan", [{}, dict(lr_schedule="cosine", n_steps_kl_warmup=0.5, lr=0.01)], ids=["plain", "schedules"]
)
def test_replays_take_the_same_steps(adata, recorded, plan):
    graphed = trained(adata, plan_kwargs=plan | {"cuda_graph": True})
    assert_same_training(graphed, trained(adata, plan_kwargs=plan))
    # 76 cells to train on: 4 minibatches of 16 and one of 12 an epoch, of which the first 3 of 16 warm up.
    assert len(recorded) == 3 * 4 - graph.WARM_UP
    assert graphed.trainer.global_step == 15
    assert graphed.trainer.fit_loop.epoch_loop.graphed is None  # nothing holds the memory of a graph


def test_what_cannot_be_recorded_is_trained_without(adata, recorded, monkeypatch):
    def record(work):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(graph, "record", record)
    with pytest.warns(UserWarning, match="could not be recorded.*not permitted") as warned:
        model = trained(adata, plan_kwargs={"cuda_graph": True})
    assert len(warned) == 1
    assert_same_training(model, trained(adata))


def test_obstacles_are_named(adata):
    with pytest.warns(UserWarning, match="cuda_graph=True: it needs a CUDA device. Training without."):
        trained(adata, plan_kwargs={"cuda_graph": True}, max_epochs=1, accelerator="cpu")


# On a GPU -------------------------------------------------------------------------------------------------------------

ON_GPU = dict(accelerator="gpu", devices=1)


@pytest.mark.gpu
def test_training_on_a_gpu_comes_to_the_same():
    """Other random numbers, so the same within noise."""
    adata = simulated(1000, 200)
    options = dict(max_epochs=20, batch_size=128, plan_kwargs={"lr": 5e-3})
    on_gpu, on_cpu = trained(adata, **options, **ON_GPU), trained(adata, **options, accelerator="cpu")
    ends = [float(model.history["elbo_validation"].iloc[-1, 0]) for model in (on_gpu, on_cpu)]
    assert ends[0] == pytest.approx(ends[1], rel=0.02)


@pytest.mark.gpu
@pytest.mark.parametrize("options", NETWORKS.values(), ids=NETWORKS)
def test_a_step_on_a_gpu_equals_one_on_a_cpu(options, adata, monkeypatch):
    model = SCVI(adata, n_latent=3, dropout_rate=0.0, **options)
    monkeypatch.setattr("scvi_lite.nn.normal.torch.randn", lambda shape, **kind: torch.full(shape, 0.3, **kind))
    store, losses = stores.load(adata, model.registry), {}
    for device in ("cpu", "cuda"):
        module = model.module.to(device).train()
        module.zero_grad()
        loss = module.loss(store.to(device)[torch.arange(20)], torch.tensor(0.5, device=device)).total
        loss.backward()
        losses[device] = [loss.detach().cpu(), *(p.grad.cpu() for p in module.parameters())]
    for a, b in zip(*losses.values()):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
def test_no_step_on_a_gpu_waits(adata):
    model = SCVI(adata, n_latent=3)
    store, module = stores.load(adata, model.registry).to("cuda"), model.module.to("cuda").train()
    optimizer, weight = Adam(module.parameters(), fused=True), torch.tensor(0.5, device="cuda")
    row_n = torch.arange(20, device="cuda")
    for step in range(5):
        torch.cuda.set_sync_debug_mode("error" if step >= 3 else "default")
        try:
            module.zero_grad()
            module.loss(store[row_n], weight).total.backward()
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_graphed_steps_equal_steps(precision):
    adata = simulated(300, 100)
    plan = dict(lr_schedule="cosine", n_steps_kl_warmup=0.5)
    options = dict(precision=precision, max_epochs=5, batch_size=32, **ON_GPU)
    graphed = trained(adata, plan_kwargs=plan | {"cuda_graph": True}, **options)
    tolerance = 1e-3 if precision == "32-true" else 1e-2
    assert_same_training(graphed, trained(adata, plan_kwargs=plan, **options), tolerance)


@pytest.mark.gpu
def test_what_breaks_off_a_recording_leaves_training_possible(adata, monkeypatch):
    score = scvi_lite.train.task.Task.score
    monkeypatch.setattr(
        scvi_lite.train.task.Task, "score", lambda task, batch: (float(batch.total_n.sum()), score(task, batch))[1]
    )
    with pytest.warns(UserWarning, match="could not be recorded"):
        model = trained(adata, plan_kwargs={"cuda_graph": True}, **ON_GPU)
    assert np.isfinite(model.history["elbo_train"]).all().all()


@pytest.mark.gpu
def test_a_million_cells_fit():
    """1 M cells by 2,000 genes, one count in ten above zero: the store, and an epoch of minibatches from it."""
    n, g, m = 1_000_000, 2_000, 200
    start = torch.arange(n + 1) * m
    col = (torch.arange(m) * (g // m)).to(torch.int16).repeat(n)
    torch.cuda.reset_peak_memory_stats()
    x = CompactCSR(start, col, torch.ones(n * m, dtype=torch.uint8), g).to("cuda")
    for row_n in torch.randperm(n, device="cuda").split(4096):
        x_ng = x.gather(row_n).x_ng
    assert float(x_ng.sum()) == m * len(row_n)
    assert torch.cuda.max_memory_allocated() < 1.5 * (3 * n * m + 8 * n)
