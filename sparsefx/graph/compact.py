"""`compact`: an ordinary smaller dense model without the channels that no weight feeds or reads."""

import copy
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from sparsefx.errors import TraceWarning
from sparsefx.graph.channels import NO_AXIS, Channels
from sparsefx.graph.compact_report import measure, measured_shapes, outputs, relative_difference, tolerance
from sparsefx.graph.install import STATE, program_of
from sparsefx.graph.links import CONVS, LINEARS, Links
from sparsefx.graph.liveness import Flow
from sparsefx.graph.slicing import slice_channels, slice_layer, slice_tensor
from sparsefx.graph.snapshot import RandomState
from sparsefx.graph.trace import trace
from sparsefx.layers import SparseLayer, revert_

_PER_CHANNEL = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.PReLU)


def compact(model: nn.Module, example_inputs: Any = None) -> nn.Module:
    """Return a smaller, ordinary dense model with the same outputs in eval mode.

    Channels that no weight feeds or reads are removed over the whole graph, and the constants they hold are folded
    into what reads them. The result needs no sparsefx: it saves, loads and runs without it. Its parameters stay
    trainable, and BatchNorm stays BatchNorm; it is in eval mode, and its graph is the eval graph.

    Args:
        model: A sparsified model, or any model whose weights contain zeros; it is left untouched.
        example_inputs: The positional arguments of a forward call: a tensor or a tuple. With them the ranks of all
            tensors are known (without them, images have a batch dimension), the outputs are compared, and
            multiply-adds and time are measured.
    Returns:
        A `torch.fx.GraphModule` of torch's own layers, with the attribute `compact_report`, a plain dict:
        `parameters` before and after (of the dense model and of the result); `layers`, by name of each layer that
        became smaller, its channels before and after; `untraced`, reasons by name of modules that do not trace or have
        hooks and stay as they are; with `example_inputs`, `multiply_adds` and `seconds` per forward
        before and after, and `difference`, the relative norm of the outputs' difference.
        A model that does not trace comes back as it is, with dense layers, nothing removed and a TraceWarning.
    Example:
        >>> model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
        >>> _ = nn.init.zeros_(model[0].weight[:2])
        >>> sparsefx.compact(model).compact_report["parameters"]
        {'before': 68, 'after': 46}
    """
    dense = dense_copy(model).eval()
    inputs = example_inputs if isinstance(example_inputs, tuple | None) else (example_inputs,)
    generators = RandomState()
    try:
        return _compact(dense, inputs, generators)
    finally:
        generators.restore()


def _compact(dense: nn.Module, inputs: tuple | None, generators: RandomState) -> nn.Module:
    expected = None if inputs is None else outputs(dense, inputs)
    found = trace(dense, type(dense).forward, lambda module, name: False)
    if found.graph is None:
        return _unchanged(dense, found.boundaries[""])
    found.graph._tracer_cls = fx.Tracer
    result = fx.GraphModule(dense, found.graph, f"Compact{type(dense).__name__}")
    try:
        shapes = {} if inputs is None else measured_shapes(result, inputs)
    except Exception as error:
        return _unchanged(dense, f"has a graph that fails ({type(error).__name__}: {error})")
    _name_flattens_(result, shapes)
    layers = _shrink_(result, Flow(found.graph, result, shapes))
    report = {
        "parameters": {"before": _count(dense), "after": _count(result)},
        "layers": layers,
        "untraced": found.boundaries | found.called,
    }
    if inputs is not None and expected is not None:
        generators.restore()
        difference = relative_difference(outputs(result, inputs), expected)
        if not difference <= tolerance(dense):
            return _unchanged(dense, f"has a graph whose results differ (relative difference {difference:.1e})")
        report |= {"difference": difference, **measure(dense, result, inputs)}
    result.compact_report = report  # pyright: ignore[reportArgumentType]
    return result


def _name_flattens_(model: fx.GraphModule, shapes: Mapping[fx.Node, torch.Size]) -> None:
    """Write `x.view(-1, 320)` as `x.flatten(1)`, where shapes tell that it is one: its number is going to change."""
    for node in model.graph.nodes:
        if node.op == "call_method" and node.target in ("view", "reshape") and (old := shapes.get(node.args[0])):
            sizes = node.args[1] if isinstance(node.args[1], tuple | list) else node.args[1:]
            if len(old) > 2 and len(sizes) == 2 and sizes[1] == old[1:].numel():
                node.target, node.args, node.kwargs = "flatten", (node.args[0], 1), {}
    model.recompile()


