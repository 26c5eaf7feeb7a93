"""Layouts written the slow way, and the error that results are judged by."""

import torch


def blocked(x):
    """`[N, C, H, W]` to `[ceil(N / 16), C, H, W, 16]`, zero beyond N."""
    n = x.shape[0]
    padded = torch.zeros(-(-n // 16) * 16, *x.shape[1:], dtype=x.dtype)
    padded[:n] = x
    return padded.view(-1, 16, *x.shape[1:]).permute(0, 2, 3, 4, 1).contiguous()


def images_of(x):
    """All lanes of a blocked tensor as images, those that do not exist included."""
    return x.permute(0, 4, 1, 2, 3).reshape(-1, *x.shape[1:4])


def error(got, want):
    """||got - want|| / ||want||; NaN counts as infinite."""
    difference = (got.double() - want).norm() / want.norm().clamp_min(1e-30)
    return float("inf") if difference.isnan() else difference.item()
