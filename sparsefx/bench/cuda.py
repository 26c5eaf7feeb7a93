"""`python -m sparsefx bench --device cuda`: GPU kernels, then whole training steps against compiled dense ones."""

import argparse
import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsefx.api import sparsify
from sparsefx.bench.settings import INTERVAL, SETTINGS
from sparsefx.bench.trainers import load
from sparsefx.errors import SparsefxError
from sparsefx.kernels.blocked import Converted
from sparsefx.layers import MASK, sparse_layers

NETWORKS = {"vgg16-d": 128, "wrn-16-10": 128, "wrn-28-2": 128, "resnet50": 64}
"""The networks and their batch sizes on a GPU."""
PRECISIONS = ("bf16", "tf32")
_BUDGET = 420.0
"""Seconds after which no further network is begun, so that all stays below ten minutes."""


def run(args: argparse.Namespace) -> None:
    """Do what the options of `bench` say.

    Raises:
        SparsefxError: there is no CUDA device, and the interpreter is not asked for.
    """
    if not args.interpret and not torch.cuda.is_available():
        raise SparsefxError(
            "bench: expected a CUDA device, got none; run it where there is one, or add --interpret to check the same "
            "kernels on toy sizes in Triton's interpreter"
        )
    from sparsefx.kernels.gpu.bench import bench
    from sparsefx.kernels.gpu.cases import MASKS

    start = time.perf_counter()
    device = torch.device("cpu" if args.interpret else "cuda")
    trained = _trained(args.trained) if args.trained else None
    if args.layers or not args.models:
        bench(
            device,
            masks=(f"h{args.clustered}",) if args.clustered else ("random", "h8") if args.interpret else MASKS,
            trained=trained,
            density=args.densities[0] if args.densities else 0.05,
            precisions=("bf16", "fp32") if args.interpret else ("bf16", "tf32", "fp32"),
            rounds=1 if args.interpret else args.rounds,
            compiled=not args.no_compile,
            json_path=args.json,
            plot_path=args.plot,
        )
    if args.interpret:
        print(f"toy training step: relative error of the weights' change {toy_step():.1e}")
        return
    if args.models or not args.layers:
        names = [n for n in NETWORKS if not args.models or "all" in args.models or n in args.models]
        rows = steps(names, device, args.clustered or 64, args.rounds, not args.no_compile, start + _BUDGET)
        if args.json:
            document = json.loads(args.json.read_text()) if args.json.exists() else {}
            args.json.write_text(json.dumps(document | {"steps": rows}, indent=1) + "\n")


def steps(
    names: list[str], device: torch.device, h: int, rounds: int, compiled: bool, until: float
) -> list[dict[str, Any]]:
    """Time whole training steps: dense, and sparse with masks in columns of `h` and with single weights.

    Args:
        until: Clock time after which no further network is begun; those left out are named.
    """
    rows = []
    for name in names:
        for precision in PRECISIONS:
            if time.perf_counter() > until:
                print(f"{name} {precision}: left out, time is up; run it alone with --models {name}")
                continue
            batch, density = NETWORKS[name], SETTINGS[name].density
            torch.backends.cudnn.benchmark = True  # as users set it for speed
            dense = _fastest({f: _step(name, precision, device, f, compiled) for f in FORMATS}, device, rounds)
            for kind in (("column", h), "weight"):
                sparse = _fastest({"": _step(name, precision, device, "", compiled, density, kind)}, device, rounds)
                row = {"model": name, "batch": batch, "precision": precision, "density": density, "masks": str(kind),
                       "dense_ms": dense[0], "dense_kind": dense[1], "sparse_ms": sparse[0],
                       "ratio": dense[0] / sparse[0]}  # fmt: skip
                rows.append(row)
                print(f"{name} b{batch} {precision} {kind}: dense {dense[0]:.2f} ms ({dense[1]})  sparse "
                      f"{sparse[0]:.2f} ms  ratio {row['ratio']:.2f}", flush=True)  # fmt: skip
    return rows


FORMATS = {"channels_last": torch.channels_last, "nchw": torch.contiguous_format}


