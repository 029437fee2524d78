"""Messages that name what was found and the nearest thing that would have worked."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Hashable, Iterable, Mapping
from difflib import get_close_matches
from numbers import Integral, Real
from pathlib import Path
from typing import Any

MAX_OPTIONS = 10


class UnknownKeyError(KeyError, ValueError):
    """A name that is not there. A ``KeyError`` whose message reads as it was written."""

    def __str__(self) -> str:
        return str(self.args[0])


class StateError(RuntimeError, ValueError):
    """What was asked cannot be done with this model or these data as they are."""


class NameTakenError(FileExistsError, ValueError):
    """Something is there already."""


class NotThereError(FileNotFoundError, ValueError):
    """A file that is needed is not there."""


class ElsewhereError(AttributeError, NotImplementedError):
    """A name of scvi-tools that is not here."""


def nearest(name: object, options: Iterable[object]) -> str | None:
    """The option that looks most like ``name``, or None where none comes near; case does not count.

    >>> nearest("bach", ["batch", "label"])
    'batch'
    >>> nearest("ZINB", ["zinb", "nb"])
    'zinb'
    >>> nearest("csr", ["csc_matrix", "csr_matrix"])
    'csr_matrix'
    >>> nearest("n_layer", ["n_latent", "n_layers_encoder"])
    'n_layers_encoder'
    >>> nearest("donor", ["batch", "label"]) is None
    True
    """
    by_lower_case = {str(option).lower(): str(option) for option in options}
    given = str(name).lower()
    begun = sorted((option for option in by_lower_case if len(given) > 1 and option.startswith(given)), key=len)
    close = get_close_matches(given, by_lower_case, n=1)
    found = begun + close if len(given) > 3 else close + begun
    return by_lower_case[found[0]] if found else None


def listing(options: Iterable[object], limit: int = MAX_OPTIONS) -> str:
    """The options in one line, cut after ``limit`` of them.

    >>> listing(["a", "b", "c"], limit=2)
    "'a', 'b', ... (3 in all)"
    >>> listing([])
    'none'
    """
    names = [repr(str(option)) for option in options]
    if not names:
        return "none"
    rest = f", ... ({len(names)} in all)" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest


def unknown(argument: str, name: object, options: Iterable[object], what: str = "an option", title: str = "") -> str:
    """The message for a name that is not among the options.

    Parameters
    ----------
    argument
        Argument of the call that held the name.
    name
        What was given.
    options
        What would have worked.
    what
        What the name should have been, with its article.
    title
        What to call the options in the message.

    >>> unknown("batch_key", "bach", ["batch", "label"], "a column of adata.obs", "Columns")
    "batch_key='bach' is not a column of adata.obs. Did you mean 'batch'? Columns: 'batch', 'label'."
    >>> unknown("dispersion", "cell", ["gene", "gene-cell"])
    "dispersion='cell' is not an option. Did you mean 'gene-cell'? Options: 'gene', 'gene-cell'."
    """
    options = list(options)
    guess = nearest(name, options)
    hint = f" Did you mean {guess!r}?" if guess is not None else ""
    return f"{argument}={name!r} is not {what}.{hint} {title or 'Options'}: {listing(options)}."


def check_options(where: str, options: Iterable[str], known: Iterable[str]) -> None:
    """Refuse options that do not exist.

    Raises
    ------
    TypeError
        Names the option, the nearest that exists, and all of them.

    >>> check_options("plan_kwargs", {"learning_rate": 1}, ["lr", "eps"])
    Traceback (most recent call last):
    TypeError: plan_kwargs has no option 'learning_rate'. It takes: 'eps', 'lr'.
    """
    known = list(known)
    for name in options:
        if name not in known:
            guess = nearest(name, known)
            hint = f" Did you mean {guess!r}?" if guess else ""
            raise TypeError(f"{where} has no option {name!r}.{hint} It takes: {listing(sorted(known), 80)}.")


def as_options(argument: str, options: Any) -> dict[str, Any]:
    """The options of an argument that takes a dictionary or None.

    Raises
    ------
    TypeError
        If it is something else.

    >>> as_options("plan_kwargs", {"lr": 0.1}), as_options("plan_kwargs", None)
    ({'lr': 0.1}, {})
    """
    if options is not None and not isinstance(options, Mapping):
        raise TypeError(
            f"{argument}={options!r}: a dictionary of options is needed, as in {argument}={{'name': value}}."
        )
    return dict(options or {})


def without_absent(
    where: str, options: Mapping[str, Any], absent: Mapping[str, str], known: Iterable[str] | None = None
) -> dict[str, Any]:
    """The options without those of scvi-tools that are not here, which may be given as None, False or empty.

    Parameters
    ----------
    where
        The call.
    options
        What was given.
    absent
        Why each of the others is not here.
    known
        The options of the call; None if any others are fine.

    Raises
    ------
    TypeError
        If one of those not here has a value, or an option is not among the known.

    >>> without_absent("load()", {"backup_url": None}, {"backup_url": "models are not downloaded"})
    {}
    """
    for name in absent:
        if options.get(name):
            raise TypeError(f"{where} has no option {name!r}: {absent[name]}.")
    left = {name: value for name, value in options.items() if name not in absent}
    if known is not None:
        check_options(where, left, known)
    return left


def without_needless(options: Mapping[str, Any], needless: Mapping[str, str]) -> dict[str, Any]:
    """The options without those of no use here, of which a warning says why, unless they are None, False or {}."""
    for name, value in options.items():
        if name in needless and not (value is None or value is False or value == {}):
            warn(f"{name} has no effect: {needless[name]}.")
    return {name: value for name, value in options.items() if name not in needless}


def check_choice(choices: Iterable[object], what: str = "an option", title: str = "", **given: object) -> None:
    """Refuse what is not among the choices; see :func:`unknown` for ``what`` and ``title``.

    >>> check_choice(("vanilla", "change"), mode="change")
    """
    for name, value in given.items():
        if not isinstance(value, Hashable) or value not in choices:
            raise ValueError(unknown(name, value, choices, what, title))


def check_flag(**flags: object) -> None:
    """Refuse what is neither True nor False.

    >>> check_flag(log_variational=True)
    """
    for name, value in flags.items():
        if type(value).__name__ not in ("bool", "bool_"):  # the second is NumPy's, which is not imported for it
            raise ValueError(f"{name}={value!r}: True or False is needed.")


def check_whole(least: int = 1, **numbers: Any) -> None:
    """Refuse what is not a whole number of at least ``least``.

    >>> check_whole(n_samples=3)
    """
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < least:
            raise ValueError(f"{name}={value!r}: a whole number of at least {least} is needed.")


def check_number(optional: bool = False, **numbers: Any) -> None:
    """Refuse what is not a number of zero or more; ``optional`` ones may be None.

    >>> check_number(lr=1e-3)
    """
    for name, value in numbers.items():
        if value is None and optional:
            continue
        if isinstance(value, bool) or not (isinstance(value, Real) and float(value) >= 0):
            raise ValueError(f"{name}={value!r}: a number of zero or more{', or None,' * optional} is needed.")


def warn(message: str) -> None:
    """Warn, pointing to the user's line: the first outside this package."""
    package = str(Path(__file__).parent) + os.sep
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(package):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, UserWarning, stacklevel=level)
