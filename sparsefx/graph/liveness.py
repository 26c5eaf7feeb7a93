"""The liveness pass: which channels no weight feeds and which no weight reads, over the whole eval graph.

One sweep forward finds the constants, one sweep backward what is read; the graph has no cycles, so this is the
fixpoint. Everything is about eval mode, where a channel without weights holds one value from layer to layer.
"""

import operator
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from sparsefx.graph import channel_rules, shape_rules  # noqa: F401  fill the table of rules
from sparsefx.graph.channels import RULES, VIEWS, Channels, Effect, Op, Slots, key_of
from sparsefx.graph.links import CONVS, LINEARS, Links

_INERT = (getattr, operator.getitem)


@dataclass(frozen=True, eq=False)
class Live:
    """The channels of a layer that must be computed in eval mode.

    Attributes:
        live_in: LongTensor, the input channels that live output channels read.
        live_out: LongTensor, the output channels that vary and that something reads.
        bias: Float64 `[O]`. `layer(x)[live_out]` is the live weight on `x[live_in]` plus `bias[live_out]`; every other
            output channel holds `bias` wherever it is read.
    """

    live_in: Tensor
    live_out: Tensor
    bias: Tensor


class Flow:
    """The channels of every node of an eval graph.

    Attributes:
        channels: By node; a node that is not in it is opaque.
        effects: By node; a node that is not in it is a barrier.
        needed: Bool `[C]` by node: some layer, barrier or output uses what the channel holds.
        slots: The units of removal of all channels.
        whole: Names of modules and tensors that more than one place uses: they are not to be sliced.
    """

    def __init__(self, graph: fx.Graph, root: nn.Module, shapes: Mapping[fx.Node, torch.Size] | None = None) -> None:
        """Sweep forward and backward.

        Args:
            graph: Eval graph over `root`.
            root: Owner of the modules and tensors that the graph names.
            shapes: Shapes of results, where they are known.
        """
        self.channels: dict[fx.Node, Channels] = {}
        self.effects: dict[fx.Node, Effect] = {}
        self.slots = Slots()
        self.whole = _used_twice(graph, root)
        self._root, self._shapes = root, shapes or {}
        self._known: dict[fx.Node, Channels] = {}
        self._memory: dict[fx.Node, list[fx.Node]] = {}
        order = {node: place for place, node in enumerate(graph.nodes)}
        for node in graph.nodes:
            self._forward(node, order)
        self.needed = {node: ~x.everything for node, x in self.channels.items()}
        for node in reversed(graph.nodes):
            self._backward(node)

    def owner(self, node: fx.Node) -> object:
        """Return the module that a node calls, or the tensor that it gets."""
        return _target(node, self._root)

    def _forward(self, node: fx.Node, order: dict[fx.Node, int]) -> None:
        target = _target(node, self._root)
        key = key_of(node, target)
        source = next(iter(node.all_input_nodes), node)
        mutates = _mutates(node, target)
        overwritten = mutates and any(order[user] > order[node] for n in self._memory[source] for user in n.users)
        self._memory[node] = self._memory[source] if mutates or key in VIEWS else []
        self._memory[node].append(node)
        effect = None
        if key in RULES and not overwritten:
            effect = RULES[key](Op(node, target, self._known, self.slots, self._shapes))
        if effect is None:
            self._distrust(node)
            return
        self.effects[node] = effect
        if effect.out is not None:
            self.channels[node] = self._known[node] = effect.out
            if node.target in self.whole:
                for x in (effect.out, *(x for _, x in effect.inputs)):
                    self.slots.pin(x.slots)

    def _distrust(self, node: fx.Node) -> None:
        """Take what a barrier reads as opaque from here on: it may have overwritten it."""
        if node.target not in _INERT:
            for source in node.all_input_nodes:
                for same in self._memory[source]:
                    self._known.pop(same, None)

    def _backward(self, node: fx.Node) -> None:
        effect, read = self.effects.get(node), set()
        if effect is not None:
            need = self.needed.get(node, torch.zeros(0, dtype=torch.bool))
            for (source, _), mask in zip(effect.inputs, effect.needed(need), strict=True):
                read.add(source)
                mine = self.needed[source]
                mine |= mask.view(len(mine), -1).any(1) if len(mask) else False
        for source in node.all_input_nodes:
            if source in self.needed and source not in read:
                self.needed[source][:] = True


def liveness(graph: fx.Graph, root: nn.Module, shapes: Mapping[fx.Node, torch.Size] | None = None) -> dict[str, Live]:
    """Find over the whole graph the channels that each layer must compute in eval mode.

    Args:
        graph: Eval graph over `root`; image tensors are taken to have a batch dimension unless `shapes` says otherwise.
        root: Owner of the modules that the graph calls; its layers may be sparse or plain.
        shapes: Shapes of results by node, where they are known.
    Returns:
        By name of each Conv and Linear layer that the graph calls. Of one that is called several times, or whose
        weight something else reads too, what its own weights say.
    """
    flow = Flow(graph, root, shapes)
    return {
        str(node.target): _live(flow, node, Links(layer))  # pyright: ignore[reportArgumentType]
        for node in graph.nodes
        if node.op == "call_module" and key_of(node, layer := flow.owner(node)) in CONVS + LINEARS
    }


def _live(flow: Flow, node: fx.Node, links: Links) -> Live:
    effect = flow.effects.get(node)
    if effect is None or effect.out is None or node.target in flow.whole:
        reads, out, bias = links.reads, links.reads.any(2).flatten(), links.bias
    else:
        seen = effect.inputs[0][1] if effect.inputs and len(effect.inputs[0][1]) == links.ins else None
        const = torch.full((links.ins,), float("nan"), dtype=torch.float64) if seen is None else seen.const
        folds = links.folds(const)
        out = flow.needed[node] & effect.out.const.isnan()
        reads = links.reads & ~folds.view(links.groups, 1, -1)
        bias = links.bias + links.amount(torch.where(folds, const, 0))
    used = (reads & out.view(links.groups, -1, 1)).any(1).flatten()
    return Live(used.nonzero().flatten(), out.nonzero().flatten(), bias)


def _target(node: fx.Node, root: nn.Module) -> object:
    if node.op == "call_module":
        return root.get_submodule(str(node.target))
    if node.op == "get_attr":
        owner, _, name = str(node.target).rpartition(".")
        return getattr(root.get_submodule(owner), name)
    return node.target


def _mutates(node: fx.Node, target: object) -> bool:
    """Whether the operation may overwrite its first argument."""
    if node.op == "call_module":
        return bool(getattr(target, "inplace", False))
    if node.op not in ("call_function", "call_method"):
        return False
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    named = name.endswith("_") and not name.endswith("__")
    return named or node.kwargs.get("inplace") is True


def _used_twice(graph: fx.Graph, root: nn.Module) -> set[str]:
    """Names of modules and tensors of which a parameter or buffer is used by two nodes or owned by two modules."""
    owners = Counter(
        id(tensor)
        for module in root.modules()
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))
    )
    uses: Counter[int] = Counter()
    tensors: dict[str, list[int]] = {}
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr"):
            target = _target(node, root)
            used = [*target.parameters(), *target.buffers()] if isinstance(target, nn.Module) else [target]
            tensors[str(node.target)] = [id(tensor) for tensor in used]
            uses.update(set(tensors[str(node.target)]))
    return {name for name, used in tensors.items() if any(uses[key] > 1 or owners[key] > 1 for key in used)}
