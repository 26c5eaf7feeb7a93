"""`python -m sparsefx tune`: fill the table from a layer's shape, type and density to a kernel configuration."""

import argparse
from pathlib import Path

import torch

from sparsefx.errors import SparsefxError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `tune`."""
    parser.add_argument("--out", type=Path, default=Path("table.json"), help="table to write; an existing one is kept")
    parser.add_argument("--density", type=float, default=0.05)
    parser.add_argument("--rows", nargs="+", type=int, default=[8, 16, 32, 64, 128], help="rows of a tile")
    parser.add_argument("--layers", nargs="*", default=[], help="names of benchmark layers that contain one of these")


def run(args: argparse.Namespace) -> None:
    """Do what the options say.

    Raises:
        SparsefxError: there is no CUDA device.
    """
    if not torch.cuda.is_available():
        raise SparsefxError(
            "tune: expected a CUDA device, got none; it measures kernels on the device that will run them. Start it "
            "there with a CUDA build of torch"
        )
    from sparsefx.kernels.gpu.cases import LAYERS
    from sparsefx.kernels.gpu.config import Table
    from sparsefx.kernels.gpu.tune import tune

    layers = [layer for layer in LAYERS if not args.layers or any(name in layer.name for name in args.layers)]
    table = Table.load(args.out.read_text()) if args.out.exists() else Table()
    tune(layers, torch.device("cuda"), rows=args.rows, density=args.density, table=table).save(args.out)
    print(f"wrote {args.out}; it ships as kernels/gpu/table.json")
