"""A notebook written for scvi-tools runs by changing its import."""

import warnings

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor

import scvi_lite as scvi

SILENT = {"accelerator": "cpu", "enable_progress_bar": False}


def make_data(**options):
    return scvi.data.synthetic_iid(batch_size=40, n_genes=15, n_proteins=0, n_regions=0, seed=0, **options)


def make_model(train=True, **options):
    adata = make_data()
    scvi.model.SCVI.setup_anndata(adata, batch_key="batch", labels_key="labels")
    model = scvi.model.SCVI(adata, n_hidden=16, n_latent=3, **options)
    if train:
        model.train(1, **SILENT)
    return model


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture
def kept_settings():
    """The settings of the session, put back after the test."""
    before = dict(scvi.settings._values)
    yield scvi.settings
    scvi.settings._values.update(before)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dl_num_workers", 4),
        ("dl_persistent_workers", True),
        ("progress_bar_style", "rich"),
        ("warnings_stacklevel", 3),
    ],
)
def test_settings_without_a_use_here_say_so(name, value):
    with pytest.warns(UserWarning, match=f"settings.{name} has no effect"):
        setattr(scvi.settings, name, value)


def test_settings_that_nobody_knows_are_refused():
    with pytest.raises(AttributeError, match="Did you mean 'batch_size'"):
        scvi.settings.batchsize = 64


def test_checkpoints_go_to_the_logging_dir(tmp_path, kept_settings):
    kept_settings.logging_dir = tmp_path / "logs"
    make_model(train=False).train(1, enable_checkpointing=True, **SILENT)
    assert (tmp_path / "logs" / "checkpoints" / "best.ckpt").is_file()


def test_a_learning_rate_monitor_needs_no_logger():
    model = make_model(train=False)
    model.train(2, callbacks=[LearningRateMonitor()], **SILENT)
    assert model.history["lr-Adam"]["lr-Adam"].tolist() == [1e-3, 1e-3]


def test_a_learning_rate_of_zero_leaves_the_weights():
    model = make_model(train=False)
    before = {name: value.clone() for name, value in model.module.named_parameters()}
    model.train(1, plan_kwargs={"lr": 0}, **SILENT)
    assert all(torch.equal(value, before[name]) for name, value in model.module.named_parameters())


@pytest.mark.parametrize("activation", [torch.nn.Softplus(), torch.nn.functional.softplus, "softplus"])
def test_variance_activations_as_modules_functions_and_names(activation):
    assert make_model(train=False, var_activation=activation).module.config.var_activation == "softplus"


def test_another_softplus_is_refused():
    with pytest.raises(ValueError, match="var_activation=Softplus"):
        make_model(train=False, var_activation=torch.nn.Softplus(beta=2))


def test_groups_keep_their_type(model):
    model.adata.obs["number"] = np.arange(model.adata.n_obs) % 2
    model.adata.obs["mask"] = model.adata.obs["number"] == 1
    by_number = model.differential_expression(groupby="number", group1=0, silent=True)
    assert (by_number["group1"] == 0).all() and (by_number["comparison"] == "0 vs Rest").all()
    by_mask = model.differential_expression(groupby="mask", group1=True, group2=False, silent=True)
    assert by_mask["group1"].all() and not by_mask["group2"].any()


def test_marginal_likelihood_a_few_draws_at_a_time(model):
    torch.manual_seed(0)
    at_once = model.get_marginal_ll(n_mc_samples=200, return_mean=False)
    torch.manual_seed(0)
    in_turn = model.get_marginal_ll(n_mc_samples=200, n_mc_samples_per_pass=7, return_mean=False)
    assert (at_once - in_turn).abs().mean() < 0.2  # nats; other draws of the same cells
    with pytest.raises(ValueError, match="n_mc_samples_per_pass=-1"):
        model.get_marginal_ll(n_mc_samples=2, n_mc_samples_per_pass=-1)


def minified():
    model = make_model()
    model.adata.obsm["X_latent_qzm"], model.adata.obsm["X_latent_qzv"] = model.get_latent_representation(
        return_dist=True
    )
    model.minify_adata()
    return model


