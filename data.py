"""Text in, token arrays out: corpora, tokenizers, token shards, training batches, validation windows.

    python data.py                  # what the embedded corpus is: this Python's own standard library source
    python data.py notes.txt        # the same for a text file, a folder of text files, a folder of shards
    python data.py text PATHS... --vocab 32768 --out data/mine                      # shards of local text, or of 'stdlib'
    python data.py fineweb-edu --tokens 15e9 --vocab 32768 --out data/fineweb       # of FineWeb-Edu, streamed

A corpus is two token streams. The held-out one is 5% of the *files*, so nothing of a held-out file is ever trained on;
a single file gives its last 5% (cut at a line end). Documents are joined with <|endoftext|> between them:

    train:  doc_7 <|endoftext|> doc_2 <|endoftext|> doc_9 ...        val:  doc_4 <|endoftext|> doc_1 ...

Training batches are a function of (seed, step) and nothing else: a resumed run sees the same data, and so does one on
another number of processes. Validation windows lie side by side and score every held-out token exactly once, so that

    bits per byte = (sum of nats) / ln 2 / (true number of bytes)

compares models whatever their tokenizer; <|endoftext|> is a predicted token of zero bytes.

Shards are for text that does not fit into memory, or is worth a vocabulary of its own. A folder of shards:

    tokenizer.json     pattern, special tokens, tokens in order of rank: a byte-level BPE trained on the training text, or gpt2
    val-00000.npy, train-00000.npy, ...    uint16 (uint32 for vocabularies above 65,536), read by np.load(mmap_mode="r")
    manifest.json      source, tokenizer with sha256; tokens, bytes, documents and sha256 of every shard. Written last.

A shard is a function of its part of the text alone, so parts are encoded in parallel, in any order; a killed command that is
given again makes the missing shards, and the folder is the same byte for byte.
"""

import argparse
import contextlib
import hashlib
import json
import math
import multiprocessing
import os
import signal
import sys
import threading
import zlib
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from tqdm import tqdm

from support.checkpoint import atomic_write, first_line
from support.corpus import (
    HELD_OUT,
    HELD_OUT_BYTES,
    MANIFEST,
    PLAN,
    Shards,
    _cut,
    _held_out,
    _held_out_part,
    _mapped,
    _name,
    _open,
    _read_text,
    batch,
    load_corpus,
)
from support.vocabulary import (
    TOKENIZER,
    encode,
    kind_of,
    n_bytes,
    save_tokenizer,
    tokenizer,
    tokenizer_hash,
    train_tokenizer,
)

# ---------------------------------------------------------------------------------------------------------------------
# Documents


# ---------------------------------------------------------------------------------------------------------------------
# Shards: reading them


# ---------------------------------------------------------------------------------------------------------------------
# Shards: making them. A plan says which part of the text goes into which shard, before anything is encoded

TOKENIZER_BYTES = 2**29  # of text that a vocabulary is trained on, at most
PIECE = 2**20  # bytes that are encoded at once; longer documents are cut, at a line end where there is one
LEAST, MOST = 2**22, 2**28  # bytes in a training shard: a 256th of the text within these limits
SHARE = 2**26  # training tokens that a file of FineWeb-Edu is worth opening for
# Samples of FineWeb-Edu (Lozhkov et al. 2024) and how many tokens of GPT-2 each has
FINEWEB = {"sample-10BT": 10e9, "sample-100BT": 100e9, "sample-350BT": 350e9, "default": math.inf}
HUB = {"path": "HuggingFaceFW/fineweb-edu"}


@dataclass(frozen=True)
class Part:
    """What one shard holds. texts: (path, begin, end, whether <|endoftext|> comes before), or of a data set on the hub
    (name of the sample, number of the file, number of files, held-out bytes at its start), up to `size` tokens."""

    split: str
    number: int
    size: int  # bytes of text, or tokens of a data set on the hub
    texts: tuple = ()
    hub: tuple = ()

    @property
    def file(self) -> str:
        return f"{self.split}-{self.number:05d}.npy"


