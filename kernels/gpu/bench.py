"""The GPU kernel benchmark: each pass of each layer against the best dense kernel of the same precision.

Prints prediction beside measurement. Through the interpreter the same code runs on the CPU, where results are checked
and times mean nothing.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton
from torch import Tensor

from sparsefx.kernels.gpu.cases import (
    LAYERS,
    MASKS,
    PASSES,
    TOYS,
    Tensors,
    dense_calls,
    draw,
    exact,
    outer,
    plan_of,
    sparse_calls,
    tensors,
)
from sparsefx.kernels.gpu.choose import work_of
from sparsefx.kernels.gpu.model import H100, Ceilings, measure_ceilings, predict
from sparsefx.kernels.gpu.plan import LayerPlan
from sparsefx.kernels.gpu.plot import scatter
from sparsefx.kernels.gpu.timing import captured, fp32_precision, medians, with_graphs
from sparsefx.kernels.layer import Layer

PRECISIONS = {
    "bf16": (torch.bfloat16, "ieee"),
    "tf32": (torch.float32, "tf32"),
    "fp32": (torch.float32, "ieee"),
}


@dataclass(frozen=True)
class Row:
    """One pass of one layer. Times in ms are medians; `break_even` is the density where dense takes as long."""

    layer: str
    shape: tuple[int, ...]
    kind: str
    precision: str
    masks: str
    density: float
    column_density: float
    config: str
    sparse_ms: float
    dense_ms: float
    dense_kind: str
    ratio: float
    predicted_ms: float
    executed_tflops: float
    equivalent_tflops: float
    gb_per_s: float
    share_of_roofline: float
    error: float
    rebuild_ms: float
    break_even: float | None
    all_ms: dict[str, float]

    def __str__(self) -> str:
        return (
            f"{self.layer:28s} {self.kind} {self.precision} {self.masks:7s} density {self.density:.3f} columns "
            f"{self.column_density:.2f}  sparse {self.sparse_ms:8.3f} ms (predicted {self.predicted_ms:.3f})  dense "
            f"{self.dense_ms:8.3f} ms ({self.dense_kind})  ratio {self.ratio:5.2f}  executed "
            f"{self.executed_tflops:6.1f} equivalent {self.equivalent_tflops:7.1f} TFLOP/s  {self.gb_per_s:5.0f} GB/s  "
            f"roofline {self.share_of_roofline:4.0%}  error {self.error:.1e}  rebuild {self.rebuild_ms:.2f} ms  "
            f"break-even {self.break_even}"
        )

    def without_times(self) -> str:
        """What is true of an interpreted row."""
        return (
            f"{self.layer:16s} {self.kind} {self.precision} {self.masks:7s} density {self.density:.3f} columns "
            f"{self.column_density:.2f}  {self.config}  error {self.error:.1e}"
        )


def bench(
    device: torch.device,
    *,
    layers: Sequence[Layer] | None = None,
    masks: Sequence[str] = MASKS,
    trained: dict[str, Tensor] | None = None,
    density: float = 0.05,
    precisions: Sequence[str] = tuple(PRECISIONS),
    rounds: int = 20,
    compiled: bool = True,
    json_path: Path | None = None,
    plot_path: Path | None = None,
) -> list[Row]:
    """Time every pass, print a row each, and return the rows.

    Args:
        device: A CUDA device, or the CPU for the interpreter.
        layers: `LAYERS`, or `TOYS` on the CPU, if None.
        masks: Kinds of mask, see `draw`.
        trained: Masks by layer name or weight shape as text, such as "640x640x3x3": a further kind of mask.
        density: Of the masks that are drawn.
        precisions: Some of `PRECISIONS`.
        rounds: Timed calls of each kernel.
        compiled: Whether `torch.compile` is among the dense candidates of the forward pass.
        json_path, plot_path: Where to write the rows, and a plot (SVG) of ratio against tile column density.
    """
    cuda = device.type == "cuda"
    ceilings = measure_ceilings(device) if cuda else H100
    name = torch.cuda.get_device_name(device) if cuda else "Triton interpreter on the CPU: times mean nothing"
    print(f"{name}; ceilings of {ceilings.device}")
    rows: list[Row] = []
    torch.backends.cudnn.benchmark = cuda or torch.backends.cudnn.benchmark
    for layer in layers or (LAYERS if cuda else TOYS):
        for precision in precisions:
            dtype, switch = PRECISIONS[precision]
            dense: dict[str, dict[str, float]] = {}
            with fp32_precision(switch):
                for kind_of_mask, mask in _masks(layer, masks, trained or {}, density, device):
                    t = tensors(layer, mask, dtype)
                    for row in _rows(layer, t, kind_of_mask, precision, dense, rounds, compiled and cuda, ceilings):
                        rows.append(row)
                        print(row if cuda else row.without_times(), flush=True)
    if json_path:
        versions = {"torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda}
        document = {"device": name, "versions": versions, "ceilings": asdict(ceilings), "rows": [*map(asdict, rows)]}
        json_path.write_text(json.dumps(document, indent=1) + "\n")
    if plot_path:
        points = {f"{p} {k}": [(r.column_density, r.ratio) for r in rows if (r.precision, r.kind) == (p, k)]
                  for p in precisions for k in PASSES}  # fmt: skip
        scatter(plot_path, f"{name}", "tile column density", "dense time / sparse time", points)
    return rows


def _masks(
    layer: Layer, kinds: Sequence[str], trained: dict[str, Tensor], density: float, device: torch.device
) -> list[tuple[str, Tensor]]:
    found = [(kind, draw(layer, kind, density, device)) for kind in kinds]
    for name in (layer.name, "x".join(map(str, layer.shape))):
        if name in trained:
            found.append(("trained", trained[name].to(device)))
    return found


def _rows(
    layer: Layer,
    t: Tensors,
    masks: str,
    precision: str,
    dense: dict[str, dict[str, float]],
    rounds: int,
    compiled: bool,
    ceilings: Ceilings,
) -> list[Row]:
    device = t.x.device
    plan = plan_of(layer, t)
    rebuild = medians({"rebuild": lambda: plan.update_(t.mask)}, device, rounds)["rebuild"]
    cuda = device.type == "cuda"
    fuller = _fuller(layer, t) if cuda else None
    rows = []
    for kind in PASSES:
        calls = sparse_calls(layer, t, plan, kind, borders=cuda)
        want = exact(layer, t, kind)
        got = calls["chwn"]()
        error = _error(got if kind == "wgrad" else outer(layer, got), want)
        del want, got
        sparse = medians(with_graphs(calls, device), device, rounds)
        if kind not in dense:
            dense[kind] = medians(with_graphs(dense_calls(layer, t, kind, compiled), device), device, rounds)
        chosen = min((n for n in sparse if n.startswith("chwn")), key=lambda n: sparse[n])
        best = min(dense[kind], key=lambda n: dense[kind][n])
        meets = None
        if fuller:
            low = (t.mask.float().mean().item(), sparse[chosen])
            meets = _break_even(low, _fuller_time(layer, *fuller, kind, rounds), dense[kind][best])
        rows.append(
            _row(layer, t, plan, masks, precision, kind, ceilings, sparse | dense[kind], chosen, best, error, rebuild,
                 meets)
        )  # fmt: skip
    return rows


def _row(
    layer: Layer, t: Tensors, plan: LayerPlan, masks: str, precision: str, kind: str, ceilings: Ceilings,
    times: dict[str, float], chosen: str, best: str, error: float, rebuild: float,
    break_even: float | None,
) -> Row:  # fmt: skip
    pattern = plan.backward if kind == "dgrad" else plan.forward
    columns = pattern.column_density.item()
    work = work_of(kind, t.mask, plan.geometry, layer.hw, layer.batch, t.x.dtype, columns, pattern.tiling.unit)
    config = plan.configs[kind]
    said = predict(kind, work, config, ceilings)
    seconds = times[chosen] * 1e-3
    floor = max(said.executed_flops / ceilings.flops[work.precision], said.dram_bytes / ceilings.dram)
    return Row(
        layer=layer.name,
        shape=layer.shape,
        kind=kind,
        precision=precision,
        masks=masks,
        density=t.mask.float().mean().item(),
        column_density=columns,
        config=f"rows {config.rows} columns {config.columns} positions {config.positions} "
        f"{'first' if config.rows_first else 'last'} w{config.warps} s{config.stages}",
        sparse_ms=times[chosen],
        dense_ms=times[best],
        dense_kind=best,
        ratio=times[best] / times[chosen],
        predicted_ms=said.seconds * 1e3,
        executed_tflops=said.executed_flops / seconds / 1e12,
        equivalent_tflops=said.dense_flops / seconds / 1e12,
        gb_per_s=said.dram_bytes / seconds / 1e9,
        share_of_roofline=floor / seconds,
        error=error,
        rebuild_ms=rebuild,
        break_even=break_even,
        all_ms=times,
    )


def _fuller(layer: Layer, t: Tensors) -> tuple[Tensors, LayerPlan]:
    """The layer with the mask's columns joined to others', about twice as dense, to see how time grows."""
    moved = t.mask.roll(1, 1) | t.mask
    fuller = tensors(layer, moved, t.x.dtype)
    return fuller, plan_of(layer, fuller)


def _fuller_time(layer: Layer, t: Tensors, plan: LayerPlan, kind: str, rounds: int) -> tuple[float, float]:
    """Density and milliseconds of the fuller layer."""
    call = captured(sparse_calls(layer, t, plan, kind, borders=False)["chwn"])
    return t.mask.float().mean().item(), medians({"": call}, t.x.device, rounds)[""]


def _break_even(low: tuple[float, float], high: tuple[float, float], dense: float) -> float:
    """Density at which a straight line through two `(density, ms)` meets the dense time, within [0, 1]."""
    slope = (high[1] - low[1]) / max(high[0] - low[0], 1e-9)
    if slope <= 0:
        return 1.0 if low[1] < dense else 0.0
    return min(1.0, max(0.0, low[0] + (dense - low[1]) / slope))


def _error(got: Tensor, want: Tensor) -> float:
    """||got - want|| / ||want||."""
    return ((got.double() - want).norm() / want.norm().clamp_min(1e-30)).item()
