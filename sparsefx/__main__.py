"""The command line: `python -m sparsefx bench`."""

import argparse

from sparsefx.bench import command


def main(argv: list[str] | None = None) -> None:
    """Run a command of `python -m sparsefx`."""
    parser = argparse.ArgumentParser(prog="python -m sparsefx", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    bench = commands.add_parser("bench", help="time layers and whole networks, sparse against the best dense")
    command.add_arguments(bench)
    command.run(parser.parse_args(argv), reexecute=argv is None)


if __name__ == "__main__":
    main()
