"""One rule for each kind of operation: the channels of its result, their constants in eval mode, and what it reads."""

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from sparsefx.graph.channels import NO_AXIS, Channels, Effect, Op, rule
from sparsefx.graph.links import CONVS, LINEARS, Links

NAN = float("nan")


@rule(*CONVS, *LINEARS)
def layer(op: Op) -> Effect | None:
    """Each output channel reads the input channels that weights connect it with; constants fold into its bias."""
    if not op.target.weight.is_floating_point():
        return None
    links = Links(op.target)
    x = op.channels(op.source)
    if isinstance(op.target, LINEARS):
        axis, ndim = -1, None if x is None else x.ndim
    else:
        axis, ndim = -1 - len(op.target.kernel_size), 2 + len(op.target.kernel_size)
    seen = x.widen(links.ins) if x is not None and x.axis == axis else None
    const = torch.full((links.ins,), NAN, dtype=torch.float64) if seen is None else seen.const
    folds = links.folds(const)
    varies = (links.reads & ~folds.view(links.groups, 1, -1)).any(2).flatten()
    value = links.bias + links.amount(torch.where(folds, const, 0))
    out = Channels(op.slots.new(links.outs), torch.where(varies, NAN, value), axis, op.ndim(ndim))
    if seen is None:
        if links.groups > 1:
            op.slots.pin(out.slots)
        inputs = [] if x is None else [(op.source, x.but(const=torch.full_like(x.const, NAN)))]
        return Effect(out, inputs, lambda need: [x.everything for _, x in inputs])
    if links.groups > 1:
        _bind_groups(op, links.groups, seen.slots, out.slots)
    live = links.reads & seen.const.isnan().view(links.groups, 1, -1)
    return Effect(
        out, [(op.source, seen)], lambda need: [(live & (need & varies).view(links.groups, -1, 1)).any(1).flatten()]
    )


def _bind_groups(op: Op, groups: int, ins: Tensor, outs: Tensor) -> None:
    """Make each group of input and output channels exist as a whole."""
    for slots in (ins.view(groups, -1), outs.view(groups, -1)):
        op.slots.unite(ins.view(groups, -1)[:, :1].expand_as(slots).flatten(), slots.flatten())


@rule(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
def batch_norm(op: Op) -> Effect | None:
    """A constant stays one; without running statistics it is not worth knowing which."""
    norm, x = op.target, op.channels(op.source)
    x = x.widen(norm.num_features) if x is not None else None
    if x is None or not (x.batched or (x.ndim is None and x.axis == -1)):
        return None
    if norm.running_var is None:
        return op.same(x, const=torch.full_like(x.const, NAN))
    mean, var = norm.running_mean.cpu().double(), norm.running_var.cpu().double()
    scale, shift = torch.ones_like(mean), torch.zeros_like(mean)
    if norm.affine:
        scale, shift = norm.weight.detach().cpu().double(), norm.bias.detach().cpu().double()
    const = (x.const - mean) * (var + norm.eps).rsqrt() * scale + shift
    return op.same(x, const=torch.where(scale == 0, shift, const))


@rule(nn.PReLU)
def prelu(op: Op) -> Effect | None:
    """One slope for all channels, or one for each."""
    x, slope = op.channels(op.source), op.target.weight.detach().cpu().double()
    if x is None or (len(slope) > 1 and not (x.batched and len(slope) == len(x) and not x.flat)):
        return None
    return op.same(x, const=torch.where(x.const < 0, slope * x.const, x.const))


@rule(
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.SiLU, nn.Mish, nn.GELU, nn.Hardswish),
    *(nn.Hardsigmoid, nn.Hardtanh, nn.Sigmoid, nn.LogSigmoid, nn.Tanh, nn.Softplus, nn.Softsign, nn.Threshold),
    *(F.relu, F.relu6, F.leaky_relu, F.elu, F.celu, F.selu, F.silu, F.mish, F.gelu, F.hardswish, F.hardsigmoid),
    *(F.hardtanh, F.sigmoid, F.logsigmoid, F.tanh, F.softplus, F.softsign, F.threshold),
    *(torch.relu, torch.sigmoid, torch.tanh, torch.clamp, torch.neg, torch.abs, torch.square, torch.add, torch.sub),
    *(operator.add, operator.sub, operator.neg, F.relu_, torch.relu_),
    *(".relu", ".sigmoid", ".tanh", ".clamp", ".neg", ".abs", ".square", ".add", ".sub"),
    *(".relu_", ".sigmoid_", ".tanh_", ".clamp_", ".add_", ".sub_"),
)
def elementwise(op: Op) -> Effect | None:
    """Each channel of the result is a function of the same channel of every operand; the operands exist together."""
    return _elementwise(op, lambda const, operands: const)


