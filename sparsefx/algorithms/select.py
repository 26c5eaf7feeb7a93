"""Exact selection of k entries, ties to the lower index, the same on every device and rank."""

import numpy as np
import torch
from torch import Tensor


def largest(score: Tensor, k: int) -> Tensor:
    """Which are the `k` largest entries of a 1-D tensor, bool; among equals the lower indices win."""
    if k <= 0 or k >= len(score):
        return torch.full_like(score, k > 0, dtype=torch.bool)
    least = _kth_largest(score, k)
    chosen = score > least
    ties = (score == least).nonzero().squeeze(1)
    chosen[ties[: k - int(torch.count_nonzero(chosen))]] = True
    return chosen


def smallest(score: Tensor, k: int) -> Tensor:
    """Which are the `k` smallest entries of a 1-D tensor, bool; among equals the lower indices win."""
    return largest(-score, k)


def _kth_largest(score: Tensor, k: int) -> float | Tensor:
    at = len(score) - k
    if score.device.type == "cpu" and score.dtype in (torch.float32, torch.float64):
        return float(np.partition(score.numpy(), at)[at])  # several times faster than torch's selection
    return torch.kthvalue(score, at + 1).values
