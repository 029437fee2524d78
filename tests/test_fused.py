"""The training forms against the reference formulas, finite differences and odd input."""

import os
import subprocess
import sys

import numpy as np
import pytest
import scipy.special
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scvi_lite import _compiled
from scvi_lite.data.batch import Counts
from scvi_lite.distributions import counts as reference
from scvi_lite.distributions import fused, kernels, sparse
from scvi_lite.distributions.sparse import sparse_linear

# name: (training form, formula, arguments after logit and library)
FORMS = {
    "zinb": (fused.zinb, reference.zinb_log_prob, 2),
    "nb": (fused.nb, reference.nb_log_prob, 1),
    "poisson": (fused.poisson, reference.poisson_log_prob, 0),
}
LIBRARY = pytest.mark.parametrize("library", [True, False], ids=["library", "log_mu"])
PER_GENE = pytest.mark.parametrize("per_gene", [True, False], ids=["theta_g", "theta_ng"])
FORM = pytest.mark.parametrize("form", FORMS)
# The compiler makes an instance of every autograd.Function that it traces, and torch warns of that.
COMPILES = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


def draw(form, n=5, g=7, library=True, per_gene=True, dtype=torch.float64, density=0.4, seed=0):
    """Counts, the inputs of one likelihood, and weights of the cells."""
    r = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=r, dtype=dtype)

    x_ng = torch.poisson(torch.rand(n, g, generator=r, dtype=dtype) * 6, generator=r)
    x_ng = x_ng * (torch.rand(n, g, generator=r) < density)
    rest = [normal(g) if per_gene else normal(n, g), normal(n, g)][: FORMS[form][2]]
    inputs = [normal(n, g), normal(n) + 2 if library else None, *rest]
    inputs = [t if t is None else t.requires_grad_() for t in inputs]
    return Counts.from_dense(x_ng), inputs, normal(n)


def formula(form, counts, inputs):
    """The same number from the reference formula, in double precision."""
    logit_ng, library_n, *rest = [t if t is None else t.double() for t in inputs]
    log_mu_ng = logit_ng if library_n is None else library_n[:, None] + logit_ng.log_softmax(1)
    return FORMS[form][1](counts.x_ng.double(), log_mu_ng, *rest).sum(1)


def compare(form, counts, inputs, up_n, tolerance):
    value_n, expected_n = FORMS[form][0](counts, *inputs), formula(form, counts, inputs)
    assert value_n.shape == (counts.n_cells,)
    torch.testing.assert_close(value_n.double(), expected_n, rtol=tolerance, atol=tolerance)
    leaves = [t for t in inputs if t is not None]
    got = torch.autograd.grad(value_n @ up_n, leaves)
    wanted = torch.autograd.grad(expected_n @ up_n.double(), leaves)
    for a, b in zip(got, wanted):
        torch.testing.assert_close(a, b, rtol=10 * tolerance, atol=10 * tolerance * (1 + b.abs().max().item()))


@FORM
@LIBRARY
@PER_GENE
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)], ids=["f64", "f32"])
def test_equals_the_formula(form, library, per_gene, dtype, tolerance):
    compare(form, *draw(form, 40, 300, library, per_gene, dtype), tolerance)


@pytest.mark.parametrize("n", [10, 40, 100])
def test_a_table_is_as_long_as_is_worth_it(n, monkeypatch):
    """Whether counts are looked up or not, what they score is the formula's."""
    lengths, table = [], kernels._table

    def seen(*inputs):
        made = table(*inputs)
        lengths.append(len(made))
        return made

    monkeypatch.setattr(kernels, "_table", seen)
    _, inputs, up_n = draw("nb", n, 30, dtype=torch.float32)
    x_ng = torch.arange(1.0, 30 * n + 1).remainder(101).view(n, 30) + 1
    compare("nb", Counts.from_dense(x_ng), [inputs[0], inputs[1] + 5, inputs[2]], up_n, 2e-5)
    assert set(lengths) == {{10: 16, 40: 40, 100: 64}[n]}


@FORM
@LIBRARY
@PER_GENE
def test_gradients_against_finite_differences(form, library, per_gene):
    counts, inputs, _ = draw(form, 3, 4, library, per_gene)
    assert torch.autograd.gradcheck(lambda *leaves: FORMS[form][0](counts, *leaves), inputs)


@settings(max_examples=60, deadline=None)
@given(
    form=st.sampled_from(sorted(FORMS)),
    n=st.integers(1, 6),
    g=st.integers(1, 9),
    library=st.booleans(),
    per_gene=st.booleans(),
    single=st.booleans(),
    density=st.sampled_from([0.0, 0.2, 1.0]),
    seed=st.integers(0, 1000),
)
def test_odd_shapes(form, n, g, library, per_gene, single, density, seed):
    dtype, tolerance = (torch.float32, 1e-5) if single else (torch.float64, 1e-9)
    compare(form, *draw(form, n, g, library, per_gene, dtype, density, seed), tolerance)