def test_a_minified_model_takes_the_full_data_again(tmp_path):
    model = minified()
    model.save(tmp_path / "model", save_anndata=True)
    assert model.registry_ is model.adata_manager.registry and model.adata_manager.adata is model.adata
    assert model.adata.obs["observed_lib_size"].equals(make_data().to_df().sum(1).rename("observed_lib_size"))
    kept = scvi.model.SCVI.load(tmp_path / "model")
    full = scvi.model.SCVI.load(tmp_path / "model", adata=make_data())
    assert kept.minified_data_type == "latent_posterior_parameters" and full.minified_data_type is None
    z = model.get_latent_representation()
    np.testing.assert_array_equal(kept.get_latent_representation(), z)
    np.testing.assert_allclose(full.get_latent_representation(), z, atol=1e-6)
    assert full.get_elbo(return_mean=False).shape == (80,)


def test_folders_of_scvi_tools_before_0_15_say_how_they_are_converted(tmp_path):
    (tmp_path / "attr.pkl").touch()
    with pytest.raises(ValueError, match="Model.convert_legacy_save"):
        scvi.model.SCVI.load(tmp_path, make_data())


def test_minified_data_do_not_pass_for_full_ones(model, tmp_path):
    model.save(tmp_path / "model")
    data = minified().adata
    with pytest.raises(ValueError, match="adata was minified and holds no counts"):
        scvi.model.SCVI.load(tmp_path / "model", adata=data)
    with pytest.raises(ValueError, match="adata was minified and holds no counts"):
        model.get_latent_representation(data)


def test_the_data_of_a_model_may_be_replaced_by_others_that_fit():
    model = make_model()
    z, others = model.get_latent_representation(), make_data()[::-1].copy()
    model.adata = others
    assert model.adata is others
    np.testing.assert_allclose(model.get_latent_representation(), z[::-1], atol=1e-6)
    with pytest.raises(KeyError, match="batch_key='batch'"):
        model.adata = without(others, "batch")
    assert model.adata is others


def without(adata, column):
    adata = adata.copy()
    del adata.obs[column]
    return adata


def test_an_effect_may_take_the_pseudocounts(model):
    def changes(**options):
        torch.manual_seed(0)
        return model.differential_expression(idx1=[0, 1, 2], mode="change", pseudocounts=1e-3, silent=True, **options)

    def effect(one, two, pseudocounts):
        return np.log2(one + pseudocounts) - np.log2(two + pseudocounts)

    np.testing.assert_allclose(changes(change_fn=effect)["lfc_mean"], changes()["lfc_mean"], rtol=1e-5)
    assert changes(change_fn=np.subtract)["lfc_mean"].abs().max() < 1


def test_options_that_are_no_plain_data_are_saved(tmp_path):
    model = make_model(var_activation=torch.nn.functional.softplus, n_layers=np.int64(2))
    model.save(tmp_path / "model", save_anndata=True)
    loaded = scvi.model.SCVI.load(tmp_path / "model")
    np.testing.assert_array_equal(loaded.get_latent_representation(), model.get_latent_representation())


def test_the_categories_of_a_setup_may_be_hidden(model, capsys):
    model.view_anndata_setup()
    assert "batch_1" in capsys.readouterr().out
    model.view_anndata_setup(hide_state_registries=True)
    out = capsys.readouterr().out
    assert "obs" in out and "batch_1" not in out


