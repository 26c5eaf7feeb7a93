"""Trace a model with torch.fx, without touching it, and find out where a trace would not mean the same."""

import enum
import inspect
import threading
import types
from collections import OrderedDict
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import checkpoint

from sparsefx.graph.snapshot import RandomState, State

IsLeaf = Callable[[nn.Module, str], bool]
_MODULE = frozenset(dir(nn.Module())) | frozenset(nn.Module().__dict__)
_SCALARS = (int, float, complex, bool, str, bytes, type(None), enum.Enum, torch.dtype, torch.device, torch.layout)
_FIXED = (torch.memory_format, types.FunctionType, types.BuiltinFunctionType, types.MethodType, type, types.ModuleType)
_CALLED_FOR = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "forward",
    "_compiled_call_impl",
)
"""Entries of a module's `__dict__` that make it one to call, not to inline."""


class Rejection(Exception):
    """A trace would not mean the same."""


class Interpreter(fx.Interpreter):
    """Runs a graph as its code would: with lists that functions may write into, as Video Swin's do."""

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[tuple, dict]:
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        return _mutable(args), _mutable(kwargs)


def _mutable(value: Any) -> Any:
    if isinstance(value, list):
        return [_mutable(v) for v in value]
    if isinstance(value, dict):
        return {k: _mutable(v) for k, v in value.items()}
    return tuple(_mutable(v) for v in value) if type(value) is tuple else value


@dataclass(frozen=True)
class Container:
    """A module whose forward was inlined, as it must still be for the graph to hold."""

    name: str
    module: nn.Module
    kind: type
    training: bool
    children: dict[str, nn.Module | None]
    attributes: tuple[tuple[str, Any], ...]
    inlined: bool

    def holds(self) -> bool:
        """Whether everything is as it was traced; a few microseconds a model, at every call."""
        module = self.module
        state = module.__dict__
        return (
            module.__class__ is self.kind
            and state["training"] is self.training
            and state["_modules"] == self.children
            and (not self.inlined or _called_for(state) is None)
            and (not self.attributes or all(_read(module, name) == value for name, value in self.attributes))
        )

    def change(self) -> str:
        """What is no longer as it was traced; empty if nothing."""
        module = self.module
        if module.__class__ is not self.kind:
            return "has another class"
        if module.training is not self.training:
            return "changed between train and eval"
        if module._modules != self.children:
            return "has other children"
        if self.inlined and (called := why_called(module)):
            return called
        return next((f"changed its attribute {n!r}" for n, value in self.attributes if _read(module, n) != value), "")


@dataclass
class Trace:
    """The outcome of tracing.

    Attributes:
        graph: With attribute paths of the model as targets; None if the model itself does not trace, or is a layer.
        inputs: Names of the required arguments of forward; the others keep their defaults.
        containers: What the graph relies on.
        boundaries: Name -> reason, of the modules that the graph calls because they do not trace ("" is the model).
        called: Name -> reason, of those that it calls because of what is on them at present, such as hooks.
    """

    graph: fx.Graph | None
    inputs: tuple[str, ...] = ()
    containers: tuple[Container, ...] = ()
    boundaries: dict[str, str] = field(default_factory=dict)
    called: dict[str, str] = field(default_factory=dict)


def trace(model: nn.Module, forward: Callable, is_leaf: IsLeaf, boundaries: dict[str, str] | None = None) -> Trace:
    """Trace a model's forward in its present mode.

    Args:
        model: Left exactly as it was: attributes, buffers, random generators.
        forward: The user's own, as a function of the model.
        is_leaf: `(module, name) -> bool`, modules to call beside those of torch.nn.
        boundaries: Name -> reason, of modules to call that are known not to trace.
    Returns:
        The trace. A module that does not trace becomes a boundary, with its reason; nothing is raised.
    """
    if is_leaf(model, ""):
        return Trace(None)
    found = dict(boundaries or {})
    while "" not in found:
        tracer = Tracer(model, forward, is_leaf, frozenset(found))
        before, generators = State(model), RandomState()
        graph, culprit, reason = None, "", ""
        try:
            with tracer.watching():
                graph = tracer.trace(model)
        except Exception as error:
            culprit, reason = tracer.failed, _describe(error)
        drawn = not generators.unchanged()
        generators.restore()
        written = before.restore()
        if not reason and written:
            culprit, reason = tracer.container_of(written[0][0]), written[0][1]
        elif not reason and drawn:
            reason = "draws a random number outside the graph"
        if not reason:
            assert graph is not None
            return Trace(graph, tracer.inputs, tracer.containers(), found, tracer.called)
        found[culprit] = reason
    return Trace(None, boundaries=found)


