"""Fill the table of configurations by measurement on the device at hand."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from triton.runtime.errors import OutOfResources

from sparsefx.kernels.gpu.cases import PASSES, Tensors, draw, sparse_calls, tensors
from sparsefx.kernels.gpu.config import NARROWEST, Config, Table, default, key
from sparsefx.kernels.gpu.plan import Geometry, LayerPlan
from sparsefx.kernels.gpu.timing import Calls, medians
from sparsefx.kernels.layer import Layer

_SHARED_BYTES = 200 << 10
"""Most that a program may ask for; where a device has less, its launch is refused and the candidate left out."""

Clock = Callable[[Calls, torch.device, int], dict[str, float]]


def candidates(kind: str, dtype: torch.dtype, rows: int) -> Iterator[Config]:
    """Configurations worth measuring for a pass, the default first."""
    first = default(kind, dtype, rows)
    yield first
    size = dtype.itemsize
    for columns in (32, 64, 128):
        for positions in (64, 128, 256) if kind != "wgrad" else (32, 64, 128):
            for stages in (3, 4):
                side = max(rows, columns) if kind == "wgrad" else positions
                config = replace(
                    first, columns=columns, positions=positions, stages=stages, warps=8 if rows * side > 8192 else 4
                )
                inner = positions if kind == "wgrad" else columns
                outer = columns if kind == "wgrad" else positions
                if config != first and stages * inner * (outer + rows) * size <= _SHARED_BYTES:
                    yield config


def tune(
    layers: Sequence[Layer],
    device: torch.device,
    *,
    dtypes: Sequence[torch.dtype] = (torch.bfloat16, torch.float32),
    rows: Sequence[int] = (8, 16, 32, 64, 128),
    density: float = 0.05,
    rounds: int = 10,
    table: Table | None = None,
    clock: Clock = medians,
    say: Callable[[str], None] = print,
) -> Table:
    """Measure the candidates of every pass and keep the fastest.

    Args:
        layers: Their shapes, strides and sizes make the table's rows.
        dtypes, rows, density: Types, rows of a tile and density of the masks, drawn in columns of `rows`.
        rounds: Timed calls of each candidate.
        table: To add to; a new one if None.
        clock: Milliseconds of calls by name.
        say: Told one line a table row.
    """
    table = Table() if table is None else table
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    for layer in layers:
        for dtype in dtypes:
            for h in rows:
                if not NARROWEST <= h <= layer.out:
                    continue
                t = tensors(layer, draw(layer, f"h{h}", density, device), dtype)
                for kind in PASSES:
                    config, share, ms = _best(layer, t, kind, h, rounds, clock)
                    entry = key(kind, layer.shape, (layer.stride, *layer.hw, layer.batch), dtype, h, share)
                    table.put(name, entry, config)
                    say(f"{entry}: {config} {ms:.4f} ms")
    return table


def _best(layer: Layer, t: Tensors, kind: str, rows: int, rounds: int, clock: Clock) -> tuple[Config, float, float]:
    """The fastest configuration of a pass, the tile column density it was measured at, and its milliseconds."""
    geometry, dtype, device = Geometry.of(t.mask, layer.spec), t.x.dtype, t.x.device
    times: dict[Config, float] = {}
    share = 0.0
    for config in candidates(kind, dtype, rows):
        configs = {k: default(k, dtype, rows) for k in PASSES} | {kind: config}
        plan = LayerPlan(t.mask, geometry, configs, unit=rows)
        share = (plan.backward if kind == "dgrad" else plan.forward).column_density.item()
        call = sparse_calls(layer, t, plan, kind, borders=False)["chwn"]
        try:
            times[config] = clock({"": call}, device, rounds)[""]
        except OutOfResources:
            continue
    best = min(times, key=lambda config: times[config])
    return best, share, times[best]
