"""Rules by kind and name."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from sparsefx.errors import SchedulerError

_RULES: dict[str, dict[str, "Rule"]] = {"prune": {}, "redistribute": {}, "grow": {}, "decay": {}}


@dataclass(frozen=True)
class Rule:
    """A rule and what it needs.

    Attributes:
        needs_first_moment: Whether a `grow` rule reads the first moment of missing weights, for which the dense
            gradient has to be collected.
    """

    kind: str
    name: str
    function: Callable[..., Any]
    needs_first_moment: bool = True

    def __call__(self, *args: Any, **context: Any) -> Any:
        return self.function(*args, **{k: v for k, v in context.items() if k in self._known})

    @cached_property
    def _known(self) -> frozenset[str]:
        return frozenset(inspect.signature(self.function).parameters)


def register(kind: str, name: str, *, needs_first_moment: bool = True) -> Callable[[Callable], Callable]:
    """Register a rule under a name that `SparseMomentum` accepts.

    Example:
        >>> @register("decay", "halve")
        ... def halve(prune_rate, step, total_steps):
        ...     return prune_rate / 2
    """

    def add(function: Callable) -> Callable:
        _RULES[kind][name] = Rule(kind, name, function, needs_first_moment)
        return function

    return add


def rules(kind: str) -> list[str]:
    """Names registered for a kind of rule."""
    return sorted(_RULES[kind])


def resolve(kind: str, rule: str | Callable[..., Any]) -> Rule:
    """Return the rule of that name, or wrap a user's own function.

    Raises:
        SchedulerError: for an unknown name.
    """
    if isinstance(rule, Rule):
        return rule
    if callable(rule):
        return Rule(kind, getattr(rule, "__name__", repr(rule)), rule, getattr(rule, "needs_first_moment", True))
    if rule not in _RULES[kind]:
        raise SchedulerError(
            f"{kind}: expected one of {rules(kind)} or a function, got {rule!r}; "
            f'register your own with sparsefx.algorithms.register("{kind}", name)'
        )
    return _RULES[kind][rule]
