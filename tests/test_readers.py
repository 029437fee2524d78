"""Folders of 10x Genomics, and proteins and reads brought to where models read them."""

import gzip

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.io
import scipy.sparse as sp

from scvi_lite import TOTALVI, data

X_NG = np.array([[1, 0], [0, 3], [2, 5]])


def write_folder(folder, barcodes, compress=False, **files):
    scipy.io.mmwrite(folder / "matrix.mtx", sp.coo_matrix(X_NG.T))
    (folder / "barcodes.tsv").write_text("\n".join(barcodes) + "\n")
    for name, text in files.items():
        (folder / name.replace("_", ".")).write_text(text)
    if compress:
        for file in list(folder.iterdir()):
            (folder / f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes()))
            file.unlink()


def test_peaks(tmp_path):
    write_folder(tmp_path, ["A-1", "C-1", "G-2"], peaks_bed="# from a pipeline\nchr1\t1\t50\nchr2\t7\t90\n")
    adata = data.read_10x_atac(tmp_path)
    assert isinstance(adata.X, sp.csr_matrix)
    np.testing.assert_array_equal(adata.X.toarray(), X_NG)
    assert adata.obs_names.tolist() == ["A", "C", "G"]
    assert adata.obs["batch_id"].tolist() == [1, 1, 2]
    assert adata.var_names.tolist() == ["chr1:1-50", "chr2:7-90"]
    assert adata.var["end"].tolist() == [50, 90]


@pytest.mark.parametrize("compress", [False, True])
def test_genes_and_peaks(tmp_path, compress):
    features = "ENSG1\tG1\tGene Expression\tchr1\t5\t9\nchr2:7-90\tchr2:7-90\tPeaks\tchr2\t7\t90\n"
    write_folder(tmp_path, ["A-1", "A-2", "G-1"], compress, features_tsv=features)
    adata = data.read_10x_multiome(str(tmp_path))
    np.testing.assert_array_equal(adata.X.toarray(), X_NG)
    assert adata.obs_names.tolist() == ["A-1", "A-2", "G-1"]  # of two wells
    assert adata.var_names.tolist() == ["G1", "chr2:7-90"]
    assert adata.var["modality"].tolist() == ["Gene Expression", "Peaks"]
    assert adata.var["start"].tolist() == [5, 7]


def test_a_folder_without_a_file(tmp_path):
    write_folder(tmp_path, ["A", "C", "G"])
    with pytest.raises(FileNotFoundError, match=r"has no peaks.bed and no peaks.bed.gz"):
        data.read_10x_atac(tmp_path)


@pytest.mark.parametrize("copy", [False, True])
def test_proteins_among_the_genes(copy):
    kinds = ["Gene Expression", "Antibody Capture"] * 2
    var = pd.DataFrame({"feature_types": kinds}, index=list("abcd"))
    counts = np.arange(1.0, 13.0).reshape(3, 4)
    adata = anndata.AnnData(sp.csr_matrix(counts), var=var)
    moved = data.organize_cite_seq_10x(adata, copy=copy)
    assert (moved is None) != copy
    assert adata.n_vars == (4 if copy else 2)
    moved = moved if copy else adata
    np.testing.assert_array_equal(moved.X.toarray(), counts[:, [0, 2]])
    assert moved.obsm["protein_expression"].columns.tolist() == ["b", "d"]
    np.testing.assert_array_equal(moved.obsm["protein_expression"], counts[:, [1, 3]])
    TOTALVI.setup_anndata(moved, "protein_expression")
    with pytest.raises(ValueError, match="nothing tells genes from proteins"):
        data.organize_cite_seq_10x(data.synthetic_iid(batch_size=3, n_genes=4))


@pytest.mark.parametrize("sparse_format", ["csr_matrix", None])
def test_reads_are_two_to_a_fragment(sparse_format):
    adata = data.synthetic_iid(batch_size=5, n_genes=4, sparse_format=sparse_format)
    adata.layers["reads"] = adata.X
    data.reads_to_fragments(adata, read_layer="reads", fragment_layer="ends")
    reads, fragments = (m.toarray() if sparse_format else m for m in (adata.X, adata.layers["ends"]))
    np.testing.assert_array_equal(fragments, (reads + reads % 2) / 2)
    with pytest.raises(KeyError, match="Did you mean 'reads'"):
        data.reads_to_fragments(adata, read_layer="read")


def test_readers_of_anndata():
    assert data.read_csv is anndata.io.read_csv
    assert data.read_loom is anndata.io.read_loom
    assert data.read_text is anndata.io.read_text
