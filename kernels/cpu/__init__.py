"""C++ kernels for the CPU: sparse convolution and linear layers, batch norm, and their blocked activation layout.

Activations are `[ceil(N / 16), C, H, W, 16]`, 16 images innermost. Lanes beyond N are zero in every tensor that these
functions take, and in every tensor that they return; statistics and weight gradients never see them.
"""

from .build import CompilerUnavailable
from .conv import ConvPlan
from .layout import as_channels_last, from_blocked, from_channels_last, to_blocked
from .linear import LinearPlan
from .norm import Normalized, NormGrads, batch_norm_backward, batch_norm_forward
from .plan import Tiling
from .pool import Pool, max_pool_backward, max_pool_forward

__all__ = [
    "CompilerUnavailable",
    "ConvPlan",
    "LinearPlan",
    "NormGrads",
    "Normalized",
    "Pool",
    "Tiling",
    "as_channels_last",
    "batch_norm_backward",
    "batch_norm_forward",
    "from_blocked",
    "from_channels_last",
    "max_pool_backward",
    "max_pool_forward",
    "to_blocked",
]
