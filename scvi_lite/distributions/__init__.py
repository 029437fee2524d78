"""Distributions of counts: classes for users, and log-likelihood functions for training.

``counts`` holds the formulas, ``fused`` what training calls, ``sparse`` the product of sparse counts and a weight. The
classes are imported when first asked for, as training does without them.
"""

from scvi_lite._lazy import lazy

_CLASSES = ("NegativeBinomial", "Normal", "Poisson", "ZeroInflatedNegativeBinomial")
__getattr__, __dir__ = lazy(
    __name__,
    dict.fromkeys(_CLASSES, "scvi_lite.distributions.classes")
    | {"NegativeBinomialMixture": "scvi_lite.distributions.mixture"},
)
