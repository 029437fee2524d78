"""Labels that only some cells have, and how they are coded."""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import numpy as np

from scvi_lite.data.columns import categories_of, check_missing, encode, obs_column, text_of
from scvi_lite.data.fields import Categorical
from scvi_lite.errors import listing, warn

if TYPE_CHECKING:
    from anndata import AnnData


class Labels(Categorical):
    """A column of ``obs`` as codes; the category of cells without a label, present or not, has the last code.

    In data without the column, no cell has a label.
    """

    kind = "labels"

    def __init__(self, name: str, argument: str, key: str, unlabeled: Any, least: int = 2):
        super().__init__(name, argument, key)
        self.unlabeled, self.least = unlabeled, least

    def register(self, adata: AnnData) -> dict[str, Any]:
        if not isinstance(self.unlabeled, str | int | float) or self.unlabeled != self.unlabeled:  # NaN is no name
            raise ValueError(
                f"unlabeled_category={self.unlabeled!r}: the name is needed that cells without a label have in "
                f"adata.obs[{self.key!r}]. If all have one, any other name will do: unlabeled_category='Unknown'."
            )
        cure = f": adata.obs[{self.key!r}] = adata.obs[{self.key!r}].astype(object).fillna({self.unlabeled!r})"
        check_missing(obs_column(adata, self.argument, self.key), self.argument, self.key, cure=cure)
        found = categories_of(adata, self.argument, self.key)
        known = [name for name in found if text_of(name) != text_of(self.unlabeled)]
        if len(known) < self.least:
            needed = "two labels are needed to tell apart" if self.least == 2 else "a label is needed"
            raise ValueError(
                f"{self.argument}={self.key!r}: {needed}, and {listing(known)} is all that "
                f"adata.obs[{self.key!r}] has beside {self.unlabeled!r}. Without labels: SCVI, or CondSCVI "
                "without fine_labels_key."
            )
        names = {str(name).lower(): name for name in known}
        near = get_close_matches(str(self.unlabeled).lower(), names, n=1, cutoff=0.8)
        if len(known) == len(found) and near:
            warn(
                f"unlabeled_category={self.unlabeled!r} is not in adata.obs[{self.key!r}], so every cell counts as "
                f"labelled. Did you mean {names[near[0]]!r}?"
            )
        return self.state(argument=self.argument, key=self.key, categories=[*known, self.unlabeled])

    @classmethod
    def read(cls, adata: AnnData, state: dict[str, Any]) -> np.ndarray:
        """Codes (n,) int64."""
        categories, key = state["categories"], state["key"]
        if key not in adata.obs:
            return np.full(adata.n_obs, len(categories) - 1, dtype=np.int64)
        try:
            return encode(adata, categories, state["argument"], key)
        except ValueError as error:
            raise ValueError(f"{error} To have them predicted: adata.obs[{key!r}] = {categories[-1]!r}") from None
