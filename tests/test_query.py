"""Mapping new data onto a reference: what is held is held in fact, what is new is trained, names find each other."""

import re
import warnings

import anndata
import cloudpickle
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse

import scvi_lite
from scvi_lite.data.gene_names import LEAST_SHARE
from scvi_lite.model import MULTIVI, PEAKVI, SCANVI, SCVI, TOTALVI, LinearSCVI

SILENT = {"accelerator": "cpu", "enable_progress_bar": False}
FAST = {"max_epochs": 2, "batch_size": 32, **SILENT}
BATCH = {"batch_key": "batch"}
COVARIATES = BATCH | {"categorical_covariate_keys": ["donor"], "continuous_covariate_keys": ["depth"]}
SMALL = {"n_hidden": 8, "n_latent": 3}


def cells(*batches, n=40, n_genes=20, seed=0):
    """Cells of these batches, with donors of their own."""
    np.random.seed(seed)
    adata = scvi_lite.data.synthetic_iid(batch_size=n, n_genes=n_genes, n_batches=len(batches))
    rng = np.random.default_rng(seed)
    adata.obs["batch"] = np.repeat(batches, n)
    adata.obs["donor"] = [f"{batch}_{i}" for batch, i in zip(adata.obs["batch"], rng.integers(0, 2, adata.n_obs))]
    adata.obs["depth"] = rng.normal(size=adata.n_obs)
    return adata


def reference(setup=COVARIATES, batches=("r0", "r1"), train=True, **options):
    adata = cells(*batches)
    SCVI.setup_anndata(adata, **setup)
    model = SCVI(adata, **SMALL | options)
    if train:
        model.train(**FAST)
    return model


def answers(model, adata):
    """What a model says of cells: latent space, and expression as that of each cell's own batch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # not trained
        torch.manual_seed(0)  # expression is of a draw of z
        return model.get_latent_representation(adata), model.get_normalized_expression(adata, return_numpy=True)


def changed(model, before):
    """Names of the weights that differ from those before; of a table, of the rows that do."""
    names = set()
    for name, value in model.module.state_dict().items():
        if "tables" in name or value.ndim == 2 and name in model.module.frozen.rows:
            names |= {f"{name}[{i}]" for i in range(len(value)) if not torch.equal(value[i], before[name][i])}
        elif not torch.equal(value, before[name]):
            names.add(name)
    return names


def copied(model):
    return {name: value.clone() for name, value in model.module.state_dict().items()}


def map_untrained(query, model, **options):
    return type(model).load_query_data(query, model, accelerator="cpu", **options)


# What is held ---------------------------------------------------------------------------------------------------------

NETWORKS = {
    "encoded": (COVARIATES, {"encode_covariates": True, "n_layers": 2}),
    "embedded": (COVARIATES, {"encode_covariates": True, "batch_representation": "embedding"}),
    "first layer": (COVARIATES, {"n_layers": 2, "deeply_inject_covariates": False, "dispersion": "gene-batch"}),
    "layer norm": (BATCH, {"use_layer_norm": "both", "use_batch_norm": "none", "encode_covariates": True}),
    "latent library": (BATCH, {"use_observed_lib_size": False, "dispersion": "gene-batch"}),
}
OPTIMIZERS = {
    "AdamW": {"optimizer": "AdamW", "weight_decay": 0.1},
    "momentum": {
        "optimizer": "Custom",
        "optimizer_creator": lambda p: torch.optim.SGD(p, lr=1e-4, momentum=0.9, weight_decay=0.5),
    },
}


CASES = {network: (NETWORKS[network], {}) for network in NETWORKS} | {
    optimizer: (NETWORKS["encoded"], plan) for optimizer, plan in OPTIMIZERS.items()
}


@pytest.mark.parametrize("network, plan", CASES.values(), ids=CASES)
def test_reference_answers_as_before(network, plan):
    """A query of a new batch and of one that the reference knows: the reference's cells stay where they were."""
    model = reference(network[0], **network[1])
    query = cells("q0", "r1", seed=1)
    mapped = map_untrained(query, model, freeze_batchnorm_decoder=True)
    before, new = copied(mapped), answers(mapped, query)
    mapped.train(**FAST, plan_kwargs=plan)
    assert changed(mapped, before), "something is trained"
    for ours, theirs in zip(answers(mapped, model.adata), answers(model, model.adata), strict=True):
        assert np.array_equal(ours, theirs)
    q0 = (query.obs["batch"] == "q0").to_numpy()
    assert not np.array_equal(answers(mapped, query)[1][q0], new[1][q0])


