"""What a region of the layout pass runs: layers and functions on batch-innermost activations.

On the CPU they are `[ceil(N / 16), C, H, W, 16]`, on CUDA `[C, H, W, N]`. Each function takes the number N of images
where it needs it; lanes beyond them are zero and stay so.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsefx.kernels import blocked as kernels
from sparsefx.kernels import norm, ops
from sparsefx.kernels.cpu.abi import BLOCK
from sparsefx.kernels.cpu.layout import as_channels_last, from_channels_last
from sparsefx.kernels.spec import ConvSpec, Prologue
from sparsefx.layers import SparseConv2d

enter = kernels.enter
leave = kernels.leave


class Prepared(NamedTuple):
    """Activations of so many images, and what is done to them as they are read; the gradient is that of the result."""

    x: Tensor
    prologue: Prologue | None
    images: int

    def written(self) -> Tensor:
        """The result."""
        return self.x if self.prologue is None else norm.prepared(self.x, self.prologue, self.images)


def conv(
    layer: SparseConv2d,
    x: Tensor | Prepared,
    images: int,
    residual: Tensor | None = None,
    relu: bool = False,
    centred: bool = False,
) -> Tensor:
    """The layer on blocked activations, then `+ residual`, then a ReLU.

    Args:
        centred: Whether only a BatchNorm of batch statistics reads the output. The gradient that it passes on sums to
            zero in each channel, and the bias's need not be summed.
    """
    given = x if isinstance(x, Prepared) else Prepared(x, None, images)
    x, weight, bias = layer._operands(given.x)
    _, padding = layer._pad(x)
    spec = ConvSpec(list(layer.stride), padding, list(layer.dilation), False, [0, 0], layer.groups, images)
    prologue = given.prologue
    if prologue is not None and x.dtype != given.x.dtype:  # autocast rounds what is read, not what that is made of
        x, prologue = given.written().to(x.dtype), None
    out = ops.conv(x, weight, bias, layer.weight_mask, layer.handle, spec, prologue, centred, residual)
    return torch.relu_(out) if relu else out


def batch_norm(
    layer: nn.BatchNorm2d,
    x: Tensor,
    images: int,
    residual: Tensor | None = None,
    relu: bool = False,
    forks: norm.Forks = norm.NO_FORKS,
) -> Any:
    """The layer, then `+ residual`, then a ReLU; running statistics as torch keeps them.

    Args:
        forks: The input, the result, or both once more, for another reader; the result is then a tuple.
    """
    if x.dim() == 4:
        c, h, w, n = x.shape
        out = nn.BatchNorm2d.forward(layer, x.reshape(1, c, h * w, n)).view(x.shape)
        out = out if residual is None else out.add_(residual)
        out = torch.relu_(out) if relu else out
        return _fork(out, x, forks)
    forked = _forked(forks)
    if torch.compiler.is_compiling():
        found = norm.batch_norm(x, residual, *_of(layer), **_options(layer), images=images, relu=relu)
        _track(layer, found, images * x.shape[2] * x.shape[3])
    else:
        found = norm.batch_norm(
            x, residual, *_of(layer), **_options(layer), images=images, relu=relu, factor=_factor(layer), forks=forked
        )
    if any(forked):
        return found.y, *found.forks
    return _fork(found.y, x, forks)


def prepare(
    layer: nn.BatchNorm2d, x: Tensor, images: int, relu: bool = False, forks: norm.Forks = norm.NO_FORKS
) -> Any:
    """`batch_norm` for convolutions and max poolings alone, which then normalize what they read.

    A compiled graph, and one on CUDA, writes the result.
    """
    if x.dim() == 4 or torch.compiler.is_compiling():
        out = Prepared(batch_norm(layer, x, images, relu=relu), None, images)
        return _fork(out, x, forks)
    forked = _forked(forks)
    found, prologue = norm.batch_norm_unwritten(
        x, *_of(layer), **_options(layer), images=images, relu=relu, factor=_factor(layer), forks=forked
    )
    out = Prepared(found.y, prologue, images)
    if not any(forked):
        return _fork(out, x, forks)
    more = (Prepared(found.forks[-1], prologue, images),) if forks.output else ()
    return out, *found.forks[: int(forks.input)], *more


def _forked(forks: norm.Forks) -> norm.Forks:
    """What the norm has to fork: where no backward pass sums gradients, any reader may have the tensor itself."""
    return forks if torch.is_grad_enabled() and not torch.compiler.is_compiling() else norm.NO_FORKS


def _fork(out: Any, x: Tensor, forks: norm.Forks) -> Any:
    """The result, with the tensors themselves for forks."""
    if not any(forks):
        return out
    return out, *(t for t, wanted in zip((x, out), forks, strict=True) if wanted)


def _of(layer: nn.BatchNorm2d) -> tuple[Tensor | None, ...]:
    return layer.weight, layer.bias, layer.running_mean, layer.running_var


def _options(layer: nn.BatchNorm2d) -> dict[str, Any]:
    return {"training": layer.training or layer.running_mean is None or layer.running_var is None, "eps": layer.eps}


def tracks(layer: nn.BatchNorm2d) -> bool:
    """Whether a pass moves the layer's running statistics."""
    known = layer.running_mean is not None and layer.running_var is not None
    return layer.training and layer.track_running_stats and known