@FORM
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("log_theta", [-90.0, -20.0, 0.0, 20.0, 90.0])
def test_extreme_inputs_stay_finite_and_right(form, dtype, log_theta):
    x_ng = torch.tensor([[0.0, 1.0, 3e6], [0.0, 0.0, 0.0], [2.0, 0.5, 17.0]], dtype=dtype)
    logit_ng = torch.tensor([[-80.0, -80.0, 0.0], [80.0, -80.0, 0.0], [0.0, 3.0, -80.0]], dtype=dtype)
    dropout_ng = torch.tensor([[50.0, -50.0, 50.0], [-50.0, 50.0, 0.0], [-90.0, 90.0, -50.0]], dtype=dtype)
    inputs = [logit_ng, torch.tensor([15.0, 0.0, 9.0], dtype=dtype)]
    inputs += [torch.full((3,), log_theta, dtype=dtype), dropout_ng][: FORMS[form][2]]
    inputs = [t.requires_grad_() for t in inputs]
    counts = Counts.from_dense(x_ng)
    value_n = FORMS[form][0](counts, *inputs)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-9
    torch.testing.assert_close(value_n.double(), formula(form, counts, inputs), rtol=tolerance, atol=tolerance)
    for gradient in torch.autograd.grad(value_n.sum(), inputs):
        assert gradient.isfinite().all()


@FORM
def test_large_and_fractional_counts_in_single_precision(form):
    """Against the same numbers in double precision: what cancels must not take the digits with it."""
    counts, inputs, up_n = draw(form, 6, 30, dtype=torch.float32, density=1.0)
    counts = counts.map(lambda v: v * torch.logspace(-1, 6, v.shape[0]))
    counts.value_m.clamp_(min=0.1)
    compare(form, counts, inputs, up_n, 1e-5)


@FORM
def test_only_the_asked_gradients(form):
    counts, inputs, _ = draw(form)
    for chosen in range(len(inputs)):
        only = [t.detach().requires_grad_(i == chosen) for i, t in enumerate(inputs)]
        FORMS[form][0](counts, *only).sum().backward()
        assert [t.grad is not None for t in only] == [i == chosen for i in range(len(inputs))]


@FORM
def test_backward_twice_gives_the_same(form):
    counts, inputs, up_n = draw(form, dtype=torch.float32)
    value = FORMS[form][0](counts, *inputs) @ up_n
    first = torch.autograd.grad(value, inputs, retain_graph=True)
    second = torch.autograd.grad(2 * value, inputs)
    for a, b in zip(first, second):
        torch.testing.assert_close(2 * a, b)


@FORM
def test_inference_mode_and_strided_inputs(form):
    counts, inputs, _ = draw(form, dtype=torch.float32)
    strided = [t.repeat_interleave(2, -1)[..., ::2] for t in inputs]
    with torch.inference_mode():
        torch.testing.assert_close(
            FORMS[form][0](counts, *strided).double(), formula(form, counts, inputs), rtol=1e-5, atol=1e-5
        )


def test_no_derivatives_where_no_gradient_is_asked_for(monkeypatch):
    score, weights = kernels.score, []
    monkeypatch.setattr(kernels, "score", lambda *given: (weights.append(given[-1]), score(*given))[1])
    counts, inputs, _ = draw("zinb", dtype=torch.float32)
    with torch.no_grad():
        fused.zinb(counts, *inputs)
    fused.zinb(counts, *inputs)
    assert weights[0] is None and weights[1] is not None


@FORM
def test_half_precision_is_computed_in_single(form):
    counts, inputs, _ = draw(form, dtype=torch.float32)
    half = [t.detach().bfloat16().requires_grad_() for t in inputs]
    with torch.autocast("cpu", torch.bfloat16):
        value_n = FORMS[form][0](counts, *half)
    assert value_n.dtype == torch.float32
    torch.testing.assert_close(value_n.double(), formula(form, counts, half), rtol=1e-5, atol=1e-5)
    value_n.sum().backward()
    assert all(t.grad.dtype == torch.bfloat16 and t.grad.isfinite().all() for t in half)


@COMPILES
@FORM
def test_compiles_without_a_graph_break(form):
    step = torch.compile(lambda counts, *leaves: FORMS[form][0](counts, *leaves), fullgraph=True, backend="aot_eager")
    for seed in range(2):  # with other numbers of non-zeros
        counts, inputs, up_n = draw(form, dtype=torch.float32, seed=seed)
        compiled = torch.autograd.grad(step(counts, *inputs) @ up_n, inputs)
        eager = torch.autograd.grad(FORMS[form][0](counts, *inputs) @ up_n, inputs)
        for a, b in zip(compiled, eager):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@FORM
