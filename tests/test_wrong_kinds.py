"""What is of the wrong kind, absent here, or in another form than usual: it works, or the error names the cure."""

import copy
import json
import pickle
import warnings

import numpy as np
import pytest
import torch

import scvi_lite
from scvi_lite.model import SCVI
from scvi_lite.train.plan import Plan, make_plan

QUIET = dict(max_epochs=1, accelerator="cpu", enable_progress_bar=False)


def make_data():
    return scvi_lite.data.synthetic_iid(batch_size=20, n_genes=10, n_proteins=0, n_regions=0, seed=0)


def make_model(**options):
    adata = make_data()
    SCVI.setup_anndata(adata, batch_key="batch")
    return SCVI(adata, **{"n_latent": 2, "n_hidden": 8} | options)


@pytest.fixture(scope="module")
def model():
    model = make_model()
    model.train(**QUIET)
    return model


CHANGE = dict(groupby="labels", group1="label_0", mode="change", silent=True, n_samples_overall=20)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"delta": "a"}, "delta='a': a number"),
        ({"pseudocounts": [1]}, r"pseudocounts=\[1\]: a number"),
        ({"fdr_target": "a"}, "fdr_target='a': numbers between 0 and 1"),
        ({"cred_interval_lvls": ["a"]}, r"cred_interval_lvls=\['a'\]: numbers between"),
        ({"cred_interval_lvls": 95}, "cred_interval_lvls=95: numbers between"),
        ({"weights": "importance", "importance_weighting_kwargs": 3}, "importance_weighting_kwargs=3: a dictionary"),
        ({"groupby": None, "group1": None, "idx1": [True] * 3}, "idx1: a mask of 3 cells was given for 40"),
    ],
)
def test_options_of_differential_expression(model, options, message):
    with pytest.raises((TypeError, ValueError, IndexError), match=message):
        model.differential_expression(**CHANGE | options)


def test_one_credible_level(model):
    table = model.differential_expression(**CHANGE, cred_interval_lvls=0.9)
    low, high = (table[f"lfc_confidence_interval_0.9_{end}"] for end in ("min", "max"))
    assert (low <= table["lfc_median"]).all() and (table["lfc_median"] <= high).all()


def test_ties_are_ordered_by_the_size_of_the_change(model):
    table = model.differential_expression(**CHANGE, delta=0.0, pseudocounts=0.0)
    key = list(zip(-table["proba_de"], -table["lfc_mean"].abs(), strict=True))
    assert key == sorted(key) and table["proba_de"].duplicated().any()


@pytest.mark.parametrize("dof", ["a", 0, -1.0])
def test_degrees_of_freedom(model, dof):
    with pytest.raises(ValueError, match=f"dof={dof!r}: a positive number"):
        model.get_aggregated_posterior(dof=dof)
    with pytest.raises(ValueError, match=f"dof={dof!r}: a positive number"):
        model.differential_abundance(sample_key="batch", dof=dof)


