r"""The formulas of :mod:`scvi_lite.distributions.closed_form` for NB and ZINB as one pass each way, for a GPU.

Forward, a program goes over the row of a cell: the softmax's sum, then the value and the sum of the derivatives with
respect to log mu. With these two sums nothing else of the gradient depends on other genes, so that backward computes it
anew, number by number, and nothing of the size of the minibatch is kept between.

In single precision, what cancels must not be taken apart. With n = x + theta, q = mu / (theta + mu) and p = 1 - q, and
Stirling's remainder D(z) = lgamma(z) - (z - 1/2) log z + z - log(2 pi) / 2, the log-probability of a count x > 0 is

.. math:: x \log\frac{n q}{x} + \theta \log\frac{n p}{\theta} + D(n) - D(\theta) - D(x)
          + \tfrac12 (\log\theta - \log n - \log x - \log 2\pi)

(Loader 2000, *Fast and accurate computation of binomial probabilities*). The two ratios are 1 + a and 1 + b with
b = (x - mu) / (theta + mu) and a = -theta b / x. D, and digamma(z) - log z, come from their series (dlmf.nist.gov/5.11)
four steps above z where z < 4. The derivatives: x p - theta q =: m for log mu, and
theta (log(n p / theta) + psi'(n) - psi'(theta)) - m for log theta, with psi'(z) = digamma(z) - log z.

Triton compiles the kernels. ``TRITON_INTERPRET=1`` runs the same code on a CPU, slowly, for tests.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from scvi_lite.distributions.counts import LOG_THETA_RANGE, zinb_log_prob

BLOCK_FORWARD, BLOCK_BACKWARD = 1024, 256
PROGRAMS = 128  # into so many parts, at most, are the cells divided whose derivatives by log theta are added up
LOWEST, HIGHEST = (tl.constexpr(bound) for bound in LOG_THETA_RANGE)
HALF_LOG_2PI = tl.constexpr(0.9189385332046727)


@triton.jit
def log1p(x):
    """log(1 + x): what rounding 1 + x takes away is added to first order."""
    u = 1.0 + x
    return tl.log(u) + (x - (u - 1.0)) / u


@triton.jit
def remainders(z, log_z):
    """D(z) and digamma(z) - log z of the module's docstring."""
    small = z < 4.0
    w = tl.where(small, z + 4.0, z)
    r = 1.0 / w
    rr = r * r
    d = r * (1.0 / 12.0 - rr * (1.0 / 360.0 - rr * (1.0 / 1260.0)))
    e = -r * 0.5 - rr * (1.0 / 12.0 - rr * (1.0 / 120.0 - rr * (1.0 / 252.0)))
    z0 = tl.where(small, z, 1.0)
    z1, z2, z3 = z0 + 1.0, z0 + 2.0, z0 + 3.0
    log_w = tl.log(w)
    d_small = d + (z + 3.5) * log_w - 4.0 - tl.log(z1 * z2 * z3) - (z + 0.5) * log_z
    e_small = e + log_w - log_z - (1.0 / z0 + 1.0 / z1 + 1.0 / z2 + 1.0 / z3)
    return tl.where(small, d_small, d), tl.where(small, e_small, e)


@triton.jit
def log_ratio(difference, log_ratio_far):
    """log(1 + difference), or the given number where 1 + difference has lost its digits."""
    near = tl.abs(difference) < 0.5
    return tl.where(near, log1p(tl.where(near, difference, 0.0)), log_ratio_far)


@triton.jit
def score(x, log_mu, log_theta, dropout, HAS_DROPOUT: tl.constexpr):
    """Log-probability of counts, and its derivatives with respect to log mu, log theta and dropout."""
    log_theta = tl.minimum(tl.maximum(log_theta, LOWEST, tl.PropagateNan.ALL), HIGHEST, tl.PropagateNan.ALL)
    theta, mu = tl.exp(log_theta), tl.exp(tl.minimum(log_mu, 88.0, tl.PropagateNan.ALL))
    d = log_mu - log_theta
    small = tl.exp(-tl.abs(d))
    q, p = tl.where(d > 0, 1.0, small) / (1.0 + small), tl.where(d > 0, small, 1.0) / (1.0 + small)
    s = tl.maximum(d, 0.0) + log1p(small)
    t, h = theta * s, theta * q
    # A zero.
    zero, dt, ddropout = -t, tl.full(t.shape, -1.0, tl.float32), tl.zeros(t.shape, tl.float32)
    if HAS_DROPOUT:
        prior = tl.exp(-tl.maximum(dropout, -40.0, tl.PropagateNan.ALL))
        posterior = prior * tl.exp(-t)
        both = 1.0 / ((1.0 + prior) * (1.0 + posterior))
        zero = tl.log((1.0 + posterior) * (1.0 + posterior) * both)
        dt = -posterior * (1.0 + prior) * both
        ddropout = both * (prior - posterior)
    # A count above zero.
    is_zero = x == 0
    x = tl.where(is_zero, 1.0, x)
    n = x + theta
    log_x, log_n = tl.log(x), tl.log(n)
    b = (x - mu) / (theta + mu)
    log_a = log_ratio(-theta * b / x, log_n + (d - s) - log_x)
    log_b = log_ratio(b, log_n - log_theta - s)
    d_n, e_n = remainders(n, log_n)
    d_theta, e_theta = remainders(theta, log_theta)
    d_x, _ = remainders(x, log_x)
    value = x * log_a + theta * log_b + d_n - d_theta - d_x + 0.5 * (log_theta - log_n - log_x) - HALF_LOG_2PI
    dmu = x * p - h
    dtheta = theta * (log_b + e_n - e_theta) - dmu
    if HAS_DROPOUT:
        away = tl.exp(-tl.abs(dropout))
        value -= tl.maximum(dropout, 0.0) + log1p(away)
        ddropout = tl.where(is_zero, ddropout, -tl.where(dropout > 0, 1.0, away) / (1.0 + away))
    return (
        tl.where(is_zero, zero, value),
        tl.where(is_zero, dt * h, dmu),
        tl.where(is_zero, dt * (t - h), dtheta),
        ddropout,
    )


