"""Measure models against each other: python -m bench COMMAND [--flag value ...]

    python -m bench speed          time and peak memory of a training step
    python -m bench quality        bits per byte after equal tokens and equal time
    python -m bench ablation       the same, of Hope without its parts (NL table 6)
    python -m bench optimizers     the same, of models under several optimizers
    python -m bench digits         optimizers on a small vision transformer (scikit-learn)
    python -m bench position       loss by position in rows longer than those of training
    python -m bench kernels        the fused kernels, on a GPU
    python -m bench suites         small models on synthetic tasks (NL tables 4 and 5)
    python -m bench continual      what is still known after learning something else (NL sec. 9.1)
    python -m bench pretrained     a pre-trained model that learns while it reads (NL sec. 7.3)

    python -m bench COMMAND --help     what a command measures, and its flags

A model is NAME[:field=value ...], see cells.py. A finished training run is a line of a .jsonl
beside --out: the same command goes on where an earlier one was stopped, and --out, the result as
JSON, says on which machine, by which commit and by which command it was measured.
"""

import argparse
import importlib
import shlex
import sys
from concurrent.futures.process import BrokenProcessPool

from bench.cells import write_result
from hope import one_of
from support.checkpoint import first_line
from support.flags import Parser

# A command: its module, the only one that is imported, and there what measures and adds flags.
COMMANDS = {
    "speed": ("bench.speed", "speed", "add_flags"),
    "quality": ("bench.quality", "quality", "add_flags"),
    "ablation": ("bench.ablation", "ablation", "add_flags"),
    "optimizers": ("bench.optimizers", "compare_optimizers", "add_flags"),
    "digits": ("bench.optimizers", "digits", "digits_flags"),
    "position": ("bench.position", "positions", "add_flags"),
    "kernels": ("bench.kernels", "kernel_speed", "add_flags"),
    "suites": ("bench.suites", "suites", "add_flags"),
    "pretrained": ("bench.pretrained", "pretrained", "add_flags"),
    "continual": ("bench.continual", "main", None),  # has commands and flags of its own
}


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """A module's docstring as it stands, then the flags with their defaults."""


def main(argv: list[str] | None = None) -> int:
    """The command; exit status 0: done, 2: bad input or a failed run, 130: stopped by Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        return 0
    try:
        return measure(argv[0], argv[1:])
    except (ValueError, OSError, RuntimeError) as error:  # out of memory is a RuntimeError
        message = first_line(error)
        if isinstance(error, BrokenProcessPool):
            message = "a worker was killed (out of memory?): try fewer --jobs; cells are kept"
        print(f"bench: error: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("bench: stopped; the same command goes on from the finished cells", file=sys.stderr)
        return 130


def measure(command: str, flags: list[str]) -> int:
    """One command, and its result as a file. Returns the exit status."""
    module_name, function, add_flags = COMMANDS[one_of("command", command, COMMANDS)]
    module = importlib.import_module(module_name)
    if add_flags is None:
        return module.main(flags)
    parser = Parser(
        prog=f"python -m bench {command}", description=module.__doc__, formatter_class=Help
    )
    getattr(module, add_flags)(parser)
    args = parser.parse_args(flags)
    args.line = shlex.join(["python", "-m", "bench", command, *flags])
    result = getattr(module, function)(args)
    if result and write_result(args, result):
        print(f"\nin {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
