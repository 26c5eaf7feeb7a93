"""Between the layers and an update: what it reads of them, its changes put in place, and the row of history."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sparsefx import moments
from sparsefx.kernels.masking import masked_
from sparsefx.layers import SparseLayer
from sparsefx.masks import Units
from sparsefx.shards import part, part_like, whole
from sparsefx.specialize import Specializer
from sparsefx.update import LayerChange, LayerState
from sparsefx.window import Window


@torch.no_grad()
def read(window: Window, units: Mapping[str, Units], needs_moment: bool) -> list[LayerState]:
    """The layers that take part in an update: those whose weight has been stepped. Ranks of shards call it together."""
    states = []
    for name, (optimizer, group) in window.places().items():
        layer = window.layers[name]
        moment = moments.first_moment(optimizer, layer.weight)
        if moment is None and needs_moment:
            continue
        weight, mask = whole(layer.weight), layer.weight_mask
        problem = _problem(name, "weight", weight)
        count = max(1, int(torch.count_nonzero(mask)))
        magnitude = float(weight.abs().sum(dtype=torch.float64)) / count
        read_weight = partial(whole, layer.weight.detach())
        read_moment = partial(torch.zeros_like, mask, dtype=weight.dtype) if moment is None else partial(whole, moment)
        contribution = 0.0
        if moment is not None:
            problem = problem or _problem(name, "first moment", read_moment())
            scaled = moments.normalized(optimizer, group, layer.weight)
            contribution = float(scaled.abs().mul_(mask).sum(dtype=torch.float64)) / count
        states.append(LayerState(name, units[name], mask, read_weight, read_moment, magnitude, contribution, problem))
    return states


def _problem(name: str, what: str, tensor: Tensor) -> str | None:
    """Why an update cannot use these values, or None."""
    if bool(torch.stack(torch.aminmax(tensor)).isfinite().all()):
        return None
    return f"{name}: expected a finite {what}, got infinite or NaN values"


@torch.no_grad()
def put_(window: Window, states: Sequence[LayerState], changes: Sequence[LayerChange]) -> None:
    """Give each layer its new mask, and its grown weights their start."""
    places = window.places()
    for state, change in zip(states, changes, strict=True):
        layer, optimizer = window.layers[state.name], places[state.name][0]
        grown = change.mask & ~change.kept
        masked_(part(layer.weight).detach(), ~part_like(grown, layer.weight))
        moments.start_grown_(optimizer, layer.weight, change.kept, grown)
        if not torch.equal(layer.weight_mask, change.mask):
            layer.set_mask_(change.mask)


def row(specializer: Specializer, layer: SparseLayer, removed: int, grown: int) -> dict[str, Any]:
    """What `Scheduler.history` says of a layer."""
    plan = specializer.plan(layer)
    return {
        "nnz": plan.nnz,
        "density": plan.nnz / plan.mask.numel(),
        "removed": removed,
        "grown": grown,
        "empty_in": plan.empty_in,
        "empty_out": plan.empty_out,
        "backends": specializer.backends(layer),
    }


def settle_(layers: Mapping[str, SparseLayer], source: Mapping[str, SparseLayer]) -> None:
    """Put averaged layers right: where they have more weights than their source, they get its masks."""
    counts = [sum(int(layer.weight_mask.sum()) for layer in each.values()) for each in (layers, source)]
    for name, layer in layers.items():
        if counts[0] > counts[1]:
            layer.set_mask_(source[name].weight_mask.to(layer.weight_mask.device))
        layer.zero_missing_()
