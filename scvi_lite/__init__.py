"""scvi_lite: deep generative models of single-cell data.

Everything is imported when it is first used, so ``import scvi_lite`` costs next to nothing.

>>> import scvi_lite
>>> adata = scvi_lite.data.synthetic_iid(n_genes=20)
>>> scvi_lite.model.SCVI.setup_anndata(adata, batch_key="batch")
"""

from scvi_lite._lazy import lazy
from scvi_lite._settings import settings

__version__ = "0.1.0"

MODELS = ("SCVI", "LinearSCVI", "CondSCVI", "DestVI", "PEAKVI", "MULTIVI", "SCANVI", "TOTALVI")

__getattr__, __dir__ = lazy(
    __name__,
    {name: f"scvi_lite.{name}" for name in ("criticism", "data", "distributions", "model", "plot", "train", "utils")}
    | dict.fromkeys(MODELS, "scvi_lite.model")
    | {"REGISTRY_KEYS": "scvi_lite.data.view"},
)

__all__ = [
    "MODELS",
    "REGISTRY_KEYS",
    "__version__",
    "criticism",
    "data",
    "distributions",
    "model",
    "plot",
    "settings",
    "train",
    "utils",
    *MODELS,
]
