"""Counts simulated with known cell types, batch effects, library sizes and differential genes.

Cells are negative binomial around rates that multiply, as in Splatter (Zappia et al., Genome Biology 18, 174, 2017).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import scipy.sparse as sp

if TYPE_CHECKING:
    from anndata import AnnData

CELLS_PER_CHUNK = 4096


def numbered(stem: str, n: int) -> np.ndarray:
    """Names of ``n`` things.

    >>> numbered("gene", 2).tolist()
    ['gene_0', 'gene_1']
    """
    return np.array([f"{stem}_{i}" for i in range(n)], dtype=object)


def simulate(
    n_cells: int = 2000,
    n_genes: int = 500,
    n_types: int = 4,
    n_batches: int = 2,
    *,
    differential_share: float = 0.2,
    lfc_range: tuple[float, float] = (1.0, 3.0),
    batch_effect: float = 0.3,
    depth: float = 2000.0,
    depth_spread: float = 0.4,
    dispersion: float = 5.0,
    dispersion_spread: float = 0.5,
    dropout: float = 0.0,
    composition_bt: np.ndarray | None = None,
    seed: int = 0,
) -> AnnData:
    r"""Simulate counts with known cell types, batch effects, library sizes and differential genes.

    With a baseline :math:`\pi_g` (log-normal, sums to 1), cell n of type t and batch b has

    .. math::
        x_{ng} \sim \mathrm{NB}(\mathrm{mean} = \ell_n \rho_{ng}, \theta_g), \qquad
        \rho_{ng} \propto \pi_g\, 2^{\mathrm{lfc}_{gt}} e^{\beta_{gb}},

    and is set to 0 with probability ``dropout``. In each type a share of the genes is differential: the weaker half
    of them up, the stronger half down, all shifted by one constant so that the proportions of the type sum to 1.
    Every other gene has a fold change of exactly 0, also after normalisation by the total.

    Parameters
    ----------
    n_cells, n_genes, n_types, n_batches
        Sizes; at least 2 differential genes are made in each type.
    differential_share
        Share of the genes that differ from the baseline, in each type on its own; the rest are null.
    lfc_range
        Range of the absolute log2 fold changes, before the shift.
    batch_effect
        Standard deviation of :math:`\beta_{gb}`, which averages to 0 over the batches.
    depth, depth_spread
        Median of the library size :math:`\ell_n` in counts, and standard deviation of its logarithm.
    dispersion, dispersion_spread
        Median of the inverse dispersion :math:`\theta_g`, and standard deviation of its logarithm.
    dropout
        Probability that a count is lost; above 0 the noise is zero-inflated.
    composition_bt
        (b, t) shares of the types in each batch, which default to equal ones.
    seed
        The same seed gives the same data.

    Returns
    -------
    AnnData
        ``X``: (n, g) counts, float32 CSR. The truth: ``obs`` has ``cell_type``, ``batch`` and ``library``; ``var``
        has ``baseline`` and ``theta``; ``varm`` has data frames with one column per type, ``scale`` (expected
        proportions without batch effect), ``lfc`` (log2 fold change over the baseline) and ``differential``
        (lfc is not 0), and ``batch_effect`` (:math:`\beta`, one column per batch); ``uns["simulation"]`` has the
        arguments. The expected counts of a cell without batch effect are ``library * scale[cell_type]``.

    Raises
    ------
    ValueError
        For sizes below 1, fewer than 2 genes, shares outside of [0, 1], or a composition of another shape.

    Examples
    --------
    >>> adata = simulate(n_cells=300, n_genes=50, n_types=3)
    >>> adata.varm["differential"].sum().tolist()
    [10, 10, 10]
    >>> adata.varm["scale"].sum().round(6).tolist()
    [1.0, 1.0, 1.0]
    """
    from anndata import AnnData

    if min(n_cells, n_types, n_batches) < 1 or n_genes < 2:
        raise ValueError("simulate needs n_cells, n_types and n_batches of at least 1, and n_genes of at least 2.")
    for name, share in {"differential_share": differential_share, "dropout": dropout}.items():
        if not 0 <= share <= 1:
            raise ValueError(f"{name}={share} is not a share: give a number from 0 to 1.")
    rng = np.random.default_rng(seed)
    types, batches = numbered("type", n_types), numbered("batch", n_batches)

    baseline_g = _normalised(rng.lognormal(0.0, 1.0, n_genes))
    lfc_gt = _fold_changes(rng, baseline_g, n_types, differential_share, lfc_range)
    scale_gt = _normalised(baseline_g[:, None] * 2.0**lfc_gt)
    beta_gb = rng.normal(0.0, batch_effect, (n_genes, n_batches))
    beta_gb -= beta_gb.mean(1, keepdims=True)
    theta_g = dispersion * rng.lognormal(0.0, dispersion_spread, n_genes)

    batch_n = rng.integers(n_batches, size=n_cells)
    type_n = _draw_types(rng, batch_n, composition_bt, n_types, n_batches)
    library_n = depth * rng.lognormal(0.0, depth_spread, n_cells)
    rate_gc = _normalised(scale_gt[:, None, :] * np.exp(beta_gb)[:, :, None]).reshape(n_genes, -1)
    kind_n = batch_n * n_types + type_n  # the cells of one batch and one type share their proportions
    counts = [
        _draw_counts(rng, library_n[rows, None] * rate_gc.T[kind_n[rows]], theta_g, dropout)
        for rows in np.split(np.arange(n_cells), range(CELLS_PER_CHUNK, n_cells, CELLS_PER_CHUNK))
    ]

    obs = pd.DataFrame(
        {
            "cell_type": pd.Categorical(types[type_n], categories=types),
            "batch": pd.Categorical(batches[batch_n], categories=batches),
            "library": library_n,
        },
        index=numbered("cell", n_cells),
    )
    genes = numbered("gene", n_genes)
    var = pd.DataFrame({"baseline": baseline_g, "theta": theta_g}, index=genes)
    adata = AnnData(sp.vstack(counts, format="csr"), obs=obs, var=var)
    for key, value in {"scale": scale_gt, "lfc": lfc_gt, "differential": lfc_gt != 0}.items():
        adata.varm[key] = pd.DataFrame(value, index=genes, columns=types)
    adata.varm["batch_effect"] = pd.DataFrame(beta_gb, index=genes, columns=batches)
    adata.uns["simulation"] = {
        "differential_share": differential_share, "lfc_range": list(lfc_range), "batch_effect": batch_effect,
        "depth": depth, "depth_spread": depth_spread, "dispersion": dispersion,
        "dispersion_spread": dispersion_spread, "dropout": dropout, "seed": seed,
    }  # fmt: skip
    return adata


def _normalised(rate_g: np.ndarray) -> np.ndarray:
    """Proportions: divided by the sum over genes, the first dimension."""
    return rate_g / rate_g.sum(0)


def _fold_changes(
    rng: np.random.Generator, baseline_g: np.ndarray, n_types: int, share: float, lfc_range: tuple[float, float]
) -> np.ndarray:
    """Draw (g, t) log2 fold changes that leave the sum of each type's proportions at 1."""
    n_genes = len(baseline_g)
    n_differential = max(2, round(share * n_genes)) if share > 0 else 0
    # A random choice of genes per type, in the order of their baseline: the first half goes up, the second down.
    chosen_dt = rng.random((n_genes, n_types)).argsort(0)[:n_differential]
    chosen_dt = np.take_along_axis(chosen_dt, baseline_g[chosen_dt].argsort(0), 0)
    sign_d = np.where(np.arange(n_differential) < n_differential / 2, 1.0, -1.0)
    lfc_dt = sign_d[:, None] * rng.uniform(*lfc_range, chosen_dt.shape)
    mass_dt = baseline_g[chosen_dt]
    if n_differential:
        lfc_dt += np.log2(mass_dt.sum(0) / (mass_dt * 2.0**lfc_dt).sum(0))
    lfc_gt = np.zeros((n_genes, n_types))
    np.put_along_axis(lfc_gt, chosen_dt, lfc_dt, 0)
    return lfc_gt


