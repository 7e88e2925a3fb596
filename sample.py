"""Text from a trained model, streamed, at constant memory.

    python sample.py generate runs/hope-nano --prompt "def "
"""

import argparse
import os
import sys

import torch

from support.checkpoint import first_line
from support.flags import Parser, updates_flag
from support.run import Run, precision


def generate(args) -> None:
    """Print the prompt and what the model writes after it, token by token."""
    run = Run.open(args.run, args.device, args.cms_updates)
    torch.manual_seed(args.seed)
    typed = os.fsencode(args.prompt)  # the bytes, whatever the terminal's encoding
    text = typed.decode("utf-8", "replace")
    ids = run.encoding.encode(text, disallowed_special=()) or [run.encoding.eot_token]
    prompt = torch.tensor([ids], device=run.device)  # [1, T]
    tokens = run.model.generate(prompt, args.n, temperature=args.temperature, top_k=args.top_k)
    sys.stdout.buffer.write(typed)
    with precision(run.device):
        for token in tokens:
            # a token may be part of a character, so its bytes are written as they are
            sys.stdout.buffer.write(run.encoding.decode_bytes(token.tolist()))
            sys.stdout.flush()
    print()


def parser() -> Parser:
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = p.add_subparsers(dest="command", required=True)
    form = argparse.ArgumentDefaultsHelpFormatter
    g = commands.add_parser("generate", help="stream text from a run", formatter_class=form)
    g.add_argument("run", help="run folder of train.py")
    g.add_argument("--prompt", default="def ", help="text to continue")
    g.add_argument("--n", type=int, default=400, help="tokens to generate")
    g.add_argument("--temperature", type=float, default=0.8, help="0 takes the most likely token")
    g.add_argument("--top-k", type=int, default=None, help="sample among the k most likely tokens")
    g.add_argument("--seed", type=int, default=0, help="of the sampling")
    g.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    updates_flag(g)
    return p


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit status: 0 done, 2 bad input, 130 stopped by Ctrl-C."""
    try:
        generate(parser().parse_args(argv))
        return 0
    except (ValueError, RuntimeError, OSError) as error:
        print(f"sample.py: error: {first_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print()
        return 130


if __name__ == "__main__":
    sys.exit(main())
