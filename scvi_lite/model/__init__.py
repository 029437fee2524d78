"""The models."""

from scvi_lite._lazy import lazy

FILES = {
    "SCVI": "scvi",
    "LinearSCVI": "linear_scvi",
    "CondSCVI": "condscvi",
    "DestVI": "destvi",
    "PEAKVI": "peakvi",
    "MULTIVI": "multivi",
    "SCANVI": "scanvi",
    "TOTALVI": "totalvi",
    "Model": "base",
}

__getattr__, __dir__ = lazy(__name__, {name: f"scvi_lite.model.{file}" for name, file in FILES.items()})

__all__ = [*FILES]
