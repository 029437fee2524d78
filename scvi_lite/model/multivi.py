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
from scvi_lite.data.regions import count_genes, first_columns, with_regions
from scvi_lite.data.registry import Registry
from scvi_lite.errors import check_flag, check_whole, warn
from scvi_lite.model import multivi_setup, query
from scvi_lite.model.base import arguments_of
from scvi_lite.model.questions import CellModel
from scvi_lite.nn.accessibility import default_sizes
from scvi_lite.nn.classifier import Adversary
from scvi_lite.nn.configure import configure
from scvi_lite.nn.multivi import MultiConfig, MULTIVIModule
from scvi_lite.train.plan import AdversarialPlan

if TYPE_CHECKING:
    import pandas as pd

    from scvi_lite._typing import Data

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

    setup_anndata = classmethod(multivi_setup.setup_anndata)
    setup_mudata = classmethod(multivi_setup.setup_mudata)
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
        n_genes, n_regions = len(self._features("x")), len(self._features("peaks"))
        options, n_read = dict(arguments), min(n_regions or n_genes, WIDEST**2)  # its root is the default width
        del options["n_genes"], options["fully_paired"]
        options["n_hidden"], options["n_latent"] = default_sizes(options["n_hidden"], options["n_latent"], n_read)
        options |= {"n_layers": options.pop("n_layers_encoder"), "n_regions": n_regions}
        options |= {"n_cells": self.registry.n_cells, "given_depth": "depth_n" in self.registry.fields}
        config = configure(self.registry, options, MultiConfig)
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
