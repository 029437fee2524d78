"""Values of a saved model in the forms that its files hold, and back."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    import torch


def to_json(key: str, value: Any) -> str:
    """A value as JSON; an error names the part of the model that it belongs to."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, default=_plain)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"The {key} of the model cannot be saved as JSON: {error}.") from None


def _plain(value: Any) -> Any:
    """NumPy's numbers and arrays as Python's."""
    import numpy as np

    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise TypeError(f"{value!r} is a {type(value).__name__}")


def positions(name: str, rows_n: torch.Tensor) -> np.ndarray:
    """Positions of cells."""
    import torch

    if rows_n.dtype != torch.int64 or rows_n.ndim != 1 or bool((rows_n < 0).any()):
        raise ValueError(f"model.safetensors is damaged: {name} holds no positions of cells. Restore it from a copy.")
    return rows_n.numpy()


def history_column(frame: pd.DataFrame) -> dict[str, list]:
    """A metric as lists. JSON has no NaN nor infinity: they become strings, which ``float`` reads."""
    values = [float(value) for value in frame.iloc[:, 0]]
    return {
        "epoch": [int(epoch) for epoch in frame.index],
        "value": [value if math.isfinite(value) else str(value) for value in values],
    }


def history_frame(name: str, column: dict[str, list]) -> pd.DataFrame:
    """The frame of a metric, from :func:`history_column`."""
    import numpy as np
    import pandas as pd

    try:
        epochs = pd.Index(column["epoch"], dtype="int64", name="epoch")
        values = np.array([float(value) for value in column["value"]])
        if len(values) != len(epochs):
            raise ValueError(f"{len(values)} values for {len(epochs)} epochs")
        return pd.DataFrame({name: values}, index=epochs, dtype="float64")
    except (KeyError, OverflowError, TypeError, ValueError) as error:
        raise ValueError(f"model.json is damaged: the history of '{name}' cannot be read, {error}.") from None
