"""Measurements of a model before and after `compact`."""

import statistics
import time
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

from sparsefx.graph.trace import Interpreter

_ROUNDS = 20
_SECONDS = 2.0
"""Time measurements stop after this many rounds or seconds, whichever is first, but not before three rounds."""


@torch.no_grad()
def measured_shapes(model: fx.GraphModule, inputs: tuple) -> dict[fx.Node, torch.Size]:
    """Run a graph and return the shape of every tensor in it by node."""
    shapes: dict[fx.Node, torch.Size] = {}

    class Recorder(Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            if isinstance(result, Tensor):
                shapes[n] = result.shape
            return result

    Recorder(model).run(*_copies(inputs))
    return shapes


@torch.no_grad()
def outputs(model: nn.Module, inputs: tuple) -> Tensor:
    """Return all numbers that a model computes, float64 `[n]`."""
    tensors = [x for x in tree_leaves(model(*_copies(inputs))) if isinstance(x, Tensor)]
    return torch.cat([x.cpu().double().flatten() for x in tensors] or [torch.zeros(0, dtype=torch.float64)])


def relative_difference(got: Tensor, expected: Tensor) -> float:
    """Return ||got - expected|| / ||expected||, infinite if they differ in length."""
    if len(got) != len(expected):
        return float("inf")
    norm = expected.norm()
    return float((got - expected).norm() / torch.where(norm > 0, norm, 1))


def tolerance(model: nn.Module) -> float:
    """Return the relative difference that arithmetic explains: the root of the coarsest parameter's epsilon."""
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    return max((torch.finfo(dtype).eps for dtype in dtypes), default=torch.finfo().eps) ** 0.5


@torch.no_grad()
def measure(before: nn.Module, after: nn.Module, inputs: tuple) -> dict[str, dict[str, Any]]:
    """Return `multiply_adds` and `seconds` per forward of two models; seconds are medians of interleaved calls."""
    models = {"before": before, "after": after}
    work: dict[str, int] = {}
    for name, model in models.items():
        with FlopCounterMode(display=False) as counter:
            model(*_copies(inputs))
        work[name] = counter.get_total_flops() // 2
    times: dict[str, list[float]] = {name: [] for name in models}
    start = time.perf_counter()
    for done in range(_ROUNDS):
        if done >= 3 and time.perf_counter() - start > _SECONDS:
            break
        for name, model in models.items():
            times[name].append(_time(model, inputs))
    return {"multiply_adds": work, "seconds": {name: statistics.median(each) for name, each in times.items()}}


def _time(model: nn.Module, inputs: tuple) -> float:
    mine = _copies(inputs)
    _synchronize(inputs)
    start = time.perf_counter()
    model(*mine)
    _synchronize(inputs)
    return time.perf_counter() - start


def _synchronize(inputs: tuple) -> None:
    if any(isinstance(x, Tensor) and x.is_cuda for x in tree_leaves(inputs)):
        torch.cuda.synchronize()


def _copies(inputs: tuple) -> tuple:
    return tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, inputs)
