"""What became of every layer."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sparsefx import blocked
from sparsefx.errors import LayerError
from sparsefx.graph.install import Program
from sparsefx.layers import SparseLayer
from sparsefx.scheduler import Scheduler

TILE_ROWS = 64
"""Rows of a tile of the GPU kernels, in which the tile column density is counted."""


@dataclass(frozen=True)
class Row:
    """One layer, or one module that keeps its own forward.

    Attributes:
        name, type, shape: Of the layer; the shape of its weight, or None.
        status: `"sparse"`, `"shared"` (its weight is another layer's), `"dense"` or `"own forward"`.
        density, nnz: Fraction and number of weights that exist.
        empty_in, empty_out: Channels without a weight.
        tile_column_density: Share of columns, (input channel, tap) pairs, with a weight in a tile of 64 output
            channels, in natural order: what a tiled kernel has to compute.
        backends: Backend by pass.
        reason: Why the layer is dense, shared or untraced.
    """

    name: str
    type: str
    shape: tuple[int, ...] | None
    status: str
    density: float | None = None
    nnz: int | None = None
    empty_in: int | None = None
    empty_out: int | None = None
    tile_column_density: float | None = None
    backends: dict[str, str] = field(default_factory=dict)
    reason: str = ""


@dataclass(frozen=True)
class Summary:
    """A table of rows; `str()` prints it.

    Attributes:
        rows: One a layer or untraced module.
        note: Why a backend is missing; empty if none is.
        regions: What the latest graph keeps in blocks of images; empty if nothing.
    """

    rows: Sequence[Row]
    note: str = ""
    regions: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The rows and totals as plain values."""
        sparse = [r for r in self.rows if r.status == "sparse"]
        nnz, total = sum(r.nnz or 0 for r in sparse), sum(_numel(r.shape) for r in sparse)
        return {
            "rows": [asdict(row) for row in self.rows],
            "layers": len(sparse),
            "nnz": nnz,
            "total": total,
            "density": nnz / total if total else None,
            "regions": self.regions,
        }

    def __str__(self) -> str:
        head = (
            "layer",
            "type",
            "weight",
            "density",
            "existing",
            "empty in/out",
            "tile cols",
            "fwd/dgrad/wgrad",
            "note",
        )
        cells = [head, *(_cells(row) for row in self.rows)]
        widths = [max(len(line[i]) for line in cells) for i in range(len(head))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells]
        lines.insert(1, "  ".join("-" * w for w in widths))
        totals = self.to_dict()
        lines.append(
            f"{totals['nnz']:,} of {totals['total']:,} weights exist in {totals['layers']} sparse layers "
            f"(density {totals['density']:.4g})"
        )
        if self.regions:
            lines.append(self.regions)
        if self.note:
            lines.append(f"no CPU kernels: {self.note}")
        return "\n".join(lines)


def summary(model: nn.Module) -> Summary:
    """Describe every layer of a sparsified model: sparse, dense or untraced, why, and what runs it.

    Args:
        model: A model that `sparsify` returned.
    Returns:
        The table; `print` it, read `.rows`, or take `.to_dict()`.
    Raises:
        LayerError: the model is not sparsified.
    """
    scheduler = getattr(model, "scheduler", None)
    if not isinstance(scheduler, Scheduler):
        raise LayerError(f"{type(model).__name__}: expected a sparsified model, got another; call sparsefx.sparsify")
    program = model.__dict__["_sparsefx"]
    dense: dict[str, str] = program.extras["dense"]
    names = {id(layer): name.removesuffix("weight").removesuffix(".") for name, layer in scheduler.layers.items()}
    rows = []
    for name, module in model.named_modules():
        if isinstance(module, SparseLayer):
            owner = next((n for n, o in scheduler.layers.items() if o.runtime is module.runtime), "")
            rows.append(_sparse_row(name, module, scheduler, None if id(module) in names else owner))
        elif name in dense:
            weight = getattr(module, "weight", None)
            shape = tuple(weight.shape) if isinstance(weight, Tensor) else None
            rows.append(Row(name, type(module).__name__, shape, "dense", reason=dense[name]))
        if name in program.untraced:
            rows.append(Row(name, type(module).__name__, None, "own forward", reason=program.untraced[name]))
    return Summary(rows, scheduler.specializer.missing, _regions(program))


def _regions(program: Program) -> str:
    """How much of the graph that ran last stays in blocks, and how often it converts."""
    graph = program.latest
    targets = [] if graph is None else [node.target for node in graph.nodes]
    convolutions, conversions = targets.count(blocked.conv), targets.count(blocked.enter) + targets.count(blocked.leave)
    if not convolutions:
        return ""
    return f"{convolutions} convolutions run in regions of blocked activations, with {conversions} conversions in all"


def tile_column_density(mask: Tensor, transposed: bool = False, rows: int = TILE_ROWS) -> float:
    """Share of (tile, column) pairs that hold a weight.

    Args:
        mask: Bool, `[O, I, *taps]` (`[I, O, *taps]` if transposed).
        rows: Output channels in a tile.
    """
    matrix = (mask.transpose(0, 1) if transposed else mask).flatten(1)
    live = [int(tile.any(0).sum()) for tile in torch.split(matrix, rows)]
    return sum(live) / (len(live) * matrix.shape[1])


def _sparse_row(name: str, layer: SparseLayer, scheduler: Scheduler, shared_with: str | None) -> Row:
    plan = scheduler.specializer.plan(layer)
    return Row(
        name,
        layer.base.__name__,
        tuple(layer.weight_mask.shape),
        "sparse" if shared_with is None else "shared",
        plan.nnz / plan.mask.numel(),
        plan.nnz,
        plan.empty_in,
        plan.empty_out,
        tile_column_density(layer.weight_mask, layer.transposed),
        scheduler.specializer.backends(layer),
        "" if shared_with is None else f"shares {shared_with}",
    )


def _cells(row: Row) -> tuple[str, ...]:
    shape = "x".join(map(str, row.shape)) if row.shape else ""
    if row.density is None:
        return row.name or "(model)", row.type, shape, row.status, "", "", "", "", row.reason
    return (
        row.name or "(model)",
        row.type,
        shape,
        f"{100 * row.density:.2f}%",
        f"{row.nnz:,}",
        f"{row.empty_in}/{row.empty_out}",
        f"{100 * (row.tile_column_density or 0):.1f}%",
        "/".join(row.backends.values()),
        row.reason,
    )


def _numel(shape: tuple[int, ...] | None) -> int:
    return torch.Size(shape).numel() if shape else 0
