"""Command lines: errors of one line, whole numbers such as 1e6, progress on terminals and pipes."""

import argparse
import contextlib
import copy
import io
import sys

from tqdm import tqdm

DEVICES = "auto, cpu, mps, cuda or cuda:N"


class Parser(argparse.ArgumentParser):
    """A bad flag is a ValueError, one line like every other message."""

    def parse_known_args(self, args=None, namespace=None):
        escape_what_cannot_be_shown()
        return super().parse_known_args(args, namespace)

    def error(self, message):
        raise ValueError(f"{message} (--help lists the flags)")


class Help(argparse.RawDescriptionHelpFormatter):
    """The description as it stands; a flag once, though both - and _ are taken."""

    def _format_action_invocation(self, action):
        action = copy.copy(action)
        action.option_strings = [name for name in action.option_strings if "_" not in name]
        return super()._format_action_invocation(action)


class Defaults(argparse.ArgumentDefaultsHelpFormatter):
    """A flag's default after its help, if there is one."""

    def _get_help_string(self, action):
        none = action.default in (None, [])
        return action.help if none else super()._get_help_string(action)


def escape_what_cannot_be_shown() -> None:
    """A terminal that lacks a character, as an ASCII one does, gets its code and not an error."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


class Lines:
    """A pipe or a file on which tqdm writes: each state of the bar is a line of its own."""

    def __init__(self, stream):
        self.stream = stream
        self.encoding = stream.encoding
        self.flush = stream.flush

    def write(self, text: str) -> None:
        if text.strip():
            self.stream.write(text.strip("\r\n ") + "\n")


class Progress(tqdm):
    """A bar on a terminal; elsewhere a line every 30 seconds. Arguments of tqdm."""

    def __init__(self, **options):
        own = {"dynamic_ncols": True, "mininterval": 0.5}
        if not sys.stderr.isatty():
            own |= {"mininterval": 30, "file": Lines(sys.stderr)}
        super().__init__(**(own | options))


def whole_number(text: str, least: int = 1) -> int:
    """A flag: a whole number, as 1000000 or 1e6."""
    with contextlib.suppress(ValueError, OverflowError):
        if float(text).is_integer() and float(text) >= least:
            return int(float(text))
    wanted = f"a whole number of at least {least}, as 4096 or 1e6"
    raise argparse.ArgumentTypeError(f"must be {wanted}, got {text!r}")


def whole_numbers(text: str) -> list[int]:
    """A flag: several whole numbers, with commas."""
    return [whole_number(part) for part in text.split(",")]


def updates_flag(parser) -> None:
    """--cms-updates, of commands that read a run; its value is checked by HopeConfig."""
    what = "steps of the CMS levels in context: off, first_order or full (default: as trained)"
    parser.add_argument("--cms-updates", metavar="NAME", help=what)