def _factor(layer: nn.BatchNorm2d) -> float | None:
    """Share of this batch in the running statistics, None if these stay as they are; counts the batch."""
    if layer.training and layer.track_running_stats and layer.num_batches_tracked is not None:
        layer.num_batches_tracked.add_(1)
        if layer.momentum is None:
            return 1.0 / float(layer.num_batches_tracked) if tracks(layer) else None
    return (0.0 if layer.momentum is None else layer.momentum) if tracks(layer) else None


def _track(layer: nn.BatchNorm2d, found: norm.Normalized, count: int) -> None:
    """Move the running statistics towards those of a batch of `count` values a channel, in a compiled graph."""
    factor, running_mean, running_var = _factor(layer), layer.running_mean, layer.running_var
    if factor is not None and running_mean is not None and running_var is not None:
        with torch.no_grad():
            running_mean.lerp_(found.mean, factor)
            running_var.lerp_(found.var * (count / (count - 1)), factor)


def max_pool2d(
    x: Tensor | Prepared,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
) -> Tensor:
    """`torch.nn.functional.max_pool2d`."""
    given = x if isinstance(x, Prepared) else Prepared(x, None, 0)
    geometry = _geometry(given.x.shape, kernel_size, stride, padding, dilation, ceil_mode)
    if geometry is None:
        return pool(F.max_pool2d, given.written(), kernel_size, stride, padding, dilation, ceil_mode)
    return kernels.max_pool(given.x, geometry, given.images or None, given.prologue)


def max_pool(layer: nn.MaxPool2d, x: Tensor | Prepared) -> Tensor:
    """The layer on blocked activations."""
    return max_pool2d(x, *_window(layer))


def pooling(layer: nn.MaxPool2d, shape: Sequence[int]) -> kernels.Pool | None:
    """The layer's geometry on activations of a shape, where the kernels have one."""
    return _geometry(shape, *_window(layer))


def _window(layer: nn.MaxPool2d) -> tuple[Any, ...]:
    return layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.ceil_mode


def _geometry(
    shape: Sequence[int], kernel_size: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool
) -> kernels.Pool | None:
    if len(shape) == 4:
        return None
    kernel, padded = _pair(kernel_size), _pair(padding)
    geometry = kernels.Pool((shape[2], shape[3]), kernel, _pair(stride) if stride else kernel, padded)
    fits = all(0 <= 2 * p <= k for k, p in zip(kernel, padded, strict=True)) and kernel[0] * kernel[1] <= 256
    return None if ceil_mode or _pair(dilation) != (1, 1) or not fits or min(geometry.out) < 1 else geometry


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


def pool(function: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """A pooling of torch's, natively on the channels_last view of the same memory."""
    if x.dim() == 4:
        return function(x.contiguous().permute(0, 3, 1, 2), *args, **kwargs).permute(0, 2, 3, 1).contiguous()
    return from_channels_last(function(as_channels_last(x.contiguous()), *args, **kwargs), x.shape[1])


def mean(x: Tensor) -> Tensor:
    """Mean over height and width, both 1 afterwards."""
    return x.mean((-3, -2), keepdim=True)


def cat(parts: list[Tensor]) -> Tensor:
    """Concatenate channels."""
    return torch.cat(parts, -4)


def saturate(function: Callable[..., Tensor], x: Tensor, images: int, *args: Any, **kwargs: Any) -> Tensor:
    """An elementwise function that maps zero to something else, with lanes beyond the images zero again."""
    out = function(x, *args, **kwargs)
    rest = images % BLOCK
    if rest == 0 or x.dim() == 4:
        return out
    exists = torch.ones(out.shape[0], 1, 1, 1, BLOCK, dtype=out.dtype)
    exists[-1, ..., rest:] = 0
    return out * exists


def dropout(function: Callable[..., Tensor], x: Tensor, images: int, *args: Any, **kwargs: Any) -> Tensor:
    """A dropout of torch's, of the same elements as on `[N, C, H, W]`."""
    kept = function(x.new_ones((images, *x.shape[-4:-1])), *args, **kwargs)
    return x * enter(kept)


def size(x: Tensor, images: int, dim: int | None = None) -> Any:
    """`x.size()` or `x.size(dim)` of the activations as the model knows them."""
    shape = torch.Size((images, *x.shape[-4:-1]))
    return shape if dim is None else shape[dim]