def chromatin(*batches, seed=0):
    adata = cells(*batches, seed=seed)
    adata.X = (adata.X > adata.X.mean()).astype(np.float32)
    return adata


def proteins(*batches, seed=0):
    np.random.seed(seed)
    adata = scvi_lite.data.synthetic_iid(batch_size=40, n_genes=20, n_proteins=6, n_batches=len(batches))
    adata.obs["batch"] = np.repeat(batches, 40)
    return adata


def multiome(*batches, seed=0):
    rna, peaks = cells(*batches, seed=seed), chromatin(*batches, seed=seed + 10)
    peaks.var_names = [f"peak_{i}" for i in range(peaks.n_vars)]
    return anndata.concat([rna, peaks], axis=1, merge="first")


PROTEINS = BATCH | {"protein_expression_obsm_key": "protein_expression"}
MODELS = {
    "LinearSCVI": (LinearSCVI, cells, BATCH, {}),
    "PEAKVI": (PEAKVI, chromatin, BATCH, {"encode_covariates": True}),
    "TOTALVI": (TOTALVI, proteins, PROTEINS, {"protein_dispersion": "protein-batch"}),
    "MULTIVI": (MULTIVI, multiome, BATCH, {"n_genes": 20, "n_regions": 20, "encode_covariates": True}),
}


@pytest.mark.parametrize("kind, make, setup, options", MODELS.values(), ids=MODELS)
def test_every_model_maps_queries(kind, make, setup, options, tmp_path):
    adata, query = make("r0", "r1"), make("q0", "r1", seed=1)
    kind.setup_anndata(adata, **setup)
    model = kind(adata, **SMALL | options)
    model.train(**FAST)
    model.save(tmp_path / "reference")
    mapped = map_untrained(query, model, freeze_batchnorm_decoder=True)
    before = copied(mapped)
    mapped.train(**FAST, plan_kwargs={"weight_decay": 0.1})
    moved = {name for name in changed(mapped, before) if not name.startswith("library_encoder")}
    assert moved
    assert all(name.endswith("[2]") for name in moved)
    assert np.array_equal(mapped.get_latent_representation(adata), model.get_latent_representation())
    assert mapped.get_latent_representation().shape == (80, 3)


def test_weights_of_cells_are_the_querys_own():
    adata, query = multiome("r0", "r1"), multiome("q0", seed=1)
    MULTIVI.setup_anndata(adata, **BATCH)
    model = MULTIVI(adata, n_genes=20, n_regions=20, modality_weights="cell", **SMALL)
    model.train(**FAST)
    mapped = map_untrained(query, model)
    mean = model.module.weight_logit.mean(0)
    torch.testing.assert_close(mapped.module.weight_logit, mean.expand(40, 2))
    mapped.train(**FAST)
    assert not torch.equal(mapped.module.weight_logit, mean.expand(40, 2))


def test_latent_space_is_held_by_default():
    model = reference(encode_covariates=True, n_layers=2)
    mapped = map_untrained(cells("q0"), model)
    mapped.train(**FAST)
    assert np.array_equal(*(answers(m, model.adata)[0] for m in (mapped, model)))
    assert not np.array_equal(*(answers(m, model.adata)[1] for m in (mapped, model))), "batch norm of the decoder moves"


