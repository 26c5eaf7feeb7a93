"""The segment pass: runs of layers, convolutional or linear, that the CPU's kernels compute alone become one function.

A segment is a program of library calls (`kernels.cpu.segment`) for one shape of inputs and one set of masks. It is made
when all its layers have run once, so that their kernels have been chosen; until then, and whenever something about the
layers is not as it was, they run one by one. Both give the same numbers to the last bit. The environment variable
`SPARSEFX_SEGMENTS=off` lets layers run one by one always.
"""

import operator
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from sparsefx import blocked
from sparsefx.graph.chains import RUNS, run_sparse
from sparsefx.graph.trace import function
from sparsefx.kernels.blocked import CONVERTED_DENSE
from sparsefx.kernels.cpu import ConvPlan
from sparsefx.kernels.cpu.abi import load
from sparsefx.kernels.cpu.dense_wgrad import outer_products_pay
from sparsefx.kernels.cpu.segment import Parameter, Segment, Value
from sparsefx.kernels.masking import Masks, compiles, multiplies
from sparsefx.kernels.runtime import Runtime
from sparsefx.kernels.segment import Step
from sparsefx.kernels.spec import ConvSpec, is_channels_last, same_order
from sparsefx.layers import MASK, SparseConv2d, SparseLayer, SparseLinear

Node = Any
"""An `fx.Node`, whose arguments are typed too widely to follow."""
_KINDS = {blocked.conv, blocked.batch_norm, blocked.prepare, blocked.max_pool, *RUNS}
_OFF = os.environ.get("SPARSEFX_SEGMENTS") == "off"
_FEWEST = 2
"""Layers of a program."""
_OF_MASKED = ("weight", MASK, "bias")
_OF_NORM = ("weight", "bias", "running_mean", "running_var")
_MOST_KINDS = 16
"""Kinds of calls that are kept: ever new sizes of inputs would keep ever more."""


def segmented(model: nn.Module, graph: fx.Graph) -> fx.Graph | None:
    """A graph with runs of layers as one call each; None where there are none.

    Args:
        graph: Of `layout` and `fuse`, or of `chains`; it is not changed.
    """
    new = fx.Graph(tracer_cls=graph._tracer_cls)
    made: dict[Node, Node] = {}
    found = False
    run: list[Node] = []

    def close() -> None:
        nonlocal found
        if _layers(run) >= _FEWEST:
            found = True
            _call(model, new, run, made)
        else:
            for node in run:
                made[node] = new.node_copy(node, made.__getitem__)
        run.clear()

    for node in graph.nodes:
        if node.target in _KINDS or (node.target is operator.getitem and node.args[0] in run):
            run.append(node)
            continue
        if node.op != "get_attr":
            close()
        made[node] = new.node_copy(node, made.__getitem__)
    if not found:
        return None
    new.lint()
    return new


def _layers(run: Iterable[Node]) -> int:
    return sum(node.target in _KINDS for node in run)


def _call(model: nn.Module, graph: fx.Graph, run: Sequence[Node], made: dict[Node, Node]) -> None:
    """Put a call of a run's layers into a graph."""
    inputs, outputs = _borders(run)
    group = Group(model, run, inputs, outputs)

    def segment(*given: Any) -> Sequence[Any]:
        return group(given)

    segment.__name__ = segment.__qualname__ = f"segment_{run[0].name}"
    called = graph.call_function(segment, tuple(made[node] for node in inputs))
    for i, node in enumerate(outputs):
        made[node] = graph.call_function(operator.getitem, (called, i))


def _borders(run: Sequence[Node]) -> tuple[list[Node], list[Node]]:
    """What a run reads, layers apart, and what is read of it."""
    inside = set(run)
    read = dict.fromkeys(a for node in run for a in node.all_input_nodes if a.op != "get_attr")
    return [a for a in read if a not in inside], [node for node in run if not set(node.users) <= inside]


