"""Show a corpus, make token shards of large ones, and fetch the data sets of the benchmarks.

    python data.py                # what the embedded corpus is: this Python's own standard library
    python data.py notes.txt      # the same for a text file, a folder of text, a folder of shards
    python data.py text PATHS... --vocab 32768 --out data/mine       # shards of text, or 'stdlib'
    python data.py fineweb-edu --tokens 15e9 --vocab 32768 --out data/fineweb           # streamed
    python data.py get wikitext2 piqa --out data/sets     # for --data-dir; without names: lists all

What a corpus is, and the files of a folder of shards: support/corpus.py. The vocabulary is a
byte-level BPE trained on the training text, or a ready one (--vocab gpt2, bytes, a tokenizer.json).

Before anything is encoded, a plan says which part of the text goes into which shard. A shard is a
function of its part of the text alone, so parts are encoded in parallel, in any order; a killed
command that is given again makes the missing shards, and the folder is the same byte for byte.
"""

import argparse
import contextlib
import hashlib
import json
import math
import multiprocessing
import os
import re
import shlex
import signal
import sys
import tempfile
import threading
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from layers import one_of
from support import released
from support.checkpoint import atomic_write, first_line, locked
from support.corpus import (
    HELD_OUT,
    HELD_OUT_BYTES,
    MANIFEST,
    PLAN,
    Shards,
    batch,
    check_shards,
    held_out_start,
    load_corpus,
    manifest_of,
    mapped,
    n_held_out,
    open_shard,
    place_to_cut,
    read_text,
    sha256_of,
    shuffled,
    source_name,
)
from support.flags import Parser, Progress, escape_what_cannot_be_shown, whole_number
from support.vocabulary import (
    TOKENIZER,
    blocks,
    dtype_of,
    encode,
    n_bytes,
    save_tokenizer,
    tokenizer,
    tokenizer_hash,
    train_tokenizer,
)

TOKENIZER_BYTES = 2**29  # of text that a vocabulary is trained on, at most
PIECE = 2**20  # bytes encoded at once; longer documents are cut, at a line end where there is one
MIN_SHARD = 2**22  # bytes of text in a training shard: a 256th of the text, but not less
MAX_SHARD = 2**28  # and not more
TOKENS_PER_FILE = 2**26  # training tokens that a file of FineWeb-Edu is worth opening for
# Samples of FineWeb-Edu (Lozhkov et al. 2024) and how many tokens of GPT-2 each has.
# deviation 41: nothing else is mixed in
FINEWEB = {
    "sample-10BT": 10e9,
    "sample-100BT": 100e9,
    "sample-350BT": 350e9,
    "default": math.inf,
}
LOCK = "lock"  # in a folder that is written
# what a kill leaves in it
LEFT = re.compile(r"lock|(plan|manifest|tokenizer)\.json\.tmp|(train|val)-\d+\.npy\.tmp")
HUB = {"path": "HuggingFaceFW/fineweb-edu"}


# --------------------------------------------------------------------------------------------------
# The plan


@dataclass(frozen=True)
class Part:
    """What one shard holds: ranges of local files, or the beginning of a file on the hub."""

    split: str
    number: int
    size: int  # bytes of text; of a file on the hub, tokens
    texts: tuple = ()  # (path, begin, end, whether <|endoftext|> comes before)
    hub: tuple = ()  # (name of the sample, number of the file, number of files, held-out bytes)

    @property
    def file(self) -> str:
        return f"{self.split}-{self.number:05d}.npy"


