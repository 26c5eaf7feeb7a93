"""A performance model: the time of each kernel from its bytes, products and launches against a device's ceilings.

It chooses between tile sizes before anything is measured, and the benchmark prints it beside the measurement, so that
a gap shows. Its ceilings come from `measure_ceilings` on a device; `H100` holds published ones for where there is none.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from sparsefx.kernels.gpu.config import Config


@dataclass(frozen=True)
class Ceilings:
    """What a device reaches at best.

    Attributes:
        device: Its name.
        flops: Products and sums per second by precision: "ieee", "tf32", "fp16", "bf16".
        dram, l2: Bytes per second.
        launch: Seconds from one kernel to the next.
    """

    device: str
    flops: dict[str, float]
    dram: float
    l2: float
    launch: float


H100 = Ceilings(
    "H100 SXM, published (not measured here)",
    {"ieee": 60e12, "tf32": 395e12, "fp16": 790e12, "bf16": 790e12},
    3.0e12,
    5.5e12,
    3e-6,
)


@dataclass(frozen=True)
class Work:
    """A layer's call.

    Attributes:
        rows, columns: The matrix of the pass: `[O, I * taps]`, for dgrad `[I, O * taps]`.
        taps: Of the kernel.
        sources, results: Positions of the source and of the result; those of the output bound the product.
        products: Positions that a (row, column) pair meets.
        column_density: Share of live (tile, column) pairs.
        precision: "ieee", "tf32", "fp16" or "bf16".
        unit: Rows that a tile holds, 0 if it is full.
    """

    rows: int
    columns: int
    taps: int
    sources: int
    results: int
    products: int
    column_density: float
    precision: str
    unit: int = 0

    @property
    def bytes_each(self) -> int:
        """Bytes of an activation."""
        return 2 if self.precision in ("fp16", "bf16") else 4


@dataclass(frozen=True)
class Prediction:
    """Seconds, and what they are made of.

    Attributes:
        executed_flops: Products and sums that are carried out, padding of tiles included.
        dense_flops: Those of the dense layer.
        dram_bytes, l2_bytes: Traffic.
        bound: The ceiling that decides: "products", "dram", "l2" or "launch".
    """

    seconds: float
    executed_flops: float
    dense_flops: float
    dram_bytes: float
    l2_bytes: float
    bound: str


def narrow_share(rows: int) -> float:
    """Share of the matrix unit's rate with `rows` on the N side of an m64nNk16 product.

    The product takes N / 2 cycles, and its operands of (64 + N) * 16 halves leave shared memory at 128 bytes a cycle.
    """
    return min(1.0, (rows / 2) / (16 + rows / 4))


def predict(kind: str, work: Work, config: Config, ceilings: Ceilings = H100) -> Prediction:
    """The time of a pass on `[C, H, W, N]` activations, weight packing and the reduction of splits included."""
    tiles = -(-work.rows // (work.unit or config.rows))
    live = tiles * work.columns * work.column_density
    dense_flops = 2.0 * work.rows * work.columns * work.products
    side = max(config.rows, 64) if config.rows_first else config.rows
    executed = 2.0 * live * side * work.products
    share = 1.0 if config.rows_first else narrow_share(config.rows)
    size = work.bytes_each
    rows_of_source = work.columns // work.taps
    if kind == "wgrad":
        block_traffic = live / config.columns * (config.rows + config.columns) * work.products * size
        partial = live * config.rows * 4.0
        gradient = work.rows * work.columns * size
        dram = (rows_of_source * work.sources + work.rows * work.results) * size + 2 * partial + gradient
        l2, launches = block_traffic + 2 * partial, 2
    else:
        packed = live * config.rows * size
        blocks = work.products / config.positions
        dram = (rows_of_source * work.sources + work.rows * work.results) * size + 3 * packed
        l2, launches = live * work.products * size + blocks * packed, 2
    times = {
        "products": executed / (ceilings.flops[work.precision] * share),
        "dram": dram / ceilings.dram,
        "l2": l2 / ceilings.l2,
        "launch": launches * ceilings.launch,
    }
    bound = max(times, key=lambda name: times[name])
    seconds = max(times["products"], times["dram"], times["l2"]) + times["launch"]
    return Prediction(seconds, executed, dense_flops, dram, l2, bound)


def predict_transpose(elements: int, bytes_each: int, ceilings: Ceilings = H100) -> float:
    """Seconds of one change of layout."""
    return 2 * elements * bytes_each / ceilings.dram + ceilings.launch


def measure_ceilings(device: torch.device) -> Ceilings:
    """Measure a CUDA device: products by the vendor's library, copies, and the gap between launches."""
    side = 8192
    flops = {}
    for name, dtype in (("ieee", torch.float32), ("tf32", torch.float32), ("fp16", torch.float16)):
        a = torch.randn(side, side, device=device, dtype=dtype)
        before = torch.backends.cuda.matmul.fp32_precision
        torch.backends.cuda.matmul.fp32_precision = "tf32" if name == "tf32" else "ieee"
        flops[name] = 2 * side**3 / _seconds(lambda a=a: a @ a, device)
        torch.backends.cuda.matmul.fp32_precision = before
    b = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    flops["bf16"] = 2 * side**3 / _seconds(lambda: b @ b, device)
    large, small = (torch.zeros(n, dtype=torch.uint8, device=device) for n in (1 << 30, 8 << 20))
    one = torch.zeros(1, device=device)
    return Ceilings(
        torch.cuda.get_device_name(device),
        flops,
        2 * large.numel() / _seconds(large.clone, device),
        2 * small.numel() / _seconds(small.clone, device),
        _seconds(lambda: one.add_(1), device, 1000),
    )


def _seconds(call: Callable[[], object], device: torch.device, calls: int = 20) -> float:
    for _ in range(3):
        call()
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        call()
    torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / calls
