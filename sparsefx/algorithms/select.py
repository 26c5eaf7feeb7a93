"""Exact selection of k entries, ties to the lower index, the same on every device and rank."""

import numpy as np
import torch
from torch import Tensor


def largest(score: Tensor, k: int, among: Tensor) -> Tensor:
    """Which are the `k` largest entries of a 1-D tensor, bool; among equals the lower indices win.

    Args:
        among: Entries that may be chosen, bool, of the score's shape.
    """
    count = int(torch.count_nonzero(among))
    if k <= 0 or k >= count:
        return among & (k > 0)
    least = _kth_largest(score, k, among, count)
    chosen = (score >= least).logical_and_(among)
    surplus = int(torch.count_nonzero(chosen)) - k
    if surplus:
        chosen[((score == least) & among).nonzero().squeeze(1)[-surplus:]] = False
    return chosen


def smallest(score: Tensor, k: int, among: Tensor) -> Tensor:
    """Which are the `k` smallest entries of a 1-D tensor; otherwise as `largest`."""
    return largest(-score, k, among)


def _kth_largest(score: Tensor, k: int, among: Tensor, count: int) -> float | Tensor:
    at = count - k
    if score.device.type == "cpu" and score.dtype in (torch.float32, torch.float64):
        values = np.compress(among.numpy(), score.numpy())  # these two are several times faster than torch's
        values.partition(at)
        return float(values[at])
    return torch.kthvalue(score.masked_select(among), at + 1).values
