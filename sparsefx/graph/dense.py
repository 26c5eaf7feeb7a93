"""The dense graph: every sparse layer as torch itself computes it, which no other graph may be slower than.

Its outputs are those of the others, for missing weights are stored as zeros; a hook of the weight masks its gradient.
"""

from typing import Any

from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from sparsefx.graph.trace import Container, why_called
from sparsefx.layers import SparseLayer, SparseLinear


def dense(model: nn.Module, graph: fx.Graph) -> tuple[fx.Graph, tuple[Container, ...], tuple[SparseLayer, ...]]:
    """Rewrite a graph so that its sparse layers run as dense ones.

    Args:
        graph: Traced; it is not changed.
    Returns:
        A new graph, the layers that it does not call as modules as they must stay, and these layers.
    """
    new = fx.Graph(tracer_cls=graph._tracer_cls)
    made: dict[fx.Node, fx.Node] = {}
    absorbed: dict[str, Container] = {}
    layers: dict[str, SparseLayer] = {}
    for node in graph.nodes:
        name = str(node.target)
        layer = model.get_submodule(name) if node.op == "call_module" else None
        if not isinstance(layer, SparseLayer) or why_called(layer):
            made[node] = new.node_copy(node, made.__getitem__)
            continue
        absorbed[name] = Container(name, layer, type(layer), layer.training, {}, (), True)
        layers[name] = layer
        args = map_arg((node.args, node.kwargs), made.__getitem__)
        made[node] = new.call_function(run_dense, (new.get_attr(name), *args[0]), args[1])  # pyright: ignore[reportArgumentType, reportIndexIssue]
    new.lint()
    return new, tuple(absorbed.values()), tuple(layers.values())


def run_dense(layer: SparseLayer, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The layer as an instance of its torch class."""
    if isinstance(layer, SparseLinear):
        return layer.run_dense(x, *args, **kwargs)
    return layer.base.forward(layer, x, *args, **kwargs)
