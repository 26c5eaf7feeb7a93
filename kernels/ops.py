"""The `torch.library` operators, opaque to torch.compile, and the eager path beside them.

`sparsefx::conv` and `sparsefx::linear` and their backward operators are what a compiled graph holds; eager calls run
the same `Runtime` through an autograd function, which costs less per call.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsefx.kernels.reference import DENSE
from sparsefx.kernels.runtime import Backend, Runtime
from sparsefx.kernels.spec import ConvSpec, Prologue, channels, is_channels_last

# What an operator runs changes with the mask and the window, so that Inductor must not freeze it in a CUDA graph.
_TAGS = (torch.Tag.cudagraph_unsafe,)


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor,
    handle: int,
    spec: ConvSpec,
    prologue: Prologue | None = None,
    centred: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """Convolution with a masked weight.

    Args:
        x: `[N, I, *space]`, blocked, `[ceil(images / 16), I, H, W, 16]`, or `[I, H, W, images]`.
        weight: `[O, I / groups, *taps]`, zero where `mask` is False; `[I, O / groups, *taps]` where transposed.
        bias: `[O]` or None.
        mask: Bool, of the weight's shape.
        handle: Of the layer's `Runtime`.
        spec: Geometry, and whether activations are batch-innermost.
        prologue: What is done to blocked `x` first; the gradient of `x` is that of its result. Not in a compiled graph.
        centred: Whether the output's gradient sums to zero in each channel, so that the bias's is zero.
        residual: Added to blocked outputs.
    Returns:
        `[N, O, *space]`, laid out like `x`. The weight's gradient is zero where the mask is False.
    """
    if torch.compiler.is_compiling():
        out = torch.ops.sparsefx.conv(x, weight, bias, mask, handle, *spec)
        return out if residual is None else out.add_(residual)
    return _Eager.apply(x, weight, bias, mask, handle, spec, prologue, centred, residual, None)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor, handle: int, only: Backend | None = None
) -> Tensor:
    """Linear layer with a masked weight `[O, I]`: `[..., I]` to `[..., O]`.

    Args:
        only: The backend of every pass, whatever the layer's choice. Not in a compiled graph.
    """
    if torch.compiler.is_compiling():
        return torch.ops.sparsefx.linear(x, weight, bias, mask, handle)
    return _Eager.apply(x, weight, bias, mask, handle, None, None, False, None, only)


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor, handle: int) -> Tensor:
    """`linear` with dense kernels in every pass; not in a compiled graph."""
    return _DenseLinear.apply(x, weight, bias, mask, handle)


class _Eager(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        mask: Tensor,
        handle: int,
        spec: ConvSpec | None,
        prologue: Prologue | None,
        centred: bool,
        residual: Tensor | None,
        only: Backend | None,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mask)
        ctx.only = only
        ctx.runtime, ctx.spec, ctx.prologue, ctx.centred = Runtime.of(handle), spec, prologue, centred
        ctx.added = None if residual is None else residual.dtype
        out = ctx.runtime.fprop(spec, x, weight, bias, mask, prologue, residual, only)
        ctx.carried, ctx.runtime.carried = ctx.runtime.carried, None
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, mask = ctx.saved_tensors
        wanted = list(ctx.needs_input_grad[:3])
        more = ctx.prologue, ctx.centred, ctx.carried, ctx.only
        grads = ctx.runtime.backward(ctx.spec, grad, x, weight, mask, wanted, *more)
        return *grads, *[None] * 5, None if ctx.added is None else grad.to(ctx.added), None


class _DenseLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor, handle: int) -> Tensor:
        ctx.save_for_backward(x, weight, mask)
        ctx.handle = handle
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, mask = ctx.saved_tensors
        wanted = list(ctx.needs_input_grad[:3])
        grads = Runtime.of(ctx.handle).backward(None, grad, x, weight, mask, wanted, only=DENSE)
        return *grads, None, None


def _strided(out: Tensor, like: Tensor) -> Tensor:
    """`out` laid out as the fake implementation promises: like `like` in memory format."""
    return out.contiguous(memory_format=torch.channels_last if is_channels_last(like) else torch.contiguous_format)


def _empty_unless(tensor: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if tensor is None else tensor


def _opaque_backward(handle: int, *args: Any) -> tuple[Tensor | None, ...]:
    """Backward inside a compiled graph, which may add to the weight gradient in place without a trace."""
    runtime = Runtime.of(handle)
    with torch.no_grad():
        grads = runtime.backward(*args)
    runtime.masked = None
    return grads


@torch.library.custom_op("sparsefx::conv", mutates_args=(), tags=_TAGS)
def _conv_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor,
    handle: int,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
    images: int,
) -> Tensor:
    spec = ConvSpec(stride, padding, dilation, transposed, output_padding, groups, images)
    return _strided(Runtime.of(handle).fprop(spec, x, weight, bias, mask), x)


@_conv_op.register_fake
def _(x, weight, bias, mask, handle, *args):
    spec = ConvSpec(*args)
    if spec.images:
        return x.new_empty(spec.innermost(x, weight))
    out = torch.ops.aten.convolution(x, weight, bias, *spec.geometry)
    return _strided(torch.empty_like(out, memory_format=torch.contiguous_format), x)


@torch.library.custom_op("sparsefx::conv_backward", mutates_args=(), tags=_TAGS)
def _conv_backward_op(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    handle: int,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
    images: int,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    spec = ConvSpec(stride, padding, dilation, transposed, output_padding, groups, images)
    for_input, for_weight, for_bias = _opaque_backward(handle, spec, grad, x, weight, mask, wanted)
    return (
        _empty_unless(for_input if for_input is None else _strided(for_input, x), x),
        _empty_unless(for_weight if for_weight is None else _strided(for_weight, weight), weight),
        _empty_unless(for_bias, grad),
    )


@_conv_backward_op.register_fake
def _(grad, x, weight, mask, handle, *args):
    *geometry, wanted = args
    spec = ConvSpec(*geometry)
    return (
        _strided(torch.empty_like(x, memory_format=torch.contiguous_format), x) if wanted[0] else x.new_empty(0),
        _strided(torch.empty_like(weight, memory_format=torch.contiguous_format), weight)
        if wanted[1]
        else weight.new_empty(0),
        grad.new_empty(channels(grad, spec)) if wanted[2] else grad.new_empty(0),
    )


@torch.library.custom_op("sparsefx::linear", mutates_args=(), tags=_TAGS)
def _linear_op(x: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor, handle: int) -> Tensor:
    return Runtime.of(handle).fprop(None, x, weight, bias, mask).contiguous()


@_linear_op.register_fake
def _(x, weight, bias, mask, handle):
    return torch.empty_like(F.linear(x, weight, bias), memory_format=torch.contiguous_format)


@torch.library.custom_op("sparsefx::linear_backward", mutates_args=(), tags=_TAGS)
def _linear_backward_op(
    grad: Tensor, x: Tensor, weight: Tensor, mask: Tensor, handle: int, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    for_input, for_weight, for_bias = _opaque_backward(handle, None, grad, x, weight, mask, wanted)
    return (
        _empty_unless(for_input if for_input is None else for_input.contiguous(), x),
        _empty_unless(for_weight if for_weight is None else for_weight.contiguous(), weight),
        _empty_unless(for_bias, grad),
    )


@_linear_backward_op.register_fake
def _(grad, x, weight, mask, handle, wanted):
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format) if wanted[0] else x.new_empty(0),
        torch.empty_like(weight, memory_format=torch.contiguous_format) if wanted[1] else weight.new_empty(0),
        grad.new_empty(grad.shape[-1]) if wanted[2] else grad.new_empty(0),
    )


def _keep(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, _, mask, ctx.handle, *ctx.spec = inputs
    ctx.save_for_backward(x, weight, mask)


def _backward(ctx: Any, grad: Tensor) -> tuple:
    x, weight, mask = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[:3])
    operator = torch.ops.sparsefx.conv_backward if ctx.spec else torch.ops.sparsefx.linear_backward
    grads = operator(grad, x, weight, mask, ctx.handle, *ctx.spec, wanted)
    kept = [g if want else None for g, want in zip(grads, wanted, strict=True)]
    return (*kept, None, None, *[None] * len(ctx.spec))


def _no_double_backward(ctx: Any, *_: Tensor) -> tuple:
    raise RuntimeError(
        f"{Runtime.of(ctx.handle).name}: expected one backward, got a double backward through a compiled sparse layer; "
        "run the model eagerly for that"
    )


def _keep_handle(ctx: Any, inputs: tuple, output: Any) -> None:
    ctx.handle = inputs[4]


_conv_op.register_autograd(_backward, setup_context=_keep)
_linear_op.register_autograd(_backward, setup_context=_keep)
_conv_backward_op.register_autograd(_no_double_backward, setup_context=_keep_handle)
_linear_backward_op.register_autograd(_no_double_backward, setup_context=_keep_handle)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    castable = isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64
    return value.to(dtype) if castable else value


def _register_autocast(name: str, device: str, key: str) -> None:
    """Make an operator compute in the type that autocast asks for; `register_autocast` has one type for all."""
    operator = getattr(torch.ops.sparsefx, name).default
    autocast = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
        torch._C.DispatchKey.AutocastCUDA
    )

    def kernel(_: Any, *args: Any) -> Any:
        dtype = torch.get_autocast_dtype(device)
        with torch._C._ExcludeDispatchKeyGuard(autocast):
            return operator(*(_cast(arg, dtype) for arg in args))

    _LIBRARY.impl(name, kernel, key, with_keyset=True)


_LIBRARY = torch.library.Library("sparsefx", "FRAGMENT")
for _name in ("conv", "linear"):
    _register_autocast(_name, "cpu", "AutocastCPU")
    _register_autocast(_name, "cuda", "AutocastCUDA")
