"""How the weights of a Conv or Linear layer connect its channels."""

from functools import cached_property

import torch
from torch import Tensor, nn

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)
LINEARS = (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear)
Layer = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d


class Links:
    """The connections of one layer, in eval mode; everything is on the CPU.

    Attributes:
        groups: Number of groups G.
        ins, outs: Numbers of channels I and O.
        transposed: The weight is `[I, O/G, ...]`.
        uniform: A constant input channel adds the same amount everywhere: there is no border of zeros where it is
            missing, and no stride of a transposed convolution.
    """

    def __init__(self, layer: Layer) -> None:
        self._weight = layer.weight.detach()
        self._bias = None if layer.bias is None else layer.bias.detach()
        self.transposed = isinstance(layer, TRANSPOSED)
        if isinstance(layer, nn.Linear):
            self.groups, self.ins, self.outs, self.uniform = 1, layer.in_features, layer.out_features, True
        else:
            self.groups, self.ins, self.outs = layer.groups, layer.in_channels, layer.out_channels
            borders = layer.padding_mode == "zeros" and any(layer._reversed_padding_repeated_twice)
            self.uniform = not self.transposed and not borders

    @cached_property
    def reads(self) -> Tensor:
        """Bool `[G, O/G, I/G]`: a weight connects this output channel with this input channel."""
        exists = self._weight != 0
        return self._matrix(exists.flatten(2).any(2) if exists.dim() > 2 else exists)

    def folds(self, const: Tensor) -> Tensor:
        """Return which input channels, constant or NaN, `[I]`, are exactly an amount added to the bias; bool `[I]`."""
        return const.eq(0) | (const.isfinite() & self.uniform)

    @property
    def bias(self) -> Tensor:
        """Float64 `[O]`, zero where the layer has none."""
        if self._bias is None:
            return torch.zeros(self.outs, dtype=torch.float64)
        return self._bias.cpu().double()

    def amount(self, const: Tensor) -> Tensor:
        """Return what constant input channels, `[I]`, add to each output channel, `[O]` float64, away from borders."""
        const = const.view(self.groups, -1)
        live = const.ne(0).any(0)
        if not live.any():
            return torch.zeros(self.outs, dtype=torch.float64)
        columns = self._columns(live.nonzero().flatten())
        return (columns @ const[:, live, None]).flatten()

    def _columns(self, index: Tensor) -> Tensor:
        """The weights of some input channels of every group, summed over taps: `[G, O/G, len(index)]`, float64."""
        weight, index = self._weight, index.to(self._weight.device)
        grouped = weight.unflatten(0, (self.groups, -1))
        weight = (grouped[:, index] if self.transposed else grouped[:, :, index]).flatten(0, 1).cpu().double()
        return self._matrix(weight.flatten(2).sum(2) if weight.dim() > 2 else weight)

    def _matrix(self, weight: Tensor) -> Tensor:
        """`[O, i]`, or `[i * G, O/G]` of a transposed layer, as `[G, O/G, i]` on the CPU."""
        weight = weight.cpu().unflatten(0, (self.groups, -1))
        return weight.transpose(1, 2) if self.transposed else weight