def _pieces(run: Sequence[Node], alone: Iterable[Node]) -> list[list[Node]]:
    """Cut a run so that each piece reads and leaves what is written in memory; nodes in `alone` are by themselves."""
    cut = set(alone)
    while True:
        pieces: list[list[Node]] = []
        for node in run:
            if not pieces or _producer(node) in cut or _producer(pieces[-1][-1]) in cut:
                pieces.append([])
            pieces[-1].append(node)
        more = {at for piece in pieces for at in _unreadable(piece)} - cut
        if not more:
            return pieces
        cut |= more


def _unreadable(piece: Sequence[Node]) -> Iterator[Node]:
    """Layers at which activations that are not written cross the borders of a piece."""
    inside = set(piece)
    for node in piece:
        if not _readable(node) and not set(node.users) <= inside:
            yield _producer(node)
        if node.target in _KINDS and any(a not in inside and not _readable(a) for a in _activations(node)):
            yield node


def _producer(node: Node) -> Node:
    return node.args[0] if node.target is operator.getitem else node


def _readable(node: Node) -> bool:
    """Whether a node's value is a tensor that anything may read."""
    producer = _producer(node)
    if node is producer:
        return producer.target is not blocked.prepare and "forks" not in producer.kwargs
    if producer.target is not blocked.prepare:
        return True
    return producer.kwargs["forks"].input and node.args[1] == 1


def _activations(node: Node) -> list[Node]:
    """The activations that a layer reads."""
    residual = node.kwargs.get("residual")
    return [node.args[1]] if residual is None else [node.args[1], residual]


class Group:
    """A run of layers."""

    def __init__(self, model: nn.Module, run: Sequence[Node], inputs: list[Node], outputs: list[Node]) -> None:
        self.model, self.run, self.inputs, self.outputs = model, list(run), inputs, outputs
        self._cuts: dict[tuple, Cut] = {}

    def __call__(self, given: Sequence[Any]) -> Sequence[Any]:
        key = (torch.is_grad_enabled(), *[x.shape if isinstance(x, Tensor) else None for x in given])
        cut = self._cuts.get(key)
        if cut is None or not cut.holds():
            if len(self._cuts) >= _MOST_KINDS:
                self._cuts.clear()
            cut = self._cuts[key] = Cut(self.model, self.run, {})
        others: list[Node] = []
        if len(cut.pieces) == 1:  # which has the run's inputs and outputs
            results = cut.pieces[0](given, others)
        else:
            values = dict(zip(self.inputs, given, strict=True))
            for piece in cut.pieces:
                found = piece([values[node] for node in piece.inputs], others)
                values.update(zip(piece.outputs, found, strict=True))
            results = [values[node] for node in self.outputs]
        if others:
            alone = {node: _plan(_layer(self.model, node)) for node in others}
            self._cuts[key] = Cut(self.model, self.run, cut.alone | alone)
        return results


class Cut:
    """A run in pieces that are programs, for one kind of call.

    Args:
        alone: Layers that no program can run, with the plans that make them so.
    """

    def __init__(self, model: nn.Module, run: Sequence[Node], alone: dict[Node, Any]) -> None:
        self.model, self.alone = model, alone
        self.pieces = [Piece(model, nodes) for nodes in _pieces(run, alone)]

    def holds(self) -> bool:
        """Whether none of the layers has a new plan, with which a program may run it."""
        return all(_plan(_layer(self.model, node)) is plan for node, plan in self.alone.items())


def _layer(model: nn.Module, node: Node) -> Any:
    return model.get_submodule(str(node.args[0].target))


def _plan(layer: nn.Module) -> Any:
    """What a layer's kernels were chosen for; None where it has no mask."""
    return getattr(layer.runtime.choose, "plan", None) if isinstance(layer, SparseLayer) else None


