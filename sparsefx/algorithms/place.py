"""From budgets in weights to masks of whole units, exact in sum."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sparsefx.algorithms.grow import momentum, random
from sparsefx.masks import Units

Grow = Callable[[int, Tensor, int], Tensor]


def place(grow: Grow, units: Sequence[Units], masks: Sequence[Tensor], budgets: Sequence[int]) -> list[Tensor]:
    """Grow each layer by its budget; what whole units leave over goes to the layers furthest below theirs.

    Args:
        grow: The rule `(index of the layer, mask, k) -> mask`; it knows the layers' scores.
        units: The units of each layer.
        masks: One entry per unit, `[units]`, for each layer.
        budgets: How many weights each layer may gain.
    Returns:
        The new unit masks. The weights gained sum to `sum(budgets)` exactly for units of one weight, and otherwise
        to the largest number below it from which no missing unit is left that would fit.
    """
    grown = [
        grow(i, mask, min(budget // unit.whole, _missing(mask))) if budget >= unit.whole else mask
        for i, (unit, mask, budget) in enumerate(zip(units, masks, budgets, strict=True))
    ]
    gained = [unit.weights(new) - unit.weights(old) for unit, new, old in zip(units, grown, masks, strict=True)]
    left = sum(budgets) - sum(gained)
    for i in sorted(range(len(units)), key=lambda i: (gained[i] - budgets[i], i)):
        if left <= 0:
            break
        sizes = units[i].sizes(grown[i].device)
        while left > 0:
            closed = grown[i] | (sizes > left)
            open_units = _missing(closed)
            if not open_units:
                break
            new = grow(i, closed, min(open_units, max(1, left // units[i].whole))) & ~closed
            left -= units[i].weights(new)
            grown[i] = grown[i] | new
    return grown


def _missing(mask: Tensor) -> int:
    return len(mask) - int(torch.count_nonzero(mask))


def random_masks(units: Sequence[Units], counts: Sequence[int], seed: int) -> list[Tensor]:
    """Draw each layer's first mask at random, the same on every machine and rank for one seed.

    Args:
        units: The units of each layer.
        counts: How many weights each layer may hold (`sparsefx.masks.allot`).
        seed: Of the generator.
    Returns:
        Weight-shaped bool tensors on the CPU.
    """
    generator = torch.Generator().manual_seed(seed)
    empty = [torch.zeros(unit.count, dtype=torch.bool) for unit in units]

    def draw(index: int, mask: Tensor, k: int) -> Tensor:
        return random(mask, mask, k, generator=generator)

    chosen = place(draw, units, empty, counts)
    return [unit.expand(mask) for unit, mask in zip(units, chosen, strict=True)]


def magnitude_masks(units: Sequence[Units], weights: Sequence[Tensor], counts: Sequence[int]) -> list[Tensor]:
    """Draw each layer's mask as its units of largest summed magnitude (`counts` as in `random_masks`)."""
    empty = [torch.zeros(unit.count, dtype=torch.bool, device=w.device) for unit, w in zip(units, weights, strict=True)]

    def largest(index: int, mask: Tensor, k: int) -> Tensor:
        return momentum(units[index].reduce(weights[index].detach().abs()), mask, k)

    chosen = place(largest, units, empty, counts)
    return [unit.expand(mask) for unit, mask in zip(units, chosen, strict=True)]
