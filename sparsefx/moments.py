"""The first moment of torch's optimizers: where it is, how it folds a gradient in, how long it remembers."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, NAdam, Optimizer, RAdam

from sparsefx.errors import SchedulerError
from sparsefx.shards import part, part_like, whole

ADAMS = (Adam, AdamW, NAdam, RAdam)
FORGOTTEN = 0.01
"""What is left of a gradient in the first moment when it counts as forgotten (contract 6)."""


def check_family(optimizer: Optimizer) -> None:
    """Accept SGD with momentum and the Adam family.

    Raises:
        SchedulerError: the optimizer keeps no first moment, or one that is not linear in the gradient.
    """
    name = type(optimizer).__name__
    if isinstance(optimizer, SGD):
        if any(group["momentum"] == 0 for group in optimizer.param_groups):
            raise SchedulerError(
                f"{name}: expected momentum > 0, got 0; sparse momentum grows weights by the first moment, "
                'pass momentum=0.9, or choose SparseMomentum(redistribute="nonzero", grow="random")'
            )
    elif not isinstance(optimizer, ADAMS):
        raise SchedulerError(
            f"{name}: expected SGD with momentum, Adam, AdamW, NAdam or RAdam, got {name}, which keeps no first "
            'moment that is linear in the gradient; use one of these, or SparseMomentum(redistribute="nonzero", '
            'grow="random"), which needs none'
        )


def leaves_zeros(optimizer: Optimizer) -> bool:
    """Whether a step is known to leave a weight of zero, without gradient and moment, at zero."""
    return isinstance(optimizer, (SGD, *ADAMS))


def memory(group: dict) -> int:
    """Steps after which a gradient weighs less than `FORGOTTEN` in the first moment."""
    factor = group["betas"][0] if "betas" in group else group["momentum"]
    return 1 if factor <= 0 else max(1, math.ceil(math.log(FORGOTTEN) / math.log(factor)))


def members(optimizer: Optimizer) -> Iterator[tuple[dict, Tensor]]:
    """Every parameter with its group."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            yield group, parameter


def first_moment(optimizer: Optimizer, weight: Tensor) -> Tensor | None:
    """The optimizer's own tensor, or None before the weight's first step."""
    state = optimizer.state.get(weight, {})
    return state.get("exp_avg" if isinstance(optimizer, ADAMS) else "momentum_buffer")


def folded(group: dict, *, first: bool) -> float:
    """Factor with which an optimizer's rule adds a gradient to the first moment.

    The rule is linear: what the step saw as zero can be added afterwards.

    Args:
        group: The weight's parameter group.
        first: Whether the step made the moment; SGD's first buffer is the gradient itself, undamped.
    """
    scale = 1 - group["betas"][0] if "betas" in group else (1.0 if first else 1 - group["dampening"])
    return -scale if group.get("maximize") else scale


def normalized(optimizer: Optimizer, group: dict, weight: Tensor) -> Tensor:
    """The first moment in the scale of the optimizer's step, for comparing layers (contract 6); whole."""
    state = optimizer.state[weight]
    if isinstance(optimizer, ADAMS):
        return whole(state["exp_avg"]) / (whole(state["exp_avg_sq"]).sqrt() + group["eps"])
    return whole(state["momentum_buffer"])


@torch.no_grad()
def start_grown_(optimizer: Optimizer, weight: Tensor, kept: Tensor, grown: Tensor) -> None:
    """Give grown weights the layer's mean second moment; one of zero would make their first steps huge.

    Args:
        kept: Bool, weights that existed and stay.
        grown: Bool, weights that are new.
    """
    state = optimizer.state.get(weight, {})
    for name in ("exp_avg_sq", "max_exp_avg_sq"):
        if name in state and kept.any():
            mean = whole(state[name])[kept].mean()
            part(state[name])[part_like(grown, weight)] = mean


def skipped(optimizer: Optimizer) -> bool:
    """Whether a fused optimizer under GradScaler took no step: it sees non-finite gradients inside the step."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found > 0)


def scale_seen(products: Sequence[float], otherwise: float) -> float:
    """The factor between gradients as collected and as the optimizer saw them (loss scale, clipping).

    Args:
        products: Of one layer, or summed over several: of the dense gradient as it left backward with `.grad` at the
            step, and of that with itself.
        otherwise: The factor where the existing weights had no gradient to compare.
    Returns:
        Exactly 1 where nothing scaled the gradients.
    """
    if not products or products[0] == 0 or not math.isfinite(products[0]):
        return otherwise
    return products[1] / products[0]
