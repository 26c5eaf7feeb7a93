"""Kernels of sparsefx: operators, backends and what they know of a layer. Knows torch, nothing of sparsefx."""
