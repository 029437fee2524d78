"""Options of networks, which are checked when they are given."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real
from typing import Any, ClassVar

from scvi_lite.errors import check_choice, check_flag, check_whole

Choices = dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class Config:
    """Base of the options of a network: a class names which of them hold what.

    Attributes
    ----------
    choices
        The words that an option may be.
    sizes, switches, rates
        Options that are whole numbers of at least 1, True or False, and numbers in [0, 1).
    """

    choices: ClassVar[Choices] = {}
    sizes: ClassVar[tuple[str, ...]] = ()
    switches: ClassVar[tuple[str, ...]] = ()
    rates: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        for name, words in self.choices.items():
            check_choice(words, **self._values(name))
        check_whole(**self._values(*self.sizes))
        check_flag(**self._values(*self.switches))
        for name, rate in self._values(*self.rates).items():
            if not (isinstance(rate, Real) and 0 <= float(rate) < 1):
                raise ValueError(f"{name}={rate!r}: a number in [0, 1) is needed.")

    def _values(self, *names: str) -> dict[str, Any]:
        return {name: getattr(self, name) for name in names}