def _draw_types(
    rng: np.random.Generator, batch_n: np.ndarray, composition_bt: np.ndarray | None, n_types: int, n_batches: int
) -> np.ndarray:
    """Draw (n,) codes of cell types, each from the composition of the cell's batch."""
    share_bt = np.ones((n_batches, n_types)) if composition_bt is None else np.asarray(composition_bt, dtype=float)
    if share_bt.shape != (n_batches, n_types) or (share_bt < 0).any() or (share_bt.sum(1) <= 0).any():
        raise ValueError(
            f"composition_bt must hold shares of {n_batches} batches by {n_types} types, found shape {share_bt.shape}."
        )
    cumulative_bt = np.cumsum(share_bt / share_bt.sum(1, keepdims=True), axis=1)
    return (rng.random((len(batch_n), 1)) > cumulative_bt[batch_n, :-1]).sum(1)


def _draw_counts(rng: np.random.Generator, mu_ng: np.ndarray, theta_g: np.ndarray, dropout: float) -> sp.csr_matrix:
    """Draw negative binomial counts as a Gamma mixture of Poisson ones, and lose a share of them."""
    x_ng = rng.poisson(rng.gamma(theta_g, mu_ng / theta_g))
    if dropout > 0:
        x_ng *= rng.random(x_ng.shape) >= dropout
    return sp.csr_matrix(x_ng, dtype=np.float32)
