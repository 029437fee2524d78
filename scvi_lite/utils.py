"""What scripts for scvi-tools take from its ``utils``: the dictionaries that ``summary_stats`` and the like are."""

from scvi_lite.data.view import Named as attrdict

__all__ = ["attrdict"]
