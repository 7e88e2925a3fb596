"""What benchmarks share: models by name, cells that are never trained twice, where it was done.

A model is NAME[:field=value ...] with fields of HopeConfig: `hope`, `hope:inner_step=0` (memories
that never learn), `transformer:conv=4`, `hope:chunk=128:levels=[256,null]`.

A cell is one training run of a benchmark, found again by a key that holds all its settings. A
finished cell is a line of a .jsonl (`Record`), so the same command goes on where it was stopped.
Hyper-parameters are chosen on cells of SEARCH_SEED, which no reported cell uses (`best_of`).
"""

import json
import multiprocessing
import os
import platform
import re
import subprocess
import threading
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from functools import cache, partial
from pathlib import Path

import torch

from hope import Hope, HopeConfig
from layers import tensors
from support.checkpoint import first_line, json_lines, warned
from support.config import json_or_text
from support.flags import DEVICES, whole_number
from support.run import write_json

ROOT = Path(__file__).resolve().parent.parent
SEARCH_SEED = 100  # of cells that choose hyper-parameters

# --------------------------------------------------------------------------------------------------
# Models by name


def split_specs(text: str) -> list[str]:
    """Model specs of a comma-separated list; commas inside [...] are a value's.

    ValueError for none or a repeat.
    """
    specs = [spec.strip() for spec in re.split(r",(?![^\[]*\])", text) if spec.strip()]
    if not specs or len(set(specs)) < len(specs):
        raise ValueError(f"models must be at least one name, each once, got {text!r}")
    return specs


def parse_spec(spec: str) -> tuple[str, dict]:
    """"hope:chunk=128:memory=mlp" -> ("hope", {"chunk": 128, "memory": "mlp"}).

    ValueError for a part without '='.
    """
    name, *parts = spec.split(":")
    fields = {}
    for part in parts:
        field, equals, value = part.partition("=")
        if not equals or field == "model":
            wanted = "field=value, a field of HopeConfig but model"
            raise ValueError(f"model {spec!r}: {part!r} must be {wanted}")
        fields[field] = json_or_text(value)
    return name, fields


def spec_config(spec: str, preset: str = "nano", **sizes) -> HopeConfig:
    """The model of a spec; its own fields win over `sizes`. ValueError for what cannot be built."""
    name, fields = parse_spec(spec)
    try:
        config = HopeConfig.preset(preset, model=name, **(sizes | fields))
        parameters(config)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"model {spec!r}: {first_line(error)}") from None
    return config


def parameters(config: HopeConfig) -> int:
    """How many parameters a model has."""
    with torch.device("meta"):  # counts only
        return sum(p.numel() for p in Hope(config).parameters())


@torch.no_grad()
def state_numbers(model: Hope, tokens: int) -> int:
    """Numbers that a row's blocks carry after so many tokens: fast weights, caches, tails.

    What two names share counts once: running weights are the boundary's where a chunk has ended.
    """
    row = torch.zeros(1, tokens, dtype=torch.int64, device=model.embedding.weight.device)
    _, state = model(row)
    return sum({t.data_ptr(): t.numel() for t in tensors(state["blocks"])}.values())


# --------------------------------------------------------------------------------------------------
# Cells


class Record:
    """Finished cells of a benchmark, a line of a .jsonl each, found again by their "key".

    Lines torn by a kill, or with settings that this version does not know, are told and left out.
    current: an old key -> the key of the same cell today; it raises ValueError, KeyError or
    TypeError for settings that are gone.
    """

    def __init__(self, path: Path, current: Callable[[str], str] = str):
        self.path = path
        self.finished = dict(json_lines(path, lambda cell: (current(cell["key"]), cell)))

    def add(self, key: str, line: dict) -> dict:
        """A finished cell, at once on the disk; a warning where that is full."""
        line = {**line, "key": key}
        with warned():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            torn = self.path.exists() and self.path.read_bytes()[-1:] not in (b"", b"\n")
            with open(self.path, "a") as log:
                log.write("\n" * torn + json.dumps(line) + "\n")
        self.finished[key] = line
        return line

    def run(self, wanted: dict, train: Callable, facts: Callable, told: Callable, pool) -> dict:
        """{key: line} of {key: cell}: those that are finished, and the rest, trained by the pool.

        train: cell -> result; facts: cell -> what stands before it in its line; told: line -> what
        is printed.
        """
        missing = {key: cell for key, cell in wanted.items() if key not in self.finished}
        if len(missing) < len(wanted):
            done = len(wanted) - len(missing)
            print(f"{done} of {len(wanted)} cells are in {self.path} already", flush=True)
        futures = {pool.submit(train, cell): key for key, cell in missing.items()}
        for number, future in enumerate(as_completed(futures), 1):
            key = futures[future]
            line = self.add(key, {**facts(missing[key]), **future.result()})
            print(f"[{number}/{len(missing)}] {told(line)}", flush=True)
        return {key: self.finished[key] for key in wanted}


