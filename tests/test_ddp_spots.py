"""LinearSCVI, CondSCVI and DestVI on two real processes; what is kept for each spot learns as in one process."""

import json

import numpy as np
import pytest
from test_ddp import run_on_two_ranks

BODY = """
from scvi_lite.model import CondSCVI, DestVI, LinearSCVI

def summary(model):
    state = {k: v.double().flatten().tolist() for k, v in model.module.state_dict().items()}
    return dict(state=state, loss=model.history["train_loss"]["train_loss"].tolist())

adata.obs["fine"] = [f"{name}_{i % 2}" for i, name in enumerate(adata.obs["labels"])]
LinearSCVI.setup_anndata(adata, batch_key="batch")
linear = LinearSCVI(adata, n_hidden=8, n_latent=2)
linear.train(max_epochs=2, **options)
CondSCVI.setup_anndata(adata, labels_key="labels", fine_labels_key="fine")
cond = CondSCVI(adata, n_hidden=8, n_latent=2, prior="mog")
cond.train(max_epochs=2, **options)

np.random.seed(1)
spots = scvi_lite.data.synthetic_iid(batch_size=12, n_genes=12)
whole = dict(accelerator="cpu", enable_progress_bar=False, max_epochs=15, n_epochs_kl_warmup=5)
def make():
    torch.manual_seed(5)
    return DestVI.from_rna_model(spots, cond, amortization="none")
two = make()
two.train(batch_size=12, devices=2, strategy="ddp", **whole)
told = dict(linear=summary(linear), cond=summary(cond), two=summary(two))
if rank == 0:
    os.environ.pop("LOCAL_RANK", None)
    torch.distributed.destroy_process_group()
    one = make()
    one.train(batch_size=24, devices=1, **whole)
    told["one"] = summary(one)
tell(**told)
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_on_two_ranks(BODY, tmp_path_factory.mktemp("ddp"))


@pytest.mark.parametrize("model", ["linear", "cond", "two"])
def test_ranks_end_with_the_same_model(ranks, model):
    first, second = (rank[model] for rank in ranks)
    assert first == second, json.dumps([first["loss"], second["loss"]])
    assert np.isfinite(first["loss"]).all()


def test_each_spot_learns_as_on_one_device(ranks):
    """Each step sees all spots, half of them on each rank: the same steps as of one process that sees all."""
    one, two = ranks[0]["one"], ranks[0]["two"]
    np.testing.assert_allclose(one["loss"], two["loss"], rtol=1e-5)
    for name in ("proportions.table", "states.table", "beta_g", "log_theta"):
        np.testing.assert_allclose(one["state"][name], two["state"][name], rtol=1e-3, atol=1e-4, err_msg=name)
