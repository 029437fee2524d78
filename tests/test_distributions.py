"""The formulas against SciPy and finite differences, and the classes that users sample from."""

import numpy as np
import pytest
import scipy.stats
import torch

from scvi_lite import distributions as d
from scvi_lite.distributions import counts

X = torch.tensor([0.0, 1.0, 2.0, 7.0, 40.0, 3000.0], dtype=torch.float64)
LOG_MU = torch.tensor([-3.0, 0.0, 2.5, 6.0], dtype=torch.float64)[:, None]
LOG_THETA = torch.tensor([-4.0, 0.0, 3.0, 4.6, 4.7, 9.0], dtype=torch.float64)[:, None, None]
PI = torch.tensor([-50.0, -1.0, 0.0, 3.0], dtype=torch.float64)[:, None, None, None]


def scipy_nb(x, log_mu, log_theta):
    mu, theta = log_mu.exp().numpy(), log_theta.exp().numpy()
    return scipy.stats.nbinom.logpmf(x.numpy(), theta, theta / (theta + mu))


def close(value, expected, rtol=1e-9):
    np.testing.assert_allclose(np.asarray(value), expected, rtol=rtol, atol=rtol)


def test_poisson_equals_scipy():
    close(counts.poisson_log_prob(X, LOG_MU), scipy.stats.poisson.logpmf(X.numpy(), LOG_MU.exp().numpy()))


def test_negative_binomial_equals_scipy():
    close(counts.nb_log_prob(X, LOG_MU, LOG_THETA), scipy_nb(X, LOG_MU, LOG_THETA))


def test_zero_inflated_equals_scipy():
    share, nb = PI.sigmoid().numpy(), scipy_nb(X, LOG_MU, LOG_THETA)
    expected = np.where(X == 0, np.log(share + (1 - share) * np.exp(nb)), np.log1p(-share) + nb)
    close(counts.zinb_log_prob(X, LOG_MU, LOG_THETA, PI), expected)


def test_normal_equals_scipy():
    scale = LOG_THETA.exp()
    close(counts.normal_log_prob(X, LOG_MU, scale), scipy.stats.norm.logpdf(X.numpy(), LOG_MU.numpy(), scale.numpy()))


def test_negative_binomial_tends_to_poisson_in_single_precision():
    x, log_mu = X.float(), LOG_MU.float()
    for log_theta in (20.0, 35.0, 90.0):
        value = counts.nb_log_prob(x[:-1], log_mu, torch.tensor(log_theta))
        close(value, counts.poisson_log_prob(x[:-1], log_mu), rtol=2e-5)


@pytest.mark.parametrize("name", ["poisson", "nb", "zinb", "normal"])
def test_gradients_against_finite_differences(name):
    function = getattr(counts, f"{name}_log_prob")
    x = torch.tensor([0.0, 1.0, 2.5, 300.0], dtype=torch.float64)
    shape = (5, 4)
    arguments = [
        torch.randn(shape, dtype=torch.float64) for _ in range({"poisson": 1, "nb": 2, "zinb": 3, "normal": 2}[name])
    ]
    if name == "normal":
        arguments[1] = arguments[1].exp()
    elif name != "poisson":
        arguments[1][0] = 6.0  # above theta = 100 another series is used
    assert torch.autograd.gradcheck(lambda *a: function(x, *a), [a.requires_grad_() for a in arguments])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["poisson", "nb", "zinb"])
def test_extreme_inputs_stay_finite(name, dtype):
    """The grid holds every pair of extremes; value and gradients must be finite on all of it."""
    x = torch.tensor([0.0, 1.0, 0.5, 1e7], dtype=dtype)
    log_mu = torch.tensor([-80.0, 0.0, 20.0], dtype=dtype)[:, None]
    log_theta = torch.tensor([-1000.0, -90.0, -20.0, 0.0, 20.0, 90.0, 1000.0], dtype=dtype)[:, None, None]
    pi = torch.tensor([-50.0, 0.0, 50.0], dtype=dtype)[:, None, None, None]
    arguments = [a.requires_grad_() for a in (log_mu, log_theta, pi)[: {"poisson": 1, "nb": 2, "zinb": 3}[name]]]
    value = getattr(counts, f"{name}_log_prob")(x, *arguments)
    assert value.isfinite().all()
    assert (value <= 1e-3).all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(value.sum(), arguments))