NORM = [f"decoder.hidden.blocks.0.batch_norm.{what}" for what in ("weight", "bias", "running_mean", "running_var")]
NORM += ["decoder.hidden.blocks.0.batch_norm.num_batches_tracked"]
NEW = [f"{part}.hidden.blocks.0.linear.tables.{t}" for part in ("encoder", "decoder") for t in ("0[2]", "1[4]", "1[5]")]
TRAINED = {
    "default": ({}, NORM + NEW),
    "freeze_expression": (
        {"freeze_expression": False},
        [*NORM, *NEW, *(f"encoder.hidden.blocks.0.linear.{what}" for what in ("weight", "bias"))],
    ),
    "freeze_decoder_first_layer": (
        {"freeze_decoder_first_layer": False},
        [*NORM, *NEW, *(f"decoder.hidden.blocks.0.linear.{what}" for what in ("weight", "bias"))],
    ),
    "freeze_batchnorm_encoder": (
        {"freeze_batchnorm_encoder": False},
        [*NORM, *NEW, *(name.replace("decoder", "encoder") for name in NORM)],
    ),
    "freeze_batchnorm_decoder": ({"freeze_batchnorm_decoder": True}, NEW),
    "freeze_dropout": ({"freeze_dropout": True}, NORM + NEW),
}


@pytest.mark.parametrize("options, expected", TRAINED.values(), ids=TRAINED)
def test_what_each_option_trains(options, expected):
    mapped = map_untrained(cells("q0", seed=1), reference(encode_covariates=True), **options)
    before = copied(mapped)
    mapped.train(**FAST)
    assert changed(mapped, before) == set(expected)


def test_unfrozen_trains_all():
    mapped = map_untrained(cells("q0", "r0", "r1", seed=1), reference(encode_covariates=True), unfrozen=True)
    before = copied(mapped)
    mapped.train(**FAST)
    assert {name.partition("[")[0] for name in changed(mapped, before)} == before.keys()


def test_dropout_is_frozen():
    """With dropout and the draw of z as the only noise, two losses of a training module are equal without them."""
    for frozen in (True, False):
        mapped = map_untrained(cells("q0"), reference(dropout_rate=0.5), freeze_dropout=frozen)
        mapped.module.train()
        batch = next(mapped._minibatches())
        mapped.module.train()
        first, second = (mapped.module.encode(batch).z_loc_nk for _ in range(2))
        assert torch.equal(first, second) == frozen


def test_library_encoder_is_the_querys_own():
    mapped = map_untrained(cells("q0"), reference(BATCH, use_observed_lib_size=False))
    assert mapped.module.library_prior_loc.shape == (3,)
    assert mapped.module.library_prior_loc[2] == pytest.approx(np.log(mapped.adata.X.sum(1)).mean(), rel=1e-5)
    before = copied(mapped)
    mapped.train(**FAST)
    moved = {name for name in changed(mapped, before) if name.startswith("library_encoder")}
    assert moved == {name for name in before if name.startswith("library_encoder")}


# What is new ----------------------------------------------------------------------------------------------------------


def test_new_batch_is_an_average_until_trained():
    model = reference(BATCH, encode_covariates=True, dispersion="gene-batch")
    mapped = map_untrained(cells("q0"), model)
    state, old = mapped.module.state_dict(), model.module.state_dict()
    for name in ("encoder.hidden.blocks.0.linear.tables.0", "log_theta"):
        torch.testing.assert_close(state[name][2], old[name].mean(0))
    assert mapped.registry.categories("batch_n") == ["r0", "r1", "q0"]
    assert not mapped.is_trained
    assert mapped.history == {}
    with pytest.warns(UserWarning, match="new batches count as an average one"):
        mapped.get_latent_representation()


@pytest.mark.parametrize("options", [{}, {"batch_representation": "embedding"}], ids=["one-hot", "embedded"])
@pytest.mark.parametrize("setup", [BATCH, COVARIATES], ids=["batch", "covariates"])
def test_reference_of_one_batch(setup, options):
    """A covariate with one category has no weights; with a second one it gets them, before those of the others."""
    model = reference(setup, ("r0",), encode_covariates=True, **options)
    query = cells("q0", "q1", seed=1)
    mapped = map_untrained(query, model, freeze_batchnorm_decoder=True)
    for when in ("before", "after"):
        for ours, theirs in zip(answers(mapped, model.adata), answers(model, model.adata), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6, err_msg=when)
        mapped.train(**FAST)
    tables = mapped.module.decoder.hidden.blocks[0].linear.tables
    sizes = [3] * (not options) + [6] * (setup is COVARIATES)
    assert [len(table) for table in tables] == sizes


