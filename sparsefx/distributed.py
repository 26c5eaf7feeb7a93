"""Data-parallel training: gradients of existing weights alone cross the wire, and masks never do."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket
from torch.nn.parallel import DistributedDataParallel

from sparsefx.errors import LayerError
from sparsefx.layers import MASK, SparseLayer, sparse_layers
from sparsefx.specialize import Plan, plan_of

_IGNORED = "_ddp_params_and_buffers_to_ignore"


def ignore_masks(module: nn.Module) -> None:
    """Keep DistributedDataParallel from broadcasting the masks at each forward; every rank computes the same ones.

    `sparsify` does it for the model itself. Call it on the module that is wrapped, where the sparse model is a part of
    that one.

    Args:
        module: What will be wrapped; not yet wrapped.
    """
    masks = {f"{name}.{MASK}".lstrip(".") for name, _ in _every_sparse_layer(module)}
    setattr(module, _IGNORED, sorted({*getattr(module, _IGNORED, ()), *masks}))


def sparse_all_reduce(model: DistributedDataParallel) -> "SparseAllReduce":
    """Let DistributedDataParallel send the gradients of existing weights alone, with the same results.

    Call it once, before the first backward, on every rank.

    Returns:
        The hook's state, which counts the bytes.
    Raises:
        LayerError: the wrapped model has no sparse layers.
    Example:
        >>> model = DistributedDataParallel(sparsefx.sparsify(net, density=0.05))
        >>> sparsefx.distributed.sparse_all_reduce(model)
    """
    state = SparseAllReduce(model)
    model.register_comm_hook(state, _reduce)
    return state


class SparseAllReduce:
    """State of the communication hook of `sparse_all_reduce`.

    Attributes:
        sent: Bytes of gradients handed to all-reduce so far.
        dense: What they would have been without the masks.
    """

    def __init__(self, model: DistributedDataParallel) -> None:
        self.layers = {id(layer.weight): layer for _, layer in sparse_layers(model.module) if not layer.full}
        if not self.layers:
            raise LayerError(
                f"{type(model.module).__name__}: expected a model with sparse layers, got none; wrap a sparsified one"
            )
        self.group = model.process_group
        self.sent = 0
        self.dense = 0
        self._known: dict[tuple[int, ...], tuple[list[Plan], Tensor]] = {}

    def existing(self, bucket: GradBucket) -> Tensor | None:
        """Places in the bucket's buffer that hold gradients of existing weights; None if all do."""
        parameters, buffer = bucket.parameters(), bucket.buffer()
        plans = [plan_of(self.layers[id(p)]) for p in parameters if id(p) in self.layers]
        if not plans:
            return None
        key = tuple(id(p) for p in parameters)
        known = self._known.get(key)
        if known is None or any(old is not new for old, new in zip(known[0], plans, strict=True)):
            start = buffer.storage_offset()
            parts = []
            for parameter, grad in zip(parameters, bucket.gradients(), strict=True):
                first, layer = grad.storage_offset() - start, self.layers.get(id(parameter))
                if layer is None:
                    parts.append(torch.arange(first, first + grad.numel(), device=buffer.device))
                else:
                    parts.append(first + _places(layer.weight_mask, parameter))
            known = self._known[key] = plans, torch.cat(parts)
        return known[1]


def _places(mask: Tensor, parameter: Tensor) -> Tensor:
    """Where existing weights lie in memory: buckets keep the strides of dense parameters."""
    strides = torch.tensor(parameter.stride(), device=mask.device)
    return (mask.nonzero() * strides).sum(1).sort().values


def _reduce(state: SparseAllReduce, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
    buffer, places = bucket.buffer(), state.existing(bucket)
    values = buffer if places is None else buffer[places]
    state.sent += values.numel() * values.element_size()
    state.dense += buffer.numel() * buffer.element_size()
    values.div_(dist.get_world_size(state.group))
    work = dist.all_reduce(values, group=state.group, async_op=True)
    assert work is not None

    def put(future: torch.futures.Future) -> Tensor:
        mean = future.value()[0]
        return mean if places is None else buffer.index_copy_(0, places, mean)

    return work.get_future().then(put)


def _every_sparse_layer(module: nn.Module) -> list[tuple[str, SparseLayer]]:
    """Sparse layers by every name that they have, those that share a weight too."""
    found = module.named_modules(remove_duplicate=False)
    return [(name, layer) for name, layer in found if isinstance(layer, SparseLayer)]
