"""Segments under autograd: one function for many layers."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sparsefx.kernels.cpu.abi import empty, empty_weight
from sparsefx.kernels.cpu.calls import Buffer, Calls
from sparsefx.kernels.cpu.segment import Gradient, Parameter, Segment
from sparsefx.kernels.runtime import Runtime

Again = Callable[..., Sequence[Tensor]]
"""Computes a segment's outputs from its inputs, layer by layer, under autograd, and changes nothing."""


class Step:
    """One run of a segment.

    Args:
        parameters: With the tensors that stand for them now, in one order at each run.
        weights: The runtimes of those that are sparse layers' weights.
        again: For a double backward.
    """

    def __init__(
        self,
        segment: Segment,
        parameters: Sequence[tuple[Parameter, Tensor]],
        weights: dict[Parameter, Runtime],
        again: Again,
    ) -> None:
        self.segment, self.parameters, self.weights, self.again = segment, parameters, weights, again
        self.learned = [(p, t) for p, t in parameters if p.wants] if segment.grad else []
        self.collecting = frozenset(p for p, runtime in weights.items() if runtime.collecting and p.wants)

    def run(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The segment's outputs for fp32 inputs."""
        if self.learned or any(value.wants for value in self.segment.inputs):
            return _Run.apply(self, len(inputs), *inputs, *(t for _, t in self.learned))
        return self.forward(inputs)[0]

    def forward(self, inputs: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], Tensor]:
        """The outputs, and the memory that holds what backward reads."""
        segment = self.segment
        outputs = tuple(empty(segment.library, value.shape, torch.float32) for value in segment.outputs)
        arena = _arena(segment.forward)
        segment.forward.run(arena.data_ptr(), _addresses(segment.forward, self._given(inputs, outputs)))
        return outputs, arena

    def backward(
        self, arena: Tensor, inputs: Sequence[Tensor], outputs: Sequence[Tensor], grads: Sequence[Tensor]
    ) -> tuple[Tensor | None, ...]:
        """Gradients of the inputs and of what is learned."""
        segment = self.segment
        backward = segment.backward(self.collecting)
        given = self._given(inputs, outputs) | dict(zip(backward.grads, grads, strict=True))
        results = {}
        for parameter, gradient in backward.gradients.items():
            results[parameter] = self._made(parameter, gradient, given)
        for_inputs = []
        for value in segment.inputs:
            total = backward.total(value)
            if total is not None and total not in given:
                given[total] = empty(segment.library, value.shape, torch.float32)
            for_inputs.append(None if total is None else given[total])
        own = _arena(backward.calls)
        backward.calls.run(own.data_ptr(), _addresses(backward.calls, given), arena.data_ptr())
        for parameter, runtime in self.weights.items():
            if parameter not in results:
                continue
            gradient = backward.gradients[parameter]
            if gradient.dense is not None:
                runtime.stage(given[gradient.dense])
            runtime.returns(results[parameter])
        return *for_inputs, *(results.get(p) for p, _ in self.learned)

    def _given(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> dict[Buffer, Tensor]:
        given = {parameter.buffer: tensor for parameter, tensor in self.parameters}
        given.update((value.buffer, t) for value, t in zip(self.segment.inputs, inputs, strict=True))
        given.update((value.buffer, t) for value, t in zip(self.segment.outputs, outputs, strict=True))
        return given

    def _made(self, parameter: Parameter, gradient: Gradient, given: dict[Buffer, Tensor]) -> Tensor:
        """Memory for a parameter's gradient."""
        if gradient.buffer is None:
            return torch.zeros(parameter.shape)
        for buffer in (gradient.buffer, gradient.dense):
            if buffer is not None:
                given[buffer] = empty_weight(
                    self.segment.library, parameter.shape, torch.float32, channels_last=parameter.last
                )
        return given[gradient.buffer]


def _arena(calls: Calls) -> Tensor:
    """Memory for what calls keep: bytes, so that hooks of saved tensors that round numbers leave it alone."""
    return empty(calls.library, (calls.arena,), torch.uint8)


def _addresses(calls: Calls, given: dict[Buffer, Tensor]) -> list[int]:
    return [given[buffer].data_ptr() for buffer in calls.given]


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
        inputs, outputs = tensors[: ctx.count], tensors[ctx.count + len(step.learned) :]
        if torch.is_grad_enabled():
            found = _differentiable(step, inputs, [t for _, t in step.learned], grads, ctx.needs_input_grad[2:])
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
