"""Run a graph as it is fastest: layer by layer, in regions, dense, sparse; each is checked against it, then timed."""

import math
import warnings
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules import module as torch_module
from torch.utils import _pytree as pytree

from sparsefx.errors import TraceWarning
from sparsefx.graph.chains import chains, run_joined, run_sparse
from sparsefx.graph.dense import dense
from sparsefx.graph.fuse import fuse
from sparsefx.graph.layout import DTYPES, assign, record
from sparsefx.graph.segments import segmented
from sparsefx.graph.snapshot import RandomState, State
from sparsefx.graph.trace import Container, Interpreter, function
from sparsefx.kernels.spec import is_channels_last
from sparsefx.layers import SparseLayer

Choose = Callable[[tuple, dict[str, Callable[[], Any]]], str]
"""`(key, calls) -> name` of the call to prefer, by measurement or from a table; asked again when its attribute
`generation` changes, as after a table was loaded. Its attribute `running` is told what each call runs."""
LAYERS, REGIONS, DENSE, SPARSE, JOINED = "layers", "regions", "dense", "sparse", "joined dense"
"""Names of the graphs to choose from."""
_TOLERANCE = 1e-2
"""Relative norm of the difference between both graphs' outputs: kernels round differently, and a wrong graph is far."""
_NUDGE, _NUDGED = 1e-6, 100
"""Where rounding alone moves the outputs further, as a BatchNorm over two values does: at most so many times what
inputs changed by so much do to the graph itself."""


_MOST_MEASURED = 16
"""After so many kinds of calls new ones are no longer measured: ever new sizes would measure at each call."""


class Variant:
    """A rewritten graph, as a function of the model, and the guards of the modules that it does not call as they are.

    Args:
        graph: The new graph.
        model: Whose layers are joined to segments, where there may be any.
        absorbed: What each of these modules must stay like.
        unmasked: Sparse layers whose weight gradient only the weight's hook masks.
    """

    def __init__(
        self,
        name: str,
        graph: fx.Graph,
        absorbed: tuple[Container, ...],
        unmasked: tuple[SparseLayer, ...] = (),
        model: nn.Module | None = None,
    ) -> None:
        self.name, self.graph, self.absorbed, self.unmasked = name, graph, absorbed, unmasked
        self.function = function(graph)
        joined = None if model is None else segmented(model, graph)
        self.eager = self.function if joined is None else function(joined)

    def holds(self) -> bool:
        """Whether every absorbed module is as it was: same object and mode, no hooks, gradients masked."""
        for container in self.absorbed:
            if not container.holds():
                return False
        return all(layer.masks_gradient for layer in self.unmasked)


class Chooser:
    """The choice between a graph, its regions, and dense layers, once for each kind of call.

    Attributes:
        compiled: What a compiled graph runs: the latest choice; None for the graph itself.
        wrong: Names of rewritten graphs that gave other results than the graph itself, and are not run.
    """

    def __init__(self, model: nn.Module, graph: fx.Graph, choose: Choose) -> None:
        self.model, self.plain, self.choose = model, function(graph), choose
        self.old = graph
        self.compiled: Variant | None = None
        self.wrong: set[str] = set()
        self._built: dict[tuple, dict[str, Variant]] = {}
        self._choices: dict[tuple, Variant | None] = {}
        self._generation = 0

    def run(self, inputs: tuple[Tensor, ...]) -> Any:
        """Run what was chosen for such a call, choosing first if need be."""
        if torch.compiler.is_compiling():
            variant = self.compiled
            if variant is not None and not variant.holds():
                variant = None
            return (self.plain if variant is None else variant.function)(self.model, *inputs)
        key = call_key(inputs)
        if self._generation != getattr(self.choose, "generation", 0):
            self._generation = getattr(self.choose, "generation", 0)
            self._choices.clear()
        variant = self._chosen(key, inputs)
        self.compiled = variant
        if variant is not None and not variant.holds():  # as when a layer alone was put into eval mode
            variant = self._chosen((*key, tuple(module.training for module in self.model.modules())), inputs)
            self.compiled = variant
            variant = variant if variant is not None and variant.holds() else None
        self.choose.running = LAYERS if variant is None else variant.name  # pyright: ignore[reportFunctionMemberAccess]
        return (self.plain if variant is None else variant.eager)(self.model, *inputs)

    def _chosen(self, key: tuple, inputs: tuple[Tensor, ...]) -> Variant | None:
        """The graph for calls of a kind; None is the graph itself."""
        if key not in self._choices:
            if observed(self.model) or _capturing():
                return None
            self._choices[key] = self._choice(key, inputs)
        return self._choices[key]

    @property
    def graph(self) -> fx.Graph:
        """The graph of the latest call."""
        variant = self.compiled
        return self.old if variant is None or not variant.holds() else variant.graph

    def _choice(self, key: tuple, inputs: tuple[Tensor, ...]) -> Variant | None:
        if not all(_ordinary(x) for x in inputs) or len(self._choices) >= _MOST_MEASURED:
            return None
        before, generators = State(self.model), RandomState()

        def restored(call: Callable[[], Any]) -> Any:
            try:
                return call(), before.buffers()
            finally:
                before.restore()
                generators.restore()

        built = self._variants(inputs, restored)
        variants = {name: v for name, v in built.items() if v.holds() and name not in self.wrong}
        if not variants:
            return None
        functions = {LAYERS: self.plain} | {name: variant.eager for name, variant in variants.items()}
        outputs = {n: restored(partial(detached, call, self.model, inputs)) for n, call in functions.items()}
        errors = {name: distance(outputs[LAYERS], outputs[name]) for name in variants}
        allowed = _TOLERANCE
        if any(error > allowed for error in errors.values()):
            exact = restored(partial(detached, _exact_norms(self.model, self.old), self.model, inputs))
            errors = {name: min(error, distance(exact, outputs[name])) for name, error in errors.items()}
        if any(error > allowed for error in errors.values()):
            nudged = tuple(x * (1 + _NUDGE * torch.sign(torch.sin(1e4 * x))) for x in inputs)
            other = restored(partial(detached, self.plain, self.model, nudged))
            allowed = max(allowed, _NUDGED * distance(outputs[LAYERS], other))
        for name in [name for name, error in errors.items() if not error <= allowed]:
            self.wrong.add(name)
            del variants[name], functions[name]
            warnings.warn(
                f"{type(self.model).__name__}: expected the graph {name!r} to give the results of the layers one by "
                f"one, got outputs {errors[name]:.2g} away from them; it is not run. Please report the model",
                TraceWarning,
                stacklevel=2,
            )
        if not variants:
            return None
        steps = {name: partial(step, call, self.model, inputs) for name, call in functions.items()}
        chosen = restored(partial(self.choose, ("graphs", self.model.training, *key), steps))[0]
        return variants.get(chosen)

    def _variants(self, inputs: tuple[Tensor, ...], restored: Callable) -> dict[str, Variant]:
        kind = (
            tuple((x.shape[1:], x.dtype) for x in inputs),
            tuple(module.training for module in self.model.modules()),
        )
        if kind not in self._built:
            built = [Variant(DENSE, *dense(self.model, self.old))]
            built += restored(partial(self._regions, inputs))[0]
            if (sparse := chains(self.model, self.old, run_sparse)) is not None:
                built.append(Variant(SPARSE, *sparse[:2], model=self.model))
            if (joined := chains(self.model, self.old, run_joined)) is not None:
                built.append(Variant(JOINED, *joined, model=self.model))
            self._built[kind] = {variant.name: variant for variant in built}
        return self._built[kind]

    def _regions(self, inputs: tuple[Tensor, ...]) -> list[Variant]:
        regions = assign(self.model, self.old, record(self.model, self.old, inputs))
        if regions is None:
            return []
        fuse(self.model, regions.graph)
        return [Variant(REGIONS, regions.graph, regions.absorbed, model=self.model)]


