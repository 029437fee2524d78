"""Public names that are imported when they are first used."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def lazy(package: str, names: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` of a package.

    Parameters
    ----------
    package
        ``__name__`` of the package.
    names
        For each public name the module that holds it; for a module, its own name.
    """

    def __getattr__(name: str) -> Any:
        if name not in names:
            from scvi_lite._elsewhere import instead_of
            from scvi_lite.errors import nearest

            if (cure := instead_of(package, name)) is not None:
                raise AttributeError(cure)
            guess = nearest(name, names)
            hint = f" Did you mean {guess!r}?" if guess else ""
            raise AttributeError(f"{package} has no {name!r}.{hint}")
        module = importlib.import_module(names[name])
        return module if names[name].rpartition(".")[2] == name else getattr(module, name)

    def __dir__() -> list[str]:
        return sorted(names)

    return __getattr__, __dir__
