"""Compaction: gather the live input channels, run the vendor's dense kernel, scatter into the live output channels."""

import torch
from torch import Tensor

from sparsefx.kernels.reference import DENSE
from sparsefx.kernels.spec import ConvSpec, is_channels_last


def live_channels(mask: Tensor, transposed: bool) -> tuple[Tensor, Tensor]:
    """Channels that have a weight.

    Args:
        mask: Bool, `[O, I, *taps]`, or `[I, O, *taps]` where `transposed`.
    Returns:
        Indices of live input channels and live output channels, int64.
    """
    by_first = mask.flatten(1).any(1).nonzero().squeeze(1)
    by_second = mask.transpose(0, 1).flatten(1).any(1).nonzero().squeeze(1)
    return (by_first, by_second) if transposed else (by_second, by_first)


class Compaction:
    """The compaction backend for one mask; only for `groups == 1`."""

    name = "compaction"

    def __init__(self, mask: Tensor, spec: ConvSpec | None) -> None:
        transposed = spec is not None and spec.transposed
        # An empty mask keeps channel 0, whose weights are zero: the vendor's kernels take no tensor without channels.
        first = torch.zeros(1, dtype=torch.long, device=mask.device)
        self.live_in, self.live_out = (live if len(live) else first for live in live_channels(mask, transposed))
        channels = mask.shape[:2] if transposed else (mask.shape[1], mask.shape[0])
        self.all_in, self.all_out = len(self.live_in) == channels[0], len(self.live_out) == channels[1]
        self.out_channels = channels[1]
        self.rows, self.columns = (self.live_in, self.live_out) if transposed else (self.live_out, self.live_in)
        self.small_mask = self._small(mask)

    def _small(self, weight: Tensor) -> Tensor:
        return weight.index_select(0, self.rows).index_select(1, self.columns)

    def _inputs(self, x: Tensor, spec: ConvSpec | None) -> Tensor:
        return x if self.all_in else x.index_select(_channel_dim(x, spec), self.live_in)

    def _outputs(self, y: Tensor, spec: ConvSpec | None) -> Tensor:
        return y if self.all_out else y.index_select(_channel_dim(y, spec), self.live_out)

    def fprop(self, spec: ConvSpec | None, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Output of the layer; a dead output channel holds its bias."""
        small_bias = bias if bias is None or self.all_out else bias[self.live_out]
        small = DENSE.fprop(spec, self._inputs(x, spec), self._small(weight), small_bias)
        if self.all_out:
            return small
        dim = _channel_dim(small, spec)
        out = _empty(small, dim, self.out_channels, x)
        if bias is None:
            out.zero_()
        else:
            out.copy_(bias.view(-1, *[1] * (out.dim() - 1 - dim)).expand_as(out))
        return out.index_copy_(dim, self.live_out, small)

    def dgrad(self, spec: ConvSpec | None, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """Gradient of the input; zero at channels that no weight reads."""
        small = DENSE.dgrad(spec, self._outputs(grad, spec), self._inputs(x, spec), self._small(weight))
        if self.all_in:
            return small
        dim = _channel_dim(x, spec)
        return _empty(small, dim, x.shape[dim], x).zero_().index_copy_(dim, self.live_in, small)

    def wgrad(self, spec: ConvSpec | None, grad: Tensor, x: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
        """Gradient of the existing weights, zero at the missing ones."""
        small_weight = self._small(weight)
        small = DENSE.dense_wgrad(spec, self._outputs(grad, spec), self._inputs(x, spec), small_weight)
        out = torch.zeros_like(weight)
        columns = torch.zeros_like(weight.index_select(0, self.rows))
        columns.index_copy_(1, self.columns, small * self.small_mask)
        return out.index_copy_(0, self.rows, columns)


def _channel_dim(x: Tensor, spec: ConvSpec | None) -> int:
    return x.dim() - 1 if spec is None else 1


def _empty(small: Tensor, dim: int, channels: int, like: Tensor) -> Tensor:
    """An empty tensor as `small` but for its channels, in the memory format of `like`."""
    out = small.new_empty([*small.shape[:dim], channels, *small.shape[dim + 1 :]])
    return out.contiguous(memory_format=torch.channels_last) if is_channels_last(like) else out