@rule(torch.mul, torch.multiply, operator.mul, ".mul", ".multiply", ".mul_")
def multiply(op: Op) -> Effect | None:
    """As `elementwise`, and a constant zero makes zero of whatever it meets."""

    def annihilate(const: Tensor, operands: list[Tensor]) -> Tensor:
        zero = torch.stack(torch.broadcast_tensors(*operands)).eq(0).any(0)
        return torch.where(zero, 0, const)

    return _elementwise(op, annihilate)


@rule(torch.div, operator.truediv, ".div", ".div_")
def divide(op: Op) -> Effect | None:
    """As `elementwise`, by numbers and constants."""
    divisor = op.arg(1, "other")
    return None if isinstance(divisor, fx.Node) and not _is_constant(op, divisor) else elementwise(op)


@rule(torch.sqrt, torch.rsqrt, torch.exp, ".sqrt", ".rsqrt", ".exp")
def calculate(op: Op) -> Effect | None:
    """As `elementwise`, of constants; a channel that nobody needs may hold anything, and must not become infinite."""
    return elementwise(op) if _is_constant(op, op.source) else None


def _is_constant(op: Op, node: fx.Node) -> bool:
    return node in op.known and bool(op.known[node].const.isfinite().all())


def _elementwise(op: Op, finish: Callable[[Tensor, list[Tensor]], Tensor]) -> Effect | None:
    inputs = [(node, x) for node in op.node.all_input_nodes if (x := op.known.get(node)) is not None]
    if len(inputs) < len(op.node.all_input_nodes) or "out" in op.node.kwargs:
        return None
    operands = [x for _, x in inputs]
    main = max(operands, key=lambda x: (x.axis != NO_AXIS, len(x)))
    for x in operands:
        fits = x.axis == main.axis and (len(x) == len(main) if x.flat or main.flat else len(x) in (1, len(main)))
        if x.axis != NO_AXIS and not (fits and x.flat == main.flat):
            return None
        if fits and len(x) == len(main):
            op.slots.unite(x.slots, main.slots)
    ndims = [x.ndim for x in operands]
    known = torch.stack(torch.broadcast_tensors(*(x.const for x in operands))).isfinite().all(0)
    const = torch.where(known, _evaluate(op), NAN)
    out = main.but(
        const=finish(const, [x.const for x in operands]),
        ndim=op.ndim(None if None in ndims else max(ndim for ndim in ndims if ndim is not None)),
    )
    return Effect(out, inputs, lambda need: [need if len(x) == len(need) else need.any().view(1) for x in operands])


def _evaluate(op: Op) -> Tensor:
    """Run the very operation on the constants of its operands."""
    args, kwargs = fx.map_arg((op.node.args, op.node.kwargs), lambda node: op.known[node].const.clone())  # pyright: ignore
    function = getattr(torch.Tensor, op.target) if op.node.op == "call_method" else op.target
    with torch.no_grad():
        return function(*args, **kwargs)