@pytest.mark.parametrize("path", [b"model", None, 3])
def test_paths(model, path):
    with pytest.raises(TypeError, match="dir_path=.*the name of a folder"):
        model.save(path)
    with pytest.raises(TypeError, match="dir_path=.*the name of a folder"):
        SCVI.load(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"plan_kwargs": "lr"}, "plan_kwargs='lr': a dictionary"),
        ({"datasplitter_kwargs": ["drop_last"]}, r"datasplitter_kwargs=\['drop_last'\]: a dictionary"),
        ({"shuffle_set_split": "no"}, "shuffle_set_split='no': True or False"),
        ({"plan_kwargs": {"update_only_decoder": True}}, r"has no option 'update_only_decoder': freeze"),
        ({"plan_kwargs": {"cuda_graph": "yes"}}, "cuda_graph='yes': True or False"),
        ({"plan_kwargs": {"eps": "a"}}, "eps='a': a positive number"),
        ({"plan_kwargs": {"n_epochs_kl_warmup": "a"}}, "n_epochs_kl_warmup='a': a number"),
        ({"plan_kwargs": {"optimizer": np.ones(2)}}, "optimizer=array"),
        ({"plan_config": 3}, "plan_config=3: a dictionary"),
        ({"plan_config": {"learn_rate": 1}}, "plan_kwargs has no option 'learn_rate'"),
        ({"trainer_config": {"precison": 64}}, "Did you mean 'precision'"),
    ],
)
def test_options_of_train(model, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        model.train(**QUIET | options)


@pytest.mark.filterwarnings("ignore:.*not trained")
def test_batch_embedding_options():
    with pytest.raises(TypeError, match="batch_embedding_kwargs='5': a dictionary"):
        make_model(batch_representation="embedding", batch_embedding_kwargs="5")
    with pytest.raises(TypeError, match="has no option 'batch_embeding'") as error:
        make_model(batch_embeding=3)
    assert "batch_embedding_dim" not in str(error.value)
    model = make_model(batch_representation="embedding", batch_embedding_kwargs={"embedding_dim": np.int64(3)})
    assert model.get_batch_representation().shape == (40, 3)


def test_cells_by_slice_and_by_name(model):
    z = model.get_latent_representation()
    names = model.adata.obs_names
    np.testing.assert_allclose(model.get_latent_representation(indices=slice(4, None, -2)), z[4::-2], atol=1e-6)
    np.testing.assert_allclose(model.get_latent_representation(indices=names[[7, 3]]), z[[7, 3]], atol=1e-6)
    np.testing.assert_allclose(model.get_latent_representation(indices=list(names[:2])), z[:2], atol=1e-6)
    with pytest.raises(KeyError, match="indices='cell' is not a name of a cell"):
        model.get_latent_representation(indices=["cell"])
    for wrong, cure in (
        (3, r"of shape \(\) was given. Write indices=\[3\]"),
        (np.int32(3), r"Write indices=\[3\]"),
        (names[0], rf"Write indices=\['{names[0]}'\]"),
        (np.where(np.arange(40) > 3), r"Write indices=np.where\(...\)\[0\]"),
        ([0, 40], "row 40 does not exist: adata has 40 cells"),
        ([0, -41], "row -41 does not exist"),
    ):
        with pytest.raises(IndexError, match=cure):
            model.get_latent_representation(indices=wrong)


def test_keys_are_refused_before_counts_are_read():
    adata = make_data()
    adata.X = adata.X + 0.5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(KeyError, match="batch_key='bach'"):
            SCVI.setup_anndata(adata, batch_key="bach")


def test_numbers_of_numpy_read_as_plain_ones():
    assert "n_latent=2," in repr(make_model(n_latent=np.int64(2), dropout_rate=np.float64(0.1)))
    assert "np." not in repr(make_model(n_latent=np.int64(2), dropout_rate=np.float64(0.1)))


def test_weights_that_are_nan_are_loaded_with_a_warning(model, tmp_path):
    broken = make_model()
    broken.is_trained = True
    with torch.no_grad():
        next(broken.module.parameters()).fill_(torch.nan)
    broken.save(tmp_path / "model", save_anndata=True)
    with pytest.warns(UserWarning, match="weights are NaN or infinite in"):
        SCVI.load(tmp_path / "model")


@pytest.mark.parametrize("field", ["batch_n", "cats_nc", "x"])
def test_a_setup_without_a_field(model, tmp_path, field):
    model.save(tmp_path / "model", save_anndata=True)
    file = tmp_path / "model" / "model.json"
    info = json.loads(file.read_text())
    del info["registry"]["fields"][field]
    file.write_text(json.dumps(info))
    with pytest.raises(ValueError, match=f"has no field '{field}'"):
        SCVI.load(tmp_path / "model")


@pytest.mark.filterwarnings("ignore:.*not trained")
@pytest.mark.parametrize(
    "act",
    [
        lambda: make_model().get_latent_representation(),
        lambda: setattr(scvi_lite.settings, "dl_num_workers", 3),
        lambda: make_model().train(num_workers=2, **QUIET),
        lambda: make_model().train(plan_kwargs={"on_step": True}, **QUIET),
        lambda: make_model().get_elbo(make_data()[:, ::-1].copy()),
    ],
)
def test_warnings_point_to_the_line_of_the_user(act):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        act()
    assert caught and {w.filename for w in caught if w.category is UserWarning} == {__file__}


def test_fractions_are_warned_of_at_the_line_of_the_user():
    adata = make_data()
    adata.X = adata.X + 0.5
    with pytest.warns(UserWarning) as caught:
        SCVI.setup_anndata(adata)
    assert [w.filename for w in caught] == [__file__]


def test_options_without_a_use_may_be_empty(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = make_model(registry=None, extra_encoder_kwargs={}, library_log_means=None)
        model.train(plan_config=None, trainer_config=None, datamodule=None, load_sparse_tensor=False, **QUIET)
        model.save(tmp_path / "model", save_kwargs={}, datamodule=None, legacy_mudata_format=False, save_anndata=True)
        loaded = SCVI.load(tmp_path / "model", backup_url=None, datamodule=None, allowed_classes_names_list=None)
    assert loaded.registry["setup_args"]["batch_key"] == "batch"
    with pytest.warns(UserWarning, match="backup_url has no effect: models are not downloaded"):
        SCVI.load(tmp_path / "model", backup_url="https://example.org")
    with pytest.warns(UserWarning, match="legacy_mudata_format has no effect: there is one format"):
        model.save(tmp_path / "model", legacy_mudata_format=True, overwrite=True)
    with pytest.raises(TypeError, match="load\\(\\) has no option 'dir'"):
        SCVI.load(tmp_path / "model", dir=3)
    with pytest.raises(TypeError, match="SCVI has no option 'registry': a model is made with an AnnData"):
        make_model(registry={"a": 1})
    with pytest.raises(KeyError, match="registry='setup' is not a part of a registry"):
        model.registry["setup"]
    with pytest.raises(KeyError, match="see model.adata_manager.registry"):
        model.registry["field_registries"]
    assert dict(model.registry)["model_name"] == "SCVI" and "setup" not in model.registry


def test_plan_options_of_metrics_say_that_they_have_no_effect():
    with pytest.warns(UserWarning, match="on_epoch has no effect"):
        assert make_plan(Plan(), {"on_epoch": True, "on_step": False, "update_only_decoder": False}) == Plan()


@pytest.mark.parametrize(
    ("place", "name", "cure"),
    [
        ("", "hub", "a folder of plain files"),
        ("criticism", "create_criticism_report", "PosteriorPredictiveCheck"),
        ("data", "AnnDataManager", "model.registry"),
        ("model", "get_max_epochs_heuristic", "20000"),
        ("settings", "reset_logging_handler", "logging.getLogger"),
        ("nn", "FCLayers", "Hidden"),
        ("train", "ScibCallback", "scib-metrics"),
        ("train", "AdversarialTrainingPlanConfig", "plan_kwargs"),
        ("train", "Trainer", "lightning.Trainer"),
    ],
)
def test_names_that_are_elsewhere(place, name, cure):
    with pytest.raises(AttributeError, match=f"no '{name}', which scvi-tools has: .*{cure}"):
        getattr(getattr(scvi_lite, place) if place else scvi_lite, name)


@pytest.mark.parametrize(
    ("model_class", "name", "cure"),
    [
        ("PEAKVI", "get_normalized_expression", "get_normalized_accessibility"),
        ("DestVI", "get_normalized_expression", "get_scale_for_ct"),
        ("SCANVI", "shap_predict", "ig_interpretability"),
    ],
)
def test_questions_that_a_model_does_not_answer(model_class, name, cure):
    with pytest.raises(AttributeError, match=f"no '{name}', which scvi-tools has: .*{cure}"):
        getattr(getattr(scvi_lite, model_class), name)


def test_names_of_numbers_and_settings_that_nobody_knows(model):
    assert model.summary_stats.n_batch == model.summary_stats["n_batch"]
    with pytest.raises(AttributeError, match="Did you mean 'n_batch'"):
        model.summary_stats.n_batches  # noqa: B018
    with pytest.raises(AttributeError, match="Did you mean 'history'"):
        model.histories  # noqa: B018
    with pytest.raises(AttributeError, match="Did you mean 'batch_size'"):
        scvi_lite.settings.batch  # noqa: B018
    with pytest.raises(AttributeError, match="no 'dl_num_workers': cells are gathered"):
        scvi_lite.settings.dl_num_workers  # noqa: B018


def test_what_is_no_folder_and_what_is_no_data(model, tmp_path):
    model.save(tmp_path / "model")
    with pytest.raises(TypeError, match="adata is a bool.*load_query_data"):
        SCVI.load(tmp_path / "model", adata=False)
    (tmp_path / "best.ckpt").touch()
    with pytest.raises(ValueError, match="best.ckpt' is damaged, or not a checkpoint"):
        SCVI.load(tmp_path / "best.ckpt")


def test_absent_attributes_of_a_model(model):
    with pytest.raises(AttributeError, match=r"no 'transfer_fields', which scvi-tools has: .*model.registry"):
        model.transfer_fields  # noqa: B018
    with pytest.raises(AttributeError, match="SCVI has no attribute 'latent'"):
        model.latent  # noqa: B018
    for name in ("register_manager", "convert_legacy_save", "setup_annbatch"):  # asked of the class
        with pytest.raises(NotImplementedError, match=f"no '{name}', which scvi-tools has") as caught:
            getattr(SCVI, name)
        assert isinstance(caught.value, AttributeError)
    with pytest.raises(AttributeError, match="SCVI has no attribute 'train_model'"):
        SCVI.train_model  # noqa: B018
    untrained = make_model()
    again = pickle.loads(pickle.dumps(copy.deepcopy(untrained)))
    assert all(map(torch.equal, again.module.parameters(), untrained.module.parameters()))


def test_files_are_read_under_the_name_that_notebooks_use(tmp_path):
    make_data().write_h5ad(tmp_path / "data.h5ad")
    assert scvi_lite.data.read_h5ad(tmp_path / "data.h5ad").shape == (40, 10)


def test_training_goes_on_with_counts_that_were_kept_beside_posteriors():
    model = make_model()
    model.train(**QUIET)
    model.minify_adata("latent_posterior_parameters_with_counts")
    stored = model.get_latent_representation()
    model.train(**QUIET | {"max_epochs": 3})
    assert model.minified_data_type is None
    assert np.abs(model.get_latent_representation() - stored).max() > 1e-3
    np.testing.assert_array_equal(SCVI(model.adata).registry.fields.keys(), model.registry.fields.keys())
    model.minify_adata()
    with pytest.raises(RuntimeError, match="minified without counts"):
        model.train(**QUIET)


@pytest.mark.parametrize(("table", "what"), [(3, "is int"), ({"bayes_factor": [1]}, "is dict")])
def test_what_is_no_table_of_genes(table, what):
    with pytest.raises(TypeError, match=f"de_table {what}: a table that differential_expression"):
        scvi_lite.plot.volcano(table)


def test_switches_and_sizes_of_constructors():
    adata = scvi_lite.data.synthetic_iid(batch_size=20, n_genes=5, n_proteins=3)
    scvi_lite.model.TOTALVI.setup_anndata(adata, "protein_expression")
    for name in ("empirical_protein_background_prior", "override_missing_proteins"):
        with pytest.raises(ValueError, match=f"{name}='no': True or False"):
            scvi_lite.model.TOTALVI(adata, **{name: "no"})
    scvi_lite.model.PEAKVI.setup_anndata(adata)
    with pytest.raises(ValueError, match="n_hidden=-1: a whole number"):
        scvi_lite.model.PEAKVI(adata, n_hidden=-1)
