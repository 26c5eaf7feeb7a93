"""Run a function on several ranks: processes with a gloo group, forked from a server that has imported torch."""

import functools
import multiprocessing
import os
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

LIMIT = 60.0
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch._dynamo", "torch.nn.parallel", "numpy", "pytest", "sparsefx"])


@dataclass
class Outcome:
    """What became of a rank.

    Attributes:
        value: What the function returned.
        error: The traceback, where it raised.
        code: Exit code, negative where a signal ended the process.
        seconds: From start to end.
    """

    value: Any
    error: str
    code: int | None
    seconds: float


def run(function: Callable[..., Any], *args: Any, ranks: int = 2) -> list[Any]:
    """Results of `function(rank, *args)` by rank; an error on any is an error here."""
    outcomes = launch(function, *args, ranks=ranks)
    problems = [f"rank {rank}: code {o.code}\n{o.error}" for rank, o in enumerate(outcomes) if o.error or o.code]
    assert not problems, "\n".join(problems)
    return [outcome.value for outcome in outcomes]


@functools.cache
def _warm() -> None:
    """Let the server import torch before any clock runs."""
    process = _CONTEXT.Process(target=time.monotonic)
    process.start()
    process.join()


def start(function: Callable[..., Any], *args: Any) -> Any:
    """A process that runs a function, without a group."""
    _warm()
    process = _CONTEXT.Process(target=function, args=args)
    process.start()
    return process


def launch(function: Callable[..., Any], *args: Any, ranks: int = 2) -> list[Outcome]:
    """What becomes of each rank; one that is not done after `LIMIT` seconds is killed."""
    _warm()
    with tempfile.TemporaryDirectory() as folder:
        begun = time.monotonic()
        processes = [start(_rank, function, rank, ranks, folder, args) for rank in range(ranks)]
        outcomes = []
        for rank, process in enumerate(processes):
            process.join(max(0.0, begun + LIMIT - time.monotonic()))
            late = process.is_alive()
            if late:
                process.kill()
                process.join()
            outcomes.append(_outcome(Path(folder), rank, process.exitcode, late))
        return outcomes


def _outcome(folder: Path, rank: int, code: int | None, late: bool) -> Outcome:
    path = folder / f"{rank}.pt"
    if late or not path.exists():
        return Outcome(None, f"not done after {LIMIT} s" if late else "", code, LIMIT)
    value, error, seconds = torch.load(path, weights_only=False)
    return Outcome(value, error, code, seconds)


def _rank(function: Callable[..., Any], rank: int, ranks: int, folder: str, args: tuple) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("error")
    begun, value, error = time.monotonic(), None, ""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    try:
        value = function(rank, *args)
    except Exception:
        error = traceback.format_exc()
    torch.save((value, error, time.monotonic() - begun), f"{folder}/{rank}.tmp")
    Path(f"{folder}/{rank}.tmp").rename(f"{folder}/{rank}.pt")
    if not error:
        dist.destroy_process_group()


def as_torchrun(rank: int) -> None:
    """Tell this rank's libraries, through the environment, that torchrun has launched it."""
    world = str(dist.get_world_size())
    names = {"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0", "WORLD_SIZE": world}
    os.environ.update(names, LOCAL_WORLD_SIZE=world, MASTER_ADDR="localhost", MASTER_PORT="0", TORCHELASTIC_RUN_ID="it")
