"""Which missing units come back."""

import torch
from torch import Tensor

from sparsefx.algorithms.registry import register
from sparsefx.algorithms.select import largest


@register("grow", "momentum")
def momentum(score: Tensor, mask: Tensor, k: int) -> Tensor:
    """Grow the `k` missing units of largest first moment.

    Args:
        score: First moment, or its summed magnitude over units, `[units]`.
        mask: Which units exist, bool `[units]`.
        k: How many to grow.
    Returns:
        The new mask.
    Source: Dettmers & Zettlemoyer 2019, Algorithm 1, line "Regrow".
    """
    return mask | largest(score.abs(), k, ~mask)


@register("grow", "random", needs_first_moment=False)
def random(score: Tensor, mask: Tensor, k: int, *, generator: torch.Generator) -> Tensor:
    """Grow `k` missing units drawn at random, as SET does (Mocanu et al. 2018, arXiv:1707.04780)."""
    missing = (~mask).nonzero().squeeze(1)
    new = mask.clone()
    chosen = torch.randperm(len(missing), generator=generator)[:k].to(missing.device)
    new[missing[chosen]] = True
    return new
