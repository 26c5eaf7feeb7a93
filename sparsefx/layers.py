"""The sparse layers: subclasses of torch's own, entered by assigning `__class__`, so that the object stays.

The stored weight is exactly zero where `weight_mask` is False and is a parameter like any other. Nothing multiplies by
the mask inside autograd: the operators return a weight gradient that is zero at missing weights.
"""

import weakref
from collections.abc import Iterator
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsefx.errors import CheckpointError, LayerError, MaskError
from sparsefx.kernels import ops
from sparsefx.kernels.dense_cpu import DENSE_CPU
from sparsefx.kernels.masking import masked_
from sparsefx.kernels.runtime import Runtime
from sparsefx.kernels.spec import ConvSpec, is_channels_last
from sparsefx.shards import is_sharded, part, part_like, shared_like, whole

MASK = "weight_mask"
_FEWEST_WEIGHTS = 1 << 14
"""Of fewer the gradient is masked in microseconds, by a hook of the weight."""


class SparseLayer(nn.Module):
    """Mixin of every sparse layer.

    Attributes:
        weight_mask: Bool buffer of the weight's shape, True where a weight exists. Change it through `set_mask_`.
        base: The torch class that the layer was and is still an instance of.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    weight_mask: Tensor
    base: ClassVar[type[nn.Module]]
    transposed: bool = False
    _runtime: Runtime
    _full: bool

    @property
    def runtime(self) -> Runtime:
        """What the operators know of the layer; layers that share a weight share it."""
        return self._runtime

    @property
    def handle(self) -> int:
        """The constant that a compiled graph holds."""
        return self._runtime.handle

    @property
    def full(self) -> bool:
        """Whether the layer stays dense for good, as at density 1.0."""
        return self._full

    @property
    def masks_gradient(self) -> bool:
        """Whether a hook of the weight masks its gradient, whatever computes it; or none is needed."""
        weight = self.weight
        if self._full or not weight.requires_grad:
            return True
        hooked = self._runtime.hooked
        return hooked is not None and hooked() is weight

    @torch.no_grad()
    def set_mask_(self, mask: Tensor) -> None:
        """Replace the mask in place and zero the weights that no longer exist.

        Args:
            mask: Bool, of the weight's shape.
        Raises:
            MaskError: for another shape or type.
        """
        if mask.dtype != torch.bool or mask.shape != self.weight_mask.shape:
            raise MaskError(
                f"{self.runtime.name}: expected a bool mask of shape {tuple(self.weight_mask.shape)}, got "
                f"{mask.dtype} {tuple(mask.shape)}; build it with the weight's shape"
            )
        for layer in owners(self.runtime):
            if layer.weight_mask is not self.weight_mask:
                layer.weight_mask.copy_(mask)
        self.weight_mask.copy_(mask)
        self.zero_missing_()

    @torch.no_grad()
    def zero_missing_(self) -> None:
        """Make the stored weight exactly zero where the mask is False."""
        masked_(part(self.weight).detach(), part_like(self.weight_mask, self.weight))

    def _operands(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Input, weight and bias in the type that autocast asks for."""
        if not torch.compiler.is_compiling() and self.__dict__["_bound"]() is not self.weight:
            self._bind()  # `fully_shard` puts another parameter in place for each forward
        device = x.device.type
        if torch.is_autocast_enabled(device) and x.is_floating_point() and x.dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device)
            bias = self.bias if self.bias is None else self.bias.to(dtype)
            return x.to(dtype), self.weight.to(dtype), bias
        return x, self.weight, self.bias

    def _bind(self) -> None:
        """Tie the layer to its runtime: again after a copy, for the weight object is another."""
        owned = self._runtime.__dict__.setdefault("owners", [])
        if not any(ref() is self for ref in owned):
            owned.append(weakref.ref(self))
        layer: weakref.ref[SparseLayer] = weakref.ref(self)
        self._runtime.current_grad = partial(_grad_of, layer)
        self._unhook()
        self.__dict__["_bound"] = weakref.ref(self.weight)
        sharded = is_sharded(self.weight)
        if (
            not sharded
            and self.weight.requires_grad
            and self.weight.is_leaf
            and not self._full
            and owners(self._runtime)[0] is self
        ):
            self.__dict__["_hooks"] = [self.weight.register_hook(partial(_reach, layer))]
            self._runtime.hooked = weakref.ref(self.weight)
            self._watch()

    def collect_(self, collects: bool) -> None:
        """Collect the gradient of missing weights beside `.grad` from the next backward pass on, or stop."""
        self._runtime.collecting = collects
        for layer in owners(self._runtime):
            layer._watch()

    def _watch(self) -> None:
        """See what arrives in `.grad` while it is collected; a hook costs as much as a small layer's kernel."""
        hooks = self.__dict__.get("_hooks")
        if hooks is None:
            return
        if self._runtime.collecting and len(hooks) == 1:
            layer: weakref.ref[SparseLayer] = weakref.ref(self)
            hooks.append(self.weight.register_post_accumulate_grad_hook(partial(_commit, layer)))
        elif not self._runtime.collecting and len(hooks) == 2:
            hooks.pop().remove()

    def _unhook(self) -> None:
        for hook in self.__dict__.pop("_hooks", ()):
            hook.remove()
            self._runtime.hooked = None

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state.pop("_hooks", None)
        state.pop("_bound", None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._bind()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        for layer in owners(self.runtime):
            if layer is not self and layer.weight is self.weight:
                layer._buffers[MASK] = self._buffers[MASK]
        self._bind()
        return self

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if is_sharded(self.weight):
            destination[prefix + MASK] = shared_like(self.weight_mask, self.weight)

    def _load_from_state_dict(
        self,
        state_dict: dict,
        prefix: str,
        local_metadata: dict,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        mask = state_dict.get(prefix + MASK)
        if mask is not None and is_sharded(mask):
            mask = state_dict[prefix + MASK] = whole(mask)
        if mask is not None and (mask.shape != self.weight_mask.shape or mask.dtype != torch.bool):
            raise CheckpointError(
                f"{prefix}{MASK}: expected a bool mask of shape {tuple(self.weight_mask.shape)}, got {mask.dtype} "
                f"{tuple(mask.shape)}; load a checkpoint of this model"
            )
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if mask is None and prefix + MASK in missing_keys:
            missing_keys.remove(prefix + MASK)
        self._bind()
        self.zero_missing_()

    def extra_repr(self) -> str:
        mask = self.weight_mask
        return f"{super().extra_repr()}, density={int(mask.sum()) / mask.numel():.4g}"


def _grad_of(layer: "weakref.ref[SparseLayer]") -> Tensor | None:
    found = layer()
    if found is None:
        return None
    grad = found.weight.grad
    if grad is None and (stepped := found.runtime.__dict__.get("stepped")) is not None:
        parameter = stepped()
        grad = None if parameter is None or parameter.grad is None else part(parameter.grad)
    return grad


def _reach(layer: "weakref.ref[SparseLayer]", grad: Tensor | None) -> Tensor | None:
    found = layer()
    if found is None or grad is None:  # a user's autograd function may return no gradient
        return None
    runtime = found._runtime
    if runtime.passes(grad):
        return None
    mask = found.weight_mask
    if grad.shape != mask.shape or (runtime.full and runtime.choose.misses_none(mask)):
        return None
    return runtime.reach(grad, mask)


def _commit(layer: "weakref.ref[SparseLayer]", weight: Tensor) -> None:
    found = layer()
    if found is not None and weight.grad is not None:
        found.runtime.commit(weight.grad)


def owners(runtime: Runtime) -> list[SparseLayer]:
    """The living layers that share a weight."""
    refs = runtime.__dict__.get("owners", [])
    return [layer for ref in refs if (layer := ref()) is not None]


class SparseLinear(SparseLayer, nn.Linear):
    """A linear layer with a sparse weight; `[..., in_features]` to `[..., out_features]`."""

    base = nn.Linear

    def forward(self, input: Tensor) -> Tensor:
        if self._full:
            return F.linear(input, self.weight, self.bias)
        x, weight, bias = self._operands(input)
        mask, runtime = self.weight_mask, self._runtime
        if not torch.compiler.is_compiling() and runtime.dense and runtime.choose.runs_dense(self, x):
            return self._run_dense(x, weight, bias)
        return ops.linear(x, weight, bias, mask, runtime.handle)

    def run_sparse(self, input: Tensor, relu: bool = False) -> Tensor:
        """`forward` with sparse kernels in every pass, where there are any for the input; then a ReLU."""
        only, sparse = None, getattr(self._runtime.choose, "sparse", None)
        if sparse is not None and not (torch.compiler.is_compiling() or torch.is_autocast_enabled(input.device.type)):
            only = sparse(input, self.weight_mask)
        if only is None:
            out = self.forward(input)
        else:
            x, weight, bias = self._operands(input)
            out = ops.linear(x, weight, bias, self.weight_mask, self._runtime.handle, only)
        return F.relu(out) if relu else out

    def run_joined(self, input: Tensor, relu: bool = False) -> Tensor:
        """`forward` with dense kernels of our own in every pass, where they take the input; then a ReLU."""
        cast = torch.compiler.is_compiling() or torch.is_autocast_enabled(input.device.type)
        if cast or self._full or not DENSE_CPU.takes(input, self.weight):
            out = self.run_dense(input)
        else:
            x, weight, bias = self._operands(input)
            out = ops.linear(x, weight, bias, self.weight_mask, self._runtime.handle, DENSE_CPU)
        return F.relu(out) if relu else out

    def run_dense(self, input: Tensor) -> Tensor:
        """`forward` with dense kernels in every pass, for a weight with a hook that masks its gradient."""
        if torch.compiler.is_compiling() or torch.is_autocast_enabled(input.device.type):
            return F.linear(input, self.weight, self.bias)
        return self._run_dense(input, self.weight, self.bias)

    def _run_dense(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """A large gradient is masked as it is written, a small one by the weight's hook, which costs less then."""
        large = weight.numel() >= _FEWEST_WEIGHTS and weight.requires_grad and torch.is_grad_enabled()
        if large and x.is_cpu and not self._full and not self._runtime.full:
            return ops.dense_linear(x, weight, bias, self.weight_mask, self._runtime.handle)
        return F.linear(x, weight, bias)


class SparseAttentionProjection(SparseLinear, nn.modules.linear.NonDynamicallyQuantizableLinear):
    """The output projection of `nn.MultiheadAttention`, whose weight attention reads without calling the module."""

    base = nn.modules.linear.NonDynamicallyQuantizableLinear


class _SparseConv(SparseLayer, nn.modules.conv._ConvNd):
    def forward(self, input: Tensor) -> Tensor:
        if self._full:
            return super().forward(input)
        x, weight, bias = self._operands(input)
        space = len(self.kernel_size)
        batched = x.dim() == space + 2
        if not batched:
            x = x.unsqueeze(0)
        x, padding = self._pad(x)
        spec = ConvSpec(list(self.stride), padding, list(self.dilation), False, [0] * space, self.groups)
        out = ops.conv(x, weight, bias, self.weight_mask, self.handle, spec)
        return out if batched else out.squeeze(0)

    def _pad(self, x: Tensor) -> tuple[Tensor, list[int]]:
        """Do the padding that the operator does not: modes other than zeros, and uneven `"same"`."""
        amounts: list[int] = self._reversed_padding_repeated_twice
        if self.padding_mode != "zeros":
            return F.pad(x, amounts, mode=self.padding_mode), [0] * len(self.kernel_size)
        before, after = amounts[::-2], amounts[-2::-2]
        if isinstance(self.padding, str) and before != after:
            return F.pad(x, amounts), [0] * len(self.kernel_size)
        return x, list(before) if isinstance(self.padding, str) else list(self.padding)


class SparseConv1d(_SparseConv, nn.Conv1d):
    """A 1-D convolution with a sparse weight."""

    base = nn.Conv1d


class SparseConv2d(_SparseConv, nn.Conv2d):
    """A 2-D convolution with a sparse weight."""

    base = nn.Conv2d


class SparseConv3d(_SparseConv, nn.Conv3d):
    """A 3-D convolution with a sparse weight."""

    base = nn.Conv3d


class _SparseConvTranspose(SparseLayer, nn.modules.conv._ConvTransposeNd):
    transposed = True

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        if self._full:
            return super().forward(input, output_size)
        x, weight, bias = self._operands(input)
        space = len(self.kernel_size)
        batched = x.dim() == space + 2
        if not batched:
            x = x.unsqueeze(0)
        stride, padding, dilation = list(self.stride), [int(p) for p in self.padding], list(self.dilation)
        extra = self._output_padding(input, output_size, stride, padding, list(self.kernel_size), space, dilation)
        spec = ConvSpec(stride, padding, dilation, True, list(extra), self.groups)
        out = ops.conv(x, weight, bias, self.weight_mask, self.handle, spec)
        return out if batched else out.squeeze(0)


class SparseConvTranspose1d(_SparseConvTranspose, nn.ConvTranspose1d):
    """A transposed 1-D convolution with a sparse weight."""

    base = nn.ConvTranspose1d


class SparseConvTranspose2d(_SparseConvTranspose, nn.ConvTranspose2d):
    """A transposed 2-D convolution with a sparse weight."""

    base = nn.ConvTranspose2d


class SparseConvTranspose3d(_SparseConvTranspose, nn.ConvTranspose3d):
    """A transposed 3-D convolution with a sparse weight."""

    base = nn.ConvTranspose3d


SPARSE: dict[type[nn.Module], type[SparseLayer]] = {
    kind.base: kind
    for kind in (
        SparseLinear,
        SparseAttentionProjection,
        SparseConv1d,
        SparseConv2d,
        SparseConv3d,
        SparseConvTranspose1d,
        SparseConvTranspose2d,
        SparseConvTranspose3d,
    )
}


def convert_(layer: nn.Module, mask: Tensor, runtime: Runtime, *, full: bool = False) -> SparseLayer:
    """Make a torch layer sparse in place.

    Args:
        layer: An instance of exactly one of the classes in `SPARSE`.
        mask: Bool, of the weight's shape.
        runtime: New, or that of the layer it shares its weight with.
        full: Whether the layer stays dense for good, as at density 1.0; it then runs torch's own forward.
    Returns:
        The same object.
    Raises:
        LayerError: the layer has an attribute of its own that sparsefx needs.
    """
    for name in (MASK, "_runtime", "_full", "_hooks", "_bound"):
        if name in layer.__dict__ or name in layer._buffers or name in layer._parameters:
            raise LayerError(f"{runtime.name}: expected no attribute {name!r}, got one; rename it")
    layer.__class__ = SPARSE[type(layer)]
    assert isinstance(layer, SparseLayer)
    if is_channels_last(layer.weight):  # kernels walk weight, gradient and mask side by side
        mask = mask.contiguous(memory_format=torch.channels_last)
    layer.register_buffer(MASK, mask)
    layer.__dict__.update(_runtime=runtime, _full=full)
    layer._bind()
    layer.zero_missing_()
    return layer


def revert_(layer: SparseLayer) -> nn.Module:
    """Turn a sparse layer back into torch's own class in place; the weight keeps its zeros."""
    layer._unhook()
    for name in ("_runtime", "_full", "_bound"):
        del layer.__dict__[name]
    del layer._buffers[MASK]
    layer._non_persistent_buffers_set.discard(MASK)
    layer.__class__ = layer.base  # pyright: ignore[reportAttributeAccessIssue]
    return layer


def sparse_layers(model: nn.Module) -> Iterator[tuple[str, SparseLayer]]:
    """Sparse layers by name, one for each weight: of layers that share one, the first."""
    seen: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, SparseLayer) and id(module.runtime) not in seen:
            seen.add(id(module.runtime))
            yield name, module
