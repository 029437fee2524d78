"""The models."""

from scvi_lite._lazy import lazy

__getattr__, __dir__ = lazy(__name__, {"SCVI": "scvi_lite.model.scvi", "Model": "scvi_lite.model.base"})

__all__ = ["SCVI", "Model"]