def test_threads_change_nothing(form, monkeypatch):
    monkeypatch.setattr(_compiled, "MIN_WORK", 1)
    counts, inputs, up_n = draw(form, 11, 50, dtype=torch.float32)
    results = []
    for n_threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda n=n_threads: n)
        value_n = FORMS[form][0](counts, *inputs)
        with torch.no_grad():
            assert torch.equal(FORMS[form][0](counts, *inputs), value_n)
        results.append([value_n, *torch.autograd.grad(value_n @ up_n, inputs)])
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_has_threads_of_its_own():
    code = """
import os, torch
from scvi_lite.data.batch import Counts
from scvi_lite import _compiled
from scvi_lite.distributions import fused
_compiled.MIN_WORK = 1
torch.set_num_threads(2)
counts = Counts.from_dense(torch.ones(4, 3))
value_n = fused.poisson(counts, torch.zeros(4, 3), None)
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(fused.poisson(counts, torch.zeros(4, 3), None), value_n) else 1)
assert os.waitpid(child, 0)[1] == 0
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@FORM
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nan_comes_out_as_nan(form, dtype):
    """Training that diverges must see it in the loss, in the cell where it happened, not as an error from in here."""
    counts, inputs, _ = draw(form, dtype=dtype, density=0.5)
    counts.value_m += 0.5
    for chosen, per_cell in enumerate([True, True, False, True][: len(inputs)]):
        broken = [t.detach().clone() for t in inputs]
        broken[chosen][1 if per_cell else slice(None)] = torch.nan
        value_n = FORMS[form][0](counts, *broken)
        assert value_n.isnan().tolist() == [not per_cell, True, *[not per_cell] * 3]


def test_polynomials_of_the_kernels():
    x = np.r_[np.linspace(-87, 88, 4001), np.linspace(-1e-3, 1e-3, 101)].astype(np.float32)
    np.testing.assert_allclose([kernels.exp(v) for v in x], np.exp(x.astype(float)), rtol=3e-7)
    r = np.r_[0.0, np.logspace(-38, 37, 4001)].astype(np.float32)
    np.testing.assert_allclose([kernels.log1p(v) for v in r], np.log1p(r.astype(float)), rtol=3e-7)
    np.testing.assert_allclose([kernels.log(v) for v in r[1:]], np.log(r[1:].astype(float)), rtol=3e-7, atol=1e-7)


def test_stirling_of_the_kernels():
    for theta in (1e-12, 0.3, 7.0, 1e4):
        for x in (0.5, 17.0, 3e6):
            gammas, digammas = kernels.gamma_rise(x, theta)
            expected = scipy.special.gammaln(x + theta) - scipy.special.gammaln(theta)
            np.testing.assert_allclose(gammas, expected, rtol=1e-7)
            expected = scipy.special.digamma(x + theta) - scipy.special.digamma(theta)
            np.testing.assert_allclose(digammas, expected, rtol=1e-7)


def test_cells_and_features_must_fit():
    counts, inputs, _ = draw("poisson")
    with pytest.raises(ValueError, match="logit_ng has shape"):
        fused.poisson(counts, inputs[0][:, 1:], inputs[1])


@pytest.mark.parametrize("density", [0.02, 0.15, 0.9], ids=["sparse", "between", "dense"])
@pytest.mark.parametrize("transposed", [True, False], ids=["stored_gh", "stored_hg"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("near", [sparse.NEAR, 80], ids=["at_once", "by_block"])
def test_sparse_linear_equals_linear(density, transposed, dtype, near, monkeypatch):
    monkeypatch.setattr(sparse, "NEAR", near)
    monkeypatch.setattr(sparse, "MANY_CELLS", 1)
    x_ng = (torch.rand(20, 60, dtype=dtype) < density) * torch.rand(20, 60, dtype=dtype)
    counts, up_nh = Counts.from_dense(x_ng), torch.randn(20, 8, dtype=dtype)
    weight_hg = (
        torch.randn(60, 8, dtype=dtype).t() if transposed else torch.randn(8, 60, dtype=dtype)
    ).requires_grad_()
    value_nh, expected_nh = sparse_linear(counts, weight_hg), torch.nn.functional.linear(x_ng, weight_hg)
    torch.testing.assert_close(value_nh, expected_nh)
    (got,), (wanted,) = (torch.autograd.grad(v, weight_hg, up_nh) for v in (value_nh, expected_nh))
    torch.testing.assert_close(got, wanted)
    assert not transposed or got.stride() == weight_hg.stride()


def test_sparse_linear_against_finite_differences():
    for density in (0.1, 0.9):
        counts = Counts.from_dense((torch.rand(5, 40) < density).double())
        weight_hg = torch.randn(3, 40, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda w, c=counts: sparse_linear(c, w), [weight_hg])


@pytest.mark.parametrize(
    "x_ng", [torch.zeros(3, 4), torch.ones(1, 1), torch.eye(40)[:, :39]], ids=["empty", "one", "gaps"]
)
def test_sparse_linear_of_odd_counts(x_ng):
    weight_hg = torch.randn(2, x_ng.shape[1], requires_grad=True)
    value_nh = sparse_linear(Counts.from_dense(x_ng), weight_hg)
    torch.testing.assert_close(value_nh, x_ng @ weight_hg.t())
    value_nh.sum().backward()
    torch.testing.assert_close(weight_hg.grad, x_ng.sum(0).expand(2, -1))


@COMPILES
def test_sparse_linear_compiles_and_autocasts():
    step = torch.compile(sparse_linear, fullgraph=True, backend="aot_eager")
    for density in (0.05, 0.05, 0.5):
        counts = Counts.from_dense((torch.rand(10, 50) < density).float())
        weight_hg = torch.randn(4, 50, requires_grad=True)
        step(counts, weight_hg).sum().backward()
        torch.testing.assert_close(weight_hg.grad, counts.x_ng.sum(0).expand(4, -1))
        with torch.autocast("cpu", torch.bfloat16):
            value_nh = sparse_linear(counts, weight_hg)
        torch.testing.assert_close(value_nh.float(), counts.x_ng @ weight_hg.t(), rtol=0.02, atol=0.1)


def test_sparse_linear_refuses_other_features():
    with pytest.raises(ValueError, match="3 features"):
        sparse_linear(Counts.from_dense(torch.ones(2, 3)), torch.ones(2, 4))


@pytest.mark.gpu
@FORM
def test_on_cuda(form):
    counts, inputs, up_n = draw(form, 40, 300, dtype=torch.float32)
    moved = Counts(*(t.cuda() for t in (counts.start, counts.col_m, counts.value_m)), counts.n_features)
    compare(form, moved, [t.detach().cuda().requires_grad_() for t in inputs], up_n.cuda(), 1e-5)
    weight_hg = torch.randn(4, 300)
    value_nh = sparse_linear(moved, weight_hg.cuda()).cpu()
    torch.testing.assert_close(value_nh, counts.x_ng @ weight_hg.t(), rtol=1e-2, atol=1e-2)
    assert np.isfinite(value_nh.numpy()).all()


@pytest.mark.parametrize("likelihood", ["zinb", "nb", "poisson"])
@pytest.mark.parametrize("theta_shape", [(9,), (5, 9), (3, 5, 9)])
def test_draws_are_scored_together_as_one_by_one(likelihood, theta_shape):
    """Several draws of the rates of the same cells: one pass of the kernel, and one draw at a time with gradients."""
    from scvi_lite.nn.rates import Rates

    counts = Counts.from_dense(torch.poisson(torch.rand(5, 9) * 2))
    log_theta = None if likelihood == "poisson" else torch.randn(theta_shape)
    dropout_ng = torch.randn(3, 5, 9) if likelihood == "zinb" else None
    for proportions, library_n in ((True, torch.randn(5)), (True, torch.randn(3, 5)), (False, torch.randn(3, 5))):
        rates = Rates(likelihood, torch.randn(3, 5, 9), library_n, log_theta, dropout_ng, proportions)
        expected = torch.stack([rates.sample(i).log_likelihood(counts) for i in range(3)])
        torch.testing.assert_close(rates.log_likelihood(counts), expected)
        rates.logit_ng.requires_grad_()
        rates.log_likelihood(counts).sum().backward()
        assert rates.logit_ng.grad.isfinite().all()


def test_large_counts_lose_no_digits():
    """Numbers of the size of a count cancel: in single floats the derivative of a large one is wrong by 4e-4."""
    counts = Counts.from_dense(torch.tensor([[1e5, 3.0, 0.0]]))
    gradients = []
    for dtype in (torch.float32, torch.float64):
        logit_ng = torch.tensor([[9.0, 1.0, 0.0]], dtype=dtype, requires_grad=True)
        log_theta = torch.tensor([-5.6, 0.1, 0.2], dtype=dtype, requires_grad=True)
        fused.nb(counts, logit_ng, None, log_theta).sum().backward()
        gradients.append((logit_ng.grad.double(), log_theta.grad.double()))
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)
