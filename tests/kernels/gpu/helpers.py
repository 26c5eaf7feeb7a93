"""Layers and their results in float64, and small configurations that the interpreter runs fast."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsefx.kernels.gpu.config import Config
from sparsefx.kernels.gpu.plan import Geometry, LayerPlan

ROWS_FIRST = Config(16, 32, 128, True, 4, 3)
ROWS_LAST = Config(8, 32, 128, False, 4, 3)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@dataclass
class Layer:
    """A layer on random data, its three results in float64 for inputs of the tested type."""

    mask: Tensor
    geometry: Geometry
    w: Tensor
    x: Tensor
    b: Tensor
    g: Tensor
    y: Tensor
    dx: Tensor
    dw: Tensor

    def plan(self, config: Config = ROWS_FIRST, unit: int | None = None) -> LayerPlan:
        return LayerPlan(self.mask, self.geometry, dict.fromkeys(("fprop", "dgrad", "wgrad"), config), unit)


def layer(
    images=5, inputs=6, outputs=20, hw=(5, 6), kernel=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1),
    density=0.2, dtype=torch.float32,
) -> Layer:  # fmt: skip
    mask = torch.rand(outputs, inputs, *kernel) < density
    if 0 < density < 1 and outputs > 4:
        mask[2] = False
        mask[:, 1 % inputs] = False
    w = (torch.randn(mask.shape) * mask).to(dtype)
    x = torch.randn(images, inputs, *hw).to(dtype)
    b = torch.randn(outputs)
    xd, wd = x.double().requires_grad_(), w.double().requires_grad_()
    y = F.conv2d(xd, wd, b.double(), stride, padding, dilation)
    g = torch.randn(y.shape).to(dtype)
    y.backward(g.double())
    op = "pointwise" if kernel == (1, 1) else "conv"
    geometry = Geometry(op, kernel, stride, padding, dilation)
    return Layer(mask, geometry, w, x, b, g, y.detach(), xd.grad, wd.grad)


def chwn(x: Tensor) -> Tensor:
    """`[N, C, H, W]` to `[C, H, W, N]`, the slow way."""
    return x.permute(1, 2, 3, 0).contiguous()


def nchw(x: Tensor) -> Tensor:
    """`[C, H, W, N]` to `[N, C, H, W]`, the slow way."""
    return x.permute(3, 0, 1, 2)


def error(got: Tensor, want: Tensor) -> float:
    """||got - want|| / ||want||; NaN counts as infinite."""
    assert got.shape == want.shape
    difference = (got.double() - want).norm() / want.norm().clamp_min(1e-30)
    return float("inf") if difference.isnan() else difference.item()
