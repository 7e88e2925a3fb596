"""Command lines: errors of one line, and whole numbers such as 1e6."""

import argparse
import contextlib


class Parser(argparse.ArgumentParser):
    """A bad flag is a ValueError, one line like every other message."""

    def error(self, message):
        raise ValueError(f"{message} (--help lists the flags)")


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
