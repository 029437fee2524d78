"""MultiVI: RNA and chromatin of the same cells, or of different ones (Ashuach et al. 2023).

doi:10.1038/s41592-023-01909-9
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from scvi_lite.analysis import accessibility, differential, minify, multiome
from scvi_lite.data.batch import Batch
from scvi_lite.data.fields import Categorical, Matrix, columns_of_obs
from scvi_lite.data.modalities import read_modalities
from scvi_lite.data.proteins import Proteins
from scvi_lite.data.regions import count_genes, depth_field, first_columns, two_matrices, with_regions
from scvi_lite.data.registry import Registry
from scvi_lite.errors import check_flag, check_whole, warn, without_needless
from scvi_lite.model import query
from scvi_lite.model.base import arguments_of
from scvi_lite.model.questions import CellModel
from scvi_lite.nn.accessibility import default_sizes
from scvi_lite.nn.classifier import Adversary
from scvi_lite.nn.configure import configure
from scvi_lite.nn.multivi import MultiConfig, MULTIVIModule
from scvi_lite.train.plan import AdversarialPlan

if TYPE_CHECKING:
    import pandas as pd

    from scvi_lite._typing import AnnData, Data, MuData

WIDEST = 128  # of hidden layers whose width is not given


class MULTIVI(CellModel):
    """Joint model of expression and accessibility: one latent space, and each modality imputed from the other.

    Parameters
    ----------
    adata
        MuData set up with :meth:`setup_mudata`, or AnnData set up with :meth:`setup_anndata`. Of RNA, chromatin and
        proteins any may be absent, though not both RNA and chromatin.
    n_genes, n_regions
        Of an AnnData, how many of its variables are genes, which come first, and regions. Not needed where
        ``adata.var["modality"]``, as :func:`scvi_lite.data.organize_multiome_anndatas` writes it, tells. Of a MuData,
        to read only so many of the first.
    modality_weights
        Of the mean of both encoders: ``"equal"``, or learned: ``"universal"`` for one weight of each modality,
        ``"cell"`` for weights of each cell.
    modality_penalty
        On encoders that disagree about a cell: ``"Jeffreys"`` for that divergence with the roots of the standard
        deviations, as in scvi-tools; ``"exact-Jeffreys"`` for the divergence itself; ``"MMD"`` for
        the maximum mean discrepancy; or ``"None"``.
    n_hidden
        Width of the hidden layers; by default the square root of the number of regions, or of genes where there are no
        regions, and at most 128.
    n_latent
        Dimensions of the latent space; by default the square root of ``n_hidden``.
    n_layers_encoder, n_layers_decoder
        Number of hidden layers.
    dropout_rate
        Of the encoders.
    region_factors
        Learn a factor of each region; else it is 1.
    gene_likelihood
        Of the genes: ``"zinb"``, ``"nb"`` or ``"poisson"``; or ``"normal"``, for expression that is no counts, of mean
        exp(library) · proportion and a standard deviation for each gene.
    dispersion
        ``"gene"``, ``"gene-batch"``, ``"gene-label"`` or ``"gene-cell"``.
    use_batch_norm, use_layer_norm
        Where: ``"none"``, ``"encoder"``, ``"decoder"`` or ``"both"``.
    latent_distribution
        ``"normal"``, or ``"ln"`` for the logistic normal.
    deeply_inject_covariates
        Covariates enter each hidden layer, not only the first. Where they enter what reads chromatin or proteins, and
        in the decoder of proteins, they always do.
    encode_covariates
        Covariates enter the encoders too.
    fully_paired
        As notebooks of scvi-tools say it. Here it changes nothing: what each cell has is read from its data.
    protein_dispersion
        ``"protein"``, ``"protein-batch"`` or ``"protein-label"``, where there are proteins.
    **absent
        Options of scvi-tools without a use here, which may be None.

    Raises
    ------
    RuntimeError
        If ``adata`` is not set up.
    TypeError, ValueError
        If an option does not exist, or a value is out of range.

    References
    ----------
    Ashuach, Gabitto, Koodli, Saldi, Jordan, Yosef (2023). MultiVI: deep generative model for the integration of
    multimodal data. Nature Methods.

    Examples
    --------
    >>> import scvi_lite
    >>> mdata = scvi_lite.data.synthetic_iid(batch_size=50, n_genes=30, n_regions=40, return_mudata=True)
    >>> where = {"rna_layer": "rna", "atac_layer": "accessibility"}
    >>> MULTIVI.setup_mudata(mdata, batch_key="batch", modalities=where)
    >>> model = MULTIVI(mdata, n_latent=4)
    >>> model.train(max_epochs=1, enable_progress_bar=False)
    >>> model.get_latent_representation().shape
    (100, 4)
    """

    plan = AdversarialPlan(lr=1e-4, weight_decay=1e-3, eps=1e-8, optimizer="AdamW", n_epochs_kl_warmup=50)
    reads_mudata = True

    load_query_data = classmethod(query.load_query_data)
    prepare_query_anndata = staticmethod(query.prepare_query_anndata)
    prepare_query_mudata = staticmethod(query.prepare_query_mudata)
    get_latent_representation = multiome.get_latent_representation
    get_normalized_expression = multiome.get_normalized_expression
    get_normalized_accessibility = accessibility.get_normalized_accessibility
    get_library_size_factors = multiome.get_library_size_factors
    get_protein_foreground_probability = multiome.get_protein_foreground_probability
    get_region_factors = accessibility.get_region_factors
    differential_accessibility = accessibility.differential_accessibility
    minify_adata = minify_mudata = minify.minify_adata
    minified_data_type = property(minify.minified)

    def __init__(
        self,
        adata: Data,
        n_genes: int | None = None,
        n_regions: int | None = None,
        modality_weights: str = "equal",
        modality_penalty: str | None = "Jeffreys",
        n_hidden: int | None = None,
        n_latent: int | None = None,
        n_layers_encoder: int = 2,
        n_layers_decoder: int = 2,
        dropout_rate: float = 0.1,
        region_factors: bool = True,
        gene_likelihood: str = "zinb",
        dispersion: str = "gene",
        use_batch_norm: str = "none",
        use_layer_norm: str = "both",
        latent_distribution: str = "normal",
        deeply_inject_covariates: bool = False,
        encode_covariates: bool = False,
        fully_paired: bool = False,
        protein_dispersion: str = "protein",
        **absent: Any,
    ):
        given = arguments_of(locals()) | {"modality_penalty": str(modality_penalty)}
        super().__init__(adata, given | absent, given)

    def _build(self, adata: Data, registry: Registry, arguments: dict[str, Any]) -> None:
        check_whole(n_layers_encoder=arguments["n_layers_encoder"])
        sizes = {name: arguments[name] for name in ("n_genes", "n_regions")}
        check_whole(least=0, **{name: size for name, size in sizes.items() if size is not None})
        check_flag(fully_paired=arguments["fully_paired"])
        if "peaks" not in registry.fields:
            registry = with_regions(registry, count_genes(adata, arguments["n_genes"], arguments["n_regions"]))
        for name, field in (("n_genes", "x"), ("n_regions", "peaks")):
            registry = first_columns(adata, registry, name, field, arguments[name])
        super()._build(adata, registry, arguments)

    def _make_module(self, arguments: dict[str, Any]) -> MULTIVIModule:
        options = {name: value for name, value in arguments.items() if name not in NOT_OF_THE_NETWORK}
        n_genes, n_regions = len(self._features("x")), len(self._features("peaks"))
        options["n_hidden"], options["n_latent"] = default_sizes(
            arguments["n_hidden"], arguments["n_latent"], min(n_regions or n_genes, WIDEST**2)
        )
        options |= {"n_layers": arguments["n_layers_encoder"], "n_regions": n_regions}
        options["given_depth"] = "depth_n" in self.registry.fields
        config = configure(self.registry, options | {"n_cells": self.registry.n_cells}, MultiConfig)
        measured = self.registry.fields.get("proteins_np", {}).get("measured", [[]])
        config = replace(config, n_genes=n_genes, n_proteins=len(measured[0]))
        return MULTIVIModule(config, torch.tensor(measured) if measured[0] else None)

    @property
    def protein_names(self) -> list[str]:
        """Names of the proteins, in the order the model reads them; none without proteins."""
        return list(self.registry.fields.get("proteins_np", {}).get("names", ()))

    def _minibatches(
        self, adata: Any = None, indices: Any = None, batch_size: int | None = None, with_counts: bool = True
    ) -> Iterator[Batch]:
        for batch in super()._minibatches(adata, indices, batch_size, with_counts):
            is_own = adata is None or adata is self._adata
            yield batch if is_own else replace(batch, row_n=torch.full_like(batch.row_n, -1))

    _region_field = "peaks"

    @property
    def _gene_names(self) -> list[str]:
        return self._features("x") or self._none_of("genes", "no RNA", "rna_layer")

    @property
    def _region_names(self) -> list[str]:
        return self._features("peaks") or self._none_of("regions", "no chromatin", "atac_layer")

    def _features(self, field: str) -> list[str]:
        names, state = self._var_names, self.registry.fields[field]
        if isinstance(names, dict):
            names = names[state["modality"]]
        return names[slice(*state["columns"])] if "columns" in state else names

    def _none_of(self, features: str, without: str, argument: str) -> list[str]:
        warn(
            f"This model has no {features}: it was made with {without}. Where there are such data, make a new model: "
            f"name them in its setup, MULTIVI.setup_mudata(mdata, modalities={{{argument!r}: ..., ...}}), or give "
            "MULTIVI(adata, n_genes=..., n_regions=...) of an AnnData."
        )
        return []

    def train(  # the order of arguments is that of scvi-tools
        self,
        max_epochs: int = 500,
        lr: float = 1e-4,
        accelerator: str = "auto",
        devices: int | list[int] | str = "auto",
        train_size: float | None = None,
        validation_size: float | None = None,
        shuffle_set_split: bool = True,
        batch_size: int = 128,
        weight_decay: float = 1e-3,
        eps: float = 1e-8,
        early_stopping: bool = True,
        early_stopping_patience: int = 50,
        n_steps_kl_warmup: int | None = None,
        n_epochs_kl_warmup: int | None = 50,
        adversarial_mixing: bool = True,
        datasplitter_kwargs: Mapping[str, Any] | None = None,
        plan_kwargs: Mapping[str, Any] | None = None,
        strategy: Any = "auto",
        **trainer_kwargs: Any,
    ) -> None:
        """Train the model: as :meth:`scvi_lite.model.SCVI.train`, with AdamW and other defaults.

        Parameters
        ----------
        max_epochs
            Passes over the training cells.
        lr, weight_decay, eps, n_steps_kl_warmup, n_epochs_kl_warmup
            Options of ``plan_kwargs``, which counts where both are given.
        early_stopping, early_stopping_patience
            Stop when ``early_stopping_monitor`` (``"elbo_validation"``) has not improved for so many epochs.
        adversarial_mixing
            Train a classifier of batches along with the model, which is to fool it: so that batches mix in latent
            space. Where cells have different modalities, name that as the batch.
        plan_kwargs
            See :class:`~scvi_lite.train.plan.AdversarialPlan`.
        accelerator, devices, train_size, validation_size, shuffle_set_split, batch_size, datasplitter_kwargs, strategy
            As for every model.
        **trainer_kwargs
            Every other option of ``lightning.Trainer``, and those of every model.
        """
        given, n_batches = arguments_of(locals()), self.registry.n_batches
        if given.pop("adversarial_mixing") and n_batches > 1:
            given["adversary"] = Adversary(self.module.config.n_latent, n_batches)
        self._fit(given, trainer_kwargs)

    def differential_expression(
        self,
        adata: Data | None = None,
        groupby: str | None = None,
        group1: str | Sequence[str] | None = None,
        group2: str | None = None,
        idx1: Any = None,
        idx2: Any = None,
        mode: str = "change",
        delta: float | None = 0.25,
        batch_size: int | None = None,
        all_stats: bool = True,
        batch_correction: bool = False,
        batchid1: Sequence[str] | None = None,
        batchid2: Sequence[str] | None = None,
        fdr_target: float | Sequence[float] = 0.05,
        silent: bool = False,
        pseudocounts: float | None = 1e-6,
        **options: Any,
    ) -> pd.DataFrame:
        """Which genes differ between populations of cells: as ``differential_expression`` of SCVI, with other defaults.

        Statistics of the counts leave out the cells without RNA; the model's statements do not.
        """
        return differential.differential_expression(self, adata, **arguments_of(locals()), **options)

    @classmethod
    def setup_anndata(
        cls,
        adata: AnnData,
        layer: str | None = None,
        batch_key: str | None = None,
        size_factor_key: str | None = None,
        categorical_covariate_keys: Sequence[str] | None = None,
        continuous_covariate_keys: Sequence[str] | None = None,
        protein_expression_obsm_key: str | None = None,
        protein_names_uns_key: str | None = None,
        labels_key: str | None = None,
    ) -> None:
        """Check the data and note what the model reads from them, in ``adata.uns["scvi_lite"]``.

        Parameters
        ----------
        adata
            Cells × genes and regions, the genes first: :func:`scvi_lite.data.organize_multiome_anndatas` makes it from
            up to three AnnDatas. A cell without any count of genes, or of regions, was not measured for them.
        layer
            Layer that holds the counts; ``adata.X`` by default.
        batch_key, labels_key
            Columns of ``adata.obs``: the batch to correct for, and the cell type (for gene-label dispersion).
        size_factor_key
            Column of positive factors to use instead of the library size of genes.
        categorical_covariate_keys, continuous_covariate_keys
            Columns of further covariates to correct for.
        protein_expression_obsm_key
            Key of ``adata.obsm`` with counts of proteins, if there are some. A protein that is zero in all cells of a
            batch was not measured there.
        protein_names_uns_key
            Key of ``adata.uns`` with their names; by default those of the data frame's columns.

        Raises
        ------
        KeyError
            If a column, a layer or a key does not exist.
        ValueError
            If counts are negative, NaN or infinite, values are missing, or names repeat.
        """
        given = arguments_of(locals())
        fields = [Matrix("x", layer), *columns_of_obs(given)]
        if protein_expression_obsm_key is not None:
            batch = Categorical("batch_n", "batch_key", batch_key)
            fields.append(Proteins("proteins_np", protein_expression_obsm_key, protein_names_uns_key, panels=batch))
        cls._register(adata, fields, given)

    @classmethod
    def setup_mudata(
        cls,
        mdata: MuData,
        rna_layer: str | None = None,
        atac_layer: str | None = None,
        protein_layer: str | None = None,
        batch_key: str | None = None,
        size_factor_key: str | Sequence[str] | None = None,
        categorical_covariate_keys: Sequence[str] | None = None,
        continuous_covariate_keys: Sequence[str] | None = None,
        idx_layer: str | None = None,
        modalities: Mapping[str, str | None] | None = None,
        labels_key: str | None = None,
    ) -> None:
        """Check the data and note what the model reads from them, in ``mdata.uns["scvi_lite"]``.

        Cells are matched by name, whatever their order in each modality. A cell that a modality does not have, or
        that has no count there, was not measured for it.

        Parameters
        ----------
        mdata
            RNA, chromatin and proteins as modalities, or some of them. Their cells may overlap in part, or not at all.
        rna_layer, atac_layer, protein_layer
            Layers that hold the counts; ``X`` by default.
        modalities
            In which modality to find what each argument names:
            ``{"rna_layer": "rna", "atac_layer": "atac", "batch_key": "rna"}``. One of the first two is needed, and
            what is not named is not modelled: proteins are with ``"protein_layer"``. Columns are looked for in
            ``mdata.obs`` by default.
        size_factor_key
            As in :meth:`setup_anndata`; or a list of two, of which the second is the depth of chromatin: the share of
            a cell's accessible regions that is found open, above 0 and up to 1.
        batch_key, labels_key, categorical_covariate_keys, continuous_covariate_keys
            Columns, as in :meth:`setup_anndata`.
        idx_layer
            Has no effect: a cell is known by its row.

        Raises
        ------
        TypeError
            If it is no MuData.
        KeyError
            If a modality, a column or a layer does not exist.
        ValueError
            If counts are negative, NaN or infinite, values are missing or disagree, or names repeat.
        """
        given = arguments_of(locals())
        del given["modalities"], given["idx_layer"]
        without_needless({"idx_layer": idx_layer}, {"idx_layer": "a cell is known by its row"})
        where = read_modalities(mdata, modalities, given)
        x, peaks = two_matrices(mdata, rna_layer, atac_layer, where)
        keys = [size_factor_key] if size_factor_key is None or isinstance(size_factor_key, str) else size_factor_key
        if not 1 <= len(keys) <= 2:
            raise ValueError(f"size_factor_key={keys!r}: give a column for RNA, or [one for RNA, one for chromatin].")
        fields = [x, peaks, *columns_of_obs(given | {"size_factor_key": keys[0]}, where)]
        if len(keys) == 2:
            fields.append(depth_field(mdata, keys[1], where["size_factor_key"]))
        if (modality := where["protein_layer"]) is not None:
            batch = Categorical("batch_n", "batch_key", batch_key, where["batch_key"])
            fields.append(Proteins("proteins_np", layer=protein_layer, modality=modality, panels=batch))
        cls._register(mdata, fields, given | {"modalities": where})
        if where["atac_layer"] is not None:
            accessibility.note_counts(peaks.read(mdata, peaks.state(layer=atac_layer)))


NOT_OF_THE_NETWORK = (
    "n_genes", "n_regions", "n_hidden", "n_latent", "n_layers_encoder", "fully_paired",
)  # fmt: skip
