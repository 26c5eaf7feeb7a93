"""`python -m sparsefx bench`: layers, then whole networks, each in a process of its own."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from sparsefx.bench import cuda
from sparsefx.bench.layers import trained_layers
from sparsefx.bench.model import PARTS, Request, bench_model
from sparsefx.bench.report import markdown, plot, save, text
from sparsefx.bench.settings import PROMISED, SETTINGS, machine
from sparsefx.bench.trainers import Masks, load
from sparsefx.errors import SparsefxError
from sparsefx.kernels.bench import LAYERS, PassResult, bench_layers, clustered

ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "8589934592",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "THP_MEM_ALLOC_ENABLE": "1",
}
"""Keeps large tensors from being page-faulted anew at each call, for dense and sparse alike."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `bench`."""
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--models", nargs="*", choices=["all", *SETTINGS], default=[], metavar="MODEL",
                        help=f"networks to train: all, or some of {', '.join(SETTINGS)}")  # fmt: skip
    parser.add_argument("--layers", action="store_true", help="single layers; the default without --models")
    parser.add_argument("--densities", nargs="+", type=float, default=[], help="instead of each network's own")
    parser.add_argument("--batches", nargs="+", type=int, default=[], help="instead of each network's own")
    parser.add_argument("--threads", nargs="+", type=int, default=[torch.get_num_threads()])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS[:-1]), help="what to time of a network")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out of the dense baselines")
    parser.add_argument(
        "--rounds", type=int, default=9, help="turns of each: one call, or as many short ones as 50 ms hold"
    )
    masks = parser.add_mutually_exclusive_group()
    masks.add_argument("--random", action="store_true", help="random masks (the default)")
    masks.add_argument("--clustered", type=int, metavar="H", help="masks in columns of H output channels")
    masks.add_argument("--trained", type=Path, metavar="FILE", help="masks and weights of examples/cifar10.py --save")
    parser.add_argument("--json", type=Path, help="write the rows here, after each network")
    parser.add_argument("--saved", nargs="+", type=Path, metavar="FILE", default=[],
                        help="rows of earlier runs on this machine (--json), put before those timed now")  # fmt: skip
    parser.add_argument(
        "--plot", type=Path, metavar="PNG", help="draw the rows; needs matplotlib, on cuda writes SVG without"
    )
    parser.add_argument(
        "--interpret", action="store_true", help="with --device cuda: toy sizes in Triton's interpreter"
    )
    parser.add_argument("--row", help=argparse.SUPPRESS)


def run(args: argparse.Namespace, reexecute: bool) -> None:
    """Do what the options say.

    Args:
        reexecute: Whether the process may start itself anew with the allocator's settings.
    Raises:
        SparsefxError: a device that there are no kernels for; saved rows of another machine.
    """
    if args.device == "cuda":
        cuda.run(args)
        return
    if reexecute and any(os.environ.get(name) != value for name, value in ALLOCATOR.items()):
        os.execve(sys.executable, [sys.executable, "-m", "sparsefx", *sys.argv[1:]], {**os.environ, **ALLOCATOR})
    if args.row:
        _one(args)
        return
    results: dict[str, Any] = {"machine": machine() | {"threads": args.threads}}
    results["rows"] = [row for path in args.saved for row in _saved(path, results["machine"])]
    if args.saved:
        _keep(args, results)
    if args.layers or not (args.models or args.saved):
        results["layers"] = [asdict(row) for row in _layers(args)]
        _keep(args, results)
    for job in jobs(args):
        print(f"{job['model']}: batch {job['batch']}, density {job['density']:g}, {job['threads']} threads", flush=True)
        row = _in_process(args, job)
        results["rows"].append(row)
        print(text(row), flush=True)
        _keep(args, results)
    if results["rows"]:
        print(markdown(results["rows"]))


def _layers(args: argparse.Namespace) -> list[PassResult]:
    layers, masks = LAYERS, None
    if args.trained:
        layers, masks = trained_layers(args.trained)
    elif args.clustered:
        masks = clustered(args.clustered, layers)
    return bench_layers(layers, masks, threads=args.threads[-1], rounds=args.rounds)


def _saved(path: Path, here: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of an earlier run.

    Raises:
        SparsefxError: it was on another machine, so that its times do not compare.
    """
    found = json.loads(path.read_text())
    same = ("cpu", "cores", "isa", "torch")
    if any(found["machine"][key] != here[key] for key in same):
        expected, got = ({key: of[key] for key in same} for of in (here, found["machine"]))
        raise SparsefxError(f"{path}: expected times of this machine, {expected}, got {got}; time it again here")
    return found["rows"]


def _keep(args: argparse.Namespace, results: dict[str, Any]) -> None:
    if args.json:
        save(args.json, results)
    if args.plot and results.get("rows"):
        plot(results["rows"], args.plot)


def jobs(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One entry a process: every network at every number of threads, batch size and density asked for."""
    names = PROMISED if "all" in args.models else args.models
    if args.trained and args.models:
        names = [load(args.trained)["model"]]
    return [
        {"model": name, "threads": threads, "batch": batch, "density": density}
        for name in names
        for threads in args.threads
        for batch in args.batches or [SETTINGS[name].batch]
        for density in args.densities or [SETTINGS[name].density]
    ]


def _in_process(args: argparse.Namespace, job: dict[str, Any]) -> dict[str, Any]:
    """Run one job in a new process, so that memory and failures of one network leave the next alone."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "row.json"
        options = [
            "--models", job["model"], "--threads", str(job["threads"]), "--rounds", str(args.rounds),
            "--parts", *args.parts, "--row", json.dumps(job), "--json", str(out),
        ]  # fmt: skip
        options += ["--no-compile"] if args.no_compile else []
        options += ["--clustered", str(args.clustered)] if args.clustered else []
        options += ["--trained", str(args.trained)] if args.trained else []
        environment = {**os.environ, **ALLOCATOR, "OMP_NUM_THREADS": str(job["threads"])}
        command = [sys.executable, "-m", "sparsefx", "bench", *options]
        done = subprocess.run(command, env=environment, check=False)
        if done.returncode or not out.exists():
            return {**job, "masks": _masks(args).kind, "error": f"its process ended with {done.returncode}"}
        return json.loads(out.read_text())


def _one(args: argparse.Namespace) -> None:
    job = json.loads(args.row)
    torch.set_num_threads(job["threads"])
    request = Request(
        batch=job["batch"],
        density=job["density"],
        masks=_masks(args),
        parts=args.parts,
        rounds=args.rounds,
        compiled=not args.no_compile,
    )
    start = time.perf_counter()
    row = bench_model(
        SETTINGS[job["model"]],
        request,
        say=lambda line: print(f"  [{time.perf_counter() - start:5.0f} s] {line}", file=sys.stderr, flush=True),
    )
    save(args.json, {**row, "threads": job["threads"], "seconds": time.perf_counter() - start})


def _masks(args: argparse.Namespace) -> Masks:
    return Masks(rows=args.clustered or 1, checkpoint=args.trained)
