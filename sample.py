"""Text from a trained model, streamed, at constant memory; and a look inside.

    python sample.py generate runs/hope-nano --prompt "def "
    python sample.py generate runs/hope-nano --prompt-file notes.txt --samples 3 --top-p 0.9
    python sample.py chat runs/hope-nano
    python sample.py look runs/hope-nano          # what its memories do with a text: look.html

`chat` reads what is typed, line by line, and writes on after each. All of it goes into one state,
in which the CMS levels learn where the model's do, and which stands apart from the weights:

    /save FILE    write the state; `/load FILE`, in this process or another, goes on from there
    /load FILE    go on from a state of the same model
    /reset        forget everything that was read

Ctrl-D ends it. The input may be a pipe. Then nothing is asked for, and the first error ends the
command.
"""

import os
import sys
from functools import partial

import torch

from bench import look
from layers import Sampler
from support.checkpoint import first_line, load_state, save_state
from support.flags import DEVICES, Defaults, Help, Parser, updates_flag, whole_number
from support.run import Run, precision
from support.vocabulary import encode


def generate(args) -> None:
    """Print the prompt and what the model writes after it, token by token."""
    run = opened(args)
    if args.prompt_file is None:
        typed = os.fsencode(args.prompt)  # the bytes, whatever the terminal's encoding
    elif args.prompt_file == "-":
        typed = sys.stdin.buffer.read()
    else:
        with open(args.prompt_file, "rb") as file:
            typed = file.read()
    prompt = tokens_of(run, typed).repeat(args.samples, 1)  # [samples, T]
    texts = [typed] * args.samples

    def keep(row: int, text: bytes) -> None:
        texts[row] += text

    if args.samples == 1:
        show(0, typed)
        write_on(run, prompt, args, None, show)
        print()
        return
    write_on(run, prompt, args, None, keep)
    for number, text in enumerate(texts, 1):
        show(0, f"--- sample {number} of {args.samples} ---\n".encode() + text + b"\n")


def chat(args) -> None:
    """Answer lines, all in one state. See the top of this file."""
    run = opened(args)
    state = None
    asks = sys.stdin.isatty()
    while True:
        if asks:
            print("> ", end="", flush=True)
        line = sys.stdin.buffer.readline()
        if not line:
            return
        try:
            if line.startswith(b"/"):
                state = obey(run, state, os.fsdecode(line).strip())
                continue
            unread, state = write_on(run, tokens_of(run, line), args, state, show)
            with torch.no_grad(), precision(run.device):
                state = run.model(unread, state)[1]
            print(flush=True)
        except (ValueError, RuntimeError, OSError) as error:
            if not asks:
                raise
            print(f"error: {first_line(error)}", file=sys.stderr)


def obey(run: Run, state, line: str):
    """The state after a command of `chat`. ValueError or OSError where it cannot be done."""
    name, _, file = line.partition(" ")
    if line == "/reset":
        return None
    if name not in ("/save", "/load") or not file:
        legal = "/save FILE, /load FILE or /reset"
        raise ValueError(f"a line that begins with / must be {legal} (text: after a blank): {line}")
    if name == "/load":
        state = load_state(file, run.device)
        token = torch.zeros(1, 1, dtype=torch.int64, device=run.device)
        try:
            with torch.no_grad(), precision(run.device):
                read = run.model(token, state)[1]["position"] - 1
        except Exception as error:  # a file may hold anything
            why = first_line(error)
            raise ValueError(f"{file} holds no state that this model can read: {why}") from None
    elif state is None:
        raise ValueError("nothing was read yet, so there is no state to save")
    else:
        save_state(state, file)
        read = state["position"]
    print(f"{line}: the state after {read:,} tokens", file=sys.stderr)
    return state


def opened(args) -> Run:
    run = Run.open(args.run, args.device, args.cms_updates)
    Sampler(**drawing(args))  # raises for flags out of range, before anything is written
    Ending(args.stop)
    torch.manual_seed(args.seed)
    return run


def drawing(args) -> dict:
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    return {name: getattr(args, name) for name in names}


def tokens_of(run: Run, typed: bytes) -> torch.Tensor:
    """[1, T]; of no text: <|endoftext|>."""
    text = typed.decode("utf-8", "replace")
    ids = encode(text.encode(), run.encoding).tolist() or [run.encoding.eot_token]
    return torch.tensor([ids], device=run.device)  # [1, T]


def show(row: int, text: bytes) -> None:
    # a token may be part of a character, so its bytes are written as they are
    sys.stdout.buffer.write(text)
    sys.stdout.flush()