def test_several_queries_one_after_another():
    model = reference(encode_covariates=True)
    first, second = cells("q0", seed=1), cells("q1", "r0", seed=2)
    one = map_untrained(first, model, freeze_batchnorm_decoder=True)
    one.train(**FAST)
    two = map_untrained(second, one, freeze_batchnorm_decoder=True)
    two.train(**FAST)
    assert two.registry.categories("batch_n") == ["r0", "r1", "q0", "q1"]
    for mapped, adata in ((model, model.adata), (one, first)):
        for ours, theirs in zip(answers(two, adata), answers(mapped, adata), strict=True):
            assert np.array_equal(ours, theirs)


def test_nothing_new_needs_no_training():
    model = reference(BATCH)
    spelt_out = {"registry": None, "datamodule": None}  # as scvi-tools has them
    mapped = map_untrained(cells("r1", seed=1), model, freeze_batchnorm_decoder=True, **spelt_out)
    assert mapped.is_trained
    assert np.array_equal(mapped.get_latent_representation(), model.get_latent_representation(mapped.adata))
    with pytest.warns(UserWarning, match="Nothing was trained.*unfrozen=True"):
        mapped.train(**FAST)
    assert mapped.is_trained and not mapped.history


def test_whole_numbers_are_the_same_batches_in_any_type():
    model = reference(BATCH, ("0", "1"))
    query = cells("q0")
    query.obs["batch"] = pd.Categorical(np.repeat([1, 2], 20))
    assert map_untrained(query, model).registry.categories("batch_n") == ["0", "1", 2]


# Where the reference comes from ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["folder", "minified", "minified folder"])
def test_reference_without_its_cells(source, tmp_path):
    model = reference(encode_covariates=True)
    expected = answers(map_untrained(cells("q0", seed=1), model), cells("q0", seed=1))
    if "minified" in source:
        model.minify_adata()
    if "folder" in source:
        model.save(tmp_path / "reference")
        model = tmp_path / "reference"
    query = cells("q0", seed=1)
    mapped = SCVI.load_query_data(query, model, accelerator="cpu")
    assert mapped.minified_data_type is None
    for ours, theirs in zip(answers(mapped, query), expected, strict=True):
        assert np.array_equal(ours, theirs)
    mapped.train(**FAST)


def test_reference_of_scvi_tools():
    from conftest import SHARED

    folder = SHARED / "golden" / "scvi_covariates_encoded"
    if not folder.is_dir():
        pytest.skip("no models recorded from scvi-tools here")
    model_folder = next(path.parent for path in folder.rglob("model.pt"))
    adata = anndata.read_h5ad(next(folder.rglob("*.h5ad")))
    model = SCVI.load(model_folder, adata)
    query = adata.copy()
    key = model.registry.setup_args["batch_key"]
    query.obs[key] = "query"
    mapped = SCVI.load_query_data(query, model_folder, freeze_batchnorm_decoder=True)
    mapped.train(**FAST)
    for ours, theirs in zip(answers(mapped, adata), answers(model, adata), strict=True):
        assert np.array_equal(ours, theirs)


def test_saved_query_stays_frozen(tmp_path):
    model = reference(encode_covariates=True)
    mapped = map_untrained(cells("q0", seed=1), model, freeze_batchnorm_decoder=True)
    mapped.save(tmp_path / "query")
    loaded = SCVI.load(tmp_path / "query", mapped.adata)
    assert loaded.module.frozen == mapped.module.frozen
    loaded.train(**FAST, plan_kwargs={"weight_decay": 0.1})
    for ours, theirs in zip(answers(loaded, model.adata), answers(model, model.adata), strict=True):
        assert np.array_equal(ours, theirs)


