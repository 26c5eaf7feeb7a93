"""Which configuration a layer's pass runs: rows of a tile by the model, the rest from the table or the defaults."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sparsefx.kernels.gpu.config import NARROWEST, PASSES, Config, Table, default, key, shipped
from sparsefx.kernels.gpu.model import Work, predict
from sparsefx.kernels.gpu.plan import Geometry
from sparsefx.kernels.patterns import Pattern, Tiling, aligned_rows, forward_matrix, transposed_matrix

ROWS = (64, 16)
"""Tiles that are tried for masks without aligned units; the first wins a tie."""
SMALLEST, LARGEST = 8, 128


def precision_of(dtype: torch.dtype, linear: bool) -> str:
    """How fp32 products are computed, "ieee" or "tf32", as torch's own switches say; "ieee" for half types."""
    if dtype != torch.float32:
        return "ieee"
    allowed: Any = torch.backends.cuda.matmul if linear else torch.backends.cudnn.conv  # pyright: ignore[reportAttributeAccessIssue]
    return "tf32" if allowed.fp32_precision == "tf32" else "ieee"


def work_of(
    kind: str,
    mask: Tensor,
    geometry: Geometry,
    hw: tuple[int, int],
    images: int,
    dtype: torch.dtype,
    density: float,
    unit: int = 0,
) -> Work:
    """What a pass has to do, for the model; `unit` is the number of rows that a tile holds, 0 if it is full."""
    out_h, out_w = geometry.out_hw(*hw)
    inside, outside = hw[0] * hw[1] * images, out_h * out_w * images
    out, inputs, taps = mask.shape[0], mask.shape[1], geometry.taps
    half = {torch.float16: "fp16", torch.bfloat16: "bf16"}
    precision = half.get(dtype) or precision_of(dtype, geometry.op == "linear")
    if kind == "dgrad":
        return Work(inputs, out * taps, taps, outside, inside, outside, density, precision, unit)
    return Work(out, inputs * taps, taps, inside, outside, outside, density, precision, unit)


def column_density(matrix: Tensor, rows: int, unit: int | None = None) -> float:
    """Tile column density of a mask in tiles of `rows`; waits for the device."""
    total, columns = matrix.shape
    pattern = Pattern(total, columns, Tiling(rows, min(unit or rows, rows), unit is None), matrix.device)
    pattern.update_(matrix)
    return pattern.column_density.item()


def unit_rows(mask: Tensor) -> int | None:
    """Output channels of a unit that tiles should map to, None where the mask has none."""
    aligned = aligned_rows(forward_matrix(mask))
    return aligned if aligned >= SMALLEST else None


def choose(
    mask: Tensor,
    geometry: Geometry,
    hw: tuple[int, int],
    images: int,
    dtype: torch.dtype,
    unit: int | None,
    table: Table | None = None,
) -> dict[str, Config]:
    """A configuration for each pass.

    Args:
        mask: Of the layer.
        hw, images: Size of the input.
        unit: From `unit_rows`; tiles then hold as many rows.
        table: The shipped one if None.
    """
    table = shipped() if table is None else table
    device = torch.cuda.get_device_name(mask.device) if mask.is_cuda else mask.device.type
    block = max(unit or 0, NARROWEST)
    forward = {block: column_density(forward_matrix(mask), block, unit)} if unit else _densities(forward_matrix(mask))
    backward = _densities(transposed_matrix(mask))
    configs = {}
    for kind in PASSES:
        if kind == "wgrad":
            tried = {configs["fprop"].rows: forward[configs["fprop"].rows]}
        else:
            tried = forward if kind == "fprop" else backward

        def config(rows: int, density: float, kind: str = kind) -> Config:
            name = key(kind, tuple(mask.shape), (geometry.stride[0], *hw, images), dtype, rows, density)
            return table.get(device, name) or default(kind, dtype, rows)

        def seconds(rows: int, density: float, kind: str = kind) -> float:
            held = min(unit, rows) if unit and kind != "dgrad" else 0
            work = work_of(kind, mask, geometry, hw, images, dtype, density, held)
            return predict(kind, work, config(rows, density)).seconds

        rows = min(tried, key=lambda rows: seconds(rows, tried[rows]))
        configs[kind] = replace(config(rows, tried[rows]), rows=rows)
    return configs


def _densities(matrix: Tensor) -> dict[int, float]:
    return {rows: column_density(matrix, rows) for rows in ROWS}
