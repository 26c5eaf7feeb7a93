"""How much of the removed weights each layer gets back."""

from collections.abc import Sequence
from dataclasses import dataclass

from sparsefx.algorithms.registry import register


@dataclass(frozen=True)
class LayerStats:
    """What a `redistribute` rule may look at, one per layer.

    Attributes:
        name: Name of the weight.
        total, nnz: Number of weights, and of existing ones before pruning.
        removed: Number of weights pruned (planned ones, when asked which layers still grow).
        first_moment: Mean magnitude of the first moment over existing weights. For optimizers of the Adam family of
            `exp_avg / (sqrt(exp_avg_sq) + eps)`.
        magnitude: Mean magnitude of existing weights.
    """

    name: str
    total: int
    nnz: int
    removed: int
    first_moment: float
    magnitude: float


@register("redistribute", "momentum")
def momentum(stats: Sequence[LayerStats]) -> list[float]:
    """Share by the mean magnitude of the first moment (Dettmers & Zettlemoyer 2019, section 3.2)."""
    return _normalized([s.first_moment for s in stats])


@register("redistribute", "none")
def none(stats: Sequence[LayerStats]) -> list[float]:
    """Give each layer back what it lost."""
    return _normalized([float(s.removed) for s in stats])


@register("redistribute", "nonzero")
def nonzero(stats: Sequence[LayerStats]) -> list[float]:
    """Share by the number of existing weights."""
    return _normalized([float(s.nnz) for s in stats])


def _normalized(values: list[float]) -> list[float]:
    total = sum(values)
    return [v / total for v in values] if total > 0 else [1 / len(values)] * len(values)