def test_damaged_note_of_what_is_frozen(tmp_path):
    mapped = map_untrained(cells("q0"), reference(BATCH))
    mapped.save(tmp_path / "query")
    file = tmp_path / "query" / "model.json"
    file.write_text(re.sub(r'"decoder\.scale\.weight"', '"decoder.scales"', file.read_text(), count=1))
    with pytest.raises(ValueError, match="frozen"):
        SCVI.load(tmp_path / "query", mapped.adata)


def test_frozen_travels_to_other_processes():
    mapped = map_untrained(cells("q0"), reference(encode_covariates=True))
    there = cloudpickle.loads(cloudpickle.dumps(mapped.module)).train()
    assert {n for n, p in there.named_parameters() if p.requires_grad} == {
        n for n, p in mapped.module.named_parameters() if p.requires_grad
    }
    assert not there.encoder.hidden.blocks[0].batch_norm.training
    assert there.decoder.hidden.blocks[0].batch_norm.training


def test_resumed_query_equals_uninterrupted(tmp_path):
    model, query = reference(encode_covariates=True), cells("q0", "r1", seed=1)
    whole, stopped, resumed = (map_untrained(query, model) for _ in range(3))
    plan = {"plan_kwargs": {"weight_decay": 0.1}, **SILENT}
    for mapped, epochs, folder in ((whole, 3, "whole"), (stopped, 2, "part")):
        torch.manual_seed(1)
        mapped.train(max_epochs=epochs, enable_checkpointing=True, default_root_dir=tmp_path / folder, **plan)
    resumed.train(max_epochs=3, ckpt_path=tmp_path / "part" / "checkpoints" / "last.ckpt", **plan)
    assert not changed(resumed, copied(whole))
    assert np.array_equal(answers(resumed, model.adata)[0], answers(model, model.adata)[0])


def test_two_ranks_hold_the_reference(tmp_path):
    from test_ddp import run_on_two_ranks

    ranks = run_on_two_ranks(
        """
        torch.manual_seed(0)
        model = SCVI(adata, n_hidden=8, encode_covariates=True)
        model.is_trained = True
        query = scvi_lite.data.synthetic_iid(batch_size=75, n_genes=12)
        query.obs["batch"] = np.where(np.arange(query.n_obs) % 2, "new", "batch_1")
        mapped = SCVI.load_query_data(query, model, accelerator="cpu", freeze_batchnorm_decoder=True)
        before = {k: v.clone() for k, v in mapped.module.state_dict().items()}
        mapped.train(max_epochs=2, plan_kwargs={"weight_decay": 0.1}, **options)
        moved = [k for k, v in mapped.module.state_dict().items() if not torch.equal(v, before[k])]
        same = np.array_equal(mapped.get_latent_representation(adata), model.get_latent_representation())
        tell(moved=moved, same=same, **describe(mapped, Watch()))
        """,
        tmp_path,
    )
    for rank in ranks:
        assert rank["same"]
        assert rank["moved"] == [f"{part}.hidden.blocks.0.linear.tables.0" for part in ("encoder", "decoder")]
    assert ranks[0]["weights"] == ranks[1]["weights"]


# Genes ----------------------------------------------------------------------------------------------------------------


def test_genes_are_filled_ordered_and_left_out():
    model = reference(BATCH, train=False)
    query = cells("q0", n_genes=30, seed=1)[:, [25, *range(19, 4, -1)]].copy()  # a surplus one, fifteen of twenty
    query.X = sparse.csr_matrix(query.X)
    query.layers["raw"] = query.X.tocsc()
    query.layers["dense"] = query.X.toarray()
    query.raw = query.copy()
    query.var["known"] = True
    expected = query[:, model.adata.var_names[5:]].X.toarray()
    with pytest.warns(UserWarning, match=r"15 of the reference's 20 genes, 75%.*'gene_0'"):
        filled = SCVI.prepare_query_anndata(query, model, inplace=False)
    assert query.n_vars == 16
    with pytest.warns(UserWarning, match="Filled with zeros"):
        assert SCVI.prepare_query_anndata(query, model) is None
    for adata in (filled, query):
        assert adata.var_names.tolist() == model.adata.var_names.tolist()
        assert [adata.X.format, adata.layers["raw"].format] == ["csr", "csc"]
        for matrix in (adata.X.toarray(), adata.layers["raw"].toarray(), adata.layers["dense"]):
            assert np.array_equal(matrix[:, 5:], expected)
            assert not matrix[:, :5].any()
        assert adata.raw.n_vars == 16
        assert adata.obs.equals(query.obs)
    query.write_h5ad("query.h5ad")
    assert anndata.read_h5ad("query.h5ad").shape == (40, 20)


