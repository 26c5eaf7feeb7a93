"""What the integrations share: the sparse models in a module, and an update as numbers to log."""

from typing import Any

from torch import nn

from sparsefx.checkpoint import Checked
from sparsefx.errors import LayerError
from sparsefx.scheduler import Scheduler


def scheduler_of(module: nn.Module) -> Scheduler:
    """The scheduler of the sparsified model in a module, or of the module itself.

    Raises:
        LayerError: there is none, or more than one.
    """
    found = [(name, part.scheduler) for name, part in module.named_modules() if isinstance(part, Checked)]
    if len(found) != 1:
        raise LayerError(
            f"{type(module).__name__}: expected one sparsified model in it, got {[name for name, _ in found]}; "
            "call sparsefx.sparsify on the model that is trained, once"
        )
    return found[0][1]


def scalars(row: dict[str, Any]) -> dict[str, float]:
    """A row of `Scheduler.history` as numbers by name: densities and counts, overall and by layer, and the cost.

    Args:
        row: One update.
    Returns:
        `sparsefx/nnz`, `sparsefx/prune_rate`, `sparsefx/update_seconds`, `sparsefx/removed`, `sparsefx/grown`, and
        `sparsefx/density/<weight>` and `sparsefx/nnz/<weight>` for each layer.
    """
    layers = row["layers"]
    values: dict[str, float] = {
        "sparsefx/prune_rate": row["prune_rate"],
        "sparsefx/update_seconds": row["seconds"],
        "sparsefx/specialize_seconds": row["specialize_seconds"],
    }
    for key in ("nnz", "removed", "grown"):
        values[f"sparsefx/{key}"] = float(sum(layer[key] for layer in layers.values()))
    for name, layer in layers.items():
        values[f"sparsefx/density/{name}"] = layer["density"]
        values[f"sparsefx/nnz/{name}"] = float(layer["nnz"])
    return values