MU = torch.tensor([[0.5, 3.0, 20.0]])
THETA = torch.tensor([0.7, 2.0, 50.0])
LOGIT = torch.tensor([0.0, -1.0, 1.0])
MADE = {
    "nb": lambda: d.NegativeBinomial(mu=MU, theta=THETA, scale=MU / MU.sum()),
    "zinb": lambda: d.ZeroInflatedNegativeBinomial(mu=MU, theta=THETA, zi_logits=LOGIT, scale=MU / MU.sum()),
    "mixture": lambda: d.NegativeBinomialMixture(MU, 2 * MU, THETA, LOGIT),
    "mixture_two_thetas": lambda: d.NegativeBinomialMixture(MU, 2 * MU, THETA, LOGIT, theta2=3 * THETA),
    "poisson": lambda: d.Poisson(MU, scale=MU / MU.sum()),
    "normal": lambda: d.Normal(MU, THETA, normal_mu=MU / MU.sum()),
    "beta_binomial": lambda: d.BetaBinomial(10 * torch.ones(3), alpha=MU, beta=THETA),
    "zi_gamma": lambda: d.ZeroInflatedGamma(THETA, MU, LOGIT, scale=MU / MU.sum()),
    "zi_log_normal": lambda: d.ZeroInflatedLogNormal(MU / 20, LOGIT.exp() / 8, LOGIT, normal_mu=MU / MU.sum()),
    "log1p_normal": lambda: d.Log1pNormal(MU / 20 + 2, LOGIT.exp() / 8, scale=MU / MU.sum()),
}
COUNTING = ["nb", "zinb", "mixture", "mixture_two_thetas", "poisson"]


@pytest.mark.parametrize("name", MADE)
def test_samples_have_the_stated_moments(name):
    distribution, n = MADE[name](), 100_000
    sample = distribution.sample((n,)).double()
    assert sample.shape == (n, 1, 3)
    mean, variance = distribution.mean.double(), distribution.variance.double()
    assert ((sample.mean(0) - mean).abs() < 5 * (variance / n).sqrt()).all()
    fourth = ((sample - mean) ** 4).mean(0)
    assert ((sample.var(0) - variance).abs() < 5 * (fourth / n).sqrt()).all()