def test_names_of_the_reference(tmp_path):
    model = reference(BATCH, train=False)
    model.save(tmp_path / "reference")
    names = SCVI.prepare_query_anndata(cells("q0"), tmp_path / "reference", return_reference_var_names=True)
    assert isinstance(names, pd.Index)
    assert names.equals(model.adata.var_names)


def test_backed_query(tmp_path):
    model, query = reference(BATCH), cells("q0", n_genes=30)
    query.write_h5ad(tmp_path / "query.h5ad")
    backed = anndata.read_h5ad(tmp_path / "query.h5ad", backed="r")
    with pytest.raises(ValueError, match="inplace=False"):
        SCVI.prepare_query_anndata(backed, model)
    filled = SCVI.prepare_query_anndata(backed, model, inplace=False)
    expected = answers(map_untrained(query[:, :20].copy(), model), query[:, :20].copy())
    for ours, theirs in zip(answers(map_untrained(filled, model), filled), expected, strict=True):
        assert np.array_equal(ours, theirs)


ENSEMBL = [f"ENSG{i:011d}" for i in range(20)]
SYMBOLS = [f"GENE{i}" for i in range(20)]
NAMES = {
    "versions": (ENSEMBL, [f"{n}.{i + 1}" for i, n in enumerate(ENSEMBL)], {}, "without the version"),
    "versions there": ([f"{n}.4" for n in ENSEMBL], ENSEMBL, {}, "without the version"),
    "case": (SYMBOLS, [n.title() for n in SYMBOLS], {}, "whatever the case"),
    "case there": ([n.title() for n in SYMBOLS], SYMBOLS, {}, "whatever the case"),
    "column": (ENSEMBL, SYMBOLS, {"gene_ids": ENSEMBL, "n": range(20)}, re.escape("adata.var['gene_ids']")),
    "symbols": (ENSEMBL, SYMBOLS, {}, "named by Ensembl ids .* by symbols"),
    "ids": (SYMBOLS, ENSEMBL, {}, "named by symbols .* by Ensembl ids"),
}


@pytest.mark.parametrize("theirs, ours, columns, message", NAMES.values(), ids=NAMES)
def test_names_that_nearly_match(theirs, ours, columns, message):
    """The error names how the names differ; the cure in it, where there is one, works as it is printed."""
    adata = cells("r0", "r1")
    adata.var_names = theirs
    SCVI.setup_anndata(adata, **BATCH)
    model = SCVI(adata, **SMALL)
    query = cells("q0")
    query.var_names = ours
    for name, values in columns.items():
        query.var[name] = list(values)
    with pytest.raises(ValueError, match=message) as error:
        SCVI.prepare_query_anndata(query, model)
    with pytest.raises(ValueError, match=message):
        map_untrained(query, model)
    text = str(error.value)
    if "name_of" in text:
        return
    cure = text[text.index("adata.var_names = ") :]
    scope = {"adata": query, "var_names": theirs}
    if "with names = " in cure:
        cure, _, names = cure.partition(", with names = ")
        scope["names"] = eval(names.removesuffix(" of the model's var_names"), dict(scope))
    exec(cure, scope)
    SCVI.prepare_query_anndata(query, model)
    assert query.var_names.tolist() == theirs


def test_too_few_genes():
    model, query = reference(BATCH, train=False), cells("q0")
    query.var_names = [name if i < 5 else f"other_{i}" for i, name in enumerate(query.var_names)]
    with pytest.warns(UserWarning, match="25%"):
        SCVI.prepare_query_anndata(query, model, inplace=False)
    query.var_names = [name if i < 4 else f"other_{i}" for i, name in enumerate(query.var_names)]
    with pytest.raises(ValueError, match=rf"4 of the reference's 20 genes, 20%; at least {LEAST_SHARE:.0%}"):
        SCVI.prepare_query_anndata(query, model)


