"""Exact selection of k entries, ties to the lower index, the same on every device and rank."""

import torch
from torch import Tensor


def largest(score: Tensor, k: int) -> Tensor:
    """Indices of the `k` largest entries of a 1-D tensor; among equals the lower indices win. Not sorted."""
    if k <= 0:
        return torch.empty(0, dtype=torch.long, device=score.device)
    if k >= len(score):
        return torch.arange(len(score), device=score.device)
    threshold = torch.kthvalue(score, len(score) - k + 1).values
    above = (score > threshold).nonzero().squeeze(1)
    ties = (score == threshold).nonzero().squeeze(1)
    return torch.cat([above, ties[: k - len(above)]])


def smallest(score: Tensor, k: int) -> Tensor:
    """Indices of the `k` smallest entries of a 1-D tensor; among equals the lower indices win. Not sorted."""
    return largest(-score, k)
