"""Rules of the operations that only change shapes, indices or names: they move channels and leave their values."""

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

from sparsefx.graph.channels import NO_AXIS, Channels, Effect, Op, rule


@rule(nn.Flatten, torch.flatten, ".flatten", view=True)
def flatten(op: Op) -> Effect | None:
    """Channels become blocks of consecutive features, if they are the first dimension flattened."""
    if op.node.op == "call_module":
        first, last = op.target.start_dim, op.target.end_dim
    else:
        first, last = op.arg(1, "start_dim", 0), op.arg(2, "end_dim", -1)
    return _flatten(op, op.channels(op.source), first, last)


def _flatten(op: Op, x: Channels | None, first: Any, last: Any) -> Effect | None:
    if x is None or x.ndim is None or not isinstance(first, int) or not isinstance(last, int):
        return None
    if x.dim(first) != x.axis or x.dim(last) != -1:
        return None
    if x.axis == -1:
        return op.same(x)
    flat = x.but(axis=-1, ndim=x.ndim + x.axis + 1, flat=True)
    wide = flat.widen(op.shapes[op.node][-1]) if op.node in op.shapes else flat
    return None if wide is None else Effect(wide, [(op.source, x if wide.flat else wide)])


@rule(".view", ".reshape", torch.reshape, view=True)
def view(op: Op) -> Effect | None:
    """`x.view(x.size(0), -1)` flattens; a vector may be turned along another dimension; all else is a barrier."""
    x, shape = op.channels(op.source), op.node.args[1:] or [op.node.kwargs.get("shape")]
    shape = list(shape[0]) if len(shape) == 1 and isinstance(shape[0], list | tuple) else list(shape)  # pyright: ignore
    if x is None:
        return None
    if x.ndim == 1 and shape.count(-1) == 1 and shape.count(1) == len(shape) - 1:
        return op.same(x, axis=shape.index(-1) - len(shape), ndim=len(shape))
    if x.batched and len(shape) == 2 and shape[1] == -1 and _is_batch_size(shape[0], op.source):
        return _flatten(op, x, 1, -1)
    return None


def _is_batch_size(value: Any, of: fx.Node) -> bool:
    """Whether `value` is `of.size(0)`, `of.shape[0]` or `of.size()[0]`."""
    if not isinstance(value, fx.Node):
        return False
    if value.target == "size":
        return value.args == (of, 0)
    shape = value.args[0] if value.target is operator.getitem and value.args[1] == 0 else None
    return isinstance(shape, fx.Node) and (
        (shape.target is getattr and shape.args == (of, "shape")) or (shape.target == "size" and shape.args == (of,))
    )


@rule(".permute", torch.permute, ".transpose", torch.transpose, view=True)
def permute(op: Op) -> Effect | None:
    """Moves the dimension that carries the channels."""
    x = op.channels(op.source)
    if x is None or x.flat or x.ndim is None:
        return None
    order = op.node.args[1:] or [op.node.kwargs.get("dims")]
    order = list(order[0]) if isinstance(order[0], list | tuple) else list(order)  # pyright: ignore
    if not order or not all(isinstance(d, int) for d in order):
        return None
    order = [x.dim(d) for d in order]  # pyright: ignore[reportArgumentType]
    if "transpose" in str(op.node.target):
        a, b = order
        axis = b if x.axis == a else a if x.axis == b else x.axis
    else:
        axis = order.index(x.axis) - x.ndim
    return op.same(x, axis=axis)


@rule(torch.unsqueeze, ".unsqueeze", view=True)
def unsqueeze(op: Op) -> Effect | None:
    """A new dimension, which may lie behind that of the channels."""
    x, dim = op.channels(op.source), op.arg(1, "dim")
    if x is None or x.flat or x.ndim is None or not isinstance(dim, int):
        return None
    dim = dim if dim < 0 else dim - x.ndim - 1
    return op.same(x, axis=x.axis - (dim >= x.axis), ndim=x.ndim + 1)


@rule(torch.squeeze, ".squeeze", view=True)
def squeeze(op: Op) -> Effect | None:
    """One dimension less or not: only a measured shape tells."""
    x, dim = op.channels(op.source), op.arg(1, "dim")
    if x is None or x.flat or not isinstance(dim, int) or op.node not in op.shapes or op.source not in op.shapes:
        return None
    dim, ndim = x.dim(dim), op.ndim(None)
    if dim is None or dim == x.axis:
        return None
    return op.same(x, axis=x.axis + (x.axis < dim and ndim != x.ndim), ndim=ndim)


@rule(operator.getitem, view=True)
def index(op: Op) -> Effect | None:
    """Slices, single items and new dimensions, where all channels are taken."""
    x, given = op.channels(op.source), op.node.args[1]
    items: list[Any] = list(given) if isinstance(given, tuple) else [given]
    if x is None or x.flat or x.ndim is None or not all(_is_basic(item) for item in items):
        return None
    taken = sum(item is not None and item is not Ellipsis for item in items)
    place = items.index(Ellipsis) if Ellipsis in items else len(items)
    items[place : place + 1] = [slice(None)] * (x.ndim - taken)
    dim, before = -x.ndim, 0
    for position, item in enumerate(items):
        if item is None:
            continue
        if dim == x.axis:
            if item != slice(None):
                return None
            before = position
        dim += 1
    kept = [not isinstance(item, int) for item in items]
    return op.same(x, axis=-sum(kept[before:]), ndim=sum(kept))


def _is_basic(item: Any) -> bool:
    return item is None or item is Ellipsis or isinstance(item, slice) or type(item) is int


@rule(getattr, ".size", ".dim")
def shape(op: Op) -> Effect | None:
    """Reads no channel, as long as nobody uses their number."""
    x = op.channels(op.source)
    if x is None:
        return None
    if op.node.target == "dim" or op.node.args[1:] in (("dtype",), ("device",), ("ndim",)):
        return Effect(None, [(op.source, x)], lambda need: [~x.everything])
    if op.node.target == "size" and (op.node.args[1:] or op.node.kwargs):
        read = [op.arg(1, "dim")]
    elif op.node.target == "size" or op.node.args[1] == "shape":
        users = [user for user in op.node.users if user.users]
        read = [user.args[1] if user.target is operator.getitem else None for user in users]
    else:
        return None
    if any(_touches(x, item) for item in read):
        return None
    return Effect(None, [(op.source, x)], lambda need: [~x.everything])


def _touches(x: Channels, item: Any) -> bool:
    """Whether an index or a slice of the shape may take the number of channels."""
    if x.ndim is None:
        return not (isinstance(item, int) and item < 0 and item != x.axis)
    if isinstance(item, slice):
        fixed = not any(isinstance(end, fx.Node) for end in (item.start, item.stop, item.step))
        return not fixed or x.ndim + x.axis in range(x.ndim)[item]
    return not isinstance(item, int) or x.dim(item) == x.axis


@rule("get_attr")
def parameter(op: Op) -> Effect | None:
    """A tensor of the model with at most one dimension: known constants that can be sliced."""
    if not isinstance(op.target, Tensor) or not op.target.is_floating_point():
        return None
    sizes = [(size, dim) for dim, size in enumerate(op.target.shape) if size != 1]
    if len(sizes) > 1 or op.target.numel() == 0:
        return None
    axis = sizes[0][1] - op.target.dim() if sizes else NO_AXIS
    slots = op.slots.new(op.target.numel())
    if axis == NO_AXIS:
        op.slots.pin(slots)
    return Effect(Channels(slots, op.target.detach().cpu().double().flatten(), axis, op.target.dim()))
