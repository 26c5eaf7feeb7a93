"""The fuse pass: in a region, BatchNorm or convolution with the residual and the ReLU behind it.

A BatchNorm, with its ReLU, that only convolutions and max poolings read is computed by them as they read, and never
written.
"""

import operator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import fx, nn

from sparsefx import blocked
from sparsefx.graph.layout import writes
from sparsefx.kernels.norm import Forks

_RELUS = {torch.relu, torch.relu_, F.relu, "relu", "relu_"}
_ADDS = {operator.add, operator.iadd, torch.add, "add", "add_"}


def fuse(model: nn.Module, graph: fx.Graph) -> None:
    """Fuse in place what stands in a region of `graph`; values that something else reads stay."""
    for node in list(graph.nodes):
        if node.target in (blocked.batch_norm, blocked.conv):
            _fuse(model, graph, node)
    for node in graph.nodes:
        if node.target is blocked.batch_norm:
            if _prepares(model, node):
                node.target = blocked.prepare
            if _centres(model, node):
                node.args[1].kwargs = {"centred": True}
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        if node.target in (blocked.batch_norm, blocked.prepare):
            _fork(model, graph, node, order)
    graph.lint()


def _prepares(model: nn.Module, node: fx.Node) -> bool:
    """Whether every reader normalizes what it reads, and nothing writes over what the BatchNorm reads."""
    x: Any = node.args[1]
    if node.kwargs.get("residual") is not None or any(writes(model, user) for user in x.users):
        return False
    return all(_normalizes(user, node) for user in node.users)


def _normalizes(reader: fx.Node, node: fx.Node) -> bool:
    """Whether a node is a convolution or max pooling of another."""
    if reader.target is blocked.conv:
        return reader.args[1] is node and reader.kwargs.get("residual") is not node
    return reader.target in (blocked.max_pool, blocked.max_pool2d)


def _centres(model: nn.Module, node: fx.Node) -> bool:
    """Whether a BatchNorm takes a mean of the batch off a convolution that nothing else reads."""
    layer, x = cast("tuple[fx.Node, fx.Node]", node.args[:2])
    norm: Any = model.get_submodule(str(layer.target))
    batch = norm.training or norm.running_mean is None
    return batch and x.target is blocked.conv and not x.kwargs and len(x.users) == 1


def _fork(model: nn.Module, graph: fx.Graph, node: fx.Node, order: dict[fx.Node, int]) -> None:
    """Let a BatchNorm sum the gradients of its input and its output, where each has one other reader behind it."""
    x = cast("fx.Node", node.args[1])
    around = [user for user in x.users if user is not node]
    readers = list(node.users)
    written = any(writes(model, user) for user in (*around, *readers))
    forks = Forks(
        input=len(around) == 1 and order[around[0]] > order[node] and node.kwargs.get("residual") is not x,
        output=len(readers) == 2,
    )
    if written or not any(forks):
        return
    node.kwargs = {**node.kwargs, "forks": forks}
    with graph.inserting_after(node):
        parts = [graph.call_function(operator.getitem, (node, i)) for i in range(sum(forks), -1, -1)][::-1]
    for reader in readers:
        reader.replace_input_with(node, parts[-1] if forks.output and reader is readers[-1] else parts[0])
    if forks.input:
        around[0].replace_input_with(x, parts[1])


def _fuse(model: nn.Module, graph: fx.Graph, node: fx.Node) -> None:
    last: Any = node
    residual: Any = None
    added = only_user(node)
    if added is not None and added.target in _ADDS and len(added.args) == 2:
        others = [a for a in added.args if a is not node]
        # Dynamo takes no operator that reads one tensor twice: a norm's input is not its residual.
        if len(others) == 1 and isinstance(others[0], fx.Node) and others[0] not in node.args:
            last, residual = added, others[0]
    relu = only_user(last)
    clamps = relu is not None and is_relu(model, relu)
    if clamps and relu is not None:
        last = relu
    if last is node:
        return
    kwargs: dict[str, Any] = {"relu": clamps}
    if residual is not None:
        kwargs["residual"] = residual
    with graph.inserting_before(last):
        fused = graph.call_function(node.target, node.args, kwargs)  # pyright: ignore[reportArgumentType]
    last.replace_all_uses_with(fused)
    while last is not node:
        before = last.args[0] if last.args[0] is not residual else last.args[1]
        graph.erase_node(last)
        last = before
    graph.erase_node(node)


def only_user(node: fx.Node) -> fx.Node | None:
    """The node that reads another's value, if one alone does."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def is_relu(model: nn.Module, node: fx.Node) -> bool:
    """Whether a node is a ReLU of its first argument."""
    if node.op == "call_module":
        return type(model.get_submodule(str(node.target))) is nn.ReLU
    return node.target in _RELUS
