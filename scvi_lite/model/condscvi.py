"""CondSCVI: variation within each cell type, which DestVI looks for in spots of tissue.

Lopez et al. 2022, doi:10.1038/s41587-022-01272-8
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from scvi_lite.analysis import cell_types
from scvi_lite.analysis.inputs import draw
from scvi_lite.data.disk import LazyStore
from scvi_lite.data.fields import Matrix, columns_of_obs
from scvi_lite.data.labels import Labels
from scvi_lite.errors import check_flag, listing, warn
from scvi_lite.model.base import arguments_of
from scvi_lite.model.questions import ExpressionModel
from scvi_lite.nn.conditional import CondConfig, CondSCVIModule
from scvi_lite.nn.configure import configure
from scvi_lite.train.plan import Plan

if TYPE_CHECKING:
    from scvi_lite._typing import AnnData, Registry

NETWORK_OPTIONS = ("log_variational", "encode_covariates", "prior", "num_classes_mog", "ct_weight")


@dataclass(frozen=True)
class CondPlan(Plan):
    """Options of the training.

    Attributes
    ----------
    classification_ratio
        Weight of the cross-entropy of fine labels.
    """

    classification_ratio: float = 5.0

    of_loss: ClassVar[tuple[str, ...]] = ("classification_ratio",)


class CondSCVI(ExpressionModel):
    """Conditional scVI: the latent space describes what varies among cells of one type, as the type is given.

    Parameters
    ----------
    adata
        AnnData set up with :meth:`setup_anndata`, cell types in ``labels_key``.
    n_hidden, n_layers
        Width and number of hidden layers of encoder and decoder.
    n_latent
        Dimensions of the latent space.
    weight_obs
        Weight cells by the inverse of their type's share, so that rare types count as much as common ones.
    dropout_rate
        Of encoder and decoder.
    **network_options
        ``prior`` of the latent space of each type: ``"normal"``, the standard normal; ``"mog"``, a mixture of
        normals that is learned; or ``"vamp"``, the mixture of the posteriors of pseudo-cells that are learned.
        ``num_classes_mog``: components of a mixture (10). ``log_variational``; ``encode_covariates``: give the batch to
        the encoder too. ``ct_weight``: weights of the cells of each type, in the order of the categories.

    Raises
    ------
    RuntimeError
        If ``adata`` is not set up.
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
    >>> adata = scvi_lite.data.synthetic_iid(batch_size=50, n_genes=20)
    >>> CondSCVI.setup_anndata(adata, labels_key="labels")
    >>> model = CondSCVI(adata, prior="mog")
    >>> model.train(max_epochs=1, enable_progress_bar=False)
    >>> model.get_latent_representation().shape
    (100, 5)
    """

    plan = CondPlan()

    get_vamp_prior = cell_types.get_vamp_prior
    predict = cell_types.predict
    confusion_coarse_celltypes = cell_types.confusion_coarse_celltypes

    def __init__(
        self,
        adata: AnnData,
        n_hidden: int = 128,
        n_latent: int = 5,
        n_layers: int = 2,
        weight_obs: bool = False,
        dropout_rate: float = 0.05,
        **network_options: Any,
    ):
        given = arguments_of(locals())
        super().__init__(adata, given | network_options, (*given, *NETWORK_OPTIONS))

    def _make_module(self, arguments: dict[str, Any]) -> CondSCVIModule:
        options = dict(arguments)
        check_flag(weight_obs=(weight_obs := options.pop("weight_obs", False)))
        ct_weight = options.pop("ct_weight", None)
        fixed = dict(gene_likelihood="nb", batch_representation="embedding", n_fine_labels=len(self.fine_labels))
        defaults = dict(n_latent=5, n_layers=2, dropout_rate=0.05)
        config = configure(self.registry, defaults | options | fixed, CondConfig)
        label_n = self.registry.read(self.adata, "label_n")
        weight_l = label_weights(label_n, config.n_labels) if weight_obs else None
        if ct_weight is not None:
            weight_l = checked_weights(ct_weight, self.registry.categories("label_n"), weight_obs)
        pseudo_lpg = pseudo_inputs(self.adata, self.registry, label_n, config) if config.prior == "vamp" else None
        return CondSCVIModule(config, weight_l, pseudo_lpg)

    @property
    def fine_labels(self) -> list[Any]:
        """Names of the fine labels."""
        return self.registry.categories("fine_n")[:-1] if "fine_n" in self.registry.fields else []

    def train(  # the order of arguments is that of scvi-tools
        self,
        max_epochs: int = 300,
        lr: float = 0.001,
        accelerator: str = "auto",
        devices: int | list[int] | str = "auto",
        train_size: float = 1,
        validation_size: float | None = None,
        shuffle_set_split: bool = True,
        batch_size: int | None = None,
        datasplitter_kwargs: Mapping[str, Any] | None = None,
        plan_kwargs: Mapping[str, Any] | None = None,
        **trainer_kwargs: Any,
    ) -> None:
        """Train the model, by default on all cells; as :meth:`scvi_lite.model.SCVI.train`, but for what follows.

        Parameters
        ----------
        max_epochs, lr
            Passes over the training cells, and learning rate.
        plan_kwargs
            Options of :class:`CondPlan`: ``classification_ratio``, and those of all plans.

        Raises
        ------
        TypeError, ValueError
            If an option does not exist, or a value is out of range.
        """
        self._fit(arguments_of(locals()), trainer_kwargs)

    # Setup ------------------------------------------------------------------------------------------------------------

    @classmethod
    def setup_anndata(
        cls,
        adata: AnnData,
        batch_key: str | None = None,
        labels_key: str | None = None,
        fine_labels_key: str | None = None,
        layer: str | None = None,
        unlabeled_category: str = "unlabeled",
        size_factor_key: str | None = None,
    ) -> None:
        """Check the data and note what the model reads from them, in ``adata.uns["scvi_lite"]``.

        Parameters
        ----------
        adata
            Raw counts of cells × genes: sparse, dense or backed.
        batch_key, labels_key
            Columns of ``adata.obs``: the batch, and the cell type, which every cell must have. Without, all cells
            count as one type.
        fine_labels_key
            Column of finer types within the cell types, which some cells may lack.
        layer
            Layer that holds the counts; ``adata.X`` by default.
        unlabeled_category
            What ``fine_labels_key`` holds for cells without a fine label.
        size_factor_key
            Column of positive factors to use instead of the total count.

        Raises
        ------
        KeyError
            If a column or layer does not exist.
        ValueError
            If counts are negative, NaN or infinite, values are missing, or names repeat.
        """
        given = arguments_of(locals())
        if labels_key is None:
            warn(
                "labels_key is not given, so all cells count as one type. If there is a column of cell types, name it: "
                f"CondSCVI.setup_anndata(adata, labels_key=...). Columns: {listing(adata.obs.columns)}."
            )
        fields = [Matrix("x", layer), *columns_of_obs(given)]
        if fine_labels_key is not None:
            fields.append(Labels("fine_n", "fine_labels_key", fine_labels_key, unlabeled_category, least=1))
        cls._register(adata, fields, given)


def label_weights(label_n: np.ndarray, n_labels: int) -> Tensor:
    """One over the share of each label, (l,); 1 for a label without cells.

    >>> label_weights(np.array([0, 0, 0, 1]), 2)
    tensor([1.3333, 4.0000])
    """
    n_l = np.bincount(label_n, minlength=n_labels)
    return torch.from_numpy(np.where(n_l > 0, len(label_n) / np.maximum(n_l, 1), 1.0)).float()


def checked_weights(weights: Any, names: list[Any], weight_obs: bool) -> Tensor:
    """The weights of the labels that a user gives, (l,)."""
    weight_l = torch.as_tensor(weights, dtype=torch.float32)
    if weight_obs or weight_l.shape != (len(names),) or not (weight_l.isfinite() & (weight_l > 0)).all():
        raise ValueError(
            f"ct_weight={weights!r}: a positive number for each of the {len(names)} cell types ({listing(names)}) is "
            "needed, and weight_obs=False."
        )
    return weight_l


def pseudo_inputs(adata: AnnData, registry: Registry, label_n: np.ndarray, config: CondConfig) -> Tensor:
    """Log counts of cells drawn from each label (from all, where it has none): (l, p, g)."""
    rows = []
    for label in range(config.n_labels):
        own = np.flatnonzero(label_n == label)
        rows.append(draw(own if len(own) else np.arange(len(label_n)), config.num_classes_mog))
    x_mg = LazyStore(adata, registry)[torch.from_numpy(np.concatenate(rows))].x.x_ng.log1p()
    return x_mg.view(config.n_labels, config.num_classes_mog, -1)
