"""Times of calls on a CUDA device, in turn, eager and as CUDA graphs; on the CPU, of the interpreter."""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

_FLUSH_BYTES = 256 << 20

Calls = dict[str, Callable[[], Any]]


def medians(calls: Calls, device: torch.device, rounds: int) -> dict[str, float]:
    """Median milliseconds of each call, run in turn, each after the device's cache was overwritten."""
    if device.type != "cuda":
        return {name: statistics.median(_host(call) for _ in range(rounds)) for name, call in calls.items()}
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device)
    for call in calls.values():
        call()
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            pair = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            flush.zero_()
            pair[0].record()
            call()
            pair[1].record()
            events[name].append(pair)
    torch.cuda.synchronize(device)
    return {name: statistics.median(a.elapsed_time(b) for a, b in pairs) for name, pairs in events.items()}


def _host(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def with_graphs(calls: Calls, device: torch.device) -> Calls:
    """Each call, and on a CUDA device also a replay of its captured graph."""
    if device.type != "cuda":
        return calls
    return calls | {f"{name} graph": captured(call) for name, call in calls.items()}


def captured(call: Callable[[], Any]) -> Callable[[], None]:
    """The replay of a CUDA graph of `call`."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


@contextmanager
def fp32_precision(value: str) -> Iterator[None]:
    """Set how torch computes fp32 products, "ieee" or "tf32"."""
    switches: tuple[Any, ...] = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)  # pyright: ignore[reportAttributeAccessIssue]
    before = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = value
        yield
    finally:
        for switch, old in zip(switches, before, strict=True):
            switch.fp32_precision = old
