"""Types that annotations name. Type checkers alone import this file, so it costs nothing and may name what is above."""

from typing import TypeAlias

from anndata import AnnData as AnnData
from matplotlib.axes import Axes as Axes
from mudata import MuData as MuData
from scipy.sparse import csr_matrix as csr_matrix

from scvi_lite.data.batch import Batch as Batch
from scvi_lite.data.registry import Registry as Registry
from scvi_lite.data.supervision import Supervision as Supervision
from scvi_lite.io.folder import SavedModel as SavedModel
from scvi_lite.model.base import Model as Model
from scvi_lite.model.condscvi import CondSCVI as CondSCVI
from scvi_lite.model.destvi import DestVI as DestVI
from scvi_lite.model.scanvi import SCANVI as SCANVI
from scvi_lite.model.scvi import SCVI as SCVI
from scvi_lite.nn.deconvolution import Spots as Spots
from scvi_lite.nn.module import Module as Module
from scvi_lite.nn.protein import ProteinRates as ProteinRates
from scvi_lite.nn.rates import Rates as Rates
from scvi_lite.nn.scanvi import SCANVIModule as SCANVIModule
from scvi_lite.nn.vae import Posterior as Posterior

Data: TypeAlias = AnnData | MuData
