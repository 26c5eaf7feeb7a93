"""What the GPU benchmark times: layers, masks, the best dense calls, and the sparse calls."""

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsefx.kernels.gpu.choose import choose, precision_of, unit_rows
from sparsefx.kernels.gpu.layout import to_chwn, transpose
from sparsefx.kernels.gpu.plan import Geometry, LayerPlan
from sparsefx.kernels.gpu.timing import Calls
from sparsefx.kernels.layer import Layer, random_mask
from sparsefx.kernels.reference import DENSE
from sparsefx.kernels.sparse_gpu import SparseGpu

PASSES = ("fprop", "dgrad", "wgrad")
MASKS = ("random", "h8", "h16", "h32", "h64")


LAYERS = (
    Layer("640x640 3x3 8x8 b128", 640, 640, 3, 8, 128),
    Layer("512x512 3x3 4x4 b128", 512, 512, 3, 4, 128),
    Layer("3x3/2 160 to 320 32x32 b128", 320, 160, 3, 32, 128, 2),
    Layer("64x64 3x3 32x32 b128", 64, 64, 3, 32, 128),
    Layer("1x1 2048 to 512 7x7 b128", 512, 2048, 1, 7, 128),
    Layer("linear 4096x4096 b512", 4096, 4096, 1, 0, 512),
)
TOYS = (
    Layer("toy 3x3 4x4 b4", 32, 6, 3, 4, 4),
    Layer("toy 3x3/2 5x5 b3", 16, 5, 3, 5, 3, 2),
    Layer("toy 1x1 3x3 b4", 16, 12, 1, 3, 4),
    Layer("toy linear b8", 24, 10, 1, 0, 8),
)


def draw(layer: Layer, kind: str, density: float, device: torch.device) -> Tensor:
    """A mask: "random", or "h16" for columns of 16 output channels."""
    return random_mask(layer, 1 if kind == "random" else int(kind[1:]), density, device)


class Tensors(NamedTuple):
    """A layer's input, masked weight and output gradient in the tested type."""

    x: Tensor
    weight: Tensor
    grad: Tensor
    mask: Tensor


def tensors(layer: Layer, mask: Tensor, dtype: torch.dtype) -> Tensors:
    """Random tensors for a layer."""
    shape = (layer.batch, layer.inputs, layer.size, layer.size) if layer.size else (layer.batch, layer.inputs)
    x = torch.randn(shape, device=mask.device, dtype=dtype)
    weight = (torch.randn(layer.shape, device=mask.device) * 0.05 * mask).to(dtype)
    grad = torch.randn_like(DENSE.fprop(layer.spec, x, weight, None))
    return Tensors(x, weight, grad, mask)


def exact(layer: Layer, t: Tensors, kind: str) -> Tensor:
    """The result of a pass in float64."""
    x, weight, grad = t.x.double(), t.weight.double(), t.grad.double()
    if kind == "fprop":
        return DENSE.fprop(layer.spec, x, weight, None)
    if kind == "dgrad":
        return DENSE.dgrad(layer.spec, grad, x, weight)
    return DENSE.wgrad(layer.spec, grad, x, weight, t.mask)


def dense_calls(layer: Layer, t: Tensors, kind: str, compiled: bool) -> Calls:
    """The vendor's kernels on each layout, the weight's zeros included."""
    calls: Calls = {}
    formats = (("nchw", torch.contiguous_format), ("channels_last", torch.channels_last))
    for name, memory_format in formats if layer.size else (("rows", torch.contiguous_format),):
        x, weight, grad = (v.contiguous(memory_format=memory_format) for v in t[:3])
        calls[name] = {
            "fprop": partial(DENSE.fprop, layer.spec, x, weight, None),
            "dgrad": partial(DENSE.dgrad, layer.spec, grad, x, weight),
            "wgrad": partial(DENSE.dense_wgrad, layer.spec, grad, x, weight),
        }[kind]
    if compiled and kind == "fprop":
        forward = torch.compile(partial(_forward, layer), dynamic=False)
        calls["compiled"] = partial(forward, t.x, t.weight)
    return calls


def _forward(layer: Layer, x: Tensor, weight: Tensor) -> Tensor:
    if not layer.size:
        return F.linear(x, weight)
    return F.conv2d(x, weight, None, layer.stride, layer.kernel // 2)


def plan_of(layer: Layer, t: Tensors) -> LayerPlan:
    """The plan that the backend would choose."""
    geometry, unit = Geometry.of(t.mask, layer.spec), unit_rows(t.mask)
    configs = choose(t.mask, geometry, layer.hw, layer.batch, t.x.dtype, unit)
    return LayerPlan(t.mask, geometry, configs, unit)


def inner(layer: Layer, x: Tensor) -> Tensor:
    """`x` as `[C, H, W, N]`."""
    return to_chwn(x) if layer.size else transpose(x).view(-1, 1, 1, len(x))


def outer(layer: Layer, x: Tensor) -> Tensor:
    """`[C, H, W, N]` as the dense layer's result."""
    return x.permute(3, 0, 1, 2) if layer.size else x.flatten(1).T


def sparse_calls(layer: Layer, t: Tensors, plan: LayerPlan, kind: str, borders: bool) -> Calls:
    """Our kernels inside a `[C, H, W, N]` region, and with the changes of layout at its borders."""
    precision = precision_of(t.x.dtype, not layer.size)
    x, grad = inner(layer, t.x), inner(layer, t.grad)
    calls: Calls = {
        "chwn": {
            "fprop": partial(plan.fprop, x, t.weight, precision=precision),
            "dgrad": partial(plan.dgrad, grad, t.weight, layer.hw, precision=precision),
            "wgrad": partial(plan.wgrad, grad, x, t.weight, precision=precision),
        }[kind]
    }
    if borders:
        backend = SparseGpu(t.mask, layer.spec)
        calls["borders"] = {
            "fprop": partial(backend.fprop, layer.spec, t.x, t.weight, None),
            "dgrad": partial(backend.dgrad, layer.spec, t.grad, t.x, t.weight),
            "wgrad": partial(backend.wgrad, layer.spec, t.grad, t.x, t.weight, t.mask),
        }[kind]
    return calls
