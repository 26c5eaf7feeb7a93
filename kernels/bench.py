"""Layer benchmark: the sparse CPU kernels against the best dense ones, pass by pass, in one interleaved run."""

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsefx.kernels.cpu import ConvPlan, LinearPlan, to_blocked
from sparsefx.kernels.cpu.abi import load
from sparsefx.kernels.layer import Layer, random_mask

PASSES = ("fprop", "dgrad", "wgrad")


@dataclass
class PassResult:
    """One pass of one layer. Times are medians in ms, spreads the quartile distance over the median.

    `error` is ||sparse - dense|| / ||dense|| against torch's fp32 result, whose own error it includes.
    """

    layer: str
    shape: str
    kind: str
    density: float
    live_columns: float
    dense_ms: float
    dense_spread: float
    dense_kind: str
    sparse_ms: float
    sparse_spread: float
    ratio: float
    useful_gflops: float
    dense_equivalent_gflops: float
    dense_gflops: float
    share_of_peak: float
    list_ms: float
    error: float
    dense_all_ms: dict[str, float] = field(default_factory=dict)


LAYERS = (
    Layer("512x512 3x3 4x4 b128", 512, 512, 3, 4, 128),
    Layer("640x640 3x3 8x8 b32", 640, 640, 3, 8, 32),
    Layer("64x64 3x3 32x32 b128", 64, 64, 3, 32, 128),
    Layer("1x1 2048 to 512 7x7 b64", 512, 2048, 1, 7, 64),
    Layer("linear 4096x4096 b512", 4096, 4096, 1, 0, 512),
    Layer("3x3/2 160 to 320 32x32 b32", 320, 160, 3, 32, 32, 2),
    Layer("1x1 1024 to 256 14x14 b16", 256, 1024, 1, 14, 16, density=0.1),
)


def bench_layers(
    layers: Sequence[Layer] = LAYERS,
    masks: dict[str, Tensor] | None = None,
    *,
    rounds: int = 7,
    threads: int = 2,
    clock: Callable[[], float] = time.perf_counter,
    json_path: Path | None = None,
) -> list[PassResult]:
    """Time every pass of every layer, print a row each, and return the rows.

    Dense and sparse calls alternate within a round, and every call allocates its result, the sparse weight gradient
    as a dense tensor too. Sparse calls include the collection of the weight's values.

    Args:
        layers: What to time.
        masks: Masks by layer name, of the weight's shape; random ones of the layer's density otherwise.
        rounds: Timed calls of each kernel.
        threads: OpenMP team.
        clock: Seconds; `time.thread_time` with one thread is steadier on a machine that others use.
        json_path: Where to write the rows as JSON.
    """
    torch.set_num_threads(threads)
    lib = load()
    peak = _peak(lib, threads)
    print(f"measured FMA peak {peak:.0f} GFLOP/s on {threads} threads")
    rows = []
    for layer in layers:
        results = _bench(layer, (masks or {}).get(layer.name), rounds, peak, clock)
        rows += results
        for row in results:
            print(_format(row), flush=True)
        dense, sparse = (sum(getattr(r, f"{k}_ms") for r in results) for k in ("dense", "sparse"))
        print(f"{layer.name:28s} all   dense {dense:8.2f} ms  sparse {sparse:8.2f} ms  ratio {dense / sparse:5.2f}")
    if json_path:
        json_path.write_text(json.dumps({"peak_gflops": peak, "rows": [asdict(r) for r in rows]}, indent=1))
    return rows


def _peak(lib: Any, threads: int) -> float:
    """The best of several tries, as another guest of the machine may hold a core for a second."""
    best = 0.0
    for _ in range(8):
        best = max(best, lib.sfx_peak(threads))
        time.sleep(0.2)
    return best


def clustered(rows: int, layers: Sequence[Layer] = LAYERS) -> dict[str, Tensor]:
    """Random masks of each layer's density, by its name, that exist in columns of `rows` output channels."""
    return {layer.name: random_mask(layer, rows) for layer in layers}


def _format(r: PassResult) -> str:
    parts = (
        f"{r.layer:28s} {r.shape:30s} {r.kind} d={r.density:.3f} columns {r.live_columns:.2f}",
        f"dense {r.dense_ms:8.2f} ms ±{r.dense_spread:3.0%} ({r.dense_kind})",
        f"sparse {r.sparse_ms:8.2f} ms ±{r.sparse_spread:3.0%}",
        f"ratio {r.ratio:5.2f}",
        f"useful {r.useful_gflops:5.0f}",
        f"equivalent {r.dense_equivalent_gflops:6.0f} GFLOP/s",
        f"dense {r.dense_gflops:4.0f}",
        f"peak {r.share_of_peak:4.0%}",
        f"lists {r.list_ms:6.2f} ms",
        f"error {r.error:.1e}",
    )
    return "  ".join(parts)


