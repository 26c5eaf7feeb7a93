"""One prune-redistribute-regrow over all layers: Algorithm 1 of the paper, on tensors."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsefx.algorithms import LayerStats, Rule
from sparsefx.algorithms.place import place
from sparsefx.masks import Units, largest_remainder, spread

_NEARLY_DENSE = 0.2
"""A layer with less than this share missing counts as nearly dense (the paper's edge case)."""


@dataclass
class LayerState:
    """What an update reads of one layer; all tensors have the weight's shape.

    Attributes:
        weight, moment: Read the weight and the first moment. Sharded ones are gathered anew each time, so that an
            update never holds more than one layer whole.
        magnitude: Mean magnitude of existing weights.
        contribution: Mean magnitude of the first moment over existing weights, in the scale of the step.
        problem: Why the layer's values allow no update, or None.
    """

    name: str
    units: Units
    mask: Tensor
    weight: Callable[[], Tensor]
    moment: Callable[[], Tensor]
    magnitude: float
    contribution: float
    problem: str | None = None


@dataclass
class LayerChange:
    """What an update did to one layer.

    Attributes:
        mask: The new mask.
        removed, grown: Numbers of weights pruned and regrown; one that was both counts in both.
    """

    mask: Tensor
    kept: Tensor
    removed: int
    grown: int


@torch.no_grad()
def update_masks(
    layers: Sequence[LayerState],
    prune_rate: float,
    target: int,
    prune: Rule,
    redistribute: Rule,
    grow: Rule,
    generator: torch.Generator,
) -> list[LayerChange]:
    """Prune, redistribute and regrow.

    Args:
        layers: The layers that take part.
        prune_rate: Share of each layer's existing units to remove.
        target: Number of weights that exist afterwards, over these layers.
        prune, redistribute, grow: The rules.
        generator: For rules that draw.
    Returns:
        One change a layer. With units of one weight the counts sum to `target` exactly.
    Source: Dettmers & Zettlemoyer 2019, Algorithm 1 and section 3.
    """
    existing = [layer.units.of_mask(layer.mask) for layer in layers]
    unit_counts = [int(torch.count_nonzero(e)) for e in existing]
    planned = [round(prune_rate * n) for n in unit_counts]
    shares = redistribute(_stats(layers, existing, [p * u.units.whole for p, u in zip(planned, layers, strict=True)]))

    kept = []
    for layer, mask, count, share in zip(layers, existing, unit_counts, shares, strict=True):
        rate = prune_rate
        missing = (layer.units.count - count) / layer.units.count
        if missing < _NEARLY_DENSE and share > 1 / len(layers):
            rate = min(prune_rate, missing)
        k = min(round(rate * count), count - 1)
        kept.append(prune(_scores(layer.units, layer.weight()), mask, k, generator=generator))

    before = [layer.units.weights(m) for layer, m in zip(layers, existing, strict=True)]
    after = [layer.units.weights(m) for layer, m in zip(layers, kept, strict=True)]
    removed = [b - a for b, a in zip(before, after, strict=True)]
    totals = [layer.mask.numel() for layer in layers]
    room = [t - a for t, a in zip(totals, after, strict=True)]
    budget = min(max(0, target - sum(after)), sum(room))
    wanted = largest_remainder(redistribute(_stats(layers, existing, removed)), budget)
    budgets = spread([min(w, r) for w, r in zip(wanted, room, strict=True)], [0] * len(room), room, budget)

    def regrow(index: int, mask: Tensor, k: int) -> Tensor:
        return grow(_scores(layers[index].units, layers[index].moment()), mask, k, generator=generator)

    grown = place(regrow, [layer.units for layer in layers], kept, budgets)
    changes = []
    for layer, stay, new, gone, count in zip(layers, kept, grown, removed, after, strict=True):
        mask = layer.units.expand(new)
        changes.append(LayerChange(mask, layer.units.expand(stay), gone, layer.units.weights(new) - count))
    return changes


def _stats(layers: Sequence[LayerState], existing: Sequence[Tensor], removed: Sequence[int]) -> list[LayerStats]:
    return [
        LayerStats(
            layer.name,
            layer.mask.numel(),
            layer.units.weights(units),
            gone,
            layer.contribution,
            layer.magnitude,
        )
        for layer, units, gone in zip(layers, existing, removed, strict=True)
    ]


def _scores(units: Units, values: Tensor) -> Tensor:
    """The score of each unit: its value, whose sign the rules ignore, or the summed magnitudes of its weights."""
    return units.reduce(values if units.single else values.abs())
