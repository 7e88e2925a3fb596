"""Measure models against each other: python -m bench COMMAND [--flag value ...]

    python -m bench speed          time and peak memory of a training step
    python -m bench quality        bits per byte after equal tokens and equal time
    python -m bench ablation       the same, of Hope without its parts (NL table 6)
    python -m bench optimizers     the same, of models under several optimizers
    python -m bench digits         optimizers on a small vision transformer (scikit-learn)
    python -m bench kernels        the fused kernels, on a GPU
    python -m bench suites         small models on synthetic tasks (NL tables 4 and 5)
    python -m bench continual      what is still known after learning something else (NL sec. 9.1)

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
from optimizers import OPTIMIZERS
from support.checkpoint import first_line
from support.flags import Parser, whole_number

# A command: its module, the only one that is imported, and there the function that measures.
COMMANDS = {
    "speed": ("bench.speed", "speed"),
    "quality": ("bench.quality", "quality"),
    "ablation": ("bench.ablation", "ablation"),
    "optimizers": ("bench.optimizers", "compare_optimizers"),
    "digits": ("bench.optimizers", "digits"),
    "kernels": ("bench.kernels", "kernel_speed"),
    "suites": ("bench.suites", "suites"),
    "continual": ("bench.continual", "main"),
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
    module_name, function = COMMANDS[one_of("command", command, COMMANDS)]
    module = importlib.import_module(module_name)
    if command == "continual":  # has commands of its own
        return module.main(flags)
    parser = Parser(
        prog=f"python -m bench {command}", description=module.__doc__, formatter_class=Help
    )
    add_flags = FLAGS.get(command) or module.add_flags
    add_flags(parser)
    args = parser.parse_args(flags)
    args.line = shlex.join(["python", "-m", "bench", command, *flags])
    result = getattr(module, function)(args)
    if result:
        write_result(args, result)
        print(f"\nin {args.out}")
    return 0


# --------------------------------------------------------------------------------------------------
# Flags of commands whose module has no add_flags


def optimizers_flags(parser) -> None:
    from bench.quality import training_flags

    names = f"out of {', '.join(OPTIMIZERS)}"
    parser.add_argument("--models", default="hope,transformer", help="comma-separated")
    parser.add_argument("--optimizers", default="adamw,muon,m3,delta_momentum,dmgd", help=names)
    parser.add_argument(
        "--rounds", type=whole_number, default=20, help="rounds of ten optimizer steps, timed"
    )
    training_flags(parser, "results/optimizers.json", tokens=500_000, seeds="0")


def digits_flags(parser) -> None:
    names = f"out of {', '.join(OPTIMIZERS)}"
    parser.add_argument("--optimizers", default="adamw,muon,m3", help=names)
    parser.add_argument("--steps", type=whole_number, default=300, help="of every run")
    parser.add_argument("--seeds", default="0,1,2", help="of weights and batches")
    parser.add_argument("--lrs", default="1e-3,3e-3,1e-2", help="grid of learning rates")
    parser.add_argument("--batch", type=whole_number, default=64, help="images in a batch")
    parser.add_argument("--threads", type=whole_number, help="CPU threads; all cores if not given")
    parser.add_argument("--out", default="results/digits.json", help="file of the result, as JSON")


def kernels_flags(parser) -> None:
    lengths = "2048,4096,8192,16384,32768"
    chunk = "tokens that self-modifying memories generate at once"
    preset = "size of the models whose training steps are timed; none: leave them out"
    parser.add_argument("--heads", default="128,256", help="batch x heads, multiples of 16")
    parser.add_argument("--lengths", default=lengths, help="tokens in a row")
    parser.add_argument("--chunk", type=whole_number, default=64, help=chunk)
    parser.add_argument("--preset", default="340m", help=preset)
    parser.add_argument(
        "--models", default="hope", help="comma-separated; transformer is always measured"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--out", default="results/kernels.json", help="file of the result, as JSON")


FLAGS = {"optimizers": optimizers_flags, "digits": digits_flags, "kernels": kernels_flags}

if __name__ == "__main__":
    sys.exit(main())
