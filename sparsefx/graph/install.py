"""Install a sparsified model's class on the model itself."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from sparsefx.errors import LayerError

_STATE = "_sparsefx"


class Program:
    def __init__(self, extras):
        self.extras = extras
        self.untraced = {}

    def verify(self, *args, **kwargs):
        pass


def install(model, *, is_leaf, passes=(), mixins=(), extras):
    for name in ("graph", "scheduler"):
        if hasattr(model, name):
            raise LayerError(f"{type(model).__name__}: expected no attribute {name!r}, got one; rename it")
    program = Program(extras)
    model.__dict__[_STATE] = program
    model.__class__ = _subclass(type(model), mixins)
    return program


def _subclass(base, mixins):
    def reduce(self, protocol):
        return _rebuild, (base, mixins), self.__getstate__()

    space = {
        "scheduler": property(lambda self: self.__dict__[_STATE].extras["scheduler"]),
        "graph": property(lambda self: None),
        "__reduce_ex__": reduce,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
    }
    return type(base.__name__, (*mixins, base), space)


def _rebuild(base, mixins):
    model = base.__new__(base)
    model.__class__ = _subclass(base, mixins)
    return model
