"""BatchNorm on blocked activations, as an autograd function that may hand on what is read beside it.

A tensor with two readers has two gradients to be summed. Where one reader is the norm, or both read its result, each
reader gets a tensor of its own, and the norm's backward pass sums the gradients as it reads and writes them.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsefx.kernels.blocked import enter, leave
from sparsefx.kernels.cpu import norm as kernel
from sparsefx.kernels.spec import Prologue


class Forks(NamedTuple):
    """Which of a norm's tensors, its input and its output, come out once more for another reader."""

    input: bool = False
    output: bool = False


class Normalized(NamedTuple):
    """What a norm gives; statistics are `[C]` and carry no gradient.

    Attributes:
        y: The output, or what stands for it.
        mean, var, rstd: That it used; the variance is biased.
        forks: Those asked for, of the same memory as the input and `y`.
    """

    y: Tensor
    mean: Tensor
    var: Tensor
    rstd: Tensor
    forks: tuple[Tensor, ...]


NO_FORKS = Forks()


def batch_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    *,
    training: bool,
    eps: float,
    images: int,
    relu: bool,
    factor: float | None = None,
    forks: Forks = NO_FORKS,
) -> Normalized:
    """Normalize, add `residual`, clamp at zero where `relu`.

    Args:
        x, residual: Blocked, of `images` images.
        weight, bias: `[C]` fp32 or None.
        mean, var: Running statistics, `[C]` fp32, to use outside of training.
        factor: Share of this batch in the running statistics, which training moves; None leaves them. Not in a compiled
            graph.
        forks: Not in a compiled graph.
    """
    given = x, residual, weight, bias, mean, var
    y, used_mean, used_var, rstd, *forked = _Norm.apply(*given, training, eps, images, relu, factor, True, *forks)
    return Normalized(y, used_mean, used_var, rstd, tuple(forked))


def batch_norm_unwritten(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    *,
    training: bool,
    eps: float,
    images: int,
    relu: bool,
    factor: float | None = None,
    forks: Forks = NO_FORKS,
) -> tuple[Normalized, Prologue]:
    """`batch_norm` whose output nobody writes: convolutions and max poolings compute it as they read.

    Returns:
        The output stands for the result in the graph of gradients and holds `x`; and what its readers do to it.
    """
    given = x, None, weight, bias, mean, var
    out = _Norm.apply(*given, training, eps, images, relu, factor, False, *forks)
    stands, used_mean, used_var, rstd, scale, shift, *forked = out
    found = Normalized(stands, used_mean, used_var, rstd, tuple(forked))
    return found, Prologue(used_mean, scale, shift, relu)


def prepared(x: Tensor, prologue: Prologue, images: int) -> Tensor:
    """What a prologue makes of `x`, for a reader that does not do it itself."""
    return _Prepared.apply(x, prologue, images)


