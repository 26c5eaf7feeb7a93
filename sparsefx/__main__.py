"""The command line: `python -m sparsefx bench` and `python -m sparsefx tune`."""

import argparse

from sparsefx.bench import command, tune


def main(argv: list[str] | None = None) -> None:
    """Run a command of `python -m sparsefx`."""
    parser = argparse.ArgumentParser(prog="python -m sparsefx", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    bench = commands.add_parser("bench", help="time layers and whole networks, sparse against the best dense")
    command.add_arguments(bench)
    tuning = commands.add_parser("tune", help="measure GPU kernel configurations and write them to a table")
    tune.add_arguments(tuning)
    args = parser.parse_args(argv)
    if args.command == "tune":
        tune.run(args)
    else:
        command.run(args, reexecute=argv is None)


if __name__ == "__main__":
    main()
