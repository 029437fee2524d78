"""Distributions of counts: classes for users, and log-likelihood functions for training.

``counts`` holds the formulas, ``fused`` what training calls, ``sparse`` the product of sparse counts and a weight. The
classes are imported when first asked for, as training does without them.
"""

from scvi_lite._lazy import lazy

_FILES = {
    "classes": ("NegativeBinomial", "Normal", "Poisson", "ZeroInflatedNegativeBinomial"),
    "mixture": ("NegativeBinomialMixture",),
    "zero_inflated": ("Log1pNormal", "ZeroInflatedGamma", "ZeroInflatedLogNormal"),
    "beta_binomial": ("BetaBinomial",),
}
__getattr__, __dir__ = lazy(
    __name__, {name: f"scvi_lite.distributions.{file}" for file, names in _FILES.items() for name in names}
)