def plan_text(sources: list[str]) -> tuple[dict, list[Part]]:
    """(what the source is, parts) of local text: files, folders, 'stdlib'; split as `load_corpus` does."""
    found = []
    for source in sources:
        for name, path, data in _read_text(source):
            found.append((name, str(path), len(data), zlib.crc32(data)))
    files = [found[i] for i in np.random.default_rng(0).permutation(len(found))]
    ranges = {"val": [], "train": []}
    if len(files) == 1:
        _, path, size, _ = files[0]
        with _mapped(path) as data:
            cut = _held_out_part(data)
        ranges["val"], ranges["train"] = [(path, cut, size)], [(path, 0, cut)]
    else:
        held_out = _held_out([size for _, _, size, _ in files])
        for i, (_, path, size, _) in enumerate(files):
            ranges["val" if i < held_out else "train"].append((path, 0, size))
    total = sum(size for _, _, size, _ in files)
    most = min(MOST, max(LEAST, total // 256))
    parts = []
    for split, where in ranges.items():
        texts, size, number = [], 0, 0
        for i, (path, begin, end) in enumerate(where):
            for a, b in _pieces(path, begin, end):
                if split == "train" and size and size + b - a > most:
                    parts.append(Part(split, number, size, tuple(texts)))
                    texts, size, number = [], 0, number + 1
                texts.append((path, a, b, a == begin and i > 0))
                size += b - a
        parts.append(Part(split, number, size, tuple(texts)))
    checksum = hashlib.sha256(json.dumps([(name, size, crc32) for name, _, size, crc32 in files]).encode()).hexdigest()
    return {"name": _name(sources), "documents": len(files), "bytes": total, "sha256": checksum}, parts


def _pieces(path: str, begin: int, end: int) -> Iterator[tuple[int, int]]:
    if end - begin <= PIECE:
        yield begin, end
        return
    with _mapped(path) as data:
        while begin < end:
            cut = end if end - begin <= PIECE else _cut(data, begin + PIECE // 2, begin + PIECE)
            yield begin, cut
            begin = cut


def plan_fineweb(tokens: int) -> tuple[dict, list[Part]]:
    """(what the source is, parts) of FineWeb-Edu: an equal share of training tokens from each file of a large enough sample.

    Held out are the first documents of the first file. ValueError where the library is missing; OSError without network.
    """
    sample = next(name for name, size in FINEWEB.items() if tokens <= 0.9 * size)
    n_files = _hub(sample).num_shards
    n = min(n_files, -(-tokens // SHARE))
    held_out = min(HELD_OUT_BYTES, max(1, int(HELD_OUT * 4 * tokens)))  # 4 bytes a token
    parts = [Part("val", 0, held_out // 4, hub=(sample, 0, n_files, held_out))]
    for i in range(n):
        share = tokens * (i + 1) // n - tokens * i // n
        parts.append(Part("train", i, share, hub=(sample, i * n_files // n, n_files, held_out if i == 0 else 0)))
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
        raise OSError(f"{HUB['path']} ({sample}) could not be read ({first_line(error)})") from error


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


def _texts(part: Part) -> Iterator[tuple[bytes, bool]]:
    """(text, whether <|endoftext|> comes before it) of a part, in order."""
    if part.hub:
        for i, text in enumerate(_hub_texts(part)):
            yield text, part.number > 0 or i > 0
    for path, begin, end, new in part.texts:
        with open(path, "rb") as file:
            file.seek(begin)
            yield file.read(end - begin), new


def _save_array(path: Path, array: np.ndarray) -> None:
    with open(path, "wb") as file:  # by name, np.save would add a suffix
        np.save(file, array)


def _sha256(path: Path) -> str:
    checksum = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**24):
            checksum.update(block)
    return checksum.hexdigest()


def _make(part: Part, out: Path, tick) -> dict:
    """Encode and write a shard, unless it is there; what the manifest says of it. tick: told how far it has come."""
    encoding, path = tokenizer(str(out / TOKENIZER)), out / part.file
    try:
        array = _open(path)
        tick(part.size)
    except ValueError:  # none, or one that a power cut has torn
        limit = part.size if part.hub and part.split == "train" else math.inf
        end = np.array([encoding.eot_token], dtype=kind_of(encoding))
        pieces, count = [end[:0]], 0
        for text, new in _texts(part):
            pieces += [end[:new], encode(text, encoding)]
            now = len(pieces[-1]) + new
            tick(max(0, min(now, part.size - count)) if part.hub else len(text))
            count += now
            if count >= limit:
                break
        array = np.concatenate(pieces)[: min(count, limit)]
        atomic_write(path, lambda beside: _save_array(beside, array))
    ends = sum(int((array[i : i + 2**22] == encoding.eot_token).sum()) for i in range(0, len(array), 2**22))
    counts = {"tokens": len(array), "bytes": n_bytes(array, encoding), "documents": ends + (part.number == 0)}
    return {"file": part.file, "split": part.split} | counts | {"sha256": _sha256(path)}


_worker = {}


def _start_worker(out: Path, done) -> None:
    _worker.update(out=out, done=done)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()  # it may be killed


def _work(part: Part) -> dict:
    def tick(n):
        with _worker["done"].get_lock():
            _worker["done"].value += n

    return _make(part, _worker["out"], tick)


def _make_all(parts: list[Part], out: Path, jobs: int, unit: str) -> list[dict]:
    form = dict(total=sum(part.size for part in parts), unit=unit, unit_scale=True, dynamic_ncols=True)
    with tqdm(**form, mininterval=0.5 if sys.stderr.isatty() else 30, desc="encoding") as bar:
        if jobs == 1:
            return [_make(part, out, bar.update) for part in parts]
        context = multiprocessing.get_context("spawn")  # no threads of libraries are copied half-alive
        done = context.Value("q", 0)
        with ProcessPoolExecutor(jobs, context, _start_worker, (out, done)) as pool:
            try:
                futures = [pool.submit(_work, part) for part in parts]
                waiting = set(futures)
                while waiting:
                    finished, waiting = wait(waiting, timeout=0.2, return_when=FIRST_COMPLETED)
                    bar.update(done.value - bar.n)
                    for future in finished:
                        future.result()
                return [future.result() for future in futures]
            except BaseException as error:
                for process in multiprocessing.active_children():
                    process.terminate()
                pool.shutdown(cancel_futures=True)
                if isinstance(error, BrokenProcessPool):
                    raise OSError("a process was killed, maybe for its memory (fewer --jobs need less)") from None
                raise


def make_shards(source: dict, parts: list[Part], vocab: int | str, out: str, jobs: int = 0) -> dict:
    """Write the shards of a plan into the folder `out`, or those that are missing; returns the manifest.

    vocab: symbols of a vocabulary to train, or the name of a ready one, see `tokenizer`. jobs: processes; 0: one for each
    CPU. Raises ValueError, before any file is touched, for a folder of something else, and as `tokenizer` does.
    """
    out = Path(out)
    ready = None if isinstance(vocab, int) else tokenizer(vocab)
    plan = {"format": 1, "source": source, "vocab": tokenizer_hash(ready) if ready else vocab}
    begun = next((json.loads(path.read_text()) for path in (out / MANIFEST, out / PLAN) if path.is_file()), None)
    if begun is None and out.exists() and (not out.is_dir() or any(path.suffix != ".tmp" for path in out.iterdir())):
        raise ValueError(f"out {str(out)!r} exists and holds something else: name a new folder")
    if begun and any(begun.get(key) != value for key, value in plan.items()):
        key = next(key for key, value in plan.items() if begun.get(key) != value)
        raise ValueError(f"out {str(out)!r} was begun with {key} {begun.get(key)}, not {plan[key]}: name a new folder")
    if begun and "shards" in begun:
        (out / PLAN).unlink(missing_ok=True)
        return begun
    out.mkdir(parents=True, exist_ok=True)
    for torn in out.glob("*.tmp"):
        torn.unlink()
    if not (out / TOKENIZER).is_file():
        if not ready:
            print(f"training a vocabulary of {vocab:,} symbols ...", flush=True)
        encoding = ready or train_tokenizer(_training_text(parts), vocab)
        atomic_write(out / PLAN, lambda beside: beside.write_text(json.dumps(plan)))
        save_tokenizer(encoding, out)
    encoding = tokenizer(str(out / TOKENIZER))
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    shards = _make_all(parts, out, min(jobs or cpus, len(parts)), "B" if parts[0].texts else " tokens")
    counts = ("tokens", "bytes", "documents")
    totals = {
        split: {count: sum(shard[count] for shard in shards if shard["split"] == split) for count in counts}
        for split in ("train", "val")
    }
    what = {"name": encoding.name, "sha256": tokenizer_hash(encoding), "n_vocab": encoding.n_vocab}
    manifest = plan | {"tokenizer": what} | totals | {"shards": shards}
    atomic_write(out / MANIFEST, lambda beside: beside.write_text(json.dumps(manifest, indent=1) + "\n"))
    (out / PLAN).unlink()
    return manifest


def _training_text(parts: list[Part]) -> Iterator[bytes]:
    """Text for a vocabulary: the first of every training part in turn, so that no part is preferred."""
    train = [part for part in parts if part.split == "train"]
    each = TOKENIZER_BYTES // len(train)
    for part in train:
        size = 0
        for text, _ in _texts(part):
            yield text
            size += len(text)
            if size >= each:
                break


# ---------------------------------------------------------------------------------------------------------------------
# Batches


# ---------------------------------------------------------------------------------------------------------------------
# Commands


def show(source: str = "stdlib") -> None:
    """Print what a corpus is; of shards, also whether they still are what the manifest says."""
    corpus = load_corpus(source)
    encoding, shards = corpus.encoding, isinstance(corpus.train, Shards)
    print(f"{corpus.name}, tokenizer {encoding.name!r} ({encoding.n_vocab:,} symbols)")
    parts = (("train", corpus.train, corpus.train_bytes, corpus.train_files),
             ("held out", corpus.val, corpus.val_bytes, corpus.val_files))  # fmt: skip
    for part, tokens, size, files in parts:
        shown = ", ".join(files[:3]) + (", ..." if len(files) > 3 else "")
        print(f"{part:>9}: {len(files):,} files, {size:,} bytes, {len(tokens):,} tokens ({shown})")
    if shards:
        text = encoding.decode_bytes([i for i in corpus.val[: 2**20].tolist() if i != encoding.eot_token])
        line = f"held out: {len(text) / len(encode(text, encoding)):.3f} bytes per token"
        try:
            line += f"; of GPT-2's vocabulary on the same text: {len(text) / len(encode(text, tokenizer('gpt2'))):.3f}"
        except ValueError as error:
            line += f"; GPT-2's for comparison: {error}"
        print(line)
        check(source)
    inputs, _ = batch(corpus.train, 3, min(240, len(corpus.train) - 1), seed=0, step=0)
    print("\na batch of 3 rows, seed 0, step 0:")
    for row in inputs:
        print("-" * 80 + "\n" + encoding.decode(row.tolist()))


def check(folder: str) -> None:
    """Compare every shard with the manifest. ValueError names the first that differs."""
    shards = json.loads((Path(folder) / MANIFEST).read_text())["shards"]
    for shard in tqdm(shards, desc="sha256", dynamic_ncols=True, leave=False, disable=None):
        if _sha256(Path(folder) / shard["file"]) != shard["sha256"]:
            raise ValueError(f"data {folder!r}: {shard['file']} is not the file of the manifest: its sha256 differs")
    print(f"sha256 of {len(shards)} shards: as the manifest says")


def _number(text: str) -> int:
    with contextlib.suppress(ValueError):
        if float(text).is_integer() and float(text) >= 1:
            return int(float(text))
    raise argparse.ArgumentTypeError(f"{text!r}: legal is a whole number of at least 1, as 8 or 15e9")


def _vocab(text: str) -> int | str:
    return int(text) if text.isdigit() else text


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] not in ("text", "fineweb-edu", "-h", "--help"):
        return show(argv[0])
    if not argv:
        return show()

    def refuse(message):
        raise ValueError(f"{message} (--help lists the flags)")

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = refuse
    commands = parser.add_subparsers(dest="command", metavar="[SOURCE | text | fineweb-edu]")
    text = commands.add_parser("text", help="token shards of local text")
    text.add_argument("paths", nargs="+", help="text files, folders of text files, 'stdlib'")
    web = commands.add_parser("fineweb-edu", help="token shards of FineWeb-Edu (pip install datasets)")
    web.add_argument("--tokens", type=_number, default=15 * 10**9, help="training tokens, as 15e9 (the default)")
    for command in (text, web):
        command.error = refuse
        command.add_argument("--out", required=True, help="folder of the shards; that of a killed command: goes on")
        command.add_argument("--vocab", type=_vocab, default=32768, help="symbols of a vocabulary to train (default 32768), "
                             "or a ready one: gpt2, bytes, a tokenizer.json")  # fmt: skip
        command.add_argument("--jobs", type=_number, default=0, help="processes (default: one for each CPU)")
    args = parser.parse_args(argv)
    if isinstance(args.vocab, int) and not 258 <= args.vocab <= 2**20:
        raise ValueError(f"vocab is {args.vocab}: legal is 258 to {2**20}, gpt2, bytes, or a tokenizer.json")
    source, parts = plan_text(args.paths) if args.command == "text" else plan_fineweb(args.tokens)
    manifest = make_shards(source, parts, args.vocab, args.out, args.jobs)
    for split in ("train", "val"):
        n = manifest[split]
        print(f"{split:>5}: {n['documents']:,} documents, {n['bytes']:,} bytes, {n['tokens']:,} tokens, "
              f"{n['bytes'] / max(1, n['tokens']):.3f} bytes per token")  # fmt: skip
    if args.command == "fineweb-edu" and manifest["train"]["tokens"] < args.tokens:
        print(f"note: the sample ended before {args.tokens:,} tokens")
    print(f"in {args.out}, tokenizer {manifest['tokenizer']['name']!r}; next: python train.py --data {args.out}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"data.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("data.py: interrupted; the same command goes on", file=sys.stderr)
        sys.exit(130)
