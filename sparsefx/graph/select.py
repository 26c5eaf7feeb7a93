"""Which layers become sparse, and for each of the others the reason why not."""

import fnmatch
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from sparsefx.errors import LayerError
from sparsefx.layers import SPARSE, SparseLayer

KeepDense = Sequence[str] | str | Callable[[str, nn.Module], bool]


@dataclass(frozen=True)
class Selection:
    """The outcome.

    Attributes:
        sparse: Layers to rewrite by name, one for each weight.
        shared: Name of a further layer -> name of the first that has the same weight.
        dense: Name -> reason, for every other module with a weight of two dimensions or more.
    """

    sparse: dict[str, nn.Module]
    shared: dict[str, str]
    dense: dict[str, str]


def select(model: nn.Module, keep_dense: KeepDense = ()) -> Selection:
    """Choose the layers to make sparse.

    Args:
        model: The model.
        keep_dense: Names, globs, or a predicate `(name, module) -> bool` of layers to leave dense.
    Returns:
        The selection. Eligible is exactly the torch class, with a plain weight that no dense module shares.
    Raises:
        LayerError: a name or glob of `keep_dense` that matches no module.
    """
    keep = _predicate(model, keep_dense)
    holders = _holders(model)
    sparse: dict[str, nn.Module] = {}
    shared: dict[str, str] = {}
    dense: dict[str, str] = {}
    first: dict[int, str] = {}
    for name, module in model.named_modules():
        reason = _why_dense(name, module, keep, holders)
        if reason is None:
            weight = id(module.weight)
            if weight in first:
                shared[name] = first[weight]
            else:
                first[weight] = name
                sparse[name] = module
        elif reason:
            dense[name] = reason
    return Selection(sparse, shared, dense)


def _predicate(model: nn.Module, keep_dense: KeepDense) -> Callable[[str, nn.Module], bool]:
    if callable(keep_dense):
        return keep_dense
    patterns = [keep_dense] if isinstance(keep_dense, str) else list(keep_dense)
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            raise LayerError(
                f"keep_dense: expected names or globs of modules, got {pattern!r}, which matches none; "
                "see dict(model.named_modules())"
            )
    return lambda name, module: any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _holders(model: nn.Module) -> dict[int, list[tuple[str, nn.Module, str]]]:
    """Every place, `(module name, module, attribute)`, that holds a parameter, by the parameter's id."""
    found: dict[int, list[tuple[str, nn.Module, str]]] = {}
    for name, module in model.named_modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                found.setdefault(id(parameter), []).append((name, module, attribute))
    return found


def _why_dense(
    name: str,
    module: nn.Module,
    keep: Callable[[str, nn.Module], bool],
    holders: dict[int, list[tuple[str, nn.Module, str]]],
) -> str | None:
    """None for an eligible layer, "" for a module without a weight matrix, otherwise the reason."""
    if parametrize.is_parametrized(module):
        return f"{', '.join(module.parametrizations)} is parametrized"  # pyright: ignore
    if type(module) not in SPARSE:
        return _other(module)
    weight = module._parameters.get("weight")
    if weight is None:
        return "its weight is computed (weight_norm or the like)"
    if weight.is_complex() or not weight.is_floating_point():
        return f"its weight is {weight.dtype}"
    if keep(name, module):
        return "keep_dense"
    for other_name, other, attribute in holders[id(weight)]:
        if attribute != "weight" or type(other) not in SPARSE or keep(other_name, other):
            return f"its weight is tied to {other_name or 'the model'}.{attribute}, which stays dense"
        if SPARSE[type(other)].transposed != SPARSE[type(module)].transposed:
            return f"its weight is tied to {other_name}, which reads it transposed"
    return None


def _other(module: nn.Module) -> str:
    if isinstance(module, SparseLayer):
        return "already sparse"
    if isinstance(module, LazyModuleMixin):
        return "its shape is not known before its first call; call the model once, then sparsify"
    if isinstance(module, nn.MultiheadAttention):
        return "packed attention projection (in_proj_weight)"
    eligible = [base.__name__ for base in SPARSE if isinstance(module, base)]
    if eligible:
        return f"a subclass of {eligible[0]}: {type(module).__qualname__} may have a forward of its own"
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return "embedding"
    if isinstance(module, parametrize.ParametrizationList):
        return ""
    own = [n for n, p in module._parameters.items() if p is not None and p.dim() >= 2]
    return f"{type(module).__qualname__} is no convolution or linear layer ({', '.join(own)})" if own else ""
