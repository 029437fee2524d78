"""Arguments that several questions share: checked before any work is done."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from scvi_lite._settings import settings
from scvi_lite.errors import StateError, UnknownKeyError, check_whole, listing, nearest, unknown

if TYPE_CHECKING:
    from scvi_lite._typing import AnnData, Model

NUMBERS_AT_ONCE = 1 << 21  # size of the largest temporary array: 8 MiB in float32, which stay near the processor
MAX_BATCH = 1024


def cell_rows(adata: AnnData, indices: Any, argument: str = "indices") -> np.ndarray:
    """Row numbers (n,) int64 from numbers, a mask, a slice, names of cells, or None for all cells.

    Raises
    ------
    IndexError
        If a row does not exist, or it is none of these.
    KeyError
        If a name is not one of ``adata.obs_names``.
    """
    if indices is None:
        return np.arange(adata.n_obs)
    rows = np.arange(adata.n_obs)[indices] if isinstance(indices, slice) else np.asarray(indices)
    if rows.dtype == bool:
        if rows.shape != (adata.n_obs,):
            raise IndexError(f"{argument}: a mask of {rows.size} cells was given for {adata.n_obs} cells.")
        return np.flatnonzero(rows)
    if rows.size == 0:
        return np.zeros(0, dtype=np.int64)
    if rows.ndim == 1 and all(isinstance(name, str) for name in rows[:1]):
        return _rows_of_names(adata, rows, argument)
    if rows.dtype.kind not in "ui" or rows.ndim != 1:
        one = f" Write {argument}=[{rows.item()!r}]." if rows.ndim == 0 and rows.dtype.kind in "uiU" else ""
        nested = f" Write {argument}=np.where(...)[0]." if isinstance(indices, tuple) else ""
        raise IndexError(
            f"{argument}: whole numbers, a mask, a slice or names of cells are needed; {rows.dtype} of shape "
            f"{rows.shape} was given.{one or nested}"
        )
    if len(outside := rows[(rows < -adata.n_obs) | (rows >= adata.n_obs)]):
        raise IndexError(
            f"{argument}: row {outside[0]} does not exist: adata has {adata.n_obs} cells, 0 to {adata.n_obs - 1}."
        )
    return np.where(rows < 0, rows + adata.n_obs, rows).astype(np.int64)


def _rows_of_names(adata: AnnData, names: np.ndarray, argument: str) -> np.ndarray:
    if not adata.obs_names.is_unique:
        raise ValueError(f"{argument}: names were given, and adata.obs_names repeats some. Give row numbers or a mask.")
    rows = adata.obs_names.get_indexer(names)
    if (rows < 0).any():
        name = str(names[rows < 0][0])
        raise UnknownKeyError(unknown(argument, name, adata.obs_names[:20_000], "a name of a cell", "Cells"))
    return rows.astype(np.int64)


def batch_codes(model: Model, transform_batch: Any, argument: str = "transform_batch") -> list[int | None]:
    """Codes of the batches to decode as; ``[None]`` stands for each cell's own.

    Raises
    ------
    ValueError
        If a batch does not exist, or none is named.
    """
    if transform_batch is None:
        return [None]
    if isinstance(transform_batch, str | int | np.integer):
        transform_batch = [transform_batch]
    known = [str(c) for c in model.registry.categories("batch_n")]
    codes: list[int | None] = []
    for name in transform_batch:
        if name is None:
            codes.append(None)
        elif str(name) in known:
            codes.append(known.index(str(name)))
        elif isinstance(name, int | np.integer) and 0 <= name < len(known):
            codes.append(int(name))
        else:
            raise ValueError(unknown(argument, name, known, "a batch of this model", "Batches"))
    if not codes:
        raise ValueError(f"{argument} is empty: name a batch, or leave it out. Batches: {listing(known)}.")
    return codes


def gene_positions(model: Model, gene_list: Sequence[str] | None) -> np.ndarray | None:
    """Positions of genes among the model's, see :func:`positions_of`."""
    return positions_of("gene_list", gene_list, model._gene_names, "genes")


def positions_of(argument: str, wanted: Sequence[str] | None, names: Sequence[str], what: str) -> np.ndarray | None:
    """Positions of features among the ``names`` of the model's, in the order asked for; None for all of them.

    Parameters
    ----------
    argument
        Argument of the call that holds what is ``wanted``.
    what
        What the features are, as in ``"genes"``.

    Raises
    ------
    ValueError
        If a name is unknown (the nearest known one is named), the list is empty, or it is a single string.

    >>> positions_of("gene_list", ["B", "A"], ["A", "B"], "genes")
    array([1, 0])
    """
    if wanted is None:
        return None
    if isinstance(wanted, str):
        raise ValueError(f"{argument}={wanted!r}: a list of names is needed. Write {argument}=[{wanted!r}].")
    if str(getattr(wanted, "dtype", "")) in ("bool", "boolean"):
        raise ValueError(f"{argument} is a mask; names are needed. Write {argument}=adata.var_names[mask].")
    wanted = [str(name) for name in wanted]
    if not wanted:
        raise ValueError(f"{argument} is empty. Name some {what}, or leave it out for all of them.")
    position_of = {name: i for i, name in enumerate(names)}
    missing = [name for name in wanted if name not in position_of]
    if missing:
        guess = nearest(missing[0], names[:20_000])
        hint = f" Did you mean {guess!r} for {missing[0]!r}?" if guess else ""
        raise ValueError(
            f"{argument}: {len(missing)} of {len(wanted)} names are not among the model's {len(names)} {what}: "
            f"{listing(missing)}.{hint} They are in model.get_var_names()."
        )
    return np.array([position_of[name] for name in wanted])


def minibatch_size(batch_size: int | None, numbers_per_cell: int, light: bool = False) -> int:
    """Cells in a minibatch: as asked for, else as many as keep temporary arrays small.

    ``light``: few numbers of a cell are held beside the answer, as those of counts that are not zero.

    >>> minibatch_size(None, 100), minibatch_size(None, 1 << 16), minibatch_size(7, 1 << 16)
    (1024, 64, 7)
    >>> minibatch_size(None, 100, light=True), minibatch_size(None, 1 << 16, light=True)
    (4096, 256)
    """
    if batch_size is None:
        batch_size = settings.batch_size
    if batch_size is not None:
        check_whole(batch_size=batch_size)
        return int(batch_size)
    # Twice the size: a product reads its weights once for each minibatch.
    many = 4 if light else 1
    return max(1, min(many * MAX_BATCH, many * 2 * NUMBERS_AT_ONCE // max(1, numbers_per_cell)))


def draw(rows: np.ndarray, n: int) -> np.ndarray:
    """Draw ``n`` of the rows with replacement, from PyTorch's random state as everything else.

    Raises
    ------
    ValueError
        If there are no rows.
    """
    if len(rows) == 0:
        raise ValueError("indices: no cells are left to sample from.")
    return rows[torch.randint(len(rows), (n,)).numpy()]


def needs_counts(model: Model, question: str) -> None:
    """Refuse what the counts are needed for, where the data were minified without them.

    Raises
    ------
    StateError
        With the way out.
    """
    if model.registry.fields["x"].get("minified"):
        raise StateError(
            f"{question} needs counts, and the data of this model were minified without them. Load the model with the "
            "full data, or minify with minified_data_type='latent_posterior_parameters_with_counts'."
        )


def to_numpy(parts: list[Tensor]) -> np.ndarray:
    """Join what the minibatches gave, on the CPU."""
    return torch.cat(parts).cpu().numpy()
