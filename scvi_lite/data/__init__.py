"""From an AnnData to minibatches; real data that need no download, and simulators."""

from scvi_lite._lazy import lazy

PLACES = {
    "scvi_lite.data.batch": ("Batch", "Counts"),
    "scvi_lite.data.store": ("CellStore",),
    "scvi_lite.data.registry": ("Registry",),
    "scvi_lite.data.datasets": ("pbmc68k_reduced", "synthetic_iid"),
    "scvi_lite.data.simulator": ("simulate",),
    "scvi_lite.data.selection": ("poisson_gene_selection",),
    "scvi_lite.data.multiome": ("organize_multiome_anndatas",),
    "scvi_lite.data.readers": ("organize_cite_seq_10x", "read_10x_atac", "read_10x_multiome", "reads_to_fragments"),
    "anndata.io": ("read_csv", "read_loom", "read_text"),
    "anndata": ("read_h5ad",),
}
PLACE_OF = {name: place for place, names in PLACES.items() for name in names}

__getattr__, __dir__ = lazy(__name__, PLACE_OF)

__all__ = [*PLACE_OF]
