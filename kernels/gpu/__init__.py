"""Triton kernels for sparse layers on CUDA, over activations `[C, H, W, N]`."""