class Tracer(fx.Tracer):
    """Inlines the user's modules, calls torch's and ours, and records what the graph comes to rely on."""

    proxy_buffer_attributes = True

    def __init__(self, model: nn.Module, forward: Callable, is_leaf: IsLeaf, boundaries: frozenset[str]) -> None:
        super().__init__()
        self.model = model
        self.own_forward = forward
        self.user_is_leaf = is_leaf
        self.boundaries = boundaries
        self.names = {id(module): name for name, module in model.named_modules()}
        self.known = {id(t) for t in (*model.parameters(), *model.buffers())}
        self.inlined = {"": model}
        self.called: dict[str, str] = {}
        self.failed = ""
        self.reads: dict[int, dict[str, Any]] = {}
        self.inputs: tuple[str, ...] = ()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return (
            module_qualified_name in self.boundaries
            or self.user_is_leaf(m, module_qualified_name)
            or super().is_leaf_module(m, module_qualified_name)
            or bool(why_called(m))
        )

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list]:
        if self.is_leaf_module(self.model, "") and type(self.model) is not nn.Sequential:
            raise Rejection("is one of torch's own modules")
        required = []
        for parameter in list(inspect.signature(self.own_forward).parameters.values())[1:]:
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                continue
            if parameter.default is parameter.empty:
                if parameter.kind is parameter.KEYWORD_ONLY:
                    raise Rejection(f"takes {parameter.name!r} by keyword only")
                required.append(parameter.name)
        if not required:
            raise Rejection("takes no argument that is required")
        self.inputs = tuple(required)
        return self.own_forward, [self.model, *(self.create_proxy("placeholder", name, (), {}) for name in required)]

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Tensor) and id(a) not in self.known:
            raise Rejection("computes a tensor without an input, which the graph would freeze")
        if type(a) is OrderedDict:  # fx would make it a dict
            return self.create_arg(self.create_proxy("call_function", OrderedDict, (list(a.items()),), {}))
        return super().create_arg(a)

    def call_module(self, m: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> Any:
        name = self.names.get(id(m))
        if name is None:
            raise Rejection(f"calls a {type(m).__name__} that is no submodule")
        leaf = self.is_leaf_module(m, name)
        if leaf:
            if not super().is_leaf_module(m, name) and not self.user_is_leaf(m, name) and why_called(m):
                self.called[name] = why_called(m)
            return super().call_module(m, forward, args, kwargs)
        self.inlined[name] = m
        generators = RandomState()
        try:
            out = super().call_module(m, forward, args, kwargs)
            if not generators.unchanged():
                raise Rejection("draws a random number outside the graph")
        except Exception:
            self.failed = self.failed or name
            raise
        return out

    def container_of(self, name: str) -> str:
        """The innermost inlined module that holds the module of that name."""
        while name not in self.inlined:
            name = name.rpartition(".")[0]
        return name

    def containers(self) -> tuple[Container, ...]:
        """What each inlined module looks like now, and those whose attributes were read."""
        modules = {id(m): (name, m) for name, m in self.inlined.items()}
        modules |= {key: (self.names[key], self.model.get_submodule(self.names[key])) for key in self.reads}
        return tuple(
            Container(
                name,
                module,
                type(module),
                module.training,
                dict(module._modules),
                tuple(self.reads.get(key, {}).items()),
                name != "" and name in self.inlined,
            )
            for key, (name, module) in modules.items()
        )

    @contextmanager
    def watching(self):
        """Record the plain attributes that forward reads, and refuse activation checkpointing."""
        thread, plain = threading.get_ident(), object.__getattribute__

        def read(module: nn.Module, name: str) -> Any:
            value = plain(module, name)
            if name in _MODULE or threading.get_ident() != thread or id(module) not in self.names:
                return value
            if name not in plain(module, "__dict__") and isinstance(value, types.MethodType):
                return value
            self.reads.setdefault(id(module), {})[name] = freeze(value, name)
            return value

        def refuse(*_: Any, **__: Any) -> Any:
            raise Rejection("checkpoints its activations")

        # Which of these torch.utils.checkpoint.checkpoint goes through depends on the version of torch.
        inner = [n for n in ("_checkpoint_impl", "_checkpoint_without_reentrant_generator") if n in vars(checkpoint)]
        patched = [(checkpoint.CheckpointFunction, "apply"), *((checkpoint, name) for name in inner)]
        saved = [vars(owner).get(name) for owner, name in patched]
        nn.Module.__getattribute__ = read
        for owner, name in patched:
            setattr(owner, name, refuse)
        try:
            yield
        finally:
            del nn.Module.__getattribute__
            for (owner, name), value in zip(patched, saved, strict=True):
                if value is None:
                    delattr(owner, name)
                else:
                    setattr(owner, name, value)


def _called_for(state: dict[str, Any]) -> str | None:
    """The entry of a `__dict__` for which a module must be called; a loop, for this runs at every call of a model."""
    for name in _CALLED_FOR:
        if state.get(name):
            return name
    return None


def why_called(module: nn.Module) -> str:
    """Why a module must be called rather than inlined, as it is now; empty if it may be inlined."""
    found = _called_for(module.__dict__)
    if found is not None:
        return f"has {found.strip('_').replace('_', ' ')} of its own"
    if type(module).__module__.startswith("torch.distributed"):
        return f"is a {type(module).__name__}"
    return ""


def _read(module: nn.Module, name: str) -> Any:
    return freeze(getattr(module, name, None), name)


def freeze(value: Any, name: str) -> Any:
    """A copy of a plain value, to compare with later.

    Raises:
        Rejection: the value cannot be compared cheaply, so that a change would go unnoticed.
    """
    if isinstance(value, (*_SCALARS, *_FIXED)):
        return value
    if isinstance(value, nn.Module):
        return Same(value)
    if isinstance(value, list | tuple):
        return type(value) if hasattr(value, "_fields") else list, [freeze(v, name) for v in value]
    if isinstance(value, dict):
        return dict, [(k, freeze(v, name)) for k, v in value.items()]
    if isinstance(value, set | frozenset):
        return set, sorted(map(repr, value))
    if callable(value) and not isinstance(value, Tensor) and type(value).__module__ in ("functools", "builtins"):
        return Same(value)
    raise Rejection(f"reads its attribute {name!r}, a {type(value).__name__} whose changes would go unnoticed")


class Same:
    """Equal to another of the same object only."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


def _describe(error: Exception) -> str:
    if isinstance(error, Rejection):
        return str(error)
    text = str(error).strip().splitlines()
    return f"does not trace ({type(error).__name__}: {text[0] if text else ''})"


def function(graph: fx.Graph) -> Callable[..., Any]:
    """The graph's Python code as a function of the model."""
    code = graph.python_code("self")
    space = dict(code.globals)
    exec(compile(code.src, "<sparsefx graph>", "exec"), space)
    return space["forward"]
