"""What users write by habit or by mistake: it works, or an error names the argument and what was found."""

import numpy as np
import pytest

import scvi_lite
from scvi_lite.model import SCVI

QUIET = dict(max_epochs=1, enable_progress_bar=False)


@pytest.fixture(scope="module")
def model():
    adata = scvi_lite.data.synthetic_iid(batch_size=20, n_genes=10)
    SCVI.setup_anndata(adata, batch_key="batch")
    model = SCVI(adata, n_latent=2, n_hidden=8)
    model.train(**QUIET)
    return model


@pytest.mark.parametrize("given", [0, -1, 1.5, "128", True])
def test_a_wrong_batch_size_of_an_answer(model, given):
    with pytest.raises(ValueError, match="batch_size=.*whole number"):
        model.get_latent_representation(batch_size=given)


def test_integers_of_numpy(model):
    expected = model.get_latent_representation()
    assert np.allclose(model.get_latent_representation(batch_size=np.int64(7)), expected, atol=1e-6)
    assert model.get_normalized_expression(batch_size=np.int32(7), n_samples=np.int64(2)).shape == (40, 10)
    other = SCVI(model.adata, n_latent=np.int64(2), n_hidden=8)
    other.train(max_epochs=np.int64(2), batch_size=np.int32(8), enable_progress_bar=False)
    assert len(other.history["elbo_train"]) == 2


def test_an_empty_list_of_batches(model):
    with pytest.raises(ValueError, match="transform_batch is empty.*Batches"):
        model.get_normalized_expression(transform_batch=[])
    with pytest.raises(ValueError, match="batchid2 is empty"):
        model.differential_expression(groupby="labels", batch_correction=True, batchid2=[])
    with pytest.raises(ValueError, match="batchid1='nope' is not a batch"):
        model.differential_expression(groupby="labels", batch_correction=True, batchid1=["nope"])


def test_a_mask_of_genes(model):
    with pytest.raises(ValueError, match=r"gene_list is a mask.*var_names\[mask\]"):
        model.get_normalized_expression(gene_list=model.adata.var_names == "gene_1")


def test_no_library_size(model):
    with pytest.raises(ValueError, match="library_size=None: a positive number"):
        model.get_normalized_expression(library_size=None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"early_stopping": "yes"}, "early_stopping='yes': True or False"),
        ({"check_val_every_n_epoch": 0}, "check_val_every_n_epoch=0: a whole number"),
        ({"check_val_every_n_epoch": -1}, "check_val_every_n_epoch=-1: a whole number"),
        ({"callbacks": 3}, "callbacks=3: an object of lightning.pytorch.callbacks"),
        ({"logger": "wandb"}, "logger='wandb': an object of lightning.pytorch.loggers"),
        ({"plan_kwargs": {"lr": "fast"}}, "lr='fast': a number of zero or more"),
    ],
)
def test_options_of_a_wrong_kind(model, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        model.train(**QUIET | options)
