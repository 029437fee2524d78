"""From an AnnData to minibatches; real data that need no download, and simulators."""

from scvi_lite._lazy import lazy

__getattr__, __dir__ = lazy(
    __name__,
    {
        "Batch": "scvi_lite.data.batch",
        "Counts": "scvi_lite.data.batch",
        "CellStore": "scvi_lite.data.store",
        "Registry": "scvi_lite.data.registry",
        "pbmc68k_reduced": "scvi_lite.data.datasets",
        "synthetic_iid": "scvi_lite.data.datasets",
        "organize_multiome_anndatas": "scvi_lite.data.multiome",
        "poisson_gene_selection": "scvi_lite.data.selection",
        **dict.fromkeys(
            ("organize_cite_seq_10x", "read_10x_atac", "read_10x_multiome", "reads_to_fragments"),
            "scvi_lite.data.readers",
        ),
        **dict.fromkeys(("read_csv", "read_loom", "read_text"), "anndata.io"),
        "read_h5ad": "anndata",
        "simulate": "scvi_lite.data.simulator",
    },
)

__all__ = [
    "Batch",
    "CellStore",
    "Counts",
    "Registry",
    "organize_cite_seq_10x",
    "organize_multiome_anndatas",
    "pbmc68k_reduced",
    "poisson_gene_selection",
    "read_10x_atac",
    "read_10x_multiome",
    "read_csv",
    "read_h5ad",
    "read_loom",
    "read_text",
    "reads_to_fragments",
    "simulate",
    "synthetic_iid",
]
