"""Memory of a training step: activations kept for backward, and what sparse training adds to the weights."""

import ctypes
from typing import Any

import torch
from torch import Tensor

from sparsefx.bench.trainers import Trainer
from sparsefx.kernels.sparse_cpu import SparseCpu
from sparsefx.layers import SparseLayer
from sparsefx.scheduler import Scheduler


def activation_bytes(trainer: Trainer) -> int:
    """Bytes that autograd holds between forward and backward: storages of saved tensors, each once.

    Parameters, buffers and the batch are not counted: they are there anyway.
    """
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = trainer.forward()
    others = [*trainer.model.parameters(), *trainer.model.buffers(), trainer.images, trainer.labels]
    for other in others:
        saved.pop(other.untyped_storage().data_ptr(), None)
    loss.backward()
    trainer.optimizer.zero_grad()
    return sum(saved.values())


def sparse_bytes(trainer: Trainer) -> dict[str, Any]:
    """Bytes beside weights and activations, by what they hold.

    `masks` are the model's and the plans' copies, `collected` the gradients of missing weights kept in the window,
    `lists` what the kernels walk (None where the C library cannot say how much it holds).
    """
    scheduler = trainer.scheduler
    layers = list(scheduler.layers.values())
    masks = sum(layer.weight_mask.nbytes + scheduler.specializer.plan(layer).mask.nbytes for layer in layers)
    collected = sum(layer.weight.numel() * 4 for layer in layers if layer.runtime.collecting)
    lists = [_list_bytes(scheduler, layer) for layer in layers]
    known = [count for count in lists if count is not None]
    return {"masks": masks, "collected": collected, "lists": sum(known) if len(known) == len(lists) else None}


def _list_bytes(scheduler: Scheduler, layer: SparseLayer) -> int | None:
    """Heap that the lists of one layer's sparse passes take: what building them once more adds."""
    before = heap_in_use()
    if before is None:
        return None
    kept = []
    for kind, shape, spec in scheduler.specializer.calls(layer, "sparse"):
        backend = SparseCpu(layer.weight_mask, spec)
        if spec is None:
            plan, where = backend.linear, (1, 1, shape[:-1].numel())
        else:
            plan, where = backend.conv, (shape[2], shape[3], spec.images or shape[0])
        plan.tiling(kind, *where)
        kept.append(backend)
    after = heap_in_use()
    return None if after is None else max(0, after - before)


class _Mallinfo2(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keep",
        )
    )


def heap_in_use() -> int | None:
    """Bytes that the C library has handed out; None without glibc 2.33 or newer."""
    try:
        mallinfo2 = ctypes.CDLL(None).mallinfo2
    except (OSError, AttributeError):
        return None
    mallinfo2.restype = _Mallinfo2
    info = mallinfo2()
    return info.uordblks + info.hblkhd