class Piece:
    """Layers that one program may run."""

    def __init__(self, model: nn.Module, nodes: Sequence[Node]) -> None:
        self.model, self.nodes = model, list(nodes)
        self.inputs, self.outputs = _borders(nodes)
        self.one_by_one = _function(self.nodes, self.inputs, self.outputs)
        read = {a for node in nodes if node.target in _KINDS for a in _activations(node)}
        self.tensors = [i for i, node in enumerate(self.inputs) if node in read]
        self.images = [i for i, node in enumerate(self.inputs) if node not in read]
        layers = [_layer(model, node) for node in nodes if node.target in _KINDS]
        self.masked = [layer for layer in layers if isinstance(layer, SparseLayer)]
        self.norms = [layer for layer in layers if isinstance(layer, nn.BatchNorm2d)]
        self.joins = len(layers) >= _FEWEST
        self._programs: dict[tuple, Program] = {}

    def __call__(self, given: Sequence[Any], others: list[Node]) -> Sequence[Any]:
        """The outputs.

        Args:
            others: Takes the layers that no program can run.
        """
        program = self._program(given, others) if self.joins else None
        if program is None:
            return self.one_by_one(self.model, *given)
        return program.run([given[i] for i in self.tensors])

    def _program(self, given: Sequence[Any], others: list[Node]) -> "Program | None":
        """What computes a call, if something does."""
        tensors = [given[i] for i in self.tensors]
        if _observed() or not all(map(_plain, tensors)):
            return None
        grad = torch.is_grad_enabled()
        key = (grad, *[given[i] for i in self.images], *[(t.shape, t.requires_grad and grad) for t in tensors])
        program = self._programs.get(key)
        if program is not None and program.holds():
            return program
        if not compiles():
            return None
        state = self.state(grad)
        if state is None:
            return None
        if program is not None and program.renewed(state):
            return program
        self._programs.pop(key, None)
        if len(self._programs) >= _MOST_KINDS:
            self._programs.clear()
        try:
            images = {given[i] for i in self.images} or {tensors[0].shape[0]}
            made = self._programs[key] = Program(self, tensors, images, state, grad)
        except Unsettled as reason:
            others += [] if reason.layer is None else [reason.layer]
            return None
        return made

    def state(self, grad: bool) -> tuple | None:
        """What a program depends on of its layers beside their masks; None where there can be none."""
        state = (
            *(_masked_state(layer, grad) for layer in self.masked),
            *(_norm_state(layer, grad) for layer in self.norms),
        )
        return None if None in state else state


class Unsettled(Exception):
    """A program cannot be made yet; or never while `layer` runs what it does."""

    def __init__(self, layer: Node = None) -> None:
        super().__init__()
        self.layer = layer


