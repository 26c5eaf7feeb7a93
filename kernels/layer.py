"""A layer as the benchmarks describe it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsefx.kernels.spec import ConvSpec


@dataclass(frozen=True)
class Layer:
    """A convolution `out x inputs x kernel x kernel` on `size x size` maps, or a linear layer where `size` is 0.

    Attributes:
        density: Of a random mask, where the benchmark does not draw its own.
    """

    name: str
    out: int
    inputs: int
    kernel: int
    size: int
    batch: int
    stride: int = 1
    density: float = 0.05

    @property
    def spec(self) -> ConvSpec | None:
        """Geometry as the operators take it, padded to keep the size at stride 1; None for a linear layer."""
        if not self.size:
            return None
        return ConvSpec([self.stride] * 2, [self.kernel // 2] * 2, [1, 1], False, [0, 0], 1)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return (self.out, self.inputs, self.kernel, self.kernel) if self.size else (self.out, self.inputs)

    @property
    def hw(self) -> tuple[int, int]:
        """Height and width of the maps."""
        return (self.size or 1, self.size or 1)

    @property
    def text(self) -> str:
        """Weight, maps, batch and stride."""
        weight = "x".join(map(str, self.shape))
        maps = f" on {self.size}x{self.size}" if self.size else ""
        return f"{weight}{maps} b{self.batch}" + (f" /{self.stride}" if self.stride > 1 else "")


def random_mask(
    layer: Layer, rows: int = 1, density: float | None = None, device: torch.device | str = "cpu"
) -> Tensor:
    """A mask of the weight's shape, of columns of `rows` output channels; the layer's density where none is given."""
    wanted = layer.density if density is None else density
    columns = torch.rand(-(-layer.out // rows), layer.inputs * layer.kernel**2, device=device) < wanted
    return columns.repeat_interleave(rows, 0)[: layer.out].reshape(layer.shape)