def _bench(layer: Layer, mask: Tensor | None, rounds: int, peak: float, clock: Callable[[], float]) -> list[PassResult]:
    setup = _linear if layer.size == 0 else _conv
    drawn, sparse, dense, macs, exact, plan, where = setup(layer, mask)
    results = []
    for kind in PASSES:
        got = sparse[kind]()
        wanted = exact[kind]()
        error = ((got - wanted).norm() / wanted.norm()).item()
        del got, wanted
        times = _interleaved({"sparse": sparse[kind], **dense[kind]}, rounds, clock)
        medians = {name: statistics.median(t) for name, t in times.items()}
        best = min(dense[kind], key=lambda name: medians[name])
        ours, theirs = medians["sparse"], medians[best]
        flops = 2 * macs / 1e6
        useful, lists = flops * plan.density, plan.tiling(kind, *where)[1]
        results.append(
            PassResult(
                layer=layer.name,
                shape=layer.text,
                kind=kind,
                density=plan.density,
                live_columns=_live_columns(drawn),
                dense_ms=theirs,
                dense_spread=_spread(times[best]),
                dense_kind=best,
                sparse_ms=ours,
                sparse_spread=_spread(times["sparse"]),
                ratio=theirs / ours,
                useful_gflops=useful / ours,
                dense_equivalent_gflops=flops / ours,
                dense_gflops=flops / theirs,
                share_of_peak=useful / ours / peak,
                list_ms=lists,
                error=error,
                dense_all_ms={name: medians[name] for name in dense[kind]},
            )
        )
    return results


def _conv(layer: Layer, mask: Tensor | None) -> tuple:
    mask = _mask(layer, mask)
    w = torch.randn(mask.shape) * 0.05 * mask
    x = torch.randn(layer.batch, layer.inputs, layer.size, layer.size)
    padding = layer.kernel // 2
    plan = ConvPlan(mask, layer.stride, padding)
    y = F.conv2d(x, w, None, layer.stride, padding)
    g = torch.randn_like(y)
    xb, gb, hw, n = to_blocked(x), to_blocked(g), (layer.size, layer.size), layer.batch
    dense: dict[str, dict[str, Callable]] = {kind: {} for kind in PASSES}
    for name, memory_format in (("nchw", torch.contiguous_format), ("nhwc", torch.channels_last)):
        a, v, b = (t.contiguous(memory_format=memory_format) for t in (x, w, g))
        dense["fprop"][name] = lambda a=a, v=v: F.conv2d(a, v, None, layer.stride, padding)
        for kind, wanted in (("dgrad", 0), ("wgrad", 1)):
            dense[kind][name] = lambda a=a, v=v, b=b, wanted=wanted: _conv_backward(layer, b, a, v, wanted)
    values = plan.collect(w)  # by fprop, for both
    sparse = {
        "fprop": lambda: plan.fprop(xb, w, images=n),
        "dgrad": lambda: plan.dgrad(gb, values, hw, images=n),
        "wgrad": lambda: plan.wgrad(gb, xb, images=n),
    }
    exact = {
        "fprop": lambda: to_blocked(dense["fprop"]["nchw"]()),
        "dgrad": lambda: to_blocked(dense["dgrad"]["nchw"]()),
        "wgrad": lambda: dense["wgrad"]["nchw"]() * mask,
    }
    return mask, sparse, dense, w.numel() * y[:, 0].numel(), exact, plan, (*hw, n)


def _conv_backward(layer: Layer, g: Tensor, x: Tensor, w: Tensor, wanted: int) -> Tensor:
    stride, padding = [layer.stride] * 2, [layer.kernel // 2] * 2
    output_mask = [wanted == 0, wanted == 1, False]
    return torch.ops.aten.convolution_backward(
        g, x, w, None, stride, padding, [1, 1], False, [0, 0], 1, output_mask
    )[wanted]  # fmt: skip


def _linear(layer: Layer, mask: Tensor | None) -> tuple:
    mask = _mask(layer, mask)
    w, x = torch.randn(mask.shape) * 0.05 * mask, torch.randn(layer.batch, layer.inputs)
    g = torch.randn(layer.batch, layer.out)
    plan = LinearPlan(mask)
    onednn = torch.ops.mkldnn._linear_pointwise
    dense = {
        "fprop": {"mkl": lambda: F.linear(x, w), "onednn": lambda: onednn(x, w, None, "none", [], "")},
        "dgrad": {"mkl": lambda: g @ w, "onednn": lambda: onednn(g, w.T, None, "none", [], "")},
        "wgrad": {"mkl": lambda: g.T @ x, "onednn": lambda: onednn(g.T, x.T, None, "none", [], "")},
    }
    values = plan.collect(w)  # by fprop, for both
    sparse = {
        "fprop": lambda: plan.fprop(x, w),
        "dgrad": lambda: plan.dgrad(g, values),
        "wgrad": lambda: plan.wgrad(g, x),
    }
    exact = {kind: dense[kind]["mkl"] for kind in ("fprop", "dgrad")} | {"wgrad": lambda: (g.T @ x) * mask}
    return mask, sparse, dense, w.numel() * layer.batch, exact, plan, (1, 1, layer.batch)


def _mask(layer: Layer, mask: Tensor | None) -> Tensor:
    if mask is not None and tuple(mask.shape) != layer.shape:
        raise ValueError(
            f"{layer.name}: expected a mask {layer.shape}, got {tuple(mask.shape)}; pass this layer's mask"
        )
    return random_mask(layer) if mask is None else mask


def _live_columns(mask: Tensor) -> float:
    """Share of (input channel, tap) columns that some output channel reads."""
    return mask.flatten(1).any(0).float().mean().item()


def _interleaved(calls: dict[str, Callable], rounds: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            start = clock()
            call()
            times[name].append((clock() - start) * 1e3)
    return times


def _spread(times: list[float]) -> float:
    low, middle, high = statistics.quantiles(times, n=4)
    return (high - low) / middle
