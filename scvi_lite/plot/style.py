"""Colours and finish of the pictures.

Colours are those of Okabe and Ito and of Paul Tol, which people with colour vision deficiencies can tell apart.
"""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OKABE_ITO = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
TOL_MUTED = (
    "#332288", "#88CCEE", "#44AA99", "#117733", "#999933", "#DDCC77", "#CC6677", "#882255", "#AA4499", "#000000",
)  # fmt: skip
BLUE, ORANGE, GREY = OKABE_ITO[0], OKABE_ITO[5], "#BBBBBB"
DPI = 150


def new_axes(width: float, height: float) -> Axes:
    """Axes of a new figure, in inches."""
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(width, height), layout="constrained")[1]


def tidy(ax: Axes) -> None:
    """Take away the upper and the right line of the frame."""
    ax.spines[["top", "right"]].set_visible(False)


def saved(drawn: Any, save: str | PathLike | None) -> Any:
    """Write the figure of axes, or a figure, to a file if there is one; return what was given."""
    if save is not None:
        from matplotlib.figure import Figure

        (drawn if isinstance(drawn, Figure) else drawn.figure).savefig(save, dpi=DPI, bbox_inches="tight")
    return drawn
