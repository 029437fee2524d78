"""totalVI: RNA and surface proteins of the same cells (Gayoso et al. 2021, doi:10.1038/s41592-020-01050-x)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from scvi_lite.analysis import importance, joint, latent, minify, proteins
from scvi_lite.errors import as_options, check_flag
from scvi_lite.model import query, totalvi_setup
from scvi_lite.model.base import arguments_of
from scvi_lite.model.questions import CellModel
from scvi_lite.nn.classifier import Adversary
from scvi_lite.nn.configure import configure, library_prior
from scvi_lite.nn.protein import background_prior
from scvi_lite.nn.total import TotalConfig, TOTALVIModule
from scvi_lite.train.plan import AdversarialPlan

if TYPE_CHECKING:
    from scvi_lite._typing import AnnData, MuData

MANY_PROTEINS = 10  # above, the prior of the background is taken from the data
NAMES = {"n_layers": "n_layers_encoder", "dropout_rate": "dropout_rate_encoder", "dispersion": "gene_dispersion"}
NETWORK = (
    "n_hidden", "n_layers_encoder", "n_layers_decoder", "dropout_rate_encoder", "dropout_rate_decoder",
    "log_variational", "encode_covariates", "deeply_inject_covariates", "use_observed_lib_size", "use_batch_norm",
    "use_layer_norm",
)  # fmt: skip


@dataclass(frozen=True)
class TotalPlan(AdversarialPlan):
    """Options of the training of totalVI.

    Attributes
    ----------
    pro_recons_weight
        Weight of the proteins in the loss, beside genes of weight 1.
    anneal_proteins
        Let the weight of the proteins grow along with that of the KL terms, as scvi-tools does. Else they have their
        full weight from the beginning, as in the paper.
    """

    pro_recons_weight: float = 1.0
    anneal_proteins: bool = True

    of_loss: ClassVar[tuple[str, ...]] = ("pro_recons_weight", "anneal_proteins")


class TOTALVI(CellModel):
    """Total variational inference: one latent space of RNA and proteins, without the background of the antibodies.

    Parameters
    ----------
    adata
        AnnData set up with :meth:`setup_anndata`, or MuData set up with :meth:`setup_mudata`.
    n_latent
        Dimensions of the latent space.
    gene_dispersion
        Inverse dispersion of the genes: one for each ``"gene"``, ``"gene-batch"`` or ``"gene-label"``.
    protein_dispersion
        Of the proteins: ``"protein"``, ``"protein-batch"`` or ``"protein-label"``.
    gene_likelihood
        ``"nb"``, ``"zinb"`` or ``"poisson"``. scvi-tools scores any other name than ``"zinb"`` as ``"nb"``.
    latent_distribution
        ``"normal"``, or ``"ln"`` for the logistic normal: points on a simplex.
    empirical_protein_background_prior
        Take the prior of the background from the data, by a mixture of two normals in each of some cells; else it
        begins at a fixed place. Both are learnt further. None: for more than 10 proteins.
    override_missing_proteins
        Take zeros as counts where a protein is zero in all cells of a batch (or panel). Else it was not measured
        there: it is not scored, and is imputed.
    **network_options
        ``n_hidden`` (256), ``n_layers_encoder`` (2), ``n_layers_decoder`` (1), ``dropout_rate_encoder`` and
        ``dropout_rate_decoder`` (0.2), ``log_variational``, ``encode_covariates`` (True),
        ``deeply_inject_covariates``, ``use_observed_lib_size``, ``use_batch_norm`` and ``use_layer_norm`` (``"none"``,
        ``"encoder"``, ``"decoder"``, ``"both"``).

    Raises
    ------
    RuntimeError
        If the data are not set up.
    TypeError, ValueError
        If an option does not exist, or a value is out of range.

    References
    ----------
    Gayoso, Steier, Lopez, Regier, Nazor, Streets, Yosef (2021). Joint probabilistic modeling of single-cell multi-omic
    data with totalVI. Nature Methods.

    Examples
    --------
    >>> import scvi_lite
    >>> adata = scvi_lite.data.synthetic_iid(batch_size=50, n_genes=20, n_proteins=12)
    >>> TOTALVI.setup_anndata(adata, protein_expression_obsm_key="protein_expression", batch_key="batch")
    >>> model = TOTALVI(adata, n_latent=5, n_hidden=16)
    >>> model.train(max_epochs=1, enable_progress_bar=False)
    >>> rna, protein = model.get_normalized_expression()
    >>> rna.shape, protein.shape
    ((100, 20), (100, 12))
    """

    plan = TotalPlan(lr=4e-3, n_epochs_kl_warmup=None, reduce_lr_on_plateau=True)
    reads_mudata = True

    setup_anndata = classmethod(totalvi_setup.setup_anndata)
    setup_mudata = classmethod(totalvi_setup.setup_mudata)
    load_query_data = classmethod(query.load_query_data)
    prepare_query_anndata = staticmethod(query.prepare_query_anndata)
    prepare_query_mudata = staticmethod(query.prepare_query_mudata)
    get_latent_representation = latent.get_latent_representation
    get_latent_library_size = latent.get_latent_library_size
    get_normalized_expression = proteins.get_normalized_expression
    get_protein_foreground_probability = proteins.get_protein_foreground_probability
    get_protein_background_mean = proteins.get_protein_background_mean
    get_likelihood_parameters = joint.get_likelihood_parameters
    posterior_predictive_sample = joint.posterior_predictive_sample
    get_feature_correlation_matrix = joint.get_feature_correlation_matrix
    get_importance_weights = importance.get_importance_weights
    differential_expression = proteins.differential_expression
    minify_adata = minify_mudata = minify.minify_adata
    minified_data_type = property(minify.minified)

    def __init__(
        self,
        adata: AnnData | MuData,
        n_latent: int = 20,
        gene_dispersion: str = "gene",
        protein_dispersion: str = "protein",
        gene_likelihood: str = "nb",
        latent_distribution: str = "normal",
        empirical_protein_background_prior: bool | None = None,
        override_missing_proteins: bool = False,
        **network_options: Any,
    ):
        given = arguments_of(locals())
        super().__init__(adata, given | network_options, (*given, *NETWORK))

    def _make_module(self, arguments: dict[str, Any]) -> TOTALVIModule:
        options = dict(arguments)
        for name, theirs in NAMES.items():
            if theirs in options:
                options[name] = options.pop(theirs)
        empirical = options.pop("empirical_protein_background_prior", None)
        override = options.pop("override_missing_proteins", False)
        check_flag(
            override_missing_proteins=override, empirical_protein_background_prior=empirical is None or empirical
        )
        measured_qp = torch.tensor(self.registry.fields["proteins_np"]["measured"])
        n_panels, n_proteins = measured_qp.shape
        config = configure(self.registry, options, TotalConfig, n_proteins=n_proteins, n_panels=n_panels)
        prior = None
        if (n_proteins > MANY_PROTEINS) if empirical is None else empirical:
            panels = "panel_n" if "panel_n" in self.registry.fields else "batch_n"
            y_np, panel_n = (self.registry.read(self.adata, name) for name in ("proteins_np", panels))
            prior = background_prior(y_np, panel_n, n_panels)
        return TOTALVIModule(
            config,
            torch.ones_like(measured_qp) if override else measured_qp,
            library_prior(self.adata, self.registry, config),
            prior,
        )

    @property
    def protein_names(self) -> list[str]:
        """Names of the proteins, in the order the model reads them."""
        return list(self.registry.fields["proteins_np"]["names"])

    def train(
        self,
        max_epochs: int | None = None,
        lr: float = 4e-3,
        accelerator: str = "auto",
        devices: int | list[int] | str = "auto",
        train_size: float | None = None,
        validation_size: float | None = None,
        shuffle_set_split: bool = True,
        batch_size: int = 256,
        early_stopping: bool = True,
        check_val_every_n_epoch: int | None = None,
        reduce_lr_on_plateau: bool = True,
        n_steps_kl_warmup: int | None = None,
        n_epochs_kl_warmup: int | None = None,
        adversarial_classifier: bool | None = None,
        datasplitter_kwargs: Mapping[str, Any] | None = None,
        plan_kwargs: Mapping[str, Any] | None = None,
        external_indexing: Sequence[Any] | None = None,
        strategy: Any = "auto",
        **trainer_kwargs: Any,
    ) -> None:
        """Train the model: as :meth:`scvi_lite.model.SCVI.train`, with other defaults.

        Parameters
        ----------
        lr, reduce_lr_on_plateau, n_steps_kl_warmup, n_epochs_kl_warmup
            Options of ``plan_kwargs``, which counts where both are given. Without a length of the KL warm-up, it takes
            three quarters as many minibatches as there are cells.
        adversarial_classifier
            Train against a classifier that tells batches apart in latent space. None: where proteins are missing from
            some batches.
        external_indexing
            As in ``datasplitter_kwargs``.
        plan_kwargs
            See :class:`~scvi_lite.model.totalvi.TotalPlan`: also ``scale_adversarial_loss``, ``pro_recons_weight`` and
            ``anneal_proteins``.
        max_epochs, accelerator, devices, train_size, validation_size, shuffle_set_split, batch_size, early_stopping
            As for every model.
        check_val_every_n_epoch, datasplitter_kwargs, strategy
            As for every model.
        **trainer_kwargs
            Every other option of ``lightning.Trainer``, and those of every model.
        """
        given, options = arguments_of(locals()), as_options("plan_kwargs", plan_kwargs)
        if all((given | options)[name] is None for name in ("n_steps_kl_warmup", "n_epochs_kl_warmup")):
            options["n_steps_kl_warmup"] = max(1, int(0.75 * self.adata.n_obs))
        if check_val_every_n_epoch is None:
            del given["check_val_every_n_epoch"]
        if (rows := given.pop("external_indexing")) is not None:
            given["datasplitter_kwargs"] = {**(datasplitter_kwargs or {}), "external_indexing": rows}
        given |= {"plan_kwargs": options, "adversary": self._adversary(given.pop("adversarial_classifier"))}
        self._fit(given, trainer_kwargs)

    def _adversary(self, wanted: bool | None) -> Adversary | None:
        config = self.module.config
        if wanted is None:
            wanted = config.n_batches > 1 and not bool(self.module.measured_qp.all())
        return Adversary(config.n_latent, config.n_batches) if wanted else None
