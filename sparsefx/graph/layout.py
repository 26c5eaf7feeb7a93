"""The layout pass: regions of a graph whose activations stay batch-innermost.

On the CPU that is blocked, `[ceil(N / 16), C, H, W, 16]`, on CUDA `[C, H, W, N]`. A region starts at a sparse
convolution and reaches as far as every operator works on such activations. Conversions
stand at its borders only; a value is converted once, and never back to what it was converted from.
"""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from sparsefx import blocked
from sparsefx.graph.trace import Container, Interpreter, why_called
from sparsefx.kernels.spec import is_channels_last
from sparsefx.layers import SparseConv2d

Node = Any
"""An `fx.Node`, whose targets and arguments are typed too widely to follow."""
DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.float32, torch.bfloat16, torch.float16)}
"""What regions compute in, by type of device."""
_KEEP_ZERO = {
    nn.ReLU, nn.ReLU6, nn.SiLU, nn.GELU, nn.Hardswish, nn.LeakyReLU, nn.ELU, nn.Mish, nn.Tanh, nn.Identity,
    torch.relu, torch.relu_, torch.tanh, F.relu, F.relu6, F.silu, F.gelu, F.hardswish, F.leaky_relu, F.elu, F.mish,
    "relu", "relu_", "tanh", "contiguous",
}  # fmt: skip
_MOVE_ZERO = {nn.Sigmoid, nn.Hardsigmoid, torch.sigmoid, F.sigmoid, F.hardsigmoid, "sigmoid"}
_POOLS = {nn.AvgPool2d, nn.AdaptiveAvgPool2d, F.avg_pool2d, F.adaptive_avg_pool2d}
_MAX_POOLS = {nn.MaxPool2d, F.max_pool2d, torch.max_pool2d}
_DROPOUTS = {nn.Dropout, nn.Dropout2d, F.dropout, F.dropout2d}
_ADDS = {operator.add, operator.iadd, torch.add, "add", "add_"}
_MULTIPLIES = {operator.mul, operator.imul, torch.mul, "mul", "mul_"}
_CATS = {torch.cat, torch.concat}
_MEANS = {torch.mean, "mean"}
_IN_PLACE = {operator.iadd, operator.imul, torch.relu_, "relu_", "add_", "mul_"}


@dataclass(frozen=True)
class Value:
    """What a node of the graph computed when it was run: shape, dtype, whether in channels_last, and where."""

    shape: torch.Size
    dtype: torch.dtype
    last: bool
    device: str


@dataclass(frozen=True)
class Regions:
    """A graph with regions, and the modules that it does not call as they are."""

    graph: fx.Graph
    absorbed: tuple[Container, ...]


class _Recorder(Interpreter):
    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        super().__init__(model, graph=graph)
        self.values: dict[fx.Node, Value] = {}

    def run_node(self, n: fx.Node) -> Any:
        out = super().run_node(n)
        if isinstance(out, Tensor):
            self.values[n] = Value(out.shape, out.dtype, is_channels_last(out), out.device.type)
        return out


@torch.no_grad()
def record(model: nn.Module, graph: fx.Graph, inputs: tuple[Tensor, ...]) -> dict[fx.Node, Value]:
    """Run the graph and note what each node computes. Buffers and random generators move, as in any run."""
    recorder = _Recorder(model, graph)
    recorder.run(*inputs, enable_io_processing=False)
    return recorder.values


def assign(model: nn.Module, graph: fx.Graph, values: dict[fx.Node, Value]) -> Regions | None:
    """Rewrite a graph to run in regions.

    Args:
        graph: Traced; it is not changed.
        values: Of `record`; shapes decide which operators work on blocked activations.
    Returns:
        A new graph of the same function, or None where no region comes about.
    """
    layout = _Layout(model, graph, values)
    for node in graph.nodes:
        layout.visit(node)
    if layout.overwritten or not layout.regions:
        return None
    for node in reversed(layout.conversions):
        if not node.users:
            layout.new.erase_node(node)
    layout.new.lint()
    return Regions(layout.new, tuple(layout.absorbed.values()))


