"""Which existing units go."""

from torch import Tensor

from sparsefx.algorithms.registry import register
from sparsefx.algorithms.select import smallest


@register("prune", "magnitude")
def magnitude(weight: Tensor, mask: Tensor, k: int) -> Tensor:
    """Remove the `k` existing units of smallest magnitude.

    Args:
        weight: Weights, or sums of magnitudes over units, `[units]`.
        mask: Which units exist, bool `[units]`.
        k: How many to remove.
    Returns:
        The new mask.
    Source: Dettmers & Zettlemoyer 2019, Algorithm 1, line "Prune".
    """
    return mask & ~smallest(weight.abs(), k, mask)
