"""Programs of layers: forward and backward passes as prepared library calls.

A segment runs the same kernels on the same numbers as its layers one by one, without what Python and autograd do
between them.
"""

import ctypes
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch

from sparsefx.kernels.spec import is_channels_last

from .abi import BLOCK, SfxPrologue
from .calls import Buffer, Calls, Structure
from .conv import ConvPlan
from .dense_wgrad import uses_amx
from .linear import FEW_ROWS, LinearPlan
from .norm import SfxNorm
from .plan import PASSES, LayerPlan
from .pool import Pool

FP32 = 0
_FLOAT = 4


@dataclass(frozen=True, eq=False)
class Parameter:
    """A tensor of a layer: where it lies is said at each run.

    Attributes:
        shape, last: Of a weight; whether in channels_last.
        wants: Whether backward computes its gradient.
    """

    buffer: Buffer
    shape: torch.Size
    last: bool
    wants: bool


@dataclass(frozen=True, eq=False)
class Value:
    """Activations between the layers of a segment: `[B, C, H, W, 16]`, or `[N, features]` of linear layers.

    Attributes:
        wants: Whether a gradient with respect to them is needed.
        prologue: What readers do to them first: mean, scale and shift, and whether a ReLU follows. The gradient is then
            that of the result.
    """

    buffer: Buffer
    shape: tuple[int, ...]
    wants: bool
    prologue: tuple[Buffer, Buffer, Buffer, bool] | None = None

    @property
    def elements(self) -> int:
        return self.buffer.size // _FLOAT

    def argument(self) -> Structure | None:
        """The prologue as the library takes it."""
        if self.prologue is None:
            return None
        mean, scale, shift, relu = self.prologue
        return Structure(SfxPrologue, mean=mean, scale=scale, shift=shift, relu=relu)


@dataclass(frozen=True, eq=False)
class Gradient:
    """What a backward pass returns for a parameter, or keeps beside it.

    Attributes:
        buffer: None where it is zero.
        dense: Of all weights, as if none were missing, where it was asked for.
    """

    buffer: Buffer | None
    dense: Buffer | None = None


def floats(shape: Sequence[int]) -> Buffer:
    """Memory for an fp32 tensor of a shape."""
    return Buffer(_FLOAT * torch.Size(shape).numel())


