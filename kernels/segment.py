"""Segments under autograd: one function for many layers."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sparsefx.kernels.cpu.abi import empty, empty_weight
from sparsefx.kernels.cpu.calls import Calls
from sparsefx.kernels.cpu.segment import Parameter, Segment
from sparsefx.kernels.runtime import Runtime

Again = Callable[..., Sequence[Tensor]]
"""Computes a segment's outputs from its inputs, layer by layer, under autograd, and changes nothing."""


class Step:
    """One run of a segment.

    Args:
        parameters: Tensors that stand for the segment's now.
        weights: The runtimes of those that are sparse layers' weights.
        again: For a double backward.
    """

    def __init__(
        self, segment: Segment, parameters: Sequence[Tensor], weights: dict[Parameter, Runtime], again: Again
    ) -> None:
        self.segment, self.parameters, self.weights, self.again = segment, parameters, weights, again
        self.collecting = [p for p, runtime in weights.items() if runtime.collecting and p.wants]

    @property
    def learned(self) -> list[Tensor]:
        """The parameters whose gradients are wanted."""
        return [self.parameters[i] for i in self.segment.learned]

    def run(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """The segment's outputs for fp32 inputs."""
        learned = self.learned
        if learned or any(value.wants for value in self.segment.inputs):
            return _Run.apply(self, len(inputs), *inputs, *learned)
        return self.forward(inputs)[0]

    def forward(self, inputs: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], Tensor]:
        """The outputs, and the memory that holds what backward reads."""
        library, calls = self.segment.library, self.segment.forward
        outputs = tuple([empty(library, value.shape, torch.float32) for value in self.segment.outputs])
        arena = _arena(calls)
        calls.run(arena.data_ptr(), _addresses(*inputs, *outputs, *self.parameters))
        return outputs, arena

    def backward(
        self, arena: Tensor, inputs: Sequence[Tensor], outputs: Sequence[Tensor | None], grads: Sequence[Tensor]
    ) -> list[Tensor | None]:
        """Gradients of the inputs and of what is learned; outputs that it does not read may be None."""
        segment = self.segment
        backward = segment.backward(self.collecting)
        found = list(grads)
        for shape, last in backward.made:
            found.append(empty_weight(segment.library, shape, torch.float32, channels_last=last))
        own = _arena(backward.calls)
        given = _addresses(*inputs, *outputs, *self.parameters, *found)
        backward.calls.run(own.data_ptr(), given, arena.data_ptr())
        for at in backward.zeros:
            found[at].zero_()
        for parameter, runtime in self.weights.items():
            if parameter in backward.dense_of:
                runtime.stage(found[backward.dense_of[parameter]])
            if parameter in backward.masked:
                runtime.returns(found[backward.masked[parameter]])
        return [None if at is None else found[at] for at in backward.returned]


def _arena(calls: Calls) -> Tensor:
    """Memory for what calls keep: bytes, so that hooks of saved tensors that round numbers leave it alone."""
    return empty(calls.library, (calls.arena,), torch.uint8)


def _addresses(*tensors: Tensor | None) -> list[int]:
    return [0 if t is None else t.data_ptr() for t in tensors]


class _Run(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, step: Step, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        inputs = tensors[:count]
        outputs, arena = step.forward(inputs)
        ctx.step, ctx.count = step, count
        read = [t if reads else None for t, reads in zip(outputs, step.segment.read, strict=True)]
        ctx.save_for_backward(arena, *tensors, *read)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        step: Step = ctx.step
        arena, *tensors = ctx.saved_tensors
        inputs, outputs = tensors[: ctx.count], tensors[len(tensors) - len(grads) :]
        if torch.is_grad_enabled():
            found = _differentiable(step, inputs, step.learned, grads, ctx.needs_input_grad[2:])
        else:
            found = step.backward(arena, inputs, outputs, [g.contiguous() for g in grads])
        return None, None, *found


def _differentiable(
    step: Step, inputs: Sequence[Tensor], learned: Sequence[Tensor], grads: Sequence[Tensor], wanted: Sequence[bool]
) -> list[Tensor | None]:
    """The gradients as those of the layers one by one, for a double backward."""
    reached = [(out, grad) for out, grad in zip(step.again(*inputs), grads, strict=True) if out.requires_grad]
    of = [t for t, want in zip((*inputs, *learned), wanted, strict=True) if want]
    outputs, through = [out for out, _ in reached], [grad for _, grad in reached]
    found = iter(torch.autograd.grad(outputs, of, through, create_graph=True, allow_unused=True))
    return [next(found) if want else None for want in wanted]
