"""Names that users of scvi-tools look for and that are not here, with what to use instead."""

from __future__ import annotations

from abc import ABCMeta
from collections.abc import Callable
from functools import wraps
from typing import Any, NoReturn, ParamSpec, TypeVar

from scvi_lite.errors import ElsewhereError, as_options, nearest, without_absent, without_needless

DATA_SETS = "data sets are not downloaded here; scvi_lite.data.pbmc68k_reduced() and simulate() need no download"
PLAIN_SETUP = "the setup is plain data: model.registry['setup_args'], model.registry.read(adata, 'x')"
NO_MANAGER = "nothing is kept outside the model and adata.uns['scvi_lite']"
MINIBATCHES = "train() and the questions of a model read its data themselves, as scvi_lite.data.Batch"
SETTINGS_OF_TRAINING = "give plan_kwargs={...} to train(): see scvi_lite.train.Plan"
OTHER_MODELS = "scvi_lite.MODELS lists the models"
NO_PEAK_COUNTS = "regions are open or closed: call get_normalized_accessibility() or differential_accessibility()"
SPOTS = "expression is that of a cell type: call get_scale_for_ct(label), and get_proportions() for the mixture"
LABELS = "model.registry['setup_args'] names the column of adata.obs and the category of cells without a label"
ATTRIBUTIONS = "call predict(ig_interpretability=True), which gives the attributions of the genes too"
ONE_TRAINER = "train() of a model calls lightning.Trainer, with the options that it is given"
LOADER = {"dataloader": "name the cells with adata and indices; an AnnData may be backed by a file"}
NO_LOADERS = dict.fromkeys(
    ("num_workers", "persistent_workers", "pin_memory", "prefetch_factor", "shuffle"),
    "cells are gathered on the device, in their order, without loader processes",
)
OWN_CODE = "modules are beside their models: scvi_lite.model.scvi.SCVIModule, or model.module of a model"