class Segment:
    """Layers in the order in which they run, as calls.

    Args:
        images: How many images activations hold.
        grad: Whether a backward pass may follow.
    Attributes:
        forward: Calls of the forward pass, once `finish` was called, on `inputs`, `outputs` and `parameters`.
        inputs, outputs: Activations that a run is given, and those that it gives.
        parameters: In the order in which a run is given them.
        learned: Indices of those whose gradient a backward pass gives.
        read: Whether a backward pass reads each of the outputs.
    """

    def __init__(self, library: ctypes.CDLL, images: int, *, grad: bool) -> None:
        self.library, self.images, self.grad = library, images, grad
        self.blocks = -(-images // BLOCK)
        self.forward = Calls(library)
        self.inputs: list[Value] = []
        self.outputs: list[Value] = []
        self.parameters: list[Parameter] = []
        self.learned: list[int] = []
        self.read: list[bool] = []
        self._backward: dict[frozenset[Parameter], Backward] = {}
        self._tape: list[Callable[[Backward], None]] = []
        self._plans: list[LayerPlan] = []  # whose lists the calls walk

    def input(self, shape: Sequence[int], *, wants: bool) -> Value:
        """Activations that come from outside."""
        value = Value(Buffer(_FLOAT * torch.Size(shape).numel(), given=True), tuple(shape), wants and self.grad)
        self.inputs.append(value)
        return value

    def parameter(self, tensor: torch.Tensor) -> Parameter:
        """A tensor of a layer, and the next that a run is given."""
        wants = tensor.requires_grad and self.grad
        made = Parameter(Buffer(tensor.nbytes, given=True), tensor.shape, is_channels_last(tensor), wants)
        self.parameters.append(made)
        return made

    def conv(
        self,
        plan: ConvPlan,
        x: Value,
        weight: Parameter,
        mask: Parameter,
        bias: Parameter | None,
        residual: Value | None,
        *,
        relu: bool,
        centred: bool,
        dense: bool,
    ) -> Value:
        """A convolution, plus `residual`, then a ReLU.

        Args:
            centred: As for `ops.conv`.
            dense: Whether the weight's gradient is always taken of all weights, and masked.
        """
        self._plans.append(plan)
        h, w = x.shape[2:4]
        shape = (self.blocks, plan.mask_shape[0], *plan.out_hw(h, w), BLOCK)
        wants = self.grad and (
            x.wants or weight.wants or (bias is not None and bias.wants) or (residual is not None and residual.wants)
        )
        y, values = Value(floats(shape), shape, wants), Buffer(_FLOAT * plan.nnz)
        added = None if bias is None else bias.buffer, None if residual is None else residual.buffer
        self.forward.add("sfx_layer_collect", plan.handle, FP32, weight.last, weight.buffer, values)
        at, into = (self.images, h, w), (relu, y.buffer)
        self.forward.add(
            "sfx_conv_gather", plan.handle, PASSES["fprop"], FP32, x.buffer, *at, x.argument(), values, *added, *into
        )

        def backward(b: Backward) -> None:
            grad = b.arriving(y, relu)
            if grad is None:
                return
            if bias is not None and bias.wants:
                out = None if centred else b.result(bias)
                if out is not None:
                    area = shape[2] * shape[3]
                    b.calls.add("sfx_channel_sums", FP32, grad, self.images, shape[1], area, out)
                b.gradients[bias] = Gradient(out)
            if x.wants:
                for_x = floats(x.shape)
                nothing = None, None, False  # to add, or to clamp
                b.calls.add(
                    "sfx_conv_gather", plan.handle, PASSES["dgrad"], FP32, grad, *at, None, values, *nothing, for_x
                )
                b.contribute(x, for_x)
            if weight.wants and (dense or weight in b.dense):
                b.gradients[weight] = self._dense(b, plan, x, grad, weight, mask)
            elif weight.wants:
                out, sums = b.result(weight), Buffer(_FLOAT * plan.nnz)
                b.calls.add("sfx_conv_wgrad", plan.handle, FP32, grad, x.buffer, *at, x.argument(), sums)
                b.calls.add("sfx_layer_scatter", plan.handle, FP32, weight.last, sums, out)
                b.gradients[weight] = Gradient(out)
            if residual is not None:
                b.contribute(residual, grad)

        self._tape.append(backward)
        return y

    def _dense(
        self, b: "Backward", plan: ConvPlan, x: Value, grad: Buffer, weight: Parameter, mask: Parameter
    ) -> Gradient:
        """Calls that give a convolution's gradient of all weights, and the same with zeros at missing ones."""
        h, w = x.shape[2:4]
        read = x.buffer
        if x.prologue is not None:
            mean, scale, shift, relu = x.prologue
            read = floats(x.shape)
            prepares = Structure(SfxNorm, x=x.buffer, y=read, mean=mean, rstd=scale, bias=shift, relu=relu)
            b.calls.add("sfx_norm", 0, FP32, prepares, self.images, x.shape[1], h * w)
        keeps = weight in b.dense
        out, whole = b.result(weight), b.result(weight) if keeps else Buffer(_FLOAT * weight.shape.numel())
        amx = uses_amx(self.library, plan.shape, self.blocks)
        b.calls.add(
            "sfx_conv_dense_wgrad", plan.shape, grad, read, self.blocks * BLOCK, h, w, weight.last, amx, whole
        )  # fmt: skip
        b.calls.add("sfx_masked_copy", whole, mask.buffer, out, weight.shape.numel())
        return Gradient(out, whole if keeps else None)

    def linear(
        self, plan: LinearPlan, x: Value, weight: Parameter, mask: Parameter, bias: Parameter | None, *, relu: bool
    ) -> Value:
        """A linear layer, then a ReLU."""
        self._plans.append(plan)
        rows, outs = x.shape[0], plan.mask_shape[0]
        wants = self.grad and (x.wants or weight.wants or (bias is not None and bias.wants))
        y, values = Value(floats((rows, outs)), (rows, outs), wants), Buffer(_FLOAT * plan.nnz)
        given = None if bias is None else bias.buffer
        arguments = FP32, x.buffer, rows, weight.buffer, values, given, relu, y.buffer
        if rows <= FEW_ROWS:
            self.forward.add("sfx_linear_rows", plan.handle, *arguments)
        else:
            self.forward.add("sfx_linear_gather", plan.handle, PASSES["fprop"], *arguments)

        def backward(b: Backward) -> None:
            grad = self._linear_grad(b, y, bias, relu=relu)
            if grad is None:
                return
            if x.wants:
                for_x, gathers = floats(x.shape), (plan.handle, PASSES["dgrad"], FP32)
                b.calls.add("sfx_linear_gather", *gathers, grad, rows, None, values, None, False, for_x)
                b.contribute(x, for_x)
            if weight.wants and weight in b.dense:
                self._masked_product(b, grad, x, weight, mask)
            elif weight.wants:
                out = b.result(weight)
                b.calls.add("sfx_linear_wgrad", plan.handle, FP32, grad, x.buffer, rows, FP32, out)
                b.gradients[weight] = Gradient(out)

        self._tape.append(backward)
        return y

    def dense_linear(
        self, x: Value, weight: Parameter, mask: Parameter, bias: Parameter | None, *, relu: bool
    ) -> Value:
        """A linear layer that multiplies by missing weights, which are zero; then a ReLU."""
        (rows, features), outs = x.shape, weight.shape[0]
        wants = self.grad and (x.wants or weight.wants or (bias is not None and bias.wants))
        y, shape = Value(floats((rows, outs)), (rows, outs), wants), (rows, outs, features)
        given = None if bias is None else bias.buffer
        self.forward.add("sfx_linear_dense_fprop", x.buffer, weight.buffer, *shape, given, relu, y.buffer)

        def backward(b: Backward) -> None:
            grad = self._linear_grad(b, y, bias, relu=relu)
            if grad is None:
                return
            if x.wants:
                for_x = floats(x.shape)
                b.calls.add("sfx_linear_dense_dgrad", grad, weight.buffer, *shape, for_x)
                b.contribute(x, for_x)
            if weight.wants:
                self._masked_product(b, grad, x, weight, mask)

        self._tape.append(backward)
        return y

    def _linear_grad(self, b: "Backward", y: Value, bias: Parameter | None, *, relu: bool) -> Buffer | None:
        """The gradient that arrives at a linear layer, behind its ReLU, summed for the bias."""
        grad = b.arriving(y, relu)
        if grad is not None and bias is not None and bias.wants:
            sums = b.result(bias)
            b.calls.add("sfx_column_sums", grad, *y.shape, sums)
            b.gradients[bias] = Gradient(sums)
        return grad

    def _masked_product(self, b: "Backward", grad: Buffer, x: Value, weight: Parameter, mask: Parameter) -> None:
        """The gradient of a linear layer's weight by a dense product, which is kept where it is asked for."""
        out, whole = b.result(weight), b.result(weight) if weight in b.dense else None
        shape = x.shape[0], *weight.shape
        b.calls.add("sfx_linear_dense_wgrad", grad, x.buffer, *shape, mask.buffer, out, whole)
        b.gradients[weight] = Gradient(out, whole)

    def norm(
        self,
        x: Value,
        weight: Parameter | None,
        bias: Parameter | None,
        running: tuple[Parameter, Parameter] | None,
        residual: Value | None,
        *,
        training: bool,
        eps: float,
        factor: float,
        relu: bool,
        write: bool,
        forks: tuple[bool, bool],
    ) -> list[Value]:
        """A BatchNorm, plus `residual`, then a ReLU: its output, and its forks.

        Args:
            running: Statistics that training moves by `factor`, and that are used outside of training.
            write: Whether the output is written; else readers normalize what they read.
            forks: Whether input and output come out once more, for another reader.
        """
        area, channels = x.shape[2] * x.shape[3], x.shape[1]
        mean, var, rstd, scale, shift = (Buffer(_FLOAT * channels) for _ in range(5))
        affine = [None if p is None else p.buffer for p in (weight, bias)]
        statistics = [None, None] if running is None else [p.buffer for p in running]
        learned = [p for p in (weight, bias) if p is not None and p.wants]
        wants = self.grad and (x.wants or bool(learned) or (residual is not None and residual.wants))
        if write:
            y = Value(floats(x.shape), x.shape, wants)
        else:
            y = Value(x.buffer, x.shape, wants, (mean, scale, shift, relu))
        given = {"x": x.buffer, "weight": affine[0], "bias": affine[1], "mean": mean, "rstd": rstd}
        given |= {"training": training, "relu": relu}
        fields = {"y": y.buffer} if write else {"scale": scale, "shift": shift}
        fields |= {"residual": None if residual is None else residual.buffer, "var": var, "eps": eps, "factor": factor}
        fields |= {"running_mean": statistics[0], "running_var": statistics[1]}
        self.forward.add("sfx_norm", 0, FP32, Structure(SfxNorm, **given, **fields), self.images, channels, area)
        again = Value(x.buffer, x.shape, x.wants, x.prologue) if forks[0] else None
        twice = Value(y.buffer, y.shape, y.wants, y.prologue) if forks[1] else None

        def backward(b: Backward) -> None:
            grad, other = b.total(y), None if twice is None else b.total(twice)
            skip = None if again is None else b.total(again)
            grad, other = (other, None) if grad is None else (grad, other)
            if grad is None:
                if skip is not None:
                    b.contribute(x, skip)
                return
            dx = floats(x.shape)
            added = floats(x.shape) if residual is not None else None
            outs = [b.result(p) if p is not None and p.wants else Buffer(_FLOAT * channels) for p in (weight, bias)]
            kept = y.buffer if relu and residual is not None else None
            back = {"grad": grad, "grad2": other, "skip": skip, "y": kept, "dx": dx, "dresidual": added}
            back |= {"dweight": outs[0], "dbias": outs[1]}
            b.calls.add("sfx_norm", 1, FP32, Structure(SfxNorm, **given, **back), self.images, channels, area)
            for parameter, out in zip((weight, bias), outs, strict=True):
                if parameter is not None and parameter.wants:
                    b.gradients[parameter] = Gradient(out)
            b.contribute(x, dx)
            if residual is not None and added is not None:
                b.contribute(residual, added)

        self._tape.append(backward)
        return [y, *(v for v in (again, twice) if v is not None)]

    def max_pool(self, x: Value, pool: Pool) -> Value:
        """A max pooling."""
        shape = (*x.shape[:2], *pool.out, BLOCK)
        y, taps = Value(floats(shape), shape, x.wants), Buffer(torch.Size(shape).numel())
        images = self.images if x.prologue is not None else self.blocks * BLOCK
        self.forward.add(
            "sfx_max_pool", 0, FP32, pool.argument(), x.argument(), images, x.shape[1], x.buffer, y.buffer, taps
        )  # fmt: skip

        def backward(b: Backward) -> None:
            grad = b.total(y)
            if grad is None or not x.wants:
                return
            dx = floats(x.shape)
            b.calls.add(
                "sfx_max_pool", 1, FP32, pool.argument(), None, self.blocks * BLOCK, x.shape[1], grad, dx, taps
            )  # fmt: skip
            b.contribute(x, dx)

        self._tape.append(backward)
        return y

    def finish(self, outputs: Sequence[Value]) -> None:
        """Plan memory. Outputs are plain activations that the segment computes, and are given memory at each run."""
        self.outputs = list(outputs)
        self.learned = [i for i, parameter in enumerate(self.parameters) if parameter.wants]
        for value in outputs:
            value.buffer.given = True
        first = self.backward(()) if self.grad else None
        self.read = [first is not None and first.calls.uses(value.buffer) for value in outputs]
        self.forward.finish(self.given, kept=first.calls.uses if first is not None else lambda _: False)
        for backward in self._backward.values():
            backward.finish()

    @property
    def given(self) -> list[Buffer]:
        """What the forward pass is given memory for."""
        return [thing.buffer for thing in (*self.inputs, *self.outputs, *self.parameters)]

    def backward(self, dense: Collection[Parameter]) -> "Backward":
        """The backward pass that gives the gradient of all weights for those in `dense`."""
        key = frozenset(dense)
        made = self._backward.get(key)
        if made is None:
            made = self._backward[key] = Backward(self, key)
            for layer in reversed(self._tape):
                layer(made)
            for value in self.inputs:
                made.keep(value)
            if hasattr(self.forward, "places"):
                made.finish()
        return made


class Backward:
    """A backward pass in the making, and then its calls.

    Attributes:
        dense: Weights whose gradient is taken of all weights.
        calls: On what the forward pass is given, then on `grads`, then on what is `made`; once `finish` was called.
        grads: Memory of the gradient of each of the segment's outputs.
        gradients: What it computes, by parameter.
        made: Shapes, and whether in channels_last, of the tensors that a run makes.
        zeros: Where in `grads` and then `made` those are that are zero.
        returned: Where there the gradient of each of the segment's inputs and learned parameters is; None for none.
        masked, dense_of: Where the gradient of a parameter is, and its gradient of all weights.
    """

    def __init__(self, segment: Segment, dense: frozenset[Parameter]) -> None:
        self.segment, self.dense = segment, dense
        self.calls = Calls(segment.library)
        self.grads = [Buffer(value.buffer.size, given=True) for value in segment.outputs]
        self.gradients: dict[Parameter, Gradient] = {}
        self._totals: dict[Value, Buffer] = {}
        for value, grad in zip(segment.outputs, self.grads, strict=True):
            self.contribute(value, grad)

    def total(self, value: Value) -> Buffer | None:
        """The gradient of activations from all that read them; None if none does."""
        return self._totals.get(value)

    def contribute(self, value: Value, grad: Buffer) -> None:
        """Add to the gradient of activations, in the order in which autograd does."""
        if not value.wants:
            return
        present = self._totals.get(value)
        if present is not None:
            total = floats(value.shape)
            self.calls.add("sfx_add", present, grad, total, value.elements)
            grad = total
        self._totals[value] = grad

    def arriving(self, y: Value, relu: bool) -> Buffer | None:
        """`total` of what gave `y`, behind a ReLU where there was one."""
        grad = self.total(y)
        if grad is None or not relu:
            return grad
        passed = floats(y.shape)
        self.calls.add("sfx_relu_backward", grad, y.buffer, passed, y.elements)
        return passed

    def result(self, parameter: Parameter) -> Buffer:
        """Memory for a parameter's gradient, given at each run."""
        return Buffer(_FLOAT * parameter.shape.numel(), given=True)

    def keep(self, value: Value) -> None:
        """Let the gradient of an input lie in memory that is given at each run."""
        total = self._totals.get(value)
        if total is not None:
            total.given = True

    def finish(self) -> None:
        """Plan memory: the forward pass has its own."""
        segment = self.segment
        self.made: list[tuple[Sequence[int], bool]] = []
        self.zeros: list[int] = []
        self.masked: dict[Parameter, int] = {}
        self.dense_of: dict[Parameter, int] = {}
        places = {buffer: i for i, buffer in enumerate(self.grads)}

        def place(buffer: Buffer, shape: Sequence[int], last: bool = False) -> int:
            if buffer not in places:
                places[buffer] = len(places)
                self.made.append((shape, last))
            return places[buffer]

        totals = [(value, self.total(value)) for value in segment.inputs]
        self.returned = [None if total is None else place(total, value.shape) for value, total in totals]
        for parameter, gradient in self.gradients.items():
            self.masked[parameter] = at = place(gradient.buffer or Buffer(0), parameter.shape, parameter.last)
            if gradient.buffer is None:
                self.zeros.append(at)
            if gradient.dense is not None:
                self.dense_of[parameter] = place(gradient.dense, parameter.shape, parameter.last)
        self.returned += [self.masked.get(segment.parameters[i]) for i in segment.learned]
        self.calls.finish([*segment.given, *places], segment.forward.places)