def dense_copy(model: nn.Module) -> nn.Module:
    """Return a copy of a model that is of the user's class, with torch's own layers and the zeros in their weights."""
    dense = copy.deepcopy(model)
    for module in list(dense.modules()):
        if (program := program_of(module)) is not None:
            del module.__dict__[STATE]
            module.__class__ = program.base
        if isinstance(module, SparseLayer):
            revert_(module)
    return dense


def _unchanged(dense: nn.Module, reason: str) -> nn.Module:
    name = type(dense).__name__
    warnings.warn(
        f"{name}: expected a model that traces, got one that {reason}; compact removed nothing",
        TraceWarning,
        stacklevel=4,
    )
    parameters = dict.fromkeys(("before", "after"), _count(dense))
    dense.compact_report = {"parameters": parameters, "layers": {}, "untraced": {"": reason}}  # pyright: ignore
    return dense


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _shrink_(model: fx.GraphModule, flow: Flow) -> dict[str, dict[str, int]]:
    """Replace the modules and tensors of a graph by smaller ones."""
    kept = _Kept(flow)
    layers: dict[str, dict[str, int]] = {}
    for node, effect in flow.effects.items():
        name, out = str(node.target), effect.out
        if node.op == "get_attr" and out is not None and out.axis != NO_AXIS and not kept(out).all():
            _set(model, name, slice_tensor(_get(model, name), out.axis, kept(out)))
        if node.op != "call_module" or out is None:
            continue
        module = model.get_submodule(name)
        if isinstance(module, CONVS + LINEARS):
            links, inputs = Links(module), effect.inputs[0][1] if effect.inputs else None
            if inputs is not None and len(inputs) != links.ins:
                inputs = None
            keep_in = torch.ones(links.ins, dtype=torch.bool) if inputs is None else kept(inputs)
            keep_out = kept(out)
            if keep_in.all() and keep_out.all():
                continue
            model.set_submodule(name, slice_layer(module, inputs, keep_in, keep_out))
            layers[name] = {
                "in_before": links.ins,
                "in_after": int(keep_in.sum()),
                "out_before": links.outs,
                "out_after": int(keep_out.sum()),
            }
        elif isinstance(module, _PER_CHANNEL) and not kept(out).all():
            model.set_submodule(name, slice_channels(module, kept(out)))
    return layers


def _get(model: nn.Module, name: str) -> Tensor:
    owner, _, attribute = name.rpartition(".")
    return getattr(model.get_submodule(owner), attribute)


def _set(model: nn.Module, name: str, tensor: Tensor) -> None:
    owner, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, tensor)


class _Kept:
    """Which channels stay: those that are needed, and those that exist together with one that is.

    A channel that stays and is needed, or is constant, holds what it held in the model; every other may hold anything,
    for no weight reads it. So more channels may stay than need to.
    """

    def __init__(self, flow: Flow) -> None:
        self._roots = flow.slots.roots()
        self._keep = torch.zeros(len(self._roots), dtype=torch.bool)
        for node, x in flow.channels.items():
            self._add(x.slots[flow.needed[node]])
        for slots in flow.slots.pinned:
            self._add(slots)
        for node in flow.effects:
            if node.op == "call_module":
                self._add_constant(flow, node)
        for x in flow.channels.values():
            if not self(x).any():
                self._add(x.slots[:1])

    def __call__(self, x: Channels) -> Tensor:
        return self._keep[self._roots[x.slots]]

    def _add(self, slots: Tensor) -> None:
        self._keep[self._roots[slots]] = True

    def _add_constant(self, flow: Flow, node: fx.Node) -> None:
        """Keep one of the constants that a layer can only merge."""
        layer, effect = flow.owner(node), flow.effects[node]
        if not isinstance(layer, CONVS) or not effect.inputs:
            return
        links, x = Links(layer), effect.inputs[0][1]
        if links.groups > 1 or links.uniform or len(x) != links.ins:
            return
        const = x.const.nan_to_num().abs()
        live = (flow.needed[node] & flow.channels[node].const.isnan())[:, None]
        merges = const.gt(0) & (links.reads[0] & live).any(0)
        if merges.any() and not (self(x) & const.gt(0)).any():
            self._add(x.slots[torch.where(merges, const, 0).argmax()].view(1))