@pytest.mark.parametrize("name", COUNTING)
def test_probabilities_sum_to_one_and_give_the_mean(name):
    distribution, x = MADE[name](), torch.arange(3000.0)[:, None, None]
    probability = distribution.log_prob(x).exp().double()
    torch.testing.assert_close(probability.sum(0), torch.ones(1, 3).double(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close((probability * x).sum(0), distribution.mean.double(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MADE)
def test_shapes(name):
    distribution = MADE[name]()
    assert distribution.batch_shape == (1, 3)
    assert distribution.sample().shape == (1, 3)
    assert distribution.sample(torch.Size([4, 2])).shape == (4, 2, 1, 3)
    assert distribution.log_prob(torch.zeros(6, 3)).shape == (6, 3)
    assert not distribution.sample().requires_grad
    assert type(distribution).__name__ in repr(distribution)


@pytest.mark.parametrize("name", COUNTING)
def test_negative_counts_are_impossible_or_refused(name):
    distribution = MADE[name]()
    distribution._validate_args = False
    assert (distribution.log_prob(torch.tensor(-1.0)) == -torch.inf).all()
    distribution._validate_args = True
    refused = pytest.raises(ValueError, match="support")
    with refused if name == "poisson" else pytest.warns(UserWarning, match="must be within the support"):
        distribution.log_prob(torch.tensor(-1.0))


@pytest.mark.parametrize("name", ["zi_gamma", "zi_log_normal", "log1p_normal"])
def test_negative_values_are_impossible_and_warned_of(name):
    distribution = MADE[name]()
    assert (distribution.log_prob(torch.tensor(-1.0)) == -torch.inf).all()
    distribution._validate_args = True
    with pytest.warns(UserWarning, match="must be within the support"):
        distribution.log_prob(torch.tensor(-1.0))


def test_beta_binomial_equals_scipy():
    x = torch.arange(11.0, dtype=torch.float64)[:, None, None]
    a, b = MU.double(), THETA.double()
    expected = scipy.stats.betabinom.logpmf(x.numpy(), 10, a.numpy(), b.numpy())
    n = torch.tensor(10.0, dtype=torch.float64)
    close(d.BetaBinomial(n, alpha=a, beta=b).log_prob(x), expected)
    close(d.BetaBinomial(n, mu=a / (a + b), gamma=1 / (a + b + 1)).log_prob(x), expected)
    with pytest.raises(ValueError, match="found alpha, gamma"):
        d.BetaBinomial(n, alpha=a, gamma=b)
    with pytest.raises(ValueError, match="support"):
        d.BetaBinomial(n, alpha=a, beta=b, validate_args=True).log_prob(n + 1)


def test_zero_inflated_densities_equal_scipy():
    mu, theta, pi, x = MU.double(), THETA.double(), LOGIT.double(), X[1:, None, None]
    for distribution, density in (
        (d.ZeroInflatedGamma(theta, mu, pi), scipy.stats.gamma(theta.numpy(), scale=1 / mu.numpy())),
        (d.ZeroInflatedLogNormal(mu, theta, pi), scipy.stats.lognorm(theta.numpy(), scale=mu.exp().numpy())),
    ):
        close(distribution.log_prob(x), density.logpdf(x.numpy()) + np.log1p(-pi.sigmoid().numpy()))
        close(distribution.log_prob(torch.tensor(0.0)), np.log(pi.sigmoid().expand(1, 3).numpy()))
    above = 1 + X[:, None, None]
    expected = scipy.stats.lognorm.logpdf(above.numpy(), theta.numpy(), scale=mu.exp().numpy())
    close(d.Log1pNormal(mu, theta).log_prob(above - 1), expected)


@pytest.mark.parametrize("name", ["zi_gamma", "zi_log_normal"])
def test_a_zero_gives_gradients_that_are_finite(name):
    parameters = [t.clone().requires_grad_() for t in (MU, THETA, LOGIT)]
    kind = {"zi_gamma": d.ZeroInflatedGamma, "zi_log_normal": d.ZeroInflatedLogNormal}[name]
    kind(*parameters).log_prob(torch.zeros(3)).sum().backward()
    assert all(t.grad.isfinite().all() for t in parameters)
    assert (parameters[2].grad != 0).all()


def test_two_ways_to_say_a_negative_binomial():
    ways = [{"mu": MU, "theta": THETA}, {"total_count": THETA, "logits": (MU / THETA).log()}]
    ways.append({"total_count": THETA, "probs": MU / (MU + THETA)})
    for make in (d.NegativeBinomial, lambda **way: d.ZeroInflatedNegativeBinomial(zi_logits=LOGIT, **way)):
        for way in ways:
            made = make(**way)
            torch.testing.assert_close(made.mu, MU)
            torch.testing.assert_close(made.theta, THETA.expand(1, 3))


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({}, "none of them"),
        ({"mu": MU}, "found mu"),
        ({"mu": MU, "theta": THETA, "total_count": THETA}, "found total_count, mu, theta"),
        ({"total_count": THETA, "logits": MU, "probs": MU}, "found total_count, probs, logits"),
    ],
)
def test_contradictory_parameters_are_refused(given, found):
    with pytest.raises(ValueError, match=found):
        d.NegativeBinomial(**given)
    with pytest.raises(ValueError, match=found):
        d.ZeroInflatedNegativeBinomial(zi_logits=LOGIT, **given)


def test_other_refusals():
    with pytest.raises(ValueError, match="zi_logits"):
        d.ZeroInflatedNegativeBinomial(mu=MU, theta=THETA)
    with pytest.raises(ValueError, match="mu"):
        d.NegativeBinomial(mu=-MU, theta=THETA, validate_args=True)
    with pytest.raises(AttributeError, match="Did you mean 'NegativeBinomial'"):
        _ = d.NegativeBinomal


@pytest.mark.parametrize("name", ["zi_gamma", "zi_log_normal", "log1p_normal"])
def test_proportions_are_carried_along(name):
    torch.testing.assert_close(MADE[name]().get_normalized("scale"), MU / MU.sum())


@pytest.mark.parametrize("name", ["nb", "zinb", "poisson", "normal"])
def test_normalized(name):
    distribution = MADE[name]()
    torch.testing.assert_close(distribution.get_normalized("scale"), MU / MU.sum())
    torch.testing.assert_close(distribution.get_normalized("mu"), MU if name != "normal" else MU / MU.sum())
    with pytest.raises(ValueError, match="'foo'"):
        distribution.get_normalized("foo")
    with pytest.raises(ValueError, match="pass it"):
        d.NegativeBinomial(mu=MU, theta=THETA).get_normalized("scale")


def test_log_prob_has_gradients():
    mu, theta, logit = (t.clone().requires_grad_() for t in (MU, THETA, LOGIT))
    distribution = d.ZeroInflatedNegativeBinomial(mu=mu, theta=theta, zi_logits=logit)
    distribution.log_prob(distribution.sample((5,))).sum().backward()
    assert all(t.grad.isfinite().all() and (t.grad != 0).all() for t in (mu, theta, logit))


def test_rates_of_zero():
    zero, one = torch.tensor(0.0), torch.tensor(1.0)
    for distribution in (d.NegativeBinomial(mu=zero, theta=one), d.Poisson(zero)):
        assert distribution.log_prob(zero) > -1e-20
        assert distribution.log_prob(one) < -60
        assert distribution.sample() == 0