class _Layout:
    """Builds the new graph node by node; a value of the old one is at hand plain, blocked, or both."""

    def __init__(self, model: nn.Module, graph: fx.Graph, values: dict[fx.Node, Value]) -> None:
        self.model, self.values = model, values
        self.new = fx.Graph(tracer_cls=graph._tracer_cls)
        self.order = {node: i for i, node in enumerate(graph.nodes)}
        self.at_hand: dict[fx.Node, fx.Node] = {}
        self.blocks: dict[fx.Node, fx.Node] = {}
        self.counts: dict[fx.Node, fx.Node] = {}
        self.absorbed: dict[str, Container] = {}
        self.conversions: list[fx.Node] = []
        self.regions = False
        self.overwritten = False

    def visit(self, node: Node) -> None:
        """Put the node into the new graph."""
        kind = self._kind(node)
        module = self.model.get_submodule(node.target) if node.op == "call_module" else None
        if writes(self.model, node) and isinstance(node.args[0], fx.Node) and node.args[0] in self.blocks:
            self.overwritten |= any(self.order[user] > self.order[node] for user in node.args[0].users)
        build = self._builder(node, kind, module)
        if build is None:
            self.at_hand[node] = self.new.node_copy(node, self.plain)
            return
        if module is not None:
            name = str(node.target)
            self.absorbed[name] = Container(name, module, type(module), module.training, {}, (), True)
        build(node)

    def plain(self, node: Node) -> fx.Node:
        """The value as the model knows it."""
        if node not in self.at_hand:
            args = self.blocks[node], self.counts[node], self.values[node].last
            self.at_hand[node] = self.new.call_function(blocked.leave, args)
            self.conversions.append(self.at_hand[node])
        return self.at_hand[node]

    def blocked(self, node: Node) -> fx.Node:
        """The value in blocks."""
        if node not in self.blocks:
            self.counts[node] = self.new.call_method("size", (self.at_hand[node], 0))
            self.blocks[node] = self.new.call_function(blocked.enter, (self.at_hand[node],))
            self.conversions += [self.counts[node], self.blocks[node]]
        return self.blocks[node]

    def _kind(self, node: Node) -> Any:
        """What the node calls: a module's class, a function, or a method's name."""
        if node.op == "call_module":
            return type(self.model.get_submodule(str(node.target)))
        return node.target if node.op in ("call_function", "call_method") else None

    def _image(self, node: Any) -> bool:
        """Whether a value is a batch of images of a type that the kernels know."""
        value = self.values.get(node) if isinstance(node, fx.Node) else None
        if value is None or value.dtype not in DTYPES.get(value.device, ()):
            return False
        return len(value.shape) == 4 and value.shape.numel() > 0

    def _builder(self, node: Node, kind: Any, module: nn.Module | None) -> Callable[[Node], None] | None:
        """How to compute the node in blocks; None if it stays as it is."""
        if not node.args or (module is not None and why_called(module)):
            return None
        first = node.args[0]
        if kind is SparseConv2d and self._image(first) and self._image(node) and _convolves(module):
            self.regions = True
            return self._conv
        if kind in _CATS:
            parts, dim = _arguments(node, ("tensors", None), ("dim", 0))
            fits = isinstance(parts, list | tuple) and all(self._image(p) for p in parts) and dim in (1, -3)
            return self._cat if fits and any(p in self.blocks for p in parts) else None
        if kind in _ADDS or kind in _MULTIPLIES:
            return self._pair(node, kind)
        if first not in self.blocks:
            return None
        if kind == "size" or (kind is getattr and node.args[1] == "shape"):
            return self._size
        if not self._image(node):
            return self._mean if kind in _MEANS and _over_space(node) else None
        if kind is nn.BatchNorm2d and all(p.dtype == torch.float32 for p in _tensors(module)):
            return self._norm
        if kind in _MEANS and _over_space(node):
            return self._mean
        if kind in _KEEP_ZERO:
            return self._same
        if kind in _MOVE_ZERO:
            return self._wrapped(blocked.saturate, images=True)
        if kind in _DROPOUTS:
            return self._wrapped(blocked.dropout, images=True) if _drops(node, module) else self._skip
        if kind in _POOLS:
            return self._wrapped(blocked.pool, images=False)
        if kind in _MAX_POOLS:
            return self._max_pool
        return None

    def _put(self, node: Node, new: fx.Node, like: Node) -> None:
        self.blocks[node], self.counts[node] = new, self.counts[like]

    def _conv(self, node: Node) -> None:
        x = self.blocked(node.args[0])
        layer = self.new.get_attr(str(node.target))
        self._put(node, self.new.call_function(blocked.conv, (layer, x, self.counts[node.args[0]])), node.args[0])

    def _norm(self, node: Node) -> None:
        layer = self.new.get_attr(str(node.target))
        args = layer, self.blocks[node.args[0]], self.counts[node.args[0]]
        self._put(node, self.new.call_function(blocked.batch_norm, args), node.args[0])

    def _max_pool(self, node: Node) -> None:
        x, *rest = node.args
        kwargs = {k: v for k, v in node.kwargs.items() if k != "return_indices"}
        if node.op == "call_module":
            new = self.new.call_function(blocked.max_pool, (self.new.get_attr(str(node.target)), self.blocks[x]))
        else:
            new = self.new.call_function(blocked.max_pool2d, (self.blocks[x], *rest[:5]), kwargs)
        self._put(node, new, x)

    def _same(self, node: Node) -> None:
        self._put(node, self.new.node_copy(node, self.blocked), node.args[0])

    def _skip(self, node: Node) -> None:
        self._put(node, self.blocks[node.args[0]], node.args[0])

    def _cat(self, node: Node) -> None:
        parts = _arguments(node, ("tensors", None))[0]
        args = [self.blocked(p) for p in parts]
        self._put(node, self.new.call_function(blocked.cat, (args,)), parts[0])

    def _pair(self, node: Node, kind: Any) -> Callable[[Node], None] | None:
        """Sums and products of images of one shape, or with one value a channel; products with a number."""
        if len(node.args) != 2 or node.kwargs or not any(a in self.blocks for a in node.args if _is_node(a)):
            return None
        nodes = [a for a in node.args if _is_node(a)]
        if not self._image(node) or not all(self._image(a) for a in nodes):
            return None
        if len(nodes) == 1:
            return self._same if kind in _MULTIPLIES and isinstance(node.args[1], int | float) else None
        one, other = (self.values[a].shape for a in nodes)
        matches = one == other or (one[:2] == other[:2] and kind in _MULTIPLIES)
        return self._same if matches and self.values[nodes[0]].dtype == self.values[nodes[1]].dtype else None

    def _mean(self, node: Node) -> None:
        x = node.args[0]
        out = self.new.call_function(blocked.mean, (self.blocks[x],))
        if self._image(node):
            self._put(node, out, x)
            return
        out = self.new.call_function(blocked.leave, (out, self.counts[x], False))
        self.at_hand[node] = self.new.call_function(torch.flatten, (out, 1))

    def _size(self, node: Node) -> None:
        x = node.args[0]
        dims = node.args[1:] if node.target == "size" else ()
        args = (self.blocks[x], self.counts[x], *map_arg(dims, self.plain))
        self.at_hand[node] = self.new.call_function(blocked.size, args, map_arg(_dims(node), self.plain))

    def _wrapped(self, wrapper: Callable, images: bool) -> Callable[[Node], None]:
        """The node's function or module as the first argument of `wrapper`."""

        def build(node: Node) -> None:
            x, *rest = node.args
            count = (self.counts[x],) if images else ()
            args = (self.blocks[x], *count, *map_arg(rest, self.plain))
            target = wrapper
            if node.op == "call_module":
                args = (self.new.get_attr(str(node.target)), *args)
            else:
                target = _bind(wrapper, getattr(Tensor, node.target) if node.op == "call_method" else node.target)
            self._put(node, self.new.call_function(target, args, map_arg(node.kwargs, self.plain)), x)

        return build


