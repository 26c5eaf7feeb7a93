"""What tracing and verification must leave as they found it: random generators, attributes, buffers."""

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_INFRASTRUCTURE = frozenset(nn.Module().__dict__)


class RandomState:
    """The state of every global random generator."""

    def __init__(self) -> None:
        self.torch = torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        self.python = random.getstate()
        self.numpy = np.random.get_state(legacy=True)

    def unchanged(self) -> bool:
        """Whether no generator has been drawn from since."""
        now = RandomState()
        return (
            torch.equal(self.torch, now.torch)
            and all(torch.equal(a, b) for a, b in zip(self.cuda, now.cuda, strict=False))
            and self.python == now.python
            and all(np.array_equal(a, b) for a, b in zip(self.numpy, now.numpy, strict=True))
        )

    def restore(self) -> None:
        """Put every generator back."""
        torch.set_rng_state(self.torch)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)
        random.setstate(self.python)
        np.random.set_state(self.numpy)


class State:
    """What a forward could write: the plain attributes, buffers and parameters of every module."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = list(model.named_modules())
        self.plain = [{k: (v, _contents(v)) for k, v in _plain(module)} for _, module in self.modules]
        self.saved = [(name, b, b._version, b.detach().clone()) for name, b in _mutable(model)]
        self.versions = [(name, p, _version(p)) for name, p in model.named_parameters()]

    def buffers(self) -> list[Tensor]:
        """Copies of the buffers as they are now."""
        return [buffer.detach().clone() for _, buffer, _, _ in self.saved]

    def restore(self) -> list[tuple[str, str]]:
        """Undo every write but to parameters; the module's name and what it did, for each."""
        changed = []
        for (name, module), before in zip(self.modules, self.plain, strict=True):
            now = dict(_plain(module))
            for key in now.keys() | before.keys():
                value, contents = before.get(key, (None, None))
                if key in now and key in before and now[key] is value and _same(_contents(value), contents):
                    continue
                changed.append((name, f"writes its attribute {key!r}"))
                module.__dict__.pop(key, None)
                if key in before:
                    module.__dict__[key] = _refill(value, contents)
        for name, buffer, version, saved in self.saved:
            if buffer._version != version or not torch.equal(buffer, saved):  # BatchNorm moves no version
                changed.append((name.rpartition(".")[0], f"writes its buffer {name!r}"))
                with torch.no_grad():
                    buffer.copy_(saved)
        for name, parameter, version in self.versions:
            if _version(parameter) != version:
                changed.append((name.rpartition(".")[0], f"writes its parameter {name!r}"))
        return changed


def _mutable(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Buffers that a forward may write; a mask is not one."""
    return ((n, b) for n, b in model.named_buffers() if not n.endswith("weight_mask") and not b.is_inference())


def _plain(module: nn.Module) -> list[tuple[str, Any]]:
    return [(k, v) for k, v in module.__dict__.items() if k not in _INFRASTRUCTURE]


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _contents(value: Any) -> tuple[list, Any] | None:
    """What a container holds, by identity and as a shallow copy; the version of a tensor; None for anything else."""
    if isinstance(value, Tensor):
        return [_version(value)], None
    if isinstance(value, dict):
        return [(k, id(v)) for k, v in value.items()], dict(value)
    if isinstance(value, list):
        return [id(v) for v in value], list(value)
    if isinstance(value, set):
        return sorted(id(v) for v in value), set(value)
    return None


def _same(now: tuple[list, Any] | None, before: tuple[list, Any] | None) -> bool:
    return now is before is None or (now is not None and before is not None and now[0] == before[0])


def _refill(value: Any, contents: tuple[list, Any] | None) -> Any:
    if contents is None:
        return value
    if isinstance(value, dict):
        value.clear()
        value.update(contents[1])
    elif isinstance(value, list):
        value[:] = contents[1]
    elif isinstance(value, set):
        value.clear()
        value.update(contents[1])
    return value