def test_genes_in_another_order():
    model, query = reference(BATCH), cells("q0", n_genes=25)
    expected = answers(map_untrained(query[:, :20].copy(), model), query[:, :20].copy())[0]
    mixed = query[:, ::-1].copy()
    with pytest.warns(UserWarning, match="another order"):
        mapped = map_untrained(mixed, model)
    assert np.array_equal(answers(mapped, None)[0], expected)
    assert mixed.n_vars == 25
    mapped = map_untrained(mixed, model, inplace_subset_query_vars=True)
    assert mapped.adata is mixed
    assert np.array_equal(answers(mapped, None)[0], expected)


# Questions that have no answer ----------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused():
    model = reference(COVARIATES)
    query = cells("q0")

    class OTHER(SCVI):
        pass

    cases = [
        (lambda: OTHER.load_query_data(query, model), ValueError, r"SCVI\.load_query_data"),
        (lambda: SCVI.load_query_data(query), TypeError, "reference_model is a NoneType"),
        (lambda: SCVI.load_query_data("reference", query), TypeError, "reference_model is an? AnnData"),
        (lambda: SCVI.prepare_query_anndata("query.h5ad", model), TypeError, "read_h5ad"),
        (lambda: SCVI.load_query_data(reference_model=model), TypeError, "adata is a NoneType"),
        (lambda: SCVI.load_query_data(query, "nowhere"), FileNotFoundError, "nowhere"),
        (lambda: map_untrained(without(query, "batch"), model), KeyError, r"adata\.obs\['batch'\] = "),
        (lambda: map_untrained(without(query, "donor"), model), KeyError, "donor"),
        (lambda: map_untrained(without(query, "depth"), model), KeyError, "depth"),
        (lambda: map_untrained(query, model, transfer_batch=False), ValueError, "'q0'.*'r0', 'r1'"),
        (lambda: map_untrained(query, model, freeze_classifer=True), TypeError, "Did you mean 'freeze_classifier'"),
        (lambda: map_untrained(query, model, registry={"a": 1}), TypeError, "no option 'registry': a model is made"),
    ]
    for call, kind, message in cases:
        with pytest.raises(kind, match=message):
            call()
    with pytest.warns(UserWarning, match="not trained"):
        map_untrained(query, reference(COVARIATES, train=False))


def without(adata, column):
    adata = adata.copy()
    del adata.obs[column]
    return adata


def test_labels_of_scvi():
    """New ones are further categories; where nothing depends on them, they may be absent."""
    setup = BATCH | {"labels_key": "labels"}
    model = reference(setup)
    query = cells("q0")
    map_untrained(without(query, "labels"), model).train(**FAST)
    query.obs["labels"] = "new"
    mapped = map_untrained(query, reference(setup, dispersion="gene-label"))
    n_old = model.summary_stats["n_labels"]
    assert mapped.module.frozen.rows["log_theta"] == n_old
    before = copied(mapped)
    mapped.train(**FAST)
    assert {name for name in changed(mapped, before) if name.startswith("log_theta")} == {f"log_theta[{n_old}]"}
    with pytest.raises(KeyError, match="labels"):
        map_untrained(without(query, "labels"), reference(setup, dispersion="gene-label"))


def test_the_query_needs_no_setup_and_has_one_then():
    model, query = reference(BATCH), cells("q0")
    map_untrained(query, model)
    again = SCVI(query, **SMALL)
    assert again.registry.categories("batch_n") == ["r0", "r1", "q0"]


# Labels ---------------------------------------------------------------------------------------------------------------

LABELS = {"labels_key": "labels", "unlabeled_category": "Unknown"}


def labelled_reference(**options):
    adata = cells("r0", "r1")
    SCANVI.setup_anndata(adata, **BATCH, **LABELS)
    model = SCANVI(adata, **SMALL | options)
    model.train(**FAST)
    return model


