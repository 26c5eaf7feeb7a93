"""Install the generated forward on the model itself, guarded, so that it is never wrong and never stale.

`model.__class__` becomes a subclass of the user's class, one for each model. Its forward runs the traced graph while
every inlined module is as it was traced, and the user's own forward otherwise.
"""

import inspect
import warnings
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from sparsefx.errors import LayerError, TraceWarning
from sparsefx.graph.regions import LAYERS, Choose, Chooser, observed
from sparsefx.graph.snapshot import RandomState, State
from sparsefx.graph.trace import IsLeaf, Trace, trace, why_called

STATE = "_sparsefx"
_TOLERANCE = 1e-6
"""Largest relative norm of the difference between the outputs of the graph and of the own forward."""
_MOST_TRACES = 8
"""An attribute that has changed this often makes its module a boundary, instead of a trace at every call."""


class Program:
    """What a sparsified model runs, and what it keeps for sparsefx.

    Attributes:
        extras: What `install` was given to keep.
        own: Whether the own forward runs for good.
    """

    def __init__(
        self, base: type[nn.Module], is_leaf: IsLeaf, choose: Choose, extras: dict[str, Any], own: bool
    ) -> None:
        self.base = base
        self.is_leaf = is_leaf
        self.choose = choose
        self.extras = extras
        self.own = own
        self._boundaries: dict[str, str] = {}
        self._active: Compiled | None = None
        self._graphs: list[Compiled] = []
        self._changes: dict[tuple[str, str], int] = {}

    def __getstate__(self) -> dict[str, Any]:
        """A copy traces for itself: graphs belong to one model."""
        return {**self.__dict__, "_graphs": [], "_changes": {}, "_active": None}

    @property
    def untraced(self) -> dict[str, str]:
        """Name -> reason, of modules that keep their own forward ("" is the model itself)."""
        active = self._active
        return self._boundaries | (active.called if active is not None else {})

    @property
    def latest(self) -> fx.Graph | None:
        """The graph that ran last; None if it was the own forward."""
        return None if self._active is None else self._active.graph

    def current(self, model: nn.Module) -> "Compiled | None":
        """The graph that holds for the model as it is, traced now if need be; None for the own forward."""
        for compiled in self._graphs:
            if compiled.holds():
                if not torch.compiler.is_compiling():
                    self._active = compiled
                return compiled
        if torch.compiler.is_compiling():
            return None
        self._active = self._trace(model)
        return self._active

    def _trace(self, model: nn.Module) -> "Compiled":
        told = self.untraced
        for compiled in self._graphs:
            for container in compiled.containers:
                change = container.change()
                if change.startswith("changed its attribute"):
                    key = (container.name, change)
                    self._changes[key] = self._changes.get(key, 0) + 1
                    if self._changes[key] >= _MOST_TRACES:
                        self._boundaries.setdefault(container.name, f"{change} again and again")
        names = {name for name, _ in model.named_modules()}
        known = {name: why for name, why in self._boundaries.items() if name in names}
        found = trace(model, self.base.forward, self.is_leaf, known)
        self._boundaries = found.boundaries
        _tell(model, told, found.boundaries | found.called)
        compiled = Compiled(model, found, self.choose)
        self._graphs = [old for old in self._graphs[-_MOST_TRACES:] if not old.broken()] + [compiled]
        return compiled

    def verify(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        """Check the graphs of both modes against the own forward; the model is left as it was."""
        if self.own:
            return
        modes = [(module, module.training) for module in model.modules()]
        for training in (not model.training, model.training):
            before, generators = State(model), RandomState()
            try:
                if training != model.training:
                    model.train(training)
                with torch.no_grad():
                    model(*args, **kwargs)
                compiled = self.current(model)
                inputs = None if compiled is None else compiled.arguments(args, kwargs)
                if compiled is not None and inputs is not None and compiled.verified:
                    with torch.set_grad_enabled(training):
                        compiled.chooser.run(inputs)
            finally:
                for module, mode in modes:
                    module.training = mode
                before.restore()
                generators.restore()


class Compiled:
    """A traced graph as a function of the model, with its guards."""

    def __init__(self, model: nn.Module, found: Trace, choose: Choose) -> None:
        self.called = found.called
        self.hooked = [model.get_submodule(name) for name in found.called]
        self.inputs = found.inputs
        self.containers = found.containers
        self.model = model
        self.training = model.training
        self.verified = False
        self.rejected = found.graph is None
        if found.graph is not None:
            self.chooser = Chooser(model, found.graph, choose)

    @property
    def graph(self) -> fx.Graph | None:
        """The graph of the latest call; None for the own forward."""
        return None if self.rejected else self.chooser.graph

    def holds(self) -> bool:
        """Whether everything that was inlined is as it was traced."""
        if self.rejected:
            return self.model.training is self.training
        for container in self.containers:
            if not container.holds():
                return False
        return all(why_called(module) for module in self.hooked)

    def broken(self) -> bool:
        """Whether it can never hold again."""
        return any("class" in c.change() or "children" in c.change() for c in self.containers)

    def arguments(self, args: tuple, kwargs: dict) -> tuple | None:
        """The call as positional tensors; None where it passes anything else, for which nothing was traced."""
        if len(args) > len(self.inputs) or len(args) + len(kwargs) != len(self.inputs):
            return None
        found = (*args, *(kwargs.get(name) for name in self.inputs[len(args) :]))
        return found if all(isinstance(a, Tensor) for a in found) else None


def install(
    model: nn.Module,
    *,
    is_leaf: IsLeaf,
    extras: dict[str, Any],
    mixins: tuple[type, ...] = (),
    choose: Choose = lambda key, calls: LAYERS,
    own: bool = False,
) -> Program:
    """Give a model its generated forward.

    Args:
        model: Stays the same object, and an instance of its class.
        is_leaf: `(module, name) -> bool`, modules that the graph calls.
        extras: Kept with the model, copied and pickled with it; `"scheduler"` becomes `model.scheduler`.
        mixins: Put before the user's class.
        choose: Which of several equal graphs to run.
        own: Run the own forward for good, as where every layer stays dense; `model.graph` is then for reading only.
    Raises:
        LayerError: the model has an attribute `graph` or `scheduler` of its own; nothing is changed.
    """
    check_names(model)
    program = Program(type(model), is_leaf, choose, extras, own)
    model.__dict__[STATE] = program
    model.__class__ = _subclass(type(model), mixins)
    return program


def check_names(model: nn.Module) -> None:
    """Refuse a model that uses the names which sparsefx puts on it."""
    for name in ("graph", "scheduler"):
        if hasattr(model, name):
            raise LayerError(
                f"{type(model).__name__}: expected no attribute {name!r}, got one; rename it, for "
                f"model.{name} will be that of sparsefx"
            )


def program_of(model: nn.Module) -> Program | None:
    """The program of a sparsified model."""
    return model.__dict__.get(STATE)


def _subclass(base: type[nn.Module], mixins: tuple[type, ...]) -> type[nn.Module]:
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        program: Program = self.__dict__[STATE]
        if program.own:
            return base.forward(self, *args, **kwargs)
        compiled = program.current(self)
        if compiled is None or compiled.rejected:
            return base.forward(self, *args, **kwargs)
        inputs = compiled.arguments(args, kwargs)
        if inputs is None:
            return base.forward(self, *args, **kwargs)
        if compiled.verified:
            return compiled.chooser.run(inputs)
        if torch.compiler.is_compiling() or observed(self):
            return base.forward(self, *args, **kwargs)
        return _verify(program, compiled, self, inputs)

    def reduce(self: nn.Module, protocol: Any) -> tuple:
        return _rebuild, (base, mixins), self.__getstate__()

    def graph(self: nn.Module) -> fx.Graph | None:
        """The fx graph that the model runs in its present mode; None while it runs its own forward."""
        compiled = self.__dict__[STATE].current(self)
        return None if compiled is None else compiled.graph

    def scheduler(self: nn.Module) -> Any:
        """The scheduler bound to the model."""
        return self.__dict__[STATE].extras["scheduler"]

    # Dynamo counts compilations by code object, and gives up after eight: each model has one of its own.
    forward.__code__ = forward.__code__.replace()
    forward.__signature__ = inspect.signature(base.forward)  # pyright: ignore[reportFunctionMemberAccess]
    space = {
        "forward": forward,
        "graph": property(graph),
        "scheduler": property(scheduler),
        "__reduce_ex__": reduce,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
    }
    return type(base.__name__, (*mixins, base), space)


def _rebuild(base: type[nn.Module], mixins: tuple[type, ...]) -> nn.Module:
    model = base.__new__(base)
    model.__class__ = _subclass(base, mixins)
    return model


def _verify(program: Program, compiled: Compiled, model: nn.Module, inputs: tuple) -> Any:
    """Compare the graph with the own forward, then make the call: what runs does not depend on its being the first."""
    generators, before = RandomState(), State(model)
    problem = ""
    try:
        with torch.no_grad():
            graphs = compiled.chooser.plain(model, *(i.detach().clone() for i in inputs))
        drawn, written = RandomState(), before.buffers()
    except Exception as error:
        graphs, drawn, written, problem = None, generators, [], f"its graph fails ({type(error).__name__}: {error})"
    generators.restore()
    before.restore()
    with torch.no_grad():
        own = program.base.forward(model, *(i.detach().clone() for i in inputs))
    if not problem and not (_equal(graphs, own) and _equal(written, before.buffers()) and drawn.unchanged()):
        problem = "has a graph whose results differ from those of its forward"
    generators.restore()
    before.restore()
    compiled.verified, compiled.rejected = not problem, bool(problem)
    if not problem:
        return compiled.chooser.run(inputs)
    _tell(model, {}, {"": problem})
    compiled.called = compiled.called | {"": problem}
    return program.base.forward(model, *inputs)


def _equal(one: Any, other: Any) -> bool:
    """Whether two outputs are the same structure of equal tensors, to rounding."""
    one, other = _open(one), _open(other)
    (ones, structure), (others, expected) = pytree.tree_flatten(one), pytree.tree_flatten(other)
    return structure == expected and all(_close(a, b) for a, b in zip(ones, others, strict=True))


def _open(value: Any) -> Any:
    """A plain dict for an output object that pytree does not know."""
    return vars(value) if hasattr(value, "__dataclass_fields__") else value


def _close(one: Any, other: Any) -> bool:
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return type(one) is type(other) and (one is other or bool(one == other))
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if torch.equal(one, other):
        return True
    a, b = one.detach().double(), other.detach().double()
    same = (a == b) | (a.isnan() & b.isnan())
    difference = torch.where(same, 0.0, a - b).norm()
    return bool(difference <= _TOLERANCE * torch.where(b.isfinite(), b, 0.0).norm())


def _tell(model: nn.Module, told: dict[str, str], untraced: dict[str, str]) -> None:
    """Warn of each module that has not been told of yet."""
    for name, reason in untraced.items():
        if told.get(name) != reason:
            warnings.warn(
                f"{name or type(model).__name__}: expected a module that traces, got one that {reason}; it keeps its "
                "own forward, and its layers are sparse all the same",
                TraceWarning,
                stacklevel=3,
            )
