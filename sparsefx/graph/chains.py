"""The sparse graph: linear layers, with the ReLUs behind them, on sparse kernels in every pass, for segments to join.

Layer by layer the fastest kernels of a small layer may be dense ones, by less than what joining saves.
"""

from typing import Any

from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from sparsefx.graph.fuse import is_relu, only_user
from sparsefx.graph.trace import Container, why_called
from sparsefx.layers import SparseConv2d, SparseLinear

_FEWEST = 2
"""Linear layers that are worth a graph."""


def chains(model: nn.Module, graph: fx.Graph) -> tuple[fx.Graph, tuple[Container, ...]] | None:
    """Rewrite a graph so that its linear layers run sparse.

    Args:
        graph: Traced; it is not changed.
    Returns:
        A new graph, and the modules that it does not call as they are; None for a graph with sparse convolutions, which
        has regions, or with fewer than two layers.
    """
    modules = {node: model.get_submodule(str(node.target)) for node in graph.nodes if node.op == "call_module"}
    linear = [node for node, layer in modules.items() if type(layer) is SparseLinear and not why_called(layer)]
    linear = [node for node in linear if not model.get_submodule(str(node.target)).full and len(node.args) == 1]  # pyright: ignore[reportAttributeAccessIssue]
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
        made[node] = new.call_function(run_sparse, (new.get_attr(str(node.target)), *args), {"relu": clamps})  # pyright: ignore[reportArgumentType]
        for taken in (node, relu) if clamps and relu is not None else (node,):
            made[taken] = made[node]
            if taken.op == "call_module":
                name, module = str(taken.target), modules[taken]
                absorbed[name] = Container(name, module, type(module), module.training, {}, (), True)
    new.lint()
    return new, tuple(absorbed.values())


def run_sparse(layer: SparseLinear, x: Tensor, relu: bool = False) -> Any:
    """The layer on sparse kernels, then a ReLU."""
    return layer.run_sparse(x, relu)
