"""Options of a training in one object, as scripts may give them: ``train(plan_config=TrainingPlanConfig(lr=0.01))``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class TrainingPlanConfig(dict[str, Any]):
    """Entries of ``plan_kwargs`` by their names; ``loss_kwargs`` holds more of them. What is not given is not set.

    >>> TrainingPlanConfig(lr=0.01, loss_kwargs={"classification_ratio": 10}).to_kwargs()
    {'lr': 0.01, 'classification_ratio': 10}
    """

    def __init__(self, *, loss_kwargs: Mapping[str, Any] | None = None, **options: Any):
        super().__init__(options | dict(loss_kwargs or {}))

    def to_kwargs(self) -> dict[str, Any]:
        """The options as a plain dictionary."""
        return dict(self)


class TrainerConfig(TrainingPlanConfig):
    """Options of ``train()`` by their names; ``extra_kwargs`` holds more of them.

    >>> TrainerConfig(max_epochs=3, extra_kwargs={"strategy": "ddp"}).to_kwargs()
    {'max_epochs': 3, 'strategy': 'ddp'}
    """

    def __init__(self, *, extra_kwargs: Mapping[str, Any] | None = None, **options: Any):
        super().__init__(loss_kwargs=extra_kwargs, **options)


def merge_kwargs(config: Any, overrides: Any, *, name: str) -> dict[str, Any]:
    """The options of both: what ``overrides`` says counts.

    Parameters
    ----------
    config, overrides
        A mapping, an object whose ``to_kwargs()`` gives one, or None.
    name
        What the options are of, for the message.

    Raises
    ------
    TypeError
        If one is something else.

    >>> merge_kwargs(TrainingPlanConfig(lr=0.1, eps=1.0), {"lr": 0.2}, name="plan")
    {'lr': 0.2, 'eps': 1.0}
    """
    merged: dict[str, Any] = {}
    for argument, given in ((f"{name}_config", config), (f"{name}_kwargs", overrides)):
        method = getattr(given, "to_kwargs", None)
        options = {} if given is None else given if method is None else method()
        if not isinstance(options, Mapping):
            raise TypeError(f"{argument}={given!r}: a dictionary of options is needed, as in {{'name': value}}.")
        merged |= options
    return merged


def with_configs(arguments: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of ``train()`` with those of ``plan_config`` and ``trainer_config`` in their places.

    What ``train()`` was given itself counts: a value of ``trainer_config`` is taken where an argument has its default.

    >>> with_configs({"plan_config": {"lr": 0.1}, "trainer_config": {"precision": 64}, "max_epochs": 3}, {})
    {'max_epochs': 3, 'plan_kwargs': {'lr': 0.1}, 'precision': 64}
    """
    merged = {name: value for name, value in arguments.items() if name not in ("plan_config", "trainer_config")}
    if arguments.get("plan_config") is not None:
        merged["plan_kwargs"] = merge_kwargs(arguments["plan_config"], arguments.get("plan_kwargs"), name="plan")
    for name, value in merge_kwargs(arguments.get("trainer_config"), None, name="trainer").items():
        if arguments.get(name) == defaults.get(name):
            merged[name] = value
    return merged