class Program:
    """A run of layers for one shape of inputs and one set of masks.

    Args:
        state: Of the layers, on which it depends.
    Raises:
        Unsettled: it cannot be made yet.
    """

    def __init__(self, piece: Piece, tensors: Sequence[Tensor], images: set[int], state: tuple, grad: bool) -> None:
        if len(images) != 1:
            raise Unsettled
        self.piece, self._state = piece, state
        self.segment = Segment(load(), images.pop(), grad=grad)
        self._seen: list[tuple[nn.Module, str]] = []
        self._seen += [(layer, name) for layer in piece.masked for name in _OF_MASKED]
        self._seen += [(norm, name) for norm in piece.norms for name in _OF_NORM]
        self._parameters: list[int] = []  # which of these the segment's are
        self._weights: dict[Parameter, Runtime] = {}
        self._plans: list[tuple[SparseLayer, Any]] = []
        self._windows: list[Runtime] = []  # whose sparse weight gradient has not been chosen
        self._tracked: list[nn.BatchNorm2d] = []
        values: dict[Node, Any] = {}
        for i, tensor in zip(piece.tensors, tensors, strict=True):
            values[piece.inputs[i]] = self.segment.input(tensor.shape, wants=tensor.requires_grad)
        for node in piece.nodes:
            values[node] = self._add(node, values)
        outputs = [values[node] for node in piece.outputs]
        buffers = [value.buffer for value in outputs]
        if any(buffer.given for buffer in buffers) or len(set(buffers)) < len(buffers):
            raise Unsettled  # an output is the memory of an input or of another output
        self.segment.finish(outputs)
        self._look()

    def holds(self) -> bool:
        """Whether the layers are what they were when it was last looked: a few microseconds a model, at every call."""
        for owner, name, tensor, address, stride, dtype, learns in self._stamps:
            if owner.get(name) is not tensor:
                return False
            if tensor is not None and (
                tensor.data_ptr() != address
                or tensor.requires_grad is not learns
                or tensor.dtype is not dtype
                or tensor.stride() != stride
            ):
                return False
        for layer in self.piece.masked:
            if layer.__dict__["_bound"]() is not layer._parameters["weight"]:
                return False
        return (
            all(_modes(norm) == modes for norm, modes in self._norms)
            and all(_plan(layer) is plan for layer, plan in self._plans)
            and all(runtime.collecting for runtime in self._windows)
            and (self._masks is None or self._masks.same())
        )

    def renewed(self, state: tuple) -> bool:
        """Whether it computes what is wanted of layers that have changed; they are looked at anew.

        Args:
            state: That of the layers now.
        """
        if state != self._state or not all(runtime.collecting for runtime in self._windows):
            return False
        for layer, plan in self._plans:
            if _plan(layer) is not plan or plan.stale(layer.weight_mask) or plan.bits is None:
                return False
        self._look()
        return True

    def _look(self) -> None:
        self._stamps = [_Stamp.of(layer, name) for layer, name in self._seen]
        self._given = [t for i in self._parameters if (t := self._stamps[i].tensor) is not None]
        self._norms = [(norm, _modes(norm)) for norm in self.piece.norms]
        pairs = [(plan.bits, layer.weight_mask) for layer, plan in self._plans]
        self._masks = Masks(pairs) if pairs else None

    def run(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """The outputs of the layers, which are what they were when it was last looked."""
        if self._tracked:
            self._count()
        return Step(self.segment, self._given, self._weights, self._again).run(tensors)

    def _count(self) -> None:
        """Note that the running statistics move."""
        counts = [n for layer in self._tracked if (n := layer.num_batches_tracked) is not None]
        if counts:
            torch._foreach_add_(counts, 1)  # pyright: ignore[reportPrivateImportUsage]
        moved = [t for layer in self._tracked for t in (layer.running_mean, layer.running_var) if t is not None]
        if moved and not moved[0].is_inference():
            torch.autograd.graph.increment_version(moved)

    def _again(self, *inputs: Tensor) -> Sequence[Tensor]:
        """The layers one by one, with running statistics as they are now afterwards."""
        buffers = [b for layer in self._tracked for b in layer.buffers()]
        before = [b.clone() for b in buffers]
        at = dict(zip(self.piece.tensors, inputs, strict=True))
        given = [at.get(i, self.segment.images) for i in range(len(self.piece.inputs))]
        try:
            return self.piece.one_by_one(self.piece.model, *given)
        finally:
            with torch.no_grad():
                for buffer, kept in zip(buffers, before, strict=True):
                    buffer.copy_(kept)

    def _add(self, node: Node, values: dict[Node, Any]) -> Any:
        if node.target is operator.getitem:
            return values[node.args[0]][node.args[1]]
        x: Value = values[node.args[1]]
        if len(x.shape) != (2 if node.target in RUNS else 5):
            raise Unsettled(node)
        if node.target in RUNS:
            return self._linear(node, x)
        if node.target is blocked.max_pool:
            return self._max_pool(node, x)
        residual = node.kwargs.get("residual")
        added = None if residual is None else values[residual]
        return self._conv(node, x, added) if node.target is blocked.conv else self._norm(node, x, added)

    def _conv(self, node: Node, x: Value, residual: Value | None) -> Value:
        layer: SparseConv2d = _layer(self.piece.model, node)
        choose, known = layer.runtime.choose, self._known(layer)
        if self.segment.grad and layer.weight.requires_grad and not outer_products_pay(layer.weight, layer.groups):
            raise Unsettled(node)  # its gradient of all weights, which the window needs, is the vendor's
        padding = layer._reversed_padding_repeated_twice[::-2]
        spec = ConvSpec(
            list(layer.stride), list(padding), list(layer.dilation), False, [0, 0], layer.groups, self.segment.images
        )
        weight, shape = self._parameter(layer, "weight"), torch.Size(x.shape)
        kinds = ["fprop"] + ["dgrad"] * x.wants
        backends = [choose.settled(kind, spec, shape, torch.float32) for kind in kinds]
        if None in backends:
            raise Unsettled
        plans = [plan for backend in backends if isinstance(plan := getattr(backend, "conv", None), ConvPlan)]
        if len(plans) < len(backends):
            raise Unsettled(node)
        dense = False
        if self.segment.grad and weight.wants:
            wgrad = choose.settled("wgrad", spec, shape, torch.float32)
            if wgrad is None and not layer.runtime.collecting:
                raise Unsettled
            if wgrad is None:
                self._windows.append(layer.runtime)
            dense = wgrad is CONVERTED_DENSE
            if not (wgrad is None or dense or hasattr(wgrad, "conv")):
                raise Unsettled(node)
        self._plans.append((layer, known))
        self._weights[weight] = layer.runtime
        mask, bias = self._parameter(layer, MASK), self._parameter(layer, "bias")
        relu, centred = (bool(node.kwargs.get(name)) for name in ("relu", "centred"))
        return self.segment.conv(plans[0], x, weight, mask, bias, residual, relu=relu, centred=centred, dense=dense)

    def _norm(self, node: Node, x: Value, residual: Value | None) -> Value | list[Value]:
        layer: nn.BatchNorm2d = _layer(self.piece.model, node)
        training = layer.training or layer.running_mean is None or layer.running_var is None
        count = self.segment.images * x.shape[2] * x.shape[3]
        if training and count < 2:
            raise Unsettled  # the layer says what is wrong
        running = None
        if blocked.tracks(layer):
            self._tracked.append(layer)
        if blocked.tracks(layer) or not training:
            running = self._parameter(layer, "running_mean"), self._parameter(layer, "running_var")
        forks = node.kwargs.get("forks")
        out = self.segment.norm(
            x,
            self._parameter(layer, "weight"),
            self._parameter(layer, "bias"),
            running,
            residual,
            training=training,
            eps=layer.eps,
            factor=layer.momentum or 0.0,
            relu=bool(node.kwargs.get("relu")),
            write=node.target is blocked.batch_norm,
            forks=forks or (False, False),
        )
        return out if forks else out[0]

    def _linear(self, node: Node, x: Value) -> Value:
        layer: SparseLinear = _layer(self.piece.model, node)
        plan = None
        if node.target is run_sparse:
            known = self._known(layer)
            backend = known.backends.get(("sparse", None))
            if backend is None:
                raise Unsettled
            self._plans.append((layer, known))
            plan = backend.linear
        weight, mask, bias = (self._parameter(layer, name) for name in _OF_MASKED)
        if (plan is None or (self.segment.grad and weight.wants)) and not multiplies(x.shape[0]):
            raise Unsettled(node)
        if weight.wants:
            self._weights[weight] = layer.runtime
        relu = bool(node.kwargs.get("relu"))
        if plan is None:
            return self.segment.dense_linear(x, weight, mask, bias, relu=relu)
        return self.segment.linear(plan, x, weight, mask, bias, relu=relu)

    def _known(self, layer: SparseLayer) -> Any:
        """The plan of a layer's mask."""
        plan = _plan(layer)
        if plan is None or plan.stale(layer.weight_mask) or plan.bits is None:
            raise Unsettled
        return plan

    def _max_pool(self, node: Node, x: Value) -> Value:
        pool = blocked.pooling(_layer(self.piece.model, node), x.shape)
        if pool is None:
            raise Unsettled(node)
        return self.segment.max_pool(x, pool)

    def _parameter(self, layer: nn.Module, name: str) -> Any:
        """A tensor of a layer as the segment knows it; None if there is none."""
        tensor = _tensor(layer, name)
        if tensor is None:
            return None
        self._parameters.append(self._seen.index((layer, name)))
        return self.segment.parameter(tensor)


def _tensor(layer: nn.Module, name: str) -> Any:
    return _owner(layer, name).get(name)


def _owner(layer: nn.Module, name: str) -> Any:
    """Where a layer keeps a tensor."""
    return layer._parameters if name in layer._parameters else layer._buffers


class _Stamp(NamedTuple):
    """What tells whether a tensor of a layer still is where and as it was, and where to look for it."""

    owner: dict[str, Tensor | None]
    name: str
    tensor: Tensor | None
    address: int = 0
    stride: tuple[int, ...] = ()
    dtype: torch.dtype | None = None
    learns: bool = False

    @classmethod
    def of(cls, layer: nn.Module, name: str) -> "_Stamp":
        owner = _owner(layer, name)
        tensor = owner.get(name)
        if tensor is None:
            return cls(owner, name, None)
        return cls(owner, name, tensor, tensor.data_ptr(), tensor.stride(), tensor.dtype, tensor.requires_grad)


def _masked_state(layer: SparseLayer, grad: bool) -> tuple | None:
    """What a program depends on of a layer beside its mask; None where its tensors are none for the kernels."""
    weight, bias = layer._parameters["weight"], layer._parameters["bias"]
    if layer.__dict__["_bound"]() is not weight or weight is None or not _fits(weight):
        return None
    if (bias is not None and not _fits(bias)) or not same_order(layer.weight_mask, weight):
        return None
    return weight.stride(), weight.requires_grad and grad, None if bias is None else bias.requires_grad and grad


def _norm_state(layer: nn.BatchNorm2d, grad: bool) -> tuple | None:
    """The same for a BatchNorm."""
    tensors = [_tensor(layer, name) for name in _OF_NORM]
    if any(t is not None and not _fits(t) for t in tensors):
        return None
    if layer.momentum is None and blocked.tracks(layer):
        return None
    wants = tuple(None if t is None else t.requires_grad and grad for t in tensors)
    return *_modes(layer), wants


def _modes(layer: nn.BatchNorm2d) -> tuple:
    return layer.training, layer.track_running_stats, layer.momentum, layer.eps


def _fits(tensor: Tensor) -> bool:
    dense = tensor.is_contiguous() or is_channels_last(tensor)
    return tensor.dtype == torch.float32 and tensor.is_cpu and dense and type(tensor) in (nn.Parameter, Tensor)


def _plain(x: Any) -> bool:
    """Whether a segment takes an activation."""
    return type(x) is Tensor and x.dtype == torch.float32 and x.is_cpu and x.is_contiguous() and x.numel() > 0


def _observed() -> bool:
    """Whether something sees layers one by one, or wants them so.

    Several ranks do: gradients that come layer by layer are sent while the next are computed.
    """
    if _OFF or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return True
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def _function(run: Sequence[Node], inputs: list[Node], outputs: list[Node]) -> Callable[..., Sequence[Tensor]]:
    """The layers one by one, as a function of the model and the inputs."""
    graph = fx.Graph(tracer_cls=run[0].graph._tracer_cls)
    made = {node: graph.placeholder(f"given_{i}") for i, node in enumerate(inputs)}

    def copied(node: Node) -> Node:
        if node not in made:
            made[node] = graph.node_copy(node, copied)
        return made[node]

    for node in run:
        for layer in _attributes(node):
            copied(layer)
        copied(node)
    graph.output(map_arg(tuple(outputs), made.__getitem__))
    return function(graph)


def _attributes(node: Node) -> Iterator[Node]:
    return (a for a in node.all_input_nodes if a.op == "get_attr")