def _fastest(calls: dict[str, Callable[[], None]], device: torch.device, rounds: int) -> tuple[float, str]:
    """Milliseconds and name of the fastest of some steps."""
    from sparsefx.kernels.gpu.timing import medians

    times = medians(calls, device, rounds)
    best = min(times, key=lambda name: times[name])
    return times[best], best


def _step(
    name: str,
    precision: str,
    device: torch.device,
    memory_format: str,
    compiled: bool,
    density: float | None = None,
    granularity: Any = "weight",
) -> Callable[[], None]:
    """A training step of a network on one batch; sparse where there is a density."""
    torch.manual_seed(0)
    setting = SETTINGS[name]
    layout = FORMATS[memory_format or "channels_last"]
    images, labels = (t.to(device) for t in setting.data(NETWORKS[name]))
    images = images.contiguous(memory_format=layout)
    model = setting.make().to(device).to(memory_format=layout)  # pyright: ignore[reportCallIssue]
    scheduler: Any = None
    if density is not None:
        model = sparsify(model, density, granularity=granularity, example_inputs=images)
        scheduler = model.scheduler
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=5e-4, fused=True)
    if scheduler is not None:
        scheduler.attach(optimizer, steps_per_update=INTERVAL, total_steps=1000 * INTERVAL)
        _gradients(model, images, labels, precision, device)  # eager, so that the backends are measured
        model.zero_grad()
    return step_of(
        model, torch.compile(model, dynamic=False) if compiled else model, optimizer, images, labels, precision, device
    )


def step_of(
    model: nn.Module,
    run_model: Callable[[Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    precision: str,
    device: torch.device,
) -> Callable[[], None]:
    """Forward, backward and optimizer on one batch."""

    def step() -> None:
        _gradients(run_model, images, labels, precision, device)
        optimizer.step()
        optimizer.zero_grad()

    model.train()
    return step


def _gradients(
    run_model: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, precision: str, device: torch.device
) -> None:
    """Forward and backward, both in the precision."""
    from sparsefx.kernels.gpu.timing import fp32_precision

    half = torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()
    with fp32_precision("tf32" if precision == "tf32" else "ieee"):
        with half:
            loss = F.cross_entropy(run_model(images), labels)
        loss.backward()


def _trained(path: Path) -> dict[str, Tensor]:
    """Masks of a trained network by the shape of the weight, as the layer benchmark looks them up."""
    state = load(path)["state_dict"]
    return {"x".join(map(str, mask.shape)): mask for name, mask in state.items() if name.endswith(MASK)}


def toy_step() -> float:
    """Train a toy network for a step with the GPU kernels in the interpreter, and again masked dense.

    Returns:
        ||u - v|| / ||v|| of the changes u and v of all weights.
    """
    from sparsefx.kernels.sparse_gpu import SparseGpu

    def change(interpreted: bool) -> Tensor:
        torch.manual_seed(0)
        body = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, 2, 1), nn.ReLU(), nn.Flatten()]
        model = sparsify(nn.Sequential(*body, nn.Linear(64, 8)), 0.2, granularity=("column", 8), seed=0)
        images, labels = torch.randn(4, 3, 4, 4), torch.randint(8, (4,))
        for _, layer in sparse_layers(model):
            layer.runtime.choose = _only(SparseGpu) if interpreted else None
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        before = torch.cat([p.detach().flatten() for p in model.parameters()])
        step_of(model, model, optimizer, images, labels, "fp32", images.device)()
        return torch.cat([p.detach().flatten() for p in model.parameters()]) - before

    dense = change(interpreted=False)
    return ((change(interpreted=True) - dense).norm() / dense.norm()).item()


def _only(backend: Callable[..., Any]) -> Callable[..., Any]:
    """A chooser that always runs one kind of backend."""
    made: dict[tuple, Any] = {}

    def choose(kind: str, spec: Any, x: Tensor, grad: Tensor | None, weight: Tensor, mask: Tensor) -> Any:
        key = spec.key if spec else ()
        if key not in made:
            made[key] = backend(mask, spec)
        return Converted(made[key]) if spec is not None and spec.images else made[key]

    return choose
