"""Algorithm 1 of sparse momentum (Dettmers & Zettlemoyer 2019, arXiv:1907.04840) in plain NumPy.

Written from the paper and the design alone; it shares no code with sparsefx, so that the two can be compared.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

NEARLY_DENSE = 0.2  # a layer whose share of missing weights is below this


@dataclass(frozen=True)
class Layer:
    """One sparse layer: weight, mask (True = exists) and first moment, all of one shape.

    `scaled` is the first moment in the scale of the optimizer's step, where that differs (Adam); it only sets shares.
    """

    weight: NDArray[np.floating]
    mask: NDArray[np.bool_]
    moment: NDArray[np.floating]
    scaled: NDArray[np.floating] | None = None


@dataclass(frozen=True)
class Update:
    """What one update decides: the new masks, and the removed and regrown weights of each layer."""

    masks: list[NDArray[np.bool_]]
    removed: list[int]
    grown: list[int]


def shares(layers: Sequence[Layer]) -> NDArray[np.float64]:
    """Return each layer's share of the mean |momentum| over existing weights, float64, summing to 1."""
    seen = [layer.moment if layer.scaled is None else layer.scaled for layer in layers]
    means = np.array([np.abs(m[layer.mask].astype(np.float64)).mean() for m, layer in zip(seen, layers, strict=True)])
    total = means.sum()
    return means / total if total > 0 else np.full(len(layers), 1 / len(layers))


def count_removed(layer: Layer, share: float, n_layers: int, prune_rate: float) -> int:
    """Return how many weights a layer loses: never all of them, and few where it is nearly dense and growing."""
    nnz = int(layer.mask.sum())
    sparsity = (layer.mask.size - nnz) / layer.mask.size
    if sparsity < NEARLY_DENSE and share > 1 / n_layers:
        prune_rate = min(prune_rate, sparsity)
    return min(round(prune_rate * nnz), nnz - 1)


def largest_remainder(total: int, weights: NDArray[np.float64]) -> list[int]:
    """Split `total` in proportion to `weights` (summing to 1) into integers; ties go to the earlier layer."""
    exact = total * weights
    parts = np.floor(exact).astype(np.int64)
    by_remainder = sorted(range(len(weights)), key=lambda i: (-(exact[i] - parts[i]), i))
    for i in by_remainder[: total - int(parts.sum())]:
        parts[i] += 1
    return [int(part) for part in parts]


def place(wanted: Sequence[int], room: Sequence[int]) -> list[int]:
    """Fit `wanted` into `room`: what a layer cannot take is shared equally by the others, until all is placed."""
    placed = [min(want, free) for want, free in zip(wanted, room, strict=True)]
    excess = sum(wanted) - sum(placed)
    while excess > 0:
        takers = [i for i, free in enumerate(room) if placed[i] < free]
        offered = dict.fromkeys(takers, excess // len(takers))
        for i in takers[: excess % len(takers)]:
            offered[i] += 1
        for i, count in offered.items():
            taken = min(count, room[i] - placed[i])
            placed[i] += taken
            excess -= taken
    return placed


def prune(layer: Layer, count: int) -> NDArray[np.bool_]:
    """Remove the `count` existing weights of smallest magnitude; of equal ones the first in row-major order."""
    mask = layer.mask.ravel().copy()
    existing = np.flatnonzero(mask)
    order = np.argsort(np.abs(layer.weight.ravel()[existing]), kind="stable")
    mask[existing[order[:count]]] = False
    return mask.reshape(layer.mask.shape)


def grow(moment: NDArray[np.floating], mask: NDArray[np.bool_], count: int) -> NDArray[np.bool_]:
    """Add the `count` missing weights of largest |momentum|; of equal ones the first in row-major order."""
    grown = mask.ravel().copy()
    missing = np.flatnonzero(~grown)
    order = np.argsort(-np.abs(moment.ravel()[missing]), kind="stable")
    grown[missing[order[:count]]] = True
    return grown.reshape(mask.shape)


def update(layers: Sequence[Layer], prune_rate: float, target: int) -> Update:
    """Prune, redistribute and regrow once.

    Args:
        layers: The sparse layers, in the model's order.
        prune_rate: Fraction of existing weights to remove, in [0, 1].
        target: Weights that exist over all layers afterwards.
    Returns:
        Masks whose sizes sum to `target`, with the counts that led there.
    Source: arXiv:1907.04840, Algorithm 1 and section 3.
    """
    share = shares(layers)
    removed = [count_removed(layer, share[i], len(layers), prune_rate) for i, layer in enumerate(layers)]
    pruned = [prune(layer, count) for layer, count in zip(layers, removed, strict=True)]
    to_grow = target - sum(int(mask.sum()) for mask in pruned)
    grown = place(largest_remainder(to_grow, share), [int((~mask).sum()) for mask in pruned])
    masks = [grow(layer.moment, mask, n) for layer, mask, n in zip(layers, pruned, grown, strict=True)]
    return Update(masks, removed, grown)


def prune_rate_at(schedule: str, initial: float, step: int, total_steps: int) -> float:
    """Return the prune rate at `step` of `total_steps` under "cosine" or "linear" decay to 0."""
    progress = step / total_steps
    return initial * (0.5 * (1 + np.cos(np.pi * progress)) if schedule == "cosine" else 1 - progress)
