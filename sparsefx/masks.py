"""Densities, units and initial masks: pure functions on shapes and tensors.

Every granularity is a block of the weight's matrix `[O, K]`: O output channels, K = input channels (of a group) times
taps. A *unit* is one such block; tail units at the right and lower edge are smaller. Units of one
weight are numbered as the weight is stored, larger ones row-major over `[O, K]`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from sparsefx.config import Granularity
from sparsefx.errors import DensityError


@dataclass(frozen=True)
class Units:
    """How a weight divides into units.

    Attributes:
        shape: The weight's shape.
        transposed: Whether dimension 1 holds the output channels (transposed convolutions).
        rows, columns: Size of a whole unit in the matrix `[O, K]`.
    """

    shape: torch.Size
    transposed: bool
    rows: int
    columns: int

    @classmethod
    def of(cls, shape: torch.Size, granularity: Granularity, transposed: bool = False) -> "Units":
        """Lay the units of `granularity` over a weight of `shape` `[O, I, *taps]` (`[I, O, *taps]` if transposed)."""
        out = shape[1] if transposed else shape[0]
        taps = math.prod(shape[2:])
        total = math.prod(shape) // out
        rows, columns = {
            "weight": (1, 1),
            "column": (granularity.rows, 1),
            "block": (granularity.rows, granularity.columns),
            "channel": (1, total),
            "channel_in": (out, taps),
        }[granularity.kind]
        return cls(torch.Size(shape), transposed, min(rows, out), min(columns, total))

    @property
    def single(self) -> bool:
        """Whether a unit is one weight."""
        return self.rows == self.columns == 1

    @property
    def matrix_shape(self) -> tuple[int, int]:
        out = self.shape[1] if self.transposed else self.shape[0]
        return out, math.prod(self.shape) // out

    @property
    def grid(self) -> tuple[int, int]:
        out, total = self.matrix_shape
        return -(-out // self.rows), -(-total // self.columns)

    @property
    def count(self) -> int:
        """Number of units."""
        return math.prod(self.grid)

    @property
    def whole(self) -> int:
        """Number of weights in a whole unit."""
        return self.rows * self.columns

    def matrix(self, weight: Tensor) -> Tensor:
        """View `weight` as `[O, K]` (a copy where strides do not allow a view)."""
        if self.transposed:
            weight = weight.transpose(0, 1)
        return weight.reshape(self.matrix_shape)

    def sizes(self, device: torch.device | str = "cpu") -> Tensor:
        """Number of weights in each unit, int64 `[count]`."""
        out, total = self.matrix_shape
        rows = torch.full((self.grid[0], 1), self.rows, device=device)
        rows[-1] = out - self.rows * (self.grid[0] - 1)
        columns = torch.full((1, self.grid[1]), self.columns, device=device)
        columns[0, -1] = total - self.columns * (self.grid[1] - 1)
        return (rows * columns).flatten()

    def reduce(self, weight: Tensor) -> Tensor:
        """Sum a weight-shaped tensor over each unit, `[count]`."""
        if self.single:
            return weight.reshape(-1)
        matrix = self.matrix(weight)
        (out, total), (grid_rows, grid_columns) = self.matrix_shape, self.grid
        pad = (0, grid_columns * self.columns - total, 0, grid_rows * self.rows - out)
        matrix = torch.nn.functional.pad(matrix, pad)
        return matrix.view(grid_rows, self.rows, grid_columns, self.columns).sum((1, 3)).flatten()

    def expand(self, units: Tensor) -> Tensor:
        """Spread one value per unit, `[count]`, over a tensor of the weight's shape."""
        if self.single:
            return units.view(self.shape)
        out, total = self.matrix_shape
        grid = units.view(self.grid)
        matrix = grid.repeat_interleave(self.rows, 0)[:out].repeat_interleave(self.columns, 1)[:, :total]
        if not self.transposed:
            return matrix.reshape(self.shape)
        return matrix.reshape(self.shape[1], self.shape[0], *self.shape[2:]).transpose(0, 1).contiguous()

    def weights(self, units: Tensor) -> int:
        """Number of weights in the units chosen by a bool tensor `[count]`."""
        return int(torch.count_nonzero(units)) if self.single else int(self.sizes(units.device)[units].sum())

    def of_mask(self, mask: Tensor) -> Tensor:
        """Which units exist in a weight mask, bool `[count]`."""
        return mask.reshape(-1) if self.single else self.reduce(mask.to(torch.int32)) > 0


def target_count(density: float, total: int) -> int:
    """`round(density * total)`: how many of `total` weights exist (contract 4)."""
    return round(density * total)