def write_on(run: Run, tokens, args, state, show) -> tuple:
    """Continue tokens [B, T]; show(row, text) gets what is written, up to the stop string.

    Returns (tokens [B, T] that were not read yet, the state after all before them).
    """
    endings = [Ending(args.stop) for _ in tokens]
    with precision(run.device):
        for drawn in run.model.generate_with_state(tokens, args.n, state, **drawing(args)):
            token, state = drawn
            tokens = token[:, None]
            for row, ending in enumerate(endings):
                show(row, ending.add(run.encoding.decode_bytes(tokens[row].tolist())))
            if all(ending.reached for ending in endings):
                break
    for row, ending in enumerate(endings):
        show(row, ending.kept)
    return tokens, state


class Ending:
    """Where a text that comes in pieces ends: before the first of the stop strings."""

    def __init__(self, stops: list[str]):
        if "" in stops:
            raise ValueError("stop must be a text that is not empty, got ''")
        self.stops = [os.fsencode(stop) for stop in stops]
        self.kept = b""  # the end of the text that may be the beginning of a stop string
        self.reached = False

    def add(self, piece: bytes) -> bytes:
        """What can be shown now."""
        if self.reached:
            return b""
        text = self.kept + piece
        ends = [text.index(stop) for stop in self.stops if stop in text]
        self.reached = bool(ends)
        if ends:
            self.kept = b""
            return text[: min(ends)]
        begun = [n for stop in self.stops for n in range(1, len(stop)) if text.endswith(stop[:n])]
        end = len(text) - max(begun, default=0)
        self.kept = text[end:]
        return text[:end]


def parser() -> Parser:
    p = Parser(description=__doc__, formatter_class=Help)
    commands = p.add_subparsers(dest="command", required=True)
    form = {"formatter_class": Defaults}
    g = commands.add_parser("generate", help="stream text from a run", **form)
    g.add_argument("run", help="run folder of train.py")
    prompt = g.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", default="def ", help="text to continue")
    what = "file with the text to continue, - for stdin"
    prompt.add_argument("--prompt-file", metavar="FILE", default=None, help=what)
    what = "texts to write, each after the prompt; several are printed at the end"
    g.add_argument("--samples", type=whole_number, default=1, metavar="N", help=what)
    writing_flags(g, 400, [])
    g.set_defaults(do=generate)
    c = commands.add_parser("chat", help="talk to a run, which remembers", **form)
    c.add_argument("run", help="run folder of train.py")
    writing_flags(c, 200, ["<|endoftext|>"])
    c.set_defaults(do=chat)
    look.command(commands)
    return p


def writing_flags(p, n: int, stop: list[str]) -> None:
    """The flags of all commands that write text; n and stop: defaults."""
    at_least_0 = partial(whole_number, least=0)
    p.add_argument("--n", type=at_least_0, default=n, help="most tokens to generate, at least 0")
    what = "text that ends the writing, and is left out (repeatable)"
    p.add_argument("--stop", action="append", default=stop, metavar="TEXT", help=what)
    draw = p.add_argument_group("how tokens are drawn, in this order")
    what = "divides positive logits of tokens seen, multiplies negative ones; above 0, 1: none"
    draw.add_argument("--repetition-penalty", type=float, default=1.0, metavar="X", help=what)
    what = "keep the k most likely tokens, at least 1"
    draw.add_argument("--top-k", type=int, default=None, metavar="N", help=what)
    what = "at least 0; 0 takes the most likely token"
    draw.add_argument("--temperature", type=float, default=0.8, metavar="X", help=what)
    what = "keep the most likely tokens that have this probability together, above 0, at most 1"
    draw.add_argument("--top-p", type=float, default=1.0, metavar="X", help=what)
    what = "keep tokens at least so many times as likely as the likeliest, from 0 to 1"
    draw.add_argument("--min-p", type=float, default=0.0, metavar="X", help=what)
    draw.add_argument("--seed", type=int, default=0, metavar="N", help="of the draws")
    machine = p.add_argument_group("machine and model")
    machine.add_argument("--device", default="auto", help=DEVICES)
    updates_flag(machine)


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit status: 0 done, 2 bad input, 130 stopped by Ctrl-C."""
    try:
        args = parser().parse_args(argv)
        args.do(args)
        return 0
    except (ValueError, RuntimeError, OSError) as error:
        print(f"sample.py: error: {first_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print()
        return 130


if __name__ == "__main__":
    sys.exit(main())
