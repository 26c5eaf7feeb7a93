"""Graphs of linear layers and the ReLUs behind them, for segments to join: with sparse kernels in every pass, or dense.

Layer by layer the fastest kernels of a small layer may be others, by less than what joining saves.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from sparsefx.graph.fuse import is_relu, only_user
from sparsefx.graph.trace import Container, why_called
from sparsefx.layers import SparseConv2d, SparseLayer, SparseLinear

_FEWEST = 2
"""Linear layers that are worth a graph."""


def run_sparse(layer: SparseLinear, x: Tensor, relu: bool = False) -> Any:
    """The layer on sparse kernels, then a ReLU."""
    return layer.run_sparse(x, relu)


def run_joined(layer: SparseLinear, x: Tensor, relu: bool = False) -> Any:
    """The layer on dense kernels that segments can call, then a ReLU."""
    return layer.run_joined(x, relu)


RUNS = (run_sparse, run_joined)
"""What a graph's linear layers may run."""
Chains = tuple[fx.Graph, tuple[Container, ...], tuple[SparseLayer, ...]]


def chains(model: nn.Module, graph: fx.Graph, run: Callable[..., Any]) -> Chains | None:
    """Rewrite a graph so that its linear layers run alike.

    Args:
        graph: Traced; it is not changed.
        run: One of `RUNS`.
    Returns:
        A new graph, the modules that it does not call as they are, and its linear layers; None for a graph with sparse
        convolutions, which has regions, or with fewer than two layers.
    """
    modules: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            modules[node] = model.get_submodule(str(node.target))
    sparse = {node: layer for node, layer in modules.items() if type(layer) is SparseLinear and not why_called(layer)}
    linear = [node for node, layer in sparse.items() if not layer.full and len(node.args) == 1]
    if len(linear) < _FEWEST or any(isinstance(layer, SparseConv2d) for layer in modules.values()):
        return None
    new = fx.Graph(tracer_cls=graph._tracer_cls)
    made: dict[fx.Node, fx.Node] = {}
    absorbed: dict[str, Container] = {}
    for node in graph.nodes:
        if node in made:  # a ReLU that its layer has taken
            continue
        if node not in linear:
            made[node] = new.node_copy(node, made.__getitem__)
            continue
        relu = only_user(node)
        clamps = relu is not None and is_relu(model, relu)
        args = map_arg(node.args, made.__getitem__)
        made[node] = new.call_function(run, (new.get_attr(str(node.target)), *args), {"relu": clamps})  # pyright: ignore[reportArgumentType]
        for taken in (node, relu) if clamps and relu is not None else (node,):
            made[taken] = made[node]
            if taken.op == "call_module":
                name, module = str(taken.target), modules[taken]
                absorbed[name] = Container(name, module, type(module), module.training, {}, (), True)
    new.lint()
    layers = tuple(modules[node] for node in linear)
    return new, tuple(absorbed.values()), layers
