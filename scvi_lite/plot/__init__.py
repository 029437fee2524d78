"""Pictures in one call: training curves, UMAP of a latent space, volcano of differential expression, loadings."""

from scvi_lite.plot.curves import training_curves
from scvi_lite.plot.embedding import umap
from scvi_lite.plot.genes import loadings, volcano

__all__ = ["loadings", "training_curves", "umap", "volcano"]