ERRORS = {
    "an unknown column": (KeyError, lambda model, path: scvi.model.SCVI.setup_anndata(make_data(), batch_key="donor")),
    "an unknown layer": (ValueError, lambda model, path: scvi.model.SCVI.setup_anndata(make_data(), layer="counts")),
    "no setup": (ValueError, lambda model, path: scvi.model.SCVI(make_data())),
    "no sample key": (KeyError, lambda model, path: model.differential_abundance()),
    "no embedding of batches": (KeyError, lambda model, path: model.get_batch_representation()),
    "no counts": (ValueError, lambda model, path: minified().get_elbo()),
    "a folder in use": (ValueError, lambda model, path: [model.save(path), model.save(path)]),
    "no folder": (ValueError, lambda model, path: scvi.model.SCVI.load(path, adata=make_data())),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_are_of_the_types_that_a_notebook_catches(name, model, tmp_path):
    kind, call = ERRORS[name]
    with pytest.raises(kind):
        call(model, tmp_path / "model")


def test_the_usual_course_of_a_notebook(tmp_path, kept_settings):
    """Set up, train, ask, save, load, all without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kept_settings.seed = 0
        adata = make_data()
        adata.layers["counts"] = adata.X.copy()
        scvi.model.SCVI.setup_anndata(adata, layer="counts", batch_key="batch", labels_key="labels")
        model = scvi.model.SCVI(adata, n_layers=2, n_latent=3, gene_likelihood="nb")
        model.train(max_epochs=2, check_val_every_n_epoch=1, early_stopping=True, plan_kwargs={"lr": 1e-3}, **SILENT)
        adata.obsm["X_scVI"] = model.get_latent_representation()
        adata.layers["scvi_normalized"] = model.get_normalized_expression(library_size=10e4)
        de = model.differential_expression(groupby="labels", group1="label_1", group2="label_2", silent=True)
        changes = model.differential_expression(
            idx1="labels == 'label_1'", idx2=adata.obs["labels"] == "label_2", mode="change", silent=True
        )
        model.save(tmp_path / "scvi_model", overwrite=True, save_anndata=True)
        loaded = scvi.model.SCVI.load(tmp_path / "scvi_model")
    assert adata.obsm["X_scVI"].shape == (adata.n_obs, 3)
    assert set(model.history) >= {"elbo_train", "elbo_validation", "reconstruction_loss_train", "train_loss"}
    assert list(de.columns[:5]) == ["proba_m1", "proba_m2", "bayes_factor", "scale1", "scale2"]
    assert {"lfc_mean", "proba_de", "is_de_fdr_0.05"} <= set(changes.columns)
    assert set(de.index) == set(adata.var_names)
    np.testing.assert_array_equal(loaded.get_latent_representation(), adata.obsm["X_scVI"])


@pytest.mark.parametrize("name", ["PEAKVI", "MULTIVI", "TOTALVI"])
def test_constructors_take_spelt_out_defaults_and_name_the_nearest_option(name):
    adata = scvi.data.synthetic_iid(batch_size=5, n_genes=10, n_proteins=3, n_regions=0)
    model_class = getattr(scvi.model, name)
    model_class.setup_anndata(
        adata, **({"protein_expression_obsm_key": "protein_expression"} if name == "TOTALVI" else {})
    )
    options = {"n_genes": 5, "n_regions": 5} if name == "MULTIVI" else {}
    model = model_class(adata, registry=None, extra_encoder_kwargs={}, **options)
    assert "extra_encoder_kwargs" not in repr(model)
    with pytest.raises(TypeError, match="layers are chosen by n_hidden"):
        model_class(adata, extra_encoder_kwargs={"bias": False}, **options)
    with pytest.raises(TypeError, match="Did you mean 'n_latent'"):
        model_class(adata, n_latnt=3, **options)


def test_draws_of_a_mudata_have_the_names_of_its_modalities():
    mdata = scvi.data.synthetic_iid(batch_size=10, n_genes=8, n_regions=0, n_proteins=3, return_mudata=True)
    where = {"rna_layer": "rna", "protein_layer": "protein_expression"}
    scvi.model.TOTALVI.setup_mudata(mdata, batch_key="batch", modalities=where)
    model = scvi.model.TOTALVI(mdata, n_hidden=8)
    with pytest.warns(UserWarning, match="not trained"):
        draws = model.posterior_predictive_sample(n_samples=2)
    assert {name: counts.shape for name, counts in draws.items()} == {
        "rna": (20, 8, 2),
        "protein_expression": (20, 3, 2),
    }


def test_numbers_that_a_model_was_set_up_with():
    adata = scvi.data.synthetic_iid(batch_size=10, n_genes=8, n_regions=0, n_proteins=3)
    adata.obs["age"], adata.obs["dose"] = np.arange(20.0), np.arange(20.0) % 3
    scvi.model.TOTALVI.setup_anndata(
        adata, "protein_expression", batch_key="batch", continuous_covariate_keys=["age", "dose"]
    )
    assert scvi.model.TOTALVI(adata, n_hidden=8).summary_stats == {
        "n_cells": 20,
        "n_vars": 8,
        "n_batch": 2,
        "n_labels": 1,
        "n_extra_categorical_covs": 0,
        "n_extra_continuous_covs": 2,
        "n_proteins": 3,
    }


def test_the_setup_by_the_names_of_scvi_tools(tmp_path, capsys):
    adata = scvi.data.synthetic_iid(batch_size=10, n_genes=8, n_regions=0, n_proteins=3)
    adata.obs["age"], adata.obs["donor"] = np.arange(20.0), ["a", "b"] * 10
    keys = {"categorical_covariate_keys": ["donor"], "continuous_covariate_keys": ["age"]}
    scvi.model.TOTALVI.setup_anndata(adata, "protein_expression", batch_key="batch", **keys)
    model = scvi.model.TOTALVI(adata, n_hidden=8)
    manager, names = model.adata_manager, scvi.REGISTRY_KEYS
    assert manager.get_state_registry(names.BATCH_KEY).categorical_mapping.tolist() == ["batch_0", "batch_1"]
    assert manager.get_state_registry(names.CAT_COVS_KEY).mappings["donor"].tolist() == ["a", "b"]
    assert manager.get_state_registry(names.X_KEY)["column_names"].tolist() == adata.var_names.tolist()
    assert manager.registry["field_registries"]["batch"]["summary_stats"] == {"n_batch": 2}
    assert manager.data_registry.proteins == {"attr_name": "obsm", "attr_key": "protein_expression"}
    np.testing.assert_array_equal(manager.get_from_registry(names.BATCH_KEY)[:, 0], adata.obs["batch"].cat.codes)
    assert model.get_from_registry(adata[:4].copy(), names.CONT_COVS_KEY)["age"].tolist() == [0, 1, 2, 3]
    assert model.data_registry(names.PROTEIN_EXP_KEY).shape == (20, 3)
    assert model.get_anndata_manager(adata[:4].copy()).adata.n_obs == 4
    assert model.get_setup_arg("batch_key") == model.registry_["setup_args"]["batch_key"] == "batch"
    assert model.summary_string == str(model)
    with pytest.raises(KeyError, match="registry_key='atac' is not a field of this model"):
        manager.get_from_registry(names.ATAC_X_KEY)
    with pytest.raises(KeyError, match="Did you mean 'batch_key'"):
        model.get_setup_arg("batch")
    with pytest.raises(AttributeError, match="minibatch|Batch"):
        manager.create_torch_dataset  # noqa: B018
    model.save(tmp_path / "model")
    assert model.load_registry(tmp_path / "model") == model.registry
    scvi.model.TOTALVI.view_setup_args(tmp_path / "model")
    assert "TOTALVI.setup_anndata(" in (shown := capsys.readouterr().out) and "batch_key='batch'" in shown
    adata.obs["batch"] = "another"
    with pytest.raises(ValueError, match="another"):
        manager.transfer_fields(adata)


def test_the_registry_by_the_names_of_scvi_tools(model):
    assert model.registry_ is model.adata_manager.registry
    fields = model.registry_["field_registries"]
    assert fields["labels"]["state_registry"]["categorical_mapping"].tolist() == ["label_0", "label_1", "label_2"]
    assert scvi.utils.attrdict(fields["batch"]["data_registry"]).attr_key == "batch"


def test_cells_with_and_without_a_label():
    adata = make_data()
    scvi.model.SCANVI.setup_anndata(adata, labels_key="labels", unlabeled_category="label_1")
    model = scvi.model.SCANVI(adata, n_hidden=8)
    unknown = adata.obs["labels"] == "label_1"
    np.testing.assert_array_equal(model._unlabeled_indices, np.flatnonzero(unknown))
    np.testing.assert_array_equal(model._labeled_indices, np.flatnonzero(~unknown))


def test_scripts_that_say_which_cells_of_a_query_have_a_label():
    adata = make_data()
    scvi.model.SCANVI.setup_anndata(adata, labels_key="labels", unlabeled_category="label_1")
    reference = scvi.model.SCANVI(adata, n_hidden=8)
    reference.train(1, **SILENT)
    query = make_data()
    query.obs["labels"] = "label_1"
    model = scvi.model.SCANVI.load_query_data(query, reference)
    model._unlabeled_indices, model._labeled_indices = np.arange(query.n_obs), []  # as they are
    with pytest.warns(UserWarning, match=r"adata.obs\['labels'\]: cells of the category 'label_1' have none"):
        reference._labeled_indices = []
    assert len(reference._labeled_indices) == (adata.obs["labels"] != "label_1").sum()


def test_metrics_and_parts_of_the_network_that_have_another_name(model):
    with pytest.raises(KeyError, match="'train_loss_epoch' is not one of these. Did you mean 'train_loss'"):
        model.history["train_loss_epoch"]
    with pytest.raises(KeyError, match="Did you mean 'n_batch'"):
        model.summary_stats["n_batches"]
    with pytest.raises(AttributeError, match="no 'px_r', which scvi-tools has: see log_theta") as caught:
        model.module.px_r  # noqa: B018
    assert isinstance(caught.value, NotImplementedError) and not hasattr(model.module, "px_r")
    with pytest.raises(AttributeError, match="no attribute 'log_thet'"):
        model.module.log_thet  # noqa: B018


def test_attributes_with_an_underscore_at_the_end(model):
    assert model.is_trained_ is True
    assert model.history_ is model.history
    assert model.train_indices_ is model.train_indices


def test_names_of_the_features_of_a_mudata_in_one_list():
    mdata = scvi.data.synthetic_iid(batch_size=10, n_genes=8, n_proteins=3, n_regions=2, return_mudata=True)
    where = {"rna_layer": "rna", "protein_layer": "protein_expression"}
    scvi.model.TOTALVI.setup_mudata(mdata, batch_key="batch", modalities=where)
    model = scvi.model.TOTALVI(mdata, n_hidden=8)
    by_modality = model.get_var_names()
    assert model.get_var_names(legacy_mudata_format=True) == [*by_modality["rna"], *by_modality["protein_expression"]]
    counts = model.adata_manager.get_from_registry("X")
    np.testing.assert_array_equal(counts, mdata["rna"].X)
    assert model.adata_manager.data_registry.X.mod_key == "rna"


def test_options_of_loaders_that_scripts_spell_out(model):
    assert model.get_elbo(dataloader=None, data_loader_kwargs=None).ndim == 0
    assert model.get_latent_representation(indices=[1, 2], dataloader=None, shuffle=False).shape == (2, 3)
    with pytest.warns(UserWarning, match="num_workers has no effect"):
        model.get_reconstruction_error(data_loader_kwargs={"num_workers": 2})
    with pytest.raises(TypeError, match=r"get_elbo\(\) has no option 'dataloader': name the cells"):
        model.get_elbo(dataloader=[1])
    with pytest.raises(TypeError, match="unexpected keyword argument 'foo'"):
        model.get_elbo(data_loader_kwargs={"foo": 1})


def test_options_of_a_training_in_one_object():
    model = make_model(train=False)
    plan = scvi.train.TrainingPlanConfig(lr=0.0, eps=0.1)
    trainer = scvi.train.TrainerConfig(max_epochs=2, check_val_every_n_epoch=2, extra_kwargs={"max_steps": 3})
    before = [parameter.clone() for parameter in model.module.parameters()]
    model.train(plan_config=plan, plan_kwargs={"weight_decay": 0.0}, trainer_config=trainer, batch_size=16, **SILENT)
    assert all(map(torch.equal, before, model.module.parameters()))
    assert model.trainer.global_step == 3
    model = make_model(train=False)
    model.train(1, trainer_config=trainer, **SILENT)  # what train() itself is given counts
    assert len(model.history["elbo_train"]) == 1
    assert scvi.train.merge_kwargs(None, {"lr": 1}, name="plan") == {"lr": 1}


def test_a_checkpoint_callback_that_ends_with_the_best_weights(tmp_path):
    model = make_model(train=False)
    checkpoint = scvi.train.SaveCheckpoint(tmp_path, monitor="elbo_validation", mode="max", load_best_on_end=True)
    model.train(8, callbacks=[checkpoint], plan_kwargs={"lr": 0.01}, **SILENT)  # it falls: the last is not the highest
    best = torch.load(checkpoint.best_model_path, weights_only=True)
    assert best["epoch"] == model.history["elbo_validation"].to_numpy().argmax() < 7
    assert all(torch.equal(best["state_dict"][f"module.{k}"], value) for k, value in model.module.state_dict().items())
    assert float(checkpoint.best_model_score) == pytest.approx(model.history["elbo_validation"].max().item())