LABELLED = {
    "no column": lambda adata: without(adata, "labels"),
    "unknown": lambda adata: relabelled(adata, "Unknown"),
    "some": lambda adata: relabelled(adata, np.where(np.arange(adata.n_obs) % 4, "Unknown", adata.obs["labels"])),
    "all": lambda adata: adata,
}


def relabelled(adata, labels):
    adata = adata.copy()
    adata.obs["labels"] = labels
    return adata


@pytest.mark.parametrize("labels", LABELLED.values(), ids=LABELLED)
@pytest.mark.parametrize("freeze", [{}, {"freeze_classifier": False}, {"unfrozen": True}], ids=str)
def test_labels_are_transferred(labels, freeze):
    model = labelled_reference(encode_covariates=True)
    query = labels(cells("q0", seed=1))
    mapped = map_untrained(query, model, freeze_batchnorm_decoder=True, **freeze)
    before = copied(mapped)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "No training cell has the label")
        mapped.train(**FAST)
    assert set(mapped.predict()) <= set(model.registry.categories("label_n")[:-1])
    moved = {name for name in changed(mapped, before) if name.startswith("classifier")}
    has_labels = "labels" in query.obs and (query.obs["labels"] != "Unknown").any()
    if freeze and has_labels:
        assert "classifier.logits.weight" in moved
    if not freeze:
        assert not moved
        for ours, theirs in zip(answers(mapped, model.adata), answers(model, model.adata), strict=True):
            assert np.array_equal(ours, theirs)
        assert np.array_equal(mapped.predict(model.adata), model.predict())
    assert np.isfinite(mapped.history["train_accuracy"]).to_numpy().all() == has_labels


def test_unknown_label():
    query = relabelled(cells("q0"), "label_9")
    with pytest.raises(ValueError, match="label_9.*To have them predicted"):
        map_untrained(query, labelled_reference())


def test_from_a_mapped_scvi():
    """SCANVI over a reference and a query mapped onto it."""
    model = reference(BATCH | {"labels_key": "labels"})
    mapped = map_untrained(cells("q0", seed=1), model)
    mapped.train(**FAST)
    labelled = SCANVI.from_scvi_model(mapped, unlabeled_category="label_0")
    labelled.train(**FAST)
    assert len(labelled.predict()) == 40


# Several modalities ---------------------------------------------------------------------------------------------------


def test_modalities_get_the_features_of_the_reference():
    from mudata import MuData, set_options

    def make(batch, n_genes, n_proteins):
        parts = {"rna": cells(batch, n_genes=n_genes), "protein": cells(batch, n_genes=n_proteins, seed=1)}
        parts["protein"].var_names = [f"protein_{i}" for i in range(n_proteins)]
        mdata = MuData(parts)
        mdata.obs["batch"] = batch
        return mdata

    with set_options(pull_on_update=False):
        reference, query, adata = make("r0", 20, 6), make("q0", 16, 8), cells("q0")
        TOTALVI.setup_mudata(reference, batch_key="batch", modalities={"rna_layer": "rna", "protein_layer": "protein"})
        model = TOTALVI(reference, **SMALL)
        with pytest.warns(UserWarning, match="16 of the reference's 20 genes"):
            filled = TOTALVI.prepare_query_mudata(query, model, inplace=False)
        assert query.mod["rna"].n_vars == 16
        with pytest.warns(UserWarning, match="'gene_16'"):
            TOTALVI.prepare_query_mudata(query, model)
        for mdata in (filled, query):
            assert [part.n_vars for part in mdata.mod.values()] == [20, 6]
            assert np.array_equal(mdata.mod["rna"].X[:, :16], cells("q0", n_genes=16).X)
            assert mdata.obs["batch"].eq("q0").all()
        names = TOTALVI.prepare_query_mudata(query, model, return_reference_var_names=True)
        assert names["rna"].equals(reference.mod["rna"].var_names)
        with pytest.raises(ValueError, match="prepare_query_mudata"):
            TOTALVI.prepare_query_anndata(adata, model)