@triton.jit
def forward_rows(
    x_ng, logit_ng, library_n, log_theta, dropout_ng, value_n, norm_n, total_n, n_genes, theta_stride,
    HAS_LIBRARY: tl.constexpr, HAS_DROPOUT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Value of a row, log of the sum of exp(logit), and the sum of the derivatives with respect to log mu."""
    i = tl.program_id(0).to(tl.int64)
    lane, row = tl.arange(0, BLOCK), i * n_genes
    shift, norm = 0.0, 0.0
    if HAS_LIBRARY:
        top = tl.full([BLOCK], -1e30, tl.float32)
        for first in range(0, n_genes, BLOCK):
            j = first + lane
            logit = tl.load(logit_ng + row + j, mask=j < n_genes, other=-1e30).to(tl.float32)
            top = tl.maximum(top, logit)
        highest = tl.max(top, 0)
        mass = tl.zeros([BLOCK], tl.float32)
        for first in range(0, n_genes, BLOCK):
            j = first + lane
            logit = tl.load(logit_ng + row + j, mask=j < n_genes, other=-1e30).to(tl.float32)
            mass += tl.exp(logit - highest)
        norm = highest + tl.log(tl.sum(mass, 0))
        shift = tl.load(library_n + i) - norm
    value, total = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for first in range(0, n_genes, BLOCK):
        j = first + lane
        here = j < n_genes
        logit = tl.load(logit_ng + row + j, mask=here, other=0.0).to(tl.float32)
        theta = tl.load(log_theta + i * theta_stride + j, mask=here, other=0.0).to(tl.float32)
        dropout = logit
        if HAS_DROPOUT:
            dropout = tl.load(dropout_ng + row + j, mask=here, other=0.0).to(tl.float32)
        x = tl.load(x_ng + row + j, mask=here, other=0.0)
        one, dmu, _, _ = score(x, logit + shift, theta, dropout, HAS_DROPOUT)
        value += tl.where(here, one, 0.0)
        total += tl.where(here, dmu, 0.0)
    tl.store(value_n + i, tl.sum(value, 0))
    tl.store(norm_n + i, norm)
    tl.store(total_n + i, tl.sum(total, 0))


@triton.jit(do_not_specialize=["n_cells", "rows"])  # so that a smaller minibatch needs no compiling
def backward_block(
    x_ng, logit_ng, library_n, log_theta, dropout_ng, norm_n, total_n, up_n, dlogit_ng, dtheta_cg, ddropout_ng,
    n_cells, n_genes, theta_stride, rows,
    HAS_LIBRARY: tl.constexpr, HAS_DROPOUT: tl.constexpr, PER_GENE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Derivatives for a block of genes in ``rows`` cells, weighted by what came back to each cell."""
    j, part = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1).to(tl.int64)
    here = j < n_genes
    sum_theta = tl.zeros([BLOCK], tl.float32)
    for i in range(part * rows, tl.minimum((part + 1) * rows, n_cells)):
        row = i * n_genes
        up = tl.load(up_n + i)
        shift, softmax_total = 0.0, 0.0
        logit = tl.load(logit_ng + row + j, mask=here, other=0.0).to(tl.float32)
        if HAS_LIBRARY:
            norm = tl.load(norm_n + i)
            shift = tl.load(library_n + i) - norm
            softmax_total = tl.exp(logit - norm) * tl.load(total_n + i)
        theta = tl.load(log_theta + i * theta_stride + j, mask=here, other=0.0).to(tl.float32)
        dropout = logit
        if HAS_DROPOUT:
            dropout = tl.load(dropout_ng + row + j, mask=here, other=0.0).to(tl.float32)
        x = tl.load(x_ng + row + j, mask=here, other=0.0)
        _, dmu, dtheta, ddropout = score(x, logit + shift, theta, dropout, HAS_DROPOUT)
        tl.store(dlogit_ng + row + j, up * (dmu - softmax_total), mask=here)
        if HAS_DROPOUT:
            tl.store(ddropout_ng + row + j, up * ddropout, mask=here)
        if PER_GENE:
            sum_theta += up * dtheta
        else:
            tl.store(dtheta_cg + row + j, up * dtheta, mask=here)
    if PER_GENE:
        tl.store(dtheta_cg + part * n_genes + j, sum_theta, mask=here)


