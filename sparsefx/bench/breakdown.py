"""Where a training step goes, by kind of work, through torch's profiler."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.profiler import ProfilerActivity, profile, record_function

from sparsefx.bench.trainers import Trainer
from sparsefx.kernels.cpu import CompilerUnavailable
from sparsefx.kernels.cpu.abi import load
from sparsefx.kernels.cpu.calls import Calls

KINDS = {
    "optimizer and masks": ("Optimizer.",),
    "dense convolutions": (
        "sfx_conv_dense_wgrad",
        "aten::mkldnn_convolution",
        "aten::convolution",
        "aten::thnn_conv",
        "mkldnn_convolution",
    ),
    "dense products": (
        "sfx_linear_dense",
        "aten::addmm",
        "aten::mm",
        "aten::linear",
        "aten::bmm",
        "aten::matmul",
    ),
    "sparse kernels": ("sfx_conv_gather", "sfx_conv_wgrad", "sfx_conv_pixels", "sfx_linear"),
    "normalization": ("sfx_norm", "aten::native_batch_norm", "aten::batch_norm"),
    "weights in and out": ("sfx_layer_collect", "sfx_layer_scatter"),
    "lists": ("sfx_layer_new", "sfx_layer_tiling"),
    "layout copies": ("sfx_convert", "aten::copy_", "aten::clone", "aten::contiguous", "aten::_to_copy"),
    "pooling": (
        "sfx_max_pool",
        "aten::max_pool2d",
        "aten::avg_pool2d",
        "aten::adaptive",
        "aten::_adaptive",
        "aten::mean",
    ),
    "elementwise": (
        "sfx_add",
        "sfx_relu_backward",
        "sfx_channel_sums",
        "sfx_column_sums",
        "aten::relu",
        "aten::clamp_min",
        "aten::threshold",
        "aten::add",
        "aten::masked_fill",
        "aten::mul",
        "aten::native_dropout",
        "aten::bernoulli",
        "aten::div",
    ),
}
"""Prefixes of the names of events, by kind. An event counts where its nearest named ancestor does; the rest is rest."""


def breakdown(trainer: Trainer, steps: int = 3) -> dict[str, float]:
    """Milliseconds of a step by kind of work; `"rest"` is everything else, Python included."""
    trainer.step()  # its memory is that of another trainer's steps, or new
    with _native_calls(), profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler:
        for _ in range(steps):
            with record_function("sparsefx step"):
                trainer.step()
    spent = dict.fromkeys([*KINDS, "rest"], 0.0)
    for event in profiler.events() or ():
        if _inside(event, "sparsefx step"):
            spent[_kind(event)] += event.self_cpu_time_total / 1e3 / steps
    return {kind: value for kind, value in spent.items() if value > 0}


def _ancestors(event: Any) -> Iterator[Any]:
    while event is not None:
        yield event
        event = event.cpu_parent


def _inside(event: Any, name: str) -> bool:
    return any(one.name == name for one in _ancestors(event))


def _kind(event: Any) -> str:
    names = [one.name for one in _ancestors(event)]
    if any(name.startswith("Optimizer.") for name in names):
        return "optimizer and masks"
    for name in names:
        for kind, prefixes in KINDS.items():
            if name.startswith(prefixes):
                return kind
    return "rest"


@contextmanager
def _native_calls() -> Iterator[None]:
    """Let the profiler see the kernels, which are called through a plain C interface."""
    try:
        library = load()
    except CompilerUnavailable:
        yield
        return
    wrapped = {name: value for name, value in vars(library).items() if name.startswith("sfx_")}
    del wrapped["sfx_run"]  # whose calls are seen one by one

    def seen(name: str, call: Callable) -> Callable:
        @functools.wraps(call, assigned=())
        def run(*args: Any) -> Any:
            with record_function(name):
                return call(*args)

        return run

    try:
        for name, call in wrapped.items():
            setattr(library, name, seen(name, call))
        Calls.watch = record_function
        yield
    finally:
        Calls.watch = None
        for name, call in wrapped.items():
            setattr(library, name, call)