class _ExactNorms(Interpreter):
    """Runs a graph with all that its modules read in NCHW.

    In channels_last torch's BatchNorm finds a variance in a channel of one value, as an output channel without weights
    is, and is percents off. That is not for a rewritten graph to repeat.
    """

    def call_module(self, target: Any, args: tuple, kwargs: dict) -> Any:
        args, kwargs = pytree.tree_map_only(Tensor, Tensor.contiguous, (args, kwargs))
        return super().call_module(target, args, kwargs)


def _exact_norms(model: nn.Module, graph: fx.Graph) -> Callable[..., Any]:
    """The graph as a function of the model, with exact BatchNorms."""
    interpreter = _ExactNorms(model, graph=graph)
    return lambda _, *inputs: interpreter.run(*inputs, enable_io_processing=False)


def observed(model: nn.Module) -> bool:
    """Whether a hook would see the extra runs of a verification or a measurement."""
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return True
    return any(m._forward_hooks or m._forward_pre_hooks for m in model.modules() if m is not model)


def call_key(inputs: tuple[Tensor, ...]) -> tuple:
    """What the choice depends on: shapes, types and memory formats, whether a backward pass follows, autocast."""
    device = "cpu" if not inputs or inputs[0].is_cpu else inputs[0].device.type
    cast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return torch.is_grad_enabled(), cast, *((x.shape, x.dtype, is_channels_last(x)) for x in inputs)


def step(call: Callable, model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """One forward pass, and where gradients are enabled one backward pass that leaves no gradient behind."""
    out = pytree.tree_leaves(call(model, *inputs))
    sums = [t.float().sum() for t in out if isinstance(t, Tensor) and t.requires_grad]
    if sums:
        wanted = [t for t in (*model.parameters(), *inputs) if t.requires_grad]
        torch.autograd.grad(sums, wanted, allow_unused=True)


@torch.no_grad()
def detached(call: Callable, model: nn.Module, inputs: tuple[Tensor, ...]) -> list[Any]:
    """The outputs of a call, without gradients."""
    return pytree.tree_leaves(call(model, *inputs))


def distance(expected: Any, got: Any) -> float:
    """Largest relative norm of the difference between two structures of tensors; infinite if they do not compare."""
    ones, others = pytree.tree_leaves(expected), pytree.tree_leaves(got)
    if len(ones) != len(others):
        return math.inf
    return max((_distance(a, b) for a, b in zip(ones, others, strict=True)), default=0.0)


def _distance(one: Any, other: Any) -> float:
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return 0.0 if bool(one == other) else math.inf
    if one.shape != other.shape or one.dtype != other.dtype:
        return math.inf
    a, b = one.detach().double(), other.detach().double()
    if not torch.equal(a.isfinite(), b.isfinite()):
        return math.inf
    a, b = torch.where(a.isfinite(), a, 0), torch.where(b.isfinite(), b, 0)
    return float((a - b).norm() / a.norm().clamp_min(1e-30))


def _ordinary(x: Tensor) -> bool:
    known = x.dtype in DTYPES.get(x.device.type, ()) and (not x.is_cuda or find_spec("triton") is not None)
    return type(x) in (Tensor, nn.Parameter) and known and x.numel() > 0


def _capturing() -> bool:
    """Whether a CUDA graph is being captured, in which nothing can be measured."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
