"""How the prune rate falls during training."""

import math

from sparsefx.algorithms.registry import register


@register("decay", "cosine")
def cosine(prune_rate: float, step: int, total_steps: int) -> float:
    """Fall from `prune_rate` to 0 at `total_steps` along half a cosine (Dettmers & Zettlemoyer 2019, section 4)."""
    return prune_rate * (1 + math.cos(math.pi * min(step, total_steps) / total_steps)) / 2


@register("decay", "linear")
def linear(prune_rate: float, step: int, total_steps: int) -> float:
    """Fall from `prune_rate` to 0 at `total_steps` along a line."""
    return prune_rate * (1 - min(step, total_steps) / total_steps)


@register("decay", "constant")
def constant(prune_rate: float, step: int, total_steps: int) -> float:
    """Keep `prune_rate`."""
    return prune_rate
