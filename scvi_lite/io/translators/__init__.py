"""For each model, from the weights that scvi-tools saves to ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from scvi_lite.io.translators import condscvi, destvi, linear_scvi, multivi, peakvi, scanvi, scvi, totalvi
from scvi_lite.io.translators.common import Setup

TRANSLATORS: dict[str, Callable[[dict[str, Any], Setup], dict[str, Tensor]]] = {
    "SCVI": scvi.translate,
    "LinearSCVI": linear_scvi.translate,
    "CondSCVI": condscvi.translate,
    "DestVI": destvi.translate,
    "PEAKVI": peakvi.translate,
    "MULTIVI": multivi.translate,
    "SCANVI": scanvi.translate,
    "TOTALVI": totalvi.translate,
}

#: For a model whose constructor takes other arguments there, or means something else by them.
ARGUMENTS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "CondSCVI": condscvi.arguments,
    "DestVI": destvi.arguments,
    "TOTALVI": totalvi.arguments,
}
