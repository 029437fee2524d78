"""Tests of a difference between two populations, from draws of the expression in each.

``Vanilla`` asks which of the two is higher (Lopez et al. 2018, doi:10.1038/s41592-018-0229-2); ``Change`` asks whether
the effect is larger than delta (Boyeau et al., bioRxiv 794289, 2019; PNAS 120, 2023, doi:10.1073/pnas.2209124120).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from inspect import signature
from numbers import Real
from typing import Any

import numpy as np
import torch

from scvi_lite.analysis.by_gene import called, estimate_delta, log_odds, log_ratio, summary, turned
from scvi_lite.errors import check_choice, check_number

BLOCK = 1 << 19  # numbers of a block of genes: 2 MiB, which stay in the processor's cache
NO_PSEUDOCOUNT = 1e-10

Columns = dict[str, Any]


@dataclass(frozen=True)
class Draws:
    """Draws of the expression in one population."""

    value_sg: np.ndarray  #: (s, g)
    silent_g: np.ndarray  #: (g,) genes that are not expressed there


@dataclass(frozen=True)
class Pairs:
    """Which draws of one population are compared with which of the other, (pairs,) each; None for all in order."""

    first: np.ndarray | None = None
    second: np.ndarray | None = None

    @classmethod
    def make(cls, n: int, period: int, n_permuted: int | None = None, same_batches: bool = True) -> Pairs:
        """Pair ``n`` draws of each population.

        Parameters
        ----------
        n
            Draws of each.
        period
            Batches that the first population is decoded as, in turn: draw i as from batch i modulo ``period``.
        n_permuted
            Make so many random pairs, instead of using each draw once.
        same_batches
            Both populations are decoded as from the same batches: pairs stay within a batch.

        >>> pairs = Pairs.make(6, period=2, n_permuted=100)
        >>> bool((pairs.first % 2 == pairs.second % 2).all())
        True
        """
        if n_permuted is None:
            return cls() if same_batches else cls(None, torch.randperm(n).numpy())
        first, other = (torch.randint(n, (n_permuted,)).numpy() for _ in range(2))
        return cls(first, other - other % period + first % period if same_batches else other)

    def blocks(
        self, one: Draws, two: Draws, first: int = 0, last: int | None = None
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Paired draws of the genes ``first:last``, a few at a time, (pairs, genes) each."""
        n_draws, n_genes = one.value_sg.shape
        step = max(1, BLOCK // (n_draws if self.first is None else len(self.first)))
        last = n_genes if last is None else last
        for start in range(first, last, step):
            x1, x2 = (draws.value_sg[:, start : min(start + step, last)] for draws in (one, two))
            yield x1 if self.first is None else x1[self.first], x2 if self.second is None else x2[self.second]


@dataclass(frozen=True)
class Vanilla:
    """p(x1 > x2), and the log of its odds."""

    sort_by: str = "bayes_factor"

    def __call__(self, one: Draws, two: Draws, pairs: Pairs) -> Columns:
        """Columns of the result, (g,) each."""
        greater = [np.count_nonzero(x1 > x2, 0) / len(x1) for x1, x2 in pairs.blocks(one, two)]
        p_g = np.concatenate(greater)
        return {"proba_m1": p_g, "proba_m2": 1 - p_g, "bayes_factor": log_odds(p_g), **scales(one, two)}

    def decide(self, columns: Columns) -> Columns:
        """No genes are called: the odds of which is higher have no false discovery rate."""
        return {}


@dataclass(frozen=True)
class Change:
    """p(effect beyond delta), and how large the effect is.

    Parameters
    ----------
    delta
        Effects up to this do not count. None takes half the distance from 0 at which differential genes lie: the
        means of the outer two of three Gaussians that are fitted to the genes' mean effects.
    pseudocounts
        Added to both before the ratio is taken. None takes it from genes that are not expressed in a population: the
        90 % quantile of their largest draw, divided by the number of genes; the larger of the two populations'.
    effect
        Of two arrays and, where it takes three arguments, the pseudocounts; None is the log2 fold change.
    region
        Which effects count, instead of ``delta``.
    test_mode
        ``"three"``: the larger of p(effect > delta) and p(effect < -delta), so that a gene is up or down;
        ``"two"``: their sum.
    intervals
        Levels of credible intervals to report.
    fdr_targets
        Expected share of false discoveries among the genes that are called.
    """

    delta: float | None = 0.25
    pseudocounts: float | None = None
    effect: Callable[..., np.ndarray] | None = None
    region: Callable[[np.ndarray], np.ndarray] | None = None
    test_mode: str = "three"
    intervals: Sequence[float] = ()
    fdr_targets: Sequence[float] = (0.05,)
    sort_by: str = "proba_de"

    def __post_init__(self) -> None:
        check_choice(("two", "three"), test_mode=self.test_mode)
        check_number(True, delta=self.delta, pseudocounts=self.pseudocounts)

    def __call__(self, one: Draws, two: Draws, pairs: Pairs) -> Columns:
        """Columns of the result, (g,) each."""
        from scvi_lite._compiled import on_threads

        offset = estimate_pseudocounts(one, two) if self.pseudocounts is None else self.pseudocounts
        effect = self._effect_with(np.float32(offset))
        edges = [q for level in self.intervals for q in ((1 - level) / 2, (1 + level) / 2)]

        def describe(effect_gs: np.ndarray) -> Columns:
            known = {} if self.delta is None else {"p": self.probability(effect_gs, self.delta)}
            return known | summary(effect_gs, edges)

        def ask(question: Callable[[np.ndarray], Columns]) -> Columns:
            def share(first: int, last: int) -> list[Columns]:
                return [question(turned(effect(x1, x2))) for x1, x2 in pairs.blocks(one, two, first, last)]

            # NumPy's own functions may run in threads; those of a user might mind.
            ours, n_genes = self.effect is None and self.region is None, one.value_sg.shape[1]
            shares = on_threads(share, n_genes, one.value_sg.size) if ours else [share(0, n_genes)]
            parts = [part for share in shares for part in share]
            return {name: np.concatenate([part[name] for part in parts], axis=-1) for name in parts[0]}

        about, delta = ask(describe), self.delta
        if delta is None:  # known only once all genes have been seen
            delta = estimate_delta(about["lfc_mean"])
            about |= ask(lambda effect_gs: {"p": self.probability(effect_gs, delta)})
        p_g, quantiles = about.pop("p"), about.pop("quantiles", None)
        result = {"proba_de": p_g, "proba_not_de": 1 - p_g, "bayes_factor": log_odds(p_g), **scales(one, two)}
        result |= {"pseudocounts": np.float32(offset), "delta": float(delta), **about}
        for i, level in enumerate(self.intervals):
            result[f"lfc_confidence_interval_{level}_min"] = quantiles[2 * i]
            result[f"lfc_confidence_interval_{level}_max"] = quantiles[2 * i + 1]
        return result

    def _effect_with(self, pseudocounts: np.float32) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
        """The effect of two arrays; a function of three is given the pseudocounts too."""
        if self.effect is None:
            return partial(log_ratio, added=np.maximum(pseudocounts, np.float32(NO_PSEUDOCOUNT)))
        takes_three = not isinstance(self.effect, np.ufunc) and len(signature(self.effect).parameters) == 3
        return (lambda x1, x2: self.effect(x1, x2, pseudocounts)) if takes_three else self.effect

    def probability(self, effect_gs: np.ndarray, delta: float) -> np.ndarray:
        """Share of the draws that count as a change, (g,)."""
        if self.region is not None:
            return self.region(effect_gs).mean(1)
        n_draws = effect_gs.shape[1]
        up_g, down_g = (np.count_nonzero(far_gs, 1) / n_draws for far_gs in (effect_gs > delta, effect_gs < -delta))
        return np.maximum(up_g, down_g) if self.test_mode == "three" else up_g + down_g

    def decide(self, columns: Columns) -> Columns:
        """Which genes are called at each target."""
        return {f"is_de_fdr_{target}": called(columns["proba_de"], target) for target in self.fdr_targets}


def scales(one: Draws, two: Draws) -> Columns:
    """Mean of the draws of each population, (g,)."""
    return {f"scale{i}": torch.from_numpy(draws.value_sg).mean(0).numpy() for i, draws in ((1, one), (2, two))}


def estimate_pseudocounts(one: Draws, two: Draws) -> float:
    """What genes that are not expressed suggest, see :class:`Change`; next to nothing where all are expressed."""
    levels = [
        float(np.quantile(draws.value_sg.max(0)[draws.silent_g], 0.9)) / len(draws.silent_g)
        for draws in (one, two)
        if draws.silent_g.any()
    ]
    return max([NO_PSEUDOCOUNT, *levels])


def levels(argument: str, given: float | Sequence[float] | None) -> tuple[float, ...]:
    """One level or several as a tuple.

    Raises
    ------
    ValueError
        If they are not numbers between 0 and 1.

    >>> levels("fdr_target", 0.05), levels("cred_interval_lvls", None), levels("cred_interval_lvls", [0.5, 0.9])
    ((0.05,), (), (0.5, 0.9))
    """
    several = [] if given is None else np.atleast_1d(np.asarray(given, dtype=object)).tolist()
    if not all(isinstance(level, Real) and 0 < float(level) < 1 for level in several):
        raise ValueError(f"{argument}={given!r}: numbers between 0 and 1 are needed.")
    return tuple(map(float, several))


def make_test(mode: str, **options: Any) -> Vanilla | Change:
    """The test of a mode.

    Raises
    ------
    ValueError
        If the mode or the value of an option does not exist.
    """
    check_choice(("vanilla", "change"), mode=mode)
    change = Change(**options)
    return Vanilla() if mode == "vanilla" else change
