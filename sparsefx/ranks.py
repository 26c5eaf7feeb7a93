"""The ranks that train copies or shards of one model: what they reduce, and the check that they agree."""

from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sparsefx.errors import DistributedError

PATIENCE = 45.0
"""Seconds to wait for the other ranks. They come from the same backward pass, so more means that one is gone."""
_MIXER = -7046029254386353131
"""An odd 64-bit constant (2^64 over the golden ratio): products with it spread over all bits."""

Products = dict[str, tuple[float, float]]


class Ranks:
    """Collectives over the ranks that hold the same model; without other ranks they cost nothing.

    Args:
        group: The process group; None is the default one where torch.distributed is initialized.
    """

    def __init__(self, group: Any = None) -> None:
        self.group = group
        ready = dist.is_available() and dist.is_initialized()
        self.world = dist.get_world_size(group) if ready else 1
        self.rank = dist.get_rank(group) if ready else 0

    @property
    def several(self) -> bool:
        """Whether there are other ranks."""
        return self.world > 1

    def mean(self, tensor: Tensor) -> Tensor:
        """Average over the ranks, in place where there are several."""
        if self.several:
            self._wait(lambda: dist.all_reduce(tensor, group=self.group, async_op=True))
            tensor.div_(self.world)
        return tensor

    def mean_products(self, products: Mapping[str, tuple[float, float]], names: Sequence[str]) -> Products:
        """Products of the mean gradient, as `moments.scale_seen` compares them, by layer; one small all-reduce.

        Args:
            products: Of this rank's gradient; layers without one are left out.
            names: The layers that all ranks speak of.
        """
        if not self.several or not names:
            return dict(products)
        rows = [products.get(name, (0.0, 0.0)) for name in names]
        mean = self.mean(torch.tensor(rows, dtype=torch.float64, device=self._device()))
        return {name: (one, other) for name, (one, other) in zip(names, mean.tolist(), strict=True)}

    def agree(self, tensors: Mapping[str, Sequence[Tensor]], when: str, remedy: str) -> None:
        """Check that tensors are the same to the bit on every rank, by a hash of each.

        Args:
            tensors: By name of the layer.
            when: What has just happened, for the error.
            remedy: What to do about it, for the error.
        Raises:
            DistributedError: naming layers and ranks.
        """
        if not self.several:
            return
        device = self._device()
        mine = torch.stack([fingerprint(t).to(device) for group in tensors.values() for t in group])
        found = [torch.empty_like(mine) for _ in range(self.world)]
        self._wait(lambda: dist.all_gather(found, mine, group=self.group, async_op=True))
        prints = torch.stack(found).cpu()
        differs = (prints != prints[0]).view(self.world, len(tensors), -1).any(-1)
        if bool(differs.any()):
            rows = {
                name: [rank for rank in range(self.world) if differs[rank, i]]
                for i, name in enumerate(tensors)
                if differs[:, i].any()
            }
            layers = "; ".join(f"{name} on ranks {ranks}" for name, ranks in rows.items())
            raise DistributedError(
                f"{when}: expected the same masks and weights on all {self.world} ranks, got others than on rank 0: "
                f"{layers}; {remedy}"
            )

    def _device(self) -> torch.device:
        """Where small tensors go: the backend may take no other."""
        cuda = "nccl" in str(dist.get_backend(self.group))
        return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")

    def _wait(self, start: Callable[[], Any]) -> None:
        """Run a collective, or say that a rank is gone."""
        try:
            start().wait(timeout=timedelta(seconds=PATIENCE))
        except (RuntimeError, ValueError) as error:
            raise DistributedError(
                f"rank {self.rank}: expected all {self.world} ranks at a mask update, lost at least one "
                f"({type(error).__name__}: {str(error).splitlines()[0]}); restart from the last checkpoint"
            ) from error


def fingerprint(tensor: Tensor) -> Tensor:
    """A 64-bit hash of a tensor's bits and their places, as a tensor of one number; the device is not waited for."""
    flat = tensor.detach().reshape(-1)
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = flat.view(kinds[flat.element_size()]).to(torch.int64)
    places = torch.arange(1, 2 * len(bits), 2, device=flat.device)
    mixed = (bits + 1) * (places * _MIXER)
    return (mixed ^ (mixed >> 29)).sum()
