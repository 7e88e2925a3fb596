"""python -m bench COMMAND"""

import argparse
import math
import shlex
import sys
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress

from bench.cells import write_result
from bench.kernels import kernel_speed
from bench.optimizers import compare_optimizers, digits
from bench.quality import ablation, quality
from bench.speed import speed
from optimizers import OPTIMIZERS
from support.checkpoint import first_line
from support.flags import Parser, whole_number


def parser() -> Parser:
    raw, defaults = argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter
    top = Parser(description=__doc__, formatter_class=raw, usage="python bench.py COMMAND [--flag value ...]")
    title = "commands; `speed --help`, `quality --help`, ... list their flags"
    commands = top.add_subparsers(dest="command", metavar="COMMAND", title=title)
    s = commands.add_parser("speed", formatter_class=defaults, help="time and peak memory of a training step")
    q = commands.add_parser("quality", formatter_class=defaults, help="bits per byte after equal tokens and equal time")
    a = commands.add_parser("ablation", formatter_class=defaults, help="the same, of Hope without its parts (NL table 6)")
    o = commands.add_parser("optimizers", formatter_class=defaults, help="the same, of models under several optimizers")
    d = commands.add_parser("digits", formatter_class=defaults, help="optimizers on a small vision transformer")
    s.add_argument("--models", default="hope,hope:inner_step=0", help="comma-separated; transformer is always measured")
    s.add_argument("--seq-len", default="1024", type=lambda text: [whole_number(part) for part in text.split(",")],
                   help="tokens in a row; several, with commas, are also drawn")  # fmt: skip
    s.add_argument("--d-model", type=whole_number, default=256, help="width")
    s.add_argument("--n-layers", type=whole_number, default=4, help="blocks")
    s.add_argument("--n-heads", type=whole_number, default=4, help="heads")
    s.add_argument("--repeats", type=whole_number, default=5, help="rounds after the warm-up")
    s.add_argument("--profile", metavar="MODEL", help="only print where the time of this model's training step goes")
    q.add_argument("--models", default="hope,hope:inner_step=0,transformer,transformer:conv=4,gated_deltanet,titans")
    o.add_argument("--models", default="hope,transformer", help="comma-separated")
    a.add_argument("--model", default="hope", help="Hope, with fields that all have")
    for command, tokens, seeds in ((q, 1_000_000, "0,1,2"), (o, 500_000, "0"), (a, 1_000_000, "0")):
        command.add_argument("--tokens", type=whole_number, default=tokens, help="of each run, rounded up to whole steps")
        command.add_argument("--seeds", default=seeds, help="of weights and batches")
        command.add_argument("--lrs", default="1.5e-3,3e-3,6e-3", help="grid of learning rates; one: no search")
        command.add_argument("--lr-tokens", type=whole_number, default=tokens // 4, help="tokens of a learning-rate run")
        command.add_argument("--seq-len", type=whole_number, default=512, help="tokens in a row")
        command.add_argument("--eval-tokens", type=whole_number, default=262_144, help="held-out tokens, from the first on")
        command.add_argument("--preset", default="nano", help="size of the models")
        command.add_argument("--data", default="stdlib", help="'stdlib', a text file or a folder")
        command.add_argument("--jobs", type=whole_number, default=2, help="cells trained at once; they share the cores")
        command.add_argument("--minutes", type=minutes, default=0.0, help="also train each model for this long; 0: do not")
    o.add_argument("--rounds", type=whole_number, default=20, help="rounds of ten optimizer steps that are timed")
    o.add_argument("--optimizers", default="adamw,muon,m3,delta_momentum,dmgd", help=f"out of {', '.join(OPTIMIZERS)}")
    d.add_argument("--optimizers", default="adamw,muon,m3", help=f"out of {', '.join(OPTIMIZERS)}")
    d.add_argument("--steps", type=whole_number, default=300, help="of every run")
    d.add_argument("--seeds", default="0,1,2", help="of weights and batches")
    d.add_argument("--lrs", default="1e-3,3e-3,1e-2", help="grid of learning rates")
    d.add_argument("--batch", type=whole_number, default=64, help="images in a batch")
    d.add_argument("--out", default="results/digits.json", help="the result as JSON")
    k = commands.add_parser("kernels", formatter_class=defaults, help="the fused kernels, on a GPU")
    k.add_argument("--heads", default="128,256", help="batch x heads, multiples of 16")
    k.add_argument("--lengths", default="2048,4096,8192,16384,32768", help="tokens in a row")
    k.add_argument("--chunk", type=whole_number, default=64, help="tokens that self-modifying memories generate at once")
    k.add_argument("--preset", default="340m", help="size of the models whose training steps are timed; none: leave them out")
    k.add_argument("--models", default="hope", help="comma-separated; transformer is always measured")
    for command in (s, q, a, o, d):
        command.add_argument("--threads", type=lambda text: whole_number(text, 0), default=0, help="CPU threads of a process; 0: all")
    for command in (s, q, a, o):
        command.add_argument("--batch", type=whole_number, default=4, help="rows in a batch")
    for command in (s, q, a, o, k):
        command.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
        command.add_argument("--out", default=f"results/{command.prog.split()[-1]}.json", help="the result as JSON")
    return top


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit status: 0 done, 2 bad input or a failed run, 130 stopped by Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        top = parser()
        args = top.parse_args(argv)
        args.line = shlex.join(["python", "bench.py", *argv])
        if args.command is None:
            top.print_help()
            return 0
        commands = {"speed": speed, "quality": quality, "ablation": ablation, "optimizers": compare_optimizers,
                    "digits": digits, "kernels": kernel_speed}  # fmt: skip
        result = commands[args.command](args)
        if result:
            write_result(args, result)
            print(f"\nin {args.out}")
        return 0
    except (ValueError, OSError, RuntimeError) as error:  # out of memory, a worker that was killed: RuntimeErrors
        killed = "a worker was killed (out of memory?); finished cells are kept: try fewer --jobs"
        message = killed if isinstance(error, BrokenProcessPool) else first_line(error)
        print(f"bench.py: error: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("bench.py: stopped; the same command goes on from the finished cells", file=sys.stderr)
        return 130


def minutes(text: str) -> float:
    with suppress(ValueError):
        if 0 <= float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text} is not a number of at least 0")


if __name__ == "__main__":
    sys.exit(main())
