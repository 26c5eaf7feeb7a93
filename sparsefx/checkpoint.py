"""Loading a state: everything is checked before any tensor is written (contract 3)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparsefx.algorithms.place import magnitude_masks
from sparsefx.errors import CheckpointError
from sparsefx.layers import MASK, sparse_layers
from sparsefx.scheduler import Scheduler
from sparsefx.shards import whole


class Checked(nn.Module):
    """Mixin of a sparsified model's class: `load_state_dict` checks first, and copies drive their own layers."""

    scheduler: Scheduler

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.scheduler.rebind({f"{name}.weight".lstrip("."): layer for name, layer in sparse_layers(self)})

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The original's keys, and the masks."""
        self.scheduler.settle()
        return super().state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load a sparse or a dense checkpoint; a dense one leaves the masks and zeroes the missing weights.

        Raises:
            CheckpointError: the state does not fit; nothing has been written.
        """
        check_state_dict(self, state_dict, strict)
        return super().load_state_dict(state_dict, strict=strict, assign=assign)


def check_state_dict(model: nn.Module, state_dict: Mapping[str, Any], strict: bool = True) -> None:
    """Check keys, shapes and the number of weights that exist.

    Raises:
        CheckpointError: what does not fit, and what to do.
    """
    own = {key: value for key, value in model.state_dict().items() if isinstance(value, Tensor)}
    for key, value in state_dict.items():
        if key in own and isinstance(value, Tensor) and value.shape != own[key].shape:
            raise CheckpointError(
                f"{key}: expected shape {tuple(own[key].shape)}, got {tuple(value.shape)}; "
                "load a checkpoint of this architecture"
            )
    if strict and not any(module._load_state_dict_pre_hooks for module in model.modules()):
        optional = (MASK, "num_batches_tracked")
        missing = [key for key in own if key not in state_dict and not key.endswith(optional)]
        unexpected = [key for key in state_dict if key not in own and not key.endswith("_extra_state")]
        if missing or unexpected:
            raise CheckpointError(
                f"{type(model).__name__}: expected the keys of this model, got missing {missing} and unexpected "
                f"{unexpected}; load a checkpoint of this architecture, or pass strict=False"
            )
    _check_masks(model, state_dict)


def _check_masks(model: nn.Module, state_dict: Mapping[str, Any]) -> None:
    keys = {key for name, _ in sparse_layers(model) if (key := f"{name}.{MASK}".lstrip(".")) in state_dict}
    if not keys:
        return
    absent = [key for name, _ in sparse_layers(model) if (key := f"{name}.{MASK}".lstrip(".")) not in keys]
    if absent:
        raise CheckpointError(
            f"{absent[0]}: expected a mask for every sparse layer or none, got {len(keys)}; "
            "sparsify with the same keep_dense as when the checkpoint was saved"
        )
    for key in sorted(keys):
        if state_dict[key].dtype != torch.bool:
            raise CheckpointError(f"{key}: expected a bool mask, got {state_dict[key].dtype}; load the saved masks")
    total = sum(state_dict[key].numel() for key in keys)
    count = sum(int(whole(state_dict[key].sum())) for key in sorted(keys))
    scheduler = model.scheduler
    assert isinstance(scheduler, Scheduler)
    mine = scheduler.target  # masks of larger units fall short of it by less than one unit
    if not mine - max(unit.whole for unit in scheduler.units.values()) < count <= mine:
        raise CheckpointError(
            f"{type(model).__name__}: expected masks with {mine} of {total} weights (density {mine / total:.6g}), got "
            f"{count} (density {count / total:.6g}); sparsify at the density of the checkpoint, or drop its masks"
        )


def load_dense(model: nn.Module, state_dict: Mapping[str, Any], *, masks: str = "keep") -> None:
    """Load the checkpoint of a dense model into a sparsified one.

    `model.load_state_dict(state_dict)` does the same as `masks="keep"`.

    Args:
        model: A sparsified model.
        state_dict: Of the dense model; complete.
        masks: `"keep"` zeroes the loaded weights that are missing; `"magnitude"` first redraws each layer's mask,
            with its present number of weights, as the loaded weights of largest magnitude.
    Raises:
        CheckpointError: a key is missing, unexpected or of another shape; nothing has been written.
    """
    if masks not in ("keep", "magnitude"):
        raise CheckpointError(f'masks: expected "keep" or "magnitude", got {masks!r}')
    check_state_dict(model, state_dict)
    if masks == "magnitude":
        scheduler = model.scheduler
        assert isinstance(scheduler, Scheduler)
        names, layers = list(scheduler.layers), scheduler.layers.values()
        drawn = magnitude_masks(
            [scheduler.units[name] for name in names],
            [state_dict[name].float() for name in names],
            [int(layer.weight_mask.sum()) for layer in layers],
        )
        for layer, mask in zip(layers, drawn, strict=True):
            layer.set_mask_(mask.to(layer.weight_mask.device))
    model.load_state_dict(state_dict)