class _Prepared(torch.autograd.Function):
    """An input with a prologue stands for the result, so that the gradient passes as it is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, prologue: Prologue, images: int) -> Tensor:
        return kernel.apply_prologue(x, prologue, images)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad, None, None


def _alias(x: Tensor) -> Tensor:
    """A tensor of the same memory, but no view: autograd refuses some views as outputs."""
    storage = x.untyped_storage()
    return torch.empty(0, dtype=x.dtype).set_(storage, x.storage_offset(), x.shape, x.stride())  # pyright: ignore[reportCallIssue]


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor | None,
        var: Tensor | None,
        training: bool,
        eps: float,
        images: int,
        relu: bool,
        factor: float | None,
        write: bool,
        fork_input: bool,
        fork_output: bool,
    ) -> tuple[Tensor, ...]:
        more: tuple[Tensor, ...] = ()
        if torch.compiler.is_compiling():
            y, used_mean, used_var, rstd = torch.ops.sparsefx.blocked_norm(
                x, residual, weight, bias, mean, var, training, eps, images, relu
            )
        else:
            x = x.contiguous()
            options = {"training": training, "eps": eps, "images": images, "relu": relu}
            found = _forward(x, residual, weight, bias, mean, var, **options, factor=factor, write=write)
            used_mean, used_var, rstd, prologue = found.mean, found.var, found.rstd, found.prologue
            y = _alias(x) if found.y is None else found.y
            if prologue is not None:
                more = prologue.scale, prologue.shift
        # Without a residual backward finds the sign behind the ReLU in x, and y need not be kept.
        kept = y if relu and residual is not None else None
        ctx.save_for_backward(x, kept, weight, bias, used_mean, used_var, rstd)
        ctx.options = training, eps, images, relu, residual is not None
        more = used_mean, used_var, rstd, *more
        ctx.mark_non_differentiable(*more)
        ctx.forks, ctx.first_fork = (fork_input, fork_output), len(more)
        if not (fork_input or fork_output):
            return y, *more
        ctx.set_materialize_grads(False)
        forked = [_alias(t) for t, wanted in ((x, fork_input), (y, fork_output)) if wanted]
        return y, *more, *forked

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *more: Tensor | None) -> tuple:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, y, weight, bias, mean, var, rstd = ctx.saved_tensors
        training, _, images, relu, added = ctx.options
        skip = more[ctx.first_fork] if ctx.forks[0] else None
        other = more[-1] if ctx.forks[1] else None
        grad, other = (other, None) if grad is None else (grad, other)
        if grad is None:  # nobody has read the output
            return skip, *[None] * 13
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            grad = grad if other is None else grad + other
            given = x, y, weight, bias, mean, var
            for_x, *rest = _differentiable(ctx.needs_input_grad, grad, given, ctx.options)
            return for_x if skip is None or for_x is None else for_x + skip, *rest, *[None] * 10
        run = torch.ops.sparsefx.blocked_norm_backward if torch.compiler.is_compiling() else _norm_backward
        dx, dweight, dbias, dresidual = run(
            grad, x, y, weight, bias, mean, rstd, training, images, relu, added, other, skip
        )
        return (
            dx,
            dresidual if added else None,
            None if weight is None else dweight,
            None if bias is None else dbias,
            *[None] * 10,
        )


def _differentiable(wanted: tuple, grad: Tensor, given: tuple, options: tuple) -> tuple:
    """The gradients as torch's own differentiable operators, for a double backward."""
    x, y, weight, bias, mean, var = given
    training, eps, images, relu, added = options
    stats = (None, None) if training else (mean, var)
    normalized = F.batch_norm(leave(x, images, False), *stats, weight, bias, training, 0.0, eps)
    through = leave(grad, images, False)
    if relu:
        through = through * ((normalized.detach() if y is None else leave(y, images, False)) > 0)
    inputs = [t if want else None for t, want in zip((x, weight, bias), wanted[:1] + wanted[2:4], strict=True)]
    present = [t for t in inputs if t is not None]
    found = iter(torch.autograd.grad(normalized, present, through, create_graph=True) if present else ())
    for_x, for_weight, for_bias = (None if t is None else next(found) for t in inputs)
    return for_x, enter(through) if added and wanted[1] else None, for_weight, for_bias


def _forward(x: Tensor, residual: Tensor | None, *of: Tensor | None, **options: Any) -> kernel.Normalized:
    """The kernel; `of` are weight, bias and running statistics."""
    added = None if residual is None else residual.contiguous()
    return kernel.batch_norm_forward(x.contiguous(), *of, residual=added, **options)


def _norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    training: bool,
    eps: float,
    images: int,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    options = {"training": training, "eps": eps, "images": images, "relu": relu}
    out = _forward(x, residual, weight, bias, mean, var, **options)
    assert out.y is not None
    return out.y, out.mean, out.var, out.rstd


def _norm_backward(
    grad: Tensor,
    x: Tensor,
    y: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    training: bool,
    images: int,
    relu: bool,
    residual: bool,
    grad2: Tensor | None,
    skip: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    found = kernel.batch_norm_backward(
        grad.contiguous(),
        x.contiguous(),
        y,
        weight,
        bias,
        mean,
        rstd,
        training=training,
        images=images,
        relu=relu,
        residual=residual,
        grad2=None if grad2 is None else grad2.contiguous(),
        skip=None if skip is None else skip.contiguous(),
    )
    return found.dx, found.dweight, found.dbias, x.new_empty(0) if found.dresidual is None else found.dresidual


_norm_op = torch.library.custom_op("sparsefx::blocked_norm", _norm, mutates_args=())
_norm_backward_op = torch.library.custom_op("sparsefx::blocked_norm_backward", _norm_backward, mutates_args=())


@_norm_op.register_fake
def _(x, residual, weight, bias, mean, var, training, eps, images, relu):
    channels = [x.new_empty(x.shape[1], dtype=torch.float32) for _ in range(3)]
    return (x.new_empty(x.shape), *channels)


@_norm_backward_op.register_fake
def _(grad, x, y, weight, bias, mean, rstd, training, images, relu, residual, grad2, skip):
    channels = [x.new_empty(x.shape[1], dtype=torch.float32) for _ in range(2)]
    return (x.new_empty(x.shape), *channels, x.new_empty(x.shape if residual else 0))