@rule(
    *(nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout),
    *(".contiguous", ".clone", ".detach", torch.clone),
    view=True,
)
def identity(op: Op) -> Effect | None:
    """What does nothing in eval mode."""
    x = op.channels(op.source)
    return op.same(x) if x is not None else None


@rule(
    *(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout),
    view=True,
)
def dropout(op: Op) -> Effect | None:
    """Nothing, if the trace has it switched off."""
    return identity(op) if op.arg(2, "training", True) is False else None


@rule("torchvision.ops.stochastic_depth.stochastic_depth", view=True)
def stochastic_depth(op: Op) -> Effect | None:
    """As `dropout`."""
    return identity(op) if op.arg(3, "training", True) is False else None


@rule(
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    *(F.max_pool1d, F.max_pool2d, F.max_pool3d, F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d),
    *(F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d, torch.adaptive_avg_pool1d),
    *(torch.max_pool1d, torch.max_pool2d, torch.max_pool3d, F.interpolate, nn.Upsample),
    *(nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d),
)
def pool(op: Op) -> Effect | None:
    """Each channel by itself, a constant to itself; padding of a maximum is never the maximum."""
    x = op.channels(op.source)
    indices = getattr(op.target, "return_indices", False) or op.node.kwargs.get("return_indices", False)
    if x is None or not x.batched or x.flat or x.ndim == 2 or indices or True in [a is True for a in op.node.args]:
        return None
    return op.same(x)


@rule(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)
def average_pool(op: Op) -> Effect | None:
    """As `pool`, but zeros of the padding that count make a constant other than zero vary."""
    x = op.channels(op.source)
    if x is None or not x.batched or x.flat or x.ndim == 2:
        return None
    option = op.target.__dict__.get if op.node.op == "call_module" else _pool_option(op)
    padded = torch.tensor(option("padding", 0)).any() and option("count_include_pad", True)
    if padded or option("divisor_override", None) is not None:
        return op.same(x, const=x.const.where(x.const == 0, NAN))
    return op.same(x)


def _pool_option(op: Op) -> Callable[[str, Any], Any]:
    names = ("input", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
    return lambda name, default: op.arg(names.index(name), name, default)


@rule(torch.mean, ".mean", torch.amax, ".amax", torch.amin, ".amin")
def reduce(op: Op) -> Effect | None:
    """Over dimensions other than that of the channels."""
    x, dims = op.channels(op.source), op.arg(1, "dim")
    dims = [dims] if isinstance(dims, int) else dims
    if x is None or x.flat or not dims or x.ndim is None or not all(isinstance(d, int) for d in dims):
        return None
    dims = {d if d < 0 else d - x.ndim for d in dims}
    if x.axis in dims or op.node.kwargs.get("dtype") is not None:
        return None
    if op.arg(2, "keepdim", False):
        return op.same(x)
    return op.same(x, axis=x.axis + sum(x.axis < d for d in dims), ndim=x.ndim - len(dims))


@rule(torch.cat, torch.concat, torch.concatenate)
def concatenate(op: Op) -> Effect | None:
    """Side by side along the channels; the channels of each operand lie at an offset."""
    nodes = op.arg(0, "tensors")
    parts = [x for node in nodes if (x := op.channels(node)) is not None] if isinstance(nodes, list | tuple) else []
    if not parts or len(parts) < len(nodes) or any(x.flat or x.axis != parts[0].axis for x in parts):
        return None
    dim, ndim = op.arg(1, "dim", op.node.kwargs.get("axis", 0)), parts[0].ndim
    if not isinstance(dim, int) or any(x.ndim != ndim or x.dim(dim) != x.axis for x in parts):
        return None
    slots, const = (torch.cat([getattr(x, name) for x in parts]) for name in ("slots", "const"))
    sizes = [len(x) for x in parts]
    return Effect(
        parts[0].but(slots=slots, const=const), list(zip(nodes, parts, strict=True)), lambda need: need.split(sizes)
    )