def best_of(grid: Iterable, score: Callable):
    """The settings of a grid with the highest score; None as a score is a run that diverged.

    Returns None where all of them diverged.
    """
    scored = [(score(settings), settings) for settings in grid]
    scored = [pair for pair in scored if pair[0] is not None]
    return max(scored, key=lambda pair: pair[0])[1] if scored else None


def check_seeds(seeds: list[int]) -> None:
    """ValueError for seeds that no reported cell may have."""
    if SEARCH_SEED in seeds or min(seeds) < 0:
        why = f"{SEARCH_SEED} chooses the hyper-parameters"
        raise ValueError(f"seeds must be at least 0 and not {SEARCH_SEED} ({why}), got {seeds}")


@cache
def code_version() -> str:
    """Checksum of the code that a result depends on. FileNotFoundError where a file is missing."""
    names = "kernels fused memory layers titans cms learn optimizers baselines hope train".split()
    names += ["support/corpus", "support/vocabulary"]
    sources = b"".join((ROOT / f"{name}.py").read_bytes() for name in names)
    return f"{zlib.crc32(sources):08x}"


@contextmanager
def workers(jobs: int):
    """Processes that train cells; they start when there is one to train, and end with this one."""
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(jobs, context, _leave_with_parent)
    try:
        yield pool
    except BaseException:
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _leave_with_parent() -> None:
    """In a worker: no training goes on after the benchmark was killed."""
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


# --------------------------------------------------------------------------------------------------
# Where it was measured, and the result as a file


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor() -> str:
    with suppress(OSError, TypeError):
        return re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())[1]
    return platform.processor() or platform.machine()


def where(device: str, threads: int) -> str:
    """A device in words."""
    if device != "cpu":
        return torch.cuda.get_device_name(device)
    each = f"{threads} thread{'s' * (threads > 1)} each process"
    return f"{processor()} ({cores()} cores, {each})"


def commit() -> str | None:
    """The commit of this code, with "+" if files were changed since."""
    git = ["git", "-C", str(ROOT)]
    with suppress(OSError, subprocess.CalledProcessError):
        how = {"capture_output": True, "text": True, "check": True}
        head = subprocess.run([*git, "rev-parse", "HEAD"], **how).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], **how).stdout.strip()
        return head + "+" * bool(changed)
    return None


def numbers(text: str, kind: type) -> list:
    """A flag: several numbers, each once. ValueError for anything else."""
    try:
        values = [kind(part) for part in text.split(",")]
    except ValueError:
        what = "whole numbers" if kind is int else "numbers"
        raise ValueError(f"{text!r} must be {what} with commas") from None
    if len(set(values)) < len(values):
        raise ValueError(f"{text!r} has a number twice")
    return values


def machine_flags(parser, out: str | None) -> None:
    """--device, --threads and --out, which most commands have."""
    at_least_0 = partial(whole_number, least=0)
    parser.add_argument("--device", default="auto", help=DEVICES)
    parser.add_argument(
        "--threads", type=at_least_0, default=0, help="CPU threads of a process; 0: all cores"
    )
    parser.add_argument("--out", default=out, help="file of the result, as JSON")


def without_key(line: dict) -> dict:
    """A finished cell as it stands in a result: its settings are there already."""
    return {name: value for name, value in line.items() if name != "key"}


def write_result(args, result: dict) -> bool:
    """--out: the result, and with what and where it was measured. False where it is not written."""
    machine = {
        "cpu": processor(),
        "cores": cores(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
    about = {"command": args.line, "machine": machine, "commit": commit()}
    with warned():
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        write_json(Path(args.out), about | result)
        return True
    return False
