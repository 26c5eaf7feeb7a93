"""The command line of the kernels: `python -m sparsefx.kernels aot`."""

import argparse
import sys
from pathlib import Path


def main(argv: list[str] | None = None) -> None:
    """Run a command of `python -m sparsefx.kernels`."""
    parser = argparse.ArgumentParser(prog="python -m sparsefx.kernels", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    aot = commands.add_parser("aot", help="compile every GPU kernel without a GPU and report registers, spills, wgmma")
    aot.add_argument("--target", nargs="+", choices=["sm_80", "sm_90"], default=["sm_80", "sm_90"])
    aot.add_argument("--only", default="", help="cases whose label contains this, such as bf16")
    aot.add_argument("--json", type=Path, help="write the report here")
    args = parser.parse_args(argv)
    from sparsefx.kernels.gpu.aot import run, save

    reports, faults = run(args.target, lambda case: args.only in case.label)
    if args.json:
        save(args.json, reports)
    print(f"{len(reports)} compiled, {len(faults)} not fit to ship")
    for fault in faults:
        print(fault, file=sys.stderr)
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
