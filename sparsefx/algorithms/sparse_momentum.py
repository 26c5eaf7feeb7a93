"""Sparse momentum: which rules, and how much."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from sparsefx.algorithms.registry import resolve
from sparsefx.errors import SchedulerError


@dataclass(frozen=True)
class SparseMomentum:
    """Sparse momentum, not yet bound to a model; pass it to `sparsefx.sparsify`.

    Args:
        prune_rate: Share of each layer's weights removed at an update, in [0, 1).
        decay: How the rate falls: `"cosine"`, `"linear"`, `"constant"`, or `(rate, step, total_steps) -> rate`.
        prune: `"magnitude"`, or `(weight, mask, k) -> mask`.
        redistribute: `"momentum"`, `"none"`, `"nonzero"`, or `(stats) -> shares`.
        grow: `"momentum"`, `"random"`, or `(score, mask, k) -> mask`.
        dense_grad_window: Steps before an update in which the gradient of missing weights is collected: `"auto"` for
            as long as the first moment remembers, `"always"` for the paper's rule, or a number of steps.
    Raises:
        SchedulerError: a value outside these.
    Source: Dettmers & Zettlemoyer 2019, arXiv:1907.04840.
    """

    prune_rate: float = 0.5
    decay: str | Callable = "cosine"
    prune: str | Callable = "magnitude"
    redistribute: str | Callable = "momentum"
    grow: str | Callable = "momentum"
    dense_grad_window: int | Literal["auto", "always"] = "auto"

    def __post_init__(self) -> None:
        if not 0 <= self.prune_rate < 1:
            raise SchedulerError(
                f"prune_rate: expected a fraction in [0, 1), got {self.prune_rate!r}; the paper uses 0.5"
            )
        window = self.dense_grad_window
        if window not in ("auto", "always") and not (isinstance(window, int) and window >= 1):
            raise SchedulerError(
                f'dense_grad_window: expected "auto", "always" or a positive number of steps, got {window!r}'
            )
        for kind in ("decay", "prune", "redistribute", "grow"):
            resolve(kind, getattr(self, kind))
