"""`sparsify` and the questions one can ask of a sparsified model."""

import hashlib
from typing import TypeVar

from torch import Tensor, nn

from sparsefx.algorithms import SparseMomentum
from sparsefx.checkpoint import Checked
from sparsefx.config import Granularity, check_density
from sparsefx.distributed import ignore_masks
from sparsefx.errors import LayerError
from sparsefx.graph.install import check_names, install
from sparsefx.graph.rewrite import Distribution, rewrite_
from sparsefx.graph.select import KeepDense, select
from sparsefx.layers import SparseLayer, sparse_layers
from sparsefx.scheduler import Scheduler
from sparsefx.specialize import GraphChoice, Specializer

Model = TypeVar("Model", bound=nn.Module)


def sparsify(
    model: Model,
    density: float = 0.05,
    *,
    example_inputs: tuple | Tensor | None = None,
    scheduler: SparseMomentum | None = None,
    keep_dense: KeepDense = (),
    distribution: Distribution = "uniform",
    granularity: str | tuple = "weight",
    seed: int | None = None,
) -> Model:
    """Make a model's Conv and Linear layers sparse, in place, and bind a scheduler to it.

    Args:
        model: Any module. The object, its class as `isinstance` sees it, its layers and its `state_dict` keys stay;
            each sparse layer gains a buffer `weight_mask`.
        density: Fraction of the weights of sparse layers that exist, in (0, 1]: exactly `round(density * total)`.
        example_inputs: Positional arguments of the model's forward. With them traces are verified and backends
            measured now, without them at the first call.
        scheduler: The algorithm; `SparseMomentum()` if None.
        keep_dense: Names, globs, or a predicate `(name, module) -> bool` of layers to leave dense.
        distribution: `"uniform"` (every layer the same density, the paper's), `"erk"`, or densities by layer name;
            layers that a dict does not name share what is left.
        granularity: The unit that exists or not: `"weight"`, `("column", h)`, `"channel"`, `("channel", "in")` or
            `("block", r, c)`.
        seed: Of the first masks. None is a fixed seed, so that all ranks draw the same.
    Returns:
        The same object, with `model.scheduler` and `model.graph`.
    Raises:
        DensityError: the density or distribution cannot be reached.
        GranularityError: an unknown granularity.
        LayerError: no layer is eligible, the model is sparse already, or uses a name that sparsefx needs.
    Example:
        >>> model = sparsefx.sparsify(torch.nn.Linear(100, 10), density=0.05)
        >>> int(sparsefx.masks(model)["weight"].sum())
        50
    """
    check_density(density)
    units = Granularity.parse(granularity)
    if any(isinstance(module, SparseLayer) for module in model.modules()):
        raise LayerError("model: expected a dense model, got one with sparse layers; sparsify a fresh one")
    check_names(model)
    selection = select(model, keep_dense)
    if not selection.sparse:
        reasons = "; ".join(f"{name}: {why}" for name, why in selection.dense.items()) or "it has none"
        raise LayerError(f"model: expected a Conv or Linear layer that may be sparse, got none ({reasons})")
    seed = 0 if seed is None else seed
    config = scheduler or SparseMomentum()
    layers = rewrite_(model, selection, density, distribution, units, seed)
    specializer = Specializer(hashlib.sha256(f"{type(model).__module__} {model}".encode()).hexdigest()[:16])
    bound = Scheduler(config, layers, units, density, seed, specializer)
    bound.rebind(layers)
    extras = {"scheduler": bound, "dense": selection.dense}
    choose = GraphChoice(specializer)
    program = install(model, is_leaf=is_leaf, mixins=(Checked,), extras=extras, choose=choose, own=density == 1)
    ignore_masks(model)
    if example_inputs is not None:
        program.verify(model, *((example_inputs,) if isinstance(example_inputs, Tensor) else example_inputs))
    return model


def is_leaf(module: nn.Module, name: str) -> bool:
    """Whether tracing stops at a module: at sparse layers, beside torch's own."""
    return isinstance(module, SparseLayer)


def masks(model: nn.Module) -> dict[str, Tensor]:
    """The masks of a sparsified model.

    Returns:
        Bool tensors of the weights' shapes, True where a weight exists, by the weight's name in `state_dict`. They are
        the model's own, not copies.
    """
    if isinstance(model, Checked):
        model.scheduler.settle()
    return {f"{name}.weight".lstrip("."): layer.weight_mask for name, layer in sparse_layers(model)}
