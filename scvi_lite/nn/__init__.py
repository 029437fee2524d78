"""Neural networks: layers, what several models share, and the modules of some."""

from scvi_lite._lazy import lazy

__getattr__, __dir__ = lazy(__name__, {})
