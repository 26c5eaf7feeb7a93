"""Ordinary torch layers with fewer channels, and the exact treatment of the constants that are left out."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparsefx.graph.channels import Channels
from sparsefx.graph.links import Layer, Links


def slice_layer(layer: Layer, inputs: Channels | None, keep_in: Tensor, keep_out: Tensor) -> nn.Module:
    """Return a Conv or Linear layer with some of its channels.

    Constant input channels that are left out are folded into the bias, which is created if need be; where borders
    forbid that, they are merged into a constant channel that stays.

    Args:
        layer: A plain layer.
        inputs: The channels of its input, None where they are opaque.
        keep_in, keep_out: Bool `[I]` and `[O]`; whole groups if there are several.
    """
    links = Links(layer)
    const = torch.full((links.ins,), float("nan"), dtype=torch.float64) if inputs is None else inputs.const
    gone = torch.where(keep_in, 0, const.nan_to_num())
    weight, bias = layer.weight.detach(), links.bias
    if links.uniform:
        bias = bias + links.amount(gone)
    elif links.groups == 1 and gone.any():
        weight = _merge(weight, dim=0 if links.transposed else 1, const=const.nan_to_num(), keep=keep_in)
    rows, columns = (keep_in, keep_out) if links.transposed else (keep_out, keep_in)
    weight = weight[rows.to(weight.device)]
    if links.groups == 1:
        weight = weight[:, columns.to(weight.device)]
    tensors = {"weight": _like(weight, layer.weight)}
    if layer.bias is not None or bias[keep_out].any():
        tensors["bias"] = _like(bias[keep_out], layer.weight if layer.bias is None else layer.bias)
    ins, outs = int(keep_in.sum()), int(keep_out.sum())
    if isinstance(layer, nn.Linear):
        return _rebuild(layer, tensors, in_features=ins, out_features=outs)
    groups = int(keep_out.view(links.groups, -1).any(1).sum())
    return _rebuild(layer, tensors, in_channels=ins, out_channels=outs, groups=groups)


def _merge(weight: Tensor, dim: int, const: Tensor, keep: Tensor) -> Tensor:
    """Let the largest constant that stays stand for those that go.

    Padding surrounds every channel with the same zeros, so constants of one layer differ by a factor everywhere.
    """
    stays = torch.where(keep, const.abs(), 0)
    if not stays.any():
        return weight
    main = int(stays.argmax())
    gone = (~keep & const.ne(0)).nonzero().flatten()
    shape = [-1 if d == dim else 1 for d in range(weight.dim())]
    merged = weight.to("cpu", torch.float64, copy=True)
    factors = (const[gone] / const[main]).view(shape)
    merged.select(dim, main).add_((merged.index_select(dim, gone) * factors).sum(dim))
    return merged


def slice_channels(module: nn.Module, keep: Tensor) -> nn.Module:
    """Return a module whose tensors have one number per channel, such as BatchNorm, for some of its channels.

    Args:
        module: A plain module without children; tensors of another shape than `[C]` stay as they are.
        keep: Bool `[C]`.
    """
    tensors = {
        name: _like(tensor.detach()[keep.to(tensor.device)], tensor)
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        if tensor.shape == keep.shape
    }
    names = (name for name in ("num_features", "num_parameters") if getattr(module, name, None) == len(keep))
    return _rebuild(module, tensors, **dict.fromkeys(names, int(keep.sum())))


def slice_tensor(tensor: Tensor, axis: int, keep: Tensor) -> Tensor:
    """Return a parameter or buffer with the entries `keep`, bool `[C]`, along a dimension."""
    return _like(tensor.detach().index_select(axis, keep.nonzero().flatten().to(tensor.device)), tensor)


def _like(tensor: Tensor, model: Tensor) -> Tensor:
    """Make a tensor a parameter or buffer as `model` is one, of its type and on its device."""
    tensor = tensor.to(model.device, model.dtype).contiguous()
    return nn.Parameter(tensor, model.requires_grad) if isinstance(model, nn.Parameter) else tensor


def _rebuild(module: nn.Module, tensors: Mapping[str, Tensor], **sizes: Any) -> nn.Module:
    """Return a copy of a module with other sizes and some other tensors."""
    new = copy.copy(module)
    new._parameters = {name: tensors.get(name, old) for name, old in module._parameters.items()}  # pyright: ignore
    new._buffers = {name: tensors.get(name, old) for name, old in module._buffers.items()}
    for name, size in sizes.items():
        setattr(new, name, size)
    return new
