"""DestVI: which cell types make up a spot of tissue, and in which states they are there.

Lopez et al. 2022, doi:10.1038/s41587-022-01272-8
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from numbers import Real
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import Tensor

from scvi_lite.analysis.inputs import minibatch_size, to_numpy
from scvi_lite.data.fields import Categorical, Categoricals, Continuouses, Matrix
from scvi_lite.data.genes import match_genes
from scvi_lite.data.registry import find, setups_of
from scvi_lite.errors import StateError, UnknownKeyError, as_options, check_options, listing, unknown
from scvi_lite.model.base import Model
from scvi_lite.model.condscvi import CondSCVI
from scvi_lite.nn.deconvolution import SpotConfig, SpotModule, Spots
from scvi_lite.train.plan import Plan

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData
    from scipy.sparse import csr_matrix

    from scvi_lite.data.batch import Batch

NETWORK_OPTIONS = (
    "amortization",
    "prior_mode",
    "n_states_per_label",
    "add_celltypes",
    "augmentation",
    "n_samples_augmentation",
    "dropout_amortization",
    "n_latent_amortization",
)
WEIGHTS = (
    "ct_sparsity_weight",
    "weighting_augmentation",
    "eta_reg",
    "beta_reg",
    "weighting_kl_latent",
    "reconst_weight",
)


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
    weighting_kl_latent
        Of the KL of the latent space that the networks read, with ``n_latent_amortization``.
    """

    lr: float = 3e-3
    n_epochs_kl_warmup: int | None = 200
    ct_sparsity_weight: float = 2.0
    weighting_augmentation: float = 1.0
    eta_reg: float = 1.0
    beta_reg: float = 1.0
    weighting_kl_latent: float = 0.001
    reconst_weight: float = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in WEIGHTS:
            if not (isinstance(getattr(self, name), Real) and getattr(self, name) >= 0):
                raise ValueError(f"{name}={getattr(self, name)!r}: a number of zero or more is needed.")

    @property
    def loss_options(self) -> dict[str, Any]:
        """The weights of the terms of the loss."""
        return {name: getattr(self, name) for name in WEIGHTS}


