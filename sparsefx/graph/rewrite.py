"""Turn selected layers into sparse ones, in place, with masks drawn."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from sparsefx.algorithms.place import random_masks
from sparsefx.config import Granularity
from sparsefx.errors import DensityError
from sparsefx.graph.select import Selection
from sparsefx.kernels.runtime import Runtime
from sparsefx.layers import SPARSE, SparseLayer, convert_
from sparsefx.masks import Units, allot, density_erk, density_fixed, density_uniform

Distribution = str | Mapping[str, float]


def rewrite_(
    model: nn.Module,
    selection: Selection,
    density: float,
    distribution: Distribution,
    granularity: Granularity,
    seed: int,
) -> dict[str, SparseLayer]:
    """Draw masks and convert the selected layers in place; nothing is changed if an error is raised.

    Returns:
        The sparse layers, one for each weight, by the weight's name in `state_dict`.
    Raises:
        DensityError: the density or distribution cannot be reached.
    """
    masks = _draw(selection, density, distribution, granularity, seed)
    converted: dict[str, SparseLayer] = {}
    for name, module in selection.sparse.items():
        mask = masks[name].to(module.get_parameter("weight").device)
        converted[_weight_name(name)] = convert_(module, mask, Runtime(name), full=density == 1)
    for name, first in selection.shared.items():
        owner = converted[_weight_name(first)]
        convert_(model.get_submodule(name), owner.weight_mask, owner.runtime, full=density == 1)
    return converted


def _draw(
    selection: Selection, density: float, distribution: Distribution, granularity: Granularity, seed: int
) -> dict[str, Tensor]:
    names = list(selection.sparse)
    shapes = [module.get_parameter("weight").shape for module in selection.sparse.values()]
    units = [
        Units.of(shape, granularity, SPARSE[type(module)].transposed)
        for shape, module in zip(shapes, selection.sparse.values(), strict=True)
    ]
    counts = allot(units, _densities(names, shapes, density, distribution), density)
    return dict(zip(names, random_masks(units, counts, seed), strict=True))


def _densities(
    names: Sequence[str], shapes: Sequence[torch.Size], density: float, distribution: Distribution
) -> list[float]:
    if distribution == "uniform":
        return density_uniform(shapes, density)
    if distribution == "erk":
        return density_erk(shapes, density)
    if isinstance(distribution, Mapping):
        return density_fixed(names, [s.numel() for s in shapes], density, distribution)
    raise DensityError(
        f'distribution: expected "uniform", "erk" or a dict of densities by layer name, got {distribution!r}'
    )


def _weight_name(layer: str) -> str:
    return f"{layer}.weight".lstrip(".")