INSTEAD: dict[str, dict[str, str]] = {
    "scvi_lite": {
        "autotune": "call train() with the options to try, and compare model.history['elbo_validation']",
        "hub": "a saved model is a folder of plain files, to be shared as any other: model.save(), SCVI.load()",
        "external": OTHER_MODELS,
        "dataloaders": "train() takes datasplitter_kwargs, and an AnnData may be backed by a file",
        "module": OWN_CODE,
        "nn": "building blocks are imported by name, as in `from scvi_lite.nn.layers import ...`",
    },
    "scvi_lite.criticism": {
        "create_criticism_report": "read the metrics of scvi_lite.criticism.PosteriorPredictiveCheck(adata, models)",
    },
    "PosteriorPredictiveCheck": {
        "differential_expression": "give raw_counts and each of samples to scanpy.tl.rank_genes_groups(), and compare",
        "samples_dataset": "see samples: for each model, the counts of each draw",
    },
    "scvi_lite.data": {
        **dict.fromkeys(("AnnDataManager", "AnnDataManagerValidationCheck", "AnnTorchDataset", "fields"), PLAIN_SETUP),
        "add_dna_sequence": "no model here reads sequences",
        "annotation_simulation": DATA_SETS,
        **dict.fromkeys(
            (
                "brainlarge_dataset", "breast_cancer_dataset", "cellxgene", "cortex", "dataset_10x",
                "frontalcortex_dropseq", "heart_cell_atlas_subsampled", "mouse_ob_dataset", "pbmc_dataset",
                "pbmc_seurat_v4_cite_seq", "pbmcs_10x_cite_seq", "prefrontalcortex_starmap", "purified_pbmc_dataset",
                "retina", "smfish", "spleen_lymph_cite_seq",
            ),
            DATA_SETS,
        ),
    },
    "scvi_lite.model": {
        "base": "the base of all models is scvi_lite.model.Model",
        "get_max_epochs_heuristic": "train() takes min(round(20000 / n_cells * 400), 400) epochs",
        "utils": "draw the latent space with scanpy.tl.umap(adata), and minify with model.minify_adata()",
        **dict.fromkeys(("AUTOZI", "AmortizedLDA", "JaxSCVI", "mlxSCVI"), OTHER_MODELS),
    },
    "settings": {
        "mlflow_set_experiment": "train() takes logger=lightning.pytorch.loggers.MLFlowLogger(experiment_name=...)",
        "mlflow_set_tracking_uri": "train() takes logger=lightning.pytorch.loggers.MLFlowLogger(tracking_uri=...)",
        "reset_logging_handler": "messages go to logging.getLogger('scvi_lite'), whose handlers are yours to change",
    },
    "scvi_lite.nn": {
        **dict.fromkeys(("Encoder", "EncoderTOTALVI", "FCLayers", "MultiEncoder"), "see Hidden in nn.layers"),
        **dict.fromkeys(
            ("Decoder", "DecoderSCVI", "DecoderTOTALVI", "LinearDecoderSCVI", "MultiDecoder"), "see Decoder in nn.vae"
        ),
        "Embedding": "use torch.nn.Embedding",
        "one_hot": "use torch.nn.functional.one_hot",
    },
    "scvi_lite.train": {
        "LoudEarlyStopping": "give early_stopping=True to train()",
        "METRIC_KEYS": "the names of metrics are those of model.history",
        "ScibCallback": "compute the metrics of scib-metrics from model.get_latent_representation()",
        **dict.fromkeys(("KwargsConfig", "Trainer", "TrainRunner"), ONE_TRAINER),
        **dict.fromkeys(
            (
                f"{kind}TrainingPlan{config}"
                for kind in ("", "Adversarial", "Classifier", "LowLevelPyro", "Pyro", "SemiSupervised",
                             "SemiSupervisedAdversarial")
                for config in ("", "Config")
                if kind or not config
            ),
            SETTINGS_OF_TRAINING,
        ),
    },
    "Model": {
        **dict.fromkeys(
            (
                "adata_uuid", "fields", "register_fields", "register_new_fields", "transfer_fields",
                "update_setup_method_args", "validate", "view_setup_method_args",
            ),
            PLAIN_SETUP,
        ),
        **dict.fromkeys(("deregister_manager", "register_manager"), NO_MANAGER),
        **dict.fromkeys(("labels_", "original_label_key", "unlabeled_category_"), LABELS),
        "n_labels": "see model.summary_stats",
        "semisupervised_history_": "what was learned of labels is in model.history",
        **dict.fromkeys(("get_ranked_features", "shap_adata_predict", "shap_predict"), ATTRIBUTIONS),
        "was_pretrained": "SCANVI.from_scvi_model() makes the model that it is",
        "init_params_": "print the model",
        "setup_annbatch": "an AnnData may be backed by a file larger than memory: anndata.read_h5ad(path, backed='r')",
        "create_torch_dataset": MINIBATCHES,
        "view_registry": "call model.view_anndata_setup()",
        "get_normalized_function_name": "call get_normalized_expression(), or get_normalized_accessibility()",
        "prepare_query_mudata": "this model reads an AnnData: call prepare_query_anndata()",
        "get_importance_weights": "differential_expression(weights='importance') of SCVI, SCANVI and TOTALVI",
        "_make_data_loader": "model._minibatches(adata, indices) gives one scvi_lite.data.Batch after another",
        "_validate_anndata": "questions check the data that they are given, and leave them as they are",
        "convert_legacy_save": "load() reads folders with a model.pt; let scvi-tools convert those with an attr.pkl",
        "run_id": "name the run in a logger of Lightning: train(logger=...)",
        "run_name": "name the run in a logger of Lightning: train(logger=...)",
    },
    "module": {
        "px_r": "see log_theta, or get_likelihood_parameters() of the model",
        "py_r": "see protein_log_theta",
        "z_encoder": "see encoder, and call encode(batch)",
        "l_encoder": "see library_encoder, and call encode(batch)",
        "inference": "call encode(batch), which gives the posterior",
        "generative": "call decode(z, library, batch), which gives the rates",
        "sample": "call posterior_predictive_sample() of the model",
        "marginal_ll": "call get_marginal_ll() of the model",
        "classify": "call predict() of the model",
        **dict.fromkeys(("library_log_means", "library_log_vars"), "see library_prior_loc and library_prior_var"),
        **dict.fromkeys(
            ("background_pro_alpha", "background_pro_log_beta"), "see background_loc and background_log_scale"
        ),
        **dict.fromkeys(
            ("get_embedding", "init_embedding", "remove_embedding"), "call get_batch_representation() of the model"
        ),
        **dict.fromkeys(
            ("dispersion", "gene_likelihood", "latent_distribution", "n_hidden", "n_input", "n_latent", "n_layers"),
            "see config, which has the options of the network",
        ),
        **dict.fromkeys(("n_batch", "n_labels"), "see summary_stats of the model"),
        "use_size_factor_key": "see registry['setup_args']['size_factor_key'] of the model",
        "minified_data_type": "see minified_data_type of the model",
    },
    "DestVI": dict.fromkeys(("differential_abundance", "get_normalized_expression"), SPOTS),
    "PEAKVI": dict.fromkeys(
        (
            "differential_expression", "get_feature_correlation_matrix", "get_likelihood_parameters",
            "get_normalized_expression", "posterior_predictive_sample",
        ),
        NO_PEAK_COUNTS,
    ) | {"get_latent_library_size": "call get_library_size_factors()"},
}  # fmt: skip

P = ParamSpec("P")
R = TypeVar("R")


def instead_of(place: str, name: str) -> str | None:
    """What to use instead of a name of scvi-tools; None for any other name.

    >>> instead_of("Model", "view_registry")
    "Model has no 'view_registry', which scvi-tools has: call model.view_anndata_setup()."
    """
    cure = INSTEAD.get(place, {}).get(name)
    return None if cure is None else f"{place} has no {name!r}, which scvi-tools has: {cure}."


def no_attribute(owner: object, name: str) -> AttributeError:
    """The error for a name that a model or its class does not have."""
    cls = owner if isinstance(owner, type) else type(owner)
    if (message := instead_of(cls.__name__, name) or instead_of("Model", name)) is not None:
        return ElsewhereError(message, name=name)
    guess = None if name.startswith("_") else nearest(name, dir(owner))
    hint = f" Did you mean {guess!r}?" if guess else ""
    return AttributeError(f"{cls.__name__} has no attribute {name!r}.{hint}", name=name)


def without_loaders(question: Callable[P, R]) -> Callable[P, R]:
    """A question that takes, too, what scvi-tools has for its data loaders, of which there are none.

    ``dataloader=None`` and ``data_loader_kwargs`` are taken as scripts spell them out; what has no effect warns, and a
    loader is refused.
    """

    @wraps(question)
    def ask(*arguments: Any, **options: Any) -> R:
        options |= as_options("data_loader_kwargs", options.pop("data_loader_kwargs", None))
        options = without_absent(f"{question.__name__}()", without_needless(options, NO_LOADERS), LOADER)
        return question(*arguments, **options)

    return ask


class SaysInstead(ABCMeta):
    """Classes of models: like their instances, they say what to use instead of a name of scvi-tools."""

    def __getattr__(cls, name: str) -> NoReturn:
        raise no_attribute(cls, name)