@dataclass
class Reference:
    """What DestVI takes over from a trained :class:`~scvi_lite.model.CondSCVI`."""

    sizes: dict[str, Any]  #: names of the cell types, and sizes of the networks
    state: dict[str, Tensor]  #: decoder, dispersion, prior of each cell type

    @classmethod
    def of(cls, sc_model: CondSCVI, p: int) -> Reference:
        """From the model of the single cells; ``p`` components of the prior, where the model has no mixture."""
        module, prior = sc_model.module, sc_model.get_vamp_prior(p=p)
        theirs = {name: value.detach().cpu() for name, value in module.state_dict().items()}
        state = {name: value for name, value in theirs.items() if name.startswith("decoder.")}
        state |= {
            "log_theta": theirs["log_theta"],
            "prior_loc_lpk": torch.from_numpy(prior["mean_vprior"]),
            "prior_var_lpk": torch.from_numpy(prior["var_vprior"]),
            "prior_weight_lp": torch.from_numpy(prior["weights_vprior"]),
        }
        sizes = {
            "cell_type_mapping": [str(name) for name in sc_model.registry.categories("label_n")],
            "n_hidden": module.config.n_hidden,
            "n_latent": module.config.n_latent,
            "n_layers": module.config.n_layers,
            "n_components": prior["mean_vprior"].shape[1],
            "batch_embedding_dim": module.config.batch_embedding_dim,
        }
        return cls(sizes, state | {"batch_embedding": theirs["batch_embedding.weight"].mean(0)})

    def fill(self, module: SpotModule) -> None:
        """Put its weights into a new module; each batch of spots starts from the mean of the reference's batches."""
        state = module.state_dict() | self.state
        mean_d = state.pop("batch_embedding")
        state["batch_embedding.weight"] = mean_d.expand_as(module.batch_embedding.weight)
        module.load_state_dict(state)


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
        for each. ``dropout_amortization`` of the network of states (0.03). ``n_latent_amortization``: dimensions of a
        latent space of the spots which the networks read instead of the counts.

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

    def __init__(self, st_adata: AnnData, reference: Reference, **network_options: Any):
        if not isinstance(reference, Reference):
            raise TypeError("A DestVI is made from a model of single cells: DestVI.from_rna_model(st_adata, sc_model).")
        check_options("DestVI", network_options, NETWORK_OPTIONS)
        super().__init__(st_adata, reference.sizes | network_options)
        reference.fill(self.module)

    def _make_module(self, arguments: dict[str, Any]) -> SpotModule:
        options = dict(arguments)
        n_labels, r = len(options.pop("cell_type_mapping")), self.registry
        check_options("DestVI", options, [field.name for field in fields(SpotConfig)])
        sizes = dict(n_genes=r.n_features, n_spots=self.adata.n_obs, n_batches=r.n_batches, n_labels=n_labels)
        return SpotModule(SpotConfig(**sizes, **options))

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
        if not isinstance(sc_model, CondSCVI):
            raise TypeError(f"sc_model is a {type(sc_model).__name__}; a trained CondSCVI is needed.")
        if not sc_model.is_trained:
            raise StateError("sc_model is not trained, so there is nothing to take over. Call sc_model.train() first.")
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
        """Train the model, by default on all spots.

        Parameters
        ----------
        max_epochs
            Passes over the spots.
        lr
            Learning rate.
        n_epochs_kl_warmup
            Epochs in which the weight of the prior of the states, and of the penalties on proportions, grows to 1.
        plan_kwargs
            Options of :class:`DestVIPlan`, such as ``ct_sparsity_weight`` and ``eta_reg``, and those of all plans.
        accelerator, devices, train_size, validation_size, shuffle_set_split, batch_size, datasplitter_kwargs
            As in :meth:`scvi_lite.model.SCVI.train`. Spots that are not trained on keep random parameters where
            ``amortization`` is not ``"both"``.
        **trainer_kwargs
            ``early_stopping``, ``strategy`` and all others, as in :meth:`scvi_lite.model.SCVI.train`.

        Raises
        ------
        TypeError, ValueError
            If an option does not exist, or a value is out of range.
        """
        self._fit(
            max_epochs=max_epochs,
            accelerator=accelerator,
            devices=devices,
            train_size=train_size,
            validation_size=validation_size,
            shuffle_set_split=shuffle_set_split,
            batch_size=batch_size,
            datasplitter_kwargs=datasplitter_kwargs,
            plan_kwargs={"lr": lr, "n_epochs_kl_warmup": n_epochs_kl_warmup} | as_options("plan_kwargs", plan_kwargs),
            **trainer_kwargs,
        )

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

    # Answers ----------------------------------------------------------------------------------------------------------

    @property
    def cell_type_mapping(self) -> list[str]:
        """Names of the cell types, in the order of their codes."""
        return list(self._arguments["cell_type_mapping"])

    def _spots(self, indices: Any, batch_size: int | None, numbers_per_spot: int = 1) -> Iterator[tuple[Batch, Spots]]:
        """Minibatches, and what their spots are made of."""
        self._warn_if_untrained()
        for batch in self._minibatches(None, indices, minibatch_size(batch_size, numbers_per_spot)):
            yield batch, self.module.infer(batch)

    def _frame(self, value: np.ndarray, indices: Any, columns: Any) -> pd.DataFrame:
        import pandas as pd

        return pd.DataFrame(value, self.adata.obs_names[self._rows(self.adata, indices)], columns)

    def _code(self, label: str) -> int:
        if str(label) not in self.cell_type_mapping:
            message = unknown("label", label, self.cell_type_mapping, "a cell type of the reference", "Cell types")
            raise UnknownKeyError(message)
        return self.cell_type_mapping.index(str(label))

    def get_proportions(
        self,
        keep_additional: bool = False,
        normalize: bool = True,
        indices: Any = None,
        batch_size: int | None = None,
    ) -> pd.DataFrame:
        """Share of each cell type in each spot.

        Parameters
        ----------
        keep_additional
            Give the extra cell types too, as ``additional_0``, ...
        normalize
            Without the extra types, scale the others so that they sum to 1.
        indices
            Row numbers, in any order, or a mask; all spots by default.
        batch_size
            Spots in a minibatch.

        Returns
        -------
        pandas.DataFrame
            Spots × cell types, float32.

        Raises
        ------
        IndexError
            If ``indices`` has rows that do not exist.
        """
        value_nt = to_numpy([spots.proportion_nt for _, spots in self._spots(indices, batch_size)])
        names = self.cell_type_mapping
        n_extra = value_nt.shape[1] - len(names)
        if keep_additional:
            return self._frame(value_nt, indices, names + [f"additional_{i}" for i in range(n_extra)])
        value_nl = value_nt[:, : len(names)]
        return self._frame(value_nl / value_nl.sum(1, keepdims=True) if normalize else value_nl, indices, names)

    def get_gamma(
        self, indices: Any = None, batch_size: int | None = None, return_numpy: bool = False
    ) -> dict[str, pd.DataFrame] | np.ndarray:
        """Place of each cell type of each spot in the latent space of the reference, the mean over its states.

        Parameters
        ----------
        indices, batch_size
            As in :meth:`get_proportions`.
        return_numpy
            Give one array.

        Returns
        -------
        dict or numpy.ndarray
            For each cell type spots × latent dimensions; or (spots, latent dimensions, cell types).
        """
        z_nlk = to_numpy([spots.z_nlk for _, spots in self._spots(indices, batch_size)])
        if return_numpy:
            return z_nlk.transpose(0, 2, 1)
        columns = [str(k) for k in range(z_nlk.shape[-1])]
        return {name: self._frame(z_nlk[:, i], indices, columns) for i, name in enumerate(self.cell_type_mapping)}

    def get_scale_for_ct(self, label: str, indices: Any = None, batch_size: int | None = None) -> pd.DataFrame:
        """Expected expression of a cell type in the state it has in each spot, as proportions of genes.

        Parameters
        ----------
        label
            Name of the cell type.
        indices, batch_size
            As in :meth:`get_proportions`. Where the share of the type is small, its state is that of the prior.

        Returns
        -------
        pandas.DataFrame
            Spots × genes; rows sum to 1.

        Raises
        ------
        KeyError
            If the cell type is not in the reference; the nearest is named.
        """
        module, c = self.module, self.module.config
        label_l = torch.tensor([self._code(label)], device=self.device)
        parts = [
            module.expression(spots, batch, label_l)[:, 0]
            for batch, spots in self._spots(indices, batch_size, c.n_states * c.n_genes)
        ]
        return self._frame(to_numpy(parts), indices, self.get_var_names())

    def get_expression_for_ct(
        self, label: str, indices: Any = None, batch_size: int | None = None, return_sparse_array: bool = False
    ) -> pd.DataFrame | csr_matrix:
        """Counts of each spot that come from a cell type, in expectation: its share of the model's mean, gene by gene.

        Parameters
        ----------
        label, indices, batch_size
            As in :meth:`get_scale_for_ct`.
        return_sparse_array
            Give a sparse matrix, which makes no dense one.

        Returns
        -------
        pandas.DataFrame or scipy.sparse.csr_matrix
            Spots × genes. Summed over all cell types, and the extra ones, they are the counts.

        Raises
        ------
        KeyError
            If the cell type is not in the reference; the nearest is named.
        """
        from scipy import sparse

        module, c, code = self.module, self.module.config, self._code(label)
        label_l, parts = torch.tensor([code], device=self.device), []
        for batch, spots in self._spots(indices, batch_size, c.n_states * c.n_labels * c.n_genes):
            own_ng = spots.proportion_nt[:, code, None] * module.expression(spots, batch, label_l)[:, 0]
            share_ng = own_ng / module.mean(spots, batch)
            x = batch.x
            value_m = x.value_m * share_ng[x.row_m, x.col_m]
            coordinates = (part.cpu().numpy() for part in (value_m, x.col_m, x.start))
            parts.append(sparse.csr_matrix(tuple(coordinates), shape=(batch.n_cells, c.n_genes)))
        counts = sparse.vstack(parts, format="csr")
        return counts if return_sparse_array else self._frame(counts.toarray(), indices, self.get_var_names())

    def get_latent_representation(
        self,
        adata: AnnData | None = None,
        indices: Any = None,
        give_mean: bool = True,
        batch_size: int | None = None,
        return_dist: bool = False,
    ) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
        """Position of each spot in the latent space that the networks read, with ``n_latent_amortization``.

        Parameters
        ----------
        adata, indices, give_mean, batch_size, return_dist
            As in :meth:`scvi_lite.model.SCVI.get_latent_representation`.

        Returns
        -------
        numpy.ndarray or tuple
            (n, k) float32; with ``return_dist`` mean and **variance**, (n, k) each.

        Raises
        ------
        RuntimeError
            If the model has no such latent space.
        """
        from scvi_lite.nn.normal import draw_normal

        if not self.module.has_encoder:
            raise StateError(
                "The networks of this DestVI read counts, not a latent space of the spots. Make one that has it: "
                "DestVI.from_rna_model(..., n_latent_amortization=10). The states of cell types are in get_gamma()."
            )
        self._warn_if_untrained()
        posteriors = [
            self.module.encoder(batch.x.map(torch.log1p)) for batch in self._minibatches(adata, indices, batch_size)
        ]
        if return_dist:
            return to_numpy([loc for loc, _ in posteriors]), to_numpy([scale**2 for _, scale in posteriors])
        return to_numpy([loc if give_mean else draw_normal(loc, scale) for loc, scale in posteriors])

    @torch.inference_mode()
    def get_fine_celltypes(
        self, sc_model: CondSCVI, indices: Any = None, batch_size: int | None = None
    ) -> pd.DataFrame:
        """Share of each fine cell type in each spot: the fine labels of the states that the cell types are in.

        Parameters
        ----------
        sc_model
            The model of single cells that this one was made from, trained with ``fine_labels_key``.
        indices, batch_size
            As in :meth:`get_proportions`.

        Returns
        -------
        pandas.DataFrame
            Spots × fine labels; rows sum to 1.

        Raises
        ------
        RuntimeError
            If ``sc_model`` has no fine labels.
        ValueError
            If it has other cell types, or another latent space.
        """
        if not isinstance(sc_model, CondSCVI) or not sc_model.fine_labels:
            raise StateError(
                "sc_model has no fine labels. Give them at setup: CondSCVI.setup_anndata(cells, labels_key=..., "
                "fine_labels_key=...), train it, and make this DestVI from it."
            )
        theirs = [str(name) for name in sc_model.registry.categories("label_n")]
        if theirs != self.cell_type_mapping or sc_model.module.config.n_latent != self.module.config.n_latent:
            raise ValueError(
                f"sc_model is not the model that this DestVI was made from: its cell types are {listing(theirs)}, "
                f"and here {listing(self.cell_type_mapping)}."
            )
        classifier, n_labels = sc_model.module.classifier.eval().to(self.device), len(theirs)
        parts: list[Tensor] = []
        for _, spots in self._spots(indices, batch_size):
            prob_nslf = classifier(spots.z_nslk, self.module.label_l).softmax(-1)
            share_nl = spots.proportion_nt[:, :n_labels]
            share_nl = share_nl / share_nl.sum(1, keepdim=True)
            parts.append(torch.einsum("nl,nsl,nslf->nf", share_nl, spots.state_nsl, prob_nslf))
        return self._frame(to_numpy(parts), indices, sc_model.fine_labels)

    # Setup ------------------------------------------------------------------------------------------------------------

    @classmethod
    def setup_anndata(cls, adata: AnnData, layer: str | None = None, batch_key: str | None = None) -> None:
        """Check the data and note what the model reads from them, in ``adata.uns["scvi_lite"]``.

        Parameters
        ----------
        adata
            Raw counts of spots × genes: sparse, dense or backed.
        layer
            Layer that holds the counts; ``adata.X`` by default.
        batch_key
            Column of ``adata.obs``: the batch, as of several slices.

        Raises
        ------
        KeyError
            If a column or layer does not exist.
        ValueError
            If counts are negative, NaN or infinite, values are missing, or names repeat.
        """
        fields_ = [
            Matrix("x", layer),
            Categorical("batch_n", "batch_key", batch_key),
            Categorical("label_n", "labels_key", None),
            Categoricals("cats_nc", "categorical_covariate_keys", None),
            Continuouses("conts_nd", "continuous_covariate_keys", None),
        ]
        cls._register(adata, fields_, dict(layer=layer, batch_key=batch_key))
