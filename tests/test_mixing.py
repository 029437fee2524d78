"""The mean of softmax rows and mixtures of normals in compiled passes, against the formulas in doubles."""

import pytest
import torch
import torch.nn.functional as F

from scvi_lite.nn.conditional import LabelMixture
from scvi_lite.nn.mixing import log_mixture, mean_softmax, softmax_linear


def inputs(shift=0.0):
    generator = torch.Generator().manual_seed(0)
    n, s, kinds, h, g = 5, 2, 3, 4, 37

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    tensors = draw(n, s, kinds, h), draw(g, h), draw(kinds, g) + shift, draw(n, s, kinds).abs()
    return [t.requires_grad_() for t in tensors], draw(n, g)


def written_out(h, weight_gh, bias_lg, share_nsl):
    return (share_nsl.unsqueeze(-1) * (F.linear(h, weight_gh) + bias_lg).softmax(-1)).sum((1, 2))


@pytest.mark.parametrize("shift", [0.0, 300.0, -300.0])
@pytest.mark.parametrize("n_threads", [1, 2])
def test_values_and_gradients(shift, n_threads, monkeypatch):
    monkeypatch.setattr("scvi_lite._compiled.MIN_WORK", 1)
    monkeypatch.setattr("torch.get_num_threads", lambda: n_threads)
    tensors, grad_ng = inputs(shift)
    doubles = [t.detach().double().requires_grad_() for t in tensors]
    found, expected = mean_softmax(*tensors), written_out(*doubles)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-6)
    found.backward(grad_ng, retain_graph=True)
    expected.backward(grad_ng.double())
    for ours, theirs in zip(tensors, doubles):
        scale = float(theirs.grad.abs().max())
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-3, atol=1e-4 * scale)
    with pytest.raises(RuntimeError, match="once"):
        found.backward(grad_ng)


def test_doubles_take_the_formula():
    tensors, _ = inputs()
    doubles = [t.detach().double() for t in tensors]
    torch.testing.assert_close(mean_softmax(*doubles), written_out(*doubles))


@pytest.mark.parametrize("n_threads", [1, 2])
@pytest.mark.parametrize("shape", [(6, 4), (2, 3, 4), (0, 4)])
def test_softmax_of_a_linear_map(shape, n_threads, monkeypatch):
    """Also where nothing or something far away is asked for, in a place of the caller's, and in doubles."""
    monkeypatch.setattr("scvi_lite._compiled.MIN_WORK", 1)
    monkeypatch.setattr("torch.get_num_threads", lambda: n_threads)
    layer, h = torch.nn.Linear(4, 37), torch.randn(shape) * 50
    expected = F.linear(h.double(), layer.weight.double(), layer.bias.double()).softmax(-1)
    found = softmax_linear(h, layer)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-9)
    assert not found.requires_grad
    out = torch.empty(found.shape)
    assert softmax_linear(h, layer, out).data_ptr() == out.data_ptr()
    torch.testing.assert_close(out, found, rtol=0, atol=0)
    torch.testing.assert_close(softmax_linear(h.double(), layer.double()), expected)
    torch.testing.assert_close(softmax_linear(h.double(), layer, out), found, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("value", [float("nan"), -float("nan"), float("inf")])
def test_what_diverged_is_not_hidden(value):
    """One weight that is no number makes none of all that it reaches, as the formulas do."""
    (h, weight_gh, bias_lg, share_nsl), _ = inputs()
    layer = torch.nn.Linear(4, 37)
    layer.bias.data[20] = bias_lg.data[1, 20] = value
    assert softmax_linear(h, layer).isnan().all()
    assert mean_softmax(h, weight_gh, bias_lg, share_nsl).isnan().all()


@pytest.mark.parametrize("n_threads", [1, 2])
def test_log_mixture(n_threads, monkeypatch):
    """Places at a mean, between means and so far away that most parts underflow; as views, as networks make them."""
    monkeypatch.setattr("scvi_lite._compiled.MIN_WORK", 1)
    monkeypatch.setattr("torch.get_num_threads", lambda: n_threads)
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(5, 2, 3, 4, generator=generator).transpose(-1, -2).double() * 3
    z[0, 0] = 1e3
    loc, scale = torch.randn(2, 4, 6, 3, generator=generator).double()
    parts = loc, scale.abs() + 0.05, torch.rand(4, 6, generator=generator).double().log()
    z[1, 0] = loc[:, 0]
    up = torch.randn(5, 2, 4, generator=generator).double()
    found, expected = [], []
    for dtype, results in ((torch.float32, found), (torch.float64, expected)):
        leaf = z.to(dtype).requires_grad_()
        value = log_mixture(leaf, LabelMixture(*(t.to(dtype) for t in parts)))
        results += [value.detach().double(), *torch.autograd.grad(value, leaf, up.to(dtype))]
    for ours, theirs in zip(found, expected):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)
    torch.autograd.gradcheck(lambda leaf: log_mixture(leaf, LabelMixture(*parts)), z.requires_grad_())
