"""Tensors that ranks share out between them (`fully_shard` makes DTensors of parameters): whole ones and own parts."""

import functools

from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor."""
    return _shards(type(tensor))


@functools.cache
def _shards(kind: type[Tensor]) -> bool:
    return hasattr(kind, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """The tensor with the parts of all ranks; they call it together."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # pyright: ignore[reportAttributeAccessIssue]


def part(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, sharing its memory."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # pyright: ignore[reportAttributeAccessIssue]


def shared_like(full: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, which every rank has, shared out as `like` is; nothing is sent."""
    if not is_sharded(like):
        return full
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    return distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None)


def part_like(full: Tensor, like: Tensor) -> Tensor:
    """What this rank would hold of a whole tensor, were it shared out as `like` is; nothing is sent."""
    return part(shared_like(full, like))


def mean_part_like(mine: Tensor, like: Tensor) -> Tensor:
    """This rank's part of the mean of whole tensors, one from each rank; they call it together."""
    from torch.distributed.tensor import DTensor, Partial

    assert isinstance(like, DTensor)
    mesh = like.device_mesh
    summed = DTensor.from_local(mine, mesh, [Partial()] * mesh.ndim, run_check=False)
    return summed.redistribute(placements=like.placements).to_local() / mesh.size()
