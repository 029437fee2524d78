"""DestVI: which cell types make up a spot of tissue, and in which states they are there.

Lopez et al. 2022, doi:10.1038/s41587-022-01272-8
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Self

from scvi_lite.analysis import spots
from scvi_lite.data.fields import Matrix, columns_of_obs
from scvi_lite.data.genes import match_genes
from scvi_lite.data.registry import find, setups_of
from scvi_lite.errors import check_options, listing, without_absent
from scvi_lite.model.base import Model, arguments_of
from scvi_lite.model.reference import Reference, check_reference
from scvi_lite.nn.deconvolution import SpotConfig, SpotModule
from scvi_lite.train.plan import Plan

if TYPE_CHECKING:
    from scvi_lite._typing import AnnData, CondSCVI

NETWORK_OPTIONS = (
    "amortization", "prior_mode", "n_states_per_label", "add_celltypes", "augmentation", "n_samples_augmentation",
    "dropout_amortization", "eps_v", "n_latent_amortization",
)  # fmt: skip
ABSENT = {"dropout_decoder": "the decoder of the reference is held, without dropout"}


@dataclass(frozen=True)
class DestVIPlan(Plan):
    """Options of the training.

    Attributes
    ----------
    reconst_weight
        Weight of the log-likelihood of the counts.
    ct_sparsity_weight
        Of the entropy of the proportions of a spot: fewer cell types.
    eta_reg
        Of what the extra cell types take, counted 128 times, as scvi-tools sums it over a minibatch.
    beta_reg
        Of the standard normal prior of the genes' shift between single cells and spots.
    weighting_augmentation
        Of the cost of spots mixed with simulated ones, a KL in nats.
    weighting_smoothing
        Of the KL of the proportions of a spot from those of its neighbourhood, where there is a ``smoothed_layer``.
    weighting_kl_latent
        Of the KL of the latent space that the networks read, with ``n_latent_amortization``.
    """

    lr: float = 3e-3
    n_epochs_kl_warmup: int | None = 200
    ct_sparsity_weight: float = 2.0
    weighting_augmentation: float = 1.0
    weighting_smoothing: float = 100.0
    eta_reg: float = 1.0
    beta_reg: float = 1.0
    weighting_kl_latent: float = 0.001
    reconst_weight: float = 3.0

    of_loss: ClassVar[tuple[str, ...]] = (
        "ct_sparsity_weight", "weighting_augmentation", "weighting_smoothing", "eta_reg", "beta_reg",
        "weighting_kl_latent", "reconst_weight",
    )  # fmt: skip


class DestVI(Model):
    """Deconvolution of spatial transcriptomics: proportions of cell types in each spot, and the state of each type.

    Made by :meth:`from_rna_model`.

    Parameters
    ----------
    st_adata
        AnnData of spots, set up with :meth:`setup_anndata`, with the genes of the reference in its order.
    reference
        What a model of single cells knows.
    **network_options
        ``amortization``: a network finds ``"proportion"`` (of cell types), ``"latent"`` (states), ``"both"`` or
        ``"none"``; what it does not find are parameters of each spot. ``prior_mode``: ``"mog"``, a cell type is in a
        mixture of ``n_states_per_label`` (3) states in a spot, whose prior counts by the share of the type; or
        ``"normal"``, in one state. ``add_celltypes``: extra cell types that the reference lacks (1). ``augmentation``:
        train the network of proportions on spots mixed with simulated ones too (off), ``n_samples_augmentation`` (2)
        for each. ``dropout_amortization`` of the network of states (0.03). ``eps_v``: in training each cell type counts
        by so much more than its share (0.002). ``n_latent_amortization``: dimensions of a latent space of the spots
        which the networks read instead of the counts.

    Raises
    ------
    RuntimeError
        If ``st_adata`` is not set up.
    TypeError, ValueError
        If an option does not exist, or a value is out of range.

    References
    ----------
    Lopez, Li, Keren-Shaul, Boyeau, Kedmi, Pilzer, Jelinski, Yofe, David, Wagner, Ergen, Addadi, Golani, Ronchese,
    Jordan, Amit, Yosef (2022). DestVI identifies continuums of cell types in spatial transcriptomics data. Nature
    Biotechnology.

    Examples
    --------
    >>> import scvi_lite
    >>> cells = scvi_lite.data.synthetic_iid(batch_size=50, n_genes=20)
    >>> spots = scvi_lite.data.synthetic_iid(batch_size=20, n_genes=20)
    >>> scvi_lite.model.CondSCVI.setup_anndata(cells, labels_key="labels")
    >>> sc_model = scvi_lite.model.CondSCVI(cells)
    >>> sc_model.train(max_epochs=1, enable_progress_bar=False)
    >>> DestVI.setup_anndata(spots)
    >>> model = DestVI.from_rna_model(spots, sc_model)
    >>> model.train(max_epochs=1, enable_progress_bar=False)
    >>> model.get_proportions().columns.tolist()
    ['label_0', 'label_1', 'label_2']
    """

    plan = DestVIPlan()

    get_proportions = spots.get_proportions
    get_gamma = spots.get_gamma
    get_scale_for_ct = spots.get_scale_for_ct
    get_expression_for_ct = spots.get_expression_for_ct
    get_latent_representation = spots.get_latent_representation
    get_fine_celltypes = spots.get_fine_celltypes

    def __init__(self, st_adata: AnnData, reference: Reference, **network_options: Any):
        if not isinstance(reference, Reference):
            raise TypeError("A DestVI is made from a model of single cells: DestVI.from_rna_model(st_adata, sc_model).")
        network_options = without_absent("DestVI", network_options, ABSENT)
        super().__init__(st_adata, reference.sizes | network_options, (*reference.sizes, *NETWORK_OPTIONS))
        reference.fill(self.module)

    def _make_module(self, arguments: dict[str, Any]) -> SpotModule:
        options = dict(arguments)
        n_labels, r = len(options.pop("cell_type_mapping")), self.registry
        check_options("DestVI", options, [field.name for field in fields(SpotConfig)])  # of a saved model
        sizes = dict(n_genes=r.n_features, n_spots=self.adata.n_obs, n_batches=r.n_batches, n_labels=n_labels)
        config = SpotConfig(**sizes, **options)
        if "smoothed" in r.fields and not config.amortizes_proportions:
            raise ValueError(
                f"amortization={config.amortization!r}: smoothed_layer needs a network that finds the proportions of "
                "a spot and of its neighbourhood. Make the model with amortization='both' or 'proportion'."
            )
        return SpotModule(config)

    @property
    def cell_type_mapping(self) -> list[str]:
        """Names of the cell types, in the order of their codes."""
        return list(self._arguments["cell_type_mapping"])

    @classmethod
    def from_rna_model(
        cls,
        st_adata: AnnData,
        sc_model: CondSCVI,
        vamp_prior_p: int = 15,
        anndata_setup_kwargs: Mapping[str, Any] | None = None,
        **network_options: Any,
    ) -> Self:
        """A model of spots from a trained model of single cells.

        Parameters
        ----------
        st_adata
            AnnData of spots, with raw counts of the genes of ``sc_model``. In another order, or with further genes, a
            copy with those genes is used.
        sc_model
            Trained :class:`~scvi_lite.model.CondSCVI`, with any prior.
        vamp_prior_p
            Components of the prior of each cell type, where that of ``sc_model`` is no mixture
            (:meth:`~scvi_lite.model.CondSCVI.get_vamp_prior`).
        anndata_setup_kwargs
            Options of :meth:`setup_anndata`, which is called with them; it need not have been called before.
        **network_options
            See :class:`DestVI`.

        Raises
        ------
        TypeError
            If ``sc_model`` is of another class, or an option does not exist.
        RuntimeError
            If ``sc_model`` is not trained.
        ValueError
            If genes of ``sc_model`` are missing in ``st_adata``.
        """
        check_reference(sc_model)
        setup = anndata_setup_kwargs
        if setup is None and cls.__name__ in setups_of(st_adata):
            setup = find(st_adata, cls.__name__).setup_args
        genes = sc_model.get_var_names()
        if missing := sorted(set(genes) - set(st_adata.var_names)):
            raise ValueError(
                f"st_adata lacks {len(missing)} of the {len(genes)} genes of sc_model: {listing(missing)}. Train "
                "sc_model on the genes that both have: cells[:, cells.var_names.isin(st_adata.var_names)].copy()"
            )
        st_adata = match_genes(st_adata, genes)
        cls.setup_anndata(st_adata, **(setup or {}))
        return cls(st_adata, Reference.of(sc_model, vamp_prior_p), **network_options)

    def train(  # the order of arguments is that of scvi-tools
        self,
        max_epochs: int = 2000,
        lr: float = 0.003,
        accelerator: str = "auto",
        devices: int | list[int] | str = "auto",
        train_size: float = 1.0,
        validation_size: float | None = None,
        shuffle_set_split: bool = True,
        batch_size: int | None = None,
        n_epochs_kl_warmup: int | None = 200,
        datasplitter_kwargs: Mapping[str, Any] | None = None,
        plan_kwargs: Mapping[str, Any] | None = None,
        **trainer_kwargs: Any,
    ) -> None:
        """Train the model, by default on all spots; as :meth:`scvi_lite.model.SCVI.train`, but for what follows.

        Parameters
        ----------
        max_epochs, lr
            Passes over the spots, and learning rate.
        train_size
            Below 1 with ``amortization="both"`` alone: else spots that are not trained on would keep random parameters.
        n_epochs_kl_warmup
            Epochs in which the weight of the prior of the states, and of the penalties on proportions, grows to 1.
        plan_kwargs
            Options of :class:`DestVIPlan`, such as ``ct_sparsity_weight`` and ``eta_reg``, and those of all plans.

        Raises
        ------
        TypeError, ValueError
            If an option does not exist, a value is out of range, or spots are held out that have parameters of their
            own.
        """
        given, amortization = arguments_of(locals()), self.module.config.amortization
        if amortization != "both" and (train_size != 1 or trainer_kwargs.get("early_stopping")):
            raise ValueError(
                f"train_size={train_size!r}: this DestVI (amortization={amortization!r}) keeps parameters of each "
                "spot, and those of spots that are held out would stay random. Train on all, with train_size=1 and "
                "without early_stopping, or make the model with amortization='both'."
            )
        self._fit(given, trainer_kwargs)

    def _check(self, adata: AnnData | None) -> AnnData:
        """Spots that fit the model; where it keeps parameters of each spot, only its own spots do."""
        checked = super()._check(adata)
        own = self.module.config.amortization == "both" or checked is self._adata
        if not own and not checked.obs_names.equals(self._adata.obs_names):
            raise ValueError(
                f"This DestVI keeps parameters of each of its {self._adata.n_obs} spots (amortization="
                f"{self.module.config.amortization!r}) and knows no others. For other spots, make a new model."
            )
        return checked

    # Setup ------------------------------------------------------------------------------------------------------------

    @classmethod
    def setup_anndata(
        cls, adata: AnnData, layer: str | None = None, smoothed_layer: str | None = None, batch_key: str | None = None
    ) -> None:
        """Check the data and note what the model reads from them, in ``adata.uns["scvi_lite"]``.

        Parameters
        ----------
        adata
            Raw counts of spots × genes: sparse, dense or backed.
        layer
            Layer that holds the counts; ``adata.X`` by default.
        smoothed_layer
            Layer that holds the counts of the neighbourhood of each spot, such as means over its neighbours. The
            proportions of a spot are then drawn towards those which the network finds there: see
            ``weighting_smoothing`` of :class:`DestVIPlan`.
        batch_key
            Column of ``adata.obs``: the batch, as of several slices.

        Raises
        ------
        KeyError
            If a column or layer does not exist.
        ValueError
            If counts are negative, NaN or infinite, values are missing, or names repeat.
        """
        given = arguments_of(locals())
        read = [Matrix("x", layer), *columns_of_obs(given)]
        if smoothed_layer is not None:
            read.append(Matrix("smoothed", smoothed_layer, counts=False))
        cls._register(adata, read, given)
