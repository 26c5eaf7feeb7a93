"""What is known of a tensor's channels, and the table of rules that say how each operation moves them.

A slot is the unit of removal: channels of several tensors that share a slot exist together or not at all.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from sparsefx.graph.trace import why_called
from sparsefx.layers import SparseLayer

NO_AXIS = 0
"""`Channels.axis` of a tensor of one number, which broadcasts against any channels."""


@dataclass(frozen=True, eq=False)
class Channels:
    """The channels of one tensor in eval mode.

    Attributes:
        slots: LongTensor `[C]`, the slot of each channel.
        const: Float64 `[C]`, the finite value that a channel holds everywhere, NaN where it varies.
        axis: The dimension that carries the channels, negative.
        ndim: Number of dimensions, None where unknown.
        flat: Each channel is a block of consecutive features, all blocks of one size that is not known yet.
    """

    slots: Tensor
    const: Tensor
    axis: int
    ndim: int | None
    flat: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "const", self.const.where(self.const.isfinite(), float("nan")))

    def __len__(self) -> int:
        return len(self.slots)

    @property
    def everything(self) -> Tensor:
        """Bool `[C]`, all True."""
        return torch.ones(len(self), dtype=torch.bool)

    @property
    def batched(self) -> bool:
        """Whether the channels are known to be dimension 1."""
        return self.ndim is not None and self.axis == 1 - self.ndim

    def but(self, **changes: Any) -> "Channels":
        """Return a copy with other attributes."""
        return replace(self, **changes)

    def widen(self, features: int) -> "Channels | None":
        """Return the channels as `features` features, each channel repeated over its block; None if they do not fit."""
        if not self.flat or features % len(self):
            return self if len(self) == features and not self.flat else None
        block = features // len(self)
        return self.but(
            slots=self.slots.repeat_interleave(block), const=self.const.repeat_interleave(block), flat=False
        )

    def dim(self, dim: int) -> int | None:
        """Return a dimension as a negative number, None where it cannot be told."""
        return dim if dim < 0 else None if self.ndim is None else dim - self.ndim


class Slots:
    """Slots and which of them belong together."""

    def __init__(self) -> None:
        self._count = 0
        self._pairs: list[tuple[Tensor, Tensor]] = []
        self.pinned: list[Tensor] = []

    def new(self, count: int) -> Tensor:
        """Return `count` new slots."""
        self._count += count
        return torch.arange(self._count - count, self._count)

    def unite(self, a: Tensor, b: Tensor) -> None:
        """Make slots `a` and `b`, `[C]` each, exist together pair by pair."""
        self._pairs.append((a, b))

    def pin(self, slots: Tensor) -> None:
        """Keep slots whatever is read."""
        self.pinned.append(slots)

    def roots(self) -> Tensor:
        """Return one representative for each slot, the same for slots that exist together."""
        root = torch.arange(self._count)
        if not self._pairs:
            return root
        a, b = (torch.cat(side) for side in zip(*self._pairs, strict=True))
        while True:
            low = torch.minimum(root[a], root[b])
            linked = root.scatter_reduce(0, torch.cat((root[a], root[b])), low.repeat(2), "amin")
            linked = linked[linked]
            if torch.equal(linked, root):
                return root
            root = linked


@dataclass(frozen=True, eq=False)
class Effect:
    """What an operation does to channels.

    Attributes:
        out: The channels of its result, None if it has none.
        inputs: The nodes it reads, each with the channels as the operation sees them.
        reads: From the needed channels of the result, bool `[C]`, to the needed channels of each input. None: each
            channel of the result reads the same channel of every input.
    """

    out: Channels | None
    inputs: Sequence[tuple[fx.Node, Channels]] = ()
    reads: Callable[[Tensor], Sequence[Tensor]] | None = None

    def needed(self, need: Tensor) -> Sequence[Tensor]:
        """Return the needed channels of each input."""
        return [need] * len(self.inputs) if self.reads is None else self.reads(need)


@dataclass(frozen=True, eq=False)
class Op:
    """One node of the graph, as a rule sees it.

    Attributes:
        node: The fx node.
        target: The module that it calls, the tensor that it gets, or its function or method name.
        known: The channels of the nodes before it; nodes that are not in it are opaque.
        slots: Where new slots come from.
        shapes: Shapes of results by node, where example inputs were given.
    """

    node: fx.Node
    target: Any
    known: Mapping[fx.Node, Channels]
    slots: Slots
    shapes: Mapping[fx.Node, torch.Size]

    def arg(self, position: int, name: str, default: Any = None) -> Any:
        """Return an argument of the call by position or name."""
        args = self.node.args
        return args[position] if position < len(args) else self.node.kwargs.get(name, default)

    @property
    def source(self) -> fx.Node:
        """The node whose result is the first argument."""
        return self.node.args[0] if self.node.args else self.node.kwargs["input"]  # pyright: ignore[reportReturnType]

    def channels(self, arg: Any) -> Channels | None:
        """Return the channels of an argument, None for one that is opaque or a single number."""
        x = self.known.get(arg) if isinstance(arg, fx.Node) else None
        return None if x is None or x.axis == NO_AXIS else x

    def same(self, x: Channels, **changes: Any) -> Effect:
        """Return the effect of passing the channels `x` of the first argument on, with other attributes."""
        return Effect(x.but(**changes), [(self.source, x)])

    def ndim(self, default: int | None) -> int | None:
        """Return the number of dimensions of the result: the measured one, or the default."""
        return len(self.shapes[self.node]) if self.node in self.shapes else default


Rule = Callable[[Op], Effect | None]
"""The effect of an operation, None if it is a barrier: every channel it takes is read, and its result is opaque."""

RULES: dict[Any, Rule] = {}
"""By module class, function, `module.name` of a function of an optional package, `.name` of a method, or `get_attr`."""

VIEWS: set[Any] = set()
"""Keys of the operations whose result can be the same memory as their first argument."""


def rule(*keys: Any, view: bool = False) -> Callable[[Rule], Rule]:
    """Register the rule of some operations.

    Args:
        keys: As in `RULES`.
        view: Whether the result can be the same memory as the first argument.
    """

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(keys, function))
        if view:
            VIEWS.update(keys)
        return function

    return register


def plain_type(module: nn.Module) -> type[nn.Module]:
    """Return the torch class of a layer, sparse or not."""
    return module.base if isinstance(module, SparseLayer) else type(module)


def key_of(node: fx.Node, target: Any) -> Any:
    """Return the key of a node in `RULES`, whether or not it has a rule."""
    if node.op == "call_module":
        return None if why_called(target) else plain_type(target)
    if node.op == "call_method":
        return f".{node.target}"
    if node.op == "call_function":
        if node.target in RULES:
            return node.target
        return f"{getattr(node.target, '__module__', '')}.{getattr(node.target, '__qualname__', '')}"
    return node.op