def _options(library_n: Tensor | None, dropout_ng: Tensor | None) -> dict[str, bool]:
    return {"HAS_LIBRARY": library_n is not None, "HAS_DROPOUT": dropout_ng is not None}


def _stride(log_theta: Tensor, n_genes: int) -> int:
    """From the dispersions of a cell to those of the next."""
    return n_genes if log_theta.ndim == 2 else 0


def forward(
    x_ng: Tensor, logit_ng: Tensor, library_n: Tensor | None, log_theta: Tensor, dropout_ng: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Value (n,), and the two sums (n,) that :func:`backward` needs; all matrices contiguous."""
    n, g = x_ng.shape
    value_n, norm_n, total_n = (x_ng.new_empty(n) for _ in range(3))
    if n:
        outputs = value_n, norm_n, total_n, g, _stride(log_theta, g)
        with torch.cuda.device_of(x_ng):  # Triton launches on the current device
            forward_rows[(n,)](
                x_ng, logit_ng, library_n, log_theta, dropout_ng, *outputs, **_options(library_n, dropout_ng),
                BLOCK=BLOCK_FORWARD, num_warps=8,
            )  # fmt: skip
    return value_n, norm_n, total_n


def backward(
    x_ng: Tensor,
    logit_ng: Tensor,
    library_n: Tensor | None,
    log_theta: Tensor,
    dropout_ng: Tensor | None,
    norm_n: Tensor,
    total_n: Tensor,
    up_n: Tensor,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """Derivatives of the sum of values times ``up_n`` with respect to logit, library, log theta and dropout."""
    n, g = x_ng.shape
    per_gene = log_theta.ndim == 1
    rows = max(4, triton.cdiv(n, PROGRAMS))
    n_parts = triton.cdiv(n, rows)
    dlogit_ng = torch.empty_like(logit_ng)
    ddropout_ng = None if dropout_ng is None else torch.empty_like(dropout_ng)
    dtheta_cg = x_ng.new_empty(n_parts, g) if per_gene else torch.empty_like(log_theta)
    if n:
        outputs = dlogit_ng, dtheta_cg, ddropout_ng, n, g, _stride(log_theta, g), rows
        with torch.cuda.device_of(x_ng):
            backward_block[(triton.cdiv(g, BLOCK_BACKWARD), n_parts)](
                x_ng, logit_ng, library_n, log_theta, dropout_ng, norm_n, total_n, up_n, *outputs,
                **_options(library_n, dropout_ng), PER_GENE=per_gene, BLOCK=BLOCK_BACKWARD,
            )  # fmt: skip
    dlibrary_n = None if library_n is None else up_n * total_n
    return dlogit_ng, dlibrary_n, dtheta_cg.sum(0) if per_gene else dtheta_cg, ddropout_ng


def check(device: str) -> None:
    """Raise if the kernels do not do on a device what they should: against the reference formula in doubles."""
    x_ng = torch.tensor([[0.0, 1, 300], [7, 0, 0]], device=device)
    logit_ng = torch.tensor([[0.3, -1, 2], [1, 0, -2]], device=device)
    library_n, log_theta = torch.tensor([5.0, 2], device=device), torch.tensor([-1.0, 0.5, 3], device=device)
    inputs = [t.double().requires_grad_() for t in (logit_ng, library_n, log_theta, -logit_ng)]
    log_mu_ng = inputs[1][:, None] + inputs[0].log_softmax(1)
    expected_n = zinb_log_prob(x_ng.double(), log_mu_ng, *inputs[2:]).sum(1)
    expected = [expected_n, *torch.autograd.grad(expected_n.sum(), inputs)]
    given = x_ng, logit_ng, library_n, log_theta, -logit_ng
    value_n, norm_n, total_n = forward(*given)
    found = [value_n, *backward(*given, norm_n, total_n, torch.ones_like(value_n))]
    for number, (a, b) in enumerate(zip(found, expected)):
        if not torch.allclose(a.double(), b.detach(), rtol=1e-4, atol=1e-4):
            raise RuntimeError(f"output {number} of the likelihood comes out wrong.")