def plan_text(sources: list[str], rows: Path, field: str = "text") -> tuple[dict, list[Part]]:
    """(what the source is, parts) of files, folders, 'stdlib'; split as `load_corpus` does.

    rows: the file to write texts to that are no whole files, as the rows of a .jsonl; the parts
    refer to it. field: which of a row's fields is its text.
    """
    found = []
    seen = set()
    with open(rows, "wb") as file:
        for source in sources:
            for name, path, text in read_text(source, field, seen):
                begin = 0
                if isinstance(text, bytes):  # not a whole file
                    path = rows
                    begin = file.tell()
                    file.write(text)
                found.append((name, str(path), begin, len(text), zlib.crc32(text)))
    files = shuffled(found)
    sizes = [size for *_, size, _ in files]
    ranges = [(path, begin, begin + size) for _, path, begin, size, _ in files]
    if len(files) == 1:
        path, _, size = ranges[0]
        with mapped(path) as text:
            start = held_out_start(text)
        val = [(path, start, size)]
        train = [(path, 0, start)]
    else:
        n = n_held_out(sizes)
        val = ranges[:n]
        train = ranges[n:]
    total = sum(sizes)
    most = min(MAX_SHARD, max(MIN_SHARD, total // 256))
    parts = _parts("val", val, math.inf) + _parts("train", train, most)
    checked = json.dumps([(name, size, crc32) for name, *_, size, crc32 in files])
    source = {"name": source_name(sources), "documents": len(files), "bytes": total}
    return source | {"sha256": hashlib.sha256(checked.encode()).hexdigest()}, parts


def _parts(split: str, ranges: list[tuple[str, int, int]], most: float) -> list[Part]:
    """The (path, begin, end) in order, in parts of at most `most` bytes, or of a single piece."""
    parts = []
    texts = []
    size = 0
    for i, (path, begin, end) in enumerate(ranges):
        for a, b in _pieces(path, begin, end):
            if size and size + b - a > most:
                parts.append(Part(split, len(parts), size, tuple(texts)))
                texts = []
                size = 0
            texts.append((path, a, b, a == begin and i > 0))
            size += b - a
    return [*parts, Part(split, len(parts), size, tuple(texts))]


def _pieces(path: str, begin: int, end: int) -> Iterator[tuple[int, int]]:
    if end - begin <= PIECE:
        yield begin, end
        return
    with mapped(path) as text:
        while end - begin > PIECE:
            middle = place_to_cut(text, begin + PIECE // 2, begin + PIECE)
            yield begin, middle
            begin = middle
    yield begin, end


def plan_fineweb(tokens: int) -> tuple[dict, list[Part]]:
    """(what the source is, parts) of FineWeb-Edu: an equal number of tokens from each file needed.

    The files are those of the smallest sample that has enough. Held out are the first documents of
    the first. ValueError where the library is missing, OSError without a network.
    """
    sample = next(name for name, size in FINEWEB.items() if tokens <= 0.9 * size)
    n_files = _hub(sample).num_shards
    n = min(n_files, -(-tokens // TOKENS_PER_FILE))
    held_out = min(HELD_OUT_BYTES, max(1, int(HELD_OUT * 4 * tokens)))  # 4 bytes a token
    parts = [Part("val", 0, held_out // 4, hub=(sample, 0, n_files, held_out))]
    for i in range(n):
        size = tokens * (i + 1) // n - tokens * i // n
        hub = (sample, i * n_files // n, n_files, held_out if i == 0 else 0)
        parts.append(Part("train", i, size, hub=hub))
    return {"name": "fineweb-edu", "sample": sample, "files": n_files, "tokens": tokens}, parts


@cache
def _hub(sample: str):
    try:
        from datasets import load_dataset
    except ImportError:
        raise ValueError("FineWeb-Edu is streamed by datasets: pip install datasets") from None
    with _hub_errors(sample):
        return load_dataset(**HUB, name=sample, split="train", streaming=True)


@contextlib.contextmanager
def _hub_errors(sample: str):
    try:
        yield
    except Exception as error:  # of a dozen kinds: network, hub, parquet
        why = first_line(error)
        raise OSError(f"{HUB['path']} ({sample}) could not be read ({why})") from error


# --------------------------------------------------------------------------------------------------
# One shard


def _texts(part: Part) -> Iterator[tuple[bytes, bool]]:
    """(text, whether <|endoftext|> comes before it) of a part, in order."""
    if part.hub:
        for i, text in enumerate(_hub_texts(part)):
            yield text, part.number > 0 or i > 0
    for path, begin, end, new in part.texts:
        with open(path, "rb") as file:
            file.seek(begin)
            yield file.read(end - begin), new


def _hub_texts(part: Part) -> Iterator[bytes]:
    sample, file, n_files, held_out = part.hub
    seen = 0
    with _hub_errors(sample):
        for row in _hub(sample).shard(n_files, file):
            text = row["text"].encode()
            if (seen < held_out) == (part.split == "val"):
                yield text
            elif part.split == "val":
                return
            seen += len(text)


def _make(part: Part, out: Path, tick: Callable[[int], None]) -> dict:
    """Write a shard, unless it is there; its line of the manifest.

    tick: told how many bytes, or tokens (as part.size), were done since the last call.
    """
    encoding = tokenizer(str(out / TOKENIZER))
    path = out / part.file
    try:
        array = open_shard(path, dtype_of(encoding))
        tick(part.size)
    except ValueError:  # none, or one torn by a power cut
        array = _encode(part, encoding, tick)
        atomic_write(path, lambda beside: _save_array(beside, array))
    ends = sum(int((block == encoding.eot_token).sum()) for block in blocks(array))
    return {
        "file": part.file,
        "split": part.split,
        "tokens": len(array),
        "bytes": n_bytes(array, encoding),
        "largest": max((int(block.max()) for block in blocks(array)), default=0),
        "documents": ends + (part.number == 0),
        "sha256": sha256_of(path),
    }


def _encode(part: Part, encoding, tick: Callable[[int], None]) -> np.ndarray:
    """The tokens [N] of a part."""
    limit = part.size if part.hub and part.split == "train" else math.inf
    end = np.array([encoding.eot_token], dtype=dtype_of(encoding))
    pieces = [end[:0]]
    count = 0
    for text, new in _texts(part):
        pieces += [end[:new], encode(text, encoding)]
        n = len(pieces[-1]) + new
        tick(max(0, min(n, part.size - count)) if part.hub else len(text))
        count += n
        if count >= limit:
            break
    return np.concatenate(pieces)[: min(count, limit)]


def _save_array(path: Path, array: np.ndarray) -> None:
    with open(path, "wb") as file:  # by name, np.save would add a suffix
        np.save(file, array)


# --------------------------------------------------------------------------------------------------
# All shards


def make_shards(
    source: dict, parts: list[Part], vocab: int | str, out: str | Path, jobs: int = 0
) -> dict:
    """Write the shards of a plan that the folder `out` lacks; returns the manifest.

    vocab: symbols of a vocabulary to train, or the name of a ready one, see `tokenizer`. jobs:
    processes; 0: one for each CPU. Raises ValueError, before any file is touched, for a folder of
    something else, and as `tokenizer` does.
    """
    out = Path(out)
    ready = None if isinstance(vocab, int) else tokenizer(vocab)
    plan = {"format": 1, "source": source, "vocab": tokenizer_hash(ready) if ready else vocab}
    begun = _begun(out, plan)
    if "shards" in begun:  # a manifest: all is done
        (out / PLAN).unlink(missing_ok=True)
        return begun
    with _own(out):
        for torn in out.glob("*.tmp"):
            if LEFT.fullmatch(torn.name):
                torn.unlink()
        if not (out / TOKENIZER).is_file():
            if not ready:
                print(f"training a vocabulary of {vocab:,} symbols ...", flush=True)
            encoding = ready or train_tokenizer(_training_text(parts), vocab)
            atomic_write(out / PLAN, lambda beside: beside.write_text(json.dumps(plan)))
            save_tokenizer(encoding, out)
        encoding = tokenizer(str(out / TOKENIZER))
        affinity = hasattr(os, "sched_getaffinity")
        cpus = len(os.sched_getaffinity(0)) if affinity else os.cpu_count()
        jobs = min(jobs or cpus, len(parts))
        shards = _make_all(parts, out, jobs, "B" if parts[0].texts else " tokens")
        manifest = plan | {
            "tokenizer": {
                "name": encoding.name,
                "sha256": tokenizer_hash(encoding),
                "n_vocab": encoding.n_vocab,
            },
            "train": _totals(shards, "train"),
            "val": _totals(shards, "val"),
            "shards": shards,
        }
        text = json.dumps(manifest, indent=1) + "\n"
        atomic_write(out / MANIFEST, lambda beside: beside.write_text(text))
        (out / PLAN).unlink()
        return manifest


@contextlib.contextmanager
def _own(out: Path):
    """Within, the folder exists and is locked; a new one that stayed empty is removed again."""
    new = [folder for folder in (out, *out.parents) if not folder.exists()]
    out.mkdir(parents=True, exist_ok=True)
    try:
        with locked(out / LOCK):
            yield
    finally:
        with contextlib.suppress(OSError):  # of the first that is not empty
            for folder in new:
                folder.rmdir()


def _begun(out: Path, plan: dict) -> dict:
    """The manifest or the plan in `out`, or {} for a folder that is new or empty.

    ValueError where something else is there.
    """
    for name in (MANIFEST, PLAN):
        if (out / name).is_file():
            with manifest_of(out, name) as begun:
                for key, value in plan.items():
                    if begun.get(key) != value:
                        wrong = f"was begun with {key} {begun.get(key)}, not {value}"
                        raise ValueError(f"{wrong}: name a new folder")
                return begun
    ours = out.is_dir() and all(LEFT.fullmatch(path.name) for path in out.iterdir())
    if out.exists() and not ours:
        raise ValueError(f"out {str(out)!r} exists and holds something else: name a new folder")
    return {}


def _training_text(parts: list[Part]) -> Iterator[bytes]:
    """Text for a vocabulary: the first of every training part, so that no part is preferred."""
    train = [part for part in parts if part.split == "train"]
    each = TOKENIZER_BYTES // len(train)
    for part in train:
        size = 0
        for text, _ in _texts(part):
            yield text
            size += len(text)
            if size >= each:
                break


def _totals(shards: list[dict], split: str) -> dict:
    own = [shard for shard in shards if shard["split"] == split]
    counts = ("tokens", "bytes", "documents")
    return {count: sum(shard[count] for shard in own) for count in counts}


def _make_all(parts: list[Part], out: Path, jobs: int, unit: str) -> list[dict]:
    total = sum(part.size for part in parts)
    bar = Progress(total=total, unit=unit, unit_scale=True, desc="encoding")
    with bar:
        if jobs == 1:
            return [_make(part, out, bar.update) for part in parts]
        context = multiprocessing.get_context("spawn")  # a fork copies the locks of threads
        done = context.Value("q", 0)
        with ProcessPoolExecutor(jobs, context, _start_worker, (out, done)) as pool:
            try:
                futures = [pool.submit(_work, part) for part in parts]
                waiting = set(futures)
                while waiting:
                    finished, waiting = wait(waiting, 0.2, return_when=FIRST_COMPLETED)
                    bar.update(done.value - bar.n)
                    for future in finished:
                        future.result()  # raises what the process raised
                return [future.result() for future in futures]
            except BaseException as error:
                for process in multiprocessing.active_children():
                    process.terminate()
                pool.shutdown(cancel_futures=True)
                if isinstance(error, BrokenProcessPool):
                    why = "a process was killed, maybe for its memory (fewer --jobs need less)"
                    raise OSError(why) from None
                raise


_worker = {}  # of a process of the pool: the folder, and the count that all add to


def _start_worker(out: Path, done) -> None:
    _worker.update(out=out, done=done)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    multiprocessing.parent_process().join()  # it may be killed
    os._exit(1)


def _work(part: Part) -> dict:
    done = _worker["done"]

    def tick(n):
        with done.get_lock():
            done.value += n

    return _make(part, _worker["out"], tick)


# --------------------------------------------------------------------------------------------------
# Commands


def show(source: str = "stdlib") -> None:
    """Print what a corpus is; of shards, also whether they still are what the manifest says."""
    corpus = load_corpus(source)
    encoding = corpus.encoding
    print(f"{corpus.name}, tokenizer {encoding.name!r} ({encoding.n_vocab:,} symbols)")
    _show_part("train", corpus.train, corpus.train_bytes, corpus.train_files)
    _show_part("held out", corpus.val, corpus.val_bytes, corpus.val_files)
    if isinstance(corpus.train, Shards):
        ids = [i for i in corpus.val[: 2**20].tolist() if i != encoding.eot_token]
        text = encoding.decode_bytes(ids)
        line = f"held out: {len(text) / len(encode(text, encoding)):.3f} bytes per token"
        try:
            theirs = len(text) / len(encode(text, tokenizer("gpt2")))
            line += f"; of GPT-2's vocabulary on the same text: {theirs:.3f}"
        except ValueError as error:
            line += f"; GPT-2's for comparison: {error}"
        print(line)
        print(f"sha256 of {check_shards(source, 'train', 'val')} shards: as the manifest says")
    inputs, _ = batch(corpus.train, 3, min(240, len(corpus.train) - 1), seed=0, step=0)
    print("\na batch of 3 rows, seed 0, step 0:")
    for row in inputs:
        print("-" * 80 + "\n" + encoding.decode(row.tolist()))


def get(names: list[str], out: str) -> None:
    """Fetch released data sets into a folder; without names, print what there is."""
    if not names:
        print(released.table())
    for name in names:
        one_of("data set", name, released.SETS)
    for name in names:
        for path in released.get(name, out):
            print(f"{path}, its sha256 is right ({released.SETS[name].licence})")


def _show_part(name: str, tokens, size: int, files: tuple[str, ...]) -> None:
    shown = ", ".join(files[:3]) + (", ..." if len(files) > 3 else "")
    counts = f"{len(files):,} files, {size:,} bytes, {len(tokens):,} tokens"
    print(f"{name:>9}: {counts} ({shown})")


def _vocab(text: str) -> int | str:
    if not text.isdigit():
        return text
    if not 258 <= int(text) <= 2**20:
        wanted = f"from 258 to {2**20}, or gpt2, bytes, a tokenizer.json"
        raise argparse.ArgumentTypeError(f"must be {wanted}, got {text}")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=__doc__, formatter_class=form)
    commands = parser.add_subparsers(dest="command", metavar="[SOURCE | text | fineweb-edu | get]")
    text = commands.add_parser("text", help="token shards of local text")
    paths = "text files, .txt.gz, .jsonl, .jsonl.gz, .parquet, folders of them, 'stdlib'"
    text.add_argument("paths", nargs="+", help=paths)
    field = "field of a row of .jsonl, .jsonl.gz or .parquet that is its text (default: text)"
    text.add_argument("--field", default="text", help=field)
    web = commands.add_parser("fineweb-edu", help="token shards of FineWeb-Edu (needs datasets)")
    number = {"type": whole_number, "metavar": "N"}
    web.add_argument("--tokens", **number, default=15 * 10**9, help="to train on (default: 15e9)")
    symbols = "symbols of a vocabulary to train (default: 32768), or gpt2, bytes, a tokenizer.json"
    for command in (text, web):
        command.add_argument("--out", required=True, help="folder; one that a kill left: goes on")
        command.add_argument("--vocab", type=_vocab, default=32768, help=symbols)
        command.add_argument("--jobs", **number, default=0, help="processes (default: all CPUs)")
    sets = commands.add_parser("get", help="released data sets (needs datasets)")
    legal = ", ".join(released.SETS)
    sets.add_argument("names", nargs="*", help=f"of {legal} (default: list them)")
    sets.add_argument("--out", default="data/sets", help="folder (default: data/sets)")
    return parser


def main(argv: list[str] | None = None) -> None:
    """The command. Raises ValueError or OSError for what is wrong."""
    argv = sys.argv[1:] if argv is None else argv
    escape_what_cannot_be_shown()
    if not argv:
        return show()
    if argv[0] not in ("text", "fineweb-edu", "get", "-h", "--help"):
        return show(argv[0])
    args = _parser().parse_args(argv)
    if args.command == "get":
        return get(args.names, args.out)
    web = args.command == "fineweb-edu"
    with tempfile.TemporaryDirectory() as folder:  # in TMPDIR
        rows = Path(folder, "rows")
        plan = plan_fineweb(args.tokens) if web else plan_text(args.paths, rows, args.field)
        manifest = make_shards(*plan, args.vocab, args.out, args.jobs)
    for split in ("train", "val"):
        n = manifest[split]
        counts = f"{n['documents']:,} documents, {n['bytes']:,} bytes, {n['tokens']:,} tokens"
        ratio = n["bytes"] / max(1, n["tokens"])
        print(f"{split:>5}: {counts}, {ratio:.3f} bytes per token")
    if web and manifest["train"]["tokens"] < args.tokens:
        print(f"note: the sample ended before {args.tokens:,} tokens")
    name = manifest["tokenizer"]["name"]
    out = shlex.quote(args.out)
    print(f"in {args.out}, tokenizer {name!r}; next: python train.py --data {out}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"data.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("data.py: interrupted; the same command goes on", file=sys.stderr)
        sys.exit(130)