def largest_remainder(shares: Sequence[float | Fraction], total: int) -> list[int]:
    """Divide `total` into whole parts proportional to `shares`, exactly; ties go to the earlier part."""
    exact = [Fraction(s) for s in shares]
    whole = sum(exact)
    if whole <= 0:
        exact, whole = [Fraction(1)] * len(exact), Fraction(len(exact))
    quotas = [s * total / whole for s in exact]
    parts = [math.floor(q) for q in quotas]
    order = sorted(range(len(parts)), key=lambda i: (parts[i] - quotas[i], i))
    for i in order[: total - sum(parts)]:
        parts[i] += 1
    return parts


def density_uniform(shapes: Sequence[torch.Size], density: float) -> list[float]:
    """Give every layer the same density.

    Args:
        shapes: Weight shapes.
        density: Overall fraction of weights that exist, in (0, 1].
    Returns:
        One density per shape.
    Source: Dettmers & Zettlemoyer 2019, arXiv:1907.04840, section 4.
    """
    return [density] * len(shapes)


def density_erk(shapes: Sequence[torch.Size], density: float) -> list[float]:
    """Allot a density to each layer by the Erdos-Renyi-Kernel rule.

    Args:
        shapes: Weight shapes, `[O, I]` or `[O, I, *taps]`.
        density: Overall fraction of weights that exist, in (0, 1].
    Returns:
        One density in (0, 1] per shape; their mean weighted by size is `density`.
    Source: Evci et al. 2020, arXiv:1911.11134, section 3.
    """
    sizes = [math.prod(s) for s in shapes]
    raw = [sum(s) / math.prod(s) for s in shapes]
    full: set[int] = set()
    while True:
        free = [i for i in range(len(shapes)) if i not in full]
        budget = density * sum(sizes) - sum(sizes[i] for i in full)
        scale = budget / sum(raw[i] * sizes[i] for i in free) if free else 0.0
        over = {i for i in free if raw[i] * scale > 1}
        if not over:
            return [1.0 if i in full else raw[i] * scale for i in range(len(shapes))]
        full |= over


def density_fixed(
    names: Sequence[str], sizes: Sequence[int], density: float, fixed: Mapping[str, float]
) -> list[float]:
    """Give named layers their density and the rest what keeps the overall one.

    Args:
        names, sizes: Layer names and numbers of weights.
        density: Overall fraction of weights that exist, in (0, 1].
        fixed: Density by layer name.
    Raises:
        DensityError: an unknown name, or no density in (0, 1] is left for the other layers.
    """
    unknown = sorted(set(fixed) - set(names))
    if unknown:
        raise DensityError(f"distribution: expected names of sparse layers, got {unknown}; they are {list(names)}")
    for name, value in fixed.items():
        if not 0 < value <= 1:
            raise DensityError(f"{name}: expected a density in (0, 1], got {value!r}; list dense layers in keep_dense")
    taken = sum(fixed[n] * s for n, s in zip(names, sizes, strict=True) if n in fixed)
    left = sum(s for n, s in zip(names, sizes, strict=True) if n not in fixed)
    total = sum(sizes)
    if left == 0:
        if target_count(taken / total, total) != target_count(density, total):
            raise DensityError(
                f"distribution: expected per-layer densities that make {density:g} overall, got {taken / total:.6g}; "
                f"pass density={taken / total:.6g}"
            )
        return [fixed[n] for n in names]
    rest = (density * total - taken) / left
    if not 0 < rest <= 1:
        raise DensityError(
            f"distribution: expected room for the layers not named, got a density of {rest:.4g} for them; "
            f"name them too, or change density={density:g}"
        )
    return [fixed.get(n, rest) for n in names]


def allot(units: Sequence[Units], densities: Sequence[float], density: float) -> list[int]:
    """Number of weights each layer may hold: their sum is `round(density * total)`, each holds a unit or more.

    Raises:
        DensityError: one unit a layer is already more than `round(density * total)`.
    """
    sizes = [math.prod(u.shape) for u in units]
    floors = [u.whole for u in units]
    target = target_count(density, sum(sizes))
    if sum(floors) > target:
        raise DensityError(
            f"density: expected at least {sum(floors)} weights, one unit in each of {len(units)} layers, got "
            f"{target} of {sum(sizes)}; raise density, use a finer granularity, or keep small layers dense"
        )
    counts = largest_remainder([Fraction(d) * s for d, s in zip(densities, sizes, strict=True)], target)
    return spread([min(max(c, f), s) for c, f, s in zip(counts, floors, sizes, strict=True)], floors, sizes, target)


def spread(counts: list[int], low: Sequence[int], high: Sequence[int], target: int) -> list[int]:
    """Move `counts` to sum to `target` within `low` and `high`, sharing the difference equally, repeatedly."""
    counts = list(counts)
    while (difference := target - sum(counts)) != 0:
        sign = 1 if difference > 0 else -1
        limit = high if sign > 0 else low
        room = [i for i in range(len(counts)) if counts[i] != limit[i]]
        if not room:
            break
        for i, part in zip(room, largest_remainder([1] * len(room), abs(difference)), strict=True):
            counts[i] += sign * min(part, abs(limit[i] - counts[i]))
    return counts
