"""The command line: `python -m sparsefx bench`."""

import argparse
import os
import sys
from pathlib import Path

import torch

from sparsefx.errors import SparsefxError
from sparsefx.kernels.bench import bench_layers

ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "8589934592",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "THP_MEM_ALLOC_ENABLE": "1",
}
"""Keeps large tensors from being page-faulted anew at each call, for dense and sparse alike."""


def main(argv: list[str] | None = None) -> None:
    """Run a command of `python -m sparsefx`."""
    parser = argparse.ArgumentParser(prog="python -m sparsefx", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    bench = commands.add_parser("bench", help="time the sparse kernels against the best dense ones, layer by layer")
    bench.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    bench.add_argument("--threads", type=int, default=torch.get_num_threads())
    bench.add_argument("--rounds", type=int, default=7, help="timed calls of each kernel")
    bench.add_argument("--json", type=Path, help="write the rows here")
    args = parser.parse_args(argv)
    if args.device == "cuda":
        raise SparsefxError("bench: expected --device cpu, got cuda; there are no GPU kernels yet")
    if argv is None and any(os.environ.get(name) != value for name, value in ALLOCATOR.items()):
        os.execve(sys.executable, [sys.executable, "-m", "sparsefx", *sys.argv[1:]], {**os.environ, **ALLOCATOR})
    bench_layers(threads=args.threads, rounds=args.rounds, json_path=args.json)


if __name__ == "__main__":
    main()
