"""Which cells are compared with which, and the counts they have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import sparse

from scvi_lite.data.columns import obs_column
from scvi_lite.data.rows import Rows
from scvi_lite.errors import unknown

if TYPE_CHECKING:
    from scvi_lite._typing import AnnData, Model

REST = "Rest"
PER_CELL = 1e4  # total of a cell in normalised counts
BLOCK_OF_CELLS = 1024


@dataclass(frozen=True)
class Comparison:
    """Rows of two populations, and what they are called where they come from a column of ``obs``."""

    rows1: np.ndarray
    rows2: np.ndarray
    group1: Any = None
    group2: Any = None

    @property
    def name(self) -> str | None:
        return None if self.group1 is None else f"{self.group1} vs {self.group2}"


def find_comparisons(
    model: Model, adata: AnnData, groupby: str | None, group1: Any, group2: Any, idx1: Any, idx2: Any
) -> list[Comparison]:
    """The comparisons that a user asks for, see ``differential_expression``.

    Raises
    ------
    KeyError
        If ``groupby`` is not a column of ``adata.obs``.
    ValueError
        If a group does not exist or is empty, or nothing says what to compare.
    IndexError
        If a row does not exist.
    """
    if idx1 is not None:
        rows1 = _select(model, adata, "idx1", idx1)
        everything = np.arange(adata.n_obs)
        rows2 = np.setdiff1d(everything, rows1) if idx2 is None else _select(model, adata, "idx2", idx2)
        if len(rows2) == 0:
            raise ValueError("idx1 has all cells, so that none are left to compare with. Give idx2, or a smaller idx1.")
        return [Comparison(rows1, rows2)]
    if idx2 is not None:
        raise ValueError("idx2 is given without idx1. Give both, or idx1 alone to compare with all other cells.")
    if groupby is None:
        raise ValueError("Nothing says what to compare. Give groupby, a column of adata.obs, or idx1 and idx2.")
    column = obs_column(adata, "groupby", groupby)
    groups = _groups_of(column)
    if group1 is None:
        chosen = [name for name in groups if group2 is None or name != str(group2)]
    else:
        chosen = [str(name) for name in ([group1] if isinstance(group1, str) or np.isscalar(group1) else group1)]
    for argument, name in [("group1", name) for name in chosen] + [("group2", group2)] * (group2 is not None):
        if str(name) not in groups:
            raise ValueError(unknown(argument, name, groups, f"a group in adata.obs[{groupby!r}]", "Groups"))
    if not chosen:
        raise ValueError(f"group1={group1!r}: no group is named. Leave it out to compare each group with the rest.")
    return [_against(name, group2, groups, groupby) for name in chosen]


def _against(name: str, group2: Any, groups: dict[str, tuple[Any, np.ndarray]], groupby: str) -> Comparison:
    value, rows = groups[name]
    if group2 is not None:
        if name == str(group2):
            raise ValueError(f"group1 and group2 are both {name!r}. Compare two groups, or leave out group2.")
        value2, rows2 = groups[str(group2)]
        return Comparison(rows, rows2, value, value2)
    others = [rows for other, (_, rows) in groups.items() if other != name]
    if not others:
        raise ValueError(f"groupby={groupby!r}: there is one group only, {name!r}, and nothing to compare it with.")
    return Comparison(rows, np.sort(np.concatenate(others)), value, REST)


def _groups_of(column: pd.Series) -> dict[str, tuple[Any, np.ndarray]]:
    """Each value that occurs and its rows, by its name; cells without a value are in none."""
    codes = column.astype("category").cat.remove_unused_categories().cat
    return {str(value): (value, np.flatnonzero(codes.codes == i)) for i, value in enumerate(codes.categories)}


def _select(model: Model, adata: AnnData, argument: str, selection: Any) -> np.ndarray:
    """Rows by numbers, by a mask, or by a query of ``adata.obs``."""
    if isinstance(selection, str):
        try:
            rows = adata.obs.reset_index(drop=True).query(selection).index.to_numpy()
        except (SyntaxError, NameError, TypeError, ValueError, KeyError) as error:
            raise ValueError(
                f"{argument}={selection!r} is not a query of adata.obs that pandas understands: {error}. "
                "An example: \"cell_type == 'B'\"."
            ) from None
    else:
        rows = model._rows(adata, selection, argument)
    if len(rows) == 0:
        raise ValueError(f"{argument} selects no cells.")
    return rows


def count_statistics(matrix: Any, groups: Sequence[np.ndarray]) -> list[dict[str, np.ndarray]]:
    """For each group of rows: mean count, share of cells with a count, and mean of counts normalised to 10,000 a cell.

    One pass over the cells of the groups, in blocks.

    Parameters
    ----------
    matrix
        (n, g) sparse, dense or backed; or their rows in another order.
    groups
        Rows of each group.

    Returns
    -------
    list
        For each group a dictionary of (g,) arrays.

    >>> count_statistics(np.array([[1.0, 0.0], [3.0, 1.0]]), [np.array([0, 1])])[0]["raw_mean"]
    array([2. , 0.5], dtype=float32)
    """
    from scvi_lite.data.kernels import add_rows

    n_cells, n_genes = matrix.shape
    source = matrix if isinstance(matrix, Rows) else Rows(matrix)
    row, group = np.concatenate(groups), np.repeat(np.arange(len(groups)), [len(rows) for rows in groups])
    member_nk = sparse.csr_array((np.ones(len(row), np.int64), (row, group)), shape=(n_cells, len(groups)))
    # Cells that are in the same groups are summed once. They have the same sum of random numbers, one a group.
    number_k = np.random.default_rng(0).integers(1, 1 << 40, len(groups))
    row_n = np.unique(row)
    _, one_of, kind_n = np.unique((member_nk @ number_k)[row_n], return_index=True, return_inverse=True)
    kinds = np.zeros((3, len(one_of), n_genes))
    for start in range(0, len(row_n), BLOCK_OF_CELLS):
        cells = slice(start, start + BLOCK_OF_CELLS)
        counts, total_n = source.gather(row_n[cells])
        add_rows(counts, kind_n[cells], PER_CELL / np.maximum(total_n.numpy().astype(np.float64), 1e-12), kinds)
    sums = np.tensordot(member_nk[row_n[one_of]].toarray().astype(np.float64), kinds, (0, 1)).swapaxes(0, 1)
    sums /= np.array([max(1, len(rows)) for rows in groups])[:, None]
    mean, share, normalised = sums
    return [
        {
            "raw_mean": mean[i].astype(np.float32),
            "non_zeros_proportion": share[i],
            "raw_normalized_mean": normalised[i].astype(np.float32),
        }
        for i in range(len(groups))
    ]