def writes(model: nn.Module, node: Node) -> bool:
    """Whether a node writes over what it reads."""
    module = model.get_submodule(str(node.target)) if node.op == "call_module" else None
    return bool(node.target in _IN_PLACE or node.kwargs.get("inplace") or getattr(module, "inplace", False))


def _bind(wrapper: Callable, function: Callable) -> Callable:
    """`wrapper` with its first argument, under a name for the graph's code."""

    def bound(*args: Any, **kwargs: Any) -> Any:
        return wrapper(function, *args, **kwargs)

    bound.__name__ = bound.__qualname__ = f"{wrapper.__name__}_{function.__name__}"
    return bound


def _is_node(value: Any) -> bool:
    return isinstance(value, fx.Node)


def _dims(node: Node) -> dict[str, Any]:
    return dict(node.kwargs) if node.target == "size" else {}


def _tensors(module: Any) -> list[Tensor]:
    named = module.weight, module.bias, module.running_mean, module.running_var
    return [t for t in named if t is not None]


def _convolves(layer: Any) -> bool:
    """Whether the blocked kernels do the layer's padding."""
    before, after = layer._reversed_padding_repeated_twice[::2], layer._reversed_padding_repeated_twice[1::2]
    return layer.padding_mode == "zeros" and before == after and not layer._full


def _arguments(node: Node, *wanted: tuple[str, Any]) -> list[Any]:
    """Arguments by position or name, with their defaults."""
    given = dict(zip((name for name, _ in wanted), node.args, strict=False)) | dict(node.kwargs)
    return [given.get(name, default) for name, default in wanted]


def _drops(node: Node, module: nn.Module | None) -> bool:
    """Whether a dropout does anything."""
    if module is not None:
        return module.training
    return _arguments(node, ("input", None), ("p", 0.5), ("training", True))[2] is not False


def _over_space(node: Node) -> bool:
    """Whether a mean is over height and width alone."""
    dim = _arguments(node, ("input", None), ("dim", None))[1]
    return isinstance(dim, list | tuple) and sorted(d % 4 for d in dim) == [2, 3] and "dtype" not in node.kwargs
