"""What the opaque operators know of a layer, looked up by a constant handle.

A compiled graph holds only the handle, so that masks, plans and the gradient window change without a recompilation.
"""

import itertools
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd import Variable

from sparsefx.kernels.blocked import CONVERTED_DENSE
from sparsefx.kernels.cpu.norm import channel_sums
from sparsefx.kernels.masking import any_nonzero, masked, masked_, masked_product
from sparsefx.kernels.norm import prepared
from sparsefx.kernels.reference import DENSE
from sparsefx.kernels.spec import ConvSpec, Prologue, channels


class Backend(Protocol):
    """How a layer computes its three passes; the shapes are those of `Dense`.

    One with a true attribute `fuses` takes a prologue as the next argument of `fprop` and `wgrad`, and then a residual
    in `fprop`. One with an attribute `collected` leaves there what of the weight its `fprop` ran with, and its `dgrad`
    takes that for the weight. One with `bias_grad(grad)` sums the bias's gradient of a linear layer that runs it alone.
    """

    name: str

    def fprop(self, spec: ConvSpec | None, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor: ...

    def dgrad(self, spec: ConvSpec | None, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor: ...

    def wgrad(self, spec: ConvSpec | None, grad: Tensor, x: Tensor, weight: Tensor, mask: Tensor) -> Tensor: ...


def dense_for(spec: ConvSpec | None) -> Any:
    """Masked dense for the layout that `spec` speaks of."""
    return CONVERTED_DENSE if spec is not None and spec.images else DENSE


def _fuses(backend: Any) -> bool:
    return getattr(backend, "fuses", False)


def _images(spec: ConvSpec | None) -> int:
    assert spec is not None  # only convolutions have a prologue
    return spec.images


class _Staged(NamedTuple):
    """Dense gradients of one backward pass, summed; `once` if the weight was used once."""

    dense: Tensor
    once: bool


class Carried(NamedTuple):
    """What a forward pass leaves for its backward pass: the backend that ran, and what it collected of the weight."""

    backend: Any
    weight: Tensor


def _take(backend: Any) -> Carried | None:
    collected = getattr(backend, "collected", None)
    if collected is None:
        return None
    backend.collected = None
    return Carried(backend, collected)


class Runtime:
    """The state behind one sparse weight's operator calls.

    Attributes:
        name: Name of the layer, for errors.
        choose: `(pass, spec, x, grad, weight, mask) -> Backend`; None runs masked dense. Where it has an attribute
            `plan`, that stands for the mask of the latest call, `settled(pass, spec, shape, dtype)` is the backend, if
            chosen, and `sparse(x, mask)` the sparse kernels of a linear layer.
        full: Whether the mask missed no weight when `choose` last saw it.
        dense: Whether `choose` has found dense kernels the fastest for an output with the present mask.
        collecting: Whether the gradient of missing weights is collected (the window). Changed only between steps.
        collected: Sum of the dense weight gradients that went into the present `.grad`, or None.
        masked: Address and version of the weight gradient that backward returned last, while nothing can have been
            added to it unseen; None makes `reach` mask what arrives.
        current_grad: Returns the weight's `.grad`, to see whether a new accumulation begins.
        carried: What the latest forward pass leaves for its backward pass, until it is taken.
        hooked: The weight whose hook calls `reach`; None while there is none.
    """

    _by_handle: "ClassVar[weakref.WeakValueDictionary[int, Runtime]]" = weakref.WeakValueDictionary()
    _handles = itertools.count(1)

    def __init__(self, name: str = "") -> None:
        self.name = name
        self.choose: Any = None
        self.full = False
        self.dense = False
        self.collecting = False
        self.collected: Tensor | None = None
        self.current_grad: Callable[[], Tensor | None] = lambda: None
        self.carried: Carried | None = None
        self.hooked: weakref.ref[Tensor] | None = None
        self._accumulated: tuple[int, int] | None = None
        self._staged: dict[int, _Staged] = {}
        self._total: Tensor | None = None
        self.masked: tuple[int, int] | None = None
        self.handle = next(Runtime._handles)
        Runtime._by_handle[self.handle] = self

    @classmethod
    def of(cls, handle: int) -> "Runtime":
        """The runtime of a handle that an operator was called with."""
        try:
            return cls._by_handle[handle]
        except KeyError:
            raise RuntimeError(
                f"sparse layer with handle {handle}: expected a live layer, got one that was freed or made in another "
                "process; call the model instead of a saved graph of it"
            ) from None

    def __deepcopy__(self, memo: dict) -> "Runtime":
        copy = Runtime(self.name)
        memo[id(self)] = copy
        return copy

    def __reduce__(self) -> tuple:
        return Runtime, (self.name,)

    def fprop(
        self,
        spec: ConvSpec | None,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        mask: Tensor,
        prologue: Prologue | None = None,
        residual: Tensor | None = None,
        only: Backend | None = None,
    ) -> Tensor:
        """Output of the layer, plus `residual` where one is given; of `only`, whatever `choose` says."""
        backend: Any = only
        if backend is None:
            backend = self.choose("fprop", spec, x, None, weight, mask) if self.choose else dense_for(spec)
        if _fuses(backend) and (residual is None or residual.dtype == x.dtype):
            added = None if residual is None else residual.contiguous()
            out = backend.fprop(spec, x, weight, bias, prologue, added)
            self.carried = _take(backend)
            return out
        x = x if prologue is None else prepared(x, prologue, _images(spec))
        out = backend.fprop(spec, x, weight, bias)
        self.carried = _take(backend)
        return out if residual is None else out.add_(residual)

    def backward(
        self,
        spec: ConvSpec | None,
        grad: Tensor,
        x: Tensor,
        weight: Tensor,
        mask: Tensor,
        wanted: list[bool],
        prologue: Prologue | None = None,
        centred: bool = False,
        carried: Carried | None = None,
        only: Backend | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of input, weight and bias, each where `wanted`; the weight's is zero where the mask is False.

        Args:
            only: The backend to run, whatever `choose` says; the gradient of missing weights is masked dense's.
        """
        sums = None if torch.is_grad_enabled() else getattr(only, "bias_grad", None)
        for_bias = None
        if wanted[2]:
            for_bias = _bias_grad(grad, spec, centred) if sums is None else sums(grad)
        masked_dense = dense_for(spec)
        if torch.is_grad_enabled():  # for a double backward: differentiable, and masked when it reaches the weight
            x = x if prologue is None else prepared(x, prologue, _images(spec))
            for_input = masked_dense.dgrad(spec, grad, x, weight) if wanted[0] else None
            for_weight = masked_dense.dense_wgrad(spec, grad, x, weight) if wanted[1] else None
            return for_input, for_weight, for_bias
        choose = self.choose if self.choose and only is None else lambda *_: masked_dense if only is None else only
        dgrad = choose("dgrad", spec, x, grad, weight, mask) if wanted[0] else None
        wgrad = (
            (masked_dense if self.collecting else choose("wgrad", spec, x, grad, weight, mask)) if wanted[1] else None
        )
        reached = carried.weight if carried is not None and carried.backend is dgrad else weight
        arguments = ()
        if prologue is not None and wgrad is not None:
            arguments = (prologue,) if _fuses(wgrad) else ()
            x = x if arguments else prepared(x, prologue, _images(spec))
        if wgrad is masked_dense:
            if dgrad is masked_dense and spec is not None:
                for_input, whole = masked_dense.both(spec, grad, x, weight)
            else:
                for_input = dgrad.dgrad(spec, grad, x, reached) if dgrad else None
                whole = None if spec is None else masked_dense.dense_wgrad(spec, grad, x, weight)
            if whole is None:
                for_weight, whole = masked_product(grad, x, mask, keep=self.collecting)
            else:
                for_weight = masked(whole, mask) if self.collecting else masked_(whole, mask)
            if self.collecting and whole is not None:
                self.stage(whole)
        else:
            for_input = dgrad.dgrad(spec, grad, x, reached) if dgrad else None
            for_weight = wgrad.wgrad(spec, grad, x, weight, mask, *arguments) if wgrad else None
        if for_weight is not None:
            self.returns(for_weight)
        return for_input, for_weight, for_bias

    def returns(self, for_weight: Tensor) -> None:
        """Note the masked weight gradient that a backward pass returns."""
        self.masked = for_weight.data_ptr(), for_weight._version

    def stage(self, dense: Tensor) -> None:
        """Keep the dense gradient until it is known whether this backward pass reaches `.grad`."""
        wide = dense if dense.dtype == torch.float32 else dense.to(torch.promote_types(dense.dtype, torch.float32))
        backward_pass = torch._C._current_graph_task_id()
        staged = self._staged.get(backward_pass)
        if staged is not None:
            self._staged[backward_pass] = _Staged(staged.dense.add_(wide), once=False)
            return
        self._staged[backward_pass] = _Staged(wide, once=True)
        if backward_pass >= 0:
            # A pass that does not write `.grad`, as autograd.grad for other tensors, leaves nothing behind.
            Variable._execution_engine.queue_callback(partial(self._unstage, backward_pass))

    def _unstage(self, backward_pass: int) -> None:
        self._staged.pop(backward_pass, None)

    def passes(self, grad: Tensor) -> bool:
        """Whether a gradient that reaches the weight needs no `reach`: it is masked, and nothing is collected."""
        if self.collecting or self.collected is not None or (grad.data_ptr(), grad._version) != self.masked:
            return False
        self.masked = None
        return True

    def reach(self, grad: Tensor, mask: Tensor) -> Tensor | None:
        """Mask the sum of all gradients that reach the weight in a backward pass, as a hook of the weight.

        What the operators return is masked already. Functions that read the weight without its module (attention, a
        tied decoder), and double backward, give a dense gradient.

        Returns:
            The masked gradient, or None where `grad` is masked already.
        """
        untouched = (grad.data_ptr(), grad._version) == self.masked
        self.masked = None
        if not self.collecting and self.collected is None:
            return masked(grad, mask)
        present = self.current_grad()
        continues = present is not None and (
            (id(present), present._version) == self._accumulated or any_nonzero(present)
        )
        if not continues:
            self.collected = None
        if self.collecting:
            staged = self._staged.pop(torch._C._current_graph_task_id(), None)
            if staged is not None and staged.once and untouched:
                self._total = staged.dense
            else:
                wide = grad.detach().to(torch.promote_types(grad.dtype, torch.float32))
                self._total = wide.clone() if staged is None else staged.dense.masked_fill_(mask, 0).add_(wide)
        return None if untouched else masked(grad, mask)

    def commit(self, grad: Tensor) -> None:
        """Collect what `reach` saw, now that it is in `.grad`: a hook after accumulation, while `collecting`."""
        self._accumulated = id(grad), grad._version
        total, self._total = self._total, None
        if total is not None:
            self.collected = total if self.collected is None else self.collected.add_(total)


def _bias_grad(grad: Tensor, spec: ConvSpec | None, centred: bool = False) -> Tensor:
    """Sum `grad`, `[N, O, *space]` for a convolution or `[..., O]` for a linear layer, to `[O]`.

    Args:
        centred: The sums of a convolution's are known to be zero.
    """
    if spec is not None and centred:
        return grad.new_zeros(channels(grad, spec))
    if spec is None:
        return grad.sum(0) if grad.dim() == 2 else grad.reshape(-1, grad.shape[-1]).sum(0)
    if spec.images and grad.dim() == 4:
        return grad.flatten(1).sum(1)
    if spec.images and torch.is_grad_enabled():
        return grad.flatten(2).sum(2).sum(0)
    if spec.images:
        return channel_sums(grad.contiguous(), spec.images).to(grad.dtype)
    return grad.sum([d for d in range(grad.dim()) if d != 1])
