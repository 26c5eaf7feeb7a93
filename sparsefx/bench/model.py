"""Time one network: its training step, inference, memory and where the time goes, dense and sparse in one run."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from sparsefx import moments
from sparsefx.bench.breakdown import breakdown
from sparsefx.bench.measure import Amortized, UpdateTimes, amortize, interleaved, ms
from sparsefx.bench.memory import activation_bytes, sparse_bytes
from sparsefx.bench.settings import INTERVAL, Setting
from sparsefx.bench.trainers import DENSE, HALF, Masks, Trainer, dense, sparse, stored

PARTS = ("step", "inference", "memory", "breakdown", "epoch")
Say = Callable[[str], None]
_TRIED = 3
"""Steps of the sparse network in each memory format before it takes the faster one, as dense baselines come in both."""
UPDATES, EVERY = 3, 3
"""Updates that are timed, and steps to one. Steps in and out of the window are timed with the masks as they were drawn:
a few updates in a row move most weights to the layers that are nearest to the images and cost the most."""
_SPARSE = "sparse"
_ENDLESS = 1_000_000
"""An interval whose update never comes."""


@dataclass(frozen=True)
class Request:
    """What to time of a network.

    Attributes:
        parts: Of `PARTS`; `"step"` always comes first.
        rounds: Turns of each trainer's steps.
        compiled: Whether torch.compile is among the dense baselines; it takes minutes to compile.
        variants: Dense baselines, by name; all where empty.
    """

    batch: int
    density: float
    masks: Masks = field(default_factory=Masks)
    parts: Sequence[str] = PARTS[:-1]
    rounds: int = 9
    compiled: bool = True
    variants: Sequence[str] = ()


def bench_model(setting: Setting, request: Request, say: Say = print) -> dict[str, Any]:
    """Time one network.

    Args:
        say: Told of each phase as it begins.
    Returns:
        Plain values; times in milliseconds, memory in bytes.
    """
    trainers, failed = _dense_trainers(setting, request, say)
    outside, memory_format = _faster_format(setting, request, trainers, say)
    inside = None
    if outside.scheduler.window.length > 0:
        inside = _sparse(setting, request, memory_format, interval=_ENDLESS, inside=True)
    calls = {name: trainer.step for name, trainer in trainers.items()}
    for name, trainer in {"sparse": outside, "window": inside}.items():
        if trainer is not None:
            calls[name] = trainer.step
            trainer.step()
            trainer.step()
    say(f"training step: {request.rounds} rounds of {', '.join(calls)}")
    measured = interleaved(calls, request.rounds, rare=HALF)
    best = min((name for name in trainers if name not in HALF), key=lambda name: statistics.median(measured[name]))
    window = moments.memory(outside.optimizer.param_groups[0])
    changes = None if inside is None else _changes(setting, request, memory_format, say)
    average = amortize(measured["sparse"], measured.get("window", ()), changes, window)
    row: dict[str, Any] = {
        "model": setting.name,
        "batch": request.batch,
        "density": _density(outside),
        "masks": request.masks.kind,
        "parameters": sum(p.numel() for p in outside.model.parameters()),
        "dense": {name: ms(measured[name]) for name in trainers},
        "failed": failed,
        "best_dense": best,
        "memory_format": memory_format,
        "sparse": {**average.to_dict(), "spread": ms(measured["sparse"])["spread"]},
        "ratio": 1e3 * statistics.median(measured[best]) / average.step,
        "ratio_without_window": 1e3 * statistics.median(measured[best]) / average.outside,
        "at_least": setting.at_least,
        "epoch_of_steps_ms": average.step * INTERVAL,
        "backends": _backends(outside),
    }
    row.update(_more(setting, request, trainers, best, memory_format, outside, inside, average, say))
    return row


def _more(
    setting: Setting,
    request: Request,
    trainers: dict[str, Trainer],
    best: str,
    memory_format: str,
    outside: Trainer,
    inside: Trainer | None,
    average: Amortized,
    say: Say,
) -> dict[str, Any]:
    """The parts after the step."""
    row: dict[str, Any] = {}
    if "memory" in request.parts:
        say("memory of activations")
        eager = trainers.get(best.replace(" compiled", "")) or trainers[best]
        row["memory"] = {
            "dense_activations": activation_bytes(eager),
            "sparse_activations": activation_bytes(outside),
            **sparse_bytes(inside or outside),
        }
    if "breakdown" in request.parts:
        say("breakdown by kind of work")
        eager = best.replace(" compiled", "")
        row["breakdown"] = {
            "dense": breakdown(trainers[eager]) if eager in trainers else None,
            "sparse": breakdown(outside),
        }
        if inside is not None:
            row["breakdown"]["sparse in the window"] = breakdown(inside)
        parts = row["breakdown"]["sparse"]
        row["optimizer_share"] = parts.get("optimizer and masks", 0.0) / sum(parts.values())
    if "inference" in request.parts:
        served = _served(setting, request, trainers, memory_format, outside, say)
        row["inference"] = {str(size): _inference(setting, size, served, request.rounds, say) for size in (1, 128)}
    if "epoch" in request.parts:
        row["epoch"] = _epoch(setting, request, trainers[best], memory_format, say)
    return row


def _dense_trainers(setting: Setting, request: Request, say: Say) -> tuple[dict[str, Trainer], dict[str, str]]:
    """Warm dense trainers, and why the others cannot run."""
    names = list(request.variants) or [
        name
        for name in (*DENSE, *HALF)
        if (request.compiled or "compiled" not in name) and (len(setting.image) == 3 or not name.startswith("nhwc"))
    ]
    found, failed = {}, {}
    for name in names:
        say(f"dense: warming up {name}")
        try:
            trainer = dense(setting, request.batch, name)
            trainer.step()
        except Exception as error:  # a baseline that torch cannot run must not end the benchmark
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            say(f"dense: {name} does not run ({failed[name]})")
            continue
        found[name] = trainer
    if not found.keys() - set(HALF):
        raise RuntimeError(f"{setting.name}: expected a dense baseline that runs, got none ({failed})")
    return found, failed


def _faster_format(setting: Setting, request: Request, trainers: dict[str, Trainer], say: Say) -> tuple[Trainer, str]:
    """The sparse network in the memory format of dense baselines in which it is the faster, and that format."""
    found: dict[str, Trainer] = {}
    for name in dict.fromkeys(name.split()[0] for name in trainers if name not in HALF):
        say(f"sparse: building and choosing backends, {name}")
        found[name] = _sparse(setting, request, name, interval=_ENDLESS)
        found[name].step()
        found[name].step()
    tried = interleaved({name: trainer.step for name, trainer in found.items()}, _TRIED)
    fastest = min(tried, key=lambda name: statistics.median(tried[name]))
    return found[fastest], fastest


def _sparse(setting: Setting, request: Request, memory_format: str, **options: Any) -> Trainer:
    return sparse(setting, request.batch, request.density, request.masks, memory_format, **options)


def _changes(setting: Setting, request: Request, memory_format: str, say: Say) -> UpdateTimes:
    """Times of updates and of the steps after them."""
    say(f"{UPDATES} updates")
    trainer = _sparse(setting, request, memory_format, interval=EVERY, inside=True)
    trainer.step()
    times = UpdateTimes(trainer)
    for _ in range(UPDATES * EVERY):
        times.step()
    return times


def _density(trainer: Trainer) -> float:
    layers = trainer.scheduler.layers.values()
    return sum(int(layer.weight_mask.sum()) for layer in layers) / sum(layer.weight_mask.numel() for layer in layers)


def _backends(trainer: Trainer) -> dict[str, dict[str, str]]:
    scheduler = trainer.scheduler
    return {name: scheduler.specializer.backends(layer) for name, layer in scheduler.layers.items()}


def _served(
    setting: Setting, request: Request, trainers: dict[str, Trainer], memory_format: str, ours: Trainer, say: Say
) -> "dict[str, _Served]":
    """Whatever a user may pick for inference: the dense baselines, and the sparse network in all their variants.

    Args:
        ours: The sparse network, stored in `memory_format`.
    """
    found = {name: _Served(trainer, trainer.run, name.split()[0]) for name, trainer in trainers.items()}
    for name in dict.fromkeys(name.split()[0] for name in trainers):
        say(f"inference: building the sparse network in {name}")
        trainer = ours if name == memory_format else _sparse(setting, request, name)
        found[f"{_SPARSE} {name}"] = _Served(trainer, trainer.run, name)
        if f"{name} compiled" in trainers:
            found[f"{_SPARSE} {name} compiled"] = _Served(trainer, torch.compile(trainer.model), name)
    return found


@dataclass(frozen=True)
class _Served:
    """A network in eval mode on a batch, or on none yet."""

    trainer: Trainer
    run: Callable[[torch.Tensor], Any]
    memory_format: str
    images: torch.Tensor = field(default_factory=lambda: torch.empty(0))

    def on(self, images: torch.Tensor) -> "_Served":
        return replace(self, images=stored(images, self.memory_format))

    def __call__(self) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.trainer.half):
            self.run(self.images)


@torch.no_grad()
def _inference(setting: Setting, batch: int, served: dict[str, _Served], rounds: int, say: Say) -> dict[str, Any]:
    """Milliseconds of a forward pass in eval mode."""
    say(f"inference, batch {batch}")
    images, _ = setting.data(batch)
    calls: dict[str, _Served] = {}
    for name, network in served.items():
        network.trainer.model.eval()
        calls[name] = network.on(images)
        try:
            calls[name]()
            calls[name]()
        except Exception as error:  # a baseline that torch cannot run must not end the benchmark
            say(f"inference: {name} does not run ({type(error).__name__})")
            del calls[name]
    measured = interleaved(calls, 3 * rounds if batch == 1 else rounds, rare=HALF)
    for network in served.values():
        network.trainer.model.train()
    rows = {name: ms(times) for name, times in measured.items()}
    ours = [name for name in rows if name.startswith(_SPARSE)]
    dense = [name for name in rows if name not in HALF and name not in ours]
    fastest, best = (min(names, key=lambda name: rows[name]["ms"]) for names in (ours, dense))
    return {**rows, "best_dense": best, "best_sparse": fastest, "ratio": rows[best]["ms"] / rows[fastest]["ms"]}


def _epoch(setting: Setting, request: Request, best: Trainer, memory_format: str, say: Say) -> dict[str, float]:
    """Milliseconds of `INTERVAL` real steps with their window, their update and the rebuilding after it, in turns."""
    say(f"an epoch of {INTERVAL} steps, dense and sparse in turns")
    ours = _sparse(setting, request, memory_format)
    ours.step()
    spent = {"dense": 0.0, "sparse": 0.0}
    done = 0
    while done < INTERVAL:
        count = min(30, INTERVAL - done)
        for name, trainer in (("dense", best), ("sparse", ours)):
            start = time.perf_counter()
            for _ in range(count):
                trainer.step()
            spent[name] += time.perf_counter() - start
        done += count
    assert len(ours.history) == (ours.scheduler.window.length > 0)
    return {
        "dense_ms": 1e3 * spent["dense"],
        "sparse_ms": 1e3 * spent["sparse"],
        "ratio": spent["dense"] / spent["sparse"],
    }
